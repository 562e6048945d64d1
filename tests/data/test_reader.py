"""Samples read by ordinal: the view of an image's own bytes, few open files, and one line for damage."""

import gc
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from labelled_shards import LABELS, NUM_SAMPLES, SEED, SIZE, VIEW, build_reader

from concentration.data import reader
from concentration.data.index import ShardIndex, index_shard
from concentration.data.loader import StepBatches, build_loader
from concentration.data.order import SequentialOrder
from concentration.data.reader import SampleReader, explain_skipped
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import load_split
from concentration.data.views import CentreView, decode_view, draw_views
from concentration.errors import DataError


def test_a_reader_gives_the_view_of_the_images_own_bytes(split):
    ordinals = np.array([15, 0, 7, 7])
    for views, drawn in ((None, CentreView()), (VIEW, draw_views(VIEW, SEED, 3, ordinals))):
        samples = build_reader(split, views)
        images, targets, skipped, view_BV, random_BR, is_grey_B = samples.read(ordinals, epoch=3)
        assert random_BR.shape == (4, 0)
        assert images.shape == (4, 3, SIZE, SIZE)
        assert images.dtype == torch.uint8
        assert not skipped.any()
        for row, ordinal in enumerate(ordinals.tolist()):
            shard = split.shards[split.shard_of(ordinal)]
            within = ordinal - split.shard_start[split.shard_of(ordinal)]
            start, size = int(shard.image_offset[within]), int(shard.image_size[within])
            content = shard.path.read_bytes()[start : start + size]
            assert samples.read_encoded(ordinal) == content
            pixels, view, is_grey = decode_view(content, drawn, row, SIZE)
            np.testing.assert_array_equal(images[row].numpy(), pixels)
            assert is_grey_B[row] == is_grey
            assert view_BV[row].numpy().tobytes() == view.encode()
            own = {output for output, value in enumerate(targets.dense(11)[row].tolist()) if value}
            assert own == set(split.taxonomy.smear(split.labels(ordinal)))


@pytest.mark.parametrize("num_bytes", [1, 1500])
def test_it_does_not_matter_how_many_images_are_read_at_once(num_bytes, split, monkeypatch):
    ordinals = np.array([15, 0, 7, 7, 3, 12])
    sizes = [len(build_reader(split).read_encoded(ordinal)) for ordinal in ordinals.tolist()]
    assert max(sizes) < 1500 < sum(sizes), "some of them at once"
    expected = build_reader(split).read(ordinals, epoch=1)
    monkeypatch.setattr(reader, "_READ_TOGETHER_BYTES", num_bytes)
    read = build_reader(split).read(ordinals, epoch=1)
    assert torch.equal(read.images, expected.images)
    assert torch.equal(read.view_BV, expected.view_BV)
    assert not read.skipped_B.any()


@pytest.fixture
def damaged(make_split, write_tar, taxonomy, tmp_path):
    """A split whose sample 6 cannot be decoded, with its shard's file."""
    split = make_split(tmp_path, LABELS)
    path = split.shards[1].path
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    bad = [(name, b"no image" if name == "train-000001-1.jpg" else content) for name, content in members]
    assert bad != members
    write_tar(path, bad)
    index_shard(path, taxonomy, path.name).save(path.with_suffix(".index"))
    return load_split(tmp_path, "train", taxonomy), path


def test_an_undecodable_image_is_black_has_no_weight_and_is_marked(damaged):
    split, _ = damaged
    batches = StepBatches(build_reader(split), SequentialOrder(np.arange(NUM_SAMPLES)), NUM_SAMPLES, 1, 0, 1)
    batch = batches[0]
    others = np.arange(NUM_SAMPLES) != 6
    assert batch.weight_B.tolist() == others.astype(float).tolist()
    assert batch.skipped_B.tolist() == (~others).tolist()
    assert not batch.images[6].any()
    assert all(image.any() for image in batch.images[others])
    assert batch.global_count == NUM_SAMPLES, "it keeps its slot"
    assert batch.targets.probability_BK[6].any()


def test_a_skipped_image_is_explained(damaged):
    split, _ = damaged
    assert explain_skipped(split, 6) == "cannot be decoded (no JPEG, PNG, WebP, GIF or BMP)"
    assert explain_skipped(split, 5).startswith("cannot be seen in its stored views"), "it can be decoded now"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_is_shortened_while_it_is_read_is_one_line(num_workers, damaged):
    split, path = damaged
    batches = StepBatches(build_reader(split), SequentialOrder(np.arange(NUM_SAMPLES)), 4, 1, 0, 1)
    batches[0]
    os.truncate(path, int(split.shards[1].image_offset[3]) + 10)
    with pytest.raises(DataError) as caught:
        list(build_loader(batches, range(4), num_workers))
    message = str(caught.value)
    assert message.startswith(f"{path}: ends inside the sample 'train-000001-3'; the shard changed while it was read")
    assert "\n" not in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_is_not_the_one_that_was_indexed_is_refused(num_workers, make_split, tmp_path):
    """A shard of the same size, replaced by another: its images would get the labels of those that were there."""
    split = make_split(tmp_path, [[["gull"], ["taxi"], ["soup"]]])
    shard = split.shards[0]
    with open(shard.path, "r+b") as file:
        place = int(shard.image_offset[1] + shard.image_size[1]) - 1
        (byte,) = os.pread(file.fileno(), 1, place)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), place)
    split = load_split(tmp_path, "train", split.taxonomy)
    batches = StepBatches(build_reader(split), SequentialOrder(np.arange(3)), 1, 1, 0, 1)
    batches[0], batches[2]
    with pytest.raises(DataError) as caught:
        list(build_loader(batches, range(3), num_workers))
    assert str(caught.value).startswith(f"{shard.path}: the image of 'train-000000-1' is not the one that was indexed")
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_gone_is_named(damaged):
    split, path = damaged
    path.unlink()
    with pytest.raises(DataError, match=rf"{path}: cannot be read \(No such file or directory\); bring it back"):
        build_reader(split).read(np.array([6]), epoch=0)


def count_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_readers_keep_few_files_open_and_close_them(split):
    """A run has a reader for each vertical, and a split may have thousands of shards."""
    index = ShardIndex.load(split.shards[0].path.with_suffix(".index"))
    many = type(split)("train", [index] * 300, [f"train-{n:06d}" for n in range(300)], split.taxonomy, split.directory)
    gc.collect()
    before = count_open_files()
    samples = SampleReader(many, LabelTargets(many, smear=False), SIZE, None, 0)
    first = samples.read_encoded(0)
    assert all(samples.read_encoded(5 * shard) == first for shard in range(300))
    assert before < count_open_files() <= before + 256
    assert samples.read_encoded(0) == first, "a file that was closed is opened again"
    copy, num_open = pickle.loads(pickle.dumps(samples)), count_open_files()
    assert copy.read_encoded(0) == first
    assert count_open_files() == num_open + 1, "open files do not travel"
    del samples, copy
    assert count_open_files() == before
