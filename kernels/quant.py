"""Quantisation to 8 bits: rows of activations as they come (per token), rows of weights once (per channel).

    scale = max(amax / largest, 2^-126)      amax: largest magnitude of the row; largest: 127 (int8) or 448 (e4m3)
    q     = round(x * (1 / scale))           to nearest, ties to even; x is about q * scale

Shapes: ``x`` is ``(..., K)``, ``q`` has its shape in ``torch.int8`` or ``torch.float8_e4m3fn``, ``scale`` is
``(...)`` in fp32. int8 never holds -128: both signs reach as far.

Odd rows. Zeros stay zeros, with the smallest scale. Rows of fp32 denormals get that scale as well, and what of them
lies below half of the type's smallest step becomes zero. A row with a NaN or an infinity gets a scale of NaN and
zeros for ``q``: int8 could not carry a NaN, and through its scale alone all of the row's results are NaN and nobody
else's.

Why it is batch-invariant: a row's scale comes from that row alone. A maximum is the same in any order, so rows have
no reduction tree to keep, except where RMSNorm sums squares: that is the ``RowPlan`` of ``kernels/norm.py``. One
scale for the whole tensor would tie every row to the largest element of the batch.

Fusing is a schedule too: ``rms_norm_per_token_quant`` and ``silu_mul_per_token_quant`` quantise the row *after* its
rounding to the dtype of the input, so that they give the bits of the two steps one after another. The rounding costs
2^-9 of an element in bf16, the step to 8 bits 2^-8 of the row's largest.

Sources: Dettmers et al., "LLM.int8()", 2022 (a scale a row and a column); Xiao et al., "SmoothQuant", 2022
(migration of outliers); Micikevicius et al., "FP8 Formats for Deep Learning", 2022 (e4m3).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.activation import gate_up_rows, silu_product
from kernels.checks import check_float, check_like, check_shape
from kernels.launch import launch, remembers, wait_for_previous_launch
from kernels.norm import NormSchedule, _rows, _vector, choose_schedule, tree_sum
from kernels.plan import plan_row

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest magnitude of each 8-bit type: what the largest of a row becomes."""

SMALLEST_SCALE = 2.0**-126
"""Smallest normal fp32 number. Its reciprocal is finite; those of most denormals are not."""


def has_fp8(device: torch.device) -> bool:
    """Whether ``device`` multiplies e4m3: Nvidia's from 8.9 on. The CPU does, through Triton's interpreter."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def check_eight_bits(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """``dtype`` is one of the two 8-bit types, and ``device`` has it.

    Raises:
        TypeError: another dtype.
        ValueError: e4m3 on a GPU without fp8.
    """
    if dtype not in LARGEST:
        raise TypeError(f"{name} must be torch.int8 or torch.float8_e4m3fn, got {name}={dtype}")
    if dtype != torch.int8 and not has_fp8(device):
        raise ValueError(
            f"{name}={dtype} needs fp8 (Nvidia, compute capability 8.9 or later), which "
            f"{torch.cuda.get_device_name(device)} does not have; use torch.int8"
        )


# ----------------------------------------------------------------------------------------------- helpers


@triton.jit
def row_scale(x, LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr):
    """Scale of the fp32 row ``x`` (WIDTH,), and whether all of it is finite.

    Magnitudes are compared as integers, which order as they do, with infinity and then NaN above all numbers: the
    usual maximum would lose a NaN.
    """
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(magnitude, axis=0).to(tl.float32, bitcast=True)
    finite = amax < float("inf")
    scale = tl.maximum(tl.div_rn(amax, LARGEST), SMALLEST_SCALE)
    return tl.where(finite, scale, float("nan")), finite


@triton.jit
def round_eight_bits(x, INT8: tl.constexpr):
    """The fp32 values ``x``, within the type's range, at their nearest int8 or e4m3 numbers, ties to even.

    Adding 1.5 * 2^23 units leaves no bits below one unit, and fp32 addition rounds to even. For int8 the unit is 1
    and the integer stands in the low bits of the sum. For e4m3 it is 2^-3 of the number's power of two, 2^-9 below
    2^-6, and the conversion that follows is exact: left to itself, the interpreter's cuts off.
    """
    if INT8:
        q = (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        exponent = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, (127 - 6) << 23)
        units = (exponent + ((20 << 23) | (1 << 22))).to(tl.float32, bitcast=True)
        q = ((x + units) - units).to(tl.float8e4nv)
    return q


@triton.jit
def quantise_row(x, LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr, INT8: tl.constexpr):
    """``(q, scale)`` of the fp32 row ``x`` (WIDTH,). Launch with ``enable_fp_fusion=False``."""
    scale, finite = row_scale(x, LARGEST, SMALLEST_SCALE)
    inverse = tl.div_rn(1.0, scale)
    return round_eight_bits(tl.where(finite, x * inverse, 0.0), INT8), scale


# ----------------------------------------------------------------------------------------------- kernels


@triton.jit
def _per_token_quant_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    stride_x,
    n_cols,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    INT8: tl.constexpr,
    WIDTH: tl.constexpr,
):
    wait_for_previous_launch()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    mask = cols < n_cols
    x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    q, scale = quantise_row(x, LARGEST, SMALLEST_SCALE, INT8)
    tl.store(q_ptr + row * n_cols + cols, q, mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _rms_norm_per_token_quant_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    q_ptr,
    scale_ptr,
    residual_out_ptr,
    stride_x,
    stride_residual,
    n_cols,
    inv_n_cols,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    INT8: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
):
    wait_for_previous_launch()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    mask = cols < n_cols
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_last")
    x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0)
    dtype = x.dtype
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_residual + cols, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(residual_out_ptr + row * n_cols + cols, x, mask=mask)
    x = x.to(tl.float32)
    y = x * tl.rsqrt(tree_sum(x * x, WIDTH, LEVELS) * inv_n_cols + eps)
    if HAS_WEIGHT:
        y = y * weight.to(tl.float32)
    q, scale = quantise_row(y.to(dtype).to(tl.float32), LARGEST, SMALLEST_SCALE, INT8)
    tl.store(q_ptr + row * n_cols + cols, q, mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _silu_mul_per_token_quant_kernel(
    gate_up_ptr,
    q_ptr,
    scale_ptr,
    stride_gate_up,
    n_cols,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    INT8: tl.constexpr,
    WIDTH: tl.constexpr,
):
    wait_for_previous_launch()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    mask = cols < n_cols
    gate_ptrs = gate_up_ptr + row * stride_gate_up + cols
    gate = tl.load(gate_ptrs, mask=mask, other=0.0)
    y = silu_product(gate, tl.load(gate_ptrs + n_cols, mask=mask, other=0.0))
    q, scale = quantise_row(y.to(gate.dtype).to(tl.float32), LARGEST, SMALLEST_SCALE, INT8)
    tl.store(q_ptr + row * n_cols + cols, q, mask=mask)
    tl.store(scale_ptr + row, scale)


# ---------------------------------------------------------------------------------------------- launchers


def _eight_bits(dtype: torch.dtype) -> dict:
    """The compile-time arguments that say which 8-bit type a kernel writes."""
    return {"LARGEST": LARGEST[dtype], "SMALLEST_SCALE": SMALLEST_SCALE, "INT8": dtype == torch.int8}


def _outputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for ``q`` (``shape``) and one scale a row."""
    q = torch.empty(shape, dtype=dtype, device=device)
    return q, torch.empty(shape[:-1], dtype=torch.float32, device=device)


def _quantise(
    kernel, rows: torch.Tensor, n: int, shape: tuple[int, ...], dtype: torch.dtype, schedule: NormSchedule | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``kernel`` on ``rows``, each of which gives ``n`` 8-bit numbers and a scale; results of ``shape``."""
    plan = plan_row(n)
    q, scale = _outputs(shape, dtype, rows.device)
    schedule = schedule or choose_schedule(plan)
    if len(rows):
        launch(
            kernel,
            (len(rows),),
            rows,
            q,
            scale,
            rows.stride(0),
            n,
            **_eight_bits(dtype),
            WIDTH=plan.width,
            num_warps=schedule.num_warps,
            enable_fp_fusion=False,
        )
    return q, scale


@remembers
def per_token_quant(
    x: torch.Tensor, dtype: torch.dtype = torch.int8, *, schedule: NormSchedule | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise every row of ``x`` by a scale of its own.

    Args:
        x: ``(..., K)``, bfloat16, float16 or float32, any strides. One row is one token.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
        schedule: how to run it; chosen from K if not given. Never changes a bit.

    Returns:
        ``q`` with the shape of ``x`` and ``scale`` ``(...)`` in fp32; ``x`` is about ``q * scale[..., None]``.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a row longer than ``MAX_ROW`` or empty; e4m3 on a GPU without fp8.
    """
    rows = _rows("x", x)
    check_eight_bits("dtype", dtype, x.device)
    return _quantise(_per_token_quant_kernel, rows, x.shape[-1], x.shape, dtype, schedule)


@remembers
def rms_norm_per_token_quant(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.int8,
    *,
    residual: torch.Tensor | None = None,
    schedule: NormSchedule | None = None,
) -> tuple[torch.Tensor, ...]:
    """RMSNorm and the quantiser after it, in one pass: the bits of ``per_token_quant(rms_norm(x, weight, eps))``.

    Args:
        x, weight, eps, residual, schedule: as for ``kernels.norm.rms_norm``.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.

    Returns:
        ``(q, scale)`` as from ``per_token_quant``; with a residual ``(q, scale, x + residual)``.

    Raises:
        TypeError: a dtype that is not supported or not that of ``x``.
        ValueError: a shape or device that does not match, a row longer than ``MAX_ROW``; e4m3 on a GPU without fp8.
    """
    rows = _rows("x", x)
    check_eight_bits("dtype", dtype, x.device)
    m, n = rows.shape
    plan = plan_row(n)
    weight = _vector("weight", weight, x)
    q, scale = _outputs(x.shape, dtype, x.device)
    summed = residual_rows = None
    if residual is not None:
        check_like("residual", residual, "x", x)
        check_shape("residual", residual, x.shape)
        residual_rows = _rows("residual", residual)
        summed = torch.empty_like(x, memory_format=torch.contiguous_format)
    schedule = schedule or choose_schedule(plan)
    if m:
        launch(
            _rms_norm_per_token_quant_kernel,
            (m,),
            rows,
            residual_rows,
            weight,
            q,
            scale,
            summed,
            rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            n,
            1.0 / n,
            eps,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            **_eight_bits(dtype),
            WIDTH=plan.width,
            LEVELS=plan.levels,
            num_warps=schedule.num_warps,
            enable_fp_fusion=False,
        )
    return (q, scale) if residual is None else (q, scale, summed)


@remembers
def silu_mul_per_token_quant(
    gate_up: torch.Tensor, dtype: torch.dtype = torch.int8, *, schedule: NormSchedule | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU-and-multiply and the quantiser after it, in one pass: the bits of ``per_token_quant(silu_mul(gate_up))``.

    Args:
        gate_up: ``(..., 2 F)``, bfloat16, float16 or float32, any strides; the gate comes first.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
        schedule: how to run it; chosen from F if not given. Never changes a bit.

    Returns:
        ``q`` ``(..., F)`` and ``scale`` ``(...)`` in fp32.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a last axis that cannot be halved, F above ``MAX_ROW``; e4m3 on a GPU without fp8.
    """
    rows = gate_up_rows(gate_up)
    check_eight_bits("dtype", dtype, gate_up.device)
    n = rows.shape[1] // 2
    return _quantise(_silu_mul_per_token_quant_kernel, rows, n, (*gate_up.shape[:-1], n), dtype, schedule)


def check_scale_values(name: str, scale: torch.Tensor) -> None:
    """Every scale is finite and above zero. Waits for the GPU: for weights, once, not for activations.

    Raises:
        ValueError: one is not; says how many, the first place and its value.
    """
    wrong = ~((scale > 0) & (scale < float("inf")))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name} must be finite and above zero, got {name}[{first}]={scale[first].item()} "
            f"({int(wrong.sum())} of {len(scale)} are not)"
        )


def per_channel_quant(weight: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight, every output channel (row) by a scale of its own. Done once, so it looks at the values.

    Args:
        weight: ``(N, K)`` as in ``torch.nn.Linear``, bfloat16, float16 or float32.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.

    Returns:
        ``q`` ``(N, K)`` and ``scale`` ``(N,)`` in fp32.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: not a matrix, a NaN or infinity in it, K above ``MAX_ROW``; e4m3 on a GPU without fp8.
    """
    check_float("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (N, K), got weight.shape={tuple(weight.shape)}")
    q, scale = per_token_quant(weight, dtype)
    if not scale.isfinite().all():
        channel = int((~scale.isfinite()).nonzero()[0])
        raise ValueError(f"weight must be finite, got a NaN or infinity in weight[{channel}]")
    return q, scale


def migrate_outliers(
    weight: torch.Tensor, act_max: torch.Tensor, alpha: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move outlying input channels from the activations, which are quantised a row at a time, into the weight.

    Column k of the weight is multiplied by ``s[k] = act_max[k]^alpha / weight_max[k]^(1 - alpha)``, rounded to a
    power of two, and the activations are to be divided by it: ``x @ weight.t()`` stays what it was, with no rounding
    (short of overflow and denormals), for powers of two only move exponents.

    Args:
        weight: ``(N, K)``, bfloat16, float16 or float32. Those that share an input go together, one below another.
        act_max: ``(K,)``, largest magnitude seen of each input channel, finite and not below zero.
        alpha: 1 makes the activations' channels equally large, 0 the weight's; between them both get better.

    Returns:
        The scaled weight, and ``1 / s`` ``(K,)`` in the weight's dtype, to multiply into the weight of the norm
        before. Channels in which either side is all zeros keep a factor of 1.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes or devices that do not match, ``alpha`` outside [0, 1], ``act_max`` negative or not finite.
    """
    check_float("weight", weight)
    check_float("act_max", act_max)
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (N, K), got weight.shape={tuple(weight.shape)}")
    check_shape("act_max", act_max, (weight.shape[1],))
    if act_max.device != weight.device:
        raise ValueError(f"act_max must be on {weight.device} like weight, got act_max.device={act_max.device}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got alpha={alpha}")
    wrong = act_max[~((act_max >= 0) & (act_max < float("inf")))]
    if len(wrong):
        raise ValueError(f"act_max must be finite and not below zero, got {wrong[0].item()}")
    act, channel = act_max.double(), weight.abs().amax(0).double()
    power = (alpha * act.log2() - (1 - alpha) * channel.log2()).round()
    power = torch.where((act > 0) & (channel > 0), power, 0)
    return (weight * power.exp2()).to(weight.dtype), (-power).exp2().to(weight.dtype)


# --------------------------------------------------------------------------------------------- references


def per_token_quant_ref(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """``per_token_quant`` in plain PyTorch, bit for bit (but for the sign of an e4m3 zero)."""
    x = x.float()
    amax = x.abs().amax(-1)
    finite = amax < float("inf")
    # By a tensor: on a GPU torch divides by a plain number by multiplying with its rounded reciprocal.
    scale = (amax / torch.full_like(amax, LARGEST[dtype])).clamp(min=SMALLEST_SCALE)
    scale = torch.where(finite, scale, float("nan"))
    y = torch.where(finite[..., None], x * (1.0 / scale)[..., None], 0.0)
    return (y.round() if dtype == torch.int8 else y).to(dtype), scale


def dequantise_ref(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``q * scale[..., None]`` in float64: the numbers that the 8 bits stand for."""
    return q.to(torch.float64) * scale.double()[..., None]
