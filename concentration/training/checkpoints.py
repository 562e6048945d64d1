"""Checkpoints of unfinished training: written whole or not at all, checked when read, the newest good one found again.

They are written while training waits. A thread that writes a copy meanwhile was measured and left out: on two busy CPU cores a
checkpoint of 205 MB takes 0.8 to 1.0 s, and with a thread it cost 1.2 s of training.
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
from concentration.networks.student import Student
from concentration.targets import write_atomically
from concentration.training.configs import CHECKPOINTS
from concentration.training.head_files import DAMAGES, check_head, load_head, load_verified, remove_heads, save_head


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoint under another name, then renames it."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue())


class CheckpointDirectory:
    """The latest `keep` checkpoints of a run, in `checkpoints/` of its directory, named by step; and the one that validated best.

    Which that is stands in `best.json`.
    """

    def __init__(self, run_path: Path, keep: int):
        self.path = run_path / CHECKPOINTS
        self._keep = keep
        self._best_path = self.path / "best.json"

    def save(self, trainer: pl.Trainer) -> None:
        """Called on every rank, at the end of a step; weights that are not finite are not worth keeping."""
        path = self._name(trainer.global_step)
        student = trainer.lightning_module.student
        if student.sharding is not None and trainer.is_global_zero:
            path.unlink(missing_ok=True)  # where it is, the files of the head beside it are all of one time
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

    def save_if_best(self, trainer: pl.Trainer, mpvap: float | None) -> None:
        """Saves, on every rank, if no validation before had this mpvap; the checkpoint is kept until a better one is."""
        if mpvap is None or from_rank_zero(lambda: mpvap <= self._load_best()["mpvap"]):
            return
        # NOTE: noted first: killed in between, the run validates again. Saved first, it would go on behind the validation.
        if trainer.is_global_zero:
            write_atomically(self._best_path, {"step": trainer.global_step, "mpvap": mpvap})
        self.save(trainer)

    def load_best(self, student: Student) -> bool:
        """Fills the student with the weights that validated best; False, and nothing, where none are kept undamaged."""
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
        """The newest undamaged checkpoint, with all parts of a head that is spread; (None, 0) where there is none.

        Raises:
            DataError: there are checkpoints, and each lacks a part of its head: that is no work of a kill.
        """
        return from_rank_zero(self._find_latest)  # one rank reads them, and all go on from the same one

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
        """Its step and mpvap; -1, which nothing is as bad as, where none has been kept."""
        try:
            best = json.loads(self._best_path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            best = None
        return best if best and self._name(best["step"]).exists() else {"step": -1, "mpvap": -1.0}


def are_finite(tensors: Iterable[torch.Tensor], device: torch.device) -> bool:
    """Whether all are, on all ranks: where a head is spread, one rank alone may hold what is not.

    `device`: where the ranks talk.
    """
    are_bad = [tensor.isfinite().logical_not().any() for tensor in tensors]
    return not sum_over_ranks(torch.stack(are_bad).sum().to(device))
