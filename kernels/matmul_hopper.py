"""Matmul for Hopper in Gluon, Triton's lower level: one warp loads, the others multiply.

The plan is ``kernels/matmul.py``'s and so are the bits; only the schedule is finer than plain Triton can say:

* A *producer* warp does nothing but ask TMA for tiles, as far ahead as the ring of buffers allows, across the
  borders of output tiles. The *consumer* warps do nothing but multiply (``wgmma``). Two barriers a buffer keep
  them in step: ``full`` when its bytes have arrived, ``empty`` when they have been multiplied.
* A tile may be ``block_n + tail_n`` wide, 128 + 64 say. Triton's tiles are powers of two; with a width of 192
  an output of 6144 columns and 512 rows is exactly one round of work for 128 of an H200's 132 SMs, where 128 leaves
  half of the second round idle and 256 a quarter of the only one.

Why it is batch-invariant: read ``_consume``. In every chunk of K an accumulator starts from zero and meets the K
steps in order; the chunks are added left to right and rounded once. Which rows lie in the tile does not enter.

Source: producer and consumer warps follow Nvidia's "Hopper tuning guide" and the CUTLASS 3 design; the bindings
are those of Triton's Gluon.
"""

from __future__ import annotations

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

GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _tile_of(tile, M, N, BLOCK_M: gl.constexpr, WIDE_N: gl.constexpr, GROUP_M: gl.constexpr):
    """First row and first column of a tile, as ``tile_of`` and ``start_of`` in ``kernels/matmul.py`` give them."""
    blocks_m = (M + BLOCK_M - 1) // BLOCK_M
    blocks_n = (N + WIDE_N - 1) // WIDE_N
    first_m = tile // (GROUP_M * blocks_n) * GROUP_M
    group = min(blocks_m - first_m, GROUP_M)
    inside = tile % (GROUP_M * blocks_n)
    start_m = (first_m + inside % group) * BLOCK_M
    start_n = inside // group * WIDE_N
    return min(start_m, max(M - BLOCK_M, 0)), min(start_n, max(N - WIDE_N, 0))


@gluon.jit
def _produce(
    a_desc,
    b_desc,
    tail_desc,
    a_ring,
    b_ring,
    tail_ring,
    full,
    empty,
    M,
    N,
    K,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TAIL_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    WIDE_N: gl.constexpr = BLOCK_N + TAIL_N
    STEP_BYTES: gl.constexpr = (BLOCK_M + WIDE_N) * BLOCK_K * 2
    tiles = ((M + BLOCK_M - 1) // BLOCK_M) * ((N + WIDE_N - 1) // WIDE_N)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        start_m, start_n = _tile_of(tile, M, N, BLOCK_M, WIDE_N, GROUP_M)
        for k in range(0, K, BLOCK_K):
            slot = step % STAGES
            # A fresh barrier counts as having completed the phase before its first: the first lap does not wait.
            mbarrier.wait(empty.index(slot), (step // STAGES + 1) & 1)
            arrived = full.index(slot)
            mbarrier.expect(arrived, STEP_BYTES)
            tma.async_copy_global_to_shared(a_desc, [start_m, k], arrived, a_ring.index(slot))
            tma.async_copy_global_to_shared(b_desc, [start_n, k], arrived, b_ring.index(slot))
            if TAIL_N > 0:
                tma.async_copy_global_to_shared(tail_desc, [start_n + BLOCK_N, k], arrived, tail_ring.index(slot))
            step += 1


@gluon.jit
def _consume(
    c_desc,
    c_tail_desc,
    a_ring,
    b_ring,
    tail_ring,
    c_tile,
    c_tail,
    full,
    empty,
    M,
    N,
    K,
    chunk_k,
    CHUNKS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TAIL_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    WIDE_N: gl.constexpr = BLOCK_N + TAIL_N
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_N, 16])
    TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, max(TAIL_N, 8), 16])
    tiles = ((M + BLOCK_M - 1) // BLOCK_M) * ((N + WIDE_N - 1) // WIDE_N)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        start_m, start_n = _tile_of(tile, M, N, BLOCK_M, WIDE_N, GROUP_M)
        for chunk in gl.static_range(CHUNKS):
            acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, LAYOUT)
            if TAIL_N > 0:
                tail = gl.zeros((BLOCK_M, TAIL_N), gl.float32, TAIL_LAYOUT)
            for k in range(chunk * chunk_k, min((chunk + 1) * chunk_k, K), BLOCK_K):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), (step // STAGES) & 1)
                a = a_ring.index(slot)
                acc = warpgroup_mma(a, b_ring.index(slot).permute((1, 0)), acc, is_async=True)
                # One step stays in flight, so that the tensor cores never run dry; the one before it has finished.
                if TAIL_N > 0:
                    tail = warpgroup_mma(a, tail_ring.index(slot).permute((1, 0)), tail, is_async=True)
                    acc, tail = warpgroup_mma_wait(2, deps=(acc, tail))
                else:
                    acc = warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > chunk * chunk_k)
                step += 1
            if TAIL_N > 0:
                acc, tail = warpgroup_mma_wait(0, deps=(acc, tail))
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
            if chunk == 0:
                total = acc
                if TAIL_N > 0:
                    total_tail = tail
            else:
                total += acc
                if TAIL_N > 0:
                    total_tail += tail
        tma.store_wait(0)  # the tile before may still be on its way out of the staging buffer
        c_tile.store(total.to(c_desc.dtype))
        if TAIL_N > 0:
            c_tail.store(total_tail.to(c_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(c_desc, [start_m, start_n], c_tile)
        if TAIL_N > 0:
            tma.async_copy_shared_to_global(c_tail_desc, [start_m, start_n + BLOCK_N], c_tail)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def _matmul_specialised_kernel(
    a_desc,
    b_desc,
    tail_desc,
    c_desc,
    c_tail_desc,
    M,
    N,
    K,
    chunk_k,
    CHUNKS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TAIL_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    num_warps: gl.constexpr,
):
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], b_desc.layout)
    c_tile = gl.allocate_shared_memory(c_desc.dtype, [BLOCK_M, BLOCK_N], c_desc.layout)
    if TAIL_N > 0:
        tail_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, TAIL_N, BLOCK_K], tail_desc.layout)
        c_tail = gl.allocate_shared_memory(c_desc.dtype, [BLOCK_M, TAIL_N], c_tail_desc.layout)
    else:
        tail_ring = b_ring
        c_tail = c_tile
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (c_desc, c_tail_desc, a_ring, b_ring, tail_ring, c_tile, c_tail, full, empty, M, N, K,
                        chunk_k, CHUNKS, BLOCK_M, BLOCK_N, TAIL_N, BLOCK_K, STAGES, GROUP_M, num_warps)),
            (_produce, (a_desc, b_desc, tail_desc, a_ring, b_ring, tail_ring, full, empty, M, N, K,
                        BLOCK_M, BLOCK_N, TAIL_N, BLOCK_K, STAGES, GROUP_M)),
        ],
        [1],  # warps of the producer
        [40],  # registers a thread of it; the consumers take what it leaves
    )
    # fmt: on


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], GLUON_TYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


def launch(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, plan, schedule, programs: int) -> None:
    """Fill ``c`` (M, N) with ``a @ b``; ``a`` (M, K) and ``b.t()`` (N, K) have their K elements side by side.

    ``plan`` is a ``MatmulPlan``, ``schedule`` a ``MatmulSchedule`` with ``specialised`` set, ``programs`` the grid.
    """
    (m, k), n = a.shape, b.shape[1]
    weight, tail_n = b.t(), schedule.tail_n
    _matmul_specialised_kernel[(programs,)](
        _descriptor(a, schedule.block_m, schedule.block_k),
        _descriptor(weight, schedule.block_n, schedule.block_k),
        _descriptor(weight, tail_n or schedule.block_n, schedule.block_k),
        _descriptor(c, schedule.block_m, schedule.block_n),
        _descriptor(c, schedule.block_m, tail_n or schedule.block_n),
        m,
        n,
        k,
        plan.chunk_k,
        CHUNKS=plan.chunks,
        BLOCK_M=schedule.block_m,
        BLOCK_N=schedule.block_n,
        TAIL_N=tail_n,
        BLOCK_K=schedule.block_k,
        STAGES=schedule.num_stages,
        GROUP_M=schedule.group_m,
        num_warps=schedule.num_warps,
    )
