"""RMSNorm and LayerNorm: one program per row, one pass over memory.

    rms_norm(x)   = x / sqrt(mean(x^2) + eps) * weight
    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Shapes: ``x`` is ``(..., n)``, ``weight`` and ``bias`` are ``(n,)``; the mean and variance run over the last
axis. Everything inside is fp32; the result is rounded once, to the dtype of ``x``.

Why it is batch-invariant: the only sums run along a row, and each is the balanced tree of its ``RowPlan``,
whose shape depends on ``n`` alone. No other row enters it, and nothing in a schedule can reorder it.

Sources: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; Ba, Kiros and Hinton, "Layer
Normalization", 2016.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels.checks import check_float, check_like, check_shape
from kernels.launch import launch, remembers, wait_for_previous_launch
from kernels.plan import RowPlan, plan_row

# ---------------------------------------------------------------------------------------------- schedule


@dataclass(frozen=True)
class NormSchedule:
    """How a row is laid out on the GPU: the number of warps (of 32 threads) that share it. Changes no bit."""

    num_warps: int


@lru_cache
def choose_schedule(plan: RowPlan) -> NormSchedule:
    """16 values a thread up to 4096 wide, 32 beyond: fastest at 4096 and 8192 on an H200, for 1 to 16384 rows."""
    return NormSchedule(num_warps=max(1, min(plan.width // 512, 8), min(plan.width // 1024, 32)))


# ----------------------------------------------------------------------------------------------- helpers


@triton.jit
def tree_sum(x, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    """Sum of the fp32 vector ``x`` (WIDTH,) by the balanced tree of ``RowPlan``, neighbours first.

    The first eight levels join values that one warp holds (8 in a thread, 32 threads) by shuffles. For the
    rest, ``split`` hands every thread all remaining partial sums in one trip through shared memory, where a
    reduction over warps would take a trip a level. Either way a level adds two operands, once. Launch with
    ``enable_fp_fusion=False``: fused into the square before it, the first level would lose a rounding.
    """
    for level in tl.static_range(LEVELS):
        pairs = tl.reshape(x, [WIDTH >> (level + 1), 2])
        if level < 8:
            x = tl.sum(pairs, axis=1)
        else:
            left, right = tl.split(pairs)
            x = left + right
    return tl.sum(x, axis=0)


# ----------------------------------------------------------------------------------------------- kernels


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    residual_out_ptr,
    stride_x,
    stride_residual,
    n_cols,
    inv_n_cols,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    FULL: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
):
    wait_for_previous_launch()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    mask = None if FULL else cols < n_cols
    other = None if FULL else 0.0
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=mask, other=other, eviction_policy="evict_last")
    x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=other)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_residual + cols, mask=mask, other=other)
        # Rounded before the norm, as a separate addition would: fused and unfused give the same bits.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(residual_out_ptr + row * n_cols + cols, x, mask=mask)
    x = x.to(tl.float32)
    y = x * tl.rsqrt(tree_sum(x * x, WIDTH, LEVELS) * inv_n_cols + eps)
    if HAS_WEIGHT:
        y = y * weight.to(tl.float32)
    tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    stride_x,
    n_cols,
    inv_n_cols,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
):
    wait_for_previous_launch()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    mask = cols < n_cols
    x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    mean = tree_sum(x, WIDTH, LEVELS) * inv_n_cols
    # The row is in registers, so the variance takes the second look that E[x^2] - E[x]^2 tries to save.
    centred = tl.where(mask, x - mean, 0.0)
    y = centred * tl.rsqrt(tree_sum(centred * centred, WIDTH, LEVELS) * inv_n_cols + eps)
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------- launchers


def _rows(name: str, x: torch.Tensor) -> torch.Tensor:
    """``x`` as a matrix of rows whose elements lie side by side; a copy only where the strides force one."""
    check_float(name, x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} must have a last axis to normalise over, got {name}.shape={tuple(x.shape)}")
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _vector(name: str, v: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """``v`` checked against the last axis of ``x``, with its elements side by side; ``None`` stays ``None``."""
    if v is None:
        return None
    check_like(name, v, "x", x)
    check_shape(name, v, (x.shape[-1],))
    return v.contiguous()


@remembers
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    schedule: NormSchedule | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm over the last axis, with the residual addition that precedes it in a transformer block fused in.

    Args:
        x: ``(..., n)``, bfloat16, float16 or float32, any strides.
        weight: ``(n,)``, dtype of ``x``; ``None`` scales by one.
        eps: added to the mean square.
        residual: shape and dtype of ``x``. If given, ``x + residual`` (rounded to the dtype) is what is normed.
        schedule: how to run it; chosen from ``n`` if not given. Never changes a bit.

    Returns:
        ``y`` with the shape and dtype of ``x``; with a residual ``(y, x + residual)``.

    Raises:
        TypeError: a dtype that is not supported or not that of ``x``.
        ValueError: a shape or device that does not match, a row longer than ``MAX_ROW``.
    """
    x_rows = _rows("x", x)
    m, n = x_rows.shape
    plan = plan_row(n)
    weight = _vector("weight", weight, x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = residual_rows = None
    if residual is not None:
        check_like("residual", residual, "x", x)
        check_shape("residual", residual, x.shape)
        residual_rows = _rows("residual", residual)
        summed = torch.empty_like(y)
    schedule = schedule or choose_schedule(plan)
    if m:
        launch(
            _rms_norm_kernel,
            (m,),
            x_rows,
            residual_rows,
            weight,
            y,
            summed,
            x_rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            n,
            1.0 / n,
            eps,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            FULL=n == plan.width,
            WIDTH=plan.width,
            LEVELS=plan.levels,
            num_warps=schedule.num_warps,
            enable_fp_fusion=False,
        )
    return y if residual is None else (y, summed)


@remembers
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    schedule: NormSchedule | None = None,
) -> torch.Tensor:
    """LayerNorm over the last axis.

    Args:
        x: ``(..., n)``, bfloat16, float16 or float32, any strides.
        weight, bias: ``(n,)``, dtype of ``x``; ``None`` scales by one and adds nothing.
        eps: added to the (biased) variance.
        schedule: how to run it; chosen from ``n`` if not given. Never changes a bit.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        TypeError: a dtype that is not supported or not that of ``x``.
        ValueError: a shape or device that does not match, a row longer than ``MAX_ROW``.
    """
    x_rows = _rows("x", x)
    m, n = x_rows.shape
    plan = plan_row(n)
    weight = _vector("weight", weight, x)
    bias = _vector("bias", bias, x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    schedule = schedule or choose_schedule(plan)
    if m:
        launch(
            _layer_norm_kernel,
            (m,),
            x_rows,
            weight,
            bias,
            y,
            x_rows.stride(0),
            n,
            1.0 / n,
            eps,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            WIDTH=plan.width,
            LEVELS=plan.levels,
            num_warps=schedule.num_warps,
            enable_fp_fusion=False,
        )
    return y


# --------------------------------------------------------------------------------------------- references


def tree_sum_ref(x: torch.Tensor) -> torch.Tensor:
    """The balanced tree of ``RowPlan`` over the last axis in plain PyTorch: fp32 ``(..., n)`` to ``(...)``."""
    plan = plan_row(x.shape[-1])
    x = torch.nn.functional.pad(x.float(), (0, plan.width - plan.n))
    for _ in range(plan.levels):
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def rms_norm_ref(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm in float64, not rounded back: what an error is measured against. Shape of ``x``."""
    x = x if residual is None else x + residual
    x = x.double()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight.double()


def layer_norm_ref(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """LayerNorm in float64, not rounded back. Shape of ``x``."""
    double = [None if v is None else v.double() for v in (weight, bias)]
    return torch.nn.functional.layer_norm(x.double(), (x.shape[-1],), *double, eps=eps)
