"""SiLU-and-multiply, the gate of a Llama MLP: ``silu(gate) * up``, element by element.

    silu(g) = g / (1 + exp(-g))

Shapes: ``gate_up`` is ``(..., 2 F)``, the gate in the first F columns and ``up`` in the last (one matmul makes both);
the result is ``(..., F)``. Everything inside is fp32, rounded once.

Why it is batch-invariant: nothing is summed. An element of the result depends on two elements of its own row.

Sources: Elfwing, Uchibe and Doya, "Sigmoid-Weighted Linear Units for Neural Network Function Approximation in
Reinforcement Learning", 2017; Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import check_float
from kernels.launch import launch, remembers, wait_for_previous_launch

BLOCK = 2048
"""Columns of one program: 16 bytes of 16-bit values a thread, twice, with 4 warps."""


@triton.jit
def silu_product(gate, up):
    """``silu(gate) * up`` in fp32, not rounded back. Launch with ``enable_fp_fusion=False``: everywhere the same."""
    gate = gate.to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)


@triton.jit
def _silu_mul_kernel(gate_up_ptr, y_ptr, stride_gate_up, n_cols, BLOCK: tl.constexpr):
    wait_for_previous_launch()
    blocks = tl.cdiv(n_cols, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    gate_ptrs = gate_up_ptr + row * stride_gate_up + cols
    y = silu_product(tl.load(gate_ptrs, mask=mask, other=0.0), tl.load(gate_ptrs + n_cols, mask=mask, other=0.0))
    tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


def gate_up_rows(gate_up: torch.Tensor) -> torch.Tensor:
    """``gate_up`` as a matrix ``(M, 2 F)`` whose rows have their elements side by side.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a last axis that cannot be halved.
    """
    check_float("gate_up", gate_up)
    if gate_up.ndim == 0 or gate_up.shape[-1] == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must have a last axis of 2 F columns, got gate_up.shape={tuple(gate_up.shape)}")
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@remembers
def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, rounded once.

    Args:
        gate_up: ``(..., 2 F)``, bfloat16, float16 or float32, any strides; the gate comes first.

    Returns:
        ``(..., F)``, dtype of ``gate_up``.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a last axis that cannot be halved.
    """
    rows = gate_up_rows(gate_up)
    m, n = rows.shape[0], rows.shape[1] // 2
    y = torch.empty(*gate_up.shape[:-1], n, dtype=gate_up.dtype, device=gate_up.device)
    if m:
        grid = (m * triton.cdiv(n, BLOCK),)
        launch(_silu_mul_kernel, grid, rows, y, rows.stride(0), n, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)
    return y


def silu_mul_ref(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` in float64, not rounded back: what an error is measured against. Shape ``(..., F)``."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
