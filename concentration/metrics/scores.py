"""Questions of the metrics about all scores of a batch.

They are answered by numpy on a CPU, where it is two to twelve times as fast as torch at this, and by torch on a GPU, so that only
the answers leave it.

Shapes: B samples, C any classes, P and N (sample, class) pairs.
"""

import numpy as np
import torch
from torch import Tensor

#: Scores may be on any device; the work is done there.
Scores = np.ndarray | Tensor


def pick(scores_BC: Tensor, row_P: np.ndarray, column_P: np.ndarray) -> np.ndarray:
    """(P,) the scores of these pairs."""
    if scores_BC.device.type == "cpu":
        return scores_BC.numpy()[row_P, column_P]
    return scores_BC[place(row_P, scores_BC), place(column_P, scores_BC)].cpu().numpy()


def count_reaching(scores_BC: Tensor, limit_B: np.ndarray) -> np.ndarray:
    """(B,) int64: how many scores of each sample are at least its limit."""
    if scores_BC.device.type == "cpu":
        return (scores_BC.numpy() >= limit_B[:, None]).sum(axis=1)
    return (scores_BC >= place(limit_B, scores_BC)[:, None]).sum(1).cpu().numpy()


def find_best(scores_BC: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(B,) the best score of each sample, float32, the first class that has it, and how many have it; C > 0."""
    if scores_BC.device.type == "cpu":
        scores_BC = scores_BC.numpy()
        best_B = scores_BC.argmax(axis=1)
        score_B = np.take_along_axis(scores_BC, best_B[:, None], axis=1)
        return score_B[:, 0], best_B, (scores_BC == score_B).sum(axis=1)
    score_B, best_B = scores_BC.max(1)
    num_best_B = (scores_BC == score_B[:, None]).sum(1)
    return score_B.cpu().numpy(), best_B.cpu().numpy(), num_best_B.cpu().numpy()


def find_reaching(scores_BC: Tensor, limit_C: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) rows and columns of the float32 scores that are at least the limit of their class, without -inf."""
    limit_C = limit_C.clamp(min=torch.finfo(torch.float32).min)
    if scores_BC.device.type == "cpu":
        # NOTE: a fifth of the time of `nonzero` in two dimensions.
        found_N = np.flatnonzero(scores_BC.numpy() >= limit_C.numpy())
        row_N, column_N = np.divmod(found_N, scores_BC.shape[1])
        return torch.from_numpy(row_N), torch.from_numpy(column_N)
    return (scores_BC >= limit_C).nonzero(as_tuple=True)


def place(array: np.ndarray, like: Tensor) -> Tensor:
    """The array as a tensor on the other's device."""
    return torch.from_numpy(array).to(like.device)
