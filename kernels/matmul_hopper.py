"""Matmul for Hopper in Gluon, Triton's lower level: one warp loads, the others multiply.

The plan is ``kernels/matmul.py``'s and so are the bits; only the schedule is finer than plain Triton can say:

* A *producer* warp does nothing but ask TMA for tiles, as far ahead as the ring of buffers allows, across the
  borders of output tiles. The *consumer* warps do nothing but multiply (``wgmma``). Two barriers a buffer keep
  them in step: ``full`` when its bytes have arrived, ``empty`` when they have been multiplied.
* The right operand's side of a tile may have two or three *parts*, 128 + 64 or 128 + 64 + 32 say. Triton's tiles are
  powers of two; with a width of 192 an output of 6144 columns and 512 rows is exactly one round of work for 128 of
  an H200's 132 SMs, where 128 leaves half of the second round idle and 256 a quarter of the only one. Swapped, the
  tokens are the right operand, and 777 of them are nearly four times 200, which is 128 + 64 + 8. What comes after the
  first part is the *tail*.
* Tails are *dealt out*, one to each tile, to some or to none: 777 tokens are also three times 256, and 9 more that
  any of the three tiles can take along. It is another one from round to round, so that no program meets all of them.
* All parts of a *wide* tile are multiplied by one instruction: they lie side by side in shared memory, and ``wgmma``
  may be any multiple of eight wide (``kernels/wgmma.py``). An instruction for each would read the left side anew.
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
from kernels.launch import let_next_launch_in, wait_for_previous_launch
from kernels.wgmma import ROW_BYTES, ROWS, check_first, shared_memory, wait_for_wgmma, warpgroup, wgmma

GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

wait_for_all_threads = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7


@gluon.jit
def block_of(tile, blocks_m, blocks_n, GROUP_M: gl.constexpr):
    """Row and column block of a tile, as ``tile_of`` in ``kernels/matmul.py`` gives them."""
    first_m = tile // (GROUP_M * blocks_n) * GROUP_M
    group = min(blocks_m - first_m, GROUP_M)
    inside = tile % (GROUP_M * blocks_n)
    return first_m + inside % group, inside // group


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
def _jobs_and_steps(blocks_m, blocks_n, K, chunk_k, CHUNKS: gl.constexpr, SPLIT: gl.constexpr, BLOCK_K: gl.constexpr):
    """Jobs of the launch (tiles, or chunks of tiles), and the K steps of each."""
    if SPLIT:
        return blocks_m * blocks_n * CHUNKS, (min(chunk_k, K) + BLOCK_K - 1) // BLOCK_K
    else:
        return blocks_m * blocks_n, (K + BLOCK_K - 1) // BLOCK_K


@gluon.jit
def _place(
    tile, M, N, blocks_m, blocks_n, tails,
    DEALT: gl.constexpr, SWAP: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr,
    REST: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Where a tile begins on the left operand's side, where each part does on the right one's, and whether it has its
    tail, which only matters if DEALT.
    """
    block_m, block_n = block_of(tile, blocks_m, blocks_n, GROUP_M)
    block, size, others = (block_m, M, block_n * LEFT) if SWAP else (block_n, N, block_m * LEFT)
    start_left = min(others, max((N if SWAP else M) - LEFT, 0))
    if DEALT:
        # The first to have one is another block of its line from round to round: `line * turn` is the round in which
        # the line begins, in 2048ths (below 2 ** 31 for any matrix that fits a GPU's memory). To divide by the number
        # of programs takes long, but it is the same division for all tiles, and so made only once.
        blocks = blocks_m if SWAP else blocks_n
        line = block_n if SWAP else block_m // GROUP_M
        turn = (min(blocks_m, GROUP_M) if SWAP else GROUP_M * blocks_n) * 2048 // gl.num_programs(0)
        after = block - (line * turn // 2048) % blocks
        after = gl.where(after < 0, after + blocks, after)
        tail = min(blocks * RIGHT + after * (TAIL + REST), max(size - TAIL - REST, 0))
        return start_left, (min(block * RIGHT, max(size - RIGHT, 0)), tail, tail + TAIL), after < tails
    else:
        start = min(block * (RIGHT + TAIL + REST), max(size - RIGHT - TAIL - REST, 0))
        return start_left, (start, start + RIGHT, start + RIGHT + TAIL), tile >= 0


@gluon.constexpr_function
def _total(descs, along):
    """Sum of the sides of the blocks of some descriptors."""
    return sum(desc.block_type.shape[along] for desc in descs)


@gluon.jit
def _rows_at(ring, eights, desc):
    """Room for a block of a descriptor in a ring of blocks of eight rows."""
    return ring.index(eights)._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def _buffers(left_desc, right_descs, rings, slot):
    """A slot's buffer for the left operand, and one for each part of the right one."""
    if len(rings) == 2:
        return rings[0].index(slot), (rings[1].index(slot),)
    else:  # one for both, where a slot is the left operand's rows and, right behind them, the right one's
        LEFT: gl.constexpr = left_desc.block_type.shape[0]
        first = slot * ((LEFT + _total(right_descs, 0)) // 8)
        rights = gl.tuple([])
        for part in gl.static_range(len(right_descs)):
            at = first + (LEFT + _total(right_descs[:part], 0)) // 8
            rights = rights + (_rows_at(rings[0], at, right_descs[part]),)  # noqa: RUF005 (Gluon does not unpack)
        return _rows_at(rings[0], first, left_desc), rights


@gluon.jit
def _produce(
    left_desc, right_descs, rings, full, empty, M, N, K, chunk_k, blocks_m, blocks_n, tails,
    CHUNKS: gl.constexpr, SPLIT: gl.constexpr, RELAY: gl.constexpr, DEALT: gl.constexpr, SWAP: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, REST: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = (LEFT + RIGHT) * BLOCK_K * 2
    TAIL_BYTES: gl.constexpr = (TAIL + REST) * BLOCK_K * 2
    jobs, steps = _jobs_and_steps(blocks_m, blocks_n, K, chunk_k, CHUNKS, SPLIT, BLOCK_K)
    turn, rounds, begin, end = _shares(jobs, steps, RELAY)
    step = 0
    for index in range(_pieces(rounds, begin, end, steps, RELAY)):
        job, first, last = _piece(index, turn, rounds, begin, end, steps, RELAY)
        tile, _chunk, start_k, end_k = _stretch(job, first, last, K, chunk_k, CHUNKS, SPLIT, BLOCK_K)
        start_left, starts, tailed = _place(
            tile, M, N, blocks_m, blocks_n, tails, DEALT, SWAP, LEFT, RIGHT, TAIL, REST, GROUP_M
        )
        for k in range(start_k, end_k, BLOCK_K):
            slot = step % STAGES
            # A fresh barrier counts as having completed the phase before its first: the first lap does not wait.
            mbarrier.wait(empty.index(slot), (step // STAGES + 1) & 1)
            arrived = full.index(slot)
            if DEALT:
                if tailed:
                    mbarrier.expect(arrived, BYTES + TAIL_BYTES)
                else:
                    mbarrier.expect(arrived, BYTES)
            else:
                mbarrier.expect(arrived, BYTES + TAIL_BYTES)
            left, rights = _buffers(left_desc, right_descs, rings, slot)
            tma.async_copy_global_to_shared(left_desc, [start_left, k], arrived, left)
            tma.async_copy_global_to_shared(right_descs[0], [starts[0], k], arrived, rights[0])
            for part in gl.static_range(1, len(rights)):
                tma.async_copy_global_to_shared(
                    right_descs[part], [starts[part], k], arrived, rights[part], pred=tailed if DEALT else True
                )
            step += 1


@gluon.jit
def sums_at(sums_ptr, like):
    """Addresses of a block of fp32 sums of the shape and layout of ``like``, row by row."""
    LAYOUT: gl.constexpr = like.type.layout
    rows = gl.arange(0, like.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, like.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    return sums_ptr + (rows[:, None] * like.shape[1] + columns[None, :])


@gluon.constexpr_function
def _piece_of(right, tail, rest):
    """Width of each of the tensors that a tile's sums are: one that every part is a multiple of."""
    return math.gcd(right, tail, rest)


@gluon.constexpr_function
def _widths_of(right, tail, rest, wide):
    """Widths of the instructions that multiply a tile."""
    return (right + tail + rest,) if wide else tuple(width for width in (right, tail, rest) if width)


@gluon.jit
def _nothing(LEFT: gl.constexpr, COLUMNS: gl.constexpr, PIECE: gl.constexpr, WARPS: gl.constexpr):
    """Zeros for a tile, in pieces of PIECE columns."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, PIECE, 16])
    sums = gl.tuple([])
    for _ in gl.static_range(COLUMNS // PIECE):
        sums = sums + (gl.zeros((LEFT, PIECE), gl.float32, LAYOUT),)  # noqa: RUF005 (Gluon does not unpack)
    return sums


@gluon.jit
def _plus(sums, more):
    """Two tiles, part by part."""
    totals = gl.tuple([])
    for part in gl.static_range(len(sums)):
        totals = totals + (sums[part] + more[part],)  # noqa: RUF005
    return totals


@gluon.jit
def _put_down(sums_ptr, sums):
    """Write a tile to memory, its parts one after another."""
    for part in gl.static_range(len(sums)):
        one = sums[part]
        gl.store(sums_at(sums_ptr, one), one)
        sums_ptr += one.shape[0] * one.shape[1]


@gluon.jit
def _pick_up(sums_ptr, like, wanted=None):
    """A tile like this one as another program has put it down; zeros if not ``wanted``."""
    sums = gl.tuple([])
    for part in gl.static_range(len(like)):
        sums = sums + (_pick_up_part(sums_ptr, like[part], wanted),)  # noqa: RUF005
        sums_ptr += like[part].shape[0] * like[part].shape[1]
    return sums


@gluon.jit
def _pick_up_part(sums_ptr, like, wanted):
    LAYOUT: gl.constexpr = like.type.layout
    # Past L1, which may hold what lay there before.
    if wanted is None:
        return gl.load(sums_at(sums_ptr, like), cache_modifier=".cg")
    else:
        mask = gl.full(like.shape, wanted, gl.int1, LAYOUT)
        return gl.load(sums_at(sums_ptr, like), mask=mask, other=0.0, cache_modifier=".cg")


@gluon.jit
def multiply(
    accs, step, start_k, end_k, left_ring, right_rings, full, empty, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr = 1, consumer: gl.constexpr = 0,
):  # fmt: skip
    """Add K steps, ``start_k`` to ``end_k``, to the parts of a tile, ``accs``, and give their buffers back.

    A step has CONSUMERS left operands, one beside the other, of which this is for number ``consumer``. A part of the
    tile has right operands of its own.
    """
    PARTS: gl.constexpr = len(accs)
    for k in range(start_k, end_k, BLOCK_K):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        left = left_ring.index(slot * CONSUMERS + consumer)
        begun = gl.tuple([])
        for part in gl.static_range(PARTS):
            right = right_rings[part].index(slot).permute((1, 0))
            begun = begun + (warpgroup_mma(left, right, accs[part], is_async=True),)  # noqa: RUF005
        # One step stays in flight, so that the tensor cores never run dry; the one before it has finished.
        accs = _all_but(PARTS, begun)
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > start_k)
        step += 1
    accs = _all_but(0, accs)
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=start_k < end_k)
    return accs, step


@gluon.jit
def multiply_wide(
    sums, step, start_k, end_k, full, empty, LEFT: gl.constexpr, RIGHT: gl.constexpr, WIDTHS: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """``multiply`` by instructions of any WIDTHS, of which ``sums`` are the columns.

    Of the ring, which begins where shared memory does, a slot holds LEFT rows of the left operand, then RIGHT rows of
    the right one.
    """
    ring = shared_memory()
    mine = warpgroup() * (ROWS * ROW_BYTES)
    for k in range(start_k, end_k, BLOCK_K):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        left = ring + slot * ((LEFT + RIGHT) * ROW_BYTES)
        sums = wgmma(sums, left + mine, left + LEFT * ROW_BYTES, WIDTHS, BLOCK_K, DTYPE)
        sums = wait_for_wgmma(sums, 1)
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > start_k)
        step += 1
    sums = wait_for_wgmma(sums, 0)
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=start_k < end_k)
    return sums, step


@gluon.jit
def _all_but(newest: gl.constexpr, accs):
    """``accs`` once all products have been added to them but the ``newest``."""
    if len(accs) == 1:
        return (warpgroup_mma_wait(newest, deps=accs),)
    else:
        return warpgroup_mma_wait(newest, deps=accs)


@gluon.jit
def _stage(buffer, pieces, bias_ptr, start_n, N, DTYPE: gl.constexpr, HAS_BIAS: gl.constexpr, SWAP: gl.constexpr):
    """Add the bias to the pieces of a part in fp32, round once, and lay them side by side in shared memory."""
    ALONG: gl.constexpr = 0 if SWAP else 1  # the weight's side
    WIDTH: gl.constexpr = pieces[0].shape[1]
    for piece in gl.static_range(len(pieces)):
        total = pieces[piece]
        if HAS_BIAS:
            offs = start_n + gl.arange(0, total.shape[ALONG], layout=gl.SliceLayout(1 - ALONG, total.type.layout))
            offs += 0 if SWAP else piece * WIDTH
            bias = gl.load(bias_ptr + offs, mask=offs < N, other=0.0).to(gl.float32)
            total += gl.expand_dims(bias, 1 - ALONG)
        room = buffer.slice(piece * WIDTH, WIDTH, 0 if SWAP else 1)
        if SWAP:
            room.permute((1, 0)).store(total.to(DTYPE))
        else:
            room.store(total.to(DTYPE))


@gluon.jit
def _store(descs, staging, sums, bias_ptr, start_left, starts, N, HAS_BIAS: gl.constexpr, SWAP: gl.constexpr,
           APART: gl.constexpr, BEGIN: gl.constexpr, END: gl.constexpr):  # fmt: skip
    """Add the bias in fp32, round once, and let TMA store what of the parts BEGIN to END lies inside the matrix."""
    ALONG: gl.constexpr = 0 if SWAP else 1  # the right side
    WIDTH: gl.constexpr = sums[0].shape[1]
    for part in gl.static_range(BEGIN, END):
        start_m = starts[part] if SWAP else start_left
        start_n = start_left if SWAP else starts[part]
        if part == 0 or not APART:
            tma.store_wait(0)  # what lay in the buffer before may still be on its way out
        pieces = sums[_total(descs[:part], ALONG) // WIDTH : _total(descs[: part + 1], ALONG) // WIDTH]
        _stage(staging[part], pieces, bias_ptr, start_n, N, descs[part].dtype, HAS_BIAS, SWAP)
        fence_async_shared()
        tma.async_copy_shared_to_global(descs[part], [start_m, start_n], staging[part])


@gluon.jit
def _consume(
    c_descs, bias_ptr, partial_ptr, done_ptr, rings, staging, full, empty, M, N, K, chunk_k,
    blocks_m, blocks_n, tails,
    HAS_BIAS: gl.constexpr, CHUNKS: gl.constexpr, SPLIT: gl.constexpr, RELAY: gl.constexpr, DEALT: gl.constexpr,
    SWAP: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, REST: gl.constexpr,
    WIDE: gl.constexpr, APART: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = len(c_descs)
    COLUMNS: gl.constexpr = RIGHT + TAIL + REST
    PIECE: gl.constexpr = _piece_of(RIGHT, TAIL, REST)
    PLAIN: gl.constexpr = RIGHT // PIECE  # pieces of a tile without its tail
    WIDTHS: gl.constexpr = _widths_of(RIGHT, TAIL, REST, WIDE)
    DTYPE: gl.constexpr = rings[0].dtype
    TILE: gl.constexpr = LEFT * COLUMNS
    TURNS: gl.constexpr = 1 if SPLIT else CHUNKS
    jobs, steps = _jobs_and_steps(blocks_m, blocks_n, K, chunk_k, CHUNKS, SPLIT, BLOCK_K)
    turn, rounds, begin, end = _shares(jobs, steps, RELAY)
    relay_ptr = partial_ptr  # of sums handed over; the sums of chunks lie behind them
    chunk_ptr = partial_ptr
    if RELAY:
        chunk_ptr += gl.num_programs(0) * TILE
    step = 0
    for index in range(_pieces(rounds, begin, end, steps, RELAY)):
        job, first, last = _piece(index, turn, rounds, begin, end, steps, RELAY)
        tile, chunk, start_k, end_k = _stretch(job, first, last, K, chunk_k, CHUNKS, SPLIT, BLOCK_K)
        start_left, starts, tailed = _place(
            tile, M, N, blocks_m, blocks_n, tails, DEALT, SWAP, LEFT, RIGHT, TAIL, REST, GROUP_M
        )
        for in_turn in gl.static_range(TURNS):
            accs = _nothing(LEFT, COLUMNS, PIECE, NUM_WARPS)
            if RELAY:
                going_on = first > 0  # from the sums of the program that began this job
                if going_on:
                    while gl.atomic_add(done_ptr + turn + 1, 0, sem="acquire") == 0:
                        pass
                # Loads that are masked out, not a branch around them: ptxas would put wgmma in single file.
                accs = _pick_up(relay_ptr + (turn + 1) * TILE, accs, going_on)
                if going_on:
                    gl.store(done_ptr + turn + 1, 0)  # as the next launch wants to find it
            if TURNS > 1:
                start_k = in_turn * chunk_k
                end_k = min(start_k + chunk_k, K)
            if PARTS == 1:
                accs, step = multiply(accs, step, start_k, end_k, rings[0], rings[1:], full, empty, BLOCK_K, STAGES)
            elif DEALT:
                # Two loops, each of which waits for its own: ptxas keeps wgmma in flight across no branch.
                if tailed:
                    accs, step = multiply_wide(
                        accs, step, start_k, end_k, full, empty, LEFT, COLUMNS, WIDTHS, BLOCK_K, STAGES, DTYPE
                    )
                else:
                    first_part, step = multiply_wide(
                        accs[:PLAIN], step, start_k, end_k, full, empty, LEFT, COLUMNS, (RIGHT,), BLOCK_K, STAGES,
                        DTYPE,
                    )  # fmt: skip
                    accs = first_part + accs[PLAIN:]
            else:
                accs, step = multiply_wide(
                    accs, step, start_k, end_k, full, empty, LEFT, COLUMNS, WIDTHS, BLOCK_K, STAGES, DTYPE
                )
            if in_turn == 0:
                totals = accs
            else:
                totals = _plus(totals, accs)
        complete = last == steps
        if RELAY:  # noqa: SIM102 - known when compiling, the other is not
            if not complete:  # another program goes on from here
                _put_down(relay_ptr + turn * TILE, totals)
                wait_for_all_threads()  # all have stored before one of them says so
                gl.atomic_add(done_ptr + turn, 1, sem="release")
        if SPLIT:
            if complete:
                first_ptr = chunk_ptr + tile.to(gl.int64) * (CHUNKS * TILE)
                _put_down(first_ptr + chunk * TILE, totals)
                wait_for_all_threads()
                count_ptr = done_ptr + RELAY * gl.num_programs(0) + tile
                if gl.atomic_add(count_ptr, 1, sem="acq_rel") == CHUNKS - 1:  # the last one finds all sums there
                    totals = _pick_up(first_ptr, totals)
                    for later in gl.static_range(1, CHUNKS):
                        totals = _plus(totals, _pick_up(first_ptr + later * TILE, totals))
                    _store(c_descs, staging, totals, bias_ptr, start_left, starts, N, HAS_BIAS, SWAP, APART, 0, PARTS)
                    gl.store(count_ptr, 0)
        elif complete:
            _store(c_descs, staging, totals, bias_ptr, start_left, starts, N, HAS_BIAS, SWAP, APART, 0, 1)
            if DEALT:
                if tailed:
                    _store(c_descs, staging, totals, bias_ptr, start_left, starts, N, HAS_BIAS, SWAP, APART, 1, PARTS)
            else:
                _store(c_descs, staging, totals, bias_ptr, start_left, starts, N, HAS_BIAS, SWAP, APART, 1, PARTS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "blocks_m", "blocks_n", "tails", "early"])
def _matmul_specialised_kernel(
    left_desc, right_desc, tail_desc, rest_desc, c_desc, c_tail_desc, c_rest_desc, bias_ptr, partial_ptr, done_ptr,
    M, N, K, chunk_k, blocks_m, blocks_n, tails, early,
    HAS_BIAS: gl.constexpr, CHUNKS: gl.constexpr, SPLIT: gl.constexpr, RELAY: gl.constexpr, SWAP: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, REST: gl.constexpr, WIDE: gl.constexpr,
    APART: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 1 + (TAIL > 0) + (REST > 0)
    DEALT: gl.constexpr = TAIL > 0 and not (SPLIT or RELAY)
    right_descs = (right_desc, tail_desc, rest_desc)[:PARTS]  # the others are None
    c_descs = (c_desc, c_tail_desc, c_rest_desc)[:PARTS]
    if PARTS == 1:
        left_ring = gl.allocate_shared_memory(left_desc.dtype, [STAGES, LEFT, BLOCK_K], left_desc.layout)
        right_ring = gl.allocate_shared_memory(right_desc.dtype, [STAGES, RIGHT, BLOCK_K], right_desc.layout)
        rings = (left_ring, right_ring)
    else:  # one ring for both operands, and the largest of all buffers: then it begins where shared memory does
        EIGHTS: gl.constexpr = STAGES * (LEFT + RIGHT + TAIL + REST) // 8
        rings = (gl.allocate_shared_memory(left_desc.dtype, [EIGHTS, 8, BLOCK_K], left_desc.layout),)
    staging = gl.tuple([])  # a buffer for each part of the result, or one for all if not APART
    for part in gl.static_range(PARTS):
        c = c_descs[part]
        if part == 0 or APART:
            buffer = gl.allocate_shared_memory(c.dtype, c.block_type.shape, c.layout)
        else:
            buffer = staging[0]._reinterpret(c.dtype, c.block_type.shape, c.layout)
        staging = staging + (buffer,)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()
    if early:
        let_next_launch_in()
    wait_for_previous_launch()
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (c_descs, bias_ptr, partial_ptr, done_ptr, rings, staging, full, empty, M, N, K, chunk_k,
                        blocks_m, blocks_n, tails, HAS_BIAS, CHUNKS, SPLIT, RELAY, DEALT, SWAP, LEFT, RIGHT, TAIL,
                        REST, WIDE, APART, BLOCK_K, STAGES, GROUP_M, num_warps)),
            (_produce, (left_desc, right_descs, rings, full, empty, M, N, K, chunk_k, blocks_m, blocks_n, tails,
                        CHUNKS, SPLIT, RELAY, DEALT, SWAP, LEFT, RIGHT, TAIL, REST, BLOCK_K, STAGES, GROUP_M)),
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
    cut: tuple[int, int, int],
    programs: int,
    partial: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> None:
    """Fill ``c`` (M, N) with ``a @ b + bias``; ``a`` (M, K), ``b.t()`` (N, K) have their K elements side by side.

    ``bias`` is ``None`` or (N,), contiguous. ``plan`` is a ``MatmulPlan``, ``schedule`` a ``MatmulSchedule`` with
    ``specialised`` set, ``cut`` what it makes of M and N, ``programs`` the grid. A schedule that splits or relays
    needs room for partial sums and zeroed counters, as ``scratch`` says.

    Raises:
        RuntimeError: this Triton lays out shared memory in another way than a tile with a tail needs.
    """
    (m, k), n = a.shape, b.shape[1]
    s, weight = schedule, b.t()
    left, right = (weight, a) if s.swap else (a, weight)
    parts = (*s.parts, 0, 0)[:3]
    compiled = launch_kernel(
        _matmul_specialised_kernel,
        (programs,),
        _descriptor(left, s.left, s.block_k),
        *(_descriptor(right, width, s.block_k) if width else None for width in parts),
        *(_descriptor(c, *((width, s.left) if s.swap else (s.left, width))) if width else None for width in parts),
        bias,
        partial,
        counters,
        m,
        n,
        k,
        plan.chunk_k,
        *cut,
        int(s.early),
        HAS_BIAS=bias is not None,
        CHUNKS=plan.chunks,
        SPLIT=s.split,
        RELAY=s.relay,
        SWAP=s.swap,
        LEFT=s.left,
        RIGHT=parts[0],
        TAIL=parts[1],
        REST=parts[2],
        WIDE=s.wide,
        APART=s.stores_apart,
        BLOCK_K=s.block_k,
        STAGES=s.num_stages,
        GROUP_M=s.group_m,
        num_warps=s.num_warps,
    )
    if len(s.parts) > 1:
        check_first(compiled, s.ring_bytes)


def scratch(tiles: int, plan, schedule, programs: int) -> tuple[int, int]:
    """How many fp32 sums and how many counters a launch needs room for: of relays first, then of chunks."""
    sums = programs * schedule.relay + tiles * plan.chunks * schedule.split
    return sums * math.prod(schedule.tile), programs * schedule.relay + tiles * schedule.split
