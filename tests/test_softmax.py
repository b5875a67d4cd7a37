"""Log-softmax, argmax and sampling, in the interpreter or on the GPU at hand: right, invariant, strict."""

import pytest
import torch

from kernels.softmax import (
    CHUNK,
    SoftmaxSchedule,
    argmax,
    log_softmax,
    log_softmax_ref,
    plan_softmax,
    sample,
    token_log_softmax,
    top_p_ref,
)
from lab.check import check_invariance, distinct_results, same_bits
from lab.device import current_device
from lab.timing import relative_error

DEVICE = current_device().torch_device
DTYPES = [torch.float16, torch.float32, *[torch.bfloat16] * current_device().is_gpu]
WIDTHS = [1, 5, 256, CHUNK - 1, CHUNK + 1, 3 * CHUNK]
INF, NAN = float("inf"), float("nan")


def rows(m, n, dtype=torch.float32, seed=0):
    return (3 * torch.randn(m, n, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def draw(x, temperature=1.0, top_p=1.0, seed=0, position=0):
    """Tokens and log-probabilities; scalars hold for every row."""

    def each(value, dtype):
        return torch.as_tensor(value, dtype=dtype, device=DEVICE).expand(len(x)).contiguous()

    return sample(x, each(temperature, torch.float32), each(top_p, torch.float32), each(seed, torch.int64),
                  each(position, torch.int32))  # fmt: skip


# ------------------------------------------------------------------------------------- log-softmax, argmax


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
def test_log_softmax_errs_no_more_than_twice_torch(n, dtype):
    x = rows(3, n, dtype)
    reference = log_softmax_ref(x)
    theirs = relative_error(torch.log_softmax(x.float(), -1), reference) if n > 1 else 0.0
    got = log_softmax(x)
    assert got.dtype == torch.float32
    assert (got == 0).all() if n == 1 else relative_error(got, reference) <= max(2 * theirs, 1.2e-7)


@pytest.mark.parametrize("n", [256, CHUNK + 1])
def test_rows_keep_their_bits_in_any_batch(n):
    report = check_invariance(log_softmax, rows(5, n), [1, 2, 3], positions=[0, 4])
    assert report.invariant, report


@pytest.mark.parametrize("n", [256, CHUNK + 1])
def test_warps_change_no_bit(n):
    x = rows(2, n)
    assert len(distinct_results(lambda w: log_softmax(x, schedule=SoftmaxSchedule(w)), [1, 2, 4, 8])) == 1


@pytest.mark.parametrize("n", [5, CHUNK + 1])
def test_one_column_has_the_bits_of_the_whole_row(n):
    x, ids = rows(3, n), torch.tensor([0, n - 1, n // 2], device=DEVICE)
    assert same_bits(token_log_softmax(x, ids), log_softmax(x).gather(1, ids[:, None])[:, 0])


def test_special_values_are_as_in_torch():
    special = [[1, NAN, 2, NAN], [-INF] * 4, [INF, 0, INF, 1], [-0.0, 0.0, -0.0, 0.0], [-INF, 1, 2, 2],
               [-6e4, -5e4, -5e4, -INF], [-NAN, INF, 0, 0]]  # fmt: skip
    x = torch.tensor(special, device=DEVICE)
    assert torch.equal(argmax(x), x.argmax(-1))
    assert torch.allclose(log_softmax(x), torch.log_softmax(x, -1), rtol=1e-6, equal_nan=True)


def test_a_chunk_of_nothing_changes_no_number():
    """A whole chunk of -inf, first, middle or last, neither turns the row into NaN nor moves it."""
    x = rows(1, CHUNK)
    empty = torch.full_like(x, -INF)
    for parts in ([x, empty, empty], [empty, x, empty], [empty, empty, x]):
        at = next(i for i, part in enumerate(parts) if part is x)
        got = log_softmax(torch.cat(parts, 1))[:, at * CHUNK : (at + 1) * CHUNK]
        assert same_bits(got, log_softmax(x))


@pytest.mark.parametrize("n", WIDTHS)
def test_argmax_takes_the_lowest_of_equals(n):
    x = torch.zeros(3, n, device=DEVICE)
    x[1, n // 2 :] = 7
    x[2, -1] = 1
    assert argmax(x).tolist() == [0, n // 2, n - 1]
    assert argmax(x[None].expand(2, 3, n)).shape == (2, 3)


def test_strides_and_empty_batches():
    x = rows(6, 64)
    for view in (x[::2], x[:, 3:50], x.t(), x[:1].expand(3, 64)):
        assert same_bits(log_softmax(view), log_softmax(view.contiguous()))
    assert log_softmax(x[:0]).shape == (0, 64)
    assert argmax(x[:0]).shape == (0,)
    assert draw(x[:0])[0].shape == (0,)


# ---------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("n", [7, CHUNK + 1])
def test_temperature_zero_is_greedy_whatever_the_rest(n):
    x = rows(2, n)
    tokens, log_probs = draw(x, temperature=0.0, top_p=0.1, seed=5)
    assert torch.equal(tokens, argmax(x))
    assert same_bits(log_probs, token_log_softmax(x, tokens))


def test_draws_follow_the_softmax():
    count = 4000 if current_device().is_gpu else 200
    x = torch.tensor([[1.0, 2.0, 0.0, -1.0, 3.0]], device=DEVICE)
    for temperature in (1.0, 2.5):
        tokens, _ = draw(x.expand(count, 5), temperature, position=torch.arange(count))
        shares = torch.softmax(x[0].double() / temperature, -1)
        spread = (shares * (1 - shares) / count).sqrt()
        found = torch.bincount(tokens, minlength=5).double() / count
        assert ((found - shares).abs() <= 4 * spread).all(), f"{found} instead of {shares}"


def test_a_draw_depends_on_seed_and_position_alone():
    x = rows(1, 300).expand(6, 300)
    seeds, positions = torch.tensor([1, 2, 1, 2**40 + 1, 1, 2**62]), torch.tensor([5, 5, 6, 5, 5, 5])
    tokens, _ = draw(x, 5.0, seed=seeds, position=positions)
    assert tokens[0] == tokens[4]
    assert len(set(tokens.tolist())) >= 4, "other seeds (their high half too) and positions draw otherwise"
    for i in range(6):
        assert draw(x[:1], 5.0, seed=int(seeds[i]), position=int(positions[i]))[0] == tokens[i]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.5), (0.5, 0.9), (2.0, 1e-6), (1.0, 0.999)])
def test_top_p_draws_from_the_nucleus(temperature, top_p):
    x = rows(1, 40)
    tokens, _ = draw(x.expand(12, 40), temperature, top_p, position=torch.arange(12))
    kept = top_p_ref(x[0], temperature, top_p)
    assert kept[tokens].all(), "a token outside the nucleus was drawn"
    if kept.sum() > 1:
        assert len(tokens.unique()) > 1


def test_top_p_keeps_all_that_are_as_probable_as_the_last():
    x = torch.tensor([[2.0, 2.0, 2.0, 2.0, -9.0]], device=DEVICE)
    tokens, _ = draw(x.expand(24, 5), top_p=0.3, position=torch.arange(24))
    assert set(tokens.tolist()) == {0, 1, 2, 3}


def test_rows_of_nan_give_a_token_all_the_same():
    """Padding in a batch may hold anything; its token must at least be one."""
    x = torch.stack([torch.full((9,), value, device=DEVICE) for value in (NAN, INF, -INF)])
    for temperature in (0.0, 1.0):
        tokens, _ = draw(x, temperature, top_p=0.5)
        assert ((tokens >= 0) & (tokens < 9)).all()


def test_what_each_row_brings_along_may_lie_anywhere():
    x, take = rows(4, 300), torch.tensor([1, 9, 2, 9, 3, 9, 4, 9], device=DEVICE)
    for ids in (take[::2], take[1].expand(4)):
        assert same_bits(token_log_softmax(x, ids), token_log_softmax(x, ids.contiguous()))
    parameters = take / 9, take / 10, take, take.int()
    apart = [v[::2] for v in parameters]
    for got, want in zip(sample(x, *apart), sample(x, *(v.contiguous() for v in apart)), strict=True):
        assert same_bits(got, want)


# ------------------------------------------------------------------------------------------------ errors

X = torch.zeros(2, 8)
ONES, IDS, AT = torch.ones(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize("fn", [log_softmax, argmax])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X.int(), TypeError, r"x\.dtype=torch\.int32"),
        (torch.zeros(()), ValueError, r"x\.shape=\(\)"),
        (torch.zeros(2, 0), ValueError, r"x\.shape=\(2, 0\)"),
    ],
)
def test_bad_rows_are_named(fn, x, error, message):
    with pytest.raises(error, match=message):
        fn(x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, ONES.double(), ONES, IDS, AT), TypeError, "temperature.*float64"),
        ((X, ONES, ONES[:1], IDS, AT), ValueError, r"top_p\.shape=\(1,\)"),
        ((X, ONES, ONES, AT, AT), TypeError, "seed.*int32"),
        ((X, ONES, ONES, IDS, IDS), TypeError, "position.*int64"),
        ((X, ONES, ONES, IDS, AT.to("meta")), ValueError, "position.device=meta"),
    ],
)
def test_bad_sampling_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        sample(*arguments)


def test_rows_beyond_the_plan_are_refused():
    with pytest.raises(ValueError, match="n=16777217"):
        plan_softmax(CHUNK * 4096 + 1)
    with pytest.raises(ValueError, match=r"ids\.shape=\(1,\)"):
        token_log_softmax(X, IDS[:1])
