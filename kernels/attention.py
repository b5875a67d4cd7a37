"""Attention, forward: ``out = softmax(scale * q @ k^T, masked) @ v``, for prefill, chunked prefill and decode alike.

Shapes: ``q`` and ``out`` are ``(batch, q_len, heads_q, head_dim)``, ``k`` and ``v`` are ``(batch, kv_len, heads_kv,
head_dim)``. ``heads_q`` is a multiple (``group``) of ``heads_kv``: query head ``h`` reads key head ``h // group``.
Under a causal mask the last query sits on the last key: query ``i`` has position ``kv_len - q_len + i`` and sees the
keys up to there; under a window of ``w``, the last ``w`` of those. Scores, softmax and sums are fp32; weights are
rounded to the dtype of ``v`` before they meet it, and the result once, to the dtype of ``q``.

What is computed for a query row, in the order that ``AttentionPlan`` fixes: its state is the running maximum ``m``
(of the scaled scores, in powers of two), ``sums`` (eight partial sums of weights) and ``acc`` (the weighted values).
Every chunk of keys starts with ``m = -inf, sums = 0, acc = 0``. A block of keys in it does

    s     = q k^T, -inf where the mask hides the key
    m_new = max(m, max(s) * scale_log2)                       scale_log2 = scale * log2(e)
    base  = 0 if m_new == -inf else m_new
    p     = exp2(fma(s, scale_log2, -base))
    alpha = exp2(m - base)
    sums  = fma(sums, alpha, fold(p));  acc = acc * alpha + p v;  m = m_new

and a finished chunk is merged into the total of the chunks to its left, which starts out as nothing too:

    m_new   = max(m_t, m);  base as above;  a = exp2(m_t - base);  b = exp2(m - base)
    sums_t  = fma(sums, b, sums_t * a);  acc_t = fma(acc, b, acc_t * a);  m_t = m_new

At the end the partial sums are folded to one, ``L``, and ``out = acc_t * (1 / L)``; 0 where ``L`` is 0. So a row that
sees no key is 0, and its log-sum-exp -inf.

Why it is batch-invariant: blocks and chunks are counted from position 0 of the row's own sequence, and the order
above knows nothing else. A block that is wholly masked for a row changes no bit of it (``p = 0, alpha = 1``), nor
does such a chunk (``a = 1, b = 0``), but that a -0.0 may become +0.0, which adding +0.0 to the result settles; so a
schedule may visit it or not. Free as well: how many rows share a tile and which, how the heads of a group are packed,
warps, instruction, operand order (``s^T = k q^T``), chunks one after another or side by side, where a page lies.

Values that are infinite or NaN stay in the rows that see them, with one exception, as in PyTorch: a key that some
rows of a tile see and others do not (a later token of the same sequence) weighs 0 in the others, and 0 times an
infinite value is NaN. It never leaves the sequence.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023, for
the tiling; Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels.checks import check_apart, check_dense, check_float, check_like, check_shape
from kernels.launch import finished_counters, launch, remembers, scratch, wait_for_previous_launch
from kernels.matmul import has_wgmma, sm_count
from kernels.plan import AttentionPlan, plan_attention

# ---------------------------------------------------------------------------------------------- schedule


@dataclass(frozen=True)
class AttentionSchedule:
    """How the work is laid out on the GPU. No field changes a bit of the result.

    block_m: rows of a query tile. The heads of a group share keys, so they are packed: row ``r`` is head
        ``r % group`` of token ``r // group``.
    num_warps, num_stages: warps per program; depth of the load pipeline.
    split: chunks side by side, each by a program of its own; the last one to finish merges them, in the plan's
        order. Otherwise one program takes the chunks of its tile in turn.
    swap: compute the transposed products, with the keys as left operand, so that the tensor core's long side (64 on
        Hopper) runs along keys and its short side (8 and up) along the few query rows.
    specialised: Hopper's kernels (``kernels/attention_hopper.py``). With ``swap`` the one for decoding, whose tiles
        have all query heads that share a key head, for as many tokens as ``block_m`` rows hold. Otherwise the one for
        prefill.
    span: keys of a tile that one program takes at a time in the kernel for decoding, a multiple of the plan's
        ``chunk``. With ``early_chunk`` it takes a single chunk, early or not.
    """

    block_m: int
    num_warps: int
    num_stages: int
    split: bool = False
    swap: bool = False
    specialised: bool = False
    span: int | None = None

    def tokens(self, q_len: int, group: int) -> int:
        """Queries of a sequence in a tile of the kernel for decoding, each with its ``group`` heads."""
        return min(self.block_m // group, q_len)

    def query_tiles(self, q_len: int, group: int) -> int:
        """Tiles into which that kernel cuts the queries of a sequence."""
        return triton.cdiv(q_len, self.tokens(q_len, group))

    def fits(self, group: int, plan: AttentionPlan) -> bool:
        """Whether the kernel for decoding has this schedule for ``group`` query heads that share a key head."""
        if not (self.span and group <= self.block_m <= 64):
            return False
        whole = self.span % plan.chunk == 0 and self.block_m <= MOST_MERGING_ROWS
        return whole or self.span == plan.early_chunk


MOST_PARTIAL_ROWS = 1 << 20
"""Query rows times chunks that are put by side by side: half a gigabyte where heads have 128 elements."""

MOST_MERGING_ROWS = 32
"""Rows of a decoding tile that leave a thread registers for a chunk's sums and those of the chunks before."""

JOB_KEYS = 192
"""What starting and ending a job costs, in keys that could be read meanwhile (seen on an H200)."""

DECODE_COST = {16: 1.0, 32: 1.6, 64: 6.0}
"""Rows of a decoding tile, and what a key costs it, in keys of the lowest one (seen on an H200: 64 rows spill)."""
MERGE_KEYS = 4
"""What it costs to merge a chunk of one row, in the same keys."""
PREFILL_COST, PREFILL_KEYS, PREFILL_ROWS = 1.7, 250, 128
"""The same of a tile for prefill, and what starting and ending it costs, in keys; and its rows, all of one head."""
MOST_DECODE_TOKENS = 128
"""Most queries of a sequence for which the kernel for decoding is considered."""

MOST_UNKNOWN_SPAN = 4096
"""Longest span where sequences may have any length: with longer ones SMs wait for whichever got a long sequence."""


def choose_span(tiles: int, max_kv: int, plan: AttentionPlan, sms: int, ragged: bool) -> int:
    """Keys of a tile that a program should take at a time.

    Jobs are dealt out in rounds, a job to every SM. Long ones have fewer starts and ends and leave less to merge, but
    the last round should be full. Where only the longest sequence is known (``ragged``), half its length counts as
    much.
    """
    spans = [plan.early_chunk]
    while spans[-1] < (min(max_kv, MOST_UNKNOWN_SPAN) if ragged else max_kv):
        spans.append(max(2 * spans[-1], plan.chunk))
    return min(spans, key=lambda span: (_keys_in_turn(tiles, span, max_kv, plan, sms, ragged), -span))


def _keys_in_turn(tiles: int, span: int, max_kv: int, plan: AttentionPlan, sms: int, ragged: bool) -> int:
    """Keys that the busiest SM visits one after the other, starts and ends of jobs included."""
    keys = 0
    for length in _likely_lengths(max_kv, ragged):
        fine = span == plan.early_chunk
        jobs = tiles * (plan.chunks(length) if fine else triton.cdiv(length, span))
        longest = plan.chunk if fine and length > plan.early else min(span, length)
        keys += triton.cdiv(jobs, sms) * (longest + JOB_KEYS)
    return keys


def _likely_lengths(max_kv: int, ragged: bool) -> tuple[int, ...]:
    """The lengths of sequences that a schedule is judged by."""
    return (max_kv, triton.cdiv(max_kv, 2)) if ragged else (max_kv,)


def _choose_hopper(
    q_len: int, batch: int, heads_kv: int, group: int, max_kv: int, plan: AttentionPlan, sms: int, ragged: bool
) -> AttentionSchedule:
    """Of Hopper's kernels, the one for prefill or a tile of the one for decoding: whichever needs the least time.

    A key costs a low tile little time; with high tiles, and the prefill's, each SM visits fewer keys in all.
    """
    found = []
    if q_len > 1 or group > max(DECODE_COST):
        tiles = batch * heads_kv * group * triton.cdiv(q_len, PREFILL_ROWS)
        keys = sum(triton.cdiv(tiles, sms) * (length + PREFILL_KEYS) for length in _likely_lengths(max_kv, ragged))
        found.append((keys * PREFILL_COST, AttentionSchedule(PREFILL_ROWS, 8, 2, specialised=True)))
    highest = max(16, triton.next_power_of_2(q_len * group)) if q_len <= MOST_DECODE_TOKENS else 0
    for block_m in (rows for rows in DECODE_COST if group <= rows <= highest):
        schedule = AttentionSchedule(block_m, 4, 2, swap=True, specialised=True)
        tiles = batch * heads_kv * schedule.query_tiles(q_len, group)
        merging = block_m <= MOST_MERGING_ROWS
        span = choose_span(tiles, max_kv, plan, sms, ragged) if merging else plan.early_chunk
        put_by = block_m * plan.chunks(max_kv) if span < max_kv else 0
        if q_len == 1 or tiles * put_by <= MOST_PARTIAL_ROWS:
            keys = _keys_in_turn(tiles, span, max_kv, plan, sms, ragged)
            found.append((keys * DECODE_COST[block_m] + put_by * MERGE_KEYS, replace(schedule, span=span)))
    return min(found, key=lambda each: each[0])[1]


def choose_schedule(
    q_len: int,
    batch: int,
    heads_kv: int,
    group: int,
    max_kv: int,
    plan: AttentionPlan,
    sms: int,
    shared: int = 227 * 1024,
    specialised: bool = False,
    ragged: bool = False,
) -> AttentionSchedule:
    """The schedule for ``batch`` sequences of up to ``q_len`` queries that see up to ``max_kv`` keys.

    With few query rows the keys' bytes are the cost: thin tiles with the keys on the left. Chunks go side by side
    where the tiles alone would leave SMs idle and what the chunks put by does not take too much memory.

    Args:
        shared: bytes of shared memory that a program can have: 227 KB on Hopper, 163 KB on Ampere's A100, 99 KB on
            consumer GPUs, 64 KB on AMD's. A stage takes 32 KB for keys and 32 KB for values.
        specialised: whether Hopper's kernels can take the operands.
        ragged: whether sequences may have fewer keys than ``max_kv``.
    """
    rows, wide = q_len * group, plan.head_dim > 128
    thin = max(16, triton.next_power_of_2(rows))
    if specialised:
        return _choose_hopper(q_len, batch, heads_kv, group, max_kv, plan, sms, ragged)
    if shared < 99 * 1024:
        schedule = AttentionSchedule(16, 4, 1, swap=True)  # with more rows or warps registers spill on AMD's CDNA3
        if rows > 32 and plan.head_dim <= 64:
            schedule = AttentionSchedule(64, 4, 1)
    elif rows <= 32:
        schedule = AttentionSchedule(thin, 4, 3 if rows <= 16 and shared >= 227 * 1024 else 2, swap=True)
    elif wide:
        schedule = AttentionSchedule(64, 8, 2 if shared >= 163 * 1024 else 1)
    else:
        schedule = AttentionSchedule(64, 4, 2) if rows <= 64 else AttentionSchedule(128, 8, 2)
    tiles = batch * heads_kv * triton.cdiv(rows, schedule.block_m)
    partial_rows = batch * heads_kv * rows * plan.chunks(max_kv)
    split = plan.chunks(max_kv) > 1 and tiles < (4 if rows <= 32 else 1) * sms and partial_rows <= MOST_PARTIAL_ROWS
    return replace(schedule, split=split)


# ----------------------------------------------------------------------------------------------- helpers


@triton.jit
def column(x, SWAP: tl.constexpr):
    """A number per query row, laid against a tile whose rows (columns if SWAP) are query rows."""
    if SWAP:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def fold(x, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, FOLDS: tl.constexpr, SWAP: tl.constexpr):
    """Fold the WIDTH numbers of each query row in half, FOLDS times.

    A sum over an axis of two is one addition, so neither layout nor warps can reorder it.
    """
    for level in tl.static_range(FOLDS):
        if SWAP:
            x = tl.sum(tl.reshape(x, [2, WIDTH >> (level + 1), BLOCK_M]), axis=0)
        else:
            x = tl.sum(tl.reshape(x, [BLOCK_M, 2, WIDTH >> (level + 1)]), axis=1)
    return x


@triton.jit
def nothing(BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, LANES: tl.constexpr, SWAP: tl.constexpr):
    """State of query rows that have met no key: maximum, partial sums of weights, weighted values."""
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    if SWAP:
        sums = tl.zeros([LANES, BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([HEAD_DIM, BLOCK_M], dtype=tl.float32)
    else:
        sums = tl.zeros([BLOCK_M, LANES], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    return m, sums, acc


@triton.jit
def attend(
    m,
    sums,
    acc,
    s,
    v,
    scale_log2,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLDS: tl.constexpr,
    SWAP: tl.constexpr,
):
    """State after one more block of keys, with masked scores ``s`` and values ``v`` (BLOCK, HEAD_DIM)."""
    m_new = tl.maximum(m, tl.max(s, 0 if SWAP else 1) * scale_log2)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(tl.fma(s, scale_log2, column(-base, SWAP)))
    alpha = column(tl.exp2(m - base), SWAP)
    sums = tl.fma(sums, alpha, fold(p, BLOCK_M, BLOCK, FOLDS, SWAP))
    if SWAP:
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * alpha)
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * alpha)
    return m_new, sums, acc


@triton.jit
def merge(m_total, sums_total, acc_total, m, sums, acc, SWAP: tl.constexpr):
    """Total of the chunks so far, and of one more to their right."""
    m_new = tl.maximum(m_total, m)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    a = column(tl.exp2(m_total - base), SWAP)
    b = column(tl.exp2(m - base), SWAP)
    return m_new, tl.fma(sums, b, sums_total * a), tl.fma(acc, b, acc_total * a)


@triton.jit
def chunk_of(position, CHUNK: tl.constexpr, EARLY_CHUNK: tl.constexpr, EARLY: tl.constexpr):
    """The chunk that holds a key, as ``AttentionPlan.chunk_of``."""
    return min(position, EARLY) // EARLY_CHUNK + max(position - EARLY, 0) // CHUNK


@triton.jit
def start_of(chunk, CHUNK: tl.constexpr, EARLY_CHUNK: tl.constexpr, EARLY: tl.constexpr):
    """The first key of a chunk, as ``AttentionPlan.start_of``."""
    return min(chunk, EARLY // EARLY_CHUNK) * EARLY_CHUNK + max(chunk - EARLY // EARLY_CHUNK, 0) * CHUNK


@triton.jit
def take_blocks(
    m,
    sums,
    acc,
    m_total,
    sums_total,
    acc_total,
    q,
    k_ptr,
    v_ptr,
    page_table_ptr,
    position,
    first,
    last,
    low,
    high,
    kv_len,
    window,
    scale_log2,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PAGED: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY_CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    FOLDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """State after the blocks of keys from ``first`` to before ``last``; unless SPLIT, finished chunks are merged."""
    keys = tl.arange(0, BLOCK)
    dims = tl.arange(0, HEAD_DIM)
    for at in range(first, last, BLOCK):
        # What no row of the tile sees is not read: its page may be another sequence's, its bytes NaN.
        readable = (at + keys >= low) & (at + keys < high)
        if PAGED:
            if MASKED:
                page = tl.load(page_table_ptr + (at + keys) // PAGE_SIZE, mask=readable, other=0).to(tl.int64)
            else:
                page = tl.load(page_table_ptr + (at + keys) // PAGE_SIZE).to(tl.int64)
            in_page = ((at + keys) % PAGE_SIZE).to(tl.int64)
            k_rows = k_ptr + page * stride_kb + in_page * stride_kt
            v_rows = v_ptr + page * stride_vb + in_page * stride_vt
        else:
            k_rows = k_ptr + (at + keys).to(tl.int64) * stride_kt
            v_rows = v_ptr + (at + keys).to(tl.int64) * stride_vt
        if MASKED:
            k = tl.load(k_rows[:, None] + dims[None, :], mask=readable[:, None], other=0.0)
            v = tl.load(v_rows[:, None] + dims[None, :], mask=readable[:, None], other=0.0)
        else:
            k = tl.load(k_rows[:, None] + dims[None, :])
            v = tl.load(v_rows[:, None] + dims[None, :])
        if SWAP:
            s = tl.dot(k, tl.trans(q))
        else:
            s = tl.dot(q, tl.trans(k))
        if MASKED:
            key = column(at + keys, not SWAP)
            visible = key < kv_len
            if CAUSAL:
                visible = visible & (key <= column(position, SWAP))
            if HAS_WINDOW:
                visible = visible & (key > column(position - window, SWAP))
            s = tl.where(visible, s, float("-inf"))
        m, sums, acc = attend(m, sums, acc, s, v, scale_log2, BLOCK_M, BLOCK, FOLDS, SWAP)
        end = at + BLOCK
        if not SPLIT and ((end % CHUNK == 0) | ((end <= EARLY) & (end % EARLY_CHUNK == 0))):
            m_total, sums_total, acc_total = merge(m_total, sums_total, acc_total, m, sums, acc, SWAP)
            m, sums, acc = nothing(BLOCK_M, HEAD_DIM, LANES, SWAP)
    return m, sums, acc, m_total, sums_total, acc_total


@triton.jit
def finish(m, sums, acc, BLOCK_M: tl.constexpr, LANES: tl.constexpr, LANE_FOLDS: tl.constexpr, SWAP: tl.constexpr):
    """Rows of the output (transposed if SWAP), and their log-sum-exp."""
    total = tl.reshape(fold(sums, BLOCK_M, LANES, LANE_FOLDS, SWAP), [BLOCK_M])
    out = tl.where(column(total == 0.0, SWAP), 0.0, acc * column(1.0 / total, SWAP)) + 0.0
    lse = tl.where(total == 0.0, float("-inf"), (m + tl.log2(total)) * 0.6931471805599453)  # ln 2
    return out, lse


# ------------------------------------------------------------------------------------------------ kernel


SIZES = ["batch", "heads_kv", "group", "tiles", "slots", "q_len", "kv_len", "window", "part_rows"]
"""Integers of a launch that follow the batch: one compiled kernel serves them all."""


@triton.jit(do_not_specialize=[*SIZES, "stride_lb", "stride_lh", "stride_pb"])
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    kv_lens_ptr,
    page_table_ptr,
    part_m_ptr,
    part_sums_ptr,
    part_acc_ptr,
    done_ptr,
    batch,
    heads_kv,
    group,
    tiles,
    slots,
    q_len,
    kv_len,
    window,
    part_rows,
    scale_log2,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_lb,
    stride_lh,
    stride_pb,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_LENS: tl.constexpr,
    VARLEN: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_LSE: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY_CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    FOLDS: tl.constexpr,
    LANE_FOLDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNROLL: tl.constexpr,
):
    wait_for_previous_launch()
    # Chunks of a tile are neighbours; last tiles come first, because under a causal mask they have most to do.
    pid = tl.program_id(0)
    slot = pid % slots
    tile_id = pid // slots
    head = tile_id % heads_kv
    sequence = tile_id // heads_kv % batch
    tile = tiles - 1 - tile_id // heads_kv // batch

    first_q = 0
    if VARLEN:
        first_q = tl.load(cu_q_ptr + sequence)
        q_len = tl.load(cu_q_ptr + sequence + 1) - first_q
    if tile * BLOCK_M >= q_len * group:
        return  # beyond this sequence: a grid is sized for the longest one, a captured one for the largest batch
    first_k = 0
    if HAS_LENS:
        kv_len = max(min(tl.load(kv_lens_ptr + sequence), kv_len), 0)
    elif VARLEN:
        first_k = tl.load(cu_k_ptr + sequence)
        kv_len = max(min(tl.load(cu_k_ptr + sequence + 1) - first_k, kv_len), 0)

    # Keys that any row of the tile sees are [low, high); all rows see those of [all_from, all_to).
    first_token = tile * BLOCK_M // group
    last_token = min(((tile + 1) * BLOCK_M - 1) // group, q_len - 1)
    low = 0
    high = kv_len
    all_from = 0
    all_to = kv_len
    if CAUSAL:
        high = max(min(kv_len, kv_len - q_len + last_token + 1), 0)
        all_to = min(kv_len, kv_len - q_len + first_token + 1)
    if HAS_WINDOW:
        low = max(kv_len - q_len + first_token - window + 1, 0)
        all_from = kv_len - q_len + last_token - window + 1
    start = low // BLOCK * BLOCK
    end = high
    first_chunk = chunk_of(low, CHUNK, EARLY_CHUNK, EARLY)
    chunks = max(chunk_of(max(high, 1) - 1, CHUNK, EARLY_CHUNK, EARLY) + 1 - first_chunk, 1)
    if SPLIT:
        if slot >= chunks:
            return
        start = max(start, start_of(first_chunk + slot, CHUNK, EARLY_CHUNK, EARLY))
        end = min(high, start_of(first_chunk + slot + 1, CHUNK, EARLY_CHUNK, EARLY))

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    token = (tile * BLOCK_M + rows) // group
    head_q = head * group + (tile * BLOCK_M + rows) % group
    inside = token < q_len
    position = kv_len - q_len + token
    if VARLEN:
        token += first_q
    else:
        q_ptr += sequence.to(tl.int64) * stride_qb
        out_ptr += sequence.to(tl.int64) * stride_ob
        if HAS_LSE:
            lse_ptr += sequence.to(tl.int64) * stride_lb
    token = token.to(tl.int64)
    head_q = head_q.to(tl.int64)
    q_ptrs = q_ptr + (token * stride_qt + head_q * stride_qh)[:, None] + dims[None, :]
    q = tl.load(q_ptrs, mask=inside[:, None], other=0.0)

    k_ptr += head.to(tl.int64) * stride_kh
    v_ptr += head.to(tl.int64) * stride_vh
    if PAGED:
        page_table_ptr += sequence.to(tl.int64) * stride_pb
    elif VARLEN:
        k_ptr += first_k.to(tl.int64) * stride_kt
        v_ptr += first_k.to(tl.int64) * stride_vt
    else:
        k_ptr += sequence.to(tl.int64) * stride_kb
        v_ptr += sequence.to(tl.int64) * stride_vb

    # Blocks that a mask cuts lie at both ends; those between are seen whole by every row, and need no mask.
    whole = start
    if HAS_WINDOW:
        whole = max(start, tl.cdiv(max(all_from, 0), BLOCK) * BLOCK)
    whole_end = max(whole, min(max(all_to, 0) // BLOCK * BLOCK, end))
    m, sums, acc = nothing(BLOCK_M, HEAD_DIM, LANES, SWAP)
    m_total, sums_total, acc_total = nothing(BLOCK_M, HEAD_DIM, LANES, SWAP)
    # fmt: off
    for part in tl.static_range(0 if HAS_WINDOW else 1, 3):
        if part == 0:
            first, last = start, min(whole, end)
        elif part == 1:
            first, last = whole, whole_end
        else:
            first, last = whole_end, end
        m, sums, acc, m_total, sums_total, acc_total = take_blocks(
            m, sums, acc, m_total, sums_total, acc_total,
            q, k_ptr, v_ptr, page_table_ptr, position, first, last, low, high, kv_len, window, scale_log2,
            stride_kb, stride_kt, stride_vb, stride_vt,
            part != 1, CAUSAL, HAS_WINDOW, PAGED, SPLIT, SWAP,
            PAGE_SIZE, HEAD_DIM, CHUNK, EARLY_CHUNK, EARLY, BLOCK, LANES, FOLDS, BLOCK_M,
        )
    # fmt: on
    if SPLIT:
        if SWAP:
            sums = tl.trans(sums)
            acc = tl.trans(acc)
        lanes = tl.arange(0, LANES)
        first_part = tile_id.to(tl.int64) * slots
        kept = rows < part_rows
        part_rows_of = (first_part + slot) * part_rows + rows
        tl.store(part_m_ptr + part_rows_of, m, mask=kept)
        tl.store(part_sums_ptr + part_rows_of[:, None] * LANES + lanes[None, :], sums, mask=kept[:, None])
        tl.store(part_acc_ptr + part_rows_of[:, None] * HEAD_DIM + dims[None, :], acc, mask=kept[:, None])
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(done_ptr + tile_id, 1, sem="acq_rel") < chunks - 1:
            return
        # Whoever comes last finds all chunks there. Past L1, which may hold what lay there before.
        m, sums, acc = nothing(BLOCK_M, HEAD_DIM, LANES, False)
        for first in range(0, chunks, UNROLL):
            for step in tl.static_range(UNROLL):
                found = kept & (first + step < chunks)
                part_rows_of = (first_part + first + step) * part_rows + rows
                m_part = tl.load(part_m_ptr + part_rows_of, mask=found, other=float("-inf"), cache_modifier=".cg")
                sums_ptrs = part_sums_ptr + part_rows_of[:, None] * LANES + lanes[None, :]
                sums_part = tl.load(sums_ptrs, mask=found[:, None], other=0.0, cache_modifier=".cg")
                acc_ptrs = part_acc_ptr + part_rows_of[:, None] * HEAD_DIM + dims[None, :]
                acc_part = tl.load(acc_ptrs, mask=found[:, None], other=0.0, cache_modifier=".cg")
                m, sums, acc = merge(m, sums, acc, m_part, sums_part, acc_part, False)
        tl.store(done_ptr + tile_id, 0)  # as the next launch wants to find it
    else:
        m, sums, acc = merge(m_total, sums_total, acc_total, m, sums, acc, SWAP)
    out, lse = finish(m, sums, acc, BLOCK_M, LANES, LANE_FOLDS, SWAP and not SPLIT)
    if SWAP and not SPLIT:
        out = tl.trans(out)
    out_ptrs = out_ptr + (token * stride_ot + head_q * stride_oh)[:, None] + dims[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    if HAS_LSE:
        tl.store(lse_ptr + head_q * stride_lh + token, lse, mask=inside)


# ---------------------------------------------------------------------------------------------- launchers


@dataclass(frozen=True)
class AttentionCall:
    """The operands of one launch, through whichever interface they came. Packed sequences form a tensor of batch 1.

    q, out: ``(batch or 1, tokens, heads_q, head_dim)``.
    k, v: ``(batch or 1, tokens, heads_kv, head_dim)`` or, paged, ``(pages, page_size, heads_kv, head_dim)``.
    lse: ``(batch or 1, heads_q, tokens)`` fp32, or ``None``.
    window: ``None`` where it hides nothing.
    batch, q_len, kv_len: number of sequences, and most queries and keys that one of them can have.
    cu_q, cu_k: where each sequence starts among packed tokens, ``(batch + 1,)``, or ``None`` where none are packed.
    kv_lens: keys of each sequence, ``(batch,)``, or ``None``: ``cu_k`` says, or ``kv_len`` is the length of all.
    page_table: ``(batch, max_pages)`` or ``None``.
    kv_range: fewest and most keys of a sequence, or ``None`` where the host does not know.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    causal: bool
    window: int | None
    scale_log2: float
    batch: int
    q_len: int
    kv_len: int
    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None
    kv_lens: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    kv_range: tuple[int, int] | None = None

    @property
    def heads_kv(self) -> int:
        """Key heads."""
        return self.k.shape[2]

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[2] // self.heads_kv


@lru_cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program can have on ``device``; an H200's for the CPU, where nothing limits it."""
    if device.type != "cuda":
        return 227 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _scale_log2(scale: float | None, head_dim: int) -> float:
    """``scale * log2(e)``, checked where it has become a float32."""
    if scale is None:
        scale = head_dim**-0.5
    scale_log2 = scale * math.log2(math.e)
    if not torch.finfo(torch.float32).tiny <= scale_log2 <= torch.finfo(torch.float32).max:
        raise ValueError(f"scale must be positive, finite and a normal float32, got scale={scale}")
    return scale_log2


def _check_whole(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {name}={value!r}")


def _found(x: object) -> str:
    """What was given where a tensor of some shape was wanted: its shape, or its type."""
    return f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__


def _window(window: int | None, causal: bool, kv_len: int) -> int | None:
    """``window`` checked; ``None`` where it reaches past every key."""
    if window is None:
        return None
    _check_whole("window", window)
    if window < 1:
        raise ValueError(f"window must be at least 1, got window={window}")
    if not causal:
        raise ValueError(f"window={window} needs causal=True")
    return window if window < kv_len else None


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_name: str, v_name: str, q_ndim: int) -> None:
    """dtypes, devices, ranks and head sizes of ``q`` and of keys and values called ``k_name`` and ``v_name``."""
    check_float("q", q)
    if q.dtype == torch.float32:
        raise TypeError(f"q must be bfloat16 or float16, got q.dtype={q.dtype}")
    if q.ndim != q_ndim:
        raise ValueError(f"q must have {q_ndim} axes, got q.shape={tuple(q.shape)}")
    for name, x in ((k_name, k), (v_name, v)):
        check_like(name, x, "q", q)
    if k.ndim != (q_ndim if k_name == "k" else 4):
        raise ValueError(
            f"{k_name} must have {q_ndim if k_name == 'k' else 4} axes, got {k_name}.shape={tuple(k.shape)}"
        )
    check_shape(v_name, v, k.shape)
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has head_dim={q.shape[-1]}, {k_name} has head_dim={k.shape[-1]}: they must be equal")
    if not 0 < k.shape[-2] <= q.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"heads_q must be a multiple of heads_kv, got heads_q={q.shape[-2]} and heads_kv={k.shape[-2]}"
        )
    for name, x in (("q", q), (k_name, k), (v_name, v)):
        if x.numel() and x.stride(-1) != 1:
            raise ValueError(
                f"the elements of a head of {name} must lie side by side, got {name}.stride()={x.stride()}"
            )


def _check_index(name: str, x: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """``x`` is int32 of this shape on this device, its last axis dense."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {name}.dtype={x.dtype}")
    check_shape(name, x, shape)
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like q, got {name}.device={x.device}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"the elements of {name} must lie side by side, got {name}.stride()={x.stride()}")


def _output(q: torch.Tensor, out: torch.Tensor | None, **others: torch.Tensor) -> torch.Tensor:
    """``out``, checked, or a new tensor; ``others`` are keys and values by their names."""
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check_like("out", out, "q", q)
    check_shape("out", out, q.shape)
    if out.numel() and out.stride(-1) != 1:
        raise ValueError(f"the elements of a head of out must lie side by side, got out.stride()={out.stride()}")
    check_dense("out", out)
    check_apart(out, q=q, **others)
    return out


def _span(x: torch.Tensor) -> torch.Tensor:
    """Smallest and largest element."""
    return torch.stack(x.aminmax()).long()


def _check_lengths(name: str, shortest: int, longest: int, most: int) -> None:
    if shortest < 0 or longest > most:
        wrong = shortest if shortest < 0 else longest
        raise ValueError(f"{name} must be between 0 and {most}, the keys there is room for; one of them is {wrong}")


def _starts(cu: torch.Tensor) -> torch.Tensor:
    """First and last start of packed sequences, shortest and longest length."""
    cu = cu.long()
    return torch.cat((cu[[0, -1]], _span(cu.diff())))


def _check_starts(
    name: str, first: int, last: int, shortest: int, longest: int, tokens: int, most_name: str, most: int
) -> None:
    if shortest < 0:
        raise ValueError(f"{name} must not decrease, but one sequence has length {shortest}")
    if first < 0 or last > tokens:
        raise ValueError(f"{name} must lie within the {tokens} tokens there are, but runs from {first} to {last}")
    if longest > most:
        raise ValueError(f"{most_name}={most} is below the longest sequence of {name}, {longest}")


@remembers
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    kv_lens: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    schedule: AttentionSchedule | None = None,
    validate: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch of sequences, every one with ``q_len`` queries.

    Args:
        q: ``(batch, q_len, heads_q, head_dim)``, bfloat16 or float16, ``head_dim`` 64, 128 or 256, the elements of a
            head side by side, any strides otherwise (torch's ``(batch, heads, length, head_dim)`` transposed).
        k, v: ``(batch, kv_len, heads_kv, head_dim)``, dtype of ``q``, ``heads_q`` a multiple of ``heads_kv``.
        causal: hide keys behind a query's own position, which is ``kv_len - q_len + i``. Queries before position 0
            see nothing.
        window: with ``causal``, the last so many keys a query sees, its own among them; ``None`` for all.
        scale: of the scores; ``head_dim ** -0.5`` if not given.
        kv_lens: int32 ``(batch,)``, the keys that each sequence has of the ``kv_len`` in memory; all if not given.
        return_lse: also return the log-sum-exp of the scaled scores.
        out: shape and dtype of ``q`` to write into.
        schedule: how to run it; chosen from the sizes and the GPU if not given. Never changes a bit.
        validate: look at ``kv_lens``, which costs a synchronisation; never done while a CUDA graph is captured.
            Lengths beyond ``kv_len`` that nobody looked at are cut to it.

    Returns:
        ``out``, or ``(out, lse)`` with ``lse`` fp32 ``(batch, heads_q, q_len)``, natural logarithm.

    Raises:
        TypeError: a dtype that is not supported or not that of ``q``.
        ValueError: sizes, strides or devices that do not fit, a ``scale`` or ``window`` out of range, lengths beyond
            ``kv_len``, a schedule that this GPU or these operands rule out, ``out`` that shares memory with an input.
    """
    _check_heads(q, k, v, "k", "v", 4)
    plan = plan_attention(q.shape[-1], q.element_size())
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have the batch of q, got q.shape={tuple(q.shape)} and k.shape={tuple(k.shape)}")
    (batch, q_len, heads_q), kv_len = q.shape[:3], k.shape[1]
    scale_log2, window = _scale_log2(scale, plan.head_dim), _window(window, causal, kv_len)
    if kv_lens is not None:
        _check_index("kv_lens", kv_lens, (batch,), q.device)
        if validate and batch and not _capturing():
            _check_lengths("kv_lens", *_span(kv_lens).tolist(), kv_len)
    out = _output(q, out, k=k, v=v)
    lse = torch.empty((batch, heads_q, q_len), dtype=torch.float32, device=q.device) if return_lse else None
    sizes = {"batch": batch, "q_len": q_len, "kv_len": kv_len}
    _launch(AttentionCall(q, k, v, out, lse, causal, window, scale_log2, **sizes, kv_lens=kv_lens), plan, schedule)
    return out if lse is None else (out, lse)


@remembers
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    schedule: AttentionSchedule | None = None,
    validate: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of sequences of any lengths, packed one after another. Each has the bits it has alone.

    Args:
        q: ``(tokens_q, heads_q, head_dim)``. Tokens that no sequence covers stay as they are in ``out``.
        k, v: ``(tokens_k, heads_kv, head_dim)``.
        cu_q, cu_k: int32 ``(batch + 1,)``: queries and keys of sequence ``i`` are those from ``cu[i]`` to before
            ``cu[i + 1]``.
        max_q, max_k: at least the longest of them. They size the launch: a CUDA graph serves all lengths up to them.
        validate: look at ``cu_q`` and ``cu_k``, which costs a synchronisation; never done while a graph is captured.
        causal, window, scale, return_lse, out, schedule: as for ``attention``, which also says what is raised.

    Returns:
        ``out``, or ``(out, lse)`` with ``lse`` fp32 ``(heads_q, tokens_q)``.
    """
    _check_heads(q, k, v, "k", "v", 3)
    plan = plan_attention(q.shape[-1], q.element_size())
    batch = _check_cu("cu_q", cu_q, q.device)
    _check_index("cu_k", cu_k, (batch + 1,), q.device)
    _check_most("max_q", max_q)
    _check_most("max_k", max_k)
    scale_log2, window = _scale_log2(scale, plan.head_dim), _window(window, causal, max_k)
    if validate and batch and not _capturing():
        found = torch.cat((_starts(cu_q), _starts(cu_k))).tolist()
        _check_starts("cu_q", *found[:4], q.shape[0], "max_q", max_q)
        _check_starts("cu_k", *found[4:], k.shape[0], "max_k", max_k)
    out = _output(q, out, k=k, v=v)
    lse = torch.empty(q.shape[1::-1], dtype=torch.float32, device=q.device) if return_lse else None
    tensors = [None if x is None else x[None] for x in (q, k, v, out, lse)]
    sizes = {"batch": batch, "q_len": max_q, "kv_len": max_k}
    _launch(AttentionCall(*tensors, causal, window, scale_log2, **sizes, cu_q=cu_q, cu_k=cu_k), plan, schedule)
    return out if lse is None else (out, lse)


@remembers
def attention_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    max_q: int,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    kv_range: tuple[int, int] | None = None,
    out: torch.Tensor | None = None,
    schedule: AttentionSchedule | None = None,
    validate: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over a paged cache: prefill, chunked prefill and decode, mixed as they come.

    One token a sequence is ``cu_q = arange(batch + 1), max_q = 1``. Entries of the page table that no visible key
    needs are never read, nor are the lengths and tables of sequences without queries.

    Args:
        q: ``(tokens_q, heads_q, head_dim)``, packed. Tokens that no sequence covers stay as they are in ``out``.
        k_cache, v_cache: ``(pages, page_size, heads_kv, head_dim)``, ``page_size`` a multiple of 16.
        page_table: int32 ``(batch, max_pages)``: key ``j`` of sequence ``i`` lies in page
            ``page_table[i, j // page_size]``, at ``j % page_size``.
        kv_lens: int32 ``(batch,)``, keys of each sequence, those of its new tokens included.
        cu_q: int32 ``(batch + 1,)``: queries of sequence ``i`` are those from ``cu_q[i]`` to before ``cu_q[i + 1]``.
        max_q: at least the most queries of a sequence. With ``max_pages`` it sizes the launch, so a CUDA graph serves
            all lengths up to them.
        kv_range: fewest and most keys of a sequence, if the host knows: it helps to choose the schedule, no more.
        validate: look at ``page_table``, ``kv_lens`` and ``cu_q``, which costs a synchronisation; never done while a
            graph is captured.
        causal, window, scale, return_lse, out, schedule: as for ``attention``, which also says what is raised.

    Returns:
        ``out``, or ``(out, lse)`` with ``lse`` fp32 ``(heads_q, tokens_q)``.
    """
    _check_heads(q, k_cache, v_cache, "k_cache", "v_cache", 3)
    plan = plan_attention(q.shape[-1], q.element_size())
    pages, page_size = k_cache.shape[:2]
    if page_size < 16 or page_size % 16:
        raise ValueError(f"the page size must be a multiple of 16, got k_cache.shape={tuple(k_cache.shape)}")
    batch = _check_cu("cu_q", cu_q, q.device)
    _check_index("kv_lens", kv_lens, (batch,), q.device)
    if not isinstance(page_table, torch.Tensor) or page_table.ndim != 2:
        raise ValueError(f"page_table must be a tensor of shape (batch, max_pages), got {_found(page_table)}")
    _check_index("page_table", page_table, (batch, page_table.shape[1]), q.device)
    _check_most("max_q", max_q)
    capacity = page_table.shape[1] * page_size
    whole = isinstance(kv_range, tuple) and len(kv_range) == 2 and all(isinstance(x, int) for x in kv_range)
    if kv_range is not None and not (whole and 0 <= kv_range[0] <= kv_range[1] <= capacity):
        raise ValueError(f"kv_range must be (fewest, most) keys, of {capacity} that fit, got kv_range={kv_range}")
    scale_log2, window = _scale_log2(scale, plan.head_dim), _window(window, causal, capacity)
    if validate and batch and not _capturing():
        _look_at_pages(page_table, kv_lens, cu_q, q.shape[0], max_q, pages, page_size, window)
    out = _output(q, out, k_cache=k_cache, v_cache=v_cache)
    lse = torch.empty(q.shape[1::-1], dtype=torch.float32, device=q.device) if return_lse else None
    tensors = q[None], k_cache, v_cache, out[None], None if lse is None else lse[None]
    sizes = {"batch": batch, "q_len": max_q, "kv_len": capacity}
    known = {"cu_q": cu_q, "kv_lens": kv_lens, "page_table": page_table, "kv_range": kv_range}
    _launch(AttentionCall(*tensors, causal, window, scale_log2, **sizes, **known), plan, schedule)
    return out if lse is None else (out, lse)


def _check_cu(name: str, cu: torch.Tensor, device: torch.device) -> int:
    """``cu`` as an index of its own length; the number of sequences it divides."""
    if not isinstance(cu, torch.Tensor) or cu.ndim != 1 or not len(cu):
        raise ValueError(f"{name} must be a tensor of shape (batch + 1,), got {_found(cu)}")
    _check_index(name, cu, tuple(cu.shape), device)
    return len(cu) - 1


def _check_most(name: str, most: int) -> None:
    _check_whole(name, most)
    if most < 0:
        raise ValueError(f"{name} must not be negative, got {name}={most}")


def _look_at_pages(page_table, kv_lens, cu_q, tokens: int, max_q: int, pages: int, page_size: int, window) -> None:
    """Refuse metadata that leads out of the cache, of all sequences that have queries."""
    q_lens = cu_q.long().diff()
    lens = torch.where(q_lens > 0, kv_lens.long(), 0)
    low = 0 if window is None else (lens - q_lens - window + 1)[:, None]
    starts = torch.arange(page_table.shape[1], device=cu_q.device) * page_size
    used = (starts < lens[:, None]) & (starts + page_size > low)
    ids = torch.where(used, page_table, 0).flatten()
    ids = torch.cat((ids, ids.new_zeros(1)))  # so that there is one where no page is used
    found = torch.cat((_starts(cu_q), _span(lens), _span(ids))).tolist()
    _check_starts("cu_q", *found[:4], tokens, "max_q", max_q)
    _check_lengths("kv_lens", *found[4:6], page_table.shape[1] * page_size)
    if found[6] < 0 or found[7] >= max(pages, 1):
        wrong = found[6] if found[6] < 0 else found[7]
        raise ValueError(f"page_table must name pages 0 to {pages - 1}, but holds {wrong} where keys are read")


def _launch(call: AttentionCall, plan: AttentionPlan, schedule: AttentionSchedule | None) -> None:
    """Fill ``call.out`` and ``call.lse``."""
    if not (call.batch and call.q_len and call.q.numel()):
        return
    specialised = has_wgmma(call.q.device) and _suits_hopper(call, plan)
    if schedule is None:
        device, ragged = call.q.device, call.kv_lens is not None or call.cu_k is not None
        fewest, most = call.kv_range or (0 if ragged else call.kv_len, call.kv_len)
        in_sight = most if call.window is None else min(most, call.window + call.q_len - 1)
        sizes, ragged = (call.q_len, call.batch, call.heads_kv, call.group, in_sight), fewest < in_sight
        schedule = choose_schedule(*sizes, plan, sm_count(device), shared_bytes(device), specialised, ragged)
    if not schedule.specialised:
        if schedule.swap and schedule.num_stages == 1 and has_wgmma(call.q.device):
            # Seen with block_m=32: an address outside of shared memory.
            raise ValueError(f"schedule={schedule}: Triton 3.6 miscompiles swap with one stage for Hopper, take two")
        _launch_pointers(call, plan, schedule)
        return
    if not specialised:
        raise ValueError(
            f"schedule={schedule} needs a Hopper GPU, heads of 64 or 128 elements in rows that TMA can address, and a"
            " page size that divides a block of keys or that a block divides"
        )
    if schedule.swap and not schedule.fits(call.group, plan):
        raise ValueError(
            f"schedule={schedule} is not one for decoding {call.group} query heads a key head: block_m must be at"
            f" least that and at most 64, span {plan.early_chunk} or, up to block_m={MOST_MERGING_ROWS}, a multiple"
            f" of {plan.chunk}"
        )
    _launch_hopper(call, plan, schedule)


def _rows_suit(x: torch.Tensor) -> bool:
    """Whether TMA can address ``x`` (batch, length, heads, head_dim) as one matrix with rows one pitch apart."""
    pitch = x.stride(1)
    if pitch <= 0 or x.stride(3) != 1 or pitch * x.element_size() % 16 or x.data_ptr() % 16:
        return False
    head_rows, head_columns = divmod(x.stride(2), pitch)
    one_way = head_rows == 0 or head_columns == 0
    width = (x.shape[2] - 1) * head_columns + x.shape[3]
    return one_way and x.stride(2) >= 0 and x.stride(0) >= 0 and x.stride(0) % pitch == 0 and width <= pitch


def _suits_hopper(call: AttentionCall, plan: AttentionPlan) -> bool:
    """Whether Hopper's kernels can take the operands."""
    if plan.head_dim > 128 or not call.k.numel() or call.k.stride() != call.v.stride():
        return False
    page_size = plan.block if call.page_table is None else call.k.shape[1]
    whole_pages = page_size % plan.block == 0 or plan.block % page_size == 0
    return whole_pages and all(_rows_suit(x) for x in (call.q, call.k, call.v, call.out))


def _launch_hopper(call: AttentionCall, plan: AttentionPlan, schedule: AttentionSchedule) -> None:
    from kernels import attention_hopper  # Gluon: needed on Hopper alone

    sms = sm_count(call.q.device)
    if not schedule.swap:
        attention_hopper.prefill(call, plan, schedule, sms)
        return
    tiles = call.batch * call.heads_kv * schedule.query_tiles(call.q_len, call.group)
    counters = finished_counters(tiles, call.q.device)
    if counters is None:  # captured, and the reserve is used up: other kernels, the same bits
        _launch_pointers(call, plan, replace(schedule, specialised=False, span=None))
    else:
        attention_hopper.decode(call, plan, schedule, counters, sms)


def _most_chunks(call: AttentionCall, plan: AttentionPlan, block_m: int) -> int:
    """Most chunks that one query tile can see, from what the host knows."""
    chunks = plan.chunks(call.kv_len)
    if call.window is not None:
        tokens = min((block_m - 1) // call.group + 2, call.q_len)
        chunks = min(chunks, triton.cdiv(call.window + tokens - 2, min(plan.chunk, plan.early_chunk)) + 1)
    return max(chunks, 1)


def constants(plan: AttentionPlan, schedule: AttentionSchedule, split: bool) -> dict[str, int]:
    """What plan and schedule are to the kernel. ``split``: whether chunks do go side by side."""
    registers = schedule.block_m * plan.head_dim // (32 * schedule.num_warps)  # a thread's, for a chunk's values
    return {
        "SPLIT": split,
        "SWAP": schedule.swap,
        "HEAD_DIM": plan.head_dim,
        "CHUNK": plan.chunk,
        "EARLY_CHUNK": plan.early_chunk,
        "EARLY": plan.early,
        "BLOCK": plan.block,
        "LANES": plan.lanes,
        "FOLDS": plan.folds,
        "LANE_FOLDS": plan.lanes.bit_length() - 1,
        "BLOCK_M": schedule.block_m,
        "UNROLL": max(1, min(8, 64 // max(registers, 1))),
    }


def _launch_pointers(call: AttentionCall, plan: AttentionPlan, schedule: AttentionSchedule) -> None:
    q, k, v, out, lse, group, block_m = call.q, call.k, call.v, call.out, call.lse, call.group, schedule.block_m
    tiles = triton.cdiv(call.q_len * group, block_m)
    slots, programs = 1, call.batch * call.heads_kv * tiles
    part_m = part_l = part_acc = counters = None
    part_rows = min(block_m, call.q_len * group)
    if schedule.split and (slots := _most_chunks(call, plan, block_m)) > 1:
        counters = finished_counters(programs, q.device)
    if counters is None:
        slots = 1
    else:
        rows = programs * slots * part_rows
        part_m, part_l, part_acc = (scratch(rows * width, q.device) for width in (1, plan.lanes, plan.head_dim))
    launch(
        _attention_kernel,
        (programs * slots,),
        q,
        k,
        v,
        out,
        lse,
        call.cu_q,
        call.cu_k,
        call.kv_lens,
        call.page_table,
        part_m,
        part_l,
        part_acc,
        counters,
        call.batch,
        call.heads_kv,
        group,
        tiles,
        slots,
        call.q_len,
        call.kv_len,
        call.window or 0,
        part_rows,
        call.scale_log2,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *((0, 0) if lse is None else lse.stride()[:2]),
        0 if call.page_table is None else call.page_table.stride(0),
        CAUSAL=call.causal,
        HAS_WINDOW=call.window is not None,
        HAS_LENS=call.kv_lens is not None,
        VARLEN=call.cu_q is not None,
        PAGED=call.page_table is not None,
        HAS_LSE=lse is not None,
        PAGE_SIZE=k.shape[1] if call.page_table is not None else 1,
        **constants(plan, schedule, counters is not None),
        num_warps=schedule.num_warps,
        num_stages=schedule.num_stages,
        enable_fp_fusion=False,
    )


# --------------------------------------------------------------------------------------------- references


def attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    kv_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention in float64, not rounded back: what an error is measured against.

    Shapes as for ``attention``; float64 ``(batch, q_len, heads_q, head_dim)``. Queries are taken a slice at a time,
    so that lengths of 32k fit.
    """
    (batch, q_len, heads_q, head_dim), (kv_len, heads_kv) = q.shape, k.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lens = [kv_len] * batch if kv_lens is None else kv_lens.tolist()
    step = max(2**26 // max(heads_q * kv_len, 1), 1)
    for b, length in enumerate(lens):
        key, value = (x[b, :length].double().repeat_interleave(heads_q // heads_kv, dim=1) for x in (k, v))
        at_key = torch.arange(length, device=q.device)
        for first in range(0, q_len if length else 0, step):
            rows = slice(first, min(first + step, q_len))
            position = length - q_len + torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            s = torch.einsum("thd,khd->htk", q[b, rows].double(), key) * scale
            visible = at_key <= position if causal else torch.ones_like(s[0], dtype=torch.bool)
            if window is not None:
                visible = visible & (at_key > position - window)
            s = s.masked_fill(~visible, float("-inf"))
            weights = s.softmax(-1).masked_fill(~visible, 0.0)
            out[b, rows] = torch.einsum("htk,khd->thd", weights, value)
    return out
