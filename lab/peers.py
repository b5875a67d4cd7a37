"""The implementations we are measured against: what a user would call instead, and two that teach by failing.

Each is a function of the same arguments as ours. None of them is batch-invariant by design; the checker says
which ones happen to be.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.attention import AttentionCall, _launch, _scale_log2
from kernels.matmul import tile_of
from kernels.plan import AttentionPlan

if TYPE_CHECKING:
    from cuda.core import Kernel

# ------------------------------------------------------------------------------------------------ matmul


@triton.jit(do_not_specialize=["M"])
def _single_tile_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SMS: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, SMS):
        pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + (offs_m % M)[:, None] * stride_am + offs_k[None, :] * stride_ak
        b_ptrs = b_ptr + offs_k[:, None] * stride_bk + (offs_n % N)[None, :] * stride_bn
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            a = tl.load(a_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
            b = tl.load(b_ptrs, mask=offs_k[:, None] < K - k, other=0.0)
            acc = tl.dot(a, b, acc)
            a_ptrs += BLOCK_K * stride_ak
            b_ptrs += BLOCK_K * stride_bk
        mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
        tl.store(c_ptr + offs_m[:, None] * stride_cm + offs_n[None, :], acc.to(c_ptr.dtype.element_ty), mask=mask)


def single_tile(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` with one 128x128x64 tile whatever the batch: invariance as it is commonly shipped.

    A persistent grid of one program per SM, 8 warps and 3 stages, the configuration that public
    batch-invariant libraries use for 16-bit inputs. ``a`` is ``(M, K)``, ``b`` is ``(K, N)``, 16-bit.
    """
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty((m, n), dtype=a.dtype, device=a.device)
    sms = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 4
    grid = (min(sms, triton.cdiv(m, 128) * triton.cdiv(n, 128)),)
    _single_tile_kernel[grid](
        a, b, c, m, n, k, *a.stride(), *b.stride(), c.stride(0),
        BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, SMS=sms, num_warps=8, num_stages=3,
    )  # fmt: skip
    return c


REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing gets through to stderr, where torch says, past Python's warnings, that a setting is experimental."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def mm_without_split_k(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``torch.mm`` through cuBLASLt, which may not cut K: what serving engines ask of the closed library.

    ``a`` is ``(M, K)``, ``b`` is ``(K, N)``, 16-bit. PyTorch's settings are as before afterwards. Unlike the process
    that ``lab.cublaslt`` starts, this one leaves the library its workspace.

    Raises:
        RuntimeError, TypeError: cuBLASLt has no such algorithm for these operands; this torch cannot ask for it.
    """
    settings = torch.backends.cuda.matmul
    before = {name: (getattr(settings, name), getattr(settings, f"{name}_split_k", True)) for name in REDUCTIONS}
    library = torch.backends.cuda.preferred_blas_library()
    try:
        with _silent():
            torch.backends.cuda.preferred_blas_library("cublaslt")
        for name in REDUCTIONS:
            setattr(settings, name, (False, False))  # no reduction in 16 bits; no split along K at all
        return torch.mm(a, b)
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
        with _silent():
            torch.backends.cuda.preferred_blas_library(library)


# -------------------------------------------------------------------------------------------------- norm

# A row is divided among the threads of one block. How many threads that is decides who adds what to what:
# with the block size taken from the number of rows, the sum of a row depends on the batch it sits in.
ROW_BLOCKED_CUDA = r"""
__device__ float to_float(unsigned short bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

__device__ unsigned short to_bf16(float x) {  // round to nearest, ties to even; a NaN stays one
  unsigned bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct alignas(16) Vector { unsigned short v[8]; };

extern "C" __global__ void rms_norm_row_blocked(const Vector* x, const Vector* residual, const Vector* weight,
                                                Vector* y, Vector* residual_out, int n, float eps) {
  const int vectors = n / 8;
  const long long start = static_cast<long long>(blockIdx.x) * vectors;
  float sum = 0.f;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    Vector a = x[start + i];
    if (residual) {
      Vector r = residual[start + i];
      for (int j = 0; j < 8; ++j) a.v[j] = to_bf16(to_float(a.v[j]) + to_float(r.v[j]));
      residual_out[start + i] = a;
    }
    for (int j = 0; j < 8; ++j) sum += to_float(a.v[j]) * to_float(a.v[j]);
  }
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  __shared__ float warp_sum[32];
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = threadIdx.x % 32 < blockDim.x / 32 ? warp_sum[threadIdx.x % 32] : 0.f;
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  const float scale = rsqrtf(sum / n + eps);
  const Vector* normed = residual ? residual_out : x;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    Vector a = normed[start + i], w = weight[i];
    for (int j = 0; j < 8; ++j) a.v[j] = to_bf16(to_float(a.v[j]) * scale * to_float(w.v[j]));
    y[start + i] = a;
  }
}
"""


@lru_cache
def _row_blocked_kernel(capability: tuple[int, int]) -> Kernel:
    """Compile the CUDA C++ above with NVRTC, Nvidia's run-time compiler, through cuda.core."""
    from cuda.core import Device, Program, ProgramOptions

    Device().set_current()
    options = ProgramOptions(std="c++17", arch="sm_{}{}".format(*capability))
    return Program(ROW_BLOCKED_CUDA, "c++", options).compile("cubin").get_kernel("rms_norm_row_blocked")


def block_size(m: int) -> int:
    """Threads per row of the row-blocked kernel: many while there are few rows, few once there are many."""
    return 1024 if m < 256 else 256


def rms_norm_row_blocked(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm as production CUDA kernels do it: fast, and not batch-invariant (see ``block_size``).

    ``x`` and ``residual`` are contiguous bfloat16 ``(m, n)`` with n a multiple of 8, ``weight`` is ``(n,)``.
    Returns ``y``, or ``(y, x + residual)`` with a residual. Needs a GPU of Nvidia and cuda.core.
    """
    from cuda.core import LaunchConfig, Stream, launch

    m, n = x.shape
    y = torch.empty_like(x)
    summed = torch.empty_like(x) if residual is not None else None
    kernel = _row_blocked_kernel(torch.cuda.get_device_capability(x.device))
    launch(
        Stream.from_handle(torch.cuda.current_stream().cuda_stream),
        LaunchConfig(grid=m, block=block_size(m)),
        kernel,
        *(0 if t is None else t.data_ptr() for t in (x, residual, weight, y, summed)),
        np.int32(n),
        np.float32(eps),
    )
    return y if residual is None else (y, summed)


def rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's own operator, after a separate addition where there is a residual."""
    if residual is None:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    summed = x + residual
    return F.rms_norm(summed, (x.shape[-1],), weight, eps), summed


@lru_cache
def rms_norm_compiled() -> Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
    """``rms_norm_torch`` through torch.compile, with sizes left dynamic."""
    # It compiles anew for one row, for as many rows as columns, with and without a residual, ... and after eight
    # times it would quietly run uncompiled; fullgraph makes that an error.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(rms_norm_torch, dynamic=True, fullgraph=True)


def rms_norm_liger(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Liger-Kernel's Triton kernels, in the casting mode of Llama. Needs liger-kernel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if residual is None:
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)


def available(peers: dict[str, Callable], *args: object) -> tuple[dict[str, Callable], dict[str, str]]:
    """Split ``peers`` into those that run on ``args`` here and those that do not, with the reason in one line."""
    runs, reasons = {}, {}
    for name, fn in peers.items():
        try:
            fn(*args)
            runs[name] = fn
        except Exception as error:  # any reason a peer cannot run here is one the lesson reports and goes on
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return runs, reasons


# --------------------------------------------------------------------------------------------- attention


def sdpa(backend: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """``scaled_dot_product_attention`` held to one backend: flash, cudnn, efficient or math.

    The function takes queries ``(batch, heads, q_len, dim)`` and keys and values ``(batch, heads, kv_len, dim)``.

    Raises:
        ValueError: an unknown backend.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    if backend not in backends:
        raise ValueError(f"backend must be one of {sorted(backends)}, got backend={backend!r}")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backends[backend]):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def causal_sdpa(backend: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """One backend of ``scaled_dot_product_attention``, called as ``kernels.attention.attention`` is.

    The function takes ``(batch, length, heads, dim)``, and sets the last query on the last key. Its ValueError: fewer
    queries than keys, and more than one, for another backend than flash; PyTorch's mask would begin at the first key.

    Raises:
        ValueError: an unknown backend.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
    if backend not in backends:
        raise ValueError(f"backend must be one of {sorted(backends)}, got backend={backend!r}")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q_len, kv_len = q.shape[1], k.shape[1]
        options = {"is_causal": q_len > 1}
        if 1 < q_len < kv_len:
            if backend != "flash":
                raise ValueError(f"{backend} cannot mask {q_len} queries at the end of {kv_len} keys")
            options = {"attn_mask": causal_lower_right(q_len, kv_len)}
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backends[backend]):
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)
        return out.transpose(1, 2)

    return attend


def attention_by(plan: AttentionPlan) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Our causal attention under another plan than its own, to see what the plan costs.

    The function takes operands of ``kernels.attention.attention`` and gives other bits than it.
    """

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        sizes = {"batch": q.shape[0], "q_len": q.shape[1], "kv_len": k.shape[1]}
        _launch(AttentionCall(q, k, v, out, None, True, None, _scale_log2(None, q.shape[3]), **sizes), plan, None)
        return out

    return attend


ENDLESS = 1 << 20
"""A chunk that no sequence here fills."""


def plan_by_load(plan: AttentionPlan, batch: int, heads_kv: int, kv_len: int, sms: int) -> AttentionPlan:
    """``plan`` with chunks as long as one round of the SMs allows. It follows the batch: what invariance forbids."""
    for chunk in (256, 1024, 2048):
        if batch * heads_kv * triton.cdiv(kv_len, chunk) <= sms:
            return replace(plan, chunk=chunk, early_chunk=chunk, early=0)
    return replace(plan, chunk=ENDLESS, early_chunk=ENDLESS, early=0)
