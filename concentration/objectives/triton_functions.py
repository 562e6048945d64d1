"""The steps that the Triton kernels of `fused_block_triton` and `grouped_kernels` share.

GAMMA and OFFSET say what form a vertical's gamma and offset have: 0 for none, 1 for a number per vertical, 2 for one per class.
"""

import triton
import triton.language as tl


@triton.jit
def apply_pace(x, inverse_norm, column, mask, gamma_ptr, offset_ptr, GAMMA: tl.constexpr, OFFSET: tl.constexpr):
    """y = gamma x / n + offset, and each class's gamma; that is 1 where gamma is one number, which the sample's scale takes."""
    y = x
    gamma = tl.full(x.shape, 1.0, tl.float32)
    if GAMMA == 1:
        y = x * (inverse_norm * tl.load(gamma_ptr))
    if GAMMA == 2:
        gamma = tl.load(gamma_ptr + column, mask=mask, other=0.0) + tl.zeros(x.shape, tl.float32)
        y = x * inverse_norm * gamma
    if OFFSET == 1:
        y += tl.load(offset_ptr)
    if OFFSET == 2:
        y += tl.load(offset_ptr + column, mask=mask, other=0.0)
    return y, gamma


@triton.jit
def softplus(y):
    """max(y, 0) + log(1 + e) with e = exp(-|y|), corrected for the rounding of 1 + e: exact also where e is tiny."""
    e = tl.exp(-tl.abs(y))
    u = 1.0 + e
    d = tl.where(u == 1.0, 1.0, u - 1.0)
    return tl.maximum(y, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / d))


@triton.jit
def sum_same_class(index, index_ptr, probability_ptr, num_listed):
    """For every place, the sum over all places with its class: where a class is listed twice, both write the same number."""
    together = tl.zeros(index.shape, tl.float32)
    for other in range(num_listed):
        is_same = index == tl.load(index_ptr + other)
        together += tl.where(is_same, tl.load(probability_ptr + other), 0.0)
    return together
