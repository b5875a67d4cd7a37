"""Matmul for Hopper in Gluon, Triton's lower level: one warp loads, the others multiply.

The plan is ``kernels/matmul.py``'s and so are the bits; only the schedule is finer than plain Triton can say:

* A *producer* warp does nothing but ask TMA for tiles, as far ahead as the ring of buffers allows, across the
  borders of output tiles. The *consumer* warps do nothing but multiply (``wgmma``). Two barriers a buffer keep
  them in step: ``full`` when its bytes have arrived, ``empty`` when they have been multiplied.
* The right operand's side of a tile may be wider by a tail, 128 + 64 say. Triton's tiles are powers of two; with a
  width of 192 an output of 6144 columns and 512 rows is exactly one round of work for 128 of an H200's 132 SMs, where
  128 leaves half of the second round idle and 256 a quarter of the only one. Swapped, the tokens are the right
  operand, and 777 of them are five times 160.
* If *ragged*, only one tile of each column of tiles has the tail: 777 tokens are three times 256, and 9 more that any
  of the three can take along. It is another one from round to round, so that no program meets all the tails.
* A *relay* leaves no SM idle in the last round: what remains is dealt out in equal shares of K steps, so that some
  tiles are begun by one program and finished by another, which takes over the accumulator as it is, all 32 bits of
  it. Whoever begins a tile does so first of all, whoever finishes it does so last: nobody waits.

Why it is batch-invariant: read ``_consume``. In every chunk of K an accumulator starts from zero and meets the K
steps in order; the chunks are added left to right and rounded once. Which rows lie in the tile does not enter, nor
does whose registers the accumulator is in.

Source: producer and consumer warps follow Nvidia's "Hopper tuning guide" and the CUTLASS 3 design; equal shares are
McNaughton's rule for jobs that may be interrupted ("Scheduling with deadlines and loss functions", 1959); the
bindings are those of Triton's Gluon.
"""

from __future__ import annotations

import math

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

from kernels.launch import launch as launch_kernel
from kernels.launch import wait_for_previous_launch

GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

wait_for_all_threads = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7


@gluon.jit
def tile_start(tile, M, N, TILE_M: gl.constexpr, TILE_N: gl.constexpr, GROUP_M: gl.constexpr):
    """First row and first column of a tile, as ``tile_of`` and ``start_of`` in ``kernels/matmul.py`` give them."""
    blocks_m = (M + TILE_M - 1) // TILE_M
    blocks_n = (N + TILE_N - 1) // TILE_N
    first_m = tile // (GROUP_M * blocks_n) * GROUP_M
    group = min(blocks_m - first_m, GROUP_M)
    inside = tile % (GROUP_M * blocks_n)
    start_m = (first_m + inside % group) * TILE_M
    start_n = inside // group * TILE_N
    return min(start_m, max(M - TILE_M, 0)), min(start_n, max(N - TILE_N, 0))


@gluon.jit
def _shares(jobs, steps, RELAY: gl.constexpr):
    """What one program has to do: rounds of whole jobs, and its share of what then remains, laid end to end.

    Of that line of K steps it gets ``begin`` to ``end``; both are zero without RELAY. Programs count backwards, so
    that each waits for one that was launched before it.
    """
    programs = gl.num_programs(0)
    turn = programs - 1 - gl.program_id(0)
    rounds = (jobs - turn + programs - 1) // programs
    begin = turn * 0
    end = begin
    if RELAY:
        rounds = jobs // programs - 1
        line = (jobs - rounds * programs) * steps
        share = (line + programs - 1) // programs
        begin = min(turn * share, line)
        end = min(begin + share, line)
    return turn, rounds, begin, end


@gluon.jit
def _piece(index, turn, rounds, begin, end, steps, RELAY: gl.constexpr):
    """Piece number ``index`` of a program: its job, and the first and the last (exclusive) of its K steps.

    A share that starts within a job holds the beginning of its K steps, and does it first. A share that ends within a
    job holds their end, and does it last.
    """
    programs = gl.num_programs(0)
    job = turn + index * programs
    first = index * 0
    last = first + steps
    if RELAY:
        ahead = begin % steps  # steps of the first job that are another program's
        heads = min(ahead, 1)
        job -= heads * programs
        if index < heads:
            job = rounds * programs + begin // steps
            last = steps - ahead
        elif index >= heads + rounds:
            at = (begin + steps - 1) // steps + index - heads - rounds
            job = rounds * programs + at
            first = max((at + 1) * steps - end, 0)
    return job, first, last


@gluon.jit
def _pieces(rounds, begin, end, steps, RELAY: gl.constexpr):
    """How many pieces a program has."""
    if RELAY:
        return min(begin % steps, 1) + rounds + (end + steps - 1) // steps - (begin + steps - 1) // steps
    else:
        return rounds


@gluon.jit
def _stretch(job, first, last, K, chunk_k, CHUNKS: gl.constexpr, SPLIT: gl.constexpr, BLOCK_K: gl.constexpr):
    """Tile and chunk of a job, and where along K its steps begin and end."""
    if SPLIT:
        base = job % CHUNKS * chunk_k
        return job // CHUNKS, job % CHUNKS, base + first * BLOCK_K, min(base + last * BLOCK_K, K)
    else:
        return job, job * 0, first * BLOCK_K, min(last * BLOCK_K, K)


@gluon.jit
def _row_blocks(M, RIGHT: gl.constexpr, TAIL: gl.constexpr):
    """Into how many blocks M rows are cut if RAGGED, as ``row_blocks`` in ``kernels/matmul.py`` has it."""
    return (max(M - TAIL, 1) + RIGHT - 1) // RIGHT


@gluon.jit
def _jobs_and_steps(
    M, N, K, chunk_k,
    CHUNKS: gl.constexpr, SPLIT: gl.constexpr, SWAP: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    TAIL: gl.constexpr, RAGGED: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Jobs of the launch (tiles, or chunks of tiles), and the K steps of each."""
    TILE_M: gl.constexpr = RIGHT + TAIL if SWAP else LEFT
    TILE_N: gl.constexpr = LEFT if SWAP else RIGHT + TAIL
    blocks_m = (M + TILE_M - 1) // TILE_M
    if RAGGED:
        blocks_m = _row_blocks(M, RIGHT, TAIL)
    tiles = blocks_m * ((N + TILE_N - 1) // TILE_N)
    if SPLIT:
        return tiles * CHUNKS, (min(chunk_k, K) + BLOCK_K - 1) // BLOCK_K
    else:
        return tiles, (K + BLOCK_K - 1) // BLOCK_K


@gluon.jit
def _place(
    tile, M, N,
    SWAP: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, RAGGED: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """First row and first column of a tile, the same of its tail, and whether it has one."""
    if RAGGED:
        blocks = _row_blocks(M, RIGHT, TAIL)
        column = tile // blocks
        bearer = column * blocks // gl.num_programs(0) % blocks  # of the tail: another one from round to round
        start_m = min(tile % blocks * RIGHT, max(M - RIGHT, 0))
        start_n = min(column * LEFT, max(N - LEFT, 0))
        return start_m, start_n, M - TAIL, start_n, (blocks * RIGHT < M) & (tile % blocks == bearer)
    else:
        TILE_M: gl.constexpr = RIGHT + TAIL if SWAP else LEFT
        TILE_N: gl.constexpr = LEFT if SWAP else RIGHT + TAIL
        start_m, start_n = tile_start(tile, M, N, TILE_M, TILE_N, GROUP_M)
        return start_m, start_n, start_m + RIGHT * SWAP, start_n + RIGHT * (not SWAP), True  # known when compiling


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
    chunk_k,
    CHUNKS: gl.constexpr,
    SPLIT: gl.constexpr,
    RELAY: gl.constexpr,
    SWAP: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    TAIL: gl.constexpr,
    RAGGED: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    BYTES: gl.constexpr = (LEFT + RIGHT) * BLOCK_K * 2
    TAIL_BYTES: gl.constexpr = TAIL * BLOCK_K * 2
    jobs, steps = _jobs_and_steps(M, N, K, chunk_k, CHUNKS, SPLIT, SWAP, LEFT, RIGHT, TAIL, RAGGED, BLOCK_K)
    turn, rounds, begin, end = _shares(jobs, steps, RELAY)
    step = 0
    for index in range(_pieces(rounds, begin, end, steps, RELAY)):
        job, first, last = _piece(index, turn, rounds, begin, end, steps, RELAY)
        tile, _chunk, start_k, end_k = _stretch(job, first, last, K, chunk_k, CHUNKS, SPLIT, BLOCK_K)
        start_m, start_n, tail_m, tail_n, tailed = _place(tile, M, N, SWAP, LEFT, RIGHT, TAIL, RAGGED, GROUP_M)
        if SWAP:
            start_left = start_n
            start_right = start_m
            start_tail = tail_m
        else:
            start_left = start_m
            start_right = start_n
            start_tail = tail_n
        for k in range(start_k, end_k, BLOCK_K):
            slot = step % STAGES
            # A fresh barrier counts as having completed the phase before its first: the first lap does not wait.
            mbarrier.wait(empty.index(slot), (step // STAGES + 1) & 1)
            arrived = full.index(slot)
            if tailed:
                mbarrier.expect(arrived, BYTES + TAIL_BYTES)
            else:
                mbarrier.expect(arrived, BYTES)
            tma.async_copy_global_to_shared(left_desc, [start_left, k], arrived, left_ring.index(slot))
            tma.async_copy_global_to_shared(right_desc, [start_right, k], arrived, right_ring.index(slot))
            if TAIL > 0:
                tma.async_copy_global_to_shared(
                    tail_desc, [start_tail, k], arrived, tail_ring.index(slot), pred=tailed
                )
            step += 1


@gluon.jit
def sums_at(sums_ptr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Addresses of a (ROWS, COLUMNS) block of fp32 sums."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    return sums_ptr + (rows[:, None] * COLUMNS + columns[None, :])


@gluon.jit
def _take_over(sums_ptr, wanted, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """A block of sums as another program has left it, zeros if not ``wanted``. Past L1, which may hold older ones."""
    mask = gl.full((ROWS, COLUMNS), wanted, gl.int1, LAYOUT)
    return gl.load(sums_at(sums_ptr, ROWS, COLUMNS, LAYOUT), mask=mask, other=0.0, cache_modifier=".cg")


@gluon.jit
def _add_up(sums_ptr, apart, CHUNKS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """The sum of CHUNKS blocks, ``apart`` elements from each other, first to last. Past L1 as well."""
    total = gl.load(sums_at(sums_ptr, ROWS, COLUMNS, LAYOUT), cache_modifier=".cg")
    for later in gl.static_range(1, CHUNKS):
        total += gl.load(sums_at(sums_ptr + later * apart, ROWS, COLUMNS, LAYOUT), cache_modifier=".cg")
    return total


@gluon.jit
def multiply(
    acc, tail, step, start_k, end_k, left_ring, right_ring, tail_ring, full, empty,
    TAIL: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr = 1, consumer: gl.constexpr = 0,
):  # fmt: skip
    """Add K steps, ``start_k`` to ``end_k``, to ``acc`` and, if TAIL, to ``tail``, and give their buffers back.

    A step has CONSUMERS left operands, one beside the other, of which this is for number ``consumer``.
    """
    for k in range(start_k, end_k, BLOCK_K):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        left = left_ring.index(slot * CONSUMERS + consumer)
        acc = warpgroup_mma(left, right_ring.index(slot).permute((1, 0)), acc, is_async=True)
        # One step stays in flight, so that the tensor cores never run dry; the one before it has finished.
        if TAIL > 0:
            tail = warpgroup_mma(left, tail_ring.index(slot).permute((1, 0)), tail, is_async=True)
            acc, tail = warpgroup_mma_wait(2, deps=(acc, tail))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > start_k)
        step += 1
    if TAIL > 0:
        acc, tail = warpgroup_mma_wait(0, deps=(acc, tail))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=start_k < end_k)
    return acc, tail, step


@gluon.jit
def _store(desc, staging, total, bias_ptr, start_m, start_n, N, HAS_BIAS: gl.constexpr, SWAP: gl.constexpr):
    """Add the bias in fp32, round once, and let TMA store what lies inside the matrix."""
    LAYOUT: gl.constexpr = total.type.layout
    if HAS_BIAS:
        ALONG: gl.constexpr = 0 if SWAP else 1  # the weight's side
        offs = start_n + gl.arange(0, total.shape[ALONG], layout=gl.SliceLayout(1 - ALONG, LAYOUT))
        bias = gl.load(bias_ptr + offs, mask=offs < N, other=0.0).to(gl.float32)
        total += gl.expand_dims(bias, 1 - ALONG)
    if SWAP:
        staging.permute((1, 0)).store(total.to(desc.dtype))
    else:
        staging.store(total.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [start_m, start_n], staging)


@gluon.jit
def _consume(
    c_desc,
    c_tail_desc,
    bias_ptr,
    partial_ptr,
    done_ptr,
    left_ring,
    right_ring,
    tail_ring,
    c_tile,
    c_tail,
    full,
    empty,
    M,
    N,
    K,
    chunk_k,
    HAS_BIAS: gl.constexpr,
    CHUNKS: gl.constexpr,
    SPLIT: gl.constexpr,
    RELAY: gl.constexpr,
    SWAP: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    TAIL: gl.constexpr,
    RAGGED: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    WIDE: gl.constexpr = RIGHT + TAIL
    TURNS: gl.constexpr = 1 if SPLIT else CHUNKS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, RIGHT, 16])
    TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, max(TAIL, 8), 16])
    jobs, steps = _jobs_and_steps(M, N, K, chunk_k, CHUNKS, SPLIT, SWAP, LEFT, RIGHT, TAIL, RAGGED, BLOCK_K)
    turn, rounds, begin, end = _shares(jobs, steps, RELAY)
    relay_ptr = partial_ptr  # of sums handed over; the sums of chunks lie behind them
    chunk_ptr = partial_ptr
    if RELAY:
        chunk_ptr += gl.num_programs(0) * LEFT * WIDE
    step = 0
    for index in range(_pieces(rounds, begin, end, steps, RELAY)):
        job, first, last = _piece(index, turn, rounds, begin, end, steps, RELAY)
        tile, chunk, start_k, end_k = _stretch(job, first, last, K, chunk_k, CHUNKS, SPLIT, BLOCK_K)
        start_m, start_n, tail_m, tail_n, tailed = _place(tile, M, N, SWAP, LEFT, RIGHT, TAIL, RAGGED, GROUP_M)
        for in_turn in gl.static_range(TURNS):
            if RELAY:
                going_on = first > 0  # from the sums of the program that began this job
                if going_on:
                    while gl.atomic_add(done_ptr + turn + 1, 0, sem="acquire") == 0:
                        pass
                next_ptr = relay_ptr + (turn + 1) * (LEFT * WIDE)
                # Loads that are masked out, not a branch around them: ptxas would put wgmma in single file.
                acc = _take_over(next_ptr, going_on, LEFT, RIGHT, LAYOUT)
                tail = gl.zeros((LEFT, max(TAIL, 8)), gl.float32, TAIL_LAYOUT)
                if TAIL > 0:
                    tail = _take_over(next_ptr + LEFT * RIGHT, going_on, LEFT, TAIL, TAIL_LAYOUT)
                if going_on:
                    gl.store(done_ptr + turn + 1, 0)  # as the next launch wants to find it
            else:
                acc = gl.zeros((LEFT, RIGHT), gl.float32, LAYOUT)
                tail = gl.zeros((LEFT, max(TAIL, 8)), gl.float32, TAIL_LAYOUT)
            if TURNS > 1:
                start_k = in_turn * chunk_k
                end_k = min(start_k + chunk_k, K)
            # Two loops, each of which waits for its own: ptxas keeps wgmma in flight across no branch.
            if tailed:
                acc, tail, step = multiply(acc, tail, step, start_k, end_k, left_ring, right_ring, tail_ring,
                                           full, empty, TAIL, BLOCK_K, STAGES)  # fmt: skip
            else:
                acc, tail, step = multiply(acc, tail, step, start_k, end_k, left_ring, right_ring, tail_ring,
                                           full, empty, 0, BLOCK_K, STAGES)  # fmt: skip
            if in_turn == 0:
                total = acc
                total_tail = tail
            else:
                total += acc
                total_tail += tail
        complete = last == steps
        if RELAY:  # noqa: SIM102 - known when compiling, the other is not
            if not complete:  # another program goes on from here
                mine_ptr = relay_ptr + turn * (LEFT * WIDE)
                gl.store(sums_at(mine_ptr, LEFT, RIGHT, LAYOUT), total)
                if TAIL > 0:
                    gl.store(sums_at(mine_ptr + LEFT * RIGHT, LEFT, TAIL, TAIL_LAYOUT), total_tail)
                wait_for_all_threads()  # all have stored before one of them says so
                gl.atomic_add(done_ptr + turn, 1, sem="release")
        if SPLIT:
            if complete:
                first_ptr = chunk_ptr + tile.to(gl.int64) * (CHUNKS * LEFT * WIDE)
                part_ptr = first_ptr + chunk * (LEFT * WIDE)
                gl.store(sums_at(part_ptr, LEFT, RIGHT, LAYOUT), total)
                if TAIL > 0:
                    gl.store(sums_at(part_ptr + LEFT * RIGHT, LEFT, TAIL, TAIL_LAYOUT), total_tail)
                wait_for_all_threads()
                count_ptr = done_ptr + RELAY * gl.num_programs(0) + tile
                if gl.atomic_add(count_ptr, 1, sem="acq_rel") == CHUNKS - 1:  # the last one finds all sums there
                    tma.store_wait(0)
                    total = _add_up(first_ptr, LEFT * WIDE, CHUNKS, LEFT, RIGHT, LAYOUT)
                    _store(c_desc, c_tile, total, bias_ptr, start_m, start_n, N, HAS_BIAS, SWAP)
                    if TAIL > 0:
                        total_tail = _add_up(first_ptr + LEFT * RIGHT, LEFT * WIDE, CHUNKS, LEFT, TAIL, TAIL_LAYOUT)
                        _store(c_tail_desc, c_tail, total_tail, bias_ptr, tail_m, tail_n, N, HAS_BIAS, SWAP)
                    gl.store(count_ptr, 0)
        elif complete:
            tma.store_wait(0)  # the tile before may still be on its way out of the staging buffer
            _store(c_desc, c_tile, total, bias_ptr, start_m, start_n, N, HAS_BIAS, SWAP)
            if TAIL > 0:  # noqa: SIM102 - known when compiling, the other is not
                if tailed:
                    _store(c_tail_desc, c_tail, total_tail, bias_ptr, tail_m, tail_n, N, HAS_BIAS, SWAP)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def _matmul_specialised_kernel(
    left_desc,
    right_desc,
    tail_desc,
    c_desc,
    c_tail_desc,
    bias_ptr,
    partial_ptr,
    done_ptr,
    M,
    N,
    K,
    chunk_k,
    HAS_BIAS: gl.constexpr,
    CHUNKS: gl.constexpr,
    SPLIT: gl.constexpr,
    RELAY: gl.constexpr,
    SWAP: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    TAIL: gl.constexpr,
    RAGGED: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    num_warps: gl.constexpr,
):
    left_ring = gl.allocate_shared_memory(left_desc.dtype, [STAGES, LEFT, BLOCK_K], left_desc.layout)
    right_ring = gl.allocate_shared_memory(right_desc.dtype, [STAGES, RIGHT, BLOCK_K], right_desc.layout)
    c_tile = gl.allocate_shared_memory(c_desc.dtype, c_desc.block_type.shape, c_desc.layout)
    if TAIL > 0:
        tail_ring = gl.allocate_shared_memory(right_desc.dtype, [STAGES, TAIL, BLOCK_K], tail_desc.layout)
        c_tail = gl.allocate_shared_memory(c_desc.dtype, c_tail_desc.block_type.shape, c_tail_desc.layout)
    else:
        tail_ring = right_ring
        c_tail = c_tile
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()
    wait_for_previous_launch()
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (c_desc, c_tail_desc, bias_ptr, partial_ptr, done_ptr, left_ring, right_ring, tail_ring,
                        c_tile, c_tail, full, empty, M, N, K, chunk_k, HAS_BIAS, CHUNKS, SPLIT, RELAY, SWAP,
                        LEFT, RIGHT, TAIL, RAGGED, BLOCK_K, STAGES, GROUP_M, num_warps)),
            (_produce, (left_desc, right_desc, tail_desc, left_ring, right_ring, tail_ring, full, empty, M, N, K,
                        chunk_k, CHUNKS, SPLIT, RELAY, SWAP, LEFT, RIGHT, TAIL, RAGGED, BLOCK_K, STAGES, GROUP_M)),
        ],
        [1],  # warps of the producer
        [40],  # registers a thread of it; the consumers take what it leaves
    )
    # fmt: on


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], GLUON_TYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


def launch(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    c: torch.Tensor,
    plan,
    schedule,
    programs: int,
    partial: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> None:
    """Fill ``c`` (M, N) with ``a @ b + bias``; ``a`` (M, K), ``b.t()`` (N, K) have their K elements side by side.

    ``bias`` is ``None`` or (N,), contiguous. ``plan`` is a ``MatmulPlan``, ``schedule`` a ``MatmulSchedule`` with
    ``specialised`` set, ``programs`` the grid. A schedule that splits or relays needs room for partial sums and
    zeroed counters, as ``scratch`` says.
    """
    (m, k), n = a.shape, b.shape[1]
    s, weight = schedule, b.t()
    left, right, wide, tail = (weight, a, s.block_m, s.tail_m) if s.swap else (a, weight, s.block_n, s.tail_n)
    tall = s.block_n if s.swap else s.block_m
    block, tail_block = ((wide, tall), (tail or wide, tall)) if s.swap else ((tall, wide), (tall, tail or wide))
    launch_kernel(
        _matmul_specialised_kernel,
        (programs,),
        _descriptor(left, tall, s.block_k),
        _descriptor(right, wide, s.block_k),
        _descriptor(right, tail or wide, s.block_k),
        _descriptor(c, *block),
        _descriptor(c, *tail_block),
        bias,
        partial,
        counters,
        m,
        n,
        k,
        plan.chunk_k,
        HAS_BIAS=bias is not None,
        CHUNKS=plan.chunks,
        SPLIT=s.split,
        RELAY=s.relay,
        SWAP=s.swap,
        LEFT=tall,
        RIGHT=wide,
        TAIL=tail,
        RAGGED=s.ragged,
        BLOCK_K=s.block_k,
        STAGES=s.num_stages,
        GROUP_M=s.group_m,
        num_warps=s.num_warps,
    )


def scratch(m: int, n: int, plan, schedule, programs: int) -> tuple[int, int]:
    """How many fp32 sums and how many counters a launch needs room for: of relays first, then of chunks."""
    tiles = schedule.tiles(m, n)
    sums = programs * schedule.relay + tiles * plan.chunks * schedule.split
    return sums * math.prod(schedule.tile), programs * schedule.relay + tiles * schedule.split
