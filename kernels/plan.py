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
    every M alike, and at lengths that every step along K divides.

    Raises:
        ValueError: ``precision`` is not one of ``PRECISIONS``, or is not ``"ieee"`` for 16-bit operands.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got precision={precision!r}")
    if itemsize != 4 and precision != "ieee":
        raise ValueError(f"precision={precision!r} is for float32 operands; 16-bit products are exact in fp32")
    chunks = 1
    if k >= 4096:
        chunks = 4 if n <= 1280 else 2 if n <= 2560 else 1
    chunk_k = -(-k // (chunks * CHUNK_UNIT)) * CHUNK_UNIT
    return MatmulPlan(k, chunks, chunk_k, precision, block_k=32 if precision == "tf32x3" else None)
