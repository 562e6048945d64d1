"""Views by torch beside those by Pillow, a batch's records beside each view's own, and readers that leave images out."""

import io
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from concentration.data.index import index_shard
from concentration.data.loader import Batch, StepBatches
from concentration.data.order import SequentialOrder, WindowOrder
from concentration.data.reader import SampleReader
from concentration.data.rendering import draw_random, render
from concentration.data.resident import ResidentReader, load_resident
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import load_split
from concentration.data.view_records import encode_views
from concentration.data.views import CentreView, StoredViews, ViewConfig, decode_view, draw_views
from concentration.errors import ConfigError

SIZE, NUM_IMAGES, SEED = 32, 64, 5
DISTORTION = {
    "rotate": 20.0,
    "shear": 0.2,
    "scale": 0.3,
    "shift": 0.1,
    "stroke": 0.8,
    "blur": 1.6,
    "erase": 0.3,
    "noise": 0.4,
}
COLOURS = {"brightness": 0.4, "contrast": 0.5, "saturation": 0.6, "light": True, "flip": 0.5}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


def draw_pictures(mode: str) -> list[Image.Image]:
    """Blots with soft and hard edges that reach the border."""
    rng = np.random.default_rng(len(mode))
    num_channels = len(mode)
    coarse = rng.random((NUM_IMAGES, 5, 5, num_channels))
    pictures = []
    for picture in coarse:
        image = Image.fromarray((255 * picture.squeeze()).astype(np.uint8)).resize((SIZE, SIZE))
        pixels = np.asarray(image).copy()
        pixels[8:20, 5:9] = rng.integers(256)
        pictures.append(Image.fromarray(pixels))
    return pictures


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def compare(config: ViewConfig, mode: str, device: str) -> np.ndarray:
    """By how much each number of each view differs, (B, 3, S, S)."""
    pictures, ordinals = draw_pictures(mode), np.arange(NUM_IMAGES)
    views = draw_views(config, SEED, 2, ordinals)
    expected = [decode_view(encode_png(picture), views, row, SIZE)[0] for row, picture in enumerate(pictures)]
    pixel_BCSS = torch.stack([torch.tensor(np.asarray(p)).reshape(SIZE, SIZE, -1).permute(2, 0, 1) for p in pictures])
    record_BV = encode_views(views, NUM_IMAGES)
    random_BR = draw_random(record_BV, np.full(NUM_IMAGES, mode == "L"), SIZE)
    given = (pixel_BCSS, torch.from_numpy(record_BV), torch.from_numpy(random_BR))
    found = render(*(tensor.to(device) for tensor in given)).cpu().numpy()
    assert found.dtype == np.uint8
    return np.abs(found.astype(int) - np.stack(expected))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", DISTORTION)
def test_each_distortion_is_pillows_to_a_level(name, mode, device):
    """Pillow rounds after each of the six passes of a blur."""
    difference = compare(ViewConfig(distortion={name: DISTORTION[name]}), mode, device)
    assert difference.max() <= (3 if name == "blur" else 1)
    assert difference.mean() < (0.5 if name == "blur" else 0.02)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("colours", [*({name: COLOURS[name]} for name in COLOURS), COLOURS], ids=" ".join)
def test_colours_and_mirror_images_are_photometrys(colours, mode, device):
    difference = compare(ViewConfig(**colours), mode, device)
    assert difference.max() <= 1
    assert difference.mean() < 0.02


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_all_together_differ_by_rounding(mode, device):
    difference = compare(ViewConfig(distortion=DISTORTION, **COLOURS), mode, device)
    assert difference.mean() < 0.5
    assert (difference > 4).mean() < 0.001


def test_views_without_changes_are_the_images():
    assert compare(ViewConfig(), "RGB", "cpu").max() == 0
    pixel_BCSS = torch.randint(256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    record_BV = torch.from_numpy(encode_views(CentreView(), 3))
    assert torch.equal(render(pixel_BCSS, record_BV, record_BV[:, :0]), pixel_BCSS)


amounts = st.fixed_dictionaries({name: st.floats(0, most) for name, most in DISTORTION.items()})
shares = st.floats(0, 1)


@settings(max_examples=50, deadline=None)
@given(st.none() | amounts, st.fixed_dictionaries({name: shares for name in COLOURS if name != "light"}), st.booleans())
def test_a_batchs_records_are_those_of_its_views(distortion, colours, light):
    config = ViewConfig(distortion=distortion, light=light, **colours)
    ordinals = np.arange(20)
    views = draw_views(config, SEED, 7, ordinals)
    expected = [views.at(row, (SIZE, SIZE)).encode() for row in range(len(ordinals))]
    assert [bytes(record) for record in encode_views(views, len(ordinals))] == expected


@pytest.mark.parametrize("crops", [{"crop_area": 0.5}, {"crop_aspect": 1.5}, {"interpolation": "random"}], ids=str)
def test_views_that_are_not_of_whole_images_are_refused_drawn_or_stored(crops):
    views = draw_views(ViewConfig(**crops), SEED, 0, np.arange(8))
    with pytest.raises(ConfigError, match=r"of 8 views drawn by data\.view are crops or resized"):
        encode_views(views, 8)
    records = b"".join(views.at(row, (SIZE, SIZE)).encode() for row in range(8))
    stored = StoredViews(np.frombuffer(records, dtype=np.uint8).reshape(8, -1))
    with pytest.raises(ConfigError, match="of 8 views stored with the targets are crops or resized"):
        encode_views(stored, 8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_reader_without_images_gives_all_else_and_the_views_are_made_where_they_are_held(
    make_split, tmp_path, num_workers
):
    split = make_split(
        tmp_path, [[["gull"], ["taxi", "osprey"], ["bird"]], [["soup"], ["tram"], ["egg"]]], size=(SIZE, SIZE)
    )
    ordinals, config = np.array([0, 2, 3, 5]), ViewConfig(distortion=DISTORTION, flip=0.5)
    order = WindowOrder(split.by_shard(ordinals), SEED, 2)
    reader = SampleReader(split, LabelTargets(split, smear=True), SIZE, config, SEED)
    images = load_resident(split, ordinals, SIZE, num_workers, "test", None)
    for number in (0, 3):
        expected = StepBatches(reader, order, 4, 1, 0, 1)[number]
        batch = StepBatches(ResidentReader(reader, images), order, 4, 1, 0, 1)[number]
        assert batch.images.shape == (4, 0)
        for name in ("weight_B", "skipped_B", "view_BV", "ordinal_B"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name
        assert torch.equal(batch.targets.dense(11), expected.targets.dense(11))
        difference = (images.view(batch).int() - expected.images.int()).abs()
        assert difference.float().mean() < 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kinds", ["grey in RGB", "L, grey in RGB", "L, RGB", "1, L", "L, RGB, grey in RGB"])
def test_noise_is_grey_where_the_file_is_grey_and_only_there(kinds, device, taxonomy, write_tar, tmp_path):
    """Whether a picture's noise is grey follows from its file, not from what it shows or what stands beside it."""
    kinds = kinds.split(", ")
    pictures = {"RGB": draw_pictures("RGB"), "L": draw_pictures("L")}
    pictures["grey in RGB"] = [picture.convert("RGB") for picture in pictures["L"]]
    pictures["1"] = [picture.convert("1") for picture in pictures["L"]]
    members = []
    for row in range(NUM_IMAGES):
        kind = kinds[0 if row < 8 else row % len(kinds)]
        members += [(f"{row}.png", encode_png(pictures[kind][row])), (f"{row}.json", b'{"labels": ["gull"]}')]
    shard = write_tar(tmp_path / "train-000000.tar", members)
    index_shard(shard, taxonomy, shard.name).save(shard.with_suffix(".index"))
    split = load_split(tmp_path, "train", taxonomy)
    ordinals = np.arange(NUM_IMAGES)
    config = ViewConfig(distortion={"noise": 0.4, "erase": 0.2}, saturation=0.5, light=True, flip=0.5)
    reader = SampleReader(split, LabelTargets(split, smear=True), SIZE, config, SEED)
    images = load_resident(split, ordinals, SIZE, 0, "test", None)
    images.to(torch.device(device))
    order = SequentialOrder(ordinals)
    for number in range(NUM_IMAGES // 8):  # in the first, all are of one kind
        expected = StepBatches(reader, order, 8, 1, 0, 1)[number]
        batch = StepBatches(ResidentReader(reader, images), order, 8, 1, 0, 1)[number]
        assert torch.equal(batch.is_grey_B, expected.is_grey_B)
        batch = Batch(*(getattr(part, "to", lambda device, part=part: part)(device) for part in batch))
        difference = (images.view(batch).cpu().int() - expected.images.int()).abs()
        assert difference.max() <= 2


def test_an_image_that_cannot_be_decoded_is_black_and_skipped(make_split, taxonomy, tmp_path):
    [shard] = make_split(tmp_path, [[["gull"], ["taxi"], ["soup"]]], size=(SIZE, SIZE)).shards
    with open(shard.path, "r+b") as file:
        os.pwrite(file.fileno(), bytes(int(shard.image_size[1])), int(shard.image_offset[1]))
    index_shard(shard.path, taxonomy, shard.path.name).save(shard.path.with_suffix(".index"))
    split = load_split(tmp_path, "train", taxonomy)
    images = load_resident(split, range(3), SIZE, 0, "test", None)
    assert images.skipped_N.tolist() == [False, True, False]
    reader = SampleReader(split, LabelTargets(split, smear=False), SIZE, ViewConfig(distortion=DISTORTION), SEED)
    batch = StepBatches(ResidentReader(reader, images), SequentialOrder(np.arange(3)), 3, 1, 0, 1)[0]
    assert batch.skipped_B.tolist() == [False, True, False]
    assert batch.weight_B.tolist() == [1, 0, 1]
    assert not batch.view_BV[1].any()
    assert not images.view(batch)[1].any()
