"""The file of a network: its tensors in safetensors, its description in the header."""

from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from concentration.array_files import sort_metadata
from concentration.errors import DataError
from concentration.files import replacing


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Writes a network file, whole or not at all. Raises: DataError where it cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            safetensors.torch.save_file(tensors, temporary, dict(header))
        except safetensors.SafetensorError as error:  # what the library makes of a full disk
            raise OSError(" ".join(str(error).split())) from None
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)  # safetensors makes it private, whatever the umask, but teams share networks
        sort_metadata(temporary)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a network file. Raises: DataError where it is missing or damaged."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    # TypeError: a size that torch cannot hold; it adds a stack.
    except (safetensors.SafetensorError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: damaged, or no safetensors file ({reason}); restore it, or train it again") from None


def check_fit(build: Callable[[], nn.Module], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Compares tensors with the network that `build` makes, on the meta device: a header that asks for a giant takes no memory.

    Raises:
        DataError: the tensors are not that network's.
    """
    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except (RuntimeError, TypeError) as error:  # sizes that no tensor can have
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: its header describes no network that can be built ({reason}); train it again"
        ) from None
    for name in sorted(tensors.keys() | expected.keys()):
        have, want = (tuple(t[name].shape) if name in t else "nothing" for t in (tensors, expected))
        if have != want:
            raise DataError(
                f"{path}: weights do not fit its architecture: {name!r} is {have}, expected {want}; train it again"
            )
