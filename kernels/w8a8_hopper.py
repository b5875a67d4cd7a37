"""8-bit matmul for Hopper in Gluon: one warp loads, one or two groups of four warps multiply.

The plan is ``kernels/w8a8.py``'s and so are the bits. The ring of buffers and its barriers are those of
``kernels/matmul_hopper.py``; what is different follows from operands of half the size:

* A consumer is one warpgroup with rows of its own, and two of them share the right operand. They meet nowhere.
* Adding a stretch of e4m3 products up in fp32 should not keep the tensor cores waiting. Stretches go in pairs: while
  the first of a pair is added up, the tensor cores are at the second (``_sum_pair``), or at the tile's tail
  (``_sum_pair_with_tail``). At the end of a pair they do wait, and the two consumers pair differently, so that one of
  them has work under way meanwhile.
* Swapped, the weight's rows are the left operand and 16 to 64 tokens the right: a step along K is then mostly weight,
  and a dozen of them are under way, which is what it takes to keep memory busy.
* SPLIT programs can share a tile, each with a part of K. They leave their sums, one a stretch of the plan (one a part
  for int8), in global memory, and the last to finish adds them up from the first to the last.

Why it is batch-invariant: read ``_consume``. A stretch starts from zero and meets its K steps in order; stretches are
added left to right, by one program or by the last of several. int8 sums are exact anyway. The scales follow in one
order, rounding each time (the kernel is compiled without fused multiply-adds).

Source: promotion to fp32 every so many products follows the DeepSeek-V3 report, 2024; for the rest see
``kernels/matmul_hopper.py``.
"""

from __future__ import annotations

import torch
import triton
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

from kernels.launch import launch as launch_kernel
from kernels.launch import scratch, wait_for_previous_launch
from kernels.matmul_hopper import block_of, multiply, sums_at, wait_for_all_threads

GLUON_TYPES = {
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
}

MOST_STAGED = 128
"""Widest piece of an output tile that is staged in shared memory; 256 columns leave in two pieces."""


@gluon.constexpr_function
def _sum_type(int8):
    """What the tensor core adds up in."""
    return gl.int32 if int8 else gl.float32


@gluon.jit
def _tile_start(tile, M, N, TILE_M: gl.constexpr, TILE_N: gl.constexpr, GROUP_M: gl.constexpr):
    """First row and first column of a tile, as ``tile_of`` and ``start_of`` in ``kernels/matmul.py`` give them."""
    block_m, block_n = block_of(tile, (M + TILE_M - 1) // TILE_M, (N + TILE_N - 1) // TILE_N, GROUP_M)
    return min(block_m * TILE_M, max(M - TILE_M, 0)), min(block_n * TILE_N, max(N - TILE_N, 0))


@gluon.jit
def _part_of(part, stretches, SPLIT: gl.constexpr):
    """First and last (exclusive) stretch of a part of K."""
    each = (stretches + SPLIT - 1) // SPLIT
    return part * each, min((part + 1) * each, stretches)


@gluon.jit
def _produce(
    left_desc,
    right_desc,
    tail_desc,
    left_ring,
    right_ring,
    tail_ring,
    full,
    empty,
    M,
    N,
    K,
    stretch_k,
    SPLIT: gl.constexpr,
    SWAP: gl.constexpr,
    CONSUMERS: gl.constexpr,
    ROWS: gl.constexpr,
    RIGHT: gl.constexpr,
    TAIL: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    LEFT: gl.constexpr = CONSUMERS * ROWS
    TILE_M: gl.constexpr = RIGHT if SWAP else LEFT
    TILE_N: gl.constexpr = LEFT if SWAP else RIGHT + TAIL
    STEP_BYTES: gl.constexpr = (LEFT + RIGHT + TAIL) * BLOCK_K
    tiles = ((M + TILE_M - 1) // TILE_M) * ((N + TILE_N - 1) // TILE_N)
    stretches = (K + stretch_k - 1) // stretch_k
    step = 0
    for job in range(gl.program_id(0), tiles * SPLIT, gl.num_programs(0)):
        start_m, start_n = _tile_start(job // SPLIT, M, N, TILE_M, TILE_N, GROUP_M)
        first, last = _part_of(job % SPLIT, stretches, SPLIT)
        if SWAP:
            start_left = start_n
            start_right = start_m
        else:
            start_left = start_m
            start_right = start_n
        for k in range(first * stretch_k, min(last * stretch_k, K), BLOCK_K):
            slot = step % STAGES
            # A fresh barrier counts as having completed the phase before its first: the first lap does not wait.
            mbarrier.wait(empty.index(slot), (step // STAGES + 1) & 1)
            arrived = full.index(slot)
            mbarrier.expect(arrived, STEP_BYTES)
            for consumer in gl.static_range(CONSUMERS):
                box = left_ring.index(slot * CONSUMERS + consumer)
                tma.async_copy_global_to_shared(left_desc, [start_left + consumer * ROWS, k], arrived, box)
            tma.async_copy_global_to_shared(right_desc, [start_right, k], arrived, right_ring.index(slot))
            if TAIL > 0:
                tma.async_copy_global_to_shared(tail_desc, [start_right + RIGHT, k], arrived, tail_ring.index(slot))
            step += 1


@gluon.jit
def _add_up(sums_ptr, stretches, apart, zeros):
    """The sum of what lies at ``sums_ptr`` for each stretch, first to last, onto ``zeros``. Past L1.

    Four at a time, because each load takes as long as a trip to L2 and none waits for another. What is not there
    counts as zero.
    """
    LAYOUT: gl.constexpr = zeros.type.layout
    total = zeros
    at = sums_at(sums_ptr, zeros)
    for stretch in range(0, stretches, 4):
        for i in gl.static_range(4):
            there = gl.full(zeros.shape, stretch + i < stretches, gl.int1, LAYOUT)
            total += gl.load(at + (stretch + i) * apart, mask=there, other=0, cache_modifier=".cg")
    return total


@gluon.jit
def _halves(x, LAYOUT: gl.constexpr):
    """The left and the right half of the columns of ``x``: the same registers, shared out."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    left, right = gl.split(gl.permute(gl.reshape(x, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))
    return (
        gl.convert_layout(left, LAYOUT, assert_trivial=True),
        gl.convert_layout(right, LAYOUT, assert_trivial=True),
    )


@gluon.jit
def _store(
    desc,
    staging,
    total,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    start_m,
    start_n,
    M,
    N,
    HAS_BIAS: gl.constexpr,
    SWAP: gl.constexpr,
):
    """Scale, add the bias, round once, and let TMA store what lies inside the matrix."""
    LAYOUT: gl.constexpr = total.type.layout
    ALONG_M: gl.constexpr = 1 if SWAP else 0
    ALONG_N: gl.constexpr = 0 if SWAP else 1
    offs_m = start_m + gl.arange(0, total.shape[ALONG_M], layout=gl.SliceLayout(ALONG_N, LAYOUT))
    offs_n = start_n + gl.arange(0, total.shape[ALONG_N], layout=gl.SliceLayout(ALONG_M, LAYOUT))
    scale_a = gl.load(scale_a_ptr + offs_m, mask=offs_m < M, other=0.0)
    scale_b = gl.load(scale_b_ptr + offs_n, mask=offs_n < N, other=0.0)
    x = total.to(gl.float32) * gl.expand_dims(scale_a, ALONG_N) * gl.expand_dims(scale_b, ALONG_M)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
        x += gl.expand_dims(bias, ALONG_M)
    tma.store_wait(0)  # what went before may still be on its way out of the staging buffer
    if SWAP:
        staging.permute((1, 0)).store(x.to(desc.dtype))
    else:
        staging.store(x.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [start_m, start_n], staging)


@gluon.jit
def _sum_pair(
    total, step, left_ring, right_ring, full, empty,
    STEPS: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, consumer: gl.constexpr,
):  # fmt: skip
    """The next two stretches of STEPS steps onto ``total``, which takes the first while the second is summed.

    Unrolled: with sums under way from one turn of a loop to the next, ptxas waits after every instruction.
    """
    first = total  # any registers will do, as the first step does not look at what is in them
    second = total
    for i in gl.static_range(2 * STEPS):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        left = left_ring.index(slot * CONSUMERS + consumer)
        right = right_ring.index(slot).permute((1, 0))
        if i < STEPS:
            first = warpgroup_mma(left, right, first, use_acc=i > 0, is_async=True)
            if i > 0:
                first = warpgroup_mma_wait(1, deps=(first,))
        else:
            second = warpgroup_mma(left, right, second, use_acc=i > STEPS, is_async=True)
            if i == STEPS:
                first = warpgroup_mma_wait(1, deps=(first,))
                total += first
            else:
                second = warpgroup_mma_wait(1, deps=(second,))
        if i > 0:
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        step += 1
    second = warpgroup_mma_wait(0, deps=(second,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    return total + second, step


@gluon.jit
def _sum_pair_with_tail(
    total, total_tail, step, left_ring, right_ring, tail_ring, full, empty,
    STEPS: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, consumer: gl.constexpr,
):  # fmt: skip
    """As ``_sum_pair``, of a tile and its tail: the first stretch of each is added up while the other is at work."""
    acc = total
    tail = total_tail
    for i in gl.static_range(2 * STEPS):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        left = left_ring.index(slot * CONSUMERS + consumer)
        right = right_ring.index(slot).permute((1, 0))
        narrow = tail_ring.index(slot).permute((1, 0))
        if i == STEPS:
            acc = warpgroup_mma_wait(1, deps=(acc,))
            total += acc
        acc = warpgroup_mma(left, right, acc, use_acc=i % STEPS > 0, is_async=True)
        if i == STEPS:
            tail = warpgroup_mma_wait(1, deps=(tail,))
            total_tail += tail
        tail = warpgroup_mma(left, narrow, tail, use_acc=i % STEPS > 0, is_async=True)
        if i % STEPS > 0:
            acc, tail = warpgroup_mma_wait(2, deps=(acc, tail))
        if i > 0:
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        step += 1
    acc, tail = warpgroup_mma_wait(0, deps=(acc, tail))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    return total + acc, total_tail + tail, step


@gluon.jit
def _consume(
    c_desc,
    c_tail_desc,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    partial_ptr,
    done_ptr,
    left_ring,
    right_ring,
    tail_ring,
    c_tiles,
    c_tails,
    full,
    empty,
    M,
    N,
    K,
    stretch_k,
    INT8: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PROMOTE_K: gl.constexpr,
    SPLIT: gl.constexpr,
    SWAP: gl.constexpr,
    CONSUMERS: gl.constexpr,
    ROWS: gl.constexpr,
    RIGHT: gl.constexpr,
    TAIL: gl.constexpr,
    STAGED: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    consumer: gl.constexpr,
):
    LEFT: gl.constexpr = CONSUMERS * ROWS
    WIDE: gl.constexpr = RIGHT + TAIL
    TILE_M: gl.constexpr = RIGHT if SWAP else LEFT
    TILE_N: gl.constexpr = LEFT if SWAP else WIDE
    SUM: gl.constexpr = _sum_type(INT8)
    # Triton's int8 wgmma ends at 224 columns: 256 are two instructions of 128.
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(RIGHT, 128) if INT8 else RIGHT, 32])
    TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, max(TAIL, 8), 32])
    STAGED_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STAGED, 32])
    tiles = ((M + TILE_M - 1) // TILE_M) * ((N + TILE_N - 1) // TILE_N)
    stretches = (K + stretch_k - 1) // stretch_k
    c_tile = c_tiles.index(consumer)
    c_tail = c_tails.index(consumer)
    step = 0
    for job in range(gl.program_id(0), tiles * SPLIT, gl.num_programs(0)):
        tile = job // SPLIT
        start_m, start_n = _tile_start(tile, M, N, TILE_M, TILE_N, GROUP_M)
        if SWAP:
            start_n += consumer * ROWS
        else:
            start_m += consumer * ROWS
        first, last = _part_of(job % SPLIT, stretches, SPLIT)
        sums_ptr = partial_ptr  # those of this consumer's rows, one block a stretch
        if SPLIT > 1:
            sums_ptr += (tile.to(gl.int64) * CONSUMERS + consumer) * stretches * (ROWS * WIDE)
        total = gl.zeros((ROWS, RIGHT), SUM, LAYOUT)
        total_tail = gl.zeros((ROWS, max(TAIL, 8)), SUM, TAIL_LAYOUT)
        stretch = first
        while stretch < last:
            start_k = stretch * stretch_k
            pair = False
            if PROMOTE_K > 0 and SPLIT == 1:
                pair = ((stretch + consumer) % 2 == 0) & (start_k + 2 * PROMOTE_K <= K)
            if pair:
                if TAIL > 0:
                    total, total_tail, step = _sum_pair_with_tail(
                        total, total_tail, step, left_ring, right_ring, tail_ring, full, empty,
                        PROMOTE_K // BLOCK_K, STAGES, CONSUMERS, consumer,
                    )  # fmt: skip
                else:
                    total, step = _sum_pair(
                        total, step, left_ring, right_ring, full, empty,
                        PROMOTE_K // BLOCK_K, STAGES, CONSUMERS, consumer,
                    )  # fmt: skip
                stretch += 2
            else:
                accs = (gl.zeros((ROWS, RIGHT), SUM, LAYOUT),)
                if TAIL > 0:
                    accs = accs + (gl.zeros((ROWS, TAIL), SUM, TAIL_LAYOUT),)  # noqa: RUF005 (Gluon does not unpack)
                accs, step = multiply(
                    accs, step, start_k, min(start_k + stretch_k, K), left_ring, (right_ring, tail_ring), full, empty,
                    BLOCK_K, STAGES, CONSUMERS, consumer,
                )  # fmt: skip
                acc = accs[0]
                if SPLIT > 1:
                    stretch_ptr = sums_ptr + stretch * (ROWS * WIDE)
                    gl.store(sums_at(stretch_ptr, acc), acc)
                    if TAIL > 0:
                        gl.store(sums_at(stretch_ptr + ROWS * RIGHT, accs[1]), accs[1])
                elif PROMOTE_K > 0:
                    total += acc
                    if TAIL > 0:
                        total_tail += accs[1]
                else:
                    total = acc  # the only stretch
                    if TAIL > 0:
                        total_tail = accs[1]
                stretch += 1
        complete = True
        if SPLIT > 1:
            wait_for_all_threads()  # all have stored before one of them says so
            done = gl.atomic_add(done_ptr + tile * CONSUMERS + consumer, 1, sem="acq_rel")
            complete = done == SPLIT - 1  # the last one finds all sums there
            if complete:
                total = _add_up(sums_ptr, stretches, ROWS * WIDE, total)
                if TAIL > 0:
                    total_tail = _add_up(sums_ptr + ROWS * RIGHT, stretches, ROWS * WIDE, total_tail)
                gl.store(done_ptr + tile * CONSUMERS + consumer, 0)  # as the next launch wants to find it
        if complete:
            if STAGED < RIGHT:
                near, far = _halves(total, STAGED_LAYOUT)
                _store(c_desc, c_tile, near, scale_a_ptr, scale_b_ptr, bias_ptr, start_m, start_n, M, N,
                       HAS_BIAS, SWAP)  # fmt: skip
                _store(c_desc, c_tile, far, scale_a_ptr, scale_b_ptr, bias_ptr, start_m + STAGED * SWAP,
                       start_n + STAGED * (not SWAP), M, N, HAS_BIAS, SWAP)  # fmt: skip
            else:
                _store(c_desc, c_tile, total, scale_a_ptr, scale_b_ptr, bias_ptr, start_m, start_n, M, N,
                       HAS_BIAS, SWAP)  # fmt: skip
            if TAIL > 0:
                _store(c_tail_desc, c_tail, total_tail, scale_a_ptr, scale_b_ptr, bias_ptr, start_m, start_n + RIGHT,
                       M, N, HAS_BIAS, SWAP)  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def _w8a8_specialised_kernel(
    left_desc,
    right_desc,
    tail_desc,
    c_desc,
    c_tail_desc,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    partial_ptr,
    done_ptr,
    M,
    N,
    K,
    stretch_k,
    INT8: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PROMOTE_K: gl.constexpr,
    SPLIT: gl.constexpr,
    SWAP: gl.constexpr,
    CONSUMERS: gl.constexpr,
    ROWS: gl.constexpr,
    RIGHT: gl.constexpr,
    TAIL: gl.constexpr,
    STAGED: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    num_warps: gl.constexpr,
):
    left_ring = gl.allocate_shared_memory(left_desc.dtype, [STAGES * CONSUMERS, ROWS, BLOCK_K], left_desc.layout)
    right_ring = gl.allocate_shared_memory(right_desc.dtype, [STAGES, RIGHT, BLOCK_K], right_desc.layout)
    c_tiles = gl.allocate_shared_memory(
        c_desc.dtype, [CONSUMERS, c_desc.block_type.shape[0], c_desc.block_type.shape[1]], c_desc.layout
    )
    if TAIL > 0:
        tail_ring = gl.allocate_shared_memory(right_desc.dtype, [STAGES, TAIL, BLOCK_K], tail_desc.layout)
        c_tails = gl.allocate_shared_memory(
            c_desc.dtype,
            [CONSUMERS, c_tail_desc.block_type.shape[0], c_tail_desc.block_type.shape[1]],
            c_tail_desc.layout,
        )
    else:
        tail_ring = right_ring
        c_tails = c_tiles
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    fence_async_shared()
    wait_for_previous_launch()
    # Warps of each worker, and registers a thread of it; the first consumer takes what they leave.
    # fmt: off
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (c_desc, c_tail_desc, scale_a_ptr, scale_b_ptr, bias_ptr, partial_ptr, done_ptr, left_ring,
                            right_ring, tail_ring, c_tiles, c_tails, full, empty, M, N, K, stretch_k, INT8, HAS_BIAS,
                            PROMOTE_K, SPLIT, SWAP, CONSUMERS, ROWS, RIGHT, TAIL, STAGED, BLOCK_K, STAGES,
                            GROUP_M, 0)),
                (_produce, (left_desc, right_desc, tail_desc, left_ring, right_ring, tail_ring, full, empty, M, N, K,
                            stretch_k, SPLIT, SWAP, CONSUMERS, ROWS, RIGHT, TAIL, BLOCK_K, STAGES, GROUP_M)),
            ],
            [1],
            [40],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (c_desc, c_tail_desc, scale_a_ptr, scale_b_ptr, bias_ptr, partial_ptr, done_ptr, left_ring,
                            right_ring, tail_ring, c_tiles, c_tails, full, empty, M, N, K, stretch_k, INT8, HAS_BIAS,
                            PROMOTE_K, SPLIT, SWAP, CONSUMERS, ROWS, RIGHT, TAIL, STAGED, BLOCK_K, STAGES,
                            GROUP_M, 0)),
                (_consume, (c_desc, c_tail_desc, scale_a_ptr, scale_b_ptr, bias_ptr, partial_ptr, done_ptr, left_ring,
                            right_ring, tail_ring, c_tiles, c_tails, full, empty, M, N, K, stretch_k, INT8, HAS_BIAS,
                            PROMOTE_K, SPLIT, SWAP, CONSUMERS, ROWS, RIGHT, TAIL, STAGED, BLOCK_K, STAGES,
                            GROUP_M, 1)),
                (_produce, (left_desc, right_desc, tail_desc, left_ring, right_ring, tail_ring, full, empty, M, N, K,
                            stretch_k, SPLIT, SWAP, CONSUMERS, ROWS, RIGHT, TAIL, BLOCK_K, STAGES, GROUP_M)),
            ],
            [4, 1],
            [232, 40],
        )
    # fmt: on


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], GLUON_TYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


def geometry(plan, schedule) -> tuple[dict, dict[str, tuple[int, int]], int]:
    """What the kernel is compiled for, the box of every descriptor, and how many products lie in a stretch.

    int8 has one stretch for each part that K is cut into, e4m3 those of its plan.
    """
    s = schedule
    consumers = s.num_warps // 4
    rows = s.left // consumers
    right, tail = (s.block_m, 0) if s.swap else (s.block_n, s.tail_n)
    staged = min(right, MOST_STAGED)
    stretch_k = plan.promote_k or plan.k
    if plan.exact:
        stretch_k = triton.cdiv(plan.k, s.split * s.block_k) * s.block_k
    stretches = triton.cdiv(plan.k, stretch_k)
    parts = triton.cdiv(stretches, triton.cdiv(stretches, s.split))  # as many as have any of them
    turned = slice(None, None, -1 if s.swap else 1)
    boxes = {
        "left_desc": (rows, s.block_k),
        "right_desc": (right, s.block_k),
        "tail_desc": (tail or right, s.block_k),
        "c_desc": (rows, staged)[turned],
        "c_tail_desc": (rows, tail or staged)[turned],
    }
    options = {
        "INT8": plan.exact,
        "PROMOTE_K": 0 if plan.exact or stretches == 1 else stretch_k,
        "SPLIT": parts,
        "SWAP": s.swap,
        "CONSUMERS": consumers,
        "ROWS": rows,
        "RIGHT": right,
        "TAIL": tail,
        "STAGED": staged,
        "BLOCK_K": s.block_k,
        "STAGES": s.num_stages,
        "GROUP_M": s.group_m,
        "num_warps": 4,
    }
    return options, boxes, stretch_k


def launch(a, b, scale_a, scale_b, bias, c, plan, schedule, counters: torch.Tensor | None, sms: int) -> None:
    """Fill ``c`` (M, N) with ``a @ b`` scaled; ``a`` (M, K), ``b.t()`` (N, K) have their K elements side by side.

    ``scale_a`` (M,), ``scale_b`` and ``bias`` (N,) are contiguous, ``bias`` may be ``None``. ``plan`` is a
    ``W8A8Plan``, ``schedule`` a ``W8A8Schedule`` with ``specialised`` set. ``counters`` holds a zero for each
    consumer of each tile if the schedule splits, else it is ``None``. ``sms`` bounds the grid.
    """
    (m, k), n = a.shape, b.shape[1]
    options, boxes, stretch_k = geometry(plan, schedule)
    rows, columns = schedule.tile
    tiles = triton.cdiv(m, rows) * triton.cdiv(n, columns)
    partial = None
    if options["SPLIT"] > 1:
        sums = tiles * rows * columns * triton.cdiv(k, stretch_k)
        partial = scratch(sums, a.device, torch.int32 if plan.exact else torch.float32)
    weight = b.t()
    left, right = (weight, a) if schedule.swap else (a, weight)
    matrices = {"left_desc": left, "right_desc": right, "tail_desc": right, "c_desc": c, "c_tail_desc": c}
    launch_kernel(
        _w8a8_specialised_kernel,
        (min(sms, tiles * options["SPLIT"]),),
        *(_descriptor(x, *boxes[name]) for name, x in matrices.items()),
        scale_a,
        scale_b,
        bias,
        partial,
        counters if partial is not None else None,
        m,
        n,
        k,
        stretch_k,
        HAS_BIAS=bias is not None,
        **options,
        enable_fp_fusion=False,
    )
