"""Matmul: ``c = a @ b (+ bias)``, each output element summed along K as its plan says, whatever the batch.

Shapes: ``a`` is ``(M, K)``, ``b`` is ``(K, N)``, ``bias`` is ``(N,)``, ``c`` is ``(M, N)``. M counts tokens
(rows), N and K belong to the weight. Products accumulate in fp32; scales and bias are applied in fp32; one rounding
to the output dtype.

Why it is batch-invariant: an element of ``c`` is a sum over K of one row of ``a`` and one column of ``b``, and
``MatmulPlan`` fixes the order of that sum from N, K, dtype and precision. Which rows share a tile, how large
the tile is, which operand goes left, how many programs run and whether they take the chunks of K in turn or
side by side are all schedule: they decide where and when an element is computed, never what is added to what.

Source: the tiling is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008,
as Triton's own matmul tutorial lays it out; the persistent loop and TMA descriptors follow Nvidia's Hopper
programming model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import tuned
from kernels.checks import FLOATS, check_apart, check_float, check_like, check_shape
from kernels.launch import (
    fetch_into_l2,
    finished_counters,
    launch,
    let_next_launch_in,
    remembers,
    scratch,
    uncompiled,
    wait_for_previous_launch,
)
from kernels.plan import MatmulPlan, plan_matmul

# ---------------------------------------------------------------------------------------------- schedule


@dataclass(frozen=True)
class MatmulSchedule:
    """How the work is laid out on the GPU. No field changes a bit of the result.

    block_m, block_n, block_k: tile of ``c`` per program, and the length of one step along K.
    num_warps, num_stages: warps per program; depth of the load pipeline.
    swap: compute the transposed tile, with the weight as left operand, so that the tensor core's long side
        (64 on Hopper) runs along N and its short side (8 and up) along the tokens.
    persistent: one program per SM walks over many tiles and loads through TMA descriptors; otherwise one
        program per tile loads through pointers, which takes any strides.
    split: persistent, and the chunks of the plan are summed side by side, each by a program of its own; the last
        one to finish adds the sums up, in the plan's order. Otherwise one program takes the chunks in turn.
    specialised: persistent, and one warp loads while the others multiply (``kernels/matmul_hopper.py``).
    relay: specialised, and the last rounds are dealt out in equal shares of K steps: a tile that one program begins,
        another may finish. Where the plan has chunks, only together with ``split``.
    group_m: tiles of this many row blocks are visited together, so that they share weights in L2.
    tail_m, tail_n: a specialised tile may be ``block_m + tail_m`` high (if it is swapped) or ``block_n + tail_n``
        wide (if it is not), because a power of two often does not divide the work evenly among the SMs. A tail is the
        sum of one or two powers of two. As many tiles bear it as ``cut`` says; if sums leave through memory, because
        of ``split`` or ``relay``, all do.
    wide: of a specialised tile with a tail: one ``wgmma`` multiplies all parts, up to 256 columns, not one for each,
        which would read the left operand anew.
    early: persistent, and while it runs, programs of the next launch may be placed wherever an SM has room, to wait
        there. So that one begins sooner; but which of its programs are neighbours on the chip is left to chance.
    ahead: persistent and not specialised, and before the launch ahead has ended, so many elements along K of each row
        of the weight that a program multiplies first are fetched into L2.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    persistent: bool = False
    split: bool = False
    specialised: bool = False
    relay: bool = False
    group_m: int = 8
    tail_m: int = 0
    tail_n: int = 0
    wide: bool = False
    early: bool = False
    ahead: int = 0

    @property
    def parts(self) -> tuple[int, ...]:
        """Powers of two that a specialised tile's right side consists of: the block, then those of its tail."""
        tail = self.tail_m or self.tail_n
        width = self.block_m if self.swap else self.block_n
        return width, *(1 << bit for bit in reversed(range(tail.bit_length())) if tail >> bit & 1)

    @property
    def left(self) -> int:
        """How many rows a specialised tile's left side has: of the weight if ``swap``, else tokens."""
        return self.block_n if self.swap else self.block_m

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of ``c`` that one program computes at a time."""
        return self.block_m + self.tail_m, self.block_n + self.tail_n

    def cut(self, m: int, n: int, sms: int = 132) -> tuple[int, int, int]:
        """How ``m`` rows and ``n`` columns are cut: into how many row blocks, column blocks, and tails.

        The side on which a tile may have a tail is cut into blocks without, and what remains of it is dealt out as
        tails, to so many of these blocks. Few blocks that all bear one, many that bear none, or what lies between:
        on ``sms`` multiprocessors, the busiest should have the least to multiply.
        """
        return _cut(self, m, n, sms)

    def tiles(self, m: int, n: int, sms: int = 132) -> int:
        """How many tiles cover ``m`` rows and ``n`` columns."""
        return math.prod(self.cut(m, n, sms)[:2])

    @property
    def ring_bytes(self) -> int:
        """Bytes of all buffers for the operands of a specialised schedule, 16 bits an element."""
        return 2 * sum(self.tile) * self.block_k * self.num_stages

    @property
    def stores_apart(self) -> bool:
        """Whether each part of a specialised tile has room of its own where the result waits to be stored.

        Otherwise they pass through one buffer, one after the other: that costs time where K is short, but for some
        tiles it leaves room for one more step of the pipeline.
        """
        return self.ring_bytes + 2 * math.prod(self.tile) <= SHARED_BYTES - 1024

    @property
    def compiled(self) -> MatmulSchedule:
        """What of it is compiled: all but ``early`` and ``ahead``, which a kernel is told when it is launched."""
        return replace(self, early=False, ahead=0)

    def fits(self, plan: MatmulPlan) -> bool:
        """Whether a thread has registers for the sums of this tile: twice as many where chunks are added up in turn.

        More to spare, for addresses, where sums leave through memory. And whether there are chunks to split, and what
        a relay hands over is one sum, not one of several chunks.
        """
        if self.specialised and self.split and plan.chunks == 1:
            return False
        if self.relay and plan.chunks > 1 and not self.split:
            return False
        rows, columns = self.tile
        sums = 2 if plan.chunks > 1 and not self.split else 1
        most = 128 if self.split or self.relay else 192
        return sums * rows * columns <= most * 32 * self.num_warps


def _clocks(width: int) -> float:
    """Clocks of one ``wgmma``, 64 by ``width`` by 16: half a column, or until its operands are there.

    They arrive from shared memory at 128 bytes a clock, which takes longer below 64 columns.
    """
    return max(width / 2, 16 + width / 4)


def _step_clocks(schedule: MatmulSchedule, parts: tuple[int, ...]) -> float:
    """Clocks that ``parts`` of a specialised tile's right side take for 16 elements along K.

    To multiply, or until L2 has delivered, 84 bytes a clock: the longer of the two, and a tenth of the other, so that
    of tiles that multiply as much the one that loads less is preferred.
    """
    multiplied = _clocks(sum(parts)) if schedule.wide else sum(map(_clocks, parts))
    bills = schedule.left / 64 * multiplied, (schedule.left + sum(parts)) * 32 / 84
    return max(bills) + min(bills) / 10


@lru_cache(maxsize=65536)
def _cut(schedule: MatmulSchedule, m: int, n: int, sms: int) -> tuple[int, int, int]:
    """``MatmulSchedule.cut``."""
    rows, columns = schedule.tile
    tail = schedule.tail_m or schedule.tail_n
    if not tail or schedule.split or schedule.relay:
        blocks_m, blocks_n = triton.cdiv(m, rows), triton.cdiv(n, columns)
        return blocks_m, blocks_n, bool(tail) * (blocks_m if schedule.swap else blocks_n)
    parts = schedule.parts
    size, across = (m, triton.cdiv(n, columns)) if schedule.swap else (n, triton.cdiv(m, rows))
    plain = _step_clocks(schedule, parts[:1])
    more = _step_clocks(schedule, parts) - plain

    def tails(blocks: int) -> int:
        return triton.cdiv(max(size - blocks * parts[0], 0), tail)

    def cost(blocks: int) -> tuple[float, int]:
        rounds = triton.cdiv(blocks * across, sms)
        return rounds * plain + triton.cdiv(rounds * tails(blocks), blocks) * more, blocks

    blocks = min(range(triton.cdiv(size, parts[0] + tail), triton.cdiv(size, parts[0]) + 1), key=cost)
    return (blocks, across, tails(blocks)) if schedule.swap else (across, blocks, tails(blocks))


# Schedules for many rows, each with its share of the tensor cores' rate while all SMs are busy (H200, bf16).
PERSISTENT_TILES = (
    (MatmulSchedule(64, 64, 128, 4, 6, swap=True, persistent=True), 0.50),
    (MatmulSchedule(64, 128, 128, 4, 4, swap=True, persistent=True), 0.85),
    (MatmulSchedule(64, 256, 64, 4, 4, persistent=True), 0.75),
    (MatmulSchedule(128, 64, 64, 4, 4, swap=True, persistent=True), 0.60),
    (MatmulSchedule(128, 128, 64, 4, 4, persistent=True), 0.93),
    (MatmulSchedule(256, 128, 64, 8, 4, persistent=True), 1.00),
    (MatmulSchedule(128, 256, 64, 8, 4, persistent=True), 1.00),
)

SHARED_BYTES = 227 * 1024
"""Shared memory that one program may have on Hopper."""

WIDEST = 256
"""Columns of the widest ``wgmma``."""

THIN = 32
"""Up to this many rows the weight's bytes are all the cost, and its tile goes left."""


def specialised_schedule(
    left: int,
    right: int,
    tail: int = 0,
    *,
    swap: bool = False,
    split: bool = False,
    relay: bool = False,
    block_k: int | None = None,
) -> MatmulSchedule | None:
    """The specialised schedule of a tile, its pipeline as deep as shared memory allows.

    ``None`` if that is under 3 steps, or a tile with a tail has more than two warpgroups' rows on its left.

    Args:
        left, right, tail: its sides as ``wgmma`` sees them: ``left`` 64 or 128, or 256 without a tail; ``right`` a
            power of two and ``tail`` the sum of up to two not larger ones, from 8. The weight is the left operand if
            ``swap``, else the tokens are.
        block_k: length of a step along K; by default 128, for large tiles 64: two steps are always being multiplied,
            and the fewer bytes they hold, the more are under way. With a tail always 64.
    """
    if block_k is None:
        block_k = 64 if tail or (left + right > 144 and right > THIN) else 128
    room = SHARED_BYTES - 1024 - 2 * left * right  # where at least one part of the result waits to be stored
    stages = min(room // (2 * block_k * (left + right + tail)), 12)
    if stages < 3 or (tail and left > 128):
        return None
    warps = 4 if left == 64 else 8
    options = {"specialised": True, "split": split, "relay": relay, "wide": 0 < tail <= WIDEST - right}
    if swap:
        return MatmulSchedule(right, left, block_k, warps, stages, swap=True, tail_m=tail, **options)
    return MatmulSchedule(left, right, block_k, warps, stages, tail_n=tail, **options)


COMMON_TILES = ((64, 64, 0), (64, 64, 32), (64, 128, 0), (64, 128, 32), (64, 128, 96), (128, 64, 32), (128, 64, 48))
COMMON_TILES += ((128, 128, 0), (128, 128, 32), (128, 128, 64), (128, 256, 0))
SWAPPED_TILES = ((64, 32, 0), (64, 128, 72), (128, 64, 48))
"""Left, right and tail of the specialised tiles that serve most shapes; of the second ones the weight is on the left.

A model should not need many variants. With the estimate to choose among these they lose 2 to 3 % to each point's
fastest, in the mean over the many rows of the H200's ``tune.json``; more would gain little.
"""

SPECIALISED = tuple(specialised_schedule(*tile) for tile in COMMON_TILES)
SPECIALISED += tuple(specialised_schedule(*tile, swap=True) for tile in SWAPPED_TILES)
SPECIALISED += tuple(specialised_schedule(*tile, split=True) for tile in COMMON_TILES[:2])


def estimate_us(m: int, n: int, plan: MatmulPlan, schedule: MatmulSchedule, sms: int = 132) -> float:
    """Microseconds that a specialised schedule should take on an H200; on another Hopper the order should be alike.

    A tile is a left side in blocks of 64 by a right side that one instruction multiplies, or one for each part, and
    each takes its ``_clocks`` for 16 elements along K. Sums in fp32 travel at 16 bytes a clock. The clock is that of
    tensor cores under load, 1600 MHz: a chip that multiplies without pause slows down. All that overlaps with the
    bytes from memory, but not quite. It tells good tiles from bad ones rather than the best from the good: within a
    product it correlates with an H200's times by 0.73, among tiles within 15 % of the fastest by 0.48. For relays it
    is too hopeful, by a fifth in one record.
    """
    outputs = math.prod(schedule.tile)
    plain, heavy = _step_clocks(schedule, schedule.parts[:1]), _step_clocks(schedule, schedule.parts)
    chunks = plan.chunks if schedule.split else 1
    *blocks, tails = schedule.cut(m, n, sms)
    jobs = math.prod(blocks) * chunks
    handed_over = schedule.relay and jobs > sms
    rounds = jobs / sms if handed_over else triton.cdiv(jobs, sms)
    met = rounds * tails / blocks[0 if schedule.swap else 1]  # tails that the busiest program meets
    met = met if handed_over else math.ceil(met)
    busy = (rounds * plain + met * (heavy - plain)) * plan.k / chunks / 16 + rounds * outputs / 32
    busy += outputs / 4 * (2 * handed_over + (rounds + chunks) * (chunks > 1))  # sums written, and read again
    bills = busy / 1600, 2 * (m * plan.k + n * plan.k + m * n) / 4.2e6
    return max(bills) + min(bills) / 4 + 2 + 2 * (chunks > 1)


EARLY_US = 10
"""Up to so many microseconds by the estimate it pays more often than not to let the next launch in early (H200)."""


def thin_schedule(block_m: int, block_n: int, block_k: int, *, split: bool = False) -> MatmulSchedule | None:
    """The persistent schedule of a tile for few rows, the weight on its left; ``None`` if under 3 steps.

    Its pipeline is as deep as 205 KB of Hopper's shared memory allow: the rest is for what Triton stages there.
    """
    stages = min(205_000 // (2 * block_k * (block_m + block_n)), 8)
    if stages < 3:
        return None
    return MatmulSchedule(block_m, block_n, block_k, 4, stages, swap=True, persistent=True, split=split)


@lru_cache(maxsize=65536)
def choose_schedule(
    m: int,
    n: int,
    plan: MatmulPlan,
    itemsize: int,
    tma: bool,
    sms: int,
    specialised: bool = False,
    gpu: str | None = None,
) -> MatmulSchedule:
    """The schedule for ``m`` rows and ``n`` columns.

    What a tuner has found fastest for this shape on the GPU called ``gpu``, if it has. Otherwise: with few rows the
    weight's bytes are the cost, so thin tiles with the weight on the left and a deep pipeline. With many, the tensor
    cores' time is: of the large tiles, the one whose last wave of programs leaves the fewest SMs idle, on Hopper by
    the estimate; and where that is short, the launch is early.

    Args:
        tma: whether both operands can be loaded through TMA descriptors.
        sms: multiprocessors of the GPU.
        specialised: whether Hopper's specialised kernel may be used.
        gpu: its name, as torch gives it; ``None`` for the defaults alone.

    Raises:
        ValueError: the GPU's table is damaged, or names what is no schedule for ``plan``.
    """
    if specialised and gpu is not None and (found := tuned.find(gpu, n, plan.k, m)) is not None:
        try:
            schedule = MatmulSchedule(**found)
            check_schedule(schedule, plan)
        except (TypeError, ValueError) as error:
            where = tuned.path_of(gpu)
            raise ValueError(f"{where} is a table of another version ({error}): tune again, or delete it") from error
        return schedule
    stages = 3 if plan.chunks == 1 else 2  # a chunk's sum on top: within the 64 KB of AMD's shared memory
    if itemsize == 4:
        return _choose_fp32(m, plan, tma, stages)
    if not tma:
        if m <= THIN:
            return MatmulSchedule(max(16, triton.next_power_of_2(m)), 64, 64, 4, stages, swap=True)
        return MatmulSchedule(64, 64, 64, 4, stages) if m <= 64 else MatmulSchedule(128, 128, 32, 8, stages)
    thin = m <= THIN or (m <= 64 and plan.chunks > 1)
    if thin or specialised:
        estimate = partial(estimate_us, m, n, plan, sms=sms)
        fitting = (s for s in SPECIALISED if s.fits(plan))
        chosen = _choose_thin(m, n, plan, sms, specialised) if thin else min(fitting, key=estimate)
        return replace(chosen, early=specialised and estimate(chosen) < EARLY_US)

    def cost(candidate: tuple[MatmulSchedule, float]) -> float:
        schedule, rate = candidate
        waves = triton.cdiv(triton.cdiv(m, schedule.block_m) * triton.cdiv(n, schedule.block_n), sms)
        return waves * schedule.block_m * schedule.block_n / rate

    return min((tile for tile in PERSISTENT_TILES if tile[0].fits(plan)), key=cost)[0]


def _choose_thin(m: int, n: int, plan: MatmulPlan, sms: int, specialised: bool) -> MatmulSchedule:
    """The weight on the left, in tiles that give the busiest program the fewest columns; the wider of two that do.

    The wide one by the specialised kernel, if it may be used: for 28672 columns on an H200 the two kernels change
    places from record to record. The lowest tile whose jobs all run at once: where SMs would be idle, more programs
    ask memory for more, although each row block asks L2 for the weight anew. Otherwise one as high as the rows. What
    did not pay on an H200: tiles of 32 columns where those of 64 leave SMs idle.
    """
    split = plan.chunks > 1
    jobs = {width: triton.cdiv(n, width) * plan.chunks for width in (128, 64)}
    block_n = min(jobs, key=lambda width: triton.cdiv(jobs[width], sms) * width)
    low = (height for height in (16, 32) if triton.cdiv(m, height) * jobs[block_n] <= sms)
    block_m = next(low, max(16, triton.next_power_of_2(m)))
    if block_n == 128 and specialised:
        return specialised_schedule(block_n, block_m, swap=True, split=split)
    block_k = 128 if block_n == 128 or block_m > THIN else 256
    return thin_schedule(block_m, block_n, block_k, split=split)


def _choose_fp32(m: int, plan: MatmulPlan, tma: bool, stages: int) -> MatmulSchedule:
    """What a sweep on an H200 found best for fp32; where there is no TMA, within the shared memory of any GPU."""
    if plan.precision == "ieee":  # no tensor core multiplies fp32 exactly: tiles as low as the rows
        if m == 1:
            return MatmulSchedule(1, 64, 64, 4, stages)
        if m <= 64 and tma:
            split = plan.chunks > 1
            return MatmulSchedule(4, 128, 64, 4, 5 if m <= 16 else 3, swap=True, persistent=True, split=split)
        if m <= THIN:
            return MatmulSchedule(16, 64, 64, 4, stages, swap=True)
        return MatmulSchedule(128, 64, 16, 4, 4, swap=True) if m > 64 else MatmulSchedule(64, 64, 16, 4, 4, swap=True)
    split = tma and plan.chunks > 1
    if m <= THIN:
        return MatmulSchedule(16, 32, 64, 4, 4 if tma else stages, persistent=split, split=split)
    if m > 512 and tma and not split:
        return MatmulSchedule(128, 128, plan.block_k or 32, 8, 3, persistent=True)
    return MatmulSchedule(64, 64, 64, 4, 3, persistent=True, split=split) if tma else MatmulSchedule(64, 32, 64, 4, 2)


# ----------------------------------------------------------------------------------------------- helpers


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column block of program ``pid``: down GROUP_M row blocks, then one column block across."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M
    group = min(blocks_m - first_m, GROUP_M)
    return first_m + pid % (GROUP_M * blocks_n) % group, pid % (GROUP_M * blocks_n) // group


@triton.jit
def start_of(block, size, BLOCK: tl.constexpr):
    """First row (or column) of a block; the last block moves back inside the matrix if it would stick out.

    Its first rows are then computed twice, with the same bits. Seen on an H200: a tile with 63 of 64 rows outside
    takes half as long again as a full one, whether TMA fills the rows with zeros or pointers repeat a row.
    """
    return min(block * BLOCK, max(size - BLOCK, 0))


@triton.jit
def sum_chunk(
    a_desc,
    b_desc,
    start_m,
    start_n,
    start_k,
    end_k,
    PRECISION: tl.constexpr,
    SWAP: tl.constexpr,
    A_K_MAJOR: tl.constexpr,
    B_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile's sum over one chunk of K, left to right from zero; transposed if SWAP."""
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(start_k, end_k, BLOCK_K):
        if A_K_MAJOR:
            a = a_desc.load([start_m, k])
        else:
            a = tl.trans(a_desc.load([k, start_m]))
        if B_K_MAJOR:
            b = tl.trans(b_desc.load([start_n, k]))
        else:
            b = b_desc.load([k, start_n])
        if SWAP:
            acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_tile(c_ptr, bias_ptr, total, offs_m, offs_n, M, N, stride_cm, HAS_BIAS: tl.constexpr):
    """Add the bias in fp32, round once, store what lies inside the matrix."""
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_n[None, :]
    tl.store(c_ptrs, total.to(c_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


# ----------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["M"])
def _matmul_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    c_ptr,
    M,
    N,
    K,
    chunk_k,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    stride_batch_a,
    stride_batch_b,
    stride_batch_c,
    stride_bias_m,
    stride_bias_n,
    alpha,
    beta,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    wait_for_previous_launch()
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    batch = tl.program_id(1).to(tl.int64)
    a_ptr += batch * stride_batch_a
    b_ptr += batch * stride_batch_b
    c_ptr += batch * stride_batch_c
    offs_m = start_of(pid_m, M, BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_n = start_of(pid_n, N, BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the end of a matrix smaller than a tile repeat row 0: they need no mask in the loop.
    a_ptrs = a_ptr + tl.where(offs_m < M, offs_m, 0)[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + tl.where(offs_n < N, offs_n, 0)[None, :] * stride_bn
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for chunk in range(CHUNKS):
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(chunk * chunk_k, min((chunk + 1) * chunk_k, K), BLOCK_K):
            if EVEN_K:
                a = tl.load(a_ptrs)
                b = tl.load(b_ptrs)
            else:
                a = tl.load(a_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
                b = tl.load(b_ptrs, mask=offs_k[:, None] < K - k, other=0.0)
            if SWAP:
                acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
            a_ptrs += BLOCK_K * stride_ak
            b_ptrs += BLOCK_K * stride_bk
        total = tl.where(chunk > 0, total + acc, acc)
    if SWAP:
        total = tl.trans(total)
    inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + offs_m[:, None] * stride_bias_m + offs_n[None, :] * stride_bias_n
        bias = tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            # Written out: left to itself, the compiler fuses now the one product into the sum and now the other,
            # and which one it takes follows the tile.
            total = tl.fma(total, tl.full(total.shape, alpha, tl.float32), bias * beta)
        else:
            total += bias
    elif SCALED:
        total *= alpha
    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_n[None, :]
    tl.store(c_ptrs, total.to(c_ptr.dtype.element_ty), mask=inside)


@triton.jit
def fetch_ahead(
    b_ptr,
    stride_bn,
    ahead,
    tile,
    start_k,
    end_k,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Ask for the first ``ahead`` elements, from ``start_k`` on, of each row of the weight that a tile multiplies."""
    _pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_n = start_of(pid_n, N, BLOCK_N) + tl.arange(0, BLOCK_N)
    size = min(end_k - start_k, ahead) * (b_ptr.dtype.element_ty.primitive_bitwidth // 8) // 16 * 16
    fetch_into_l2(b_ptr + offs_n.to(tl.int64) * stride_bn + start_k, tl.where(offs_n < N, size, 0))


@triton.jit(do_not_specialize=["M", "early", "ahead"])
def _matmul_persistent_kernel(
    a_desc,
    b_desc,
    b_ptr,
    bias_ptr,
    c_ptr,
    M,
    N,
    K,
    chunk_k,
    stride_bn,
    stride_cm,
    early,
    ahead,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    SWAP: tl.constexpr,
    A_K_MAJOR: tl.constexpr,
    B_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    if early:
        let_next_launch_in()
    if ahead > 0:
        fetch_ahead(b_ptr, stride_bn, ahead, tl.program_id(0), 0, K, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    wait_for_previous_launch()
    num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        start_m = start_of(pid_m, M, BLOCK_M)
        start_n = tl.multiple_of(start_of(pid_n, N, BLOCK_N), 16)  # descriptors come with N a multiple of 16
        for chunk in tl.static_range(CHUNKS):
            acc = sum_chunk(a_desc, b_desc, start_m, start_n, chunk * chunk_k, min((chunk + 1) * chunk_k, K),
                            PRECISION, SWAP, A_K_MAJOR, B_K_MAJOR, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
            if chunk == 0:
                total = acc
            else:
                total += acc
        if SWAP:
            total = tl.trans(total)
        offs_m = start_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        store_tile(c_ptr, bias_ptr, total, offs_m, offs_n, M, N, stride_cm, HAS_BIAS)


@triton.jit(do_not_specialize=["M", "early", "ahead"])
def _matmul_split_kernel(
    a_desc,
    b_desc,
    b_ptr,
    bias_ptr,
    c_ptr,
    partial_ptr,
    done_ptr,
    M,
    N,
    K,
    chunk_k,
    stride_bn,
    stride_cm,
    early,
    ahead,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    SWAP: tl.constexpr,
    A_K_MAJOR: tl.constexpr,
    B_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    if early:
        let_next_launch_in()
    if ahead > 0:
        start_k = tl.program_id(0) % CHUNKS * chunk_k
        fetch_ahead(b_ptr, stride_bn, ahead, tl.program_id(0) // CHUNKS, start_k, min(start_k + chunk_k, K), M, N,
                    BLOCK_M, BLOCK_N, GROUP_M)  # fmt: skip
    wait_for_previous_launch()
    num_jobs = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N) * CHUNKS
    for job in tl.range(tl.program_id(0), num_jobs, tl.num_programs(0)):
        tile = job // CHUNKS
        chunk = job % CHUNKS
        pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        start_m = start_of(pid_m, M, BLOCK_M)
        start_n = tl.multiple_of(start_of(pid_n, N, BLOCK_N), 16)  # descriptors come with N a multiple of 16
        acc = sum_chunk(a_desc, b_desc, start_m, start_n, chunk * chunk_k, min((chunk + 1) * chunk_k, K),
                        PRECISION, SWAP, A_K_MAJOR, B_K_MAJOR, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        if SWAP:
            acc = tl.trans(acc)
        rows = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_N)
        tile_ptrs = partial_ptr + tile.to(tl.int64) * CHUNKS * BLOCK_M * BLOCK_N
        tile_ptrs += rows[:, None] * BLOCK_N + columns[None, :]
        tl.store(tile_ptrs + chunk * BLOCK_M * BLOCK_N, acc)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(done_ptr + tile, 1, sem="acq_rel") == CHUNKS - 1:
            # Whoever comes last finds all sums there. Past L1, which may hold what lay there before.
            total = tl.load(tile_ptrs, cache_modifier=".cg")
            for later in tl.static_range(1, CHUNKS):
                total += tl.load(tile_ptrs + later * BLOCK_M * BLOCK_N, cache_modifier=".cg")
            offs_m = start_m.to(tl.int64) + rows
            store_tile(c_ptr, bias_ptr, total, offs_m, start_n + columns, M, N, stride_cm, HAS_BIAS)
            tl.store(done_ptr + tile, 0)  # as the next launch wants to find it


# ---------------------------------------------------------------------------------------------- launchers


@lru_cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of ``device``; 4 for the CPU, where Triton's interpreter runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache
def gpu_name(device: torch.device) -> str:
    """The GPU's name, under which tuned tables are kept."""
    return torch.cuda.get_device_name(device)


@lru_cache
def has_tma(device: torch.device) -> bool:
    """Whether ``device`` has TMA and room for its tiles: Nvidia's 9.x and 10.x, with 227 KB of shared memory an SM.

    Nvidia's 12.x has TMA too, but 99 KB.
    """
    if device.type != "cuda":
        return True  # the interpreter plays TMA
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


@lru_cache
def has_wgmma(device: torch.device) -> bool:
    """Whether ``device`` runs the specialised kernel: Nvidia's 9.x, whose tensor cores are driven by wgmma."""
    return device.type == "cuda" and has_tma(device) and torch.cuda.get_device_capability(device)[0] == 9


def descriptor_fits(x: torch.Tensor) -> bool:
    """TMA wants 16-byte aligned rows, elements side by side along one axis, and no overlapping rows."""
    inner = 0 if x.stride(0) == 1 and x.stride(1) != 1 else 1
    outer_bytes = x.stride(1 - inner) * x.element_size()
    fits = x.stride(inner) == 1 and x.stride(1 - inner) >= x.shape[inner]
    return fits and outer_bytes % 16 == 0 and x.data_ptr() % 16 == 0


def _descriptor(x: torch.Tensor, block: tuple[int, int]) -> tuple[TensorDescriptor, bool]:
    """Descriptor of the matrix ``x`` cut into ``block`` tiles, and whether its last axis is the dense one."""
    if x.stride(1) == 1:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block)), True
    return TensorDescriptor(x.t(), list(x.t().shape), list(x.t().stride()), list(block[::-1])), False


@remembers
def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    precision: str = "ieee",
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    schedule: MatmulSchedule | None = None,
) -> torch.Tensor:
    """``a @ b + bias`` whose rows keep their bits whatever other rows ``a`` holds.

    Shapes follow ``torch.matmul``: ``(M, K) @ (K, N)``, vectors on either side, any number of leading axes, which
    broadcast. A matrix out of a batch has the bits that it has alone.

    Args:
        a: ``(..., M, K)`` or ``(K,)``, bfloat16, float16 or float32, any strides. One row is one token.
        b: ``(..., K, N)`` or ``(K,)``, dtype of ``a``, any strides (``weight.t()`` for a ``torch.nn.Linear``).
        bias: ``(N,)``, dtype of ``a``; added in fp32 before the one rounding.
        precision: how float32 operands are multiplied: ``"ieee"`` (exact products), ``"tf32"`` (operands
            cut to 10 bits after the leading one) or ``"tf32x3"`` (three TF32 products each). Belongs to the plan.
        out_dtype: of the result; that of ``a`` if not given.
        out: ``(M, N)`` of that dtype to write into, with the elements of a row side by side; for two matrices only.
        schedule: how to run it, for two matrices only; chosen from the sizes and the GPU if not given. Never changes
            a bit.

    Returns:
        The shape of ``torch.matmul``; ``out`` if given.

    Raises:
        TypeError: a dtype that is not supported or not that of ``a``.
        ValueError: ranks, sizes, devices or precision that do not fit; a schedule that the plan excludes; an
            ``out`` of another shape or that shares memory with an input.
    """
    check_float("a", a)
    check_like("b", b, "a", a)
    for name, x in (("a", a), ("b", b)):
        if x.ndim == 0:
            raise ValueError(f"{name} must have at least one axis, got {name}.shape=()")
    options = {"precision": precision, "out_dtype": out_dtype, "schedule": schedule}
    if out is not None and not a.ndim == b.ndim == 2:
        raise ValueError(f"out is for two matrices, got a.shape={tuple(a.shape)} and b.shape={tuple(b.shape)}")
    if a.ndim == 1:
        return matmul(a[None], b, bias, **options).squeeze(-2 if b.ndim > 1 else -1)
    if b.ndim == 1:
        return matmul(a, b[:, None], bias, **options).squeeze(-1)
    k = a.shape[-1]
    if b.shape[-2] != k:
        raise ValueError(
            f"inner sizes differ: a.shape={tuple(a.shape)} has K={k}, b.shape={tuple(b.shape)} has K={b.shape[-2]}"
        )
    if b.ndim > 2:
        if schedule is not None:
            raise ValueError(f"schedule is for two matrices, got b.shape={tuple(b.shape)} and schedule={schedule}")
        return _batched(a, b, bias, precision, out_dtype)
    rows = a.reshape(math.prod(a.shape[:-1]), k)
    c = _product(rows, b, _bias(bias, a, b), 1.0, 1.0, precision, out_dtype, out, schedule, "bias")
    return c.view(*a.shape[:-1], b.shape[-1])


@uncompiled
def addmm(
    addend: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    precision: str = "ieee",
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``beta * addend + alpha * (a @ b)``, as ``torch.addmm``, scaled and added in fp32 before the one rounding.

    Args:
        addend: dtype of ``a``, of a shape that broadcasts to ``(M, N)``. With ``beta`` zero it is not read.
        a, b: ``(M, K)`` and ``(K, N)``. With ``alpha`` zero they are not read.
        precision, out_dtype, out: as for ``matmul``, which also says what is raised.
    """
    check_float("a", a)
    check_like("b", b, "a", a)
    check_like("addend", addend, "a", a)
    if not a.ndim == b.ndim == 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a and b must be (M, K) and (K, N), got {tuple(a.shape)} and {tuple(b.shape)}")
    shape = (a.shape[0], b.shape[1])
    try:
        addend = addend.expand(shape)
    except RuntimeError:
        raise ValueError(f"addend.shape={tuple(addend.shape)} does not broadcast to {shape}") from None
    if not alpha:
        a, b = a[:, :0], b[:0]
    return _product(a, b, addend if beta else None, alpha, beta, precision, out_dtype, out, None, "addend")


def _bias(bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """``bias`` as a matrix whose rows are all the same row of memory."""
    if bias is None:
        return None
    check_like("bias", bias, "a", a)
    check_shape("bias", bias, (b.shape[-1],))
    return bias.expand(math.prod(a.shape[:-1]), b.shape[-1])


def _output(
    shape: tuple[int, int], a: torch.Tensor, out_dtype: torch.dtype | None, out: torch.Tensor | None, **others
) -> torch.Tensor:
    """``out``, checked, or a new tensor; ``others`` are the operands besides ``a``, by their names."""
    dtype = out_dtype or a.dtype
    if dtype not in FLOATS:
        raise TypeError(f"out_dtype must be bfloat16, float16 or float32, got out_dtype={dtype}")
    if out is None:
        return torch.empty(shape, dtype=dtype, device=a.device)
    check_shape("out", out, shape)
    if out.dtype != dtype or out.device != a.device:
        raise ValueError(f"out must be {dtype} on {a.device}, got out.dtype={out.dtype}, out.device={out.device}")
    if (out.shape[1] > 1 and out.stride(1) != 1) or (out.shape[0] > 1 and out.stride(0) < out.shape[1]):
        raise ValueError(f"out must have its rows one after another in memory, got out.stride()={out.stride()}")
    # Also the addend: where two tiles overlap, the second would add what the first has written.
    check_apart(out, a=a, **others)
    return out


def check_schedule(schedule: MatmulSchedule, plan: MatmulPlan) -> None:
    """Refuse what would leave out or add up something else than the plan says, or what no kernel can do.

    Raises:
        ValueError: the schedule is one of these.
    """
    if plan.chunks > 1 and plan.chunk_k % schedule.block_k:
        raise ValueError(f"schedule={schedule} steps over the ends of the chunks of {plan}: block_k must divide them")
    if (schedule.tail_m and not schedule.swap) or (schedule.tail_n and schedule.swap):
        raise ValueError(f"schedule={schedule} has a tail on its left side: tail_m wants swap, tail_n forbids it")
    if (schedule.tail_m or schedule.tail_n) and not schedule.specialised:
        raise ValueError(f"schedule={schedule} has a tail, so it must be specialised")
    parts = schedule.parts
    if len(parts) > 1 and (schedule.block_k != 64 or schedule.left != 16 * schedule.num_warps):
        raise ValueError(f"schedule={schedule} has a tail: block_k must be 64, and the left side 16 rows a warp")
    if schedule.wide and (len(parts) == 1 or sum(parts) > WIDEST):
        raise ValueError(f"schedule={schedule} is wide: it must have a tail, and no more than {WIDEST} columns")
    if schedule.specialised and min(parts) < 8:
        raise ValueError(f"schedule={schedule} has a tile of parts {parts}: wgmma takes no fewer than 8 columns")
    if schedule.specialised and max(parts) > parts[0]:
        raise ValueError(f"schedule={schedule} has a tile of parts {parts}: the first must be as wide as any")
    if len(parts) > 3:
        raise ValueError(f"schedule={schedule} has a tile of {len(parts)} parts, {parts}: three are the most")
    if schedule.early and not (schedule.persistent or schedule.specialised):
        raise ValueError(f"schedule={schedule} is early, so it must be persistent or specialised")
    if schedule.ahead and (schedule.specialised or not schedule.persistent):
        raise ValueError(f"schedule={schedule} fetches ahead, so it must be persistent, and not specialised")
    if schedule.ahead < 0:
        raise ValueError(f"schedule={schedule} fetches ahead={schedule.ahead} elements: none are the fewest")
    if schedule.relay and plan.chunks > 1 and not schedule.split:
        raise ValueError(f"schedule={schedule} hands over one sum, and {plan} has several: split them")


def _product(a, b, bias, alpha, beta, precision, out_dtype, out, schedule, bias_name: str) -> torch.Tensor:
    """One product of two matrices: plan, schedule, launch. ``bias`` is ``None`` or ``(M, N)`` of any strides; its
    caller knows it as ``bias_name``.
    """
    (m, k), n = a.shape, b.shape[1]
    plan = plan_matmul(n, k, a.element_size(), precision)
    c = _output((m, n), a, out_dtype, out, b=b, **{bias_name: bias})
    plain = alpha == beta == 1.0 and (bias is None or m == 1 or bias.stride(0) == 0)
    # Columns past a multiple of 16 break up the stores of a large tile, whose staging then outgrows shared memory.
    tma = plain and has_tma(a.device) and k > 0 and n % 16 == 0 and descriptor_fits(a) and descriptor_fits(b)
    k_major = a.stride(1) == 1 and b.stride(0) == 1
    specialised = tma and has_wgmma(a.device) and a.element_size() == 2 and k_major
    specialised = specialised and c.dtype == a.dtype and descriptor_fits(c)
    if schedule is None:
        gpu = gpu_name(a.device) if specialised else None
        usual = tma and (a.element_size() == 2 or k_major)  # fp32 tiles were tried with K elements side by side
        schedule = choose_schedule(m, n, plan, a.element_size(), usual, sm_count(a.device), specialised, gpu)
    check_schedule(schedule, plan)
    if plan.block_k is not None and (schedule.block_k != plan.block_k or schedule.swap):
        raise ValueError(f"schedule={schedule} is outside {plan}: its block_k and operand order are fixed")
    if (schedule.persistent or schedule.split) and not tma:
        raise ValueError(f"schedule={schedule} needs TMA descriptors, which these operands or this GPU rule out")
    if schedule.specialised and not specialised:
        raise ValueError(
            f"schedule={schedule} needs a Hopper GPU and 16-bit operands with their K elements side by side"
        )
    if m and n:
        _launch(a, b, bias, alpha, beta, c, plan, schedule)
    return c


MOST_BATCHES = 65535
"""Programs along the second axis of a CUDA grid."""


def _batched(a, b, bias, precision, out_dtype) -> torch.Tensor:
    """Products of matrices over leading axes that broadcast, by the kernel that takes any strides."""
    try:
        leading = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        raise ValueError(f"a.shape={tuple(a.shape)} and b.shape={tuple(b.shape)} do not broadcast") from None
    (m, k), n = a.shape[-2:], b.shape[-1]
    if bias is not None:
        check_like("bias", bias, "a", a)
        check_shape("bias", bias, (n,))
        bias = bias.expand(m, n)
    plan = plan_matmul(n, k, a.element_size(), precision)
    count = math.prod(leading)
    c = _output((count * m, n), a, out_dtype, None).view(count, m, n)
    a = a.expand(*leading, m, k).reshape(count, m, k)
    b = b.expand(*leading, k, n).reshape(count, k, n)
    schedule = choose_schedule(m, n, plan, a.element_size(), False, sm_count(a.device))
    for at in range(0, count if m and n else 0, MOST_BATCHES):
        part = slice(at, at + MOST_BATCHES)
        _launch_pointers(a[part], b[part], bias, 1.0, 1.0, c[part], plan, schedule)
    return c.view(*leading, m, n)


def _options(plan: MatmulPlan, schedule: MatmulSchedule, bias: torch.Tensor | None) -> dict:
    return {
        "HAS_BIAS": bias is not None,
        "PRECISION": plan.precision,
        "CHUNKS": plan.chunks,
        "SWAP": schedule.swap,
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "BLOCK_K": schedule.block_k,
        "GROUP_M": schedule.group_m,
        "num_warps": schedule.num_warps,
        "num_stages": schedule.num_stages,
    }


def _launch_pointers(a, b, bias, alpha, beta, c, plan: MatmulPlan, schedule: MatmulSchedule) -> None:
    """``a`` (batch, M, K), ``b`` (batch, K, N), ``c`` (batch, M, N), ``bias`` ``None`` or (M, N)."""
    (count, m, k), n = a.shape, b.shape[2]
    tiles = triton.cdiv(m, schedule.block_m) * triton.cdiv(n, schedule.block_n)
    launch(
        _matmul_kernel,
        (tiles, count),
        a,
        b,
        bias,
        c,
        m,
        n,
        k,
        plan.chunk_k,
        *a.stride()[1:],
        *b.stride()[1:],
        c.stride(1),
        a.stride(0),
        b.stride(0),
        c.stride(0),
        *((0, 0) if bias is None else bias.stride()),
        alpha,
        beta,
        SCALED=not alpha == beta == 1.0,
        EVEN_K=k % schedule.block_k == 0,
        **_options(plan, schedule, bias),
    )


def _launch(a, b, bias, alpha, beta, c, plan: MatmulPlan, schedule: MatmulSchedule) -> None:
    (m, k), n = a.shape, b.shape[1]
    if not (schedule.persistent or schedule.specialised):
        _launch_pointers(a[None], b[None], bias, alpha, beta, c[None], plan, schedule)
        return
    sms = sm_count(a.device)
    tiles = schedule.tiles(m, n, sms)
    options = _options(plan, schedule, bias)
    bias = None if bias is None else bias[0].contiguous()
    if schedule.specialised:
        from kernels import matmul_hopper  # Gluon: needed on Hopper alone

        partial, counters = None, None
        if schedule.split or schedule.relay:
            programs = min(sms, tiles * (plan.chunks if schedule.split else 1))
            sums, count = matmul_hopper.scratch(tiles, plan, schedule, programs)
            counters = finished_counters(count, a.device)
            if counters is None:
                schedule = replace(schedule, split=False, relay=False)
            else:
                partial = scratch(sums, a.device)
        if counters is None:
            programs = min(sms, schedule.tiles(m, n, sms))
        matmul_hopper.launch(a, b, bias, c, plan, schedule, schedule.cut(m, n, sms), programs, partial, counters)
        return
    a_desc, options["A_K_MAJOR"] = _descriptor(a, (schedule.block_m, schedule.block_k))
    b_desc, b_n_major = _descriptor(b, (schedule.block_k, schedule.block_n))
    options["B_K_MAJOR"] = not b_n_major
    sizes = (m, n, k, plan.chunk_k, b.stride(1), c.stride(0))
    operands, when = (a_desc, b_desc, b, bias, c), (int(schedule.early), 0 if b_n_major else schedule.ahead)
    counters = finished_counters(tiles, a.device) if schedule.split else None
    if counters is not None:
        partial = scratch(tiles * plan.chunks * math.prod(schedule.tile), a.device)
        grid = (min(sms, tiles * plan.chunks),)
        launch(_matmul_split_kernel, grid, *operands, partial, counters, *sizes, *when, **options)
    else:
        flatten = schedule.block_m >= 128 and plan.chunks == 1
        grid = (min(sms, tiles),)
        launch(_matmul_persistent_kernel, grid, *operands, *sizes, *when, FLATTEN=flatten, **options)


# --------------------------------------------------------------------------------------------- references


def matmul_ref(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product in float64, not rounded back: what an error is measured against. Shape ``(M, N)``."""
    c = a.double() @ b.double()
    return c if bias is None else c + bias.double()
