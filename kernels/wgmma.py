"""Hopper's matrix instruction as wide as a tile: any multiple of eight columns, up to 256.

``wgmma`` multiplies 64 rows by so many columns, 16 elements along K. Gluon's, ``warpgroup_mma``, knows only powers of
two, as a Triton tensor has only such sides. A tile of 208 columns would be three instructions, 128 + 64 + 16, and
each would read the left operand from shared memory anew. Here the sums of a tile are several tensors of equal width,
and the instruction is written out in PTX: the registers that it wants are those of these tensors, one after another.

It changes no bit of a sum: which other columns an instruction multiplies is schedule.

Source: Nvidia's "PTX ISA", chapter "Asynchronous warpgroup level matrix instructions": the registers of the sums, and
the descriptor of an operand in shared memory.
"""

from __future__ import annotations

import re
from functools import lru_cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROW_BYTES = gl.constexpr(128)
"""Bytes of a row of an operand in shared memory: 64 elements of 16 bits, swizzled as TMA writes them."""

ROWS = gl.constexpr(64)
"""Rows of the left operand that a warpgroup, four warps, multiplies."""


@gluon.constexpr_function
def wgmma_ptx(widths: tuple[int, ...], copies: int, steps: int, dtype: str) -> str:
    """The text of an instruction for each of ``widths``, ``steps`` times; elements are ``dtype``, bf16 or f16.

    Its operands: the sums, two columns a register; then ``copies`` times the left address, and the right one.
    """
    columns = sum(widths)
    lines = ["{", ".reg .pred yes;", ".reg .b32 low;", ".reg .b64 left, right;", "setp.eq.b32 yes, 0, 0;"]
    for operand, name in enumerate(("left", "right")):
        # A descriptor has the address in units of 16 bytes; from bit 16 what this swizzle has no use for; from bit 32
        # the bytes of eight rows, 1024, in units of 16; from bit 62 the swizzle, 1 for 128 bytes.
        lines += [f"shr.u32 low, ${columns // 2 + operand * copies}, 4;", "or.b32 low, low, 0x10000;"]
        lines += [f"mov.b64 {name}, {{low, {1 << 30 | 64}}};"]
    lines += ["wgmma.fence.sync.aligned;"]
    for _ in range(steps):
        first = 0
        for width in widths:
            sums = ", ".join(f"${at}" for at in range(first // 2, (first + width) // 2))
            shape = f"m64n{width}k16.f32.{dtype}.{dtype}"
            lines += [f"wgmma.mma_async.sync.aligned.{shape} {{{sums}}}, left, right, yes, 1, 1, 0, 0;"]
            lines += [f"add.s64 right, right, {8 * width};"]  # a row of the right operand for each column
            first += width
        # 16 elements further along K
        lines += ["add.s64 left, left, 2;", f"sub.s64 right, right, {8 * columns - 2};"]
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "}"])


@gluon.constexpr_function
def _constraints(sums: int, others: int) -> str:
    """Of a text that changes ``sums`` registers in place, and reads ``others``."""
    return ",".join(["=f"] * sums + ["r"] * others + [str(at) for at in range(sums)])


@gluon.constexpr_function
def _floats(count: int) -> tuple:
    return (gl.float32,) * count


@gluon.constexpr_function
def _name(dtype) -> str:
    return {gl.bfloat16: "bf16", gl.float16: "f16"}[dtype]


@gluon.jit
def wgmma(sums, left, right, WIDTHS: gl.constexpr, BLOCK_K: gl.constexpr, DTYPE: gl.constexpr):
    """Begin to add the product of two operands, BLOCK_K elements along K, to ``sums``; ``wait_for_wgmma`` ends it.

    ``sums``: fp32 tensors of equal shape, 64 rows for each warpgroup. Side by side they have as many columns as the
    instructions, whose widths are WIDTHS.
    ``left``, ``right``: where in shared memory the 64 rows of this warpgroup's left operand begin, and the rows of
    the right one, one for each column; in bytes, divisible by 1024. Elements are DTYPE, bfloat16 or float16.
    """
    HELD: gl.constexpr = sums[0].shape[1] // 2  # registers a thread, of one of the tensors
    PTX: gl.constexpr = wgmma_ptx(WIDTHS, HELD, BLOCK_K // 16, _name(DTYPE))
    # A text is for HELD elements of each of its operands: of an address, too, though they are all the same.
    HOW: gl.constexpr = _constraints(HELD * len(sums), 2 * HELD)
    return gl.inline_asm_elementwise(PTX, HOW, (left, right) + sums, _floats(len(sums)), False, HELD)  # noqa: RUF005


@gluon.jit
def wait_for_wgmma(sums, NEWEST: gl.constexpr):
    """``sums`` once every ``wgmma`` has ended but the NEWEST."""
    HELD: gl.constexpr = sums[0].shape[1] // 2
    PTX: gl.constexpr = f"wgmma.wait_group.sync.aligned {NEWEST};"
    HOW: gl.constexpr = _constraints(HELD * len(sums), 0)
    return gl.inline_asm_elementwise(PTX, HOW, sums, _floats(len(sums)), False, HELD)


@gluon.jit
def shared_memory():
    """Where the program's shared memory begins, and so the largest of its buffers: Triton lays them out by size.

    Gluon does not say where a buffer is. ``check_first`` sees to it that it is there.
    """
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], gl.int32, True, 1)


@gluon.jit
def warpgroup():
    """Number of this thread's warpgroup, known to be the same in all threads of a warp."""
    PTX: gl.constexpr = """
        {
            .reg .b32 group;
            mov.u32 group, %tid.x;
            shr.u32 group, group, 7;
            shfl.sync.idx.b32 $0, group, 0, 31, 0xffffffff;
        }
    """
    return gl.inline_asm_elementwise(PTX, "=r", [], gl.int32, True, 1)


@lru_cache
def check_first(compiled, size: int) -> None:
    """Refuse a compiled kernel in whose shared memory anything lies before byte ``size``, besides one first buffer.

    Raises:
        RuntimeError: something does, or nothing lies behind it, where barriers should: then the ring is not where
            ``shared_memory`` takes it to be.
    """
    others = [int(offset) for offset in re.findall(r"@global_smem, i(?:32|64) (\d+)", compiled.asm["llir"])]
    if not others or min(others) < size:
        found = f"at bytes {sorted(set(others))[:3]}" if others else "nowhere"
        raise RuntimeError(f"this Triton puts buffers {found} of shared memory, where a ring of size={size} is due")
