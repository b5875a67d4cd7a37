"""The checker on functions that are right, and above all on functions that are wrong."""

import math

import pytest
import torch

from lab import check

X = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
SIZES = [1, 4, 255, 256, 257]


def row_sum(x, chunks=1):
    """Sum each row chunk by chunk, left to right: elementwise additions, so nothing but ``chunks`` matters."""
    partial = torch.zeros(chunks, len(x))
    for column in range(x.shape[1]):
        partial[column * chunks // x.shape[1]] += x[:, column]
    total = partial[0]
    for part in partial[1:]:
        total = total + part
    return total


def chunks_by_rows(x):
    return row_sum(x, chunks=4 if len(x) < 256 else 1)


def per_tensor_scale(x):
    return x / x.abs().max()


def looks_at_the_previous_row(x):
    return x + 0 * x.roll(1, 0)


def knows_its_position(x):
    return x + torch.arange(len(x))[:, None] * 1e-6


def test_a_row_wise_function_passes():
    report = check.check_invariance(row_sum, X, SIZES)
    assert report.invariant
    assert len(report.cases) == len(SIZES) + 4 + 4 * len(check.NEIGHBOURS)
    assert str(report) == f"invariant ({len(report.cases)} cases)"


@pytest.mark.parametrize("fn", [chunks_by_rows, per_tensor_scale, looks_at_the_previous_row, knows_its_position])
def test_a_function_that_looks_at_the_batch_is_caught(fn):
    report = check.check_invariance(fn, X, SIZES)
    assert not report.invariant
    assert "NOT invariant" in str(report)


def test_a_threshold_is_missed_by_small_batches_and_caught_by_straddling_ones():
    assert check.check_prefixes(chunks_by_rows, X[:4], [1, 2, 4]).invariant
    frame = check.check_prefixes(chunks_by_rows, X, SIZES).frame().set_index("rows")
    assert frame.rows_differing[256] == frame.rows_differing[257] == 0
    assert frame.rows_differing[255] > 0


BUFFER = torch.empty(300, 64)


def into_a_buffer(x):
    """Depends on the batch, and always answers in the same memory, as a captured graph does."""
    return torch.add(x / x.abs().max(), len(x), out=BUFFER[: len(x)])


def in_place(x):
    x -= x.mean()
    return x


@pytest.mark.parametrize("fn", [into_a_buffer, in_place])
def test_a_function_that_writes_over_its_last_answer_is_caught(fn):
    assert not check.check_prefixes(fn, X.clone(), (1, 4, 255)).invariant
    assert not check.check_invariance(fn, X.clone(), (1, 4, 255), positions=[0]).invariant


def test_a_draw_into_a_buffer_is_not_deterministic():
    assert not check.check_run_to_run(lambda: BUFFER.copy_(torch.rand(300, 1))).invariant


def test_positions_may_come_from_an_iterator():
    """Not spent on the first kind of neighbour."""
    report = check.check_neighbours(lambda x: x, torch.randn(8, 4), iter([0, 5]))
    assert len(report.cases) == 2 * len(check.NEIGHBOURS)


@pytest.mark.parametrize("batch_sizes", [(), (0, -1), (9,)])
def test_nothing_tried_is_nothing_shown(batch_sizes):
    report = check.check_prefixes(lambda x: x, torch.randn(8, 4), batch_sizes)
    assert not report.invariant and str(report) == "nothing was tried"


def test_prefixes_beyond_the_batch_are_left_out():
    assert check.check_prefixes(row_sum, X[:8], [1, 8, 9]).frame().rows.tolist() == [1, 8]


def test_one_row_is_no_batch():
    with pytest.raises(ValueError, match=r"x\.shape=\(1, 64\)"):
        check.check_invariance(row_sum, X[:1], [1])


def test_bits_tell_zeros_apart_and_nan_equals_itself():
    nan, zero = torch.tensor([math.nan]), torch.tensor([0.0])
    assert check.same_bits(nan, nan.clone())
    assert not check.same_bits(zero, -zero)
    assert not check.same_bits(zero, zero.half())
    assert not check.same_bits(zero, zero[:0])


def test_a_difference_says_where_and_what():
    want = torch.zeros(4, 2, dtype=torch.float16)
    got = want.clone()
    got[2, 1], got[3, 0] = -0.0, 1.5
    difference = check.compare(got, want)
    assert (difference.rows, difference.rows_differing, difference.first) == (4, 2, (2, 1))
    assert (difference.got_bits, difference.want_bits) == ("0x8000", "0x0000")
    assert str(difference) == "2 of 4 rows differ; first at (2, 1): -0 (0x8000) instead of 0 (0x0000)"
    assert str(check.compare(want, want)) == "all 4 rows have the same bits"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_every_width_of_number_can_be_compared(dtype):
    x = torch.arange(6).reshape(3, 2).to(dtype)
    y = x.clone()
    y[1, 0] = 7
    assert check.compare(y, x).first == (1, 0)


def test_unlike_tensors_are_not_compared():
    with pytest.raises(ValueError, match=r"got is \(2,\) torch\.float32, want is \(3,\)"):
        check.compare(torch.zeros(2), torch.zeros(3))


def test_run_to_run_is_another_question():
    """Batch-dependent but repeatable passes; random noise, the same for every row of a call, does not."""
    assert check.check_run_to_run(lambda: chunks_by_rows(X)).invariant
    noisy = check.check_run_to_run(lambda: X + torch.rand(()), runs=3)
    assert [case for case, _, _ in noisy.cases] == ["run 1", "run 2"]
    assert not noisy.invariant


def test_schedules_are_grouped_by_their_bits():
    groups = check.distinct_results(lambda chunks: row_sum(X, chunks), [1, 2, 4, 1])
    assert sorted(map(len, groups.values())) == [1, 1, 2]
