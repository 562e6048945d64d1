"""Answers many images: decodes them and runs the network in batches on all cores, and keeps their order.

Shapes: B batch, C all classes, T features before the classifiers.
"""

import collections
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from concentration.data.decoding import UNDECODABLE, describe_undecodable
from concentration.data.views import CentreView, decode_view
from concentration.serving.answers import ImageAnswer, Ranking
from concentration.serving.inputs import InputImage
from concentration.serving.neighbours import NeighbourIndex
from concentration.serving.predictor import Predictor


class Answerer:
    """Answers batches of images with a network and, if an index is given, with the nearest neighbours.

    Args:
        predictor: runs the network.
        ranking: chooses the classes that are named.
        index: finds the nearest neighbours; None leaves them out.
    """

    def __init__(self, predictor: Predictor, ranking: Ranking, index: NeighbourIndex | None = None):
        self._predictor = predictor
        self._ranking = ranking
        self._index = index

    def answer(self, inputs: Sequence[InputImage]) -> list[ImageAnswer]:
        """The answer to each image; an image that cannot be decoded gets one with an error."""
        images, is_decoded, errors = decode_images(inputs, self._predictor.image_size)
        decoded = iter(self._answer_decoded(images[is_decoded]))
        return [
            ImageAnswer(image.name, *next(decoded)) if error is None else ImageAnswer(image.name, error=error)
            for image, error in zip(inputs, errors, strict=True)
        ]

    def _answer_decoded(self, images: np.ndarray) -> list[tuple]:
        if not len(images):
            return []
        logits_BC, features_BT = self._predictor(images)
        neighbours = [()] * len(images) if self._index is None else self._index.answer(features_BT)
        return [(*ranked, near) for ranked, near in zip(self._ranking.rank(logits_BC), neighbours, strict=True)]


def decode_images(inputs: Sequence[InputImage], image_size: int) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    """Decodes a batch of images.

    Returns:
        The centre views, (B, 3, H, W) uint8, black if an image cannot be decoded; whether each image could be decoded, (B,) bool;
        and why not, a text or None for each.
    """
    images = np.zeros((len(inputs), 3, image_size, image_size), dtype=np.uint8)
    errors: list[str | None] = [None] * len(inputs)
    for row, image in enumerate(inputs):
        try:
            images[row] = decode_view(image.read(), CentreView(), 0, image_size)[0]
        except UNDECODABLE as error:
            errors[row] = describe_undecodable(error)
    return images, np.array([error is None for error in errors], dtype=bool), errors


def answer_all(
    answerer: Answerer, inputs: Sequence[InputImage], batch_size: int, num_threads: int
) -> Iterator[list[ImageAnswer]]:
    """Yields the answers batch by batch, in the order of the images.

    Batches are answered by `num_threads` threads, which use several cores: decoders and onnxruntime release Python's lock.
    """
    starts = iter(range(0, len(inputs), batch_size))
    waiting: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(num_threads) as pool:

        def submit() -> None:
            if (start := next(starts, None)) is not None:
                waiting.append(pool.submit(answerer.answer, inputs[start : start + batch_size]))

        for _ in range(2 * num_threads):  # a bound, so that memory does not grow with the number of images
            submit()
        while waiting:
            yield waiting.popleft().result()
            submit()
