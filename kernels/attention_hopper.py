"""Attention for Hopper in Gluon, Triton's lower level: a warp that loads, warps that multiply and exponentiate.

The plan is ``kernels/attention.py``'s and so are the bits: the same blocks of keys in the same order, the same
written-out fused multiply-adds, the same folds. Only the schedule is finer than plain Triton can say.

*Prefill.* A program holds 128 queries of one head. A *producer* warp asks TMA for blocks of keys and values, as far
ahead as a ring of two buffers allows and across the borders of query tiles. Two *consumers* of four warps take 64
queries each, at their own pace: while one exponentiates the other keeps the tensor cores busy. Within a consumer the
products of one block with the values run beside the exponentials of the next. Where a sequence has more than one
chunk, the sum over the chunks before rests in shared memory while the next starts from nothing.

*Decode*, and whatever else has few tokens. The queries of a token that share a key head are rows of one tile, with
those of a few neighbours if there are any: low tiles, since a tile's time grows with its rows. Its chunks are divided
into *jobs*: enough to fill the GPU and no more, because a job costs its own start and end. A producer warp asks for
the keys and values of a program's jobs; one consumer of four warps takes them with the keys down, so that the tensor
core's long side runs along keys. Merging goes left to right: the first job of a tile merges its chunks as they come,
in registers; the others put theirs by in memory, and whichever job of the tile is done last merges those.

Why it is batch-invariant: read ``_attend`` and ``_decode_attend``. Which blocks a query meets, in which order, and
where a chunk begins depends on positions in its own sequence; blocks that it cannot see leave every bit alone.

Sources: Shah et al., "FlashAttention-3", 2024, for the two overlaps; Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.launch import launch, scratch, wait_for_previous_launch
from kernels.matmul_hopper import GLUON_TYPES, wait_for_all_threads

if TYPE_CHECKING:
    from kernels.attention import AttentionCall, AttentionSchedule
    from kernels.plan import AttentionPlan

LANES = gl.constexpr(8)
HALF = gl.constexpr(64)
"""Queries of one consumer: the rows of one warpgroup's instruction."""


# ----------------------------------------------------------------------------------------------- arithmetic


@gluon.jit
def _fold(x, FROM: gl.constexpr, TO: gl.constexpr):
    """(rows, FROM) to (rows, TO): column j is added to column j + half, until TO columns are left."""
    ROWS: gl.constexpr = x.shape[0]
    LEVELS: gl.constexpr = (FROM // TO).bit_length() - 1
    for level in gl.static_range(LEVELS):
        x = gl.sum(gl.reshape(x, [ROWS, 2, FROM >> (level + 1)]), axis=1)
    return x


@gluon.jit
def _visible(s, row, col, first_col, kv_len, WINDOW: gl.constexpr, window, CAUSAL: gl.constexpr):
    """Scores with -inf where the query at position ``row`` may not look at the key at ``col``."""
    col = first_col + col
    seen = (col < kv_len)[None, :]
    if CAUSAL:
        seen = seen & (col[None, :] <= row[:, None])
    if WINDOW:
        seen = seen & (col[None, :] > row[:, None] - window)
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _hides(block, kv_len, first_pos, window, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """Whether some query of a consumer may not look at some key of the block."""
    end = (block + 1) * BLOCK_N
    hides = end > kv_len
    if CAUSAL:
        hides = hides | (end - 1 > first_pos)
    if WINDOW:
        hides = hides | (block * BLOCK_N <= first_pos + HALF - 1 - window)
    return hides


@gluon.jit
def _softmax_step(s, m, scale_log2):
    """One block of scores: the weights p, what the sums before shrink by, the new maximum."""
    m_new = gl.maximum(m, gl.max(s, axis=1) * scale_log2)
    base = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(gl.fma(s, gl.full_like(s, 0.0) + scale_log2, gl.expand_dims(-base, 1) + gl.full_like(s, 0.0)))
    alpha = gl.exp2(m - base)
    return p, alpha, m_new


@gluon.jit
def _pin(sums):
    """``sums``, computed before whatever follows. They are never negative, so the store never happens; but the
    assembler cannot move the wait for the tensor cores above it,
    and the exponentials stay beside the products they hide.
    """
    return gl.inline_asm_elementwise(
        """
        {
            .reg .f32 a, b;
            .reg .pred p;
            .reg .u32 nowhere;
            mov.u32 nowhere, 0;
            min.f32 a, $4, $5;
            min.f32 b, $6, $7;
            min.f32 a, a, b;
            setp.lt.f32 p, a, 0fBF800000;
            @p st.volatile.shared.f32 [nowhere], a;
            mov.f32 $0, $4;
            mov.f32 $1, $5;
            mov.f32 $2, $6;
            mov.f32 $3, $7;
        }
        """,
        "=f,=f,=f,=f,f,f,f,f",
        [sums],
        dtype=gl.float32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def _chunk_of(pos, CHUNK: gl.constexpr, EARLY_CHUNK: gl.constexpr, EARLY: gl.constexpr):
    """The chunk that a position lies in, as ``AttentionPlan.chunk_of``."""
    return min(pos, EARLY) // EARLY_CHUNK + max(pos - EARLY, 0) // CHUNK


@gluon.jit
def _chunk_start(chunk, CHUNK: gl.constexpr, EARLY_CHUNK: gl.constexpr, EARLY: gl.constexpr):
    """The first position of a chunk."""
    EARLY_CHUNKS: gl.constexpr = EARLY // EARLY_CHUNK
    return min(chunk, EARLY_CHUNKS) * EARLY_CHUNK + max(chunk - EARLY_CHUNKS, 0) * CHUNK


# --------------------------------------------------------------------------------------------------- loading


@gluon.jit
def _lengths(seq, q_len, kv_len, cu_q_ptr, cu_k_ptr, kv_lens_ptr, VARLEN_Q: gl.constexpr, VARLEN_K: gl.constexpr,
             LENS: gl.constexpr):  # fmt: skip
    """Where the queries and keys of a sequence begin, and how many of each it has."""
    q_first = seq * 0
    k_first = seq * 0
    if VARLEN_Q:
        q_first = gl.load(cu_q_ptr + seq)
        q_len = gl.load(cu_q_ptr + seq + 1) - q_first
    if VARLEN_K:
        k_first = gl.load(cu_k_ptr + seq)
        kv_len = max(min(gl.load(cu_k_ptr + seq + 1) - k_first, kv_len), 0)
    if LENS:
        kv_len = max(min(gl.load(kv_lens_ptr + seq), kv_len), 0)
    return q_first, k_first, q_len, kv_len


@gluon.jit
def _rows_of(
    block, row, kv_len, pages, page_size, page_rows, head_rows, PAGED: gl.constexpr, BLOCK_N: gl.constexpr,
    BOX: gl.constexpr,
):  # fmt: skip
    """Where the boxes of a block begin, as rows of the descriptor: one box, or pages where those are smaller.

    Keys and values lie alike, so a page is looked up once for both.
    """
    rows = gl.tuple([])
    for box in gl.static_range(BLOCK_N // BOX):
        if PAGED:
            # Past the last key there is no page to name: any will do, its rows are not looked at.
            key = min(block * BLOCK_N + box * BOX, kv_len - 1)
            row = gl.load(pages + key // page_size) * page_rows + key % page_size // BOX * BOX + head_rows
            rows = rows + (row,)  # noqa: RUF005 (Gluon does not unpack)
        else:
            rows = rows + (row + block * BLOCK_N + box * BOX,)  # noqa: RUF005
    return rows


@gluon.jit
def _load_block(desc, rows, column, arrived, place, BLOCK_N: gl.constexpr, BOX: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Ask TMA for a block of keys or values."""
    mbarrier.expect(arrived, BLOCK_N * HEAD_DIM * 2)
    for box in gl.static_range(BLOCK_N // BOX):
        tma.async_copy_global_to_shared(desc, [rows[box], column], arrived, place.slice(box * BOX, BOX, 0))


# -------------------------------------------------------------------------------------------------- prefill


@gluon.jit
def _tile_of(tile, heads_q, batch, q_tiles, together, BLOCK_M: gl.constexpr):
    """Sequence, head, first query of a tile. Heads come in sections of ``together``, the last one what is left; in a
    section, the tiles with most keys to visit come first, the heads of a group together.
    """
    section = tile // (together * q_tiles)
    first = section * together
    width = min(together, heads_q * batch - first)
    tile = tile - first * q_tiles
    line = first + tile % width
    return line // heads_q, line % heads_q, (q_tiles - 1 - tile // width) * BLOCK_M


@gluon.jit
def _blocks(start, q_len, kv_len, window, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
            CAUSAL: gl.constexpr, WINDOW: gl.constexpr):  # fmt: skip
    """First and one past the last block of keys that a query of the tile can see."""
    first_pos = start + kv_len - q_len
    end = kv_len
    if CAUSAL:
        end = min(end, first_pos + BLOCK_M)
    first = kv_len * 0
    if WINDOW:
        first = max(first_pos - window + 1, 0) // BLOCK_N
    last = (max(end, 0) + BLOCK_N - 1) // BLOCK_N
    return min(first, last), last


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_tile, k_ring, v_ring, bars,
    q_len, kv_len, cu_q_ptr, cu_k_ptr, kv_lens_ptr, page_table_ptr, stride_page_table,
    q_rows, k_rows, heads_q, heads_kv, batch, q_tiles, together, window, page_size,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, VARLEN_Q: gl.constexpr, VARLEN_K: gl.constexpr,
    LENS: gl.constexpr, PAGED: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    BLOCK_M: gl.constexpr = 2 * HALF
    q_seq_rows, q_head_rows, q_head_cols = q_rows
    k_seq_rows, k_head_rows, k_head_cols = k_rows
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), heads_q * batch * q_tiles, gl.num_programs(0)):
        seq, head, start = _tile_of(tile, heads_q, batch, q_tiles, together, BLOCK_M)
        q_first, k_first, own_q, own_kv = _lengths(
            seq, q_len, kv_len, cu_q_ptr, cu_k_ptr, kv_lens_ptr, VARLEN_Q, VARLEN_K, LENS
        )
        if start < own_q:
            first, last = _blocks(start, own_q, own_kv, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
            q_col = head * q_head_cols
            q_row = seq * q_seq_rows + q_first + head * q_head_rows + start
            kv_head = head // (heads_q // heads_kv)
            k_row = seq * k_seq_rows + k_first + kv_head * k_head_rows
            k_col = kv_head * k_head_cols
            pages = page_table_ptr
            if PAGED:
                pages = page_table_ptr + seq.to(gl.int64) * stride_page_table
            for block in range(first, last):
                slot = step % STAGES
                phase = (step // STAGES + 1) & 1
                rows = _rows_of(
                    block, k_row, own_kv, pages, page_size, k_seq_rows, kv_head * k_head_rows, PAGED, BLOCK_N, BOX
                )
                mbarrier.wait(k_empty.index(slot), phase)
                _load_block(k_desc, rows, k_col, k_full.index(slot), k_ring.index(slot), BLOCK_N, BOX, HEAD_DIM)
                if block == first:  # only now, so that the wait for room for the queries does not hold up the keys
                    mbarrier.wait(q_empty, (turn + 1) & 1)
                    mbarrier.expect(q_full, BLOCK_M * HEAD_DIM * 2)
                    for half in gl.static_range(2):
                        place = q_tile.index(half)
                        tma.async_copy_global_to_shared(q_desc, [q_row + half * HALF, q_col], q_full, place)
                    turn += 1
                mbarrier.wait(v_empty.index(slot), phase)
                _load_block(v_desc, rows, k_col, v_full.index(slot), v_ring.index(slot), BLOCK_N, BOX, HEAD_DIM)
                step += 1


@gluon.jit
def _clear_outside(v, begin, end, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, WARPS: gl.constexpr):
    """Zeros in the rows of a block of values before ``begin`` and from ``end`` on, which nobody sees: what lies there
    may be NaN, and 0 * NaN is NaN.

    In a prefill both consumers do it, each before its own product, writing the same bytes.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [WARPS, 1], [1, 0])
    row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    x = v.load(LAYOUT)
    v.store(gl.where(((row >= begin) & (row < end))[:, None], x, gl.zeros_like(x)))
    fence_async_shared()


@gluon.jit
def _put_by(place, acc, HEAD_DIM: gl.constexpr):
    """Write an accumulator to shared memory so that each thread stores 16 bytes beside its neighbour's 16.

    An accumulator's element (row, column) lies in warp row // 16, lane 4 (row % 8) + column // 2 % 4; the rest of
    row and column count the thread's own registers. Only the same thread reads it back.
    """
    x = gl.permute(gl.reshape(acc, [4, 2, 8, HEAD_DIM // 8, 4, 2]), [3, 0, 2, 4, 1, 5])
    place.store(gl.reshape(x, [HEAD_DIM // 8, 128, 4]))


@gluon.jit
def _take_up(place, LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, HEAD_DIM: gl.constexpr):
    """What ``_put_by`` wrote."""
    x = gl.reshape(place.load(LAYOUT), [HEAD_DIM // 8, 4, 8, 4, 2, 2])
    x = gl.reshape(gl.permute(x, [1, 4, 2, 0, 3, 5]), [64, HEAD_DIM])
    return gl.convert_layout(x, O_LAYOUT, assert_trivial=True)


@gluon.jit
def _weights_of(m_all, m):
    """What the sums before a chunk and those of the chunk are multiplied by when they are merged."""
    m_new = gl.maximum(m_all, m)
    base = gl.where(m_new == float("-inf"), 0.0, m_new)
    return gl.exp2(m_all - base), gl.exp2(m - base), m_new


@gluon.jit
def _merge(place, acc, a, b, REST_LAYOUT: gl.constexpr, HEAD_DIM: gl.constexpr):
    """The chunk ``acc`` merged into the sum of those before, which lies in shared memory."""
    O_LAYOUT: gl.constexpr = acc.type.layout
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    before = _take_up(place, REST_LAYOUT, O_LAYOUT, HEAD_DIM) * gl.convert_layout(a, O_ROWS)[:, None]
    return gl.fma(acc, gl.convert_layout(b, O_ROWS)[:, None] + gl.zeros_like(acc), before)


@gluon.jit
def _attend(
    HALF_ID: gl.constexpr, o_desc, o_ptr, lse_ptr, q_tile, k_ring, v_ring, rest, bars,
    q_len, kv_len, cu_q_ptr, cu_k_ptr, kv_lens_ptr, o_rows, stride_lse_seq, stride_lse_head, scale_log2, heads_q,
    batch, q_tiles, together, window,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, VARLEN_Q: gl.constexpr, VARLEN_K: gl.constexpr,
    LENS: gl.constexpr, HAS_LSE: gl.constexpr,
    CHUNK: gl.constexpr, EARLY_CHUNK: gl.constexpr, EARLY: gl.constexpr, BLOCK_N: gl.constexpr,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, REST_LAYOUT: gl.constexpr,
):  # fmt: skip
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    BLOCK_M: gl.constexpr = 2 * HALF
    BLOCKS: gl.constexpr = CHUNK // BLOCK_N
    EARLY_BLOCKS: gl.constexpr = EARLY_CHUNK // BLOCK_N
    DTYPE: gl.constexpr = o_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    L_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LANES, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    L_ROWS: gl.constexpr = gl.SliceLayout(1, L_LAYOUT)
    o_seq_rows, o_head_rows, o_head_cols = o_rows
    q = q_tile.index(HALF_ID)
    mine = rest.index(HALF_ID)
    staged = mine._reinterpret(DTYPE, [HALF, HEAD_DIM], o_desc.layout)
    in_block = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), heads_q * batch * q_tiles, gl.num_programs(0)):
        seq, head, start = _tile_of(tile, heads_q, batch, q_tiles, together, BLOCK_M)
        q_first, _, own_q, own_kv = _lengths(
            seq, q_len, kv_len, cu_q_ptr, cu_k_ptr, kv_lens_ptr, VARLEN_Q, VARLEN_K, LENS
        )
        if start < own_q:
            first, last = _blocks(start, own_q, own_kv, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
            low = own_kv * 0
            if WINDOW:
                low = max(start + own_kv - own_q - window + 1, 0)  # the first key that a query of the tile sees
            first_pos = start + own_kv - own_q + HALF_ID * HALF
            pos = first_pos + gl.arange(0, HALF, layout=S_ROWS)
            m_all = gl.full([HALF], float("-inf"), gl.float32, layout=S_ROWS)
            l_all = gl.zeros([HALF, LANES], gl.float32, layout=L_LAYOUT)
            acc = gl.zeros([HALF, HEAD_DIM], gl.float32, layout=O_LAYOUT)
            if first < last:
                kept = first < 0  # whether the sum of finished chunks rests in shared memory: not yet
                nothing = gl.zeros([HALF, BLOCK_N], gl.float32, layout=S_LAYOUT)
                slot = step % STAGES
                mbarrier.wait(q_full, turn & 1)
                mbarrier.wait(k_full.index(slot), step // STAGES & 1)
                s = warpgroup_mma(q, k_ring.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=(s,))
                mbarrier.arrive(k_empty.index(slot))
                mbarrier.arrive(q_empty, pred=last == first + 1)
                if _hides(first, own_kv, first_pos, window, BLOCK_N, CAUSAL, WINDOW):
                    s = _visible(s, pos, in_block, first * BLOCK_N, own_kv, WINDOW, window, CAUSAL)
                p, alpha, m = _softmax_step(s, m_all, scale_log2)
                sums = gl.convert_layout(_fold(p, BLOCK_N, LANES), L_LAYOUT, assert_trivial=True)
                weights = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
                for block in range(first + 1, last):
                    # The scores of this block, and beside its exponentials the values of the block before.
                    slot = (step + 1) % STAGES
                    old = step % STAGES
                    if WINDOW:  # noqa: SIM102 (decided when compiled; the condition inside is not)
                        if (block == first + 1) & (low > first * BLOCK_N):
                            mbarrier.wait(v_full.index(old), step // STAGES & 1)
                            _clear_outside(v_ring.index(old), low - first * BLOCK_N, BLOCK_N, BLOCK_N, HEAD_DIM, 4)
                    mbarrier.wait(k_full.index(slot), (step + 1) // STAGES & 1)
                    s_next = warpgroup_mma(
                        q, k_ring.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True
                    )
                    mbarrier.wait(v_full.index(old), step // STAGES & 1)
                    o_next = warpgroup_mma(weights, v_ring.index(old), acc, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(s_next,))
                    mbarrier.arrive(k_empty.index(slot))
                    mbarrier.arrive(q_empty, pred=block == last - 1)
                    if _hides(block, own_kv, first_pos, window, BLOCK_N, CAUSAL, WINDOW):
                        s = _visible(s, pos, in_block, block * BLOCK_N, own_kv, WINDOW, window, CAUSAL)
                    fresh = (block % BLOCKS == 0) | ((block < EARLY // BLOCK_N) & (block % EARLY_BLOCKS == 0))
                    m_old = m
                    l_old = sums
                    p, alpha, m = _softmax_step(s, gl.where(fresh, float("-inf"), m), scale_log2)
                    shrink = gl.convert_layout(alpha, L_ROWS)[:, None] + gl.zeros_like(sums)
                    folded = gl.convert_layout(_fold(p, BLOCK_N, LANES), L_LAYOUT, assert_trivial=True)
                    sums = _pin(gl.fma(gl.where(fresh, 0.0, sums), shrink, folded))
                    acc = warpgroup_mma_wait(0, deps=(o_next,))
                    mbarrier.arrive(v_empty.index(old))
                    weights = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
                    if fresh:
                        a, b, m_all = _weights_of(m_all, m_old)
                        b_l = gl.convert_layout(b, L_ROWS)[:, None] + gl.zeros_like(sums)
                        l_all = gl.fma(l_old, b_l, l_all * gl.convert_layout(a, L_ROWS)[:, None])
                        if kept:
                            acc = _merge(mine, acc, a, b, REST_LAYOUT, HEAD_DIM)
                        else:
                            tma.store_wait(0)  # the tile before has left this place
                        kept = True
                        _put_by(mine, acc, HEAD_DIM)
                        acc = gl.zeros([HALF, HEAD_DIM], gl.float32, layout=O_LAYOUT)
                    else:
                        acc = acc * gl.convert_layout(alpha, O_ROWS)[:, None]
                    step += 1
                slot = step % STAGES
                mbarrier.wait(v_full.index(slot), step // STAGES & 1)
                begin = max(low - (last - 1) * BLOCK_N, 0)
                end = own_kv - (last - 1) * BLOCK_N
                if (begin > 0) | (end < BLOCK_N):
                    _clear_outside(v_ring.index(slot), begin, end, BLOCK_N, HEAD_DIM, 4)
                acc = warpgroup_mma(weights, v_ring.index(slot), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(v_empty.index(slot))
                step += 1
                turn += 1
                a, b, m_all = _weights_of(m_all, m)
                b_l = gl.convert_layout(b, L_ROWS)[:, None] + gl.zeros_like(sums)
                l_all = gl.fma(sums, b_l, l_all * gl.convert_layout(a, L_ROWS)[:, None])
                if kept:
                    acc = _merge(mine, acc, a, b, REST_LAYOUT, HEAD_DIM)
            total = gl.convert_layout(gl.reshape(_fold(l_all, LANES, 1), [HALF]), L_ROWS)
            inverse = gl.convert_layout(1.0 / total, O_ROWS)
            dead = gl.convert_layout(total, O_ROWS) == 0.0
            result = gl.where(dead[:, None], 0.0, acc * inverse[:, None]) + 0.0
            row = start + HALF_ID * HALF
            o_row = seq * o_seq_rows + q_first + head * o_head_rows + row
            if row + HALF <= own_q:
                tma.store_wait(0)
                staged.store(result.to(DTYPE))
                fence_async_shared()
                tma.async_copy_shared_to_global(o_desc, [o_row, head * o_head_cols], staged)
            else:
                offs_m = gl.arange(0, HALF, layout=O_ROWS)
                offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_LAYOUT))
                pitch = o_desc.strides[0]
                o_ptrs = (
                    o_ptr + (o_row + offs_m).to(gl.int64)[:, None] * pitch + (head * o_head_cols + offs_d)[None, :]
                )
                gl.store(o_ptrs, result.to(DTYPE), mask=(row + offs_m < own_q)[:, None])
            if HAS_LSE:
                offs_m = gl.arange(0, HALF, layout=L_ROWS)
                lse = (gl.convert_layout(m_all, L_ROWS) + gl.log2(total)) * 0.6931471805599453
                lse = gl.where(total == 0.0, float("-inf"), lse)
                lse_ptrs = lse_ptr + seq * stride_lse_seq + head * stride_lse_head + q_first + row + offs_m
                gl.store(lse_ptrs, lse, mask=row + offs_m < own_q)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["q_len", "kv_len", "batch", "q_tiles", "together"])
def _attention_prefill_kernel(
    q_desc, k_desc, v_desc, o_desc, o_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, kv_lens_ptr, page_table_ptr,
    stride_page_table,
    q_seq_rows, q_head_rows, q_head_cols, k_seq_rows, k_head_rows, k_head_cols, o_seq_rows, o_head_rows, o_head_cols,
    stride_lse_seq, stride_lse_head, q_len, kv_len, heads_q, heads_kv, batch, q_tiles, together, window, page_size,
    scale_log2,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, VARLEN_Q: gl.constexpr, VARLEN_K: gl.constexpr,
    LENS: gl.constexpr, PAGED: gl.constexpr, BOX: gl.constexpr, RING_LAYOUT: gl.constexpr,
    HAS_LSE: gl.constexpr, CHUNK: gl.constexpr, EARLY_CHUNK: gl.constexpr, EARLY: gl.constexpr,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, REST_LAYOUT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    q_tile = gl.allocate_shared_memory(q_desc.dtype, [2, HALF, HEAD_DIM], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, HEAD_DIM], RING_LAYOUT)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, HEAD_DIM], RING_LAYOUT)
    rest = gl.allocate_shared_memory(
        gl.float32, [2, HEAD_DIM // 8, 128, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=2)
    fence_async_shared()
    wait_for_previous_launch()
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    q_rows = (q_seq_rows, q_head_rows, q_head_cols)
    k_rows = (k_seq_rows, k_head_rows, k_head_cols)
    o_rows = (o_seq_rows, o_head_rows, o_head_cols)
    # fmt: off
    gl.warp_specialize(
        [
            (_attend, (0, o_desc, o_ptr, lse_ptr, q_tile, k_ring, v_ring, rest, bars, q_len, kv_len, cu_q_ptr,
                       cu_k_ptr, kv_lens_ptr, o_rows, stride_lse_seq, stride_lse_head, scale_log2, heads_q, batch,
                       q_tiles, together, window, CAUSAL, WINDOW, VARLEN_Q, VARLEN_K, LENS, HAS_LSE, CHUNK,
                       EARLY_CHUNK, EARLY, BLOCK_N, HEAD_DIM, STAGES, REST_LAYOUT)),
            (_attend, (1, o_desc, o_ptr, lse_ptr, q_tile, k_ring, v_ring, rest, bars, q_len, kv_len, cu_q_ptr,
                       cu_k_ptr, kv_lens_ptr, o_rows, stride_lse_seq, stride_lse_head, scale_log2, heads_q, batch,
                       q_tiles, together, window, CAUSAL, WINDOW, VARLEN_Q, VARLEN_K, LENS, HAS_LSE, CHUNK,
                       EARLY_CHUNK, EARLY, BLOCK_N, HEAD_DIM, STAGES, REST_LAYOUT)),
            (_load, (q_desc, k_desc, v_desc, q_tile, k_ring, v_ring, bars, q_len, kv_len, cu_q_ptr, cu_k_ptr,
                     kv_lens_ptr, page_table_ptr, stride_page_table, q_rows, k_rows, heads_q, heads_kv, batch,
                     q_tiles, together, window, page_size, CAUSAL, WINDOW, VARLEN_Q, VARLEN_K, LENS, PAGED, BLOCK_N,
                     BOX, HEAD_DIM, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
    # fmt: on


def _rest_layout(head_dim: int) -> gl.DistributedLinearLayout:
    """Registers, lanes and warps of an accumulator as ``_put_by`` reshapes it."""
    registers = [[0, 0, 1], [0, 0, 2]] + [[1 << bit, 0, 0] for bit in range((head_dim // 8).bit_length() - 1)]
    lanes, warps = [[0, 1 << bit, 0] for bit in range(5)], [[0, 32, 0], [0, 64, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [head_dim // 8, 128, 4])


def _rows(x: torch.Tensor, block: int, cu: torch.Tensor | None) -> tuple[TensorDescriptor, tuple[int, int, int]]:
    """``x`` (batch, length, heads, head_dim) as one matrix of rows ``x.stride(1)`` apart: descriptor of (block,
    head_dim) boxes, and what a sequence and a head add to the row and a head to the column. Packed sequences (``cu``
    says where they begin) are one sequence to the descriptor.
    """
    batch, length, heads, head_dim = x.shape
    pitch = x.stride(1)
    seq_rows = x.stride(0) // pitch
    head_rows, head_cols = divmod(x.stride(2), pitch)
    rows = (batch - 1) * seq_rows + (heads - 1) * head_rows + length
    columns = (heads - 1) * head_cols + head_dim
    layout = gl.NVMMASharedLayout.get_default_for([block, head_dim], GLUON_TYPES[x.dtype])
    descriptor = TensorDescriptor(x, [rows, columns], [pitch, 1], [block, head_dim], layout)
    return descriptor, (seq_rows if cu is None else 0, head_rows, head_cols)


def _lse_strides(call: AttentionCall) -> tuple[int, int]:
    """From sequence to sequence (packed ones lie in one) and from head to head."""
    if call.lse is None:
        return 0, 0
    return 0 if call.cu_q is not None else call.lse.stride(0), call.lse.stride(1)


SECTION_BYTES = 32 << 20
"""Keys and values that a section of heads reads again for every row of query tiles: what stays in 50 MB of L2."""
SECTION_TILES = 32
"""Most query tiles of a head for which sections pay. With more, little is gained: one row of tiles takes long."""
SECTIONS = 4
"""Fewest sections that pay. With fewer, L2 holds much of what is read again anyway."""


def _heads_together(call: AttentionCall) -> int:
    """How many query heads a prefill takes at a time, whole groups: all, unless their tiles are few."""
    heads = call.q.shape[2] * call.batch
    head_bytes = 2 * call.kv_len * call.k.shape[3] * call.k.element_size()
    sections = call.batch * call.heads_kv * head_bytes / SECTION_BYTES
    if call.q_len > SECTION_TILES * 2 * HALF.value or sections < SECTIONS:
        return heads
    return max(SECTION_BYTES // head_bytes, 1) * call.group


def prefill(call: AttentionCall, plan: AttentionPlan, schedule: AttentionSchedule, sms: int) -> None:
    """Fill ``call.out`` and ``call.lse``: tiles of 128 queries of a head, the chunks of a tile in turn."""
    q, k, v, out, lse, page_table = call.q, call.k, call.v, call.out, call.lse, call.page_table
    heads_q, head_dim = q.shape[2:]
    box = plan.block if page_table is None else min(plan.block, k.shape[1])
    q_desc, q_rows = _rows(q, HALF.value, call.cu_q)
    k_desc, k_rows = _rows(k, box, call.cu_k)
    v_desc, _ = _rows(v, box, call.cu_k)
    o_desc, o_rows = _rows(out, HALF.value, call.cu_q)
    q_tiles = -(-call.q_len // (2 * HALF.value))
    launch(
        _attention_prefill_kernel, (min(sms, q_tiles * call.batch * heads_q),),
        q_desc, k_desc, v_desc, o_desc, out, lse, call.cu_q, call.cu_k, call.kv_lens, page_table,
        0 if page_table is None else page_table.stride(0), *q_rows, *k_rows, *o_rows,
        *_lse_strides(call), call.q_len, call.kv_len, heads_q, call.heads_kv, call.batch,
        q_tiles, _heads_together(call), call.window or 0, k.shape[1], call.scale_log2,
        CAUSAL=call.causal, WINDOW=call.window is not None, VARLEN_Q=call.cu_q is not None,
        VARLEN_K=call.cu_k is not None, LENS=call.kv_lens is not None, PAGED=page_table is not None,
        HAS_LSE=lse is not None, CHUNK=plan.chunk, EARLY_CHUNK=plan.early_chunk, EARLY=plan.early,
        BLOCK_N=plan.block, BOX=box, HEAD_DIM=head_dim, STAGES=schedule.num_stages,
        RING_LAYOUT=gl.NVMMASharedLayout.get_default_for([plan.block, head_dim], GLUON_TYPES[k.dtype]),
        REST_LAYOUT=_rest_layout(head_dim), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- decode


@gluon.jit
def _jobs_of(q_len, kv_len, window, span, CHUNK: gl.constexpr, EARLY_CHUNK: gl.constexpr, EARLY: gl.constexpr,
             WINDOW: gl.constexpr, FINE: gl.constexpr):  # fmt: skip
    """First key that a query of a sequence can see, its chunk, one past the last chunk, and the number of jobs.

    A job is one chunk if FINE, else the chunks within ``span`` keys, a multiple of CHUNK counted from position 0. A
    sequence without keys has an empty job: its result has to be written too.
    """
    first = kv_len * 0
    if WINDOW:
        first = max(kv_len - q_len - window + 1, 0)
    first_chunk = _chunk_of(first, CHUNK, EARLY_CHUNK, EARLY)
    chunks = max(_chunk_of(max(kv_len, 1) - 1, CHUNK, EARLY_CHUNK, EARLY) + 1, first_chunk + 1)
    jobs = chunks - first_chunk
    if not FINE:
        jobs = max((kv_len + span - 1) // span - first // span, 1)
    return first, first_chunk, chunks, jobs


@gluon.jit
def _chunks_of(job, first, first_chunk, chunks, span, CHUNK: gl.constexpr, EARLY_CHUNK: gl.constexpr,
               EARLY: gl.constexpr, FINE: gl.constexpr):  # fmt: skip
    """First and one past the last chunk of a job."""
    begin = first_chunk + job
    end = begin + 1
    if not FINE:
        start = (first // span + job) * span
        begin = max(_chunk_of(start, CHUNK, EARLY_CHUNK, EARLY), first_chunk)
        end = min(_chunk_of(start + span, CHUNK, EARLY_CHUNK, EARLY), chunks)
    return begin, end


@gluon.jit
def _blocks_of(begin, end, first, kv_len, CHUNK: gl.constexpr, EARLY_CHUNK: gl.constexpr, EARLY: gl.constexpr,
               BLOCK_N: gl.constexpr):  # fmt: skip
    """First and one past the last block of keys of the chunks from ``begin`` to before ``end``."""
    last_key = min(_chunk_start(end, CHUNK, EARLY_CHUNK, EARLY), kv_len)
    return max(_chunk_start(begin, CHUNK, EARLY_CHUNK, EARLY), first) // BLOCK_N, (last_key + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def _job_at(
    index, q_len, kv_len, cu_q_ptr, cu_k_ptr, kv_lens_ptr, heads_kv, batch, q_tiles, tokens, window,
    span, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, VARLEN_Q: gl.constexpr, VARLEN_K: gl.constexpr,
    LENS: gl.constexpr, CHUNK: gl.constexpr, EARLY_CHUNK: gl.constexpr, EARLY: gl.constexpr, FINE: gl.constexpr,
):  # fmt: skip
    """What producer and consumer want to know of a job: where it is (sequence, key head, tile among all tiles, number
    among the jobs of the tile, and whether there is such a job), the tile as if it were a sequence (first query,
    first key, how many of each), what of it can be seen (first key, its chunk, one past the last chunk, jobs), and
    the job's own chunks.

    A tile is ``tokens`` queries of a sequence, with all heads that share a key head. It ends where its last query
    does: keys after that are not there for it. Tiles of a sequence are neighbours, to find each other's keys in L2.
    First jobs come first: they have most to do, and are there in every tile.
    """
    tiles = q_tiles * heads_kv * batch
    tile = index % tiles
    job = index // tiles
    begin_q = tile % q_tiles * tokens
    head = tile // q_tiles % heads_kv
    seq = tile // q_tiles // heads_kv
    q_first, k_first, own_q, own_kv = _lengths(
        seq, q_len, kv_len, cu_q_ptr, cu_k_ptr, kv_lens_ptr, VARLEN_Q, VARLEN_K, LENS
    )
    if CAUSAL:
        own_kv = max(own_kv - max(own_q - begin_q - tokens, 0), 0)
    own_q = max(min(own_q - begin_q, tokens), 0)
    q_first += begin_q
    first, first_chunk, chunks, jobs = _jobs_of(own_q, own_kv, window, span, CHUNK, EARLY_CHUNK, EARLY, WINDOW, FINE)
    begin, end = _chunks_of(job, first, first_chunk, chunks, span, CHUNK, EARLY_CHUNK, EARLY, FINE)
    where = (seq, head, tile, job, (own_q > 0) & (job < jobs))
    return where, (q_first, k_first, own_q, own_kv), (first, first_chunk, chunks, jobs), (begin, end)


@gluon.jit
def _decode_load(
    q_ptr, q_desc, k_desc, v_desc, q_ring, k_ring, v_ring, bars, q_len, kv_len, cu_q_ptr, cu_k_ptr, kv_lens_ptr,
    page_table_ptr, stride_page_table, stride_q_seq, stride_q_token, stride_q_head, q_token_rows, k_rows, most_jobs,
    heads_kv, batch, q_tiles, tokens, window, span, page_size,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, VARLEN_Q: gl.constexpr, VARLEN_K: gl.constexpr,
    LENS: gl.constexpr, PAGED: gl.constexpr, CHUNK: gl.constexpr, EARLY_CHUNK: gl.constexpr, EARLY: gl.constexpr,
    FINE: gl.constexpr, ONE_QUERY: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr, ROWS: gl.constexpr,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [1, 1], [1, 0])
    k_seq_rows, k_head_rows, k_head_cols = k_rows
    query = gl.arange(0, ROWS, layout=gl.SliceLayout(1, Q_LAYOUT))
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, Q_LAYOUT))
    step = 0
    turn = 0
    # One flat loop: with a loop over sequences around one over their jobs, Triton 3.6's loop-aware CSE loses the
    # variable that carries a program's place from sequence to sequence, and jobs are done several times.
    for index in range(gl.program_id(0), most_jobs * q_tiles * batch * heads_kv, gl.num_programs(0)):
        where, sequence, seen, own = _job_at(
            index, q_len, kv_len, cu_q_ptr, cu_k_ptr, kv_lens_ptr, heads_kv, batch, q_tiles, tokens, window, span,
            CAUSAL, WINDOW, VARLEN_Q, VARLEN_K, LENS, CHUNK, EARLY_CHUNK, EARLY, FINE,
        )  # fmt: skip
        seq, head, _, _, exists = where
        begin, end = own
        q_first, k_first, own_q, own_kv = sequence
        if exists:
            first, last = _blocks_of(begin, end, seen[0], own_kv, CHUNK, EARLY_CHUNK, EARLY, BLOCK_N)
            row = seq * k_seq_rows + k_first + head * k_head_rows
            column = head * k_head_cols
            pages = page_table_ptr
            if PAGED:
                pages = page_table_ptr + seq.to(gl.int64) * stride_page_table
            for block in range(first, last):
                slot = step % STAGES
                phase = (step // STAGES + 1) & 1
                rows = _rows_of(
                    block, row, own_kv, pages, page_size, k_seq_rows, head * k_head_rows, PAGED, BLOCK_N, BOX
                )
                mbarrier.wait(k_empty.index(slot), phase)
                _load_block(k_desc, rows, column, k_full.index(slot), k_ring.index(slot), BLOCK_N, BOX, HEAD_DIM)
                if block == first:
                    q_slot = turn % 2
                    mbarrier.wait(q_empty.index(q_slot), (turn // 2 + 1) & 1)
                    if ONE_QUERY:
                        # The rows past a group are other heads' queries: computed along, never stored.
                        q_row = (q_first if VARLEN_Q else seq) * q_token_rows + head * GROUP
                        mbarrier.expect(q_full.index(q_slot), ROWS * HEAD_DIM * 2)
                        tma.async_copy_global_to_shared(
                            q_desc, [q_row, 0], q_full.index(q_slot), q_ring.index(q_slot)
                        )
                    else:
                        q_ptrs = q_ptr + seq.to(gl.int64) * stride_q_seq
                        q_ptrs += (q_first + query // GROUP).to(gl.int64)[:, None] * stride_q_token
                        q_ptrs += (head * GROUP + query % GROUP)[:, None] * stride_q_head + offs_d[None, :]
                        q_ring.index(q_slot).store(gl.load(q_ptrs, mask=(query < own_q * GROUP)[:, None], other=0.0))
                        fence_async_shared()
                        mbarrier.arrive(q_full.index(q_slot))
                    turn += 1
                mbarrier.wait(v_empty.index(slot), phase)
                _load_block(v_desc, rows, column, v_full.index(slot), v_ring.index(slot), BLOCK_N, BOX, HEAD_DIM)
                step += 1


@gluon.jit
def _fold_keys(x, FROM: gl.constexpr, TO: gl.constexpr, ROWS: gl.constexpr):
    """``_fold`` for weights with their keys down: (FROM, ROWS) to (TO, ROWS), the same pairs."""
    LEVELS: gl.constexpr = (FROM // TO).bit_length() - 1
    for level in gl.static_range(LEVELS):
        x = gl.sum(gl.reshape(x, [2, FROM >> (level + 1), ROWS]), axis=0)
    return x


@gluon.jit
def _lanes_of(p, BLOCK_N: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr, WARPS: gl.constexpr):
    """The weights of a block, folded. A thread first gathers all keys of a lane: one trip, not one a level."""
    KEYS: gl.constexpr = BLOCK_N // LANES
    OWNED: gl.constexpr = gl.BlockedLayout([KEYS, 1, ROWS // 16], [1, 2, 16], [1, WARPS, 1], [2, 1, 0])
    x = gl.reshape(gl.convert_layout(gl.reshape(p, [KEYS, LANES, ROWS]), OWNED), [BLOCK_N, ROWS])
    return gl.convert_layout(_fold_keys(x, BLOCK_N, LANES, ROWS), LAYOUT)


@gluon.jit
def _decode_weights(s, m, p_tile, at, own_kv, pos, window, scale_log2, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """``_softmax_step`` with the keys down; the rounded weights go to shared memory, where the products want them."""
    seen = (at < own_kv)[:, None]
    if CAUSAL:
        seen = seen & (at[:, None] <= pos[None, :])
    if WINDOW:
        seen = seen & (at[:, None] > pos[None, :] - window)
    s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, axis=0) * scale_log2)
    base = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(gl.fma(s, gl.full_like(s, 0.0) + scale_log2, gl.expand_dims(-base, 0) + gl.full_like(s, 0.0)))
    p_tile.store(p.to(p_tile.dtype))
    fence_async_shared()
    return p, gl.exp2(m - base), m_new


@gluon.jit
def _decode_chunk(
    chunk, first_key, q, k_ring, v_ring, p_tile, bars, step, own_kv, pos, window, scale_log2, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, CHUNK: gl.constexpr, EARLY_CHUNK: gl.constexpr, EARLY: gl.constexpr,
    T_LAYOUT: gl.constexpr, L_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, ROWS: gl.constexpr,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """State after the blocks of a chunk, from nothing, and how many blocks the ring has seen."""
    k_full, k_empty, v_full, v_empty = bars[2], bars[3], bars[4], bars[5]
    T_COLS: gl.constexpr = gl.SliceLayout(0, T_LAYOUT)
    L_COLS: gl.constexpr = gl.SliceLayout(0, L_LAYOUT)
    key = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, T_LAYOUT))
    nothing = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=T_LAYOUT)
    first, last = _blocks_of(chunk, chunk + 1, first_key, own_kv, CHUNK, EARLY_CHUNK, EARLY, BLOCK_N)
    m = gl.full([ROWS], float("-inf"), gl.float32, layout=T_COLS)
    sums = gl.zeros([LANES, ROWS], gl.float32, layout=L_LAYOUT)
    acc = gl.zeros([HEAD_DIM, ROWS], gl.float32, layout=T_LAYOUT)
    if first < last:
        mbarrier.wait(k_full.index(step % STAGES), step // STAGES & 1)
        s = warpgroup_mma(k_ring.index(step % STAGES), q, nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(step % STAGES))
        for block in range(first, last - 1):
            slot = step % STAGES
            ahead = (step + 1) % STAGES
            if WINDOW:  # noqa: SIM102 (decided when compiled; the condition inside is not)
                if first_key > block * BLOCK_N:
                    mbarrier.wait(v_full.index(slot), step // STAGES & 1)
                    begin_row = first_key - block * BLOCK_N
                    _clear_outside(v_ring.index(slot), begin_row, BLOCK_N, BLOCK_N, HEAD_DIM, WARPS)
            mbarrier.wait(k_full.index(ahead), (step + 1) // STAGES & 1)
            s_next = warpgroup_mma(k_ring.index(ahead), q, nothing, use_acc=False, is_async=True)
            p, alpha, m = _decode_weights(
                s, m, p_tile, block * BLOCK_N + key, own_kv, pos, window, scale_log2, CAUSAL, WINDOW
            )
            acc = acc * alpha[None, :]
            mbarrier.wait(v_full.index(slot), step // STAGES & 1)
            o_next = warpgroup_mma(v_ring.index(slot).permute((1, 0)), p_tile, acc, is_async=True)
            shrink = gl.convert_layout(alpha, L_COLS)[None, :] + gl.zeros_like(sums)
            sums = gl.fma(sums, shrink, _lanes_of(p, BLOCK_N, ROWS, L_LAYOUT, WARPS))
            acc, s = warpgroup_mma_wait(0, deps=(o_next, s_next))
            mbarrier.arrive(v_empty.index(slot))
            mbarrier.arrive(k_empty.index(ahead))
            step += 1
        slot = step % STAGES
        p, alpha, m = _decode_weights(
            s, m, p_tile, (last - 1) * BLOCK_N + key, own_kv, pos, window, scale_log2, CAUSAL, WINDOW
        )
        acc = acc * alpha[None, :]
        mbarrier.wait(v_full.index(slot), step // STAGES & 1)
        begin_row = max(first_key - (last - 1) * BLOCK_N, 0)
        end_row = own_kv - (last - 1) * BLOCK_N
        if (begin_row > 0) | (end_row < BLOCK_N):
            _clear_outside(v_ring.index(slot), begin_row, end_row, BLOCK_N, HEAD_DIM, WARPS)
        o_next = warpgroup_mma(v_ring.index(slot).permute((1, 0)), p_tile, acc, is_async=True)
        shrink = gl.convert_layout(alpha, L_COLS)[None, :] + gl.zeros_like(sums)
        sums = gl.fma(sums, shrink, _lanes_of(p, BLOCK_N, ROWS, L_LAYOUT, WARPS))
        acc = warpgroup_mma_wait(0, deps=(o_next,))
        mbarrier.arrive(v_empty.index(slot))
        step += 1
    return m, sums, acc, step


@gluon.jit
def _store_part(place, m, sums, acc, rows, USED: gl.constexpr):
    """The sums of a chunk, to a place of their own: (rows, HEAD_DIM), then (rows, LANES), then (rows,)."""
    T_LAYOUT: gl.constexpr = acc.type.layout
    L_LAYOUT: gl.constexpr = sums.type.layout
    HEAD_DIM: gl.constexpr = acc.shape[0]
    row = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, T_LAYOUT))
    l_row = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, L_LAYOUT))
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(1, T_LAYOUT))
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(1, L_LAYOUT))
    gl.store(place + row[None, :] * HEAD_DIM + offs_d[:, None], acc, mask=(row < rows)[None, :])
    l_ptrs = place + USED * HEAD_DIM + l_row[None, :] * LANES + lane[:, None]
    gl.store(l_ptrs, sums, mask=(l_row < rows)[None, :])
    gl.store(place + USED * (HEAD_DIM + LANES) + row, m, mask=row < rows)


@gluon.jit
def _decode_attend(
    o_ptr, lse_ptr, partial_ptr, done_ptr, q_ring, k_ring, v_ring, p_tile, bars, q_len, kv_len, cu_q_ptr, cu_k_ptr,
    kv_lens_ptr, stride_o_seq, stride_o_token, stride_o_head, stride_lse_seq, stride_lse_head, most_chunks, most_jobs,
    scale_log2, heads_kv, batch, q_tiles, tokens, window, span, GROUP: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, VARLEN_Q: gl.constexpr, VARLEN_K: gl.constexpr, LENS: gl.constexpr, HAS_LSE: gl.constexpr,
    CHUNK: gl.constexpr, EARLY_CHUNK: gl.constexpr, EARLY: gl.constexpr, FINE: gl.constexpr, BLOCK_N: gl.constexpr,
    ROWS: gl.constexpr, USED: gl.constexpr, AHEAD: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    q_full, q_empty = bars[0], bars[1]
    DTYPE: gl.constexpr = o_ptr.dtype.element_ty
    # Everything is turned on its side: keys run along the tensor core's long side, queries along its short one.
    T_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 16])
    T_COLS: gl.constexpr = gl.SliceLayout(0, T_LAYOUT)
    L_LAYOUT: gl.constexpr = gl.BlockedLayout([1, ROWS // 16], [2, 16], [WARPS, 1], [1, 0])
    L_COLS: gl.constexpr = gl.SliceLayout(0, L_LAYOUT)
    PARTIAL: gl.constexpr = (HEAD_DIM + 16) * USED
    query = gl.arange(0, ROWS, layout=T_COLS)
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(1, T_LAYOUT))
    step = 0
    turn = 0
    for index in range(gl.program_id(0), most_jobs * q_tiles * batch * heads_kv, gl.num_programs(0)):
        where, sequence, seen, own = _job_at(
            index, q_len, kv_len, cu_q_ptr, cu_k_ptr, kv_lens_ptr, heads_kv, batch, q_tiles, tokens, window, span,
            CAUSAL, WINDOW, VARLEN_Q, VARLEN_K, LENS, CHUNK, EARLY_CHUNK, EARLY, FINE,
        )  # fmt: skip
        seq, head, tile, job, exists = where
        begin, end = own
        q_first, _, own_q, own_kv = sequence
        first_key, first_chunk, chunks, jobs = seen
        if exists:
            pos = own_kv - own_q + query // GROUP
            places = partial_ptr + tile.to(gl.int64) * most_chunks * PARTIAL
            out = o_ptr + seq.to(gl.int64) * stride_o_seq
            out_lse = lse_ptr
            if HAS_LSE:
                out_lse = lse_ptr + seq * stride_lse_seq + head * GROUP * stride_lse_head + q_first
            q = q_ring.index(turn % 2).permute((1, 0))
            if own_kv > 0:
                mbarrier.wait(q_full.index(turn % 2), turn // 2 & 1)
            if FINE:
                m, sums, acc, step = _decode_chunk(
                    begin, first_key, q, k_ring, v_ring, p_tile, bars, step, own_kv, pos, window, scale_log2, CAUSAL,
                    WINDOW, CHUNK, EARLY_CHUNK, EARLY, T_LAYOUT, L_LAYOUT, BLOCK_N, ROWS, HEAD_DIM, STAGES, WARPS,
                )  # fmt: skip
            else:
                m = gl.full([ROWS], float("-inf"), gl.float32, layout=T_COLS)
                sums = gl.zeros([LANES, ROWS], gl.float32, layout=L_LAYOUT)
                acc = gl.zeros([HEAD_DIM, ROWS], gl.float32, layout=T_LAYOUT)
                for chunk in range(begin, end):
                    m_next, sums_next, acc_next, step = _decode_chunk(
                        chunk, first_key, q, k_ring, v_ring, p_tile, bars, step, own_kv, pos, window, scale_log2,
                        CAUSAL, WINDOW, CHUNK, EARLY_CHUNK, EARLY, T_LAYOUT, L_LAYOUT, BLOCK_N, ROWS, HEAD_DIM,
                        STAGES, WARPS,
                    )  # fmt: skip
                    if job == 0:  # all chunks to the left are here
                        a, b, m = _weights_of(m, m_next)
                        acc = gl.fma(acc_next, b[None, :] + gl.zeros_like(acc), acc * a[None, :])
                        b_l = gl.convert_layout(b, L_COLS)[None, :] + gl.zeros_like(sums)
                        sums = gl.fma(sums_next, b_l, sums * gl.convert_layout(a, L_COLS)[None, :])
                    else:
                        place = places + (chunk - first_chunk) * PARTIAL
                        _store_part(place, m_next, sums_next, acc_next, own_q * GROUP, USED)
            if own_kv > 0:
                mbarrier.arrive(q_empty.index(turn % 2))
                turn += 1
            if jobs == 1:
                total = gl.convert_layout(gl.reshape(_fold_keys(sums, LANES, 1, ROWS), [ROWS]), T_COLS)
                result = gl.where((total == 0.0)[None, :], 0.0, acc * (1.0 / total)[None, :]) + 0.0
                used = query < own_q * GROUP
                token = (q_first + query // GROUP).to(gl.int64)
                o_cols = token * stride_o_token + (head * GROUP + query % GROUP) * stride_o_head
                gl.store(out + o_cols[None, :] + offs_d[:, None], result.to(DTYPE), mask=used[None, :])
                if HAS_LSE:
                    lse = gl.where(total == 0.0, float("-inf"), (m + gl.log2(total)) * 0.6931471805599453)
                    gl.store(out_lse + query % GROUP * stride_lse_head + query // GROUP, lse, mask=used)
            else:
                if FINE | (job == 0):  # to the place of its last chunk: so what is to be merged lies in one piece
                    _store_part(places + (end - 1 - first_chunk) * PARTIAL, m, sums, acc, own_q * GROUP, USED)
                wait_for_all_threads()
                if gl.atomic_add(done_ptr + tile, 1, sem="acq_rel") == jobs - 1:
                    wait_for_all_threads()
                    _, merged = _chunks_of(0, first_key, first_chunk, chunks, span, CHUNK, EARLY_CHUNK, EARLY, FINE)
                    _merge_all(
                        places + (merged - 1 - first_chunk) * PARTIAL, out, out_lse, chunks - merged + 1, q_first,
                        head, own_q, stride_o_token, stride_o_head, stride_lse_head, GROUP, HAS_LSE, USED, HEAD_DIM,
                        PARTIAL, AHEAD, WARPS,
                    )  # fmt: skip
                    gl.store(done_ptr + tile, 0)  # as the next launch wants to find it


@gluon.jit
def _merge_all(
    places, out, out_lse, chunks, q_first, head, own_q, stride_o_token, stride_o_head, stride_lse_head,
    GROUP: gl.constexpr, HAS_LSE: gl.constexpr, USED: gl.constexpr, HEAD_DIM: gl.constexpr, PARTIAL: gl.constexpr,
    AHEAD: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Merge what the jobs of a tile have put by, left to right, as the plan says, and write the result.

    Every column of a row carries along one of the row's lanes, so that nothing has to change hands on the way.
    """
    DTYPE: gl.constexpr = out.dtype.element_ty
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [64 // HEAD_DIM if HEAD_DIM < 64 else 1, 32], [WARPS, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    row = gl.arange(0, USED, layout=ROWS)
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    used = row < own_q * GROUP
    o_ptrs = places + row[:, None] * HEAD_DIM + offs_d[None, :]
    l_ptrs = places + USED * HEAD_DIM + row[:, None] * LANES + offs_d[None, :] % LANES
    m_ptrs = places + USED * (HEAD_DIM + LANES) + row
    m_all = gl.full([USED], float("-inf"), gl.float32, layout=ROWS)
    l_all = gl.zeros([USED, HEAD_DIM], gl.float32, layout=LAYOUT)
    total = gl.zeros([USED, HEAD_DIM], gl.float32, layout=LAYOUT)
    for start in range(0, chunks, AHEAD):
        # A chunk past the last one reads as nothing, and nothing changes no bit: so the loads can go in groups.
        # They go past L1, which may hold what lay there before.
        for ahead in gl.static_range(AHEAD):
            inside = used & (start + ahead < chunks)
            o_part = gl.load(o_ptrs + ahead * PARTIAL, mask=inside[:, None], other=0.0, cache_modifier=".cg")
            l_part = gl.load(l_ptrs + ahead * PARTIAL, mask=inside[:, None], other=0.0, cache_modifier=".cg")
            m_part = gl.load(m_ptrs + ahead * PARTIAL, mask=inside, other=float("-inf"), cache_modifier=".cg")
            a, b, m_all = _weights_of(m_all, m_part)
            b = b[:, None] + gl.zeros_like(total)
            total = gl.fma(o_part, b, total * a[:, None])
            l_all = gl.fma(l_part, b, l_all * a[:, None])
        o_ptrs += AHEAD * PARTIAL
        l_ptrs += AHEAD * PARTIAL
        m_ptrs += AHEAD * PARTIAL
    # Every stretch of LANES columns holds the same lanes, and the largest of equals is any of them.
    lanes = gl.reshape(l_all, [USED * HEAD_DIM // LANES, LANES])
    sums = gl.max(gl.reshape(_fold(lanes, LANES, 1), [USED, HEAD_DIM // LANES]), axis=1)
    sums = gl.convert_layout(sums, ROWS)
    result = gl.where((sums == 0.0)[:, None], 0.0, total * (1.0 / sums)[:, None]) + 0.0
    token = (q_first + row // GROUP).to(gl.int64)
    o_ptrs = out + (token * stride_o_token + (head * GROUP + row % GROUP) * stride_o_head)[:, None] + offs_d[None, :]
    gl.store(o_ptrs, result.to(DTYPE), mask=used[:, None])
    if HAS_LSE:
        lse = gl.where(sums == 0.0, float("-inf"), (m_all + gl.log2(sums)) * 0.6931471805599453)
        gl.store(out_lse + row % GROUP * stride_lse_head + row // GROUP, lse, mask=used)


@gluon.jit(do_not_specialize=["q_len", "kv_len", "batch", "q_tiles", "tokens", "most_chunks", "most_jobs", "span"])
def _attention_decode_kernel(
    q_ptr, q_desc, k_desc, v_desc, o_ptr, lse_ptr, partial_ptr, done_ptr, cu_q_ptr, cu_k_ptr, kv_lens_ptr,
    page_table_ptr,
    stride_page_table, stride_q_seq, stride_q_token, stride_q_head, stride_o_seq, stride_o_token, stride_o_head,
    stride_lse_seq, stride_lse_head, q_token_rows, k_seq_rows, k_head_rows, k_head_cols, q_len, kv_len, most_chunks,
    most_jobs, heads_kv, batch, q_tiles, tokens, window, span, page_size, scale_log2,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    VARLEN_Q: gl.constexpr, VARLEN_K: gl.constexpr, LENS: gl.constexpr, PAGED: gl.constexpr, HAS_LSE: gl.constexpr,
    CHUNK: gl.constexpr, EARLY_CHUNK: gl.constexpr, EARLY: gl.constexpr, FINE: gl.constexpr, ONE_QUERY: gl.constexpr,
    BLOCK_N: gl.constexpr, BOX: gl.constexpr, ROWS: gl.constexpr, USED: gl.constexpr, AHEAD: gl.constexpr,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, RING_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    q_ring = gl.allocate_shared_memory(k_desc.dtype, [2, ROWS, HEAD_DIM], q_desc.layout)
    p_tile = gl.allocate_shared_memory(k_desc.dtype, [BLOCK_N, ROWS], P_LAYOUT)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, HEAD_DIM], RING_LAYOUT)
    v_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, HEAD_DIM], RING_LAYOUT)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=1)
    fence_async_shared()
    wait_for_previous_launch()
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    k_rows = (k_seq_rows, k_head_rows, k_head_cols)
    # fmt: off
    gl.warp_specialize(
        [
            (_decode_attend, (o_ptr, lse_ptr, partial_ptr, done_ptr, q_ring, k_ring, v_ring, p_tile, bars, q_len,
                              kv_len, cu_q_ptr, cu_k_ptr, kv_lens_ptr, stride_o_seq, stride_o_token, stride_o_head,
                              stride_lse_seq, stride_lse_head, most_chunks, most_jobs, scale_log2, heads_kv, batch,
                              q_tiles, tokens, window, span, GROUP, CAUSAL, WINDOW, VARLEN_Q, VARLEN_K, LENS,
                              HAS_LSE, CHUNK, EARLY_CHUNK, EARLY, FINE, BLOCK_N, ROWS, USED, AHEAD, HEAD_DIM, STAGES,
                              num_warps)),
            (_decode_load, (q_ptr, q_desc, k_desc, v_desc, q_ring, k_ring, v_ring, bars, q_len, kv_len, cu_q_ptr,
                            cu_k_ptr, kv_lens_ptr, page_table_ptr, stride_page_table, stride_q_seq, stride_q_token,
                            stride_q_head, q_token_rows, k_rows, most_jobs, heads_kv, batch, q_tiles, tokens, window,
                            span, page_size, GROUP, CAUSAL, WINDOW, VARLEN_Q, VARLEN_K, LENS, PAGED, CHUNK,
                            EARLY_CHUNK, EARLY, FINE, ONE_QUERY, BLOCK_N, BOX, ROWS, HEAD_DIM, STAGES)),
        ],
        [1],
        [96],
    )
    # fmt: on


def chunks_ahead(chunks: int, elements: int) -> int:
    """How many chunks of ``elements`` weighted values a merge loads before it adds up the first.

    More hide the way to L2 where chunks are many, and are only more instructions where they are few.
    """
    registers = max(elements // 128, 1)  # of a thread, for one chunk
    return max(min((64 if chunks > 16 else 16) // registers, 16), 1)


def decode(
    call: AttentionCall, plan: AttentionPlan, schedule: AttentionSchedule, counters: torch.Tensor, sms: int
) -> None:
    """Fill ``call.out`` and ``call.lse`` by jobs of ``schedule.span`` keys of a tile, or of a chunk.

    The last job of a tile to finish, by ``counters`` (a zero for each), merges what they have put by.
    """
    q, k, v, out, lse, page_table = call.q, call.k, call.v, call.out, call.lse, call.page_table
    heads_q, head_dim, dtype = q.shape[2], q.shape[3], GLUON_TYPES[q.dtype]
    rows = schedule.block_m
    tokens = schedule.tokens(call.q_len, call.group)
    q_tiles = schedule.query_tiles(call.q_len, call.group)
    used = 1 << (tokens * call.group - 1).bit_length()
    box = plan.block if page_table is None else min(plan.block, k.shape[1])
    k_desc, k_rows = _rows(k, box, call.cu_k)
    v_desc, _ = _rows(v, box, call.cu_k)
    # One query a sequence: its heads, side by side in memory, are rows to TMA.
    step = q.stride(0) if call.cu_q is None else q.stride(1)
    one_query = call.q_len == 1 and q.stride(2) == head_dim and step % head_dim == 0
    q_rows = ((call.batch if call.cu_q is None else q.shape[1]) - 1) * (step // head_dim) + heads_q
    layout = gl.NVMMASharedLayout.get_default_for([rows, head_dim], dtype)
    q_desc = TensorDescriptor(q, [q_rows, head_dim], [head_dim, 1], [rows, head_dim], layout)
    most_chunks = max(plan.chunks(call.kv_len), 1)
    fine = schedule.span == plan.early_chunk
    most_jobs = most_chunks if fine else max(-(-call.kv_len // schedule.span), 1)
    tiles = call.batch * call.heads_kv * q_tiles
    partial = scratch(tiles * most_chunks * used * (head_dim + 16) if most_jobs > 1 else 1, q.device)
    stride_q, stride_o = (0 if call.cu_q is not None else x.stride(0) for x in (q, out))
    launch(
        _attention_decode_kernel, (min(sms, tiles * most_jobs),),
        q, q_desc, k_desc, v_desc, out, lse, partial, counters, call.cu_q, call.cu_k, call.kv_lens, page_table,
        0 if page_table is None else page_table.stride(0), stride_q, *q.stride()[1:3], stride_o, *out.stride()[1:3],
        *_lse_strides(call), step // head_dim, *k_rows, call.q_len, call.kv_len,
        most_chunks, most_jobs, call.heads_kv, call.batch, q_tiles, tokens, call.window or 0, schedule.span,
        k.shape[1], call.scale_log2, GROUP=call.group,
        CAUSAL=call.causal, WINDOW=call.window is not None, VARLEN_Q=call.cu_q is not None,
        VARLEN_K=call.cu_k is not None, LENS=call.kv_lens is not None, PAGED=page_table is not None,
        HAS_LSE=lse is not None, CHUNK=plan.chunk, EARLY_CHUNK=plan.early_chunk, EARLY=plan.early,
        FINE=fine, ONE_QUERY=one_query, BLOCK_N=plan.block, BOX=box, ROWS=rows, USED=used,
        AHEAD=chunks_ahead(most_chunks, used * head_dim),
        HEAD_DIM=head_dim, STAGES=schedule.num_stages,
        RING_LAYOUT=gl.NVMMASharedLayout.get_default_for([plan.block, head_dim], dtype),
        P_LAYOUT=gl.NVMMASharedLayout.get_default_for([plan.block, rows], dtype),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
