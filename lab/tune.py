"""Search the fastest schedule for every shape on the GPU at hand and write ``kernels/tuned/<gpu>.json``.

    python -m lab.tune [--model llama-3-8b ...] [--tp 1 ...] [--m 1 16 ...]

Every candidate is first held bit by bit against the plan as another kernel computes it; one that differs is no
schedule, and stops the search. So tuning can change how long a result takes and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import product

import torch
import triton
from tqdm import tqdm

from kernels import tuned
from kernels.matmul import PERSISTENT_TILES, SPECIALISED_TILES, MatmulSchedule, has_wgmma, matmul
from kernels.plan import MatmulPlan, plan_matmul
from lab import check
from lab.device import PRESETS, commit, current_device
from lab.timing import ring_size, time_graphs

MODELS = {
    # layer: (N, K); query, key and value stacked, gate and up stacked
    "llama-3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "llama-3-70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
}
SPLIT_ALONG_K = ("o", "down")
VARIANTS = 12
"""Most different schedules for one model on one number of GPUs."""
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def shard(model: str, layer: str, tp: int) -> tuple[int, int]:
    """(N, K) of one GPU's part of a layer's weight under tensor parallelism over ``tp`` GPUs."""
    n, k = MODELS[model][layer]
    return (n, k // tp) if layer in SPLIT_ALONG_K else (n // tp, k)


def thin_schedules() -> Iterator[MatmulSchedule]:
    """For few rows: the weight on the left, a deep pipeline."""
    for block_m, block_n, (block_k, stages) in product((16, 32, 64), (32, 64, 128), ((128, 4), (128, 6), (256, 4))):
        if (block_m + block_n) * block_k * 2 * stages <= 200_000:
            yield MatmulSchedule(block_m, block_n, block_k, 4, stages, swap=True, persistent=True)
    yield MatmulSchedule(64, 32, 128, 4, 7, specialised=True)


def candidates(m: int, plan: MatmulPlan, wgmma: bool) -> list[MatmulSchedule]:
    """Schedules worth trying for ``m`` rows under ``plan``."""
    found = [s for s in thin_schedules() if m <= 128 and s.block_m <= max(16, triton.next_power_of_2(m))]
    if m > 32:
        at_least = 128 if m >= 1024 else 64
        found += [s for s, _ in (*PERSISTENT_TILES, *SPECIALISED_TILES) if at_least <= s.block_m <= 2 * m]
    if plan.chunks > 1 and m <= 1024:
        found += [replace(s, split=True) for s in found if s.persistent and not s.specialised]
    return [s for s in dict.fromkeys(found) if s.fits(plan) and (wgmma or not s.specialised)]


def reference_schedule(m: int) -> MatmulSchedule:
    """Another kernel altogether, through pointers: what every candidate is compared with."""
    return MatmulSchedule(64, 64, 64, 4, 3) if m > 16 else MatmulSchedule(16, 64, 64, 4, 3, swap=True)


def time_candidates(m: int, n: int, k: int) -> dict[MatmulSchedule, float]:
    """Milliseconds per call of every candidate in bf16, weights cold.

    Raises:
        RuntimeError: a candidate's bits differ from the plan's.
    """
    device = current_device()
    count = min(ring_size(2 * n * k, device), 64)
    weights = [(torch.randn(n, k, device="cuda") * k**-0.5).bfloat16() for _ in range(count)]
    rows = [torch.randn(m, k, device="cuda").bfloat16() for _ in range(count)]
    want = matmul(rows[0], weights[0].t(), schedule=reference_schedule(m))
    rings = {}
    for schedule in candidates(m, plan_matmul(n, k, 2), has_wgmma(torch.device("cuda"))):
        got = matmul(rows[0], weights[0].t(), schedule=schedule)
        if not check.same_bits(got, want):
            raise RuntimeError(f"{schedule} at m={m}, n={n}, k={k} is no schedule: {check.compare(got, want)}")
        rings[schedule] = [
            lambda a=a, w=w, s=schedule: matmul(a, w.t(), schedule=s) for a, w in zip(rows, weights, strict=True)
        ]
    timings = time_graphs(rings, replace(PRESETS["full"], warmup_ms=3, measure_ms=10))
    return {schedule: timing.median_ms for schedule, timing in timings.items()}


def fastest_few(times: dict[tuple, dict[MatmulSchedule, float]], limit: int) -> dict[tuple, MatmulSchedule]:
    """A schedule for every point, at most ``limit`` different ones in all: each costs a compilation.

    Starts from the fastest of each point and gives up, one by one, the schedule that hurts the worst-served point
    least, and among equals the sum of all points.
    """

    def slowness(kept: set[MatmulSchedule]) -> tuple[float, float]:
        losses = []
        for point in times.values():
            best_kept = min((ms for schedule, ms in point.items() if schedule in kept), default=math.inf)
            losses.append(math.log(best_kept / min(point.values())))
        return max(losses), sum(losses)

    kept = {min(point, key=point.get) for point in times.values()}
    while len(kept) > limit:
        kept.remove(min(kept, key=lambda schedule: slowness(kept - {schedule})))
    return {point: min(set(tried) & kept, key=tried.get) for point, tried in times.items()}


def _compile(jobs: list[tuple[int, int, MatmulSchedule]]) -> None:
    for n, k, schedule in jobs:
        a = torch.zeros(64, k, device="cuda", dtype=torch.bfloat16)
        matmul(a, a.new_zeros(n, k).t(), schedule=schedule)


def compile_all(shapes: set[tuple[int, int]]) -> None:
    """Compile every candidate into Triton's cache, in several processes: one alone would take minutes."""
    one_each = {plan_matmul(n, k, 2).chunks: (n, k) for n, k in shapes}.values()
    wgmma = has_wgmma(torch.device("cuda"))
    everything = list(
        {(n, k, s) for n, k in one_each for m in TOKENS for s in candidates(m, plan_matmul(n, k, 2), wgmma)}
    )
    workers = max(min((os.cpu_count() or 2) - 2, 12), 1)
    context = multiprocessing.get_context("spawn")
    parts = [context.Process(target=_compile, args=(everything[i::workers],)) for i in range(workers)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()


def _fields(schedule: MatmulSchedule) -> dict:
    """What distinguishes ``schedule`` from the defaults of its fields."""
    default = MatmulSchedule(0, 0, 0, 0, 0)
    return {key: value for key, value in asdict(schedule).items() if value != getattr(default, key)}


def main(arguments: list[str] | None = None) -> int:
    """Tune the shapes asked for and merge them into this GPU's table."""
    parser = argparse.ArgumentParser(prog="python -m lab.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tp", nargs="+", type=int, choices=(1, 2, 4, 8), default=[1, 2, 4, 8])
    parser.add_argument("--m", nargs="+", type=int, default=list(TOKENS), help="numbers of rows")
    options = parser.parse_args(arguments)
    device = current_device()
    if not device.is_gpu:
        parser.error("tuning measures on a GPU, and torch sees none here")
    shapes = {shard(model, layer, tp) for model, tp in product(options.model, options.tp) for layer in MODELS[model]}
    compile_all(shapes)
    path = tuned.path_of(device.name)
    table = {}
    if path.is_file():
        table = {(shape["n"], shape["k"]): shape for shape in json.loads(path.read_text())["shapes"]}
    for model, tp in tqdm(list(product(options.model, options.tp)), desc="models", file=sys.stdout):
        group = {shard(model, layer, tp) for layer in MODELS[model]}
        points = product(sorted(options.m), group)
        chosen = fastest_few({(n, k, m): time_candidates(m, n, k) for m, (n, k) in points}, VARIANTS)
        for n, k in group:
            rows = [{"m": m, "schedule": _fields(chosen[n, k, m])} for m in sorted(options.m)]
            table[n, k] = {"n": n, "k": k, "rows": rows}
    origin = {"gpu": device.name, "torch": device.torch, "triton": device.triton, "commit": commit()}
    origin["measured_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    path.parent.mkdir(exist_ok=True)
    half = path.with_suffix(".tmp")
    half.write_text(json.dumps({**origin, "shapes": [table[key] for key in sorted(table)]}, indent=1) + "\n")
    os.replace(half, path)
    print(f"{len(shapes)} shapes tuned: {path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
