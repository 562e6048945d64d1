"""`concentrate targets`: every training image is shown to the teachers of its verticals, whose top-K answers are stored.

Shapes: B batch, R rows of a shard, N records (one for each row and view), V classes of the vertical.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch

from concentration.data.split import Split
from concentration.data.views import INTERPOLATION, ViewConfig, describe_decoder
from concentration.distributed import choose_device
from concentration.files import write_atomically
from concentration.progress import Progress
from concentration.schema import Config, FolderName
from concentration.stages.folders import TARGETS, TEACHERS
from concentration.stages.identities import identify_teacher
from concentration.stages.prepared import DataOverrides, load_prepared, load_prepared_split
from concentration.stages.replaced import forget_replaced
from concentration.stages.run_directory import RunDirectory, StageConfig
from concentration.stages.teacher_answers import TeacherAnswers
from concentration.stages.teacher_gate import GateConfig, TeacherGate
from concentration.stages.train_network import load_network
from concentration.stages.verbs import write_command
from concentration.stages.verify_targets import verify_targets
from concentration.targets import Codec, TargetRecords, keep_top_k


class SoftTargetsConfig(Config):
    """A set of stored targets.

    name: the name of the set.
    top_k: K, the classes that each record keeps (all of a smaller vertical).
    views: 0 stores the teachers' answers to the centre view, and the student draws views of its own; R stores their answers to R
        augmented views of every sample, and the student replays view (epoch mod R).
    codec: `plain` is read with numpy in three lines; `packed` takes less than half the bytes.
    """

    kind: Literal["soft"] = "soft"
    name: FolderName = "default"
    top_k: pydantic.PositiveInt = 100
    views: pydantic.NonNegativeInt = 0
    codec: Codec = "plain"


class TargetsConfig(StageConfig):
    """Writes `targets/NAME/VERTICAL/` for one vertical or, where none is given, for all.

    vertical: the vertical whose teacher is asked; None asks all teachers.
    targets: which targets are stored, and how.
    view: the augmentation of stored views; None takes that of the prepared data.
    accelerator: the kind of device that runs the network.
    batch_size: how many images the network sees at a time.
    num_workers: processes that decode images; 0 decodes in the process itself.
    part, num_parts: this process makes every `num_parts`-th shard; the part that ends last finishes the stage.
    gate: what a teacher must be before its targets are made.
    verify: make no targets, but compare `num_verified` stored records of each vertical with what its teacher says now.
    num_verified: how many records of each vertical `verify` compares.
    """

    runtime_fields = StageConfig.runtime_fields | {
        "vertical", "accelerator", "batch_size", "num_workers", "part", "num_parts", "verify", "num_verified", "gate"
    }  # fmt: skip

    vertical: str | None = None
    targets: SoftTargetsConfig = SoftTargetsConfig()
    view: ViewConfig | None = None
    accelerator: Literal["cpu", "gpu"] = "cpu"
    batch_size: pydantic.PositiveInt = 256
    num_workers: pydantic.NonNegativeInt = 0
    part: pydantic.NonNegativeInt = 0
    num_parts: pydantic.PositiveInt = 1
    gate: GateConfig = GateConfig()
    verify: bool = False
    num_verified: pydantic.PositiveInt = 1000

    @pydantic.model_validator(mode="after")
    def _check_part(self):
        if self.part >= self.num_parts:
            raise ValueError(
                f"part={self.part} with num_parts={self.num_parts}: parts count from 0 to {self.num_parts - 1}"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_view(self):
        if self.view is not None and self.targets.views == 0:
            raise ValueError("view=... with targets.views=0: teachers see the centre view; remove it, or store views")
        return self


def targets(config: TargetsConfig, carry: Callable[[Path], None] = lambda directory: None) -> None:
    """Runs the stage, except for shards whose file is already written. One teacher at a time is in memory.

    Args:
        config: its config.
        carry: puts the files that another set has already into the directory of an unfinished vertical.

    Raises:
        ConfigError: a teacher has not finished, or is unfit and `gate.action` is `stop`.
        DataError: a teacher was made for another taxonomy, or `verify` finds targets that differ from the teacher's answers.
    """
    prepared, taxonomy, fingerprint = load_prepared(config.workdir, DataOverrides(view=config.view))
    split = load_prepared_split(config.workdir, "train", taxonomy)
    verticals = taxonomy.verticals if config.vertical is None else (config.vertical,)
    totals = split.count_routed()[[taxonomy.vertical_number(vertical) for vertical in verticals]].tolist()
    if config.verify:
        totals = [min(config.num_verified, total * max(1, config.targets.views)) for total in totals]
    root = config.workdir / TARGETS / config.targets.name
    title = "targets" if config.vertical is None else f"targets {config.vertical}"
    gate, said = TeacherGate(config.gate, config.workdir, split), []
    with Progress(title, sum(totals), "images", root / (config.vertical or "")) as progress:
        for vertical in verticals:
            if config.verify:
                said.append(_verify(config, vertical, split, prepared.view, progress))
            else:
                said.append(_make_targets(config, vertical, split, fingerprint, prepared.view, gate, carry, progress))
    print(*filter(None, said), sep="\n", end="\n" if any(said) else "")


def _verify(config: TargetsConfig, vertical: str, split: Split, view: ViewConfig, progress: Progress) -> str:
    path = config.workdir / TARGETS / config.targets.name / vertical
    RunDirectory(path).load_done(write_command("targets", vertical))
    answers = _open_teacher(config, vertical, split, view)
    return verify_targets(path, vertical, answers, config.num_verified, progress)


def _make_targets(
    config: TargetsConfig,
    vertical: str,
    split: Split,
    fingerprint: str,
    view: ViewConfig,
    gate: TeacherGate,
    carry: Callable[[Path], None],
    progress: Progress,
) -> str | None:
    """Makes one vertical's targets, or this process's part of them, and returns a line on what was made."""
    teacher_hash = identify_teacher(config.workdir, vertical)
    directory = RunDirectory(config.workdir / TARGETS / config.targets.name / vertical)
    rows_of = {}  # by file: its shard, and the ordinals of the shard's samples that are routed to this teacher
    for shard, ordinals in enumerate(split.by_shard(split.routed(vertical))):
        if len(ordinals):
            rows_of[directory.path / f"{split.index_names[shard]}.safetensors"] = (shard, ordinals)
    part = f"{config.part}-of-{config.num_parts}" if config.num_parts > 1 else None
    with directory.begin(config, {"data": fingerprint, "teacher": teacher_hash}, part) as is_due:
        if is_due or config.gate.action == "stop":  # "stop" also keeps a pipeline from going on with finished targets
            answers = _open_teacher(config, vertical, split, view)
            if config.gate.action != "off":
                gate.check(vertical, answers.network)
        if not is_due:
            progress.advance(sum(len(ordinals) for _, ordinals in rows_of.values()))
            return None
        carry(directory.path)
        mine = [path for path, (shard, _) in rows_of.items() if shard % config.num_parts == config.part]
        due = [path for path in mine if not path.exists()]
        progress.advance(sum(len(ordinals) for path, (_, ordinals) in rows_of.items() if path not in due))
        forget_replaced(directory.path)
        rate = _make_files(config, answers, {path: rows_of[path] for path in due}, progress)
        missing = sum(not path.exists() for path in rows_of)
        if missing:
            return f"{directory.path}: this part is finished; {missing} of {len(rows_of)} shards belong to others"
        write_atomically(directory.path / "manifest.json", _describe(config, answers, teacher_hash))
        facts = _measure_files(list(rows_of), sum(len(ordinals) for _, ordinals in rows_of.values()), config)
        directory.save_speed(rate)
        directory.finish({**facts, "teacher": teacher_hash})
        said = f"{directory.path}: {facts['num_records']} records of {facts['bytes_per_record']} bytes"
        return said if rate is None else f"{said}, made at {rate} images/s"


def _open_teacher(config: TargetsConfig, vertical: str, split: Split, view: ViewConfig) -> TeacherAnswers:
    network = load_network(config.workdir / TEACHERS / vertical, split.taxonomy.restrict(vertical))
    network = network.to(choose_device(config.accelerator))
    return TeacherAnswers(network, split, config.targets.views, view, config.batch_size, config.num_workers)


def _make_files(
    config: TargetsConfig, answers: TeacherAnswers, rows_of: Mapping[Path, tuple[int, np.ndarray]], progress: Progress
) -> float | None:
    """Asks the teacher about the samples of each file and writes the files; returns images per second."""
    start, num_asked = time.perf_counter(), 0
    said = answers.ask([ordinals for _, ordinals in rows_of.values()])
    by_file = itertools.groupby(said, key=lambda answer: answer.group)
    for (path, (shard, ordinals)), (_, of_file) in zip(rows_of.items(), by_file, strict=True):
        kept, views = [], []
        for answer in of_file:
            kept.append(keep_top_k(answer.probability_BV, config.targets.top_k))
            views.append(answer.view_BV)
        # The teacher was asked view by view, but a sample's records are stored together.
        by_sample = np.arange(len(ordinals) * max(1, answers.num_views)).reshape(-1, len(ordinals)).T.ravel()
        index, probability, tail = (torch.cat(parts).numpy()[by_sample] for parts in zip(*kept, strict=True))
        view = torch.cat(views).numpy()[by_sample] if answers.num_views else None
        records = TargetRecords(ordinals - answers.split.shard_start[shard], index, probability, tail, view)
        records.save(path, config.targets.codec, answers.network.num_outputs)
        num_asked += len(by_sample)
        progress.advance(len(ordinals))
    return round(num_asked / (time.perf_counter() - start), 1) if num_asked else None


def _describe(config: TargetsConfig, answers: TeacherAnswers, teacher_hash: str) -> dict[str, Any]:
    """The manifest: what a reader must know, and what must still be the same when the targets are used."""
    views: dict[str, Any] = {"image_size": answers.network.image_size, "interpolation": INTERPOLATION}
    if config.targets.views:
        views |= {"view": answers.view.model_dump(), "decoder": describe_decoder()}
    return {
        "codec": config.targets.codec,
        "top_k": config.targets.top_k,
        "num_kept": min(config.targets.top_k, answers.network.num_outputs),
        "views": config.targets.views,
        "teacher": teacher_hash,
        "taxonomy": answers.split.taxonomy.fingerprint,
        "data": answers.split.fingerprint,
        "preprocessing": views,
    }


def _measure_files(paths: list[Path], num_samples: int, config: TargetsConfig) -> dict[str, Any]:
    digest, num_bytes = hashlib.sha256(), 0
    for path in paths:
        content = path.read_bytes()
        digest.update(content)
        num_bytes += len(content)
    num_records = num_samples * max(1, config.targets.views)
    per_record = round(num_bytes / num_records, 1)
    return {"targets": digest.hexdigest()[:16], "num_records": num_records, "bytes_per_record": per_record}
