"""The text of the wide instruction: what each one multiplies, and which registers it adds to."""

import re

import pytest

wgmma = pytest.importorskip("kernels.wgmma")


@pytest.mark.parametrize("widths", [(208,), (128, 64, 16), (256, 64), (8,)])
def test_every_column_meets_its_rows_and_its_registers_at_every_step(widths):
    copies, steps = 4, 4
    text = wgmma.wgmma_ptx(widths, copies, steps, "bf16")
    at, seen = {"left": 0, "right": 0}, []
    for line in text.splitlines():
        if moved := re.fullmatch(r"(add|sub)\.s64 (\w+), \2, (-?\d+);", line):
            sign, name, units = moved.groups()
            at[name] += (1 if sign == "add" else -1) * int(units)
        elif found := re.fullmatch(
            r"wgmma\.mma_async\.\S+\.m64n(\d+)k16\.f32\.bf16\.bf16 {(.*)}, left, right, .*", line
        ):
            registers = [int(register[1:]) for register in found.group(2).split(", ")]
            seen.append((int(found.group(1)), registers, at["left"] * 16, at["right"] * 16))
    want, bytes_along_k = [], 32  # 16 elements of two bytes
    for step in range(steps):
        column = 0
        for width in widths:
            registers = list(range(column // 2, (column + width) // 2))
            want.append((width, registers, step * bytes_along_k, column * 128 + step * bytes_along_k))
            column += width
    assert seen == want


@pytest.mark.parametrize("widths", [(208,), (128, 64, 16)])
def test_addresses_follow_the_sums_among_the_operands(widths):
    sums, copies = sum(widths) // 2, 8
    text = wgmma.wgmma_ptx(widths, copies, 1, "f16")
    assert re.findall(r"shr\.u32 low, \$(\d+), 4;", text) == [str(sums), str(sums + copies)]
    inputs = wgmma._constraints(sums, 2 * copies).split(",")
    assert inputs == ["=f"] * sums + ["r"] * 2 * copies + [str(at) for at in range(sums)]


class Compiled:
    """A compiled kernel as far as it is looked at."""

    def __init__(self, *offsets: int) -> None:
        self.asm = {
            "llir": "\n".join(f"ptr addrspace(3) getelementptr (i8, ptr @global_smem, i32 {x})" for x in offsets)
        }


def test_a_ring_that_is_not_first_is_refused():
    assert wgmma.check_first(Compiled(4096, 5000), 4096) is None
    with pytest.raises(RuntimeError, match=r"at bytes \[1024, 5000\] of shared memory, where a ring of size=4096"):
        wgmma.check_first(Compiled(5000, 1024), 4096)
    with pytest.raises(RuntimeError, match="nowhere of shared memory, where a ring of size=4096"):
        wgmma.check_first(Compiled(), 4096)  # a text that is read wrongly proves nothing
