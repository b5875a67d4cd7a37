"""Matmul: ``c = a @ b (+ bias)``, each output element one left-to-right pass over K.

Shapes: ``a`` is ``(M, K)``, ``b`` is ``(K, N)``, ``bias`` is ``(N,)``, ``c`` is ``(M, N)``. M counts tokens
(rows), N and K belong to the weight. Products accumulate in fp32; bias is added in fp32; one rounding to the
output dtype.

Why it is batch-invariant: an element of ``c`` is a sum over K of one row of ``a`` and one column of ``b``, and
``MatmulPlan`` fixes the order of that sum from N, K, dtype and precision. Which rows share a tile, how large
the tile is, which operand goes left and how many programs run are all schedule: they decide where an element
is computed, never what is added to what.

Source: the tiling is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008,
as Triton's own matmul tutorial lays it out; the persistent loop and TMA descriptors follow Nvidia's Hopper
programming model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.checks import check_float, check_like, check_shape
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
    group_m: tiles of this many row blocks are visited together, so that they share weights in L2.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    persistent: bool = False
    group_m: int = 8


PERSISTENT_TILES = (
    # Schedule, and its share of the tensor cores' rate while all SMs are busy (seen on an H200 in bf16).
    (MatmulSchedule(64, 64, 128, 4, 6, swap=True, persistent=True), 0.50),
    (MatmulSchedule(64, 128, 128, 4, 4, swap=True, persistent=True), 0.85),
    (MatmulSchedule(64, 256, 64, 4, 4, persistent=True), 0.75),
    (MatmulSchedule(128, 64, 64, 4, 4, swap=True, persistent=True), 0.60),
    (MatmulSchedule(128, 128, 64, 4, 4, persistent=True), 0.93),
    (MatmulSchedule(256, 128, 64, 8, 4, persistent=True), 1.00),
    (MatmulSchedule(128, 256, 64, 8, 4, persistent=True), 1.00),
)


def choose_schedule(m: int, n: int, plan: MatmulPlan, itemsize: int, tma: bool, sms: int) -> MatmulSchedule:
    """Default schedule for ``m`` rows and ``n`` columns on a GPU with ``sms`` multiprocessors.

    With few rows the weight's bytes are the cost: thin tiles with the weight on the left and a deep pipeline.
    With many, the tensor cores' time is: of the large tiles, the one whose last wave of programs leaves the
    fewest SMs idle. ``tma`` says whether both operands can be loaded through TMA descriptors.
    """
    if itemsize == 4:
        if m <= 32 and plan.block_k is None:
            return MatmulSchedule(16, 64, 64, 4, 3, swap=True)
        return MatmulSchedule(64, 64, 32, 4, 3)
    if not tma:
        if m <= 32:
            return MatmulSchedule(max(16, triton.next_power_of_2(m)), 64, 64, 4, 4, swap=True)
        return MatmulSchedule(64, 64, 64, 4, 3) if m <= 64 else MatmulSchedule(128, 128, 32, 8, 3)
    if m <= 32:
        block_m = max(16, triton.next_power_of_2(m))
        block_n, block_k = (128, 128) if n >= 128 * sms else (64, 256)
        return MatmulSchedule(block_m, block_n, block_k, 4, 4, swap=True, persistent=True)

    def cost(candidate: tuple[MatmulSchedule, float]) -> float:
        tile, rate = candidate
        waves = triton.cdiv(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n), sms)
        return waves * tile.block_m * tile.block_n / rate

    return min(PERSISTENT_TILES, key=cost)[0]


# ----------------------------------------------------------------------------------------------- helpers


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column block of program ``pid``: down GROUP_M row blocks, then one column block across."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M
    group = min(blocks_m - first_m, GROUP_M)
    return first_m + pid % (GROUP_M * blocks_n) % group, pid % (GROUP_M * blocks_n) // group


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
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the end repeat row 0: they cost no mask in the loop and are never stored.
    a_ptrs = a_ptr + tl.where(offs_m < M, offs_m, 0)[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + tl.where(offs_n < N, offs_n, 0)[None, :] * stride_bn
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
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
    if SWAP:
        acc = tl.trans(acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


@triton.jit(do_not_specialize=["M"])
def _matmul_persistent_kernel(
    a_desc,
    b_desc,
    bias_ptr,
    c_ptr,
    M,
    N,
    K,
    stride_cm,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    SWAP: tl.constexpr,
    A_K_MAJOR: tl.constexpr,
    B_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        start_m = pid_m * BLOCK_M
        start_n = pid_n * BLOCK_N
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
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
        if SWAP:
            acc = tl.trans(acc)
        offs_m = start_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_n[None, :]
        tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


# ---------------------------------------------------------------------------------------------- launchers


@lru_cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of ``device``; 4 for the CPU, where Triton's interpreter runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache
def has_tma(device: torch.device) -> bool:
    """Whether ``device`` has TMA and room for its tiles: Nvidia's 9.x and 10.x, with 227 KB of shared memory an SM.

    Nvidia's 12.x has TMA too, but 99 KB.
    """
    if device.type != "cuda":
        return True  # the interpreter plays TMA
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _descriptor_fits(x: torch.Tensor) -> bool:
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


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    precision: str = "ieee",
    schedule: MatmulSchedule | None = None,
) -> torch.Tensor:
    """``a @ b + bias`` whose rows keep their bits whatever other rows ``a`` holds.

    Args:
        a: ``(M, K)``, bfloat16, float16 or float32, any strides. One row is one token.
        b: ``(K, N)``, dtype of ``a``, any strides (``weight.t()`` for a ``torch.nn.Linear``).
        bias: ``(N,)``, dtype of ``a``; added in fp32 before the one rounding.
        precision: how float32 operands are multiplied: ``"ieee"`` (exact products), ``"tf32"`` (operands
            rounded to 10 bits) or ``"tf32x3"`` (three TF32 products each). Belongs to the plan.
        schedule: how to run it; chosen from the sizes and the GPU if not given. Never changes a bit.

    Returns:
        ``(M, N)``, dtype of ``a``, contiguous.

    Raises:
        TypeError: a dtype that is not supported or not that of ``a``.
        ValueError: ranks, sizes, devices or precision that do not fit; a schedule that the plan excludes.
    """
    check_float("a", a)
    check_like("b", b, "a", a)
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2:
            raise ValueError(f"{name} must be a matrix, got {name}.shape={tuple(x.shape)}")
    (m, k), n = a.shape, b.shape[1]
    if b.shape[0] != k:
        raise ValueError(
            f"inner sizes differ: a.shape={tuple(a.shape)} has K={k}, b.shape={tuple(b.shape)} has K={b.shape[0]}"
        )
    if bias is not None:
        check_like("bias", bias, "a", a)
        check_shape("bias", bias, (n,))
        bias = bias.contiguous()
    plan = plan_matmul(k, a.element_size(), precision)
    # Columns past a multiple of 16 break up the stores of a large tile, whose staging then outgrows shared memory.
    tma = has_tma(a.device) and k > 0 and n % 16 == 0 and _descriptor_fits(a) and _descriptor_fits(b)
    if schedule is None:
        schedule = choose_schedule(m, n, plan, a.element_size(), tma, sm_count(a.device))
    if plan.block_k is not None and (schedule.block_k != plan.block_k or schedule.swap):
        raise ValueError(f"schedule={schedule} is outside {plan}: its block_k and operand order are fixed")
    if schedule.persistent and not tma:
        raise ValueError(f"schedule={schedule} needs TMA descriptors, which these operands or this GPU rule out")
    c = torch.empty((m, n), dtype=a.dtype, device=a.device)
    if m and n:
        _launch(a, b, bias, c, plan, schedule)
    return c


def _launch(a, b, bias, c, plan: MatmulPlan, schedule: MatmulSchedule) -> None:
    (m, k), n = a.shape, b.shape[1]
    tiles = triton.cdiv(m, schedule.block_m) * triton.cdiv(n, schedule.block_n)
    options = {
        "HAS_BIAS": bias is not None,
        "PRECISION": plan.precision,
        "SWAP": schedule.swap,
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "BLOCK_K": schedule.block_k,
        "GROUP_M": schedule.group_m,
        "num_warps": schedule.num_warps,
        "num_stages": schedule.num_stages,
    }
    if schedule.persistent:
        a_desc, a_k_major = _descriptor(a, (schedule.block_m, schedule.block_k))
        b_desc, b_n_major = _descriptor(b, (schedule.block_k, schedule.block_n))
        grid = (min(sm_count(a.device), tiles),)
        _matmul_persistent_kernel[grid](
            a_desc,
            b_desc,
            bias,
            c,
            m,
            n,
            k,
            c.stride(0),
            A_K_MAJOR=a_k_major,
            B_K_MAJOR=not b_n_major,
            FLATTEN=schedule.block_m >= 128,
            **options,
        )
    else:
        _matmul_kernel[(tiles,)](
            a,
            b,
            bias,
            c,
            m,
            n,
            k,
            *a.stride(),
            *b.stride(),
            c.stride(0),
            EVEN_K=k % schedule.block_k == 0,
            **options,
        )


# --------------------------------------------------------------------------------------------- references


def matmul_ref(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product in float64, not rounded back: what an error is measured against. Shape ``(M, N)``."""
    c = a.double() @ b.double()
    return c if bias is None else c + bias.double()
