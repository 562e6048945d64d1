"""The index of a shard against what `webdataset` itself reads, damage of every kind, and a split against slow references."""

import contextlib
import dataclasses
import io
import itertools
import shutil
import subprocess
import tarfile
import zlib

import numpy as np
import pytest
import safetensors.numpy
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from labelled_shards import encode_labels

from concentration.data.index import ShardIndex, index_shard
from concentration.data.split import load_split
from concentration.errors import DataError
from concentration.taxonomy import Taxonomy

FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def read_with_webdataset(path) -> list[tuple[str, bytes]]:
    """(key, image) of all samples, in order."""
    dataset = webdataset.WebDataset(str(path), shardshuffle=False)
    return [
        (
            sample["__key__"],
            next(sample[extension] for extension in ("png", "jpg", "jpeg", "webp") if extension in sample),
        )
        for sample in dataset
    ]


def read_with_index(index: ShardIndex, path) -> list[tuple[str, bytes]]:
    """The same by offset alone."""
    content = path.read_bytes()
    spans = zip(index.image_offset.tolist(), index.image_size.tolist(), strict=True)
    return [(key, content[start : start + size]) for key, (start, size) in zip(index.keys, spans, strict=True)]


def labels_of(index: ShardIndex, taxonomy: Taxonomy) -> list[list[str]]:
    ids = [taxonomy.classes[position].id for position in index.label_position]
    return [ids[start:stop] for start, stop in itertools.pairwise(index.label_start)]


def refuse(path, taxonomy, *expected: str) -> None:
    """Indexing fails with one line that names the file and everything that is expected."""
    with pytest.raises(DataError) as caught:
        index_shard(path, taxonomy, path.name)
    for text in (str(path), *expected):
        assert text in str(caught.value)


def test_our_own_shards_are_read_back(write_shard, taxonomy, tmp_path):
    labels = [["gull"], ["taxi", "osprey"], ["egg"], ["soup"]]
    samples = write_shard(tmp_path / "a.tar", labels)
    index = index_shard(tmp_path / "a.tar", taxonomy, "a.tar")
    assert index.num_samples == 4
    assert read_with_index(index, tmp_path / "a.tar") == [(sample.key, sample.image) for sample in samples]
    by_position = [sorted(ids, key=lambda class_id: taxonomy.position[class_id]) for ids in labels]
    assert labels_of(index, taxonomy) == by_position


@pytest.mark.parametrize("format", FORMATS)
def test_what_tarfile_writes_is_read_as_webdataset_reads_it(format, write_tar, encode_image, taxonomy, tmp_path):
    """Long names, folders, dots in folders, members that are no part of a sample, and notes about the shard."""
    link = tarfile.TarInfo("z/link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "a.png"
    folder = tarfile.TarInfo("folder.d/")
    folder.type = tarfile.DIRTYPE
    image = encode_image("jpg")
    members = [
        ("README", b"no extension, so no sample"),
        ("__notes__/license.txt", b"a note about the shard"),
        ("__info__", b"another"),
        (folder, b""),
        ("folder.d/a.png", encode_image("png", seed=1)),
        ("folder.d/a.json", encode_labels("gull")),
        ("folder.d/a.txt", b"an extra member"),
        ("folder.d/a.seg.png", encode_image("png", seed=2)),
        ("./b.JPG", image),
        ("./b.json", encode_labels("taxi")),
        ("._b.jpg", b"what macOS leaves"),
        ("deep/" * 10 + "n" * 90 + ".json", encode_labels("soup", "gull")),
        ("deep/" * 10 + "n" * 90 + ".webp", encode_image("webp")),
        ("z/é字.cls", b"9\n"),
        ("z/é字.jpeg", image),
        (link, b""),
    ]
    if format != "ustar":
        members += [("m" * 300 + ".png", image), ("m" * 300 + ".CLS", b"0")]
    path = write_tar(tmp_path / "a.tar", members, FORMATS[format])
    index = index_shard(path, taxonomy, "a.tar")
    assert read_with_index(index, path) == read_with_webdataset(path)
    expected = [["gull"], ["taxi"], ["soup", "gull"], ["ramen"], ["bird"]]
    assert labels_of(index, taxonomy) == expected[: len(index.keys)]
    assert len(index.keys) == 4 + (format != "ustar")


def test_hidden_members_are_left_out(write_tar, encode_image, taxonomy, tmp_path):
    """As macOS's tar writes them: one before every file, so that they part the members of a sample."""
    image = encode_image("jpg")
    members = [
        (".DS_Store", b"-"),
        ("birds/.DS_Store", b"-"),
        ("birds/._1.jpg", b"-"),
        ("birds/1.jpg", image),
        ("birds/._1.json", b"-"),
        ("birds/1.json", encode_labels("gull")),
        ("birds/.ipynb_checkpoints/1-checkpoint.jpg", image),
        ("birds/.ipynb_checkpoints/1-checkpoint.json", encode_labels("gull")),
        ("__MACOSX/birds/._1.jpg", b"-"),
        ("./../2.jpg", image),
        ("./../2.json", encode_labels("taxi")),
    ]
    index = index_shard(write_tar(tmp_path / "a.tar", members), taxonomy, "a.tar")
    assert index.keys == ("birds/1", "./../2")


def test_tars_that_were_joined_by_cat_are_refused_and_those_joined_by_tar_read(write_shard, taxonomy, tmp_path):
    """What stands behind the first one's end would be lost without a word."""
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", [["gull"], ["taxi"]])
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join((tmp_path / f"{name}.tar").read_bytes() for name in "ab"))
    refuse(joined, taxonomy, "goes on after its end-of-archive mark", "tar --concatenate")
    joined.write_bytes((tmp_path / "a.tar").read_bytes() + bytes(3 * 2**20))  # padding of any length
    assert index_shard(joined, taxonomy, "joined.tar").num_samples == 2
    shutil.copy(tmp_path / "a.tar", joined)
    subprocess.run(["tar", "--concatenate", f"--file={joined}", tmp_path / "b.tar"], check=True)
    assert index_shard(joined, taxonomy, "joined.tar").num_samples == 4


def test_what_webdatasets_own_writer_writes_is_read_as_webdataset_reads_it(encode_image, taxonomy, tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=5, verbose=0) as writer:
        for number in range(12):
            image = encode_image("jpg", seed=number)
            writer.write({"__key__": f"in/{number:04d}", "jpg": image, "cls": number % 11, "note.txt": "extra"})
    for shard in range(3):
        path = tmp_path / f"train-{shard:06d}.tar"
        index = index_shard(path, taxonomy, path.name)
        assert read_with_index(index, path) == read_with_webdataset(path)
        numbers = range(5 * shard, min(12, 5 * shard + 5))
        assert index.label_position.tolist() == [number % 11 for number in numbers]


def test_where_samples_have_both_kinds_of_labels_the_chosen_one_counts(write_tar, encode_image, taxonomy, tmp_path):
    members = [("a.png", encode_image()), ("a.json", encode_labels("tram")), ("a.cls", b"3")]
    path = write_tar(tmp_path / "a.tar", members)
    assert index_shard(path, taxonomy, "a.tar", "json").label_position.tolist() == [10]
    assert index_shard(path, taxonomy, "a.tar", "cls").label_position.tolist() == [3]
    path = write_tar(tmp_path / "b.tar", members[:2])
    assert index_shard(path, taxonomy, "b.tar", "auto").label_position.tolist() == [10]
    with pytest.raises(DataError, match=r"'a' has 0 labels, expected one \(\.cls\)"):
        index_shard(path, taxonomy, "b.tar", "cls")


def test_checksums_are_those_of_the_images(write_shard, taxonomy, tmp_path):
    samples = write_shard(tmp_path / "a.tar", [["gull"], ["taxi"], ["egg"]])
    index = index_shard(tmp_path / "a.tar", taxonomy, "a.tar")
    assert index.image_crc32.tolist() == [zlib.crc32(sample.image) for sample in samples]


def test_labels_are_positions_sorted_and_each_once(write_tar, encode_image, taxonomy, tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", encode_image()), ("a.json", encode_labels("tram", "bird", "tram"))])
    assert index_shard(path, taxonomy, "a.tar").label_position.tolist() == [0, 10]


def test_an_index_is_loaded_as_it_was_saved_and_its_bytes_are_always_the_same(write_shard, taxonomy, tmp_path):
    write_shard(tmp_path / "a.tar", [["gull"], ["taxi", "osprey"]])
    index = index_shard(tmp_path / "a.tar", taxonomy, "a.tar")
    contents = set()
    for _ in range(8):
        index.save(tmp_path / "a.index")
        contents.add((tmp_path / "a.index").read_bytes())
    assert len(contents) == 1
    shutil.move(tmp_path, tmp_path.with_name("moved"))  # a working directory may be moved as a whole
    loaded = ShardIndex.load(tmp_path.with_name("moved") / "a.index")
    assert loaded.path == tmp_path.with_name("moved") / "a.tar"
    assert (loaded.size_bytes, loaded.keys) == (index.size_bytes, index.keys)
    for name in ("image_offset", "image_size", "image_crc32", "label_start", "label_position"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(index, name))


@pytest.fixture(scope="module", params=FORMATS)
def whole(request, write_tar, encode_image, taxonomy, tmp_path_factory):
    """A tar with names of all lengths, with its index."""
    members = []
    for number, name in enumerate(("a", "b" * 120, "c/" + "d" * 99)):
        name = name if request.param != "ustar" else name[:90]
        members += [(f"{name}.png", encode_image(seed=number)), (f"{name}.json", encode_labels("gull"))]
    path = write_tar(tmp_path_factory.mktemp("whole") / "a.tar", members, FORMATS[request.param])
    return path, index_shard(path, taxonomy, "a.tar")


def try_index(path, taxonomy) -> ShardIndex | DataError:
    try:
        return index_shard(path, taxonomy, path.name)
    except DataError as error:
        return error


def check_cut(whole, taxonomy, num_bytes: int) -> None:
    """A tar of so many bytes is refused, or everything is still in it."""
    path, index = whole
    cut = path.with_name("cut.tar")
    cut.write_bytes(path.read_bytes()[:num_bytes])
    found = try_index(cut, taxonomy)
    if isinstance(found, DataError):
        assert str(cut) in str(found)
    else:
        assert found.keys == index.keys
        assert found.image_offset.tolist() == index.image_offset.tolist()
        assert found.label_position.tolist() == index.label_position.tolist()


def test_a_tar_cut_at_any_block_is_never_silently_shorter(whole, taxonomy):
    path, index = whole
    for end in range(0, path.stat().st_size, 512):
        for num_bytes in {max(0, end - 1), end, end + 1}:
            check_cut(whole, taxonomy, num_bytes)
    last = int(index.image_offset[-1] + index.image_size[-1])
    cut = path.with_name("cut.tar")
    for num_bytes in (0, 1, 511, 512, 2048, last - 1, last):
        cut.write_bytes(path.read_bytes()[:num_bytes])
        refuse(cut, taxonomy, "write or fetch it again")


@given(st.data())
def test_a_tar_cut_anywhere_is_never_silently_shorter(whole, taxonomy, data):
    check_cut(whole, taxonomy, data.draw(st.integers(0, whole[0].stat().st_size)))


@given(st.data())
def test_a_header_with_a_changed_byte_is_never_silently_skipped(whole, taxonomy, data):
    path, index = whole
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        headers = [member.offset_data - 512 for member in tar]
    place = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 511))
    content[place] ^= data.draw(st.integers(1, 255))
    changed = path.with_name("changed.tar")
    changed.write_bytes(content)
    found = try_index(changed, taxonomy)
    if isinstance(found, DataError):
        assert str(changed) in str(found)
    else:
        assert found.keys == index.keys
        assert found.image_offset.tolist() == index.image_offset.tolist()


def test_files_that_are_no_tars_are_refused(write_tar, encode_image, taxonomy, tmp_path):
    path = tmp_path / "a.tar"
    refuse(path, taxonomy, "cannot be read", "bring it back")
    path.write_bytes(b"")
    refuse(path, taxonomy, "empty", "write or fetch it again")
    path.write_bytes(b"no tar at all " * 100)
    refuse(path, taxonomy, "no tar", "write or fetch it again")
    write_tar(path, [])
    refuse(path, taxonomy, "no samples")
    write_tar(path, [("README", b"text"), ("notes.txt", b"text")][:1])
    refuse(path, taxonomy, "no samples")
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO(b""))
    refuse(path, taxonomy, "uncompressed")
    path.unlink()
    path.mkdir()
    refuse(path, taxonomy, "cannot be read")


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.json", encode_labels("gull"))], ("'a' has 0 images", ".webp", "a.json")),
        ([("a.png", b"-")], ("'a' has 0 labels", ".json", "a.png")),
        ([("a.png", b"-"), ("b.json", encode_labels("gull")), ("a.json", encode_labels("gull"))], ("'a' has 0 labels",)),
        ([("a.png", b"-"), ("a.jpg", b"-"), ("a.json", encode_labels("gull"))], ("'a' has 2 images", "a.png, a.jpg")),
        ([("a.png", b"-"), ("a.PNG", b"-"), ("a.json", encode_labels("gull"))], ("'a' has 2 images",)),
        ([("a.png", b"-"), ("a.json", encode_labels("gull")), ("a.cls", b"1")], ("'a' has 2 labels", "data.labels=json")),
        ([("a.png", b"-"), ("a.json", encode_labels("swan"))], ("a.json", "'swan'", "add the class or correct the label")),
        ([("a.png", b"-"), ("a.json", b'{"labels": [3]}')], ("a.json", "label 3")),
        ([("a.png", b"-"), ("a.json", b'{"labels": [["gull"]]}')], ("a.json", "['gull']")),
        ([("a.png", b"-"), ("a.json", b'{"labels": [null]}')], ("a.json", "None")),
        ([("a.png", b"-"), ("a.json", b'{"labels": "gull"}')], ("a.json", "'gull'", "expected a list")),
        ([("a.png", b"-"), ("a.json", b'{"labels": []}')], ("a.json", "at least one")),
        ([("a.png", b"-"), ("a.json", b'{"label": "gull"}')], ("a.json", '"labels"')),
        ([("a.png", b"-"), ("a.json", b'["gull"]')], ("a.json", '"labels"')),
        ([("a.png", b"-"), ("a.json", b"\xff\xfe")], ("a.json", "not JSON")),
        ([("a.png", b"-"), ("a.json", b"")], ("a.json", "not JSON")),
        ([("a.png", b"-"), ("a.json", b'{"labels": ["gull"], "labels": ["taxi"]}')], ("a.json", "comes twice")),
        ([("a.png", b"-"), ("a.json", b"[" * 10**5)], ("a.json", "not JSON")),
        ([("a.png", b"-"), ("a.cls", b"11")], ("a.cls", "'11'", "taxonomy of 11 classes")),
        ([("a.png", b"-"), ("a.cls", b"-1")], ("a.cls", "'-1'")),
        ([("a.png", b"-"), ("a.cls", b"gull")], ("a.cls", "'gull'")),
        ([("a.png", b"-"), ("a.cls", b"\xb2")], ("a.cls", "is no position")),
        ([("a.png", b"-"), ("a.cls", b"")], ("a.cls", "is no position")),
        ([("a.png", b"-"), ("a.cls", b"1\n2")], ("a.cls", r"'1\n2' is no position")),
        ([("a.png", b"-"), ("a.cls", b"9" * 5000)], ("a.cls", "is no position")),
        ([("a\nb.png", b"-"), ("a\nb.cls", b"1")], (r"a\nb.png", "line break")),
        ([("a\udce9.png", b"-"), ("a\udce9.cls", b"1")], ("not UTF-8", "rename")),
    ],
)  # fmt: skip
def test_samples_that_are_not_an_image_with_labels_are_refused(members, expected, write_tar, taxonomy, tmp_path):
    good = [("first.png", b"-"), ("first.json", encode_labels("gull"))]
    refuse(write_tar(tmp_path / "a.tar", good + members), taxonomy, *expected)


@pytest.mark.parametrize("size", [b"\x80" + b"\xff" * 11, b"77777777777\0", b"-0000002000\0"])
@pytest.mark.parametrize("place", [0, 1024])
def test_a_member_of_impossible_size_is_refused_and_not_read(size, place, write_tar, taxonomy, tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"-"), ("a.cls", b"1")])
    content = bytearray(path.read_bytes())
    content[place + 124 : place + 136] = size
    content[place + 148 : place + 156] = b" " * 8
    content[place + 148 : place + 156] = f"{sum(content[place : place + 512]):06o}\0 ".encode()
    path.write_bytes(content)
    # From Python 3.14 on tarfile itself refuses a negative one.
    refuse(path, taxonomy, "truncated", *(() if size.startswith(b"-") else ("a member of",)))


@pytest.mark.parametrize("num_bytes", [2**50, 2**70])
def test_a_name_longer_than_memory_is_refused(num_bytes, write_tar, taxonomy, tmp_path):
    path = write_tar(tmp_path / "a.tar", [("x" * 200, b""), ("a.png", b"-"), ("a.cls", b"1")], tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    content[124:136] = b"\x80" + num_bytes.to_bytes(11, "big")
    content[148:156] = b" " * 8
    content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    path.write_bytes(content)
    refuse(path, taxonomy, "truncated")


@pytest.mark.parametrize("recorded", ["", "a\nb.tar", "a\0.tar", "x" * 5000])
def test_an_index_of_a_file_that_cannot_be_is_refused_in_one_line(recorded, write_tar, taxonomy, tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"-"), ("a.cls", b"1")])
    index = dataclasses.replace(index_shard(path, taxonomy, "a.tar"), path=recorded)
    index.save(tmp_path / "a.index")
    with pytest.raises(DataError, match=r"a\.index: damaged|no such file, but .*a\.index describes it") as caught:
        ShardIndex.load(tmp_path / "a.index")
    assert "\n" not in str(caught.value)


def test_a_sparse_member_is_refused(write_tar, taxonomy, tmp_path):
    """Its bytes do not lie in the tar as one piece."""
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.map": "0,4", "GNU.sparse.size": "9"}
    path = write_tar(tmp_path / "a.tar", [(member, b"head"), ("a.cls", b"1")])
    refuse(path, taxonomy, "a.png", "sparse")


def test_a_key_that_comes_twice_in_a_tar_is_refused(write_tar, encode_image, taxonomy, tmp_path):
    members = [
        member for key in "aba" for member in ((f"{key}.png", encode_image()), (f"{key}.json", encode_labels("gull")))
    ]
    refuse(write_tar(tmp_path / "a.tar", members), taxonomy, "'a'", "unique")


def test_a_tar_that_is_gone_or_changed_since_it_was_indexed_is_refused(make_split, taxonomy, tmp_path):
    make_split(tmp_path, [[["gull"]], [["taxi"], ["soup"]]])
    tar = tmp_path / "train-000001.tar"
    content = tar.read_bytes()
    for changed in (content[:-512], content + bytes(512)):
        tar.write_bytes(changed)
        with pytest.raises(DataError, match=rf"{tar}: {len(changed)} bytes, but {len(content)} when it was indexed"):
            load_split(tmp_path, "train", taxonomy)
    tar.unlink()
    with pytest.raises(DataError, match=rf"{tar}: no such file, but .*train-000001\.index describes it; bring it back"):
        load_split(tmp_path, "train", taxonomy)


@pytest.fixture(scope="module")
def small_split(make_split, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    make_split(folder, [[["gull"], ["taxi", "osprey"], ["egg"]]])
    return folder


@given(st.data())
def test_a_damaged_index_is_refused_or_says_what_it_said(small_split, taxonomy, data):
    path = small_split / "train-000000.index"
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = small_split / "damaged-000000.index"
    damaged.write_bytes(content)
    with contextlib.suppress(DataError):
        found, whole = (load_split(small_split, name, taxonomy).shards[0] for name in ("damaged", "train"))
        assert (found.path, found.size_bytes, found.keys) == (whole.path, whole.size_bytes, whole.keys)
        for name in ("image_offset", "image_size", "image_crc32", "label_start", "label_position"):
            np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"label_position": np.array([2], dtype=np.int32)}, "damaged"),
        ({"label_start": np.array([0, 2, 2])}, "damaged"),
        ({"label_start": np.array([0, 1])}, "damaged"),
        ({"image_size": np.array([100, 10**9])}, "outside"),
        ({"image_offset": np.array([-1, 0])}, "outside"),
        ({"image_crc32": np.array([1], dtype=np.uint32)}, "2 places"),
        ({"key_bytes": np.frombuffer(b"one", dtype=np.uint8)}, "2 places"),
        ({"key_bytes": np.frombuffer(b"\xff\n\xff", dtype=np.uint8)}, "damaged"),
    ],
)
def test_an_index_whose_parts_do_not_fit_is_refused(changes, expected, make_split, taxonomy, tmp_path):
    make_split(tmp_path, [[["gull"], ["taxi"]]])
    path = tmp_path / "train-000000.index"
    dataclasses.replace(ShardIndex.load(path), **changes).save(path)
    with pytest.raises(DataError, match=expected) as caught:
        load_split(tmp_path, "train", taxonomy)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"header": {}}, "damaged"),
        ({"header": {"path": "train-000000.tar"}}, "damaged"),
        ({"header": {"path": "train-000000.tar", "size_bytes": "many"}}, "damaged"),
        ({"image_offset": np.array([513, 2049])}, "checksum"),
        ({"label_position": np.array([3, 6], dtype=np.int32)}, "checksum"),
        ({"image_crc32": np.array([1, 2], dtype=np.uint32)}, "checksum"),
        ({"key_bytes": np.frombuffer(b"a\nb", dtype=np.uint8)}, "checksum"),
        ({"key_bytes": None}, "lacks key_bytes"),
    ],
)
def test_an_index_that_was_changed_by_another_hand_is_refused(changes, expected, make_split, taxonomy, tmp_path):
    make_split(tmp_path, [[["gull"], ["taxi"]]])
    path = tmp_path / "train-000000.index"
    with safetensors.safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()} | changes  # noqa: SIM118
        header = arrays.pop("header", file.metadata())
    path.write_bytes(safetensors.numpy.save({n: a for n, a in arrays.items() if a is not None}, header))
    with pytest.raises(DataError, match=expected) as caught:
        load_split(tmp_path, "train", taxonomy)
    assert str(path) in str(caught.value)
