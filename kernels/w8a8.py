"""8-bit matmul: ``c = (a @ b) * scale_a * scale_b (+ bias)`` for int8 or e4m3 operands quantised row by row.

Shapes: ``a`` is ``(M, K)`` with a scale a row ``(M,)``, ``b`` is ``(K, N)`` with a scale a column ``(N,)``, ``bias``
is ``(N,)``, ``c`` is ``(M, N)``. M counts tokens, N and K belong to the weight. The sum is scaled in fp32, by
``scale_a`` first, then by ``scale_b``; then comes the bias; then one rounding to the output dtype.

Why it is batch-invariant. int8: the products are summed in int32, exactly, so the order cannot matter, and any tile,
any cut through K, any order of arrival gives the same bits. e4m3: ``W8A8Plan`` fixes after how many products the
tensor core's sum is added up in fp32, and no schedule adds anything else. Hopper's tensor cores align the products
of an instruction and its accumulator to the largest of them and cut off what sticks out, so the instruction belongs
to the tree as well: every e4m3 tile has at least 64 rows on its left, which is what it takes to be multiplied by
``wgmma`` there.

Sources: Dettmers et al., "LLM.int8()", 2022; DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024 (promotion to fp32).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from kernels.checks import FLOATS, check_apart, check_float, check_shape
from kernels.launch import finished_counters, launch, remembers, wait_for_previous_launch
from kernels.matmul import descriptor_fits, has_wgmma, sm_count, start_of, tile_of
from kernels.plan import W8A8Plan, plan_w8a8
from kernels.quant import check_eight_bits, check_scale_values

# ---------------------------------------------------------------------------------------------- schedule


@dataclass(frozen=True)
class W8A8Schedule:
    """How the work is laid out on the GPU. No field changes a bit of the result.

    block_m, block_n, block_k: tile of ``c`` per program, and the length of one step along K.
    num_warps, num_stages: warps that multiply; depth of the load pipeline.
    swap: compute the transposed tile, with the weight as left operand (see ``MatmulSchedule``).
    specialised: Hopper's kernel with a warp that loads and one or two groups of four that multiply.
    split: specialised, and K is cut into this many parts that are summed side by side. e4m3 is cut between
        stretches of its plan, whose sums are kept apart until the last program adds them up in order.
    group_m: tiles of this many row blocks are visited together, so that they share weights in L2.
    tail_n: a specialised tile without ``swap`` is ``block_n + tail_n`` wide.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    specialised: bool = False
    split: int = 1
    group_m: int = 8
    tail_n: int = 0

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of ``c`` that one program computes at a time."""
        return self.block_m, self.block_n + self.tail_n

    @property
    def left(self) -> int:
        """Rows of the tile's left operand: what the tensor core's long side runs along."""
        return self.block_n if self.swap else self.block_m

    def fits(self, plan: W8A8Plan) -> bool:
        """Whether the plan allows this tile, and a thread has registers for it: two or three sums where it promotes.

        A stretch of the plan is a whole number of steps; what is summed in one stretch cannot be split unless exact.
        """
        stretch = plan.promote_k
        if not plan.exact and (self.left < 64 or (stretch or self.block_k) % self.block_k):
            return False
        if self.split > 1 and not plan.exact and stretch is None:
            return False
        rows, columns = self.tile
        if not stretch or self.split > 1:
            sums = 1
        else:
            sums = 3 if self.specialised and not self.tail_n else 2
        return sums * rows * columns <= 192 * 32 * self.num_warps


# Specialised schedules for many rows, each with its share of the tensor cores' rate while all SMs are busy.
WIDE_TILES = (
    (W8A8Schedule(64, 64, 128, 4, 8, specialised=True), 0.50),
    (W8A8Schedule(64, 128, 128, 4, 6, specialised=True), 0.70),
    (W8A8Schedule(128, 64, 128, 8, 6, specialised=True, tail_n=32), 0.80),
    (W8A8Schedule(128, 128, 128, 8, 5, specialised=True), 0.90),
    (W8A8Schedule(64, 128, 128, 8, 8, swap=True, specialised=True), 0.74),
    (W8A8Schedule(128, 128, 128, 8, 4, specialised=True, tail_n=32), 0.92),
    (W8A8Schedule(128, 128, 128, 8, 4, specialised=True, tail_n=64), 0.96),
    (W8A8Schedule(128, 256, 128, 8, 4, specialised=True), 1.00),
)

RING_BYTES = 192 * 1024
"""What the ring of a specialised schedule for few rows may take of an SM's shared memory."""


def thin_schedule(m: int, n: int, plan: W8A8Plan, sms: int) -> W8A8Schedule:
    """The specialised schedule for at most 64 rows: the weight on the left, as much of it under way as fits.

    Where three SMs of four would stand idle, int8 is cut along K.
    """
    block_m = max(16, triton.next_power_of_2(m))
    block_n, num_warps = (128, 8) if n >= 128 * sms else (64, 4)
    block_k = 128 if plan.promote_k == 128 else 256
    stages = min(RING_BYTES // ((block_m + block_n) * block_k), 12)
    idle = sms // triton.cdiv(n, block_n)
    split = max(1, min(idle, plan.k // 1024)) if plan.exact and idle >= 4 else 1
    return W8A8Schedule(block_m, block_n, block_k, num_warps, stages, swap=True, specialised=True, split=split)


def choose_schedule(m: int, n: int, plan: W8A8Plan, specialised: bool, sms: int) -> W8A8Schedule:
    """The schedule for ``m`` rows and ``n`` columns.

    With few rows the weight's bytes are the cost; with many, the tensor cores' time: of the wide tiles, the one whose
    last wave of programs leaves the fewest SMs idle.

    Args:
        specialised: whether Hopper's specialised kernel may be used.
        sms: multiprocessors of the GPU.
    """
    if not specialised:
        if m <= 32:
            return W8A8Schedule(max(16, triton.next_power_of_2(m)), 64, 128, 4, 3, swap=True)
        return W8A8Schedule(64, 64, 128, 4, 3) if m <= 64 else W8A8Schedule(128, 128, 64, 8, 3)
    if m <= 64:
        return thin_schedule(m, n, plan, sms)

    def cost(candidate: tuple[W8A8Schedule, float]) -> float:
        schedule, rate = candidate
        rows, columns = schedule.tile
        waves = triton.cdiv(triton.cdiv(m, rows) * triton.cdiv(n, columns), sms)
        return waves * rows * columns / rate

    return min((tile for tile in WIDE_TILES if tile[0].fits(plan)), key=cost)[0]


# ------------------------------------------------------------------------------------------------ kernel


@triton.jit(do_not_specialize=["M"])
def _w8a8_kernel(
    a_ptr,
    b_ptr,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    c_ptr,
    M,
    N,
    K,
    stretch_k,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    HAS_BIAS: tl.constexpr,
    INT8: tl.constexpr,
    STRETCHES: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    wait_for_previous_launch()
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = start_of(pid_m, M, BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_n = start_of(pid_n, N, BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the end of a matrix smaller than a tile repeat row 0: they need no mask in the loop.
    a_ptrs = a_ptr + tl.where(offs_m < M, offs_m, 0)[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + tl.where(offs_n < N, offs_n, 0)[None, :] * stride_bn
    sum_type: tl.constexpr = tl.int32 if INT8 else tl.float32
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for stretch in range(STRETCHES):
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=sum_type)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=sum_type)
        # Not carried from stretch to stretch: Triton would move them through shared memory between two layouts.
        first_k = tl.cast(stretch * stretch_k, tl.int64)
        a_at = a_ptrs + first_k * stride_ak
        b_at = b_ptrs + first_k * stride_bk
        for k in range(stretch * stretch_k, min((stretch + 1) * stretch_k, K), BLOCK_K):
            if EVEN_K:
                a = tl.load(a_at)
                b = tl.load(b_at)
            else:
                a = tl.load(a_at, mask=offs_k[None, :] < K - k, other=0.0)
                b = tl.load(b_at, mask=offs_k[:, None] < K - k, other=0.0)
            # Triton promotes e4m3 sums only where asked to, which is not here: the plan does.
            if SWAP:
                acc = tl.dot(tl.trans(b), tl.trans(a), acc, out_dtype=sum_type)
            else:
                acc = tl.dot(a, b, acc, out_dtype=sum_type)
            a_at += BLOCK_K * stride_ak
            b_at += BLOCK_K * stride_bk
        total += acc.to(tl.float32)
    if SWAP:
        total = tl.trans(total)
    total *= tl.load(scale_a_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
    total *= tl.load(scale_b_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_n[None, :]
    tl.store(c_ptrs, total.to(c_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


# ---------------------------------------------------------------------------------------------- launchers

_seen_scales: dict[int, tuple[weakref.ref, int]] = {}


def _check_once(name: str, scale: torch.Tensor) -> None:
    """Look at the values of a weight's scales the first time they come, and again if they have been written to.

    Looking waits for the GPU, which a captured graph must not do: what comes first under capture is let through.
    """
    key, version = id(scale), 0 if scale.is_inference() else scale._version
    seen = _seen_scales.get(key)
    if seen is not None and seen[0]() is scale and seen[1] == version:
        return
    if scale.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    check_scale_values(name, scale)
    _seen_scales[key] = weakref.ref(scale, lambda _: _seen_scales.pop(key, None)), version


def _check_scale(name: str, scale: torch.Tensor, size: int, device: torch.device) -> None:
    if not isinstance(scale, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(scale).__name__}")
    if scale.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {name}.dtype={scale.dtype}")
    check_shape(name, scale, (size,))
    if scale.device != device:
        raise ValueError(f"{name} must be on {device} like a, got {name}.device={scale.device}")


def _check_operands(a: torch.Tensor, b: torch.Tensor) -> None:
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    check_eight_bits("a.dtype", a.dtype, a.device)
    if b.dtype != a.dtype:
        raise TypeError(f"b must have the dtype of a ({a.dtype}), got b.dtype={b.dtype}")
    if b.device != a.device:
        raise ValueError(f"b must be on {a.device} like a, got b.device={b.device}")
    if not a.ndim == b.ndim == 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a and b must be (M, K) and (K, N), got {tuple(a.shape)} and {tuple(b.shape)}")


def _output(shape: tuple[int, int], a, dtype: torch.dtype, out: torch.Tensor | None, **others) -> torch.Tensor:
    """``out``, checked, or a new tensor; ``others`` are the operands besides ``a``, by their names."""
    if dtype not in FLOATS:
        raise TypeError(f"out_dtype must be bfloat16, float16 or float32, got out_dtype={dtype}")
    if out is None:
        return torch.empty(shape, dtype=dtype, device=a.device)
    check_shape("out", out, shape)
    if out.dtype != dtype or out.device != a.device:
        raise ValueError(f"out must be {dtype} on {a.device}, got out.dtype={out.dtype}, out.device={out.device}")
    if (shape[1] > 1 and out.stride(1) != 1) or (shape[0] > 1 and out.stride(0) < shape[1]):
        raise ValueError(f"out must have its rows one after another in memory, got out.stride()={out.stride()}")
    check_apart(out, a=a, **others)
    return out


def _look(a, b, scale_a, scale_b, *others, **options) -> None:
    _check_once("scale_b", scale_b)


@remembers(every_time=_look)
def w8a8_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    plan: W8A8Plan | None = None,
    schedule: W8A8Schedule | None = None,
) -> torch.Tensor:
    """``(a @ b) * scale_a[:, None] * scale_b + bias``; rows keep their bits whatever other rows ``a`` holds.

    Args:
        a: ``(M, K)``, ``torch.int8`` or ``torch.float8_e4m3fn``, any strides. One row is one token.
        b: ``(K, N)``, dtype of ``a``, any strides; fastest as ``weight.t()`` of a contiguous ``(N, K)`` weight.
        scale_a: ``(M,)``, float32, one a row. Its values are data: a NaN there makes NaN of its row alone.
        scale_b: ``(N,)``, float32, one an output channel, finite and above zero. They are looked at once for each
            tensor, which waits for the GPU that one time.
        bias: ``(N,)``, bfloat16, float16 or float32; added in fp32 before the one rounding.
        out_dtype: bfloat16, float16 or float32.
        out: ``(M, N)`` of that dtype to write into, with the elements of a row side by side.
        plan: how e4m3 products are summed; ``plan_w8a8`` of K and dtype if not given. Changes bits.
        schedule: how to run it; chosen from the sizes and the GPU if not given. Never changes a bit.

    Returns:
        ``(M, N)``; ``out`` if given.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes or devices that do not match; a weight's scale that is zero, negative or not finite; int8
            with K above ``EXACT_K``; e4m3 on a GPU without fp8; a plan for other operands; a schedule that the plan,
            the operands or the GPU exclude; an ``out`` of another shape or that shares memory with an operand.
    """
    _check_operands(a, b)
    (m, k), n = a.shape, b.shape[1]
    exact = a.dtype == torch.int8
    plan = plan or plan_w8a8(k, exact)
    if (plan.k, plan.exact) != (k, exact):
        raise ValueError(f"plan={plan} is not for {a.dtype} operands with K={k}")
    _check_scale("scale_a", scale_a, m, a.device)
    _check_scale("scale_b", scale_b, n, a.device)
    _check_once("scale_b", scale_b)
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, (n,))
        if bias.device != a.device:
            raise ValueError(f"bias must be on {a.device} like a, got bias.device={bias.device}")
        bias = bias.contiguous()
    c = _output((m, n), a, out_dtype, out, b=b, scale_a=scale_a, scale_b=scale_b, bias=bias)
    k_major = a.stride(1) == 1 and b.stride(0) == 1
    specialised = has_wgmma(a.device) and k_major and k > 0 and n % 16 == 0 and c.element_size() == 2
    specialised = specialised and all(descriptor_fits(x) for x in (a, b, c))
    schedule = schedule or choose_schedule(m, n, plan, specialised, sm_count(a.device))
    if schedule.tail_n and (schedule.swap or not schedule.specialised):
        raise ValueError(f"schedule={schedule} has a tail, so it must be specialised and not swapped")
    if not schedule.fits(plan):
        raise ValueError(f"schedule={schedule} is outside {plan}, or has too few registers for its tile")
    if schedule.specialised and not specialised:
        raise ValueError(
            f"schedule={schedule} needs a Hopper GPU, operands with their K elements side by side in rows of a "
            f"multiple of 16 bytes, N a multiple of 16 and a 16-bit result"
        )
    if m and n:
        _launch(a, b, scale_a.contiguous(), scale_b.contiguous(), bias, c, plan, schedule)
    return c


def _launch(a, b, scale_a, scale_b, bias, c, plan: W8A8Plan, schedule: W8A8Schedule) -> None:
    (m, k), n = a.shape, b.shape[1]
    rows, columns = schedule.tile
    tiles = triton.cdiv(m, rows) * triton.cdiv(n, columns)
    if schedule.specialised:
        from kernels import w8a8_hopper  # Gluon: needed on Hopper alone

        counters = None
        if schedule.split > 1:
            counters = finished_counters(tiles * schedule.num_warps // 4, a.device)
            if counters is None:  # captured, and none set apart before: all of K by one program, for the same bits
                schedule = replace(schedule, split=1)
        w8a8_hopper.launch(a, b, scale_a, scale_b, bias, c, plan, schedule, counters, sm_count(a.device))
        return
    launch(
        _w8a8_kernel,
        (tiles,),
        a,
        b,
        scale_a,
        scale_b,
        bias,
        c,
        m,
        n,
        k,
        plan.promote_k or k,
        *a.stride(),
        *b.stride(),
        c.stride(0),
        HAS_BIAS=bias is not None,
        INT8=plan.exact,
        STRETCHES=triton.cdiv(k, plan.promote_k) if plan.promote_k else 1,
        SWAP=schedule.swap,
        EVEN_K=k % schedule.block_k == 0,
        BLOCK_M=schedule.block_m,
        BLOCK_N=schedule.block_n,
        BLOCK_K=schedule.block_k,
        GROUP_M=schedule.group_m,
        num_warps=schedule.num_warps,
        num_stages=schedule.num_stages,
        enable_fp_fusion=False,  # the scales are multiplied and the bias is added with a rounding each, everywhere
    )


# --------------------------------------------------------------------------------------------- references


def w8a8_matmul_ref(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product of what the 8 bits stand for, in float64, not rounded back. Shape ``(M, N)``."""
    c = (a.double() @ b.double()) * scale_a.double()[:, None] * scale_b.double()
    return c if bias is None else c + bias.double()
