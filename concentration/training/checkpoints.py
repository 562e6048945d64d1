"""Checkpoints of unfinished training: written whole or not at all, and checked when read, so that the newest good one is found.

Training waits while they are written. A thread that writes a copy in the meantime was tried and left out: on two busy CPU cores
a checkpoint of 205 MB takes 0.8 to 1.0 s, and with the thread it cost training 1.2 s.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from concentration.distributed import from_rank_zero, sum_over_ranks, wait_for_all
from concentration.errors import DataError
from concentration.files import write_atomically
from concentration.networks.student import Student
from concentration.training.configs import CHECKPOINTS
from concentration.training.head_files import DAMAGES, check_head, load_head, load_verified, remove_heads, save_head


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints whole or not at all."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue())


class CheckpointDirectory:
    """The latest `keep` checkpoints of a run, named by step, in `checkpoints/` of its directory; and the one that validated best.

    `best.json` says which one that is.
    """

    def __init__(self, run_path: Path, keep: int):
        self.path = run_path / CHECKPOINTS
        self._keep = keep
        self._best_path = self.path / "best.json"

    def save(self, trainer: pl.Trainer) -> None:
        """Saves, called on every rank at the end of a step; but no weights that are not finite."""
        path = self._name(trainer.global_step)
        student = trainer.lightning_module.student
        if student.sharding is not None and trainer.is_global_zero:
            path.unlink(missing_ok=True)  # its presence says that the files of the head beside it belong together
        if not are_finite(trainer.lightning_module.parameters(), trainer.strategy.root_device):
            return
        if student.sharding is not None:
            save_head(path, student, trainer.optimizers[0])
            wait_for_all()
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            best = self._name(self._load_best()["step"])
            for old in self._list()[: -self._keep]:
                if old != best:
                    old.unlink()
            remove_heads(self.path, keep={path.stem for path in self._list()})

    def save_if_best(self, trainer: pl.Trainer, mpvap: float) -> None:
        """Saves, on every rank, if this mpvap is the best so far; the checkpoint is then kept until there is a better one."""
        if from_rank_zero(lambda: mpvap <= self._load_best()["mpvap"]):
            return
        # NOTE: noted before it is saved: a run that is killed in between validates again. The other way round, it would go on
        # behind the validation and never note it.
        if trainer.is_global_zero:
            write_atomically(self._best_path, {"step": trainer.global_step, "mpvap": mpvap})
        self.save(trainer)

    def load_best(self, student: Student) -> bool:
        """Loads the weights that validated best into the student; returns False where there are none, or they are damaged."""
        path = self._name(self._load_best()["step"])
        if not path.exists():
            return False
        try:
            content = load_verified(path)
            state = {name.removeprefix("student."): tensor for name, tensor in content["state_dict"].items()}
            if head := content.get("head"):
                load_head(path, head["world_size"], student)
        except (*DAMAGES, DataError) as error:
            print(f"{path}: damaged ({error}); the best network is not kept")
            return False
        student.load_state_dict(state, strict=not head)
        return True

    def find_latest(self) -> tuple[Path | None, int]:
        """The newest undamaged checkpoint that has all parts of its head, and its step; (None, 0) where there are none.

        Raises:
            DataError: there are checkpoints, but each lacks a part of its head; a killed run does not leave that behind.
        """
        return from_rank_zero(self._find_latest)  # one rank reads them, so that all continue from the same one

    def _find_latest(self) -> tuple[Path | None, int]:
        incomplete = None
        for path in reversed(self._list()):
            try:
                content = load_verified(path)
                if head := content.get("head"):
                    check_head(path, head["world_size"], head["verticals"])
                return path, int(content["global_step"])
            except DAMAGES as error:
                print(f"{path}: damaged ({error}); going on from the one before it")
            except DataError as error:
                incomplete = incomplete or error
                print(f"{error}; going on from the one before it")
        if incomplete is not None:
            raise incomplete
        return None, 0

    def _list(self) -> list[Path]:
        return sorted(self.path.glob("step-*.ckpt"))

    def _name(self, step: int) -> Path:
        return self.path / f"step-{step:09d}.ckpt"

    def _load_best(self) -> dict[str, float]:
        """The step and mpvap of the best one; where none is kept, -1 for both, which every mpvap exceeds."""
        try:
            best = json.loads(self._best_path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            best = None
        return best if best and self._name(best["step"]).exists() else {"step": -1, "mpvap": -1.0}


def are_finite(tensors: Iterable[torch.Tensor], device: torch.device) -> bool:
    """Whether the tensors of all ranks are finite: where a head is spread, only one rank may hold the one that is not.

    device: where the ranks communicate.
    """
    are_bad = [tensor.isfinite().logical_not().any() for tensor in tensors]
    return not sum_over_ranks(torch.stack(are_bad).sum().to(device))
