"""Files that are damaged in every way we know: each is read as what it says, or refused in one clear line.

Never a hang, a wrong label, an error from inside a library, or a silent loss. A failure names its case, and
`judge(make_victims(taxonomy, folder)["shard"], "tar", 17)` is that case again.
"""

import io
import json
import random
import signal
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import MUTATIONS
from PIL import Image
from webdataset.tariterators import base_plus_ext

from concentration.data.index import index_shard
from concentration.data.sample_targets import StoredTargets
from concentration.data.split import Split, load_split
from concentration.data.views import INTERPOLATION, View, describe_decoder
from concentration.errors import ConfigError, DataError
from concentration.files import hash_file, write_atomically
from concentration.networks.bases import SmallBaseConfig
from concentration.networks.external.class_map import load_class_ids
from concentration.networks.external.teacher import load_external_teacher
from concentration.networks.pace import PaceConfig
from concentration.networks.student import NetworkConfig, Student, load_student
from concentration.networks.top_layers import TopConfig
from concentration.stages.prepared import DataOverrides, load_prepared
from concentration.stages.run_directory import RunDirectory, StageConfig
from concentration.stages.train_network import load_network
from concentration.targets import Codec, TargetRecords, keep_top_k
from concentration.taxonomy import Taxonomy

# A manifest may say that the views were decoded elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:.*the teachers' views were decoded by")

NUM_CASES, NUM_CASES_LONG = 40, 2000
MOST_SECONDS = 10
LABELS = (["osprey"], ["taxi", "egg"], ["gull"], ["ramen"], ["bird"])
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Victim:
    """A file, how it is damaged and read, and what must hold of what was read: `check(loaded, damaged content)`."""

    path: Path
    content: bytes
    mutations: tuple[str, ...]
    load: Callable[[], object]
    check: Callable[[object, bytes], None]


CASES = [
    (name, mutation)
    for name, mutations in {
        "taxonomy": ("bytes", "json"),
        "shard": ("bytes", "tar", "labels"),
        "index": ("bytes", "safetensors"),
        "plain targets": ("bytes", "safetensors"),
        "packed targets": ("bytes", "safetensors"),
        "manifest": ("bytes", "json"),
        "network": ("bytes", "safetensors"),
        "student": ("bytes", "safetensors"),
        "record of a network": ("bytes", "json"),
        "record of a config": ("bytes", "json"),
        "record of shards": ("bytes", "json"),
        "class map": ("bytes", "json"),
        "external teacher": ("bytes", "json"),
    }.items()
    for mutation in mutations
]


def mutate_labels(content: bytes, generator: random.Random) -> bytes:
    """A tar in which a .json member is mutated as JSON."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as given, tarfile.open(fileobj=buffer, mode="w") as written:
        members = given.getmembers()
        chosen = generator.choice([member.name for member in members if member.name.endswith(".json")])
        for member in members:
            text = given.extractfile(member).read()
            text = MUTATIONS["json"](text, generator) if member.name == chosen else text
            member.size = len(text)
            written.addfile(member, io.BytesIO(text))
    return buffer.getvalue()


def judge(victim: Victim, mutation: str, number: int) -> tuple[str, str]:
    """Damages and reads: ("right" | "refused" | what went wrong, details)."""
    generator = random.Random(f"{victim.path.name} {mutation} {number}")
    mutate = mutate_labels if mutation == "labels" else MUTATIONS[mutation]
    damaged = mutate(victim.content, generator)
    victim.path.write_bytes(damaged)
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(MOST_SECONDS)
    try:
        loaded = victim.load()
        signal.alarm(0)
        victim.check(loaded, damaged)
    except (ConfigError, DataError) as error:
        return ("several lines" if "\n" in str(error) else "refused"), str(error)
    except AssertionError as error:
        return "wrong result", str(error)
    except Exception as error:  # what a library raises is what this looks for
        return type(error).__name__, str(error)
    finally:
        signal.alarm(0)
        victim.path.write_bytes(victim.content)
    return "right", ""


def _give_up(*_) -> None:
    raise TimeoutError(f"longer than {MOST_SECONDS} s")


def examine(victim: Victim, mutation: str, num_cases: int) -> dict[str, list[tuple[int, str]]]:
    """By outcome: the cases and their details."""
    found: dict[str, list[tuple[int, str]]] = {}
    for number in range(num_cases):
        outcome, details = judge(victim, mutation, number)
        found.setdefault(outcome, []).append((number, details[:300]))
    return found


@pytest.fixture(scope="module")
def victims(taxonomy, tmp_path_factory) -> dict[str, Victim]:
    return make_victims(taxonomy, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize(("name", "mutation"), CASES)
def test_damage_ends_in_the_right_result_or_in_one_clear_error(victims, name, mutation):
    assert_nothing_went_wrong(examine(victims[name], mutation, NUM_CASES))


@pytest.mark.long
@pytest.mark.parametrize(("name", "mutation"), CASES)
def test_thousands_of_damages_end_in_the_right_result_or_in_one_clear_error(victims, name, mutation):
    assert_nothing_went_wrong(examine(victims[name], mutation, NUM_CASES_LONG))


def assert_nothing_went_wrong(found: Mapping[str, list]) -> None:
    assert found.get("refused"), "damage that is never noticed is no damage"
    assert {outcome: cases[:3] for outcome, cases in found.items() if outcome not in ("right", "refused")} == {}


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_an_undamaged_file_is_read_as_it_is(victims, name):
    victims[name].check(victims[name].load(), victims[name].content)


def make_victims(taxonomy: Taxonomy, root: Path) -> dict[str, Victim]:
    """A small working directory, and how each of its files is read."""
    shards, birds = root / "shards", taxonomy.restrict("birds")
    shards.mkdir()
    (shards / "taxonomy.json").write_text(json.dumps(taxonomy.to_json()))
    write_shard(shards / "train-000000.tar")
    index_shard(shards / "train-000000.tar", taxonomy, "train-000000.tar").save(shards / "train-000000.index")
    split = load_split(shards, "train", taxonomy)
    prepared = {"config": "0", "taxonomy": taxonomy.fingerprint, "fingerprint": split.fingerprint,
                "splits": {"train": {"samples": 5, "shards": 1}}}  # fmt: skip
    data = {"kind": "shards", "image_size": 6, "view": {"flip": 0.5}}
    (shards / "DONE.json").write_text(json.dumps(prepared))
    (shards / "config.json").write_text(json.dumps({"identity": {}, "config": {"data": data}}))
    plain, packed = write_targets(root / "plain", split, "plain", 0), write_targets(root / "packed", split, "packed", 2)
    run = root / "teachers/birds"
    network = make_network(run, birds)
    begun = StageConfig(workdir=root)
    write_atomically(run / "config.json", {"identity": {**begun.identity(), "upstream": {"data": "0"}}, "config": {}})
    (root / "map.json").write_text(json.dumps({"0": "gull", "2": None, "1": "osprey"}))
    external = make_external(root / "teachers/external", birds)

    def victim(path: Path, mutations: tuple[str, ...], load, check) -> Victim:
        return Victim(path, path.read_bytes(), mutations, load, check)

    def begin() -> bool:
        with RunDirectory(run).begin(begun, {"data": "0"}) as is_due:
            return is_due

    def has_the_split(loaded, _) -> None:
        for name in ("label_output", "label_start"):
            assert np.array_equal(getattr(loaded, name), getattr(split, name)), f"other {name}"
        for name in ("keys", "image_offset", "image_size"):
            assert np.array_equal(getattr(loaded.shards[0], name), getattr(split.shards[0], name)), f"other {name}"

    def has_the(expected: list[np.ndarray], loaded) -> None:
        assert all(np.array_equal(found, wanted) for found, wanted in zip(loaded, expected, strict=True))

    def has_the_weights(loaded, _) -> None:
        for name, tensor in network.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), f"other {name}"

    def is_whole(loaded, _) -> None:
        assert loaded(torch.zeros(1, 3, 8, 8)).shape == (1, loaded.num_outputs)

    def is_not_due(is_due, content) -> None:
        assert not is_due
        assert json.loads(content)["identity"] == {"upstream": {"data": "0"}}

    def is_prepared(loaded, _) -> None:
        found, found_taxonomy, fingerprint = loaded
        assert found_taxonomy.fingerprint == taxonomy.fingerprint
        assert isinstance(fingerprint, str)
        assert found.image_size == 6

    def maps_as_it_says(loaded, content) -> None:
        assert loaded == read_map_naively(content)

    tools = {
        "taxonomy": (shards / "taxonomy.json", lambda: Taxonomy.load(shards / "taxonomy.json"), is_as_its_file_says),
        "shard": (
            shards / "train-000000.tar",
            lambda: index_shard(shards / "train-000000.tar", taxonomy, "train-000000.tar"),
            lambda loaded, content: is_as_the_tar_says(loaded, content, taxonomy),
        ),
        "index": (shards / "train-000000.index", lambda: load_split(shards, "train", taxonomy), has_the_split),
        "plain targets": (
            root / "plain/birds/train-000000.safetensors",
            lambda: read_targets(root / "plain", split),
            lambda loaded, _: has_the(plain, loaded),
        ),
        "packed targets": (
            root / "packed/birds/train-000000.safetensors",
            lambda: read_targets(root / "packed", split),
            lambda loaded, _: has_the(packed, loaded),
        ),
        "manifest": (
            root / "packed/birds/manifest.json",
            lambda: read_targets(root / "packed", split),
            lambda loaded, _: has_the(packed, loaded),
        ),
        "network": (run / "model.safetensors", lambda: load_network(run, birds), has_the_weights),
        "student": (run / "model.safetensors", lambda: load_student(run / "model.safetensors"), is_whole),
        "record of a network": (run / "DONE.json", lambda: load_network(run, birds), has_the_weights),
        "record of a config": (run / "config.json", begin, is_not_due),
        "record of shards": (shards / "DONE.json", lambda: load_prepared(root, DataOverrides()), is_prepared),
        "class map": (
            root / "map.json",
            lambda: load_class_ids(str(root / "map.json"), 3, (), taxonomy, "birds"),
            maps_as_it_says,
        ),
        "external teacher": (external / "external.json", lambda: load_external_teacher(external, birds), is_whole),
    }
    mutations = {name: tuple(m for victim, m in CASES if victim == name) for name in tools}
    return {name: victim(path, mutations[name], load, check) for name, (path, load, check) in tools.items()}


def write_shard(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for number, labels in enumerate(LABELS):
            buffer = io.BytesIO()
            noise = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(noise).save(buffer, "png")
            for extension, content in (("png", buffer.getvalue()), ("json", json.dumps({"labels": labels}).encode())):
                member = tarfile.TarInfo(f"train-{number}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_targets(root: Path, split: Split, codec: Codec, num_views: int) -> list[np.ndarray]:
    """Targets of all verticals, and what they are read as."""
    generator = torch.Generator().manual_seed(0)
    view_of_sample = {
        (row, view): list(View(0, 0.1 * view, 0.5, 0.6 + 0.01 * row).encode()) for row in range(5) for view in range(2)
    }
    for vertical, size in zip(split.taxonomy.verticals, split.taxonomy.vertical_sizes, strict=True):
        rows = split.routed(vertical)
        kept = keep_top_k(torch.rand(len(rows) * max(1, num_views), size, generator=generator), 2)
        views = [view_of_sample[row, view] for row in rows for view in range(num_views)]
        records = TargetRecords(rows, *(part.numpy() for part in kept), np.array(views, np.uint8) if views else None)
        records.save(root / vertical / "train-000000.safetensors", codec, size)
        preprocessing = {"interpolation": INTERPOLATION, "decoder": describe_decoder()}
        manifest = {"codec": codec, "top_k": 2, "num_kept": 2, "views": num_views, "teacher": "0",
                    "taxonomy": split.taxonomy.fingerprint, "data": split.fingerprint,
                    "preprocessing": preprocessing}  # fmt: skip
        write_atomically(root / vertical / "manifest.json", manifest)
    return read_targets(root, split)


def read_targets(root: Path, split: Split) -> list[np.ndarray]:
    """What all samples get in two epochs."""
    targets, ordinals = StoredTargets(root, split, tail="spread"), np.arange(len(split))
    found = []
    for epoch in range(2):
        looked_up, views = targets.lookup(ordinals, epoch), targets.views(ordinals, epoch)
        found += [looked_up.index_BK.numpy(), looked_up.probability_BK.numpy(), looked_up.background_BM.numpy()]
        found += [] if views is None else [views.record_BV]
    return found


def make_network(run: Path, birds: Taxonomy) -> Student:
    torch.manual_seed(0)
    parts = {"base": SmallBaseConfig(channels=(2, 2), norm="group"), "top": TopConfig(kind="fc_fc", top1=3, top2=3)}
    network = Student(NetworkConfig(**parts, pace=PaceConfig(kind="none"), image_size=8, verticals={"birds": 5}))
    network.save(run / "model.safetensors", {"taxonomy": birds.fingerprint})
    facts = {"config": "0", "step": 3, "checkpoint": hash_file(run / "model.safetensors")}
    write_atomically(run / "DONE.json", facts)
    return network


class Linear(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :5]


def make_external(directory: Path, birds: Taxonomy) -> Path:
    program = torch.export.export(Linear(), (torch.rand(2, 3, 8, 8),))
    (directory / "model").mkdir(parents=True)
    torch.export.save(program, directory / "model/birds.pt2")
    model = {"kind": "torch", "path": "birds.pt2", "output": "softmax_logits", "image_size": 8, "smear": True, "crop": 1.0,
             "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}  # fmt: skip
    content = {"taxonomy": birds.fingerprint, "model": model, "class_ids": ["gull", None, "bird", "osprey", "osprey"]}
    write_atomically(directory / "external.json", content)
    return directory


def collect_pairs(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON; a key that comes twice has no one meaning."""
    keys = [key for key, _ in pairs]
    assert len(set(keys)) == len(keys), "a key comes twice, and the first value is lost"
    return dict(pairs)


def is_as_its_file_says(loaded: Taxonomy, content: bytes) -> None:
    entries = json.loads(content, object_pairs_hook=collect_pairs)["classes"]
    said = [(e["id"], e.get("name", e["id"]), tuple(e.get("parents", ())), e["vertical"]) for e in entries]
    assert [(c.id, c.name, c.parents, c.vertical) for c in loaded.classes] == said


def read_samples_naively(content: bytes) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members by extension of each run of members with one key, by Python's own tarfile."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        key, members = None, {}
        for member in tar:
            if not member.isfile() or member.name.startswith("__"):
                continue
            this, extension = base_plus_ext(member.name)
            if this is None:
                continue
            if this != key and members:
                yield key, members
                members = {}
            key = this
            assert extension.lower() not in members, f"two members {member.name}"
            members[extension.lower()] = tar.extractfile(member).read()
        if members:
            yield key, members


def is_as_the_tar_says(loaded, content: bytes, taxonomy: Taxonomy) -> None:
    said = list(read_samples_naively(content))
    assert list(loaded.keys) == [key for key, _ in said]
    for row, (key, members) in enumerate(said):
        images = [member for extension, member in members.items() if extension in IMAGE_EXTENSIONS]
        start = int(loaded.image_offset[row])
        assert [content[start : start + int(loaded.image_size[row])]] == images, f"other image of {key}"
        positions = loaded.label_position[loaded.label_start[row] : loaded.label_start[row + 1]].tolist()
        if "cls" in members:
            assert positions == [int(members["cls"])]
        else:
            labels = json.loads(members["json"], object_pairs_hook=collect_pairs)["labels"]
            assert {taxonomy.classes[position].id for position in positions} == set(labels), f"other labels of {key}"


def read_map_naively(content: bytes) -> tuple[str | None, ...]:
    said = json.loads(content, object_pairs_hook=collect_pairs)
    if isinstance(said, dict):
        numbers = [int(key) for key in said]
        assert len(set(numbers)) == len(numbers), "an output comes twice"
        by_output = {int(key): value for key, value in said.items()}
        assert set(by_output) <= {0, 1, 2}
        return tuple(by_output.get(output) for output in range(3))
    return tuple(said)
