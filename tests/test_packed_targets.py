"""The packed codec: exact indices, sigmoids within the proven bound, bytes that never change, and damage that is refused."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from concentration.packed_targets import LOGIT_LIMIT, MAX_VERTICAL_SIZE, PackedLayout, pack, unpack

LEAST = 1 / (1 + math.exp(LOGIT_LIMIT))

#: V=1,000, K=5; rising classes, so that they stand as they are read.
GOLDEN_LAYOUT = PackedLayout(1000, 5)
GOLDEN_INDEX = np.array([[0, 1, 500, 998, 999], [7, 8, 9, 10, 11], [0, 1, 2, 3, 4]])
GOLDEN_PROBABILITY = np.array([[1e-6, 0.9, 0.02, 0.3, 0.004], [1.0, 0.0, 0.5, 0.25, 1e-7], [0, 0, 0, 0, 0]], np.float32)
GOLDEN_TAIL = np.array([0.125, 70_000.0, 0.0], np.float32)
GOLDEN_BYTES = (
    "4f91130030230c0000e02f7f8ecf6321",
    "ffff00ff7b1f0087ff0170001e768700",
    "00" * 16,
)


def draw_targets(seed: int, num_rows: int, layout: PackedLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct classes in no order, sigmoids from certain to impossible, and tails."""
    generator = np.random.default_rng(seed)
    size, kept = layout.vertical_size, layout.num_kept
    index_RK = np.stack([generator.choice(size, kept, replace=False) for _ in range(num_rows)])
    spread_R = generator.uniform(0, 10, (num_rows, 1))
    probability_RK = 1 / (1 + np.exp(-generator.normal(-4, spread_R, (num_rows, kept))))
    return index_RK, probability_RK.astype(np.float32), generator.uniform(0, 50, num_rows).astype(np.float32)


def sort_by_class(index_RK: np.ndarray, probability_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order_RK = np.argsort(index_RK, axis=1)
    return np.take_along_axis(index_RK, order_RK, 1), np.take_along_axis(probability_RK, order_RK, 1)


def compute_half_step(record_RB: np.ndarray) -> np.ndarray:
    """h of `pack`, (R, 1), from the bounds in the records."""
    high_R = (record_RB[:, 0] + 256.0 * record_RB[:, 1]) / 65_535
    return (2 * LOGIT_LIMIT * (high_R - record_RB[:, 2] / 255) / 127 / 2)[:, None]


def compute_error_bound(record_RB: np.ndarray, probability_RK: np.ndarray) -> np.ndarray:
    """What `pack` promises of each sigmoid, (R, K); float32 adds a few of its last places."""
    half_RK, z_RK = compute_half_step(record_RB), probability_RK.astype(np.float64).clip(LEAST, 1 - LEAST)
    bound_RK = np.minimum(np.tanh(half_RK / 4), (np.exp(half_RK) - 1) * z_RK * (1 - z_RK))
    return bound_RK + np.abs(z_RK - probability_RK) + 4e-6 * z_RK * (1 - z_RK) + 1.2e-7 * z_RK


def decode_slowly(layout: PackedLayout, record: bytes) -> tuple[list[int], list[float], float]:
    """One record bit by bit, from the module's first words alone."""
    size, kept = layout.vertical_size, layout.num_kept
    bits = [(byte >> place) & 1 for byte in record for place in range(8)]

    def number(first: int, count: int) -> int:
        return sum(bit << place for place, bit in enumerate(bits[first : first + count]))

    costs = [kept * (lower + 1) + (size - kept) // 2**lower for lower in range(21)]
    lower = costs.index(min(costs))
    num_upper = kept + (size - kept) // 2**lower
    high, low = (LOGIT_LIMIT * (2 * number(f, n) / (2**n - 1) - 1) for f, n in ((0, 16), (16, 8)))
    (tail,) = np.array([number(24, 16)], np.uint16).view(np.float16).astype(float)
    ones = [place for place in range(num_upper) if bits[40 + place]]
    fields = 40 + 8 * math.ceil(num_upper / 8)
    assert len(record) == math.ceil((fields + kept * (lower + 7)) / 8)
    index, probability = [], []
    for rank, one in enumerate(ones):
        first = fields + rank * (lower + 7)
        index.append((one - rank) * 2**lower + number(first, lower) + rank)
        logit = low + (high - low) * number(first + lower, 7) / 127
        probability.append(1 / (1 + math.exp(-logit)))
    return index, probability, float(tail)


@st.composite
def layouts(draw) -> PackedLayout:
    size = draw(st.one_of(st.integers(1, 300), st.sampled_from([5_000, 65_536, 65_537, 10**6, MAX_VERTICAL_SIZE])))
    return PackedLayout(size, draw(st.integers(1, min(size, 200))))


@given(layouts(), st.integers(0, 5), st.integers(0, 2**31))
@example(layout=PackedLayout(1, 1), num_rows=3, seed=0)
@example(layout=PackedLayout(300, 300), num_rows=3, seed=0)
@example(layout=PackedLayout(MAX_VERTICAL_SIZE, 1), num_rows=40, seed=0)
@example(layout=PackedLayout(5_000, 100), num_rows=300, seed=1)
def test_indices_come_back_exactly_and_the_rest_as_near_as_promised(layout, num_rows, seed):
    if num_rows == 0:
        targets = (np.empty((0, layout.num_kept), int), np.empty((0, layout.num_kept)), np.empty(0))
    else:
        targets = draw_targets(seed, num_rows, layout)
    record_RB = pack(layout, *targets)
    assert record_RB.shape == (num_rows, layout.record_bytes)
    assert record_RB.dtype == np.uint8
    index_RK, probability_RK, tail_R = unpack(layout, record_RB)
    assert (index_RK.dtype, probability_RK.dtype, tail_R.dtype) == (np.uint32, np.float32, np.float32)
    rising_RK, true_RK = sort_by_class(*targets[:2])
    np.testing.assert_array_equal(index_RK, rising_RK)
    assert (np.abs(probability_RK.astype(np.float64) - true_RK) <= compute_error_bound(record_RB, true_RK)).all()
    np.testing.assert_array_equal(tail_R, targets[2].astype(np.float16))


@given(layouts(), st.integers(0, 2**31))
def test_a_decoder_that_reads_bit_by_bit_agrees(layout, seed):
    record_RB = pack(layout, *draw_targets(seed, 2, layout))
    for record, *unpacked in zip(record_RB, *unpack(layout, record_RB), strict=True):
        index, probability, tail = decode_slowly(layout, record.tobytes())
        assert unpacked[0].tolist() == index
        np.testing.assert_allclose(unpacked[1], probability, rtol=2e-5)
        assert unpacked[2] == tail


def test_the_bytes_are_what_they_always_were():
    """Files are kept for years. Never change these; a better codec gets another name."""
    record_RB = pack(GOLDEN_LAYOUT, GOLDEN_INDEX, GOLDEN_PROBABILITY, GOLDEN_TAIL)
    assert tuple(record.tobytes().hex() for record in record_RB) == GOLDEN_BYTES
    index_RK, probability_RK, tail_R = unpack(GOLDEN_LAYOUT, record_RB)
    np.testing.assert_array_equal(index_RK[:2], GOLDEN_INDEX[:2])
    np.testing.assert_allclose(probability_RK[0], [1e-6, 0.9, 0.02, 0.3, 0.004], rtol=0.04)
    assert tail_R.tolist() == [0.125, 65504.0, 0.0]


@pytest.mark.parametrize(
    ("size", "kept", "expected"), [(5_000, 100, 187), (50, 50, 5 + 7 + 44), (10**6, 100, 5 + 28 + 250), (1, 1, 7)]
)
def test_a_record_is_as_small_as_it_should_be(size, kept, expected):
    assert PackedLayout(size, kept).record_bytes == expected


def test_the_hundred_best_of_five_thousand_fit_beside_a_view_into_200_bytes():
    assert PackedLayout(5_000, 100).record_bytes + 13 <= 200


def test_an_image_that_could_not_be_decoded_is_zero_bytes_and_zeros_again():
    layout = PackedLayout(40, 3)
    index_RK, probability_RK, tail_R = draw_targets(0, 4, layout)
    probability_RK[[1, 3]], tail_R[[1, 3]] = 0, 0
    record_RB = pack(layout, index_RK, probability_RK, tail_R)
    assert not record_RB[[1, 3]].any()
    unpacked = unpack(layout, record_RB)
    for array in unpacked:
        assert not array[[1, 3]].any()
    alone = unpack(layout, record_RB[[0, 2]])
    for array, expected in zip(unpacked, alone, strict=True):
        np.testing.assert_array_equal(array[[0, 2]], expected)


def test_a_record_that_is_nearly_empty_is_none_that_could_not_be_decoded():
    layout = PackedLayout(40, 2)
    for probability, tail in (([0.0, 0.0], 0.5), ([1e-30, 0.0], 0.0)):
        record_RB = pack(layout, np.array([[9, 4]]), np.array([probability], np.float32), np.array([tail]))
        index_RK, probability_RK, tail_R = unpack(layout, record_RB)
        assert index_RK.tolist() == [[4, 9]]
        np.testing.assert_allclose(probability_RK, LEAST, rtol=1e-4)
        assert tail_R.tolist() == [tail]


@pytest.mark.parametrize("probability", [0.0, 1e-7, 1e-4, 0.3, 0.5, 1 - 1e-7, 1.0])
def test_equal_probabilities_stay_equal_and_almost_exact(probability):
    layout = PackedLayout(100, 9)
    probability_RK = np.full((1, 9), probability, np.float32)
    unpacked_RK = unpack(layout, pack(layout, np.arange(9)[None], probability_RK, np.ones(1)))[1]
    assert len(np.unique(unpacked_RK)) == 1
    odds_error = 0.0006 * probability * (1 - probability)  # a step of the upper bound and 1/254 of the lower bound's
    assert abs(float(unpacked_RK[0, 0]) - probability) <= odds_error + 1.5e-7


def test_the_largest_probability_is_kept_to_a_ten_thousandth():
    layout = PackedLayout(5_000, 100)
    index_RK, probability_RK, tail_R = draw_targets(3, 200, layout)
    unpacked_RK = unpack(layout, pack(layout, index_RK, probability_RK, tail_R))[1]
    np.testing.assert_allclose(unpacked_RK.max(1), probability_RK.max(1), atol=1.3e-4)


@given(st.integers(0, 2**31), st.sampled_from([0.1, 3.0, 30.0]))
def test_the_loss_moves_by_no_more_than_the_bound(seed, logit_scale):
    """The softplus terms cancel: only sum z * y differs."""
    layout = PackedLayout(500, 60)
    index_RK, probability_RK, tail_R = draw_targets(seed, 20, layout)
    record_RB = pack(layout, index_RK, probability_RK, tail_R)
    true_RK = sort_by_class(index_RK, probability_RK)[1]
    y_RK = np.random.default_rng(seed).normal(0, logit_scale, true_RK.shape)
    change_R = ((unpack(layout, record_RB)[1].astype(np.float64) - true_RK) * y_RK).sum(1)
    bound_R = (compute_error_bound(record_RB, true_RK) * np.abs(y_RK)).sum(1)
    assert (np.abs(change_R) <= bound_R).all()
    assert bound_R.max() < 0.033 * np.abs(y_RK).sum(1).max(), (
        "the bound says something: tanh(h / 4) at the widest range"
    )


@given(st.integers(0, 2**31))
def test_a_record_is_unpacked_alike_alone_and_among_others(seed):
    layout = PackedLayout(700, 33)
    record_RB = pack(layout, *draw_targets(seed, 9, layout))
    together = unpack(layout, record_RB)
    for row in range(9):
        for whole, alone in zip(together, unpack(layout, record_RB[row : row + 1]), strict=True):
            np.testing.assert_array_equal(whole[row], alone[0])


def test_every_second_record_of_a_larger_array_can_be_unpacked():
    layout = PackedLayout(700, 33)
    record_RB = pack(layout, *draw_targets(0, 8, layout))
    for whole, part in zip(unpack(layout, record_RB), unpack(layout, record_RB[::2]), strict=True):
        np.testing.assert_array_equal(whole[::2], part)


@given(layouts(), st.integers(0, 2**31), st.sampled_from(["random", "flipped", "sparse"]))
def test_damaged_records_are_refused_or_give_targets_in_range(layout, seed, kind):
    generator = np.random.default_rng(seed)
    record_RB = pack(layout, *draw_targets(seed, 1, layout))
    if kind == "random":
        record_RB = generator.integers(0, 256, record_RB.shape, dtype=np.uint8)
    elif kind == "sparse":
        record_RB &= generator.integers(0, 256, record_RB.shape, dtype=np.uint8)
    else:
        place = generator.integers(0, 8 * layout.record_bytes)
        record_RB[0, place // 8] ^= 1 << (place % 8)
    try:
        index_RK, probability_RK, tail_R = unpack(layout, record_RB)
    except ValueError:
        return
    assert (index_RK < layout.vertical_size).all()
    assert (np.diff(index_RK.astype(int)) > 0).all() or not record_RB.any()
    assert ((probability_RK >= 0) & (probability_RK <= 1)).all()
    assert (np.isfinite(tail_R) & (tail_R >= 0)).all()


@pytest.mark.parametrize(
    ("place", "byte", "message"),
    [
        (4, 0xFC, "tail mass is negative or not finite"),
        (4, 0x7E, "tail mass is negative or not finite"),
        (1, 0x00, "upper bound lies under its lower bound"),
        (5, 0x00, "holds 2 classes, expected 5"),
        (5, 0xFF, "holds 10 classes, expected 5"),
    ],
)
def test_the_reason_of_a_refusal_is_named(place, byte, message):
    record_RB = pack(GOLDEN_LAYOUT, GOLDEN_INDEX, GOLDEN_PROBABILITY, GOLDEN_TAIL)
    record_RB[0, place] = byte
    with pytest.raises(ValueError, match=message):
        unpack(GOLDEN_LAYOUT, record_RB)


def test_indices_that_fall_or_leave_the_vertical_are_refused():
    layout = PackedLayout(1000, 2)  # 8 lower bits, fields of 15 bits from byte 6 on
    assert (layout.lower_bits, layout.fields_start) == (8, 6)
    record_RB = pack(layout, np.array([[3, 9]]), np.full((1, 2), 0.5), np.zeros(1))
    record_RB[0, 6] = 200
    with pytest.raises(ValueError, match="do not rise"):
        unpack(layout, record_RB)
    record_RB = pack(layout, np.array([[3, 999]]), np.full((1, 2), 0.5), np.zeros(1))
    record_RB[0, 7] |= 0x80
    with pytest.raises(ValueError, match="outside the vertical of 1000"):
        unpack(layout, record_RB)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": [[0, 0]]}, "listed twice"),
        ({"index": [[0, 10]]}, "outside the vertical of 10"),
        ({"index": [[0, -1]]}, "outside the vertical of 10"),
        ({"probability": [[0.5, math.nan]]}, "a probability lies outside"),
        ({"probability": [[0.5, 1.01]]}, "a probability lies outside"),
        ({"tail": [-1.0]}, "tail mass is negative"),
        ({"tail": [math.nan]}, "tail mass is negative"),
        ({"tail": [1.0, 1.0]}, "have the shapes"),
        ({"index": [[0, 1, 2]]}, "have the shapes"),
    ],
)
def test_what_is_no_target_is_not_packed(changes, message):
    arrays = {"index": [[3, 4]], "probability": [[0.5, 0.5]], "tail": [0.0], **changes}
    with pytest.raises(ValueError, match=message):
        pack(PackedLayout(10, 2), *(np.array(values) for values in arrays.values()))


@pytest.mark.parametrize("shape", [(3, 186), (3, 188), (187,)])
def test_records_of_another_layout_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected uint8 \(records, 187\)"):
        unpack(PackedLayout(5_000, 100), np.zeros(shape, np.uint8))


@pytest.mark.parametrize(("size", "kept"), [(10, 0), (10, 11), (MAX_VERTICAL_SIZE + 1, 5), (0, 0)])
def test_a_layout_that_cannot_be_is_refused(size, kept):
    with pytest.raises(ValueError, match=f"{kept} classes of {size} cannot be packed"):
        PackedLayout(size, kept)
