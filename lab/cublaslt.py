"""Random shapes, the rows of a product that change bits with the batch, and cuBLASLt with its split-K taken away.

    CUBLASLT_WORKSPACE_SIZE=1 CUBLAS_WORKSPACE_CONFIG=:16:8 python -m lab.cublaslt --shapes 240 --seed 0

sweeps the shapes and prints one JSON line each; ``run_apart`` does that from a lesson. It takes a process of its own:
the size of the workspace is read from the environment when the library starts, and stays.

Without a workspace there is nowhere to put partial sums, so the library cannot cut K; with reduced-precision
reductions off it may not add partial sums in 16 bits either. That is how serving engines ask a closed library for
batch invariance on Hopper.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from kernels.matmul import matmul_ref
from lab.check import check_prefixes
from lab.device import ROOT
from lab.timing import relative_error

STARVED = {"CUBLASLT_WORKSPACE_SIZE": "1", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
"""KiB for cuBLASLt; eight buffers of 16 KiB for cuBLAS itself. The usual size on Hopper is 32 MiB."""

WHOLE = 2048
"""Rows of the batch that smaller ones are compared with."""

SIZES = (1, 2, 7, 16, 33, 64, 100, 128, 256, 257, 512, 777, 1024)
"""Rows of those smaller batches: the first so many of the large one."""

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Shape:
    """A weight of n outputs and k inputs, and the type of everything."""

    dtype: str
    n: int
    k: int


def random_shapes(count: int, seed: int, largest: int = 8192, dtypes: Sequence[str] = DTYPES) -> list[Shape]:
    """``count`` different shapes, the dtypes in turn: half round, a quarter multiples of 8, a quarter odd.

    Round means a multiple of 128, as in most models. Small and large sizes are equally likely (in the logarithm).
    """
    rng = random.Random(seed)  # not torch's: every contender, in any process and on any device, gets the same shapes
    found: dict[Shape, None] = {}
    while len(found) < count:
        unit, odd = rng.choice([(128, False), (128, False), (8, True), (1, True)])

        def size(unit: int = unit, odd: bool = odd) -> int:
            units = round(2 ** rng.uniform(7, largest.bit_length() - 1) / unit)
            return unit * max(1, units - 1 + units % 2 if odd else units)

        found[Shape(dtypes[len(found) % len(dtypes)], size(), size())] = None
    return list(found)


def operands(shape: Shape, seed: int, device: torch.device, rows: int = WHOLE) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal random ``(rows, k)`` and ``(k, n)``, the second a transposed weight scaled by 1/sqrt(k)."""
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + shape.n * 8209 + shape.k)
    dtype = getattr(torch, shape.dtype)
    a = torch.randn(rows, shape.k, generator=generator, device=device)
    weight = torch.randn(shape.n, shape.k, generator=generator, device=device) * shape.k**-0.5
    return a.to(dtype), weight.to(dtype).t()


def rows_that_change(
    mm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shapes: Sequence[Shape],
    seed: int,
    device: torch.device,
    sizes: Sequence[int] = SIZES,
    whole: int = WHOLE,
) -> Iterator[dict]:
    """For each shape: how many rows of the smaller batches differ from the same rows of the large one.

    Yields the shape's fields, ``m`` (rows of the large batch), ``rows`` (rows compared) and ``rows_differing``.

    Raises:
        ValueError: a product is wrong beyond rounding, so its bits are of no interest.
    """
    for shape in shapes:
        a, b = operands(shape, seed, device, whole)
        error, limit = relative_error(mm(a, b)[:8], matmul_ref(a[:8], b)), 2 * torch.finfo(a.dtype).eps + 1e-5
        if not error <= limit:
            raise ValueError(f"{shape}: relative error {error:.1e} is above {limit:.1e}: wrong, not just different")
        report = check_prefixes(lambda a, b=b: mm(a, b), a, sizes)
        compared = sum(rows for _, rows, _ in report.cases)
        yield asdict(shape) | {"m": whole, "rows": compared, "rows_differing": report.rows_differing}


def starve() -> None:
    """Make ``torch.mm`` use cuBLASLt, without reductions in 16 bits.

    Raises:
        RuntimeError: this process was not started with ``STARVED`` in its environment, or there is no GPU.
    """
    missing = [f"{name}={value}" for name, value in STARVED.items() if os.environ.get(name) != value]
    if missing:
        raise RuntimeError(f"the workspace is set before the process starts, with {' '.join(missing)}")
    if not torch.cuda.is_available():
        raise RuntimeError("needs a GPU: torch.cuda.is_available() is False")
    torch.backends.cuda.preferred_blas_library("cublaslt")
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        try:
            setattr(torch.backends.cuda.matmul, name, (False, False))  # the second one forbids split-K outright
        except (TypeError, RuntimeError):  # a torch that knows only the first one
            setattr(torch.backends.cuda.matmul, name, False)


def run_apart(count: int, seed: int, timeout: float = 300) -> list[dict]:
    """``rows_that_change`` of the starved cuBLASLt on ``random_shapes(count, seed)``, from a fresh process.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    command = [sys.executable, "-m", "lab.cublaslt", "--shapes", str(count), "--seed", str(seed)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | STARVED, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the process took more than {timeout:.0f} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.cublaslt", description="Starved cuBLASLt over random shapes."
    )
    parser.add_argument("--shapes", type=int, default=240, metavar="N", help="how many (240)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the shapes and the numbers (0)")
    options = parser.parse_args(arguments)
    try:
        starve()
        for row in rows_that_change(
            torch.mm, random_shapes(options.shapes, options.seed), options.seed, torch.device("cuda")
        ):
            print(json.dumps(row), flush=True)
    except (RuntimeError, ValueError) as error:
        print(f"{parser.prog}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
