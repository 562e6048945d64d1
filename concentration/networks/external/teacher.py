"""A teacher that was trained elsewhere: an external model with a map from its outputs to the classes of a vertical.

Shapes: B batch, O outputs of the model, V classes of the vertical.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from concentration.errors import ConcentrationError, ConfigError, DataError, one_line
from concentration.files import write_atomically
from concentration.networks.external import ExternalConfig, ExternalModel, build_external_model
from concentration.networks.external.class_map import ClassMap, check_outputs, check_softmax_is_left, load_class_ids
from concentration.schema import parse_json
from concentration.taxonomy import Taxonomy

#: In the teacher's directory: the file with its configuration and the class of each output, and the folder of the model's files.
TEACHER_FILE, MODEL_FOLDER = "external.json", "model"

#: How much an image's probabilities may change with the other images of its batch: the rounding of float16 depends on them.
_BATCH_TOLERANCE = 0.02


class ExternalTeacher:
    """`teacher(images)` gives logits (B, V) float32 as a `Student` does; a class without an output has probability 0.

    Args:
        model: the external model.
        class_ids: (O,) the class id of every output; None if the output is ignored.
        taxonomy: the taxonomy of the vertical only.
    """

    def __init__(self, model: ExternalModel, class_ids: Sequence[str | None], taxonomy: Taxonomy):
        self.model = model
        self.class_ids = tuple(class_ids)
        self.taxonomy = taxonomy
        self.class_map = ClassMap.build(self.class_ids, taxonomy, model.config.smear)
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (model.config.mean, model.config.std))

    @property
    def image_size(self) -> int:
        """The side of the images that the teacher takes, in pixels; the model sees the share `config.crop` of it."""
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
        """Writes `external.json`, and copies the model's files.

        Returns:
            The files that decide the teacher's answers. The names of the copies are relative to `directory`. The module of a
            callable is not copied, and its name is absolute.
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
        """The input of the model, (B, 3, H, W) float32: the middle of the images, normalised.

        Raises:
            ConfigError: the images have another size than `image_size`.
        """
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
    """Makes a teacher of a vertical from the user's own model, and tries it on a few images.

    Args:
        config: the model, and how its outputs are read.
        taxonomy: the whole taxonomy.
        vertical: the vertical that it is to teach.

    Raises:
        ConfigError, DataError: as `build_external_model` and `load_class_ids`.
        DataError: the model does not accept images, its outputs are not what `config.output` says, or the output of an image
            depends on the other images of the batch.
    """
    model = build_external_model(config)
    outputs_BO = _try_out(model)
    names = model.names if config.names is None else _load_names(config.names, outputs_BO.shape[1])
    class_ids = load_class_ids(config.classes, outputs_BO.shape[1], names, taxonomy, vertical)
    return ExternalTeacher(model, class_ids, taxonomy.restrict(vertical))


def load_external_teacher(directory: Path, taxonomy: Taxonomy) -> ExternalTeacher:
    """Loads the teacher that `ExternalTeacher.save` wrote.

    NOTE: a callable and a program of torch.export are code: load only what you would run.

    Args:
        taxonomy: the taxonomy of the vertical only.

    Raises:
        DataError: the teacher was made for another taxonomy, or its files have changed.
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
    """The outputs (B, O) of a model for normalised images (B, 3, H, W).

    A model with a fixed batch size gets the images in batches of that size; the last image is repeated to fill the last batch.

    Raises:
        DataError: the model does not accept the images, or does not give a tensor (B, O).
    """
    size = model.batch_size or len(images)
    found = []
    for chunk in images.split(size):
        filled = torch.cat([chunk, chunk[-1:].expand(size - len(chunk), -1, -1, -1)])
        try:
            outputs_BO = model(filled)
        except (ConcentrationError, MemoryError):
            raise
        except Exception as error:  # a callable is the user's own code, and raises what it likes
            raise DataError(
                f"{model.where}: does not take images {tuple(filled.shape)} ({type(error).__name__}: {one_line(error)})"
            ) from error
        shape = tuple(outputs_BO.shape) if isinstance(outputs_BO, Tensor) else type(outputs_BO).__name__
        if not isinstance(outputs_BO, Tensor) or outputs_BO.ndim != 2 or len(outputs_BO) != size or not shape[1]:
            raise DataError(f"{model.where}: gives {shape} for {size} images, expected a tensor ({size}, outputs)")
        found.append(outputs_BO[: len(chunk)])
    return torch.cat(found)


def _in_folder(config: ExternalConfig, folder: Path) -> ExternalConfig:
    """The same configuration with the paths of the model's files, which are relative to `folder`, made complete."""
    given = {key: getattr(config, key, None) for key in ("path", "checkpoint")}
    return config.model_copy(update={key: folder / path for key, path in given.items() if path is not None})


def _try_out(model: ExternalModel) -> Tensor:
    """The outputs (3, O) for three images of random noise.

    Raises:
        DataError: as `compute_outputs`, `check_outputs` and `check_softmax_is_left`; or the output of an image depends on the
            other images of the batch, as that of a model in training mode does.
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
    """The names of the outputs, one per line. Raises: ConfigError if the file cannot be read, or has another number of lines."""
    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"external.names={path}: cannot be read ({error}); give a text file") from None
    if len(names) != num_outputs:
        raise ConfigError(
            f"external.names={path}: {len(names)} lines, but the model has {num_outputs} outputs; give a line for each"
        )
    return names
