"""Log-softmax, argmax and sampling over rows as long as a vocabulary.

    log_softmax(x) = (x - max(x)) - log(sum(exp(x - max(x))))
    argmax(x)      = the lowest index that holds max(x)
    sample(x)      = argmax(x + temperature * noise),  noise = -log(-log(u))

Shapes: ``x`` is ``(M, n)``, everything runs over the last axis. Inside is fp32, and results are fp32 or int64.

A row is cut into chunks of ``SoftmaxPlan.chunk`` columns. One program reduces one chunk: its maximum, the sum of
exp(x - maximum) and its best column. Whoever needs the row's numbers then joins those of its chunks.

Why it is batch-invariant: within a chunk, and then over the chunks, the sums are the balanced trees of ``RowPlan``;
maxima round nothing, so their order is free. The best column is a maximum of integers: the number's bits, ordered,
above the column counted backwards. Noise is a function of the row's own seed, its position and the column (a
counter-based generator), and the nucleus of top-p is cut by integer sums, which no order can change.

Sources: Gumbel, "Statistical Theory of Extreme Values", 1954, for drawing by a maximum; Salmon et al., "Parallel
Random Numbers: As Easy as 1, 2, 3", 2011 (Philox); Holtzman et al., "The Curious Case of Neural Text Degeneration",
2020, for top-p; Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, for joining chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels.checks import check_float, check_shape
from kernels.launch import uncompiled
from kernels.norm import tree_sum
from kernels.plan import next_power_of_2

# -------------------------------------------------------------------------------------------------- plan

CHUNK = 4096
"""Columns that one program reduces: enough programs for one row of a vocabulary, little enough to join."""

MAX_COLUMNS = CHUNK * 4096


@dataclass(frozen=True)
class SoftmaxPlan:
    """A row of ``n`` is reduced in ``chunks`` of ``chunk`` columns, each a balanced tree; so are the chunks' sums.

    ``joined`` is the width of that last tree, a power of two.
    """

    n: int
    chunk: int
    chunks: int
    joined: int

    @property
    def tree(self) -> dict[str, int]:
        """Width and depth of a chunk's tree, as the kernels take them."""
        return {"CHUNK": self.chunk, "LEVELS": self.chunk.bit_length() - 1}

    @property
    def join(self) -> dict[str, int]:
        """Width and depth of the tree over the chunks."""
        return {"JOINED": self.joined, "JOINS": self.joined.bit_length() - 1}


@lru_cache
def plan_softmax(n: int) -> SoftmaxPlan:
    """The plan for rows of ``n`` columns.

    Raises:
        ValueError: ``n`` is below 1 or above ``MAX_COLUMNS``.
    """
    if not 1 <= n <= MAX_COLUMNS:
        raise ValueError(f"n must be between 1 and {MAX_COLUMNS}, got n={n}")
    chunk = min(CHUNK, next_power_of_2(n))
    chunks = -(-n // chunk)
    return SoftmaxPlan(n, chunk, chunks, next_power_of_2(chunks))


# ---------------------------------------------------------------------------------------------- schedule


@dataclass(frozen=True)
class SoftmaxSchedule:
    """``num_warps`` (of 32 threads) share a chunk. Changes no bit."""

    num_warps: int


@lru_cache
def choose_schedule(plan: SoftmaxPlan) -> SoftmaxSchedule:
    """16 values a thread, as in a norm."""
    return SoftmaxSchedule(num_warps=max(1, min(plan.chunk // 512, 8)))


# ----------------------------------------------------------------------------------------------- helpers


@triton.jit
def ordered(x):
    """fp32 as int32 of the same order; NaN is the largest, as in torch's argmax, and both zeros are one number."""
    x = tl.where(x == 0, 0.0, x)
    raw = x.to(tl.int32, bitcast=True)
    raw = tl.where(x != x, 0x7FC00000, raw)
    return raw ^ ((raw >> 31) & 0x7FFFFFFF)


@triton.jit
def best_of(score, cols, keep):
    """The largest ``score`` among those to ``keep``, and the lowest column that holds it, in one int64."""
    packed = (ordered(score).to(tl.int64) << 32) | (0x7FFFFFFF - cols).to(tl.int64)
    return tl.max(tl.where(keep, packed, -0x8000000000000000), axis=0)


@triton.jit
def column_of(packed):
    """The column that ``best_of`` packed."""
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@triton.jit
def chunk_stats(x, inside, CHUNK: tl.constexpr, LEVELS: tl.constexpr):
    """Maximum m of one chunk and the sum of exp(x - m); outside columns hold -inf. NaN makes the sum NaN."""
    m = tl.max(x, axis=0)
    base = tl.where(m == float("-inf"), 0.0, m)
    return m, tree_sum(tl.where(inside, tl.exp(x - base), 0.0), CHUNK, LEVELS)


@triton.jit
def row_stats(max_ptr, sum_ptr, row, n_chunks, JOINED: tl.constexpr, JOINS: tl.constexpr):
    """Maximum m of a whole row and log(sum(exp(x - m))), from those of its chunks."""
    chunks = tl.arange(0, JOINED)
    mask = chunks < n_chunks
    part_m = tl.load(max_ptr + row * n_chunks + chunks, mask=mask, other=float("-inf"))
    part_sum = tl.load(sum_ptr + row * n_chunks + chunks, mask=mask, other=0.0)
    m = tl.max(part_m, axis=0)
    base = tl.where(m == float("-inf"), 0.0, m)
    return m, tl.log(tree_sum(part_sum * tl.exp(part_m - base), JOINED, JOINS))


@triton.jit
def gumbel(seed, position, cols):
    """Standard Gumbel noise, one finite number a column, each from 32 random bits of its own."""
    zero = cols * 0
    raw, _, _, _ = tl.philox(seed, cols, zero + position, zero, zero)
    u = tl.minimum((raw.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), 1.0 - 1.0 / 16777216.0)
    # -log(1 - u): whoever wins among many draws has a small u, whose digits 1 - u would drop.
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    return -tl.log(tl.where(u < 0.01, series, -tl.log(1.0 - u)))


@triton.jit
def load_chunk(x_ptr, chunk, n_cols, CHUNK: tl.constexpr):
    """Columns of one chunk, which of them are inside the row, and their numbers in fp32 (-inf outside)."""
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = cols < n_cols
    return cols, inside, tl.load(x_ptr + cols, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def fixed_point(x, m, temperature):
    """exp((x - m) / temperature) in multiples of 2^-40: sums of such integers are exact in any order."""
    return (tl.exp((x - m) / temperature) * 1099511627776.0).to(tl.int64)


# ----------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["n_chunks"])
def _chunk_kernel(
    x_ptr,
    max_ptr,
    sum_ptr,
    best_ptr,
    threshold_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    stride_x,
    n_cols,
    n_chunks,
    STATS: tl.constexpr,
    BEST: tl.constexpr,
    SAMPLE: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    row = at // n_chunks
    cols, inside, x = load_chunk(x_ptr + row * stride_x, (at % n_chunks).to(tl.int32), n_cols, CHUNK)
    if STATS:
        m, total = chunk_stats(x, inside, CHUNK, LEVELS)
        tl.store(max_ptr + at, m)
        tl.store(sum_ptr + at, total)
    if BEST:
        keep = inside
        if SAMPLE:
            temperature = tl.load(temperature_ptr + row)
            if temperature > 0:
                keep &= ordered(x) >= tl.load(threshold_ptr + row)
                x += temperature * gumbel(tl.load(seed_ptr + row), tl.load(position_ptr + row), cols)
        tl.store(best_ptr + at, best_of(x, cols, keep))


@triton.jit(do_not_specialize=["n_chunks"])
def _log_softmax_kernel(
    x_ptr,
    max_ptr,
    sum_ptr,
    y_ptr,
    stride_x,
    n_cols,
    n_chunks,
    CHUNK: tl.constexpr,
    JOINED: tl.constexpr,
    JOINS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    row = at // n_chunks
    m, log_sum = row_stats(max_ptr, sum_ptr, row, n_chunks, JOINED, JOINS)
    cols, inside, x = load_chunk(x_ptr + row * stride_x, (at % n_chunks).to(tl.int32), n_cols, CHUNK)
    tl.store(y_ptr + row * n_cols + cols, (x - m) - log_sum, mask=inside)


@triton.jit(do_not_specialize=["n_chunks"])
def _pick_kernel(
    x_ptr,
    max_ptr,
    sum_ptr,
    best_ptr,
    ids_ptr,
    log_prob_ptr,
    stride_x,
    n_chunks,
    BEST: tl.constexpr,
    STATS: tl.constexpr,
    JOINED: tl.constexpr,
    JOINS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if BEST:
        chunks = tl.arange(0, JOINED)
        best = tl.load(best_ptr + row * n_chunks + chunks, mask=chunks < n_chunks, other=-0x8000000000000000)
        column = column_of(tl.max(best, axis=0))
        tl.store(ids_ptr + row, column)
    else:
        column = tl.load(ids_ptr + row)
    if STATS:
        m, log_sum = row_stats(max_ptr, sum_ptr, row, n_chunks, JOINED, JOINS)
        x = tl.load(x_ptr + row * stride_x + column).to(tl.float32)
        tl.store(log_prob_ptr + row, (x - m) - log_sum)


@triton.jit(do_not_specialize=["n_chunks"])
def _top_p_kernel(x_ptr, threshold_ptr, temperature_ptr, top_p_ptr, stride_x, n_cols, n_chunks, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    top_p = tl.load(top_p_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    low = tl.full((), -0x80000000, tl.int64)  # keeps every column
    if (top_p < 1) & (temperature > 0):
        m = tl.full((), float("-inf"), tl.float32)
        for chunk in range(n_chunks):
            _, _, x = load_chunk(x_ptr, chunk, n_cols, CHUNK)
            m = tl.maximum(m, tl.max(x, axis=0))
        total = tl.zeros((), dtype=tl.int64)
        for chunk in range(n_chunks):
            _, _, x = load_chunk(x_ptr, chunk, n_cols, CHUNK)
            total += tl.sum(fixed_point(x, m, temperature), axis=0)
        wanted = (total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)
        # Bisection: columns from `low` up weigh enough, columns from `high` up do not, or there are none.
        high = ordered(m).to(tl.int64) + 1
        while high - low > 1:
            middle = (low + high) >> 1
            weight = tl.zeros((), dtype=tl.int64)
            for chunk in range(n_chunks):
                _, _, x = load_chunk(x_ptr, chunk, n_cols, CHUNK)
                share = fixed_point(x, m, temperature)
                weight += tl.sum(tl.where(ordered(x).to(tl.int64) >= middle, share, 0), axis=0)
            enough = weight >= wanted
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    tl.store(threshold_ptr + row, low.to(tl.int32))


# ---------------------------------------------------------------------------------------------- launchers


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a matrix whose rows' elements lie side by side; a copy only where the strides force one."""
    check_float("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last axis to reduce over, got x.shape={tuple(x.shape)}")
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _per_row(name: str, v: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``v``, one number a row of ``x``, side by side in memory."""
    if not isinstance(v, torch.Tensor) or v.dtype != dtype:
        raise TypeError(f"{name} must be a {dtype} tensor, got {getattr(v, 'dtype', type(v).__name__)}")
    check_shape(name, v, tuple(x.shape[:1]))
    if v.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {name}.device={v.device}")
    return v.contiguous()


def _reduce_chunks(rows, plan, schedule, *, stats: bool, best: bool, threshold=None, sampling=(None, None, None)):
    """Launch ``_chunk_kernel``; the chunks' maxima, sums and best columns, ``None`` where not asked for."""
    count, device = len(rows) * plan.chunks, rows.device
    maxima, sums = (torch.empty(count, device=device) if stats else None for _ in range(2))
    found = torch.empty(count, dtype=torch.int64, device=device) if best else None
    if count:
        _chunk_kernel[(count,)](
            rows,
            maxima,
            sums,
            found,
            threshold,
            *sampling,
            rows.stride(0),
            plan.n,
            plan.chunks,
            STATS=stats,
            BEST=best,
            SAMPLE=threshold is not None,
            **plan.tree,
            num_warps=schedule.num_warps,
            enable_fp_fusion=False,
        )
    return maxima, sums, found


def _pick(rows, plan, maxima, sums, found, ids, log_probs) -> None:
    if len(rows):
        _pick_kernel[(len(rows),)](
            rows,
            maxima,
            sums,
            found,
            ids,
            log_probs,
            rows.stride(0),
            plan.chunks,
            BEST=found is not None,
            STATS=maxima is not None,
            **plan.join,
            num_warps=1,
            enable_fp_fusion=False,
        )


@uncompiled
def log_softmax(x: torch.Tensor, *, schedule: SoftmaxSchedule | None = None) -> torch.Tensor:
    """Log-softmax over the last axis, in fp32 whatever the dtype of ``x``.

    Args:
        x: ``(..., n)``, bfloat16, float16 or float32, any strides.
        schedule: how to run it; chosen from ``n`` if not given. Never changes a bit.

    Returns:
        ``(..., n)`` fp32. A row that holds NaN or +inf, or nothing but -inf, is NaN, as in torch.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: no last axis, or one that is too long.
    """
    rows = _rows(x)
    plan = plan_softmax(rows.shape[1])
    schedule = schedule or choose_schedule(plan)
    y = torch.empty(rows.shape, device=x.device)
    maxima, sums, _ = _reduce_chunks(rows, plan, schedule, stats=True, best=False)
    if len(rows):
        _log_softmax_kernel[(len(rows) * plan.chunks,)](
            rows,
            maxima,
            sums,
            y,
            rows.stride(0),
            plan.n,
            plan.chunks,
            CHUNK=plan.chunk,
            **plan.join,
            num_warps=schedule.num_warps,
            enable_fp_fusion=False,
        )
    return y.view(x.shape)


@uncompiled
def token_log_softmax(x: torch.Tensor, ids: torch.Tensor, *, schedule: SoftmaxSchedule | None = None) -> torch.Tensor:
    """``log_softmax(x)[i, ids[i]]`` for every row, with the same bits, without writing the rest.

    Args:
        x: ``(M, n)``, bfloat16, float16 or float32.
        ids: ``(M,)`` int64, columns of ``x``. Not read on the host: one outside ``[0, n)`` is the caller's bug.
        schedule: how to run it. Never changes a bit.

    Returns:
        ``(M,)`` fp32.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes or devices that do not fit.
    """
    rows = _rows(x)
    ids = _per_row("ids", ids, rows, torch.int64)
    plan = plan_softmax(rows.shape[1])
    log_probs = torch.empty(len(rows), device=x.device)
    maxima, sums, _ = _reduce_chunks(rows, plan, schedule or choose_schedule(plan), stats=True, best=False)
    _pick(rows, plan, maxima, sums, None, ids, log_probs)
    return log_probs


@uncompiled
def argmax(x: torch.Tensor, *, schedule: SoftmaxSchedule | None = None) -> torch.Tensor:
    """Column of the largest number of every row: the lowest one if several hold it, the first NaN if there is one.

    Args:
        x: ``(..., n)``, bfloat16, float16 or float32, any strides.
        schedule: how to run it. Never changes a bit.

    Returns:
        ``(...)`` int64.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: no last axis, or one that is too long.
    """
    rows = _rows(x)
    plan = plan_softmax(rows.shape[1])
    ids = torch.empty(len(rows), dtype=torch.int64, device=x.device)
    _, _, found = _reduce_chunks(rows, plan, schedule or choose_schedule(plan), stats=False, best=True)
    _pick(rows, plan, None, None, found, ids, None)
    return ids.view(x.shape[:-1])


@uncompiled
def sample(
    x: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    *,
    schedule: SoftmaxSchedule | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row, drawn from softmax(x / temperature), and its log-softmax at temperature 1.

    The same row, parameters, seed and position give the same token in any batch. Adding Gumbel noise and taking the
    largest draws from the softmax; the noise is scaled by the temperature, so that zero is greedy.

    Args:
        x: ``(M, n)`` logits, bfloat16, float16 or float32.
        temperature: ``(M,)`` fp32, at least 0, finite; 0 takes the largest logit, the lowest token that holds it.
        top_p: ``(M,)`` fp32 in (0, 1]: draw among the most probable tokens that together weigh at least this much
            (all those as probable as the last of them included).
        seed: ``(M,)`` int64, a request's own.
        position: ``(M,)`` int32, where in its sequence the token will stand.
        schedule: how to run it. Never changes a bit.

    Returns:
        tokens ``(M,)`` int64 and their log-probabilities ``(M,)`` fp32, those of ``log_softmax(x)``. Values on the
        device are not checked: that would wait for it.

    Raises:
        TypeError: a dtype that is not as above.
        ValueError: shapes or devices that do not fit.
    """
    rows = _rows(x)
    temperature = _per_row("temperature", temperature, rows, torch.float32)
    top_p = _per_row("top_p", top_p, rows, torch.float32)
    seed = _per_row("seed", seed, rows, torch.int64)
    position = _per_row("position", position, rows, torch.int32)
    plan = plan_softmax(rows.shape[1])
    schedule = schedule or choose_schedule(plan)
    threshold = torch.empty(len(rows), dtype=torch.int32, device=x.device)
    if len(rows):
        _top_p_kernel[(len(rows),)](
            rows,
            threshold,
            temperature,
            top_p,
            rows.stride(0),
            plan.n,
            plan.chunks,
            CHUNK=plan.chunk,
            num_warps=schedule.num_warps,
        )
    chunks = _reduce_chunks(
        rows, plan, schedule, stats=True, best=True, threshold=threshold, sampling=(temperature, seed, position)
    )
    ids = torch.empty(len(rows), dtype=torch.int64, device=x.device)
    log_probs = torch.empty(len(rows), device=x.device)
    _pick(rows, plan, *chunks, ids, log_probs)
    return ids, log_probs


# --------------------------------------------------------------------------------------------- references


def log_softmax_ref(x: torch.Tensor) -> torch.Tensor:
    """Log-softmax in float64, not rounded back. Shape of ``x``."""
    return torch.log_softmax(x.double(), dim=-1)


def top_p_ref(x: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Which columns of the vector ``x`` (n,) top-p keeps, by sorting in float64: bool (n,)."""
    shares = torch.softmax(x.double() / temperature, dim=-1)
    sorted_shares = shares.sort(descending=True).values
    enough = int((sorted_shares.cumsum(0) < top_p).sum().clamp(max=len(x) - 1))
    return shares >= sorted_shares[enough]
