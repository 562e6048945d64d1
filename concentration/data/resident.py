"""Training images that are decoded once and stay on the device, which makes their views.

This is for many small images, which a processor takes longer to decode and distort than a GPU to train on. Readers then give the
records of views, and no pixels.

Shapes: N images that are held, B batch, C channels, S the side of an image.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from concentration.data.distortions import DISTORTION_BYTES
from concentration.data.loader import Batch, StepBatches, build_loader
from concentration.data.order import SequentialOrder
from concentration.data.reader import ReadSamples, SampleReader
from concentration.data.rendering import draw_random, render
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import Split
from concentration.data.view_records import encode_views
from concentration.distributed import rank
from concentration.progress import Progress

#: How many images a worker decodes at once.
_TOGETHER = 1024


class ResidentImages:
    """Images on a device: of each, the largest square in its middle, resized to S x S.

    Only one channel is held if every image looks grey, even if its file has three equal channels.

    Attributes:
        ordinal_N: int64, ascending: which samples these are.
        skipped_N: bool, whether the image cannot be decoded.
        is_grey_N: bool, whether the image's file is grey (`views.decode_view`).
        size: S.
    """

    def __init__(self, ordinal_N: Tensor, pixel_NCSS: Tensor, skipped_N: Tensor, is_grey_N: Tensor):
        self.ordinal_N = ordinal_N
        self.skipped_N = skipped_N
        self.is_grey_N = is_grey_N
        self.size = pixel_NCSS.shape[-1]
        self._pixel_NCSS = pixel_NCSS

    def __deepcopy__(self, memo: dict) -> "ResidentImages":
        """Itself. Averaging weights deep-copies the module that holds these images, and needs no second copy of them."""
        return self

    def to(self, device: torch.device) -> None:
        """Moves the images to a device."""
        self._pixel_NCSS = self._pixel_NCSS.to(device)
        self.ordinal_N = self.ordinal_N.to(device)

    def view(self, batch: Batch) -> Tensor:
        """The batch's views of these images, (B, 3, S, S) uint8."""
        row_B = torch.searchsorted(self.ordinal_N, batch.ordinal_B)
        return render(self._pixel_NCSS[row_B], batch.view_BV, batch.random_BR)


class ResidentReader:
    """A `Reader` that gives everything that `reader` reads except the images, and instead the random bytes of their views.

    Args:
        reader: gives the targets, and chooses the views.
        images: the images of all samples that will be read.
    """

    #: All images are on the device already, so no shard is fetched.
    cache = None

    def __init__(self, reader: SampleReader, images: ResidentImages):
        self.split = reader.split
        self._reader = reader
        self._ordinal_N = images.ordinal_N.cpu().numpy()
        self._skipped_N = images.skipped_N.numpy()
        self._is_grey_N = images.is_grey_N.numpy()
        self._size = images.size

    def read(self, ordinals: np.ndarray, epoch: int) -> ReadSamples:
        """What training needs of these samples beside their images.

        Raises:
            ConfigError: a view is a crop, or resized in another way than bilinear.
        """
        record_BV = encode_views(self._reader.choose_views(ordinals, epoch), len(ordinals))
        row_B = np.searchsorted(self._ordinal_N, ordinals)
        is_grey_B = self._is_grey_N[row_B]
        skipped_B = self._skipped_N[row_B] | ~record_BV.any(axis=1)
        record_BV = np.where(skipped_B[:, None], np.uint8(0), record_BV)
        has_random = record_BV[:, DISTORTION_BYTES - 1].any()  # this byte holds the amounts of erase and noise
        random_BR = (
            draw_random(record_BV, is_grey_B, self._size) if has_random else np.empty((len(ordinals), 0), np.uint8)
        )
        no_images = torch.empty(len(ordinals), 0, dtype=torch.uint8)
        targets = self._reader.lookup(ordinals, epoch)
        record_BV, random_BR, skipped_B, is_grey_B = map(torch.from_numpy, (record_BV, random_BR, skipped_B, is_grey_B))
        return ReadSamples(no_images, targets, skipped_B, record_BV, random_BR, is_grey_B)


def load_resident(
    split: Split, ordinals: np.ndarray | range, image_size: int, num_workers: int, title: str, directory: Path | None
) -> ResidentImages:
    """Decodes images into the memory of this machine.

    Args:
        split: the split of the samples.
        ordinals: (N,) ascending.
        image_size: S.
        num_workers: how many processes decode.
        title: what the progress bar calls the run.
        directory: where the progress is recorded; None for nowhere.

    Raises:
        DataError: a shard cannot be read or fetched, or has changed since it was indexed.
        Preempted: a signal asked to stop.
    """
    ordinal_N = np.array(ordinals)
    reader = SampleReader(split, LabelTargets(split, smear=False), image_size, views=None, seed=0)
    batches = StepBatches(reader, SequentialOrder(ordinal_N), min(_TOGETHER, len(ordinal_N)), 1, 0, 1)
    images, skipped, is_grey = [], [], []
    with Progress(f"{title}: decoding", len(ordinal_N), "images", directory, quiet=rank() != 0) as progress:
        for batch in build_loader(batches, range(batches.steps_per_epoch), num_workers):
            here = batch.images[: batch.global_count]
            shows_grey = bool((here == here[:, :1]).all())
            images.append(here[:, :1].clone() if shows_grey else here.contiguous())
            skipped.append(batch.skipped_B[: batch.global_count])
            is_grey.append(batch.is_grey_B[: batch.global_count])
            progress.advance(batch.global_count)
    num_channels = max(part.shape[1] for part in images)
    pixel_NCSS = torch.cat([part.expand(-1, num_channels, -1, -1) for part in images])
    return ResidentImages(torch.from_numpy(ordinal_N), pixel_NCSS, torch.cat(skipped), torch.cat(is_grey))
