"""Checkpoints of unfinished training: written whole or not at all, the newest good one found again."""

import io
import pickle
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from concentration.targets import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoint under another name, then renames it."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue())


class CheckpointDirectory:
    """The latest `keep` checkpoints of a run, in `checkpoints/` of its directory, named by step."""

    def __init__(self, run_path: Path, keep: int):
        self._path = run_path / "checkpoints"
        self._keep = keep

    def save(self, trainer: pl.Trainer) -> None:
        """Called on every rank, at the end of a step; weights that are not finite are not worth keeping."""
        if not all(parameter.isfinite().all() for parameter in trainer.lightning_module.parameters()):
            return
        trainer.save_checkpoint(self._path / f"step-{trainer.global_step:09d}.ckpt")
        if trainer.is_global_zero:
            for old in self._list()[: -self._keep]:
                old.unlink()

    def find_latest(self) -> tuple[Path | None, int]:
        """The newest checkpoint that can be read, and its step; (None, 0) where there is none."""
        for path in reversed(self._list()):
            try:
                return path, int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
            except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
                print(f"{path}: damaged ({error}); going on from the one before it")
        return None, 0

    def clear(self) -> None:
        """Removes all: the run has finished, and its network is in its own file."""
        for path in self._list():
            path.unlink()

    def _list(self) -> list[Path]:
        return sorted(self._path.glob("step-*.ckpt"))
