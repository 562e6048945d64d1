"""The crops of an image that an evaluation averages over, as they were published.

Shapes: N crops of an image, B samples of a batch, S the network's image size.

Sources: Krizhevsky et al. 2012, section 4.1 (10 crops); Szegedy et al., arXiv 1409.4842, section 7 (144 crops).
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from concentration.data.decoding import UNDECODABLE, decode_shrunk
from concentration.data.reader import ReadSamples, SampleReader
from concentration.data.sample_targets import SampleTargets
from concentration.data.split import Split
from concentration.packed_targets import VIEW_BYTES

#: How many crops of an image the network sees:
#:   1: the largest square in the middle, resized to S x S.
#:  10: the image is resized so that its shorter side is 256/224 of S, and its middle square is taken. The crops are the four
#:      corners (S x S) and the middle of that square, and the mirror images of these five.
#: 144: the image is resized to four sizes, and of each, three squares are taken: at the ends and in the middle of the longer
#:      side. The crops of a square are the same five, the whole square resized to S x S, and the mirror images of these six.
NumCrops = Literal[1, 10, 144]


class _Scheme(NamedTuple):
    """How crops are cut.

    shorter_sides: the shorter side of the resized image in pixels, for S = 224; other S scale it.
    places: where the squares lie along the longer side, from 0 (its start) to 1 (its end).
    has_whole_square: whether the whole square, resized to S x S, is a crop, too.
    """

    shorter_sides: tuple[int, ...]
    places: tuple[float, ...]
    has_whole_square: bool


_SCHEMES = {10: _Scheme((256,), (0.5,), False), 144: _Scheme((256, 288, 320, 352), (0.0, 0.5, 1.0), True)}


def decode_crops(content: bytes, image_size: int, num_crops: NumCrops) -> np.ndarray:
    """The crops of an encoded image, (N, 3, S, S) uint8.

    They come size by size, in each size square by square, and of each square in this order: top left, top right, bottom left,
    bottom right, middle, whole square (if the scheme has it). The mirror images of all of them follow in the same order.

    Raises:
        one of UNDECODABLE: the image cannot be decoded.
    """
    scheme = _SCHEMES[num_crops]
    shorter_sides = [round(side * image_size / 224) for side in scheme.shorter_sides]
    image = decode_shrunk(content, max(shorter_sides))
    crops = np.stack([crop for side in shorter_sides for crop in _cut(image, side, image_size, scheme)])
    if crops.ndim == 3:  # grey
        crops = np.broadcast_to(crops[..., None], (*crops.shape, 3))
    return np.concatenate([crops, crops[:, :, ::-1]]).transpose(0, 3, 1, 2)


class CropReader:
    """A `Reader` like `SampleReader` that gives several crops of each sample.

    The images that it reads are (B * N, 3, S, S); the N crops of a sample are consecutive. Their view records are all zeros,
    since a record cannot describe these crops.

    Raises:
        DataError: as `SampleReader`.
    """

    def __init__(self, split: Split, targets: SampleTargets, image_size: int, num_crops: NumCrops):
        self.split = split
        self._reader = SampleReader(split, targets, image_size, views=None, seed=0)
        self._targets = targets
        self._image_size = image_size
        self._num_crops = num_crops
        self.cache = self._reader.cache

    def read(self, ordinals: np.ndarray, epoch: int) -> ReadSamples:
        """The crops of these samples, black if the image cannot be decoded, and their targets."""
        images_BN = np.zeros((len(ordinals), self._num_crops, 3, self._image_size, self._image_size), dtype=np.uint8)
        skipped_B = np.zeros(len(ordinals), dtype=bool)
        for row, ordinal in enumerate(ordinals):
            try:
                images_BN[row] = decode_crops(self.read_encoded(int(ordinal)), self._image_size, self._num_crops)
            except UNDECODABLE:
                skipped_B[row] = True
        views = torch.zeros(len(ordinals), VIEW_BYTES, dtype=torch.uint8)
        targets = self._targets.lookup(ordinals, epoch)
        images, skipped_B = torch.from_numpy(images_BN).flatten(0, 1), torch.from_numpy(skipped_B)
        is_grey_B = torch.zeros(len(ordinals), dtype=torch.bool)  # only views made on a device need to know
        return ReadSamples(images, targets, skipped_B, views, views[:, :0], is_grey_B)

    def read_encoded(self, ordinal: int) -> bytes:
        """The image's bytes as they lie in the shard."""
        return self._reader.read_encoded(ordinal)


def _cut(image: Image.Image, shorter_side: int, image_size: int, scheme: _Scheme) -> Iterator[np.ndarray]:
    """Yields the crops of an image resized to this shorter side: (S, S, 3) uint8, or (S, S) if the image is grey."""
    width, height = image.size
    side = min(width, height)
    last, middle = shorter_side - image_size, round((shorter_side - image_size) / 2)
    for place in scheme.places:
        left, top = place * (width - side), place * (height - side)
        # NOTE: only the square is resized. Resizing the whole image would take gigabytes for one of 1 x 65,535 pixels.
        box = (left, top, left + side, top + side)
        square = image.resize((shorter_side, shorter_side), Image.Resampling.BILINEAR, box)
        pixels = np.asarray(square)
        for y, x in ((0, 0), (0, last), (last, 0), (last, last), (middle, middle)):
            yield pixels[y : y + image_size, x : x + image_size]
        if scheme.has_whole_square:
            yield np.asarray(square.resize((image_size, image_size), Image.Resampling.BILINEAR))
