"""Checkpoints of unfinished training: written whole or not at all, the newest good one found again."""

import io
import pickle
from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from concentration.distributed import sum_over_ranks, wait_for_all
from concentration.errors import DataError
from concentration.targets import write_atomically
from concentration.training.head_files import check_head, remove_heads, save_head


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoint under another name, then renames it."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue())


class CheckpointDirectory:
    """The latest `keep` checkpoints of a run, in `checkpoints/` of its directory, named by step."""

    def __init__(self, run_path: Path, keep: int):
        self.path = run_path / "checkpoints"
        self._keep = keep

    def save(self, trainer: pl.Trainer) -> None:
        """Called on every rank, at the end of a step; weights that are not finite are not worth keeping."""
        path = self.path / f"step-{trainer.global_step:09d}.ckpt"
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
            for old in self._list()[: -self._keep]:
                old.unlink()
            remove_heads(self.path, keep={path.stem for path in self._list()})

    def find_latest(self) -> tuple[Path | None, int]:
        """The newest checkpoint that can be read, with all parts of a head that is spread; (None, 0) where there is none.

        Raises:
            DataError: there are checkpoints, and each lacks a part of its head: that is no work of a kill.
        """
        incomplete = None
        for path in reversed(self._list()):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                if head := content.get("head"):
                    check_head(path, head["world_size"], head["verticals"])
                return path, int(content["global_step"])
            except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
                print(f"{path}: damaged ({error}); going on from the one before it")
            except DataError as error:
                incomplete = incomplete or error
                print(f"{error}; going on from the one before it")
        if incomplete is not None:
            raise incomplete
        return None, 0

    def clear(self) -> None:
        """Removes all: the run has finished, and its network is in its own file."""
        for path in self._list():
            path.unlink()
        remove_heads(self.path, keep=set())

    def _list(self) -> list[Path]:
        return sorted(self.path.glob("step-*.ckpt"))


def are_finite(tensors: Iterable[torch.Tensor], device: torch.device) -> bool:
    """Whether all are, on all ranks: where a head is spread, one rank alone may hold what is not.

    `device`: where the ranks talk.
    """
    are_bad = [tensor.isfinite().logical_not().any() for tensor in tensors]
    return not sum_over_ranks(torch.stack(are_bad).sum().to(device))
