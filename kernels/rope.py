"""Rotary position embedding of queries and keys, and the way of keys and values into a paged cache: one kernel.

    out[:half] = x[:half] * cos - x[half:] * sin
    out[half:] = x[half:] * cos + x[:half] * sin        cos, sin of position * frequency[i], i < half = head_dim / 2

Shapes: ``qkv`` is ``(tokens, (heads_q + 2 heads_kv) * head_dim)``, as one fused projection writes it: the heads of
the queries, then of the keys, then of the values. ``table`` is ``(positions, head_dim)`` fp32: cosines, then sines.
The caches are ``(pages, page_size, heads_kv, head_dim)``. With weights for them, query and key heads first pass an
RMSNorm each (as Qwen3's do), rounded to the dtype as a norm of its own would. Inside is fp32; one rounding per
store.

Why it is batch-invariant: apart from the norm everything is elementwise, and a head's norm is the balanced tree of
its ``RowPlan``. Other tokens do not enter.

Sources: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; the pairing of element i
with i + half and the scaled frequencies are those of the Llama checkpoints; Kwon et al., "Efficient Memory Management
for Large Language Model Serving with PagedAttention", 2023, for pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.checks import check_float, check_like, check_shape
from kernels.launch import launch, remembers, wait_for_previous_launch

# -------------------------------------------------------------------------------------------- frequencies


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3 stretches the rotation of a model trained on ``original_length`` positions.

    Frequencies that turn fewer than ``low_factor`` times over that length are divided by ``factor``, those that turn
    more than ``high_factor`` times stay, and the ones between are blended.
    """

    factor: float
    low_factor: float
    high_factor: float
    original_length: int


def rope_table(
    positions: int, head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | str
) -> torch.Tensor:
    """Cosines and sines of every position: ``(positions, head_dim)`` fp32, the cosines in the first half.

    Frequencies and angles are rounded to fp32 as the checkpoints' own code rounds them: weights were trained on that.
    Computed on the CPU, so that every device gets the same bits.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        turns = scaling.original_length * frequencies / (2 * math.pi)
        blend = (turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
        blend = blend.clamp(0, 1)
        frequencies = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    angles = torch.arange(positions).float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(device)


# ---------------------------------------------------------------------------------------------- schedule


@dataclass(frozen=True)
class RopeSchedule:
    """``heads`` (a power of two) of a token share one program of ``num_warps``. Changes no bit."""

    heads: int = 8
    num_warps: int = 2


# ----------------------------------------------------------------------------------------------- helpers


@triton.jit
def tree_sum_rows(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    """Sums of the rows of fp32 ``x`` (ROWS, WIDTH) by the balanced tree of ``RowPlan``: (ROWS,)."""
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [ROWS, WIDTH >> (level + 1), 2]), axis=2)
    return tl.reshape(x, [ROWS])


# ----------------------------------------------------------------------------------------------- kernels


@triton.jit
def _rope_kernel(
    qkv_ptr,
    table_ptr,
    positions_ptr,
    slots_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    stride_qkv,
    stride_k_slot,
    stride_v_slot,
    eps,
    HEADS_Q: tl.constexpr,
    HEADS_KV: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LEVELS: tl.constexpr,
):
    wait_for_previous_launch()
    BLOCKS: tl.constexpr = (HEADS_Q + 2 * HEADS_KV + HEADS - 1) // HEADS
    pid = tl.program_id(0).to(tl.int64)
    token = pid // BLOCKS
    heads = ((pid % BLOCKS) * HEADS).to(tl.int32) + tl.arange(0, HEADS)
    cols = tl.arange(0, HALF)
    inside = (heads < HEADS_Q + 2 * HEADS_KV)[:, None]
    offs = heads[:, None] * (2 * HALF) + cols[None, :]
    low = tl.load(qkv_ptr + token * stride_qkv + offs, mask=inside, other=0.0)
    high = tl.load(qkv_ptr + token * stride_qkv + HALF + offs, mask=inside, other=0.0)
    is_q = (heads < HEADS_Q)[:, None]
    is_k = ((heads >= HEADS_Q) & (heads < HEADS_Q + HEADS_KV))[:, None]
    is_v = ((heads >= HEADS_Q + HEADS_KV) & (heads < HEADS_Q + 2 * HEADS_KV))[:, None]
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        v_ptrs = v_cache_ptr + slot * stride_v_slot + (heads - HEADS_Q - HEADS_KV)[:, None] * (2 * HALF)
        tl.store(v_ptrs + cols[None, :], low, mask=is_v)
        tl.store(v_ptrs + HALF + cols[None, :], high, mask=is_v)
    x, y = low.to(tl.float32), high.to(tl.float32)
    if HAS_NORM:
        squares = tree_sum_rows(x * x, HEADS, HALF, LEVELS) + tree_sum_rows(y * y, HEADS, HALF, LEVELS)
        scale = tl.rsqrt(squares * (0.5 / HALF) + eps)[:, None]
        q_low, q_high = tl.load(q_weight_ptr + cols)[None, :], tl.load(q_weight_ptr + HALF + cols)[None, :]
        k_low, k_high = tl.load(k_weight_ptr + cols)[None, :], tl.load(k_weight_ptr + HALF + cols)[None, :]
        x = (x * scale * tl.where(is_q, q_low, k_low).to(tl.float32)).to(low.dtype).to(tl.float32)
        y = (y * scale * tl.where(is_q, q_high, k_high).to(tl.float32)).to(low.dtype).to(tl.float32)
    table_ptr += tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF)
    cos, sin = tl.load(table_ptr + cols)[None, :], tl.load(table_ptr + HALF + cols)[None, :]
    low = (x * cos - y * sin).to(low.dtype)
    high = (y * cos + x * sin).to(high.dtype)
    q_ptrs = q_ptr + token * (2 * HALF * HEADS_Q) + offs
    tl.store(q_ptrs, low, mask=is_q)
    tl.store(q_ptrs + HALF, high, mask=is_q)
    if slot >= 0:
        k_ptrs = k_cache_ptr + slot * stride_k_slot + (heads - HEADS_Q)[:, None] * (2 * HALF) + cols[None, :]
        tl.store(k_ptrs, low, mask=is_k)
        tl.store(k_ptrs + HALF, high, mask=is_k)


# ---------------------------------------------------------------------------------------------- launchers


def _check_int32(name: str, v: torch.Tensor, x: torch.Tensor) -> None:
    if not isinstance(v, torch.Tensor) or v.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor, got {getattr(v, 'dtype', type(v).__name__)}")
    check_shape(name, v, (x.shape[0],))
    if v.device != x.device or not v.is_contiguous():
        raise ValueError(f"{name} must be contiguous on {x.device}, got stride {v.stride()} on {v.device}")


def _check_cache(name: str, cache: torch.Tensor, qkv: torch.Tensor, head_dim: int) -> int:
    """Heads of a cache whose slots are evenly spaced."""
    check_like(name, cache, "qkv", qkv)
    if cache.ndim != 4 or cache.shape[3] != head_dim:
        raise ValueError(
            f"{name} must be (pages, page_size, heads, {head_dim}), got {name}.shape={tuple(cache.shape)}"
        )
    page, slot, head, element = cache.stride()
    if element != 1 or head != head_dim or page != slot * cache.shape[1]:
        raise ValueError(f"{name} must have evenly spaced slots of whole heads, got {name}.stride()={cache.stride()}")
    return cache.shape[2]


@remembers
def rope_to_cache(
    qkv: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    schedule: RopeSchedule | None = None,
) -> torch.Tensor:
    """Rotate the queries and keys of ``qkv``; return the queries, write keys and values into the cache.

    Args:
        qkv: ``(tokens, (heads_q + 2 heads_kv) * head_dim)``, bfloat16, float16 or float32, rows of adjacent elements.
        table: ``(positions, head_dim)`` fp32, from ``rope_table``.
        positions: ``(tokens,)`` int32, each below ``len(table)`` (not checked: that would wait for the device).
        slots: ``(tokens,)`` int32, where in the cache a token goes: ``page * page_size + offset``; -1 for nowhere.
        k_cache, v_cache: ``(pages, page_size, heads_kv, head_dim)``, dtype of ``qkv``; written in place.
        q_weight, k_weight: ``(head_dim,)``, dtype of ``qkv``: weights of an RMSNorm over every query and key head;
            both or neither.
        eps: of that norm.
        schedule: how to run it. Never changes a bit.

    Returns:
        queries ``(tokens, heads_q, head_dim)``, dtype of ``qkv``.

    Raises:
        TypeError: a dtype that is not supported or does not match.
        ValueError: shapes, strides or devices that do not fit; one norm weight without the other.
    """
    check_float("qkv", qkv)
    if not isinstance(table, torch.Tensor):
        raise TypeError(f"table must be a torch.Tensor, got {type(table).__name__}")
    if table.ndim != 2 or table.device != qkv.device:
        shape = tuple(table.shape)
        raise ValueError(f"table must be (positions, head_dim) on {qkv.device}, got {shape} on {table.device}")
    head_dim = table.shape[-1]
    if head_dim < 2 or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim must be a power of two, got table.shape={tuple(table.shape)}")
    if table.dtype != torch.float32 or not table.is_contiguous():
        raise ValueError(f"table must be contiguous float32, got {table.dtype} with table.stride()={table.stride()}")
    heads_kv = _check_cache("k_cache", k_cache, qkv, head_dim)
    _check_cache("v_cache", v_cache, qkv, head_dim)
    check_shape("v_cache", v_cache, k_cache.shape)
    if qkv.ndim != 2 or qkv.shape[1] % head_dim or qkv.shape[1] <= 2 * heads_kv * head_dim or qkv.stride(1) != 1:
        raise ValueError(
            f"qkv must be (tokens, (heads_q + 2 * {heads_kv}) * {head_dim}) with rows of adjacent elements, "
            f"got qkv.shape={tuple(qkv.shape)}, qkv.stride()={qkv.stride()}"
        )
    _check_int32("positions", positions, qkv)
    _check_int32("slots", slots, qkv)
    if (q_weight is None) != (k_weight is None):
        missing = "q_weight" if q_weight is None else "k_weight"
        raise ValueError(f"q_weight and k_weight come together, got {missing}=None")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_like(name, weight, "qkv", qkv)
            check_shape(name, weight, (head_dim,))
            if not weight.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got {name}.stride()={weight.stride()}")
    schedule = schedule or RopeSchedule()
    heads_q = qkv.shape[1] // head_dim - 2 * heads_kv
    q = torch.empty(len(qkv), heads_q, head_dim, dtype=qkv.dtype, device=qkv.device)
    if len(qkv):
        launch(
            _rope_kernel,
            (len(qkv) * triton.cdiv(heads_q + 2 * heads_kv, schedule.heads),),
            qkv,
            table,
            positions,
            slots,
            q_weight,
            k_weight,
            q,
            k_cache,
            v_cache,
            qkv.stride(0),
            k_cache.stride(1),
            v_cache.stride(1),
            eps,
            HEADS_Q=heads_q,
            HEADS_KV=heads_kv,
            HAS_NORM=q_weight is not None,
            HEADS=schedule.heads,
            HALF=head_dim // 2,
            LEVELS=(head_dim // 2).bit_length() - 1,
            num_warps=schedule.num_warps,
            enable_fp_fusion=False,
        )
    return q


# --------------------------------------------------------------------------------------------- references


def rope_ref(x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``x`` (tokens, heads, head_dim) rotated, in the wider of its dtype and fp32, not rounded back."""
    table = table[positions.long()].to(torch.promote_types(x.dtype, table.dtype))[:, None]
    cos, sin = table.chunk(2, dim=-1)
    low, high = x.to(table.dtype).chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
