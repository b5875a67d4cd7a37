"""Digests of fixed products: two runs, or two processes, are compared without keeping a result.

    python -m lab.digests --seed 0

computes the products on the GPU at hand and prints one JSON line each; ``run_apart`` does that from a lesson. The
operands follow from the seed, so all processes on one machine have the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product

import torch

from kernels.launch import borrowed_counters
from kernels.matmul import matmul
from lab.check import bits
from lab.cublaslt import Shape, operands
from lab.device import ROOT
from lab.tune import MODELS, TENSOR_PARALLEL, shard

MODEL = "llama-3-8b"
SHAPES = tuple(dict.fromkeys(shard(MODEL, layer, tp) for tp, layer in product(TENSOR_PARALLEL, MODELS[MODEL])))
"""N and K of every weight of the model, whole or divided among GPUs."""

ROWS = (1, 100, 1024)
"""Rows of the products: of one batch the first so many."""

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def digest(x: torch.Tensor) -> str:
    """SHA-256 of the bytes of ``x``, row after row."""
    return hashlib.sha256(bits(x).cpu().numpy()).hexdigest()


def digests(
    mm: Product,
    seed: int,
    device: torch.device,
    dtype: str = "bfloat16",
    shapes: Iterable[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
) -> Iterator[dict]:
    """Columns m, n, k and digest of ``mm(a, b)`` for every shape and number of rows."""
    for n, k in shapes:
        a, b = operands(Shape(dtype, n, k), seed, device, max(rows))
        for m in rows:
            yield {"m": m, "n": n, "k": k, "digest": digest(mm(a[:m], b))}


def replayed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``matmul(a, b)`` as a CUDA graph leaves it when it is replayed over a result that was spoilt."""
    matmul(a, b)  # compiles: nothing of that may happen under capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with borrowed_counters():
        with torch.cuda.graph(graph):
            c = matmul(a, b)
        c.fill_(float("nan"))
        graph.replay()
        return c.clone()


def run_apart(seed: int, processes: int = 2, timeout: float = 300) -> list[list[dict]]:
    """``digests`` of ``matmul`` from fresh processes, which run side by side.

    Raises:
        RuntimeError: a process failed; the message is its last line.
    """
    command = [sys.executable, "-m", "lab.digests", "--seed", str(seed)]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    found = []
    try:
        for process in started:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"a process took more than {timeout:.0f} s") from None
            if process.returncode:
                raise RuntimeError((err.strip() or f"exit status {process.returncode}").splitlines()[-1])
            found.append([json.loads(line) for line in out.splitlines() if line.startswith("{")])
    finally:
        for process in started:
            process.kill()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the digests of our matmul."""
    parser = argparse.ArgumentParser(prog="python -m lab.digests", description="Digests of fixed products.")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the operands (0)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"{parser.prog}: needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    for row in digests(matmul, options.seed, torch.device("cuda")):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
