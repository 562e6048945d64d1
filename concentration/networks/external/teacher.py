"""A teacher that was made elsewhere: an external model, and which classes of the vertical its outputs are.

Shapes: B batch, O outputs of the model, V classes of the vertical.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from concentration.errors import ConfigError, DataError
from concentration.files import write_atomically
from concentration.networks.external import ExternalConfig, ExternalModel, build_external_model
from concentration.networks.external.class_map import ClassMap, check_outputs, check_softmax_is_left, load_class_ids
from concentration.networks.external.model import one_line
from concentration.schema import parse_json
from concentration.taxonomy import Taxonomy

#: In the teacher's directory: its config and the class of each output; and beside it the folder of the model's own files.
TEACHER_FILE, MODEL_FOLDER = "external.json", "model"

#: What models raise when they do not take an image.
_REFUSALS = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)

#: How far an image's probabilities may move with the images beside it: float16 models round differently in other batches.
_BATCH_TOLERANCE = 0.02


class ExternalTeacher:
    """`teacher(images)` gives logits (B, V) float32, as a `Student` does; a class without an output gets probability 0.

    Args:
        model: as it was made.
        class_ids: (O,) the class of every output; None where the output is ignored.
        taxonomy: of the vertical alone.
    """

    def __init__(self, model: ExternalModel, class_ids: Sequence[str | None], taxonomy: Taxonomy):
        self.model = model
        self.class_ids = tuple(class_ids)
        self.taxonomy = taxonomy
        self.class_map = ClassMap.build(self.class_ids, taxonomy, model.config.smear)
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (model.config.mean, model.config.std))

    @property
    def image_size(self) -> int:
        """Larger than the model's input where that is cut out of the middle."""
        return int(self.model.config.image_size / self.model.config.crop)

    @property
    def num_outputs(self) -> int:
        return self.taxonomy.num_classes

    @property
    def device(self) -> torch.device:
        return self._mean.device

    def to(self, device: torch.device) -> Self:
        self.model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        self.class_map = self.class_map.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        config = self.model.config
        outputs_BO = compute_outputs(self.model, self._prepare(images))
        if outputs_BO.shape[1] != len(self.class_ids):
            raise DataError(
                f"{self.model.where}: gives {outputs_BO.shape[1]} outputs, and gave {len(self.class_ids)} when it was taken over"
            )
        check_outputs(outputs_BO, config.output, self.model.where)
        return self.class_map.compute_logits(outputs_BO, config.output)

    def save(self, directory: Path) -> list[str]:
        """Writes `external.json` and copies the model's files; gives the files that decide its answers.

        Their names are relative to `directory`; a callable's module is not copied, and its name is absolute.
        """
        folder = directory / MODEL_FOLDER
        folder.mkdir(exist_ok=True)
        config = self.model.save(folder)
        content = {
            "taxonomy": self.taxonomy.fingerprint,
            "model": config.model_dump(mode="json", exclude={"classes", "names"}),
            "class_ids": list(self.class_ids),
        }
        write_atomically(directory / TEACHER_FILE, content)
        files = self.model.find_files(_in_folder(config, folder))
        return [TEACHER_FILE, *(str(p.relative_to(directory) if p.is_relative_to(directory) else p) for p in files)]

    def _prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 as the model expects it: the middle of the images, normalised."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ConfigError(
                f"{self.model.where}: looks at images of {self.image_size} pixels, and is given {images.shape[-1]}; "
                f"give data.image_size={self.image_size}"
            )
        if images.dtype == torch.uint8:
            images = images.to(torch.float32, memory_format=torch.contiguous_format) / 255
        size = self.model.config.image_size
        start = (self.image_size - size) // 2
        return (images[..., start : start + size, start : start + size] - self._mean) / self._std


def take_over(config: ExternalConfig, taxonomy: Taxonomy, vertical: str) -> ExternalTeacher:
    """The teacher of a vertical from the user's own files, tried on a few images.

    Raises:
        ConfigError, DataError: as `build_external_model` and `load_class_ids`; or the model does not take images, its answers
            are not what `config.output` says, or they depend on the other images of a batch.
    """
    model = build_external_model(config)
    outputs_BO = _try_out(model)
    names = model.names if config.names is None else _load_names(config.names, outputs_BO.shape[1])
    class_ids = load_class_ids(config.classes, outputs_BO.shape[1], names, taxonomy, vertical)
    return ExternalTeacher(model, class_ids, taxonomy.restrict(vertical))


def load_external_teacher(directory: Path, taxonomy: Taxonomy) -> ExternalTeacher:
    """The teacher that `ExternalTeacher.save` wrote. `taxonomy` is of the vertical alone.

    NOTE: a callable, and an exported program of torch, is code: load only what you would run.

    Raises:
        DataError: it was made for another taxonomy, or the files are not what `save` wrote.
    """
    path = directory / TEACHER_FILE
    try:
        content = parse_json(path.read_bytes(), str(path))
        made_for, class_ids = content["taxonomy"], TypeAdapter(list[str | None]).validate_python(content["class_ids"])
        config = TypeAdapter(ExternalConfig).validate_python({**content["model"], "classes": TEACHER_FILE})
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path}: damaged ({type(error).__name__}); run `concentrate teacher` with overwrite=true"
        ) from None
    if made_for != taxonomy.fingerprint:
        raise DataError(
            f"{path}: made for another taxonomy ({made_for!r}, here {taxonomy.fingerprint}); take it over again"
        )
    if not any(class_ids) or not taxonomy.position.keys() >= set(class_ids) - {None}:
        raise DataError(
            f"{path}: its class_ids are not those of the vertical; run `concentrate teacher` with overwrite=true"
        )
    model = build_external_model(_in_folder(config, directory / MODEL_FOLDER))
    return ExternalTeacher(model, class_ids, taxonomy)


@torch.no_grad()
def compute_outputs(model: ExternalModel, images: Tensor) -> Tensor:
    """(B, O) of normalised images. A model of a fixed batch size gets them in batches of it, the last one filled up.

    Raises:
        DataError: it does not take the images, or gives something else than a number per image and output.
    """
    size = model.batch_size or len(images)
    found = []
    for chunk in images.split(size):
        filled = torch.cat([chunk, chunk[-1:].expand(size - len(chunk), -1, -1, -1)])
        try:
            outputs_BO = model(filled)
        except _REFUSALS as error:
            raise DataError(
                f"{model.where}: does not take images {tuple(filled.shape)} ({type(error).__name__}: {one_line(error)})"
            ) from error
        shape = tuple(outputs_BO.shape) if isinstance(outputs_BO, Tensor) else type(outputs_BO).__name__
        if not isinstance(outputs_BO, Tensor) or outputs_BO.ndim != 2 or len(outputs_BO) != size:
            raise DataError(f"{model.where}: gives {shape} for {size} images, expected a tensor ({size}, outputs)")
        found.append(outputs_BO[: len(chunk)])
    return torch.cat(found)


def _in_folder(config: ExternalConfig, folder: Path) -> ExternalConfig:
    """With the paths of copied files, which are relative to `folder`."""
    given = {key: getattr(config, key, None) for key in ("path", "checkpoint")}
    return config.model_copy(update={key: folder / path for key, path in given.items() if path is not None})


def _try_out(model: ExternalModel) -> Tensor:
    """The outputs for three unlike images.

    Raises:
        DataError: as `compute_outputs` and `check_outputs`; or an image's answer depends on the images beside it.
    """
    config = model.config
    generator = np.random.default_rng(0)
    shape = (3, 3, config.image_size, config.image_size)
    images = torch.from_numpy(generator.normal(0, 1, shape).astype(np.float32))
    together_BO = compute_outputs(model, images)
    check_outputs(together_BO, config.output, model.where)
    check_softmax_is_left(together_BO, config.output, model.where)
    alone_BO = torch.cat([compute_outputs(model, image) for image in images.split(1)])
    every = ClassMap.identity(together_BO.shape[1])
    probabilities = [
        every.compute_logits(outputs_BO, config.output).sigmoid() for outputs_BO in (together_BO, alone_BO)
    ]
    if (probabilities[0] - probabilities[1]).abs().max() > _BATCH_TOLERANCE:
        raise DataError(
            f"{model.where}: its answer to an image changes with the images beside it, or from call to call; "
            "put it into eval mode before you export or return it"
        )
    return together_BO


def _load_names(path: Path, num_outputs: int) -> tuple[str, ...]:
    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"external.names={path}: cannot be read ({error}); give a text file") from None
    if len(names) != num_outputs:
        raise ConfigError(
            f"external.names={path}: {len(names)} lines, but the model has {num_outputs} outputs; give a line for each"
        )
    return names
