"""What is measured of an export: that its programs answer as the network does, what int8 costs, what is confused, how fast it is.

Shapes: B batch, C all classes, T features before the classifiers.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import Split
from concentration.errors import DataError
from concentration.metrics.calibration import sigmoid
from concentration.metrics.confusions import Confusions
from concentration.metrics.evaluation import Evaluator
from concentration.networks.classifier import Exportable
from concentration.processes import count_cores
from concentration.progress import Progress
from concentration.serving.answering import Answerer, answer_all
from concentration.serving.answers import Ranking
from concentration.serving.export_folder import Weights
from concentration.serving.inputs import ImageInMemory
from concentration.serving.predictor import Predictor
from concentration.taxonomy import Taxonomy

#: How far a program's logits may be from the network's, as a share of the largest (at least 1).
TOLERANCE = 1e-3
BATCH_SIZES = (1, 32)
_READ_TOGETHER = 128
_NUM_CHECKED = 16
_MOST_TIMED_IMAGES = 2000
#: Pairs that are named.
_NUM_VERTICAL_PAIRS, _NUM_CLASS_PAIRS = 10, 20


class Agreement(NamedTuple):
    """The largest differences of a program from the network, over `num_images` images."""

    num_images: int
    logit: float
    probability: float
    feature: float


class Speed(NamedTuple):
    """A program at one batch size: milliseconds of a call, and images a second."""

    program: str
    device: str
    batch_size: int
    median_ms: float
    p90_ms: float
    images_per_second: float


@torch.inference_mode()
def check_agreement(network: Exportable, predictor: Predictor, images: np.ndarray) -> Agreement:
    """Compares images (B, 3, H, W), and as many of noise, in batches of 1, 3 and what is left.

    Raises:
        DataError: the program is further from the network than `TOLERANCE`.
    """
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    both = np.concatenate([images, noise])
    expected_BC, expected_BT = (
        network(torch.from_numpy(both)).numpy(),
        network.answer(torch.from_numpy(both))[1].numpy(),
    )
    parts = [predictor(part) for part in np.split(both, [1, 4]) if len(part)]
    logits_BC, features_BT = (np.concatenate(part) for part in zip(*parts, strict=True))
    scale = max(1.0, float(np.abs(expected_BC).max()))
    found = Agreement(
        len(both),
        float(np.abs(logits_BC - expected_BC).max()),
        float(np.abs(sigmoid(logits_BC.astype(np.float64)) - sigmoid(expected_BC.astype(np.float64))).max()),
        float(np.abs(features_BT - expected_BT).max()),
    )
    if not found.logit <= TOLERANCE * scale:
        raise DataError(
            f"{predictor.export.path}: the ONNX program's logits are {found.logit:.2g} from the network's, expected at most "
            f"{TOLERANCE * scale:.2g}; another version of onnxruntime or torch may agree"
        )
    return found


class SampledImages:
    """Test images by ordinal, spread evenly over the split where they are more than asked for."""

    def __init__(self, split: Split, image_size: int, most: int):
        self._split = split
        count = min(most, len(split))
        self.ordinals = np.unique(np.linspace(0, len(split) - 1, count).astype(np.int64))
        self._reader = SampleReader(split, LabelTargets(split, smear=False), image_size, views=None, seed=0)

    def read_first(self) -> np.ndarray:
        """A few decoded images (B, 3, H, W). Raises: DataError where none can be decoded."""
        found = next(read_images(self._reader, self.ordinals), None)
        if found is None:
            raise DataError(
                f"{self._split.directory}: none of {len(self.ordinals)} {self._split.name} images can be decoded, on which the "
                "programs are measured; repair them, or give a larger num_images"
            )
        return found[0][:_NUM_CHECKED]

    def batches(self, progress: Progress) -> Iterator[tuple[np.ndarray, list[list[int]]]]:
        """Images that could be decoded, and the direct labels of each."""
        for images, places in read_images(self._reader, self.ordinals, progress):
            yield images, [self._split.labels(int(ordinal)) for ordinal in self.ordinals[places]]

    def encoded(self) -> list[ImageInMemory]:
        """Images as they lie in the shards."""
        ordinals = self.ordinals[:_MOST_TIMED_IMAGES]
        return [ImageInMemory(str(ordinal), self._reader.read_encoded(int(ordinal))) for ordinal in ordinals]


def read_images(
    reader: SampleReader, ordinals: np.ndarray, progress: Progress | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images (B, 3, H, W) that could be decoded, as programs take them, and their (B,) places in `ordinals`, some at a time."""
    for start in range(0, len(ordinals), _READ_TOGETHER):
        samples = reader.read(ordinals[start : start + _READ_TOGETHER], epoch=0)
        is_decoded = ~samples.skipped_B.numpy()
        if is_decoded.any():  # programs need not take a batch without an image
            yield np.ascontiguousarray(samples.images.numpy()[is_decoded]), start + np.flatnonzero(is_decoded)
        if progress is not None:
            progress.advance(len(is_decoded))


def measure_quality(
    predictors: Mapping[Weights, Predictor], images: SampledImages, directory: Path
) -> tuple[dict[Weights, float], Confusions]:
    """mpvap of every program on the same images, and what the float32 program confuses."""
    taxonomy = predictors["float32"].export.taxonomy
    evaluators = {weights: Evaluator(taxonomy) for weights in predictors}
    confusions = Confusions(taxonomy)
    with Progress("export: quality", len(images.ordinals), "images", directory) as progress:
        for batch, labels in images.batches(progress):
            for weights, predictor in predictors.items():
                logits_BC, _ = predictor(batch)
                evaluators[weights].update(logits_BC, labels)
                if weights == "float32":
                    confusions.update(logits_BC, labels)
    return {weights: evaluator.compute().mpvap for weights, evaluator in evaluators.items()}, confusions


def measure_speed(
    network: Exportable, predictors: Mapping[Weights, Predictor], image: np.ndarray, seconds: float
) -> list[Speed]:
    """Every program on one core, and torch on the GPU where there is one, for about `seconds` each."""
    programs: dict[str, Callable[[np.ndarray], object]] = {
        **{f"ONNX, {weights}": predictor for weights, predictor in predictors.items()},
        "torch": lambda images: network.answer(torch.from_numpy(images)),
    }
    found = []
    for batch_size in BATCH_SIZES:
        images = np.repeat(image[None], batch_size, axis=0)
        found += [_time_call(name, "one core", call, images, seconds) for name, call in programs.items()]
    if torch.cuda.is_available():
        found += _measure_on_gpu(network, image, seconds)
    return found


def measure_throughput(predictor: Predictor, images: SampledImages) -> tuple[float, int]:
    """Images a second that `predict` decodes and answers on all cores, and how many cores these are."""
    inputs = images.encoded()
    answerer = Answerer(predictor, Ranking(predictor.export.taxonomy))
    started = time.perf_counter()
    for _ in answer_all(answerer, inputs, 32, count_cores()):
        pass
    return len(inputs) / (time.perf_counter() - started), count_cores()


def describe_confusions(confusions: Confusions, taxonomy: Taxonomy) -> dict:
    """By vertical how many were asked and answered in another vertical; the worst pairs of verticals and of classes."""

    def describe(output: int) -> str:
        c = taxonomy.class_of_output(output)
        return f"{c.name} ({c.vertical})"

    by_vertical = {}
    for number, vertical in enumerate(taxonomy.verticals):
        answered_M = confusions.vertical_MM[number]
        by_vertical[vertical] = {
            "num_images": int(answered_M.sum()),
            "elsewhere": int(answered_M.sum() - answered_M[number]),
        }
    names = taxonomy.verticals
    return {
        "num_images": confusions.num_samples,
        "num_right": confusions.num_right,
        "by_vertical": by_vertical,
        "verticals": [[names[i], names[j], count] for i, j, count in confusions.worst_verticals(_NUM_VERTICAL_PAIRS)],
        "classes": [[describe(i), describe(j), count] for i, j, count in confusions.worst_classes(_NUM_CLASS_PAIRS)],
    }


def describe_machine() -> str:
    """The processor, its cores, and how busy it is: speeds mean little on a machine that others use."""
    return f"{_name_processor()}, {count_cores()} cores, load {os.getloadavg()[0]:.1f}"


def _name_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _measure_on_gpu(network: Exportable, image: np.ndarray, seconds: float) -> list[Speed]:
    """Images go there and logits come back in every call."""

    def call(images: np.ndarray) -> None:
        network.answer(torch.from_numpy(images).cuda())[0].cpu()

    home = network.device
    network.to(torch.device("cuda"))
    batches = [np.repeat(image[None], batch_size, axis=0) for batch_size in (*BATCH_SIZES, 256)]
    found = [_time_call("torch", torch.cuda.get_device_name(), call, images, seconds) for images in batches]
    network.to(home)
    return found


@torch.inference_mode()
def _time_call(
    program: str, device: str, call: Callable[[np.ndarray], object], images: np.ndarray, seconds: float
) -> Speed:
    for _ in range(2):  # the first call makes room
        call(images)
    milliseconds: list[float] = []
    while len(milliseconds) < 5 or sum(milliseconds) < 1000 * seconds:
        started = time.perf_counter()
        call(images)
        milliseconds.append(1000 * (time.perf_counter() - started))
    median, p90 = (float(np.percentile(milliseconds, share)) for share in (50, 90))
    return Speed(program, device, len(images), median, p90, 1000 * len(images) / median)
