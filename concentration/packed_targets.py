"""The packed codec of stored soft targets: records of one fixed size, less than half of what plain arrays take.

A record holds K classes out of V; all bits are little-endian (the lowest bit of a byte comes first):

    bytes 0-1   the upper bound of the logits, a step of a 16-bit grid over [-LOGIT_LIMIT, LOGIT_LIMIT]
    byte  2     the lower bound of the logits, a step of an 8-bit grid over the same range
    bytes 3-4   the tail mass, float16
    then        the upper bits of an Elias-Fano code: K ones among K + ((V - K) >> l) bits
    then        K fields of l + 7 bits: the lower l bits of a class, and above them the code of its logit

Classes are sorted. For class c at place i, c - i never falls along i and is at most V - K: Elias-Fano codes these numbers. If u
is c - i without its lower l bits, bit u + i of the upper bits is a one. The 7-bit code divides the range between the two
bounds evenly. A record whose probabilities and tail mass are all 0, as of an image that cannot be decoded, is all zero bytes.
K=100 of V=5,000 take 5 + 32 + 150 = 187 bytes; uint16 indices, float16 probabilities and tail take 402.

Shapes: R records, K kept classes, B bytes of a record, U upper bits, F bits or bytes of fields.

Source: Elias 1974, "Efficient Storage and Retrieval by Content and Address of Static Files"; Fano 1971.
"""

import functools
from dataclasses import dataclass

import numpy as np

#: Logits are clipped to [-16.25, 16.25], that is sigmoids to [8.8e-8, 1 - 8.8e-8].
LOGIT_LIMIT = 16.25
CODE_BITS = 7
#: In larger verticals a field could span more than four bytes.
MAX_VERTICAL_SIZE = 2**20

#: An encoded view (`data.views.View`) has 13 bytes; only 10 are stored where the last three are zero in the whole file.
VIEW_BYTES, SHORT_VIEW_BYTES = 13, 10

_LARGEST_CODE = 2**CODE_BITS - 1
#: 65,535 is 257 * 255, so the lower bound's grid is part of the upper bound's: a range can be empty, but never negative.
_HIGH_STEPS, _LOW_STEPS = 2**16 - 1, 2**8 - 1
_HEADER_BYTES = 5


@dataclass(frozen=True)
class PackedLayout:
    """Where the parts of a record lie, which depends on V and K alone.

    Attributes:
        vertical_size: V, at most `MAX_VERTICAL_SIZE`.
        num_kept: K, from 1 to V.
    """

    vertical_size: int
    num_kept: int

    def __post_init__(self):
        if not 1 <= self.num_kept <= self.vertical_size <= MAX_VERTICAL_SIZE:
            raise ValueError(
                f"{self.num_kept} classes of {self.vertical_size} cannot be packed; expected from 1 to all of at most "
                f"{MAX_VERTICAL_SIZE:,}"
            )

    @functools.cached_property
    def lower_bits(self) -> int:
        """The l with which indices take the fewest bits."""

        def index_bits(lower_bits: int) -> int:
            return self.num_kept * (lower_bits + 1) + ((self.vertical_size - self.num_kept) >> lower_bits)

        return min(range(MAX_VERTICAL_SIZE.bit_length()), key=index_bits)

    @property
    def num_upper_bits(self) -> int:
        return self.num_kept + ((self.vertical_size - self.num_kept) >> self.lower_bits)

    @property
    def upper_bytes(self) -> int:
        return -(-self.num_upper_bits // 8)

    @property
    def field_bits(self) -> int:
        return self.lower_bits + CODE_BITS

    @property
    def fields_start(self) -> int:
        """The first byte of the fields."""
        return _HEADER_BYTES + self.upper_bytes

    @functools.cached_property
    def record_bytes(self) -> int:
        return self.fields_start + -(-self.num_kept * self.field_bits // 8)

    @functools.cached_property
    def field_windows(self) -> tuple[np.ndarray, np.ndarray]:
        """(bytes of a field, K) int64, the bytes of a record that hold each field; and (K,), the bit at which it begins in them.

        In place of a byte behind the record's end the last byte is named: its bits are masked out.
        """
        first_bit_K = np.arange(self.num_kept) * self.field_bits
        shift_K = first_bit_K % 8
        num_bytes = -(-(int(shift_K.max()) + self.field_bits) // 8)
        byte_FK = self.fields_start + first_bit_K // 8 + np.arange(num_bytes)[:, None]
        return np.minimum(byte_FK, self.record_bytes - 1), shift_K.astype(np.uint16 if num_bytes <= 2 else np.uint32)


def check_records(
    vertical_size: int, num_kept: int, index_RK: np.ndarray, probability_RK: np.ndarray, tail_R: np.ndarray
) -> None:
    """Whether these can be the records of a vertical, in either codec. Raises: ValueError where they are not."""
    shape = (len(index_RK), num_kept)
    if index_RK.shape != shape or probability_RK.shape != shape or tail_R.shape != shape[:1]:
        raise ValueError(
            f"indices, probabilities and tails have the shapes {index_RK.shape}, {probability_RK.shape} and "
            f"{tail_R.shape}, expected {shape}, {shape} and {shape[:1]}"
        )
    if index_RK.dtype.kind not in "iu":
        raise ValueError(f"indices are {index_RK.dtype}, expected integers")
    if ((index_RK < 0) | (index_RK >= vertical_size)).any():
        raise ValueError(f"an index lies outside the vertical of {vertical_size} classes")
    if not ((probability_RK >= 0) & (probability_RK <= 1)).all():  # also refuses NaN
        raise ValueError("a probability lies outside [0, 1]")
    if not (tail_R >= 0).all():
        raise ValueError("a tail mass is negative or not a number")


def pack(layout: PackedLayout, index_RK: np.ndarray, probability_RK: np.ndarray, tail_R: np.ndarray) -> np.ndarray:
    """R records, (R, record_bytes) uint8.

    Indices are exact. Let s = (upper - lower bound) / 127 be the step between two codes, and h = s / 2. Logits are off by at
    most h, so a sigmoid z whose logit lies in [-LOGIT_LIMIT, LOGIT_LIMIT] comes back as z' with

        |z' - z| <= min(tanh(h / 4), (exp(h) - 1) z (1 - z)),    and    |dL| = |sum (z - z') y| <= sum |z' - z| |y|

    for the loss L (Gao et al., Equation 2) at any logits y. Sigmoids beyond that range, such as 0 and 1, are off by at most
    8.8e-8 more.

    Args:
        index_RK: integers inside the vertical, in any order, each at most once in a record.
        probability_RK: in [0, 1].
        tail_R: at least 0; stored as float16, with larger ones as 65,504.

    Raises:
        ValueError: an argument is not as described.
    """
    record_RB = np.zeros((len(index_RK), layout.record_bytes), dtype=np.uint8)
    check_records(layout.vertical_size, layout.num_kept, index_RK, probability_RK, tail_R)
    is_seen_R = probability_RK.any(1) | (tail_R != 0)
    order_RK = np.argsort(index_RK[is_seen_R], axis=1)
    rising_RK = np.take_along_axis(index_RK[is_seen_R].astype(np.int64), order_RK, axis=1)
    if (rising_RK[:, 1:] == rising_RK[:, :-1]).any():
        raise ValueError("a class is listed twice in a record")
    header_RB, code_RK = _quantise(np.take_along_axis(probability_RK[is_seen_R], order_RK, axis=1))
    tail_RB = np.minimum(tail_R[is_seen_R], np.finfo(np.float16).max).astype("<f2")[:, None].view(np.uint8)

    rank_K = np.arange(layout.num_kept)
    weak_RK = rising_RK - rank_K
    is_upper_RU = np.zeros((len(weak_RK), layout.num_upper_bits), dtype=bool)
    np.put_along_axis(is_upper_RU, (weak_RK >> layout.lower_bits) + rank_K, True, axis=1)
    field_RK = (weak_RK & ((1 << layout.lower_bits) - 1)) | (code_RK << layout.lower_bits)
    is_field_RKF = (field_RK[:, :, None] >> np.arange(layout.field_bits)) & 1
    is_field_RF = is_field_RKF.astype(bool).reshape(len(weak_RK), layout.num_kept * layout.field_bits)
    parts = [header_RB, tail_RB, *(np.packbits(bits, axis=1, bitorder="little") for bits in (is_upper_RU, is_field_RF))]
    record_RB[is_seen_R] = np.concatenate(parts, axis=1)
    return record_RB


def unpack(layout: PackedLayout, record_RB: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices (R, K) uint32, rising, probabilities (R, K) float32 in [0, 1] and tail masses (R,) float32.

    A record of zero bytes gives zeros.

    Args:
        record_RB: (R, record_bytes) uint8 from `pack`.

    Raises:
        ValueError: the records have another layout, or are damaged.
    """
    if record_RB.dtype != np.uint8 or record_RB.ndim != 2 or record_RB.shape[1] != layout.record_bytes:
        raise ValueError(
            f"records are {record_RB.dtype} of the shape {record_RB.shape}, expected uint8 (records, {layout.record_bytes})"
        )
    is_seen_R = record_RB.any(1)
    if is_seen_R.all():
        return _unpack_seen(layout, record_RB)
    shape = (len(record_RB), layout.num_kept)
    unpacked = np.zeros(shape, np.uint32), np.zeros(shape, np.float32), np.zeros(shape[0], np.float32)
    for whole, part in zip(unpacked, _unpack_seen(layout, record_RB[is_seen_R]), strict=True):
        whole[is_seen_R] = part
    return unpacked


def _quantise(probability_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bounds as the first three bytes of each record, and each probability's code, (R, K) int64."""
    least = 1 / (1 + np.exp(LOGIT_LIMIT))
    clipped_RK = probability_RK.astype(np.float64).clip(least, 1 - least)
    logit_RK = np.log(clipped_RK) - np.log1p(-clipped_RK)
    # Rounded outwards, so that no logit lies beyond the bounds.
    share_RK = ((logit_RK + LOGIT_LIMIT) / (2 * LOGIT_LIMIT)).clip(0, 1)
    high_R = np.ceil(share_RK.max(1) * _HIGH_STEPS).astype(np.uint16)
    low_R = np.floor(share_RK.min(1) * _LOW_STEPS).astype(np.uint8)
    header_RB = np.concatenate([high_R.astype("<u2")[:, None].view(np.uint8), low_R[:, None]], axis=1)
    low_share_R = low_R / _LOW_STEPS
    range_R = high_R / _HIGH_STEPS - low_share_R
    inside_RK = (share_RK - low_share_R[:, None]) / np.where(range_R > 0, range_R, 1)[:, None]
    return header_RB, np.rint(inside_RK * _LARGEST_CODE).clip(0, _LARGEST_CODE).astype(np.int64)


def _unpack_seen(layout: PackedLayout, record_RB: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`unpack` for records that are not all zero."""
    tail_R = record_RB[:, 3:_HEADER_BYTES].copy().view("<f2")[:, 0].astype(np.float32)
    if not ((tail_R >= 0) & np.isfinite(tail_R)).all():
        raise ValueError("a tail mass is negative or not finite")
    field_RK = _read_fields(layout, record_RB)
    lower_mask = field_RK.dtype.type((1 << layout.lower_bits) - 1)
    weak_RK = _read_upper(layout, record_RB)
    weak_RK <<= layout.lower_bits
    weak_RK |= field_RK & lower_mask
    if (weak_RK[:, 1:] < weak_RK[:, :-1]).any():
        raise ValueError("the indices of a record do not rise")
    if (weak_RK[:, -1] > layout.vertical_size - layout.num_kept).any():
        raise ValueError(f"an index lies outside the vertical of {layout.vertical_size} classes")
    weak_RK += np.arange(layout.num_kept, dtype=np.uint32)
    code_RK = (field_RK >> layout.lower_bits).astype(np.uint8)
    return weak_RK, _dequantise(record_RB, code_RK), tail_R


def _read_fields(layout: PackedLayout, record_RB: np.ndarray) -> np.ndarray:
    """(R, K) unsigned: the lower bits of each index, and the code above them."""
    byte_FK, shift_K = layout.field_windows
    field_RK = record_RB[:, byte_FK[0]].astype(shift_K.dtype)
    for number, byte_K in enumerate(byte_FK[1:], start=1):
        field_RK |= record_RB[:, byte_K].astype(shift_K.dtype) << (8 * number)
    field_RK >>= shift_K
    field_RK &= shift_K.dtype.type((1 << layout.field_bits) - 1)
    return field_RK


def _read_upper(layout: PackedLayout, record_RB: np.ndarray) -> np.ndarray:
    """(R, K) uint32: the upper bits of each index."""
    upper_RB = record_RB[:, _HEADER_BYTES : layout.fields_start]
    num_ones_R = np.bitwise_count(upper_RB).sum(1, dtype=np.int64)
    if (num_ones_R != layout.num_kept).any():
        found = int(num_ones_R[num_ones_R != layout.num_kept][0])
        raise ValueError(f"a record holds {found} classes, expected {layout.num_kept}")
    one_RK = np.flatnonzero(np.unpackbits(upper_RB, axis=1, bitorder="little").view(bool)).reshape(-1, layout.num_kept)
    first_R = np.arange(len(upper_RB))[:, None] * (8 * layout.upper_bytes)
    return (one_RK - first_R - np.arange(layout.num_kept)).astype(np.uint32)


def _dequantise(record_RB: np.ndarray, code_RK: np.ndarray) -> np.ndarray:
    """(R, K) float32 probabilities."""
    high_R, low_R = record_RB[:, :2].copy().view("<u2")[:, 0], record_RB[:, 2]
    if (high_R < low_R * np.uint16(_HIGH_STEPS // _LOW_STEPS)).any():
        raise ValueError("a record's upper bound lies under its lower bound")
    high_logit_R = high_R * np.float32(2 * LOGIT_LIMIT / _HIGH_STEPS) - np.float32(LOGIT_LIMIT)
    low_logit_R = low_R * np.float32(2 * LOGIT_LIMIT / _LOW_STEPS) - np.float32(LOGIT_LIMIT)
    step_R = (high_logit_R - low_logit_R) / np.float32(_LARGEST_CODE)
    negative_RK = -low_logit_R[:, None] - step_R[:, None] * code_RK
    np.exp(negative_RK, out=negative_RK)
    negative_RK += 1
    return np.reciprocal(negative_RK, out=negative_RK)
