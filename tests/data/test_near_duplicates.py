"""Perceptual hashes of copies, blank and damaged images, and the search against all pairs one by one."""

import io
import itertools

import imagehash
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from concentration.data import near_duplicates
from concentration.data.decoding import UNDECODABLE
from concentration.data.near_duplicates import find_near_duplicates, hash_image


def encode(image: Image.Image, format: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def draw_picture(seed: int, size=(300, 220), cells=(8, 6)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (cells[1], cells[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def compute_distance(left: int, right: int) -> int:
    return (left ^ right).bit_count()


def find_slowly(hashes: list[int], splits: list[int], max_distance: int) -> set[tuple[int, int]]:
    """Every pair, the sample of the lower split first."""
    return {
        (a, b)
        for a, b in itertools.permutations(range(len(hashes)), 2)
        if splits[a] < splits[b] and compute_distance(hashes[a], hashes[b]) <= max_distance
    }


def flip_bits(generator: np.random.Generator, hash_N: np.ndarray, num_bits: int) -> np.ndarray:
    """Each hash with up to `num_bits` of its bits changed."""
    bits = np.uint64(1) << generator.integers(0, 64, (num_bits, len(hash_N)), dtype=np.uint64)
    return hash_N ^ np.bitwise_xor.reduce(bits, axis=0)


def test_the_hash_is_that_of_the_library():
    """Nearly: a large image is made smaller in two steps."""
    for seed in range(20):
        picture = draw_picture(seed)
        assert compute_distance(hash_image(encode(picture)), int(str(imagehash.phash(picture)), 16)) <= 2
    small = draw_picture(0, (64, 64))
    assert hash_image(encode(small)) == int(str(imagehash.phash(small)), 16)


@pytest.mark.parametrize("change", ["jpeg", "webp", "half", "double", "brighter", "grey", "exif"])
def test_copies_are_near_and_others_far(change):
    hashes = []
    for seed in range(10):
        picture, options = draw_picture(seed), {}
        if change == "half":
            picture = picture.resize((150, 110), Image.Resampling.BICUBIC)
        elif change == "double":
            picture = picture.resize((600, 440), Image.Resampling.BICUBIC)
        elif change == "brighter":
            picture = picture.point(lambda value: min(255, int(1.05 * value)))
        elif change == "grey":
            picture = picture.convert("L")
        elif change == "exif":
            picture, options["exif"] = picture.rotate(90, expand=True), Image.Exif()
            options["exif"][0x0112] = 6
        copy = hash_image(encode(picture, "webp" if change == "webp" else "jpeg", quality=85, **options))
        assert compute_distance(copy, hash_image(encode(draw_picture(seed)))) <= 3
        hashes.append(copy)
    assert min(compute_distance(a, b) for a, b in itertools.combinations(hashes, 2)) > 10


@pytest.mark.parametrize("grey", [0, 127, 255])
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_blank_images_have_no_hash(grey, noise):
    pixels = grey + np.random.default_rng(0).normal(0, noise, (200, 200))
    assert hash_image(encode(Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)), "jpeg")) is None


def test_a_small_thing_on_white_has_a_hash():
    image = Image.new("L", (224, 224), 255)
    image.paste(0, (108, 100, 116, 112))
    assert hash_image(encode(image)) is not None


@pytest.mark.parametrize("content", [b"", b"text", encode(draw_picture(0))[:200], encode(draw_picture(0), "tiff")])
def test_what_cannot_be_decoded_is_undecodable(content):
    with pytest.raises(UNDECODABLE):
        hash_image(content)


@given(st.integers(0, 2**31), st.integers(0, 60), st.integers(0, 3), st.integers(1, 4))
@example(seed=0, num_samples=0, max_distance=3, num_splits=1)
@example(seed=0, num_samples=60, max_distance=3, num_splits=1)
@example(seed=1, num_samples=60, max_distance=3, num_splits=2)
def test_no_pair_is_missed_and_none_invented(seed, num_samples, max_distance, num_splits):
    generator = np.random.default_rng(seed)
    centres = generator.integers(0, 2**64, 8, dtype=np.uint64)
    hash_N = flip_bits(generator, generator.choice(centres, num_samples), 3)
    split_N = generator.integers(0, num_splits, num_samples).astype(np.int8)
    found = find_near_duplicates(hash_N, split_N, max_distance)
    expected = find_slowly(hash_N.tolist(), split_N.tolist(), max_distance)
    assert found.num_pairs == len(expected)
    splits = sorted(set(split_N.tolist()))
    assert found.num_twins == {
        (left, right): tuple(
            len({pair[side] for pair in expected if (split_N[pair[0]], split_N[pair[1]]) == (left, right)})
            for side in (0, 1)
        )
        for left, right in itertools.combinations(splits, 2)
    }
    assert found.num_left_out == 0
    listed = [tuple(pair) for pair in found.sample_P2.tolist()]
    hashes = hash_N.tolist()
    firsts = {(hashes[a], hashes[b], split_N[a], split_N[b]): (a, b) for a, b in sorted(expected, reverse=True)}
    assert sorted(listed) == sorted(firsts.values()), "each pair of hashes once, by its first samples"
    assert found.distance_P.tolist() == [compute_distance(hashes[a], hashes[b]) for a, b in listed]
    by_splits = itertools.groupby(listed, key=lambda pair: (split_N[pair[0]], split_N[pair[1]]))
    for _, pairs in by_splits:
        distances = [compute_distance(hashes[a], hashes[b]) for a, b in pairs]
        assert distances == sorted(distances)


def test_pairs_are_found_across_blocks_of_candidates(monkeypatch):
    generator = np.random.default_rng(0)
    hash_N = flip_bits(generator, generator.choice(generator.integers(0, 2**64, 3, dtype=np.uint64), 200), 2)
    split_N = generator.integers(0, 2, 200).astype(np.int8)
    whole = find_near_duplicates(hash_N, split_N, 3)
    monkeypatch.setattr(near_duplicates, "_BLOCK", 7)
    in_blocks = find_near_duplicates(hash_N, split_N, 3)
    assert whole.num_pairs == in_blocks.num_pairs > 100
    np.testing.assert_array_equal(whole.sample_P2, in_blocks.sample_P2)
    assert whole.num_twins == in_blocks.num_twins


def test_of_thousands_of_copies_one_pair_is_listed_and_all_are_counted():
    hash_N = np.full(30_000, 0x123456789ABCDEF0, np.uint64)
    hash_N[7] ^= np.uint64(1)
    split_N = (np.arange(30_000) % 3).astype(np.int8)
    found = find_near_duplicates(hash_N, split_N, 1)
    assert found.num_pairs == 3 * 10_000**2
    assert found.num_twins == dict.fromkeys([(0, 1), (0, 2), (1, 2)], (10_000, 10_000))
    assert found.sample_P2.tolist() == [[0, 1], [0, 7], [0, 2], [1, 2], [7, 2]]
    assert found.distance_P.tolist() == [0, 1, 0, 0, 1]


def test_of_many_pairs_the_nearest_are_listed(monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_LISTED", 5)
    hash_N = np.random.default_rng(0).integers(0, 2**64, 50, dtype=np.uint64)
    changed_N = hash_N.copy()
    changed_N[:47] ^= np.uint64(6)
    found = find_near_duplicates(np.concatenate([hash_N, changed_N]), np.arange(100) // 50, 2)
    assert found.num_pairs == 50
    assert found.sample_P2.tolist() == [[47, 97], [48, 98], [49, 99], [0, 50], [1, 51]]
    assert found.distance_P.tolist() == [0, 0, 0, 2, 2]


def test_a_hundred_thousand_samples_are_compared_at_once():
    generator = np.random.default_rng(0)
    hash_N = generator.integers(0, 2**64, 100_000, dtype=np.uint64)
    hash_N[-100:] = flip_bits(generator, hash_N[:100], 3)
    split_N = (np.arange(100_000) >= 90_000).astype(np.int8)
    found = find_near_duplicates(hash_N, split_N, 3)
    assert found.sample_P2[np.argsort(found.sample_P2[:, 0])].tolist() == [[n, 99_900 + n] for n in range(100)]


@pytest.mark.parametrize("max_compared", [0, 40, 400, 1000, 3000])
def test_where_too_many_agree_in_a_band_the_others_are_compared_and_it_is_said(max_compared, monkeypatch):
    """Half of the hashes share their lowest 16 bits: 625 pairs agree in that band, some 50 in each of the three others."""
    generator = np.random.default_rng(0)
    hash_N = generator.integers(0, 2**64, 50, dtype=np.uint64)
    hash_N = np.concatenate([hash_N, flip_bits(generator, hash_N, 3)])
    hash_N[::2] &= ~np.uint64(0xFFFF)
    expected = find_slowly(hash_N.tolist(), (np.arange(100) // 50).tolist(), 3)
    agree_elsewhere = {
        (a, b) for a, b in expected if any(int(hash_N[a] ^ hash_N[b]) >> start & 0xFFFF == 0 for start in (16, 32, 48))
    }
    assert len(expected) == 50 > len(agree_elsewhere)
    monkeypatch.setattr(near_duplicates, "MAX_COMPARED", max_compared)
    found = find_near_duplicates(hash_N, np.arange(100) // 50, 3)
    listed = {(a, b) for a, b in found.sample_P2.tolist()}
    assert len(listed) == len(found.sample_P2) == found.num_pairs, "each pair once, also where a band left it out"
    assert listed <= expected
    assert len(listed) <= max_compared
    if max_compared >= 400:
        assert listed >= agree_elsewhere
    assert (found.num_left_out == 0) == (max_compared == 3000)
    if max_compared == 3000:
        assert listed == expected
