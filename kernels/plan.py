"""Reduction plans: which numbers are added to which, in what order, in what type, and where they are rounded.

A plan is all that may touch the bits of a result. It is computed from the operator, the dtype and the
weight-side sizes alone, never from the number of rows, the GPU or anything tuned. Whatever else a launch
decides (tile shape, warps, pipeline depth, which operand goes left) is a *schedule*: those live beside the
kernels that use them and are free to follow the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

MAX_ROW = 65536
"""Longest row a one-pass row reduction holds in registers: 32 warps of 32 lanes with 64 fp32 values each."""

PRECISIONS = ("ieee", "tf32", "tf32x3")
"""How fp32 operands are multiplied. 16-bit operands have exact fp32 products and take no such choice."""


CHUNK_UNIT = 256
"""Lengths of chunks along K are multiples of this, and so of every step that a matmul schedule takes."""


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least ``n`` (1 for ``n`` <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class RowPlan:
    """A row of ``n`` numbers is summed in fp32 by a balanced binary tree over ``width`` leaves.

    Leaf ``i`` holds element ``i``, or zero past the end of the row. Neighbours are added first: (0, 1),
    (2, 3), ...; then neighbouring sums; ``log2(width)`` levels in all. Every addition has two operands and
    fp32 addition commutes, so the tree fixes every bit: threads and warps can divide the leaves as they like.
    """

    n: int
    width: int

    @property
    def levels(self) -> int:
        """Depth of the tree: the number of roundings between a leaf and the root."""
        return self.width.bit_length() - 1


@lru_cache
def plan_row(n: int) -> RowPlan:
    """The plan of a sum over a row of ``n`` elements.

    Raises:
        ValueError: ``n`` is below 1 or above ``MAX_ROW``.
    """
    if not 1 <= n <= MAX_ROW:
        raise ValueError(f"n must be between 1 and {MAX_ROW}, got n={n}")
    return RowPlan(n=n, width=next_power_of_2(n))


@dataclass(frozen=True)
class MatmulPlan:
    """How one output element of ``(M, K) @ (K, N)`` is summed over its ``k`` products.

    K is cut into ``chunks`` stretches of ``chunk_k`` (the last may be shorter). Each is summed left to right in
    fp32, from zero; then the sums of the chunks are added left to right. One chunk is one pass over all of K.

    ``precision`` says how fp32 operands enter the multiplier (``"ieee"``, ``"tf32"`` or ``"tf32x3"``).
    ``block_k`` is ``None`` where the length of a K step and the operand order are free: they group the same
    products in the same order. TF32x3 adds three partial products step by step, so there both belong to the
    tree: steps of ``block_k``, ``a`` on the left.
    """

    k: int
    chunks: int
    chunk_k: int
    precision: str
    block_k: int | None


@lru_cache
def plan_matmul(n: int, k: int, itemsize: int, precision: str = "ieee") -> MatmulPlan:
    """The plan for operands of ``itemsize`` bytes. M is deliberately not an argument.

    A narrow weight has too few columns to occupy a GPU when there are few rows, so its K is cut. It is cut for
    every M alike, so into no more chunks than pay on the whole: with many rows each costs a little. And it is cut
    at lengths that every step along K divides.

    Raises:
        ValueError: ``precision`` is not one of ``PRECISIONS``, or is not ``"ieee"`` for 16-bit operands.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got precision={precision!r}")
    if itemsize != 4 and precision != "ieee":
        raise ValueError(f"precision={precision!r} is for float32 operands; 16-bit products are exact in fp32")
    chunks = 1
    if k >= 4096:
        chunks = 4 if n <= 1024 else 2 if n <= 2048 else 1
    chunk_k = -(-k // (chunks * CHUNK_UNIT)) * CHUNK_UNIT
    return MatmulPlan(k, chunks, chunk_k, precision, block_k=64 if precision == "tf32x3" else None)


HEAD_DIMS = (64, 128, 256)
"""Head dimensions that attention takes."""


@dataclass(frozen=True)
class AttentionPlan:
    """How a query row sums over the keys of its sequence.

    Key positions are cut into chunks and those into blocks of ``block``, all counted from position 0 of the sequence.
    The first ``early`` keys are cut into chunks of ``early_chunk``, the rest into chunks of ``chunk``: with few keys
    more of them must go side by side to occupy a GPU, with many it is the merging that costs. Where a key lies in its
    sequence is all that decides. A chunk starts from nothing and takes its blocks left to right with an online
    softmax; then the chunks are merged left to right. The weights of a block are folded to ``lanes`` partial sums,
    halves first (column ``j`` and column ``j + block / 2``, then a quarter apart, ...); the lanes are added up
    once, at the end.
    """

    head_dim: int
    chunk: int
    block: int
    early_chunk: int
    early: int
    lanes: int = 8

    def chunk_of(self, position: int) -> int:
        """The chunk that holds the key at ``position``."""
        return min(position, self.early) // self.early_chunk + max(position - self.early, 0) // self.chunk

    def start_of(self, chunk: int) -> int:
        """Position of the first key of ``chunk``."""
        early = self.early // self.early_chunk
        return min(chunk, early) * self.early_chunk + max(chunk - early, 0) * self.chunk

    def chunks(self, keys: int) -> int:
        """Into how many chunks ``keys`` keys are cut, none if there is none."""
        return self.chunk_of(keys - 1) + 1 if keys > 0 else 0

    @property
    def folds(self) -> int:
        """How often a block is folded in half until ``lanes`` columns are left."""
        return (self.block // self.lanes).bit_length() - 1


@lru_cache
def plan_attention(head_dim: int, itemsize: int) -> AttentionPlan:
    """The plan for heads of ``head_dim`` elements of ``itemsize`` bytes. No length and no batch is an argument.

    Raises:
        ValueError: ``head_dim`` is not one of ``HEAD_DIMS``, or ``itemsize`` is not 2.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS}, got head_dim={head_dim}")
    if itemsize != 2:
        raise ValueError(f"attention takes 16-bit operands, got itemsize={itemsize}")
    return AttentionPlan(head_dim, chunk=1024, block=64 if head_dim > 128 else 128, early_chunk=512, early=4096)


EXACT_K = (2**31 - 1) // 128**2
"""Most int8 products that an int32 holds the sum of, whatever their values: 131071. A product is at most 128^2."""

PROMOTE_K = 256
"""After how many e4m3 products their sum is added up in fp32. Hopper's tensor cores keep fewer bits than that."""

PROMOTE_KS = (None, 128, 256, 512)
"""The promotion intervals that the kernels take; ``None`` leaves all of K to the tensor core."""


@dataclass(frozen=True)
class W8A8Plan:
    """How one output element of an 8-bit ``(M, K) @ (K, N)`` is summed over its ``k`` products.

    int8 (``exact``): in int32, without a rounding. Integer addition is associative, so there is no order to fix and
    every cut through K is a schedule's to make.

    e4m3: ``promote_k`` products at a time (the last stretch may be shorter) are summed by the tensor core from zero,
    in order, in the instruction's own format; the sums of the stretches are added in fp32, left to right, onto +0.
    ``None``: one stretch.
    """

    k: int
    exact: bool
    promote_k: int | None


@lru_cache
def plan_w8a8(k: int, exact: bool, promote_k: int | None = PROMOTE_K) -> W8A8Plan:
    """The plan of a sum over ``k`` products of int8 (``exact``) or e4m3. Neither M nor N is an argument.

    Raises:
        ValueError: ``k`` int8 products may overflow an int32; ``promote_k`` is not one of ``PROMOTE_KS``.
    """
    if exact and k > EXACT_K:
        raise ValueError(f"K must be at most {EXACT_K} for an exact int32 sum of int8 products, got K={k}")
    if promote_k not in PROMOTE_KS:
        raise ValueError(f"promote_k must be one of {PROMOTE_KS}, got promote_k={promote_k}")
    return W8A8Plan(k, exact, None if exact else promote_k)
