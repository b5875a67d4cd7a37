"""A profiler's counters for single products, read with Nvidia's ``ncu`` in a process of its own.

``ncu`` runs each kernel several times and flushes the caches in between, so what it reads is the traffic of a cold
call. It needs permission to read the GPU's counters, which many machines keep for the administrator; then the error
says so.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kernels.matmul import MatmulSchedule, matmul
from lab.device import ROOT
from lab.peers import single_tile

COUNTERS = (
    "dram__bytes_read.sum",
    "lts__t_sectors_op_read.sum",
    "sm__inst_executed.sum",
    "sm__inst_executed_pipe_tensor_op_gmma.sum",
    "sm__inst_executed_pipe_tensor_op_hmma.sum",
    "sm__cycles_active.avg",
)
"""Bytes from memory; 32-byte sectors read from L2; instructions of all warps; those of the tensor cores, ``wgmma``
of four warps and ``mma`` of one; clocks that an SM had a program. What this GPU does not count is left out."""

OPTIONS = ("--csv", "--print-units", "base", "--clock-control", "none", "--kernel-name", "regex:matmul|single_tile")
"""The clock is left as it is: it belongs to the machine's owner."""


@dataclass(frozen=True)
class Product:
    """``(m, k) @ (k, n)`` in bf16 by a schedule of ours, or by the single tile if ``schedule`` is ``None``."""

    name: str
    m: int
    n: int
    k: int
    schedule: MatmulSchedule | None


def readings(text: str) -> list[dict[str, float]]:
    """Counter to reading of each kernel, in the order they ran, from what ``ncu --csv`` prints.

    Lines before the table belong to the program that was profiled.

    Raises:
        ValueError: there is no table, or a reading is no number.
    """
    lines = text.splitlines()
    start = next((at for at, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        raise ValueError("ncu printed no table")
    kernels: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(lines[start:]):
        value = row["Metric Value"].replace(",", "")  # it writes thousands apart
        kernels.setdefault(row["ID"], {})[row["Metric Name"]] = float(value)
    return list(kernels.values())


def find_ncu() -> str:
    """Path of ``ncu``: on the PATH, or where the CUDA toolkit puts it.

    Raises:
        RuntimeError: it is in neither place.
    """
    places = [shutil.which("ncu"), *map(str, sorted(Path("/usr/local").glob("cuda*/bin/ncu"), reverse=True))]
    found = next((place for place in places if place), None)
    if found is None:
        raise RuntimeError("ncu, Nvidia's profiler for kernels, is not installed here")
    return found


def _run(command: Sequence[str], timeout: float) -> str:
    """What a command prints; RuntimeError with the line that says why if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the profiler took more than {timeout:.0f} s") from None
    said = (done.stdout + done.stderr).splitlines()
    errors = [line for line in said if "==ERROR==" in line]
    if done.returncode or errors:
        raise RuntimeError([*errors[:1], *said[-1:], f"exit status {done.returncode}"][0][:200])
    return done.stdout


def profile(products: Sequence[Product], timeout: float = 120) -> list[dict[str, float]]:
    """``COUNTERS`` to readings for each of ``products``.

    Raises:
        RuntimeError: there is no ``ncu``, it may not read counters, or it saw another number of kernels.
    """
    ncu = find_ncu()
    known = set(_run([ncu, "--query-metrics"], timeout).split())
    counters = [name for name in COUNTERS if name.split(".")[0] in known]
    if not counters:
        raise RuntimeError("ncu knows none of the counters on this GPU")
    jobs = json.dumps([asdict(product) for product in products])
    command = [ncu, *OPTIONS, "--metrics", ",".join(counters), sys.executable, "-m", "lab.counters", jobs]
    try:
        found = readings(_run(command, timeout))
    except ValueError as wrong:
        raise RuntimeError(str(wrong)) from None
    if len(found) != len(products):
        raise RuntimeError(f"ncu saw {len(found)} kernels of {len(products)}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Call each product once: what ``ncu`` watches."""
    parser = argparse.ArgumentParser(prog="python -m lab.counters", description="Products for ncu to watch.")
    parser.add_argument("products", type=json.loads, metavar="JSON", help="a list of the fields of Product")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    for fields in options.products:
        a = torch.randn(fields["m"], fields["k"], device=device).to(dtype)
        b = torch.randn(fields["n"], fields["k"], device=device).to(dtype).t()
        schedule = fields["schedule"]
        single_tile(a, b) if schedule is None else matmul(a, b, schedule=MatmulSchedule(**schedule))
    return 0


if __name__ == "__main__":
    sys.exit(main())
