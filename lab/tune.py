"""Search the fastest schedule for every shape on the GPU at hand and write ``kernels/tuned/<gpu>.json``.

    python -m lab.tune [--model llama-3-8b ...] [--tp 1 ...] [--m 64 1024 ...]

Every candidate is first held bit by bit against the plan as another kernel computes it; one that differs is no
schedule, and stops the search. So tuning can change how long a result takes and nothing else.

Two GPUs of one name differ by some per cent, and so do two runs on one. So every run is kept, in
``data/<gpu>/tune.json``, and the table is drawn from all of them. (Runs of kernels that are no longer the same do not
belong there: put the file away first.) Without measuring, on any machine:

    python -m lab.tune --runs data/nvidia-h200/tune.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain, product
from pathlib import Path
from statistics import geometric_mean, median
from typing import NoReturn

import torch
import triton
from tqdm import tqdm

from kernels import tuned
from kernels.matmul import (
    PERSISTENT_TILES,
    SPECIALISED,
    THIN,
    MatmulSchedule,
    estimate_us,
    has_wgmma,
    matmul,
    specialised_schedule,
    thin_schedule,
)
from kernels.plan import MatmulPlan, plan_matmul
from lab import check
from lab.device import PRESETS, ROOT, commit, current_device, slugify
from lab.records import write_atomically
from lab.timing import ring_size, time_graphs

MODELS = {
    # layer: (N, K); query, key and value stacked, gate and up stacked
    "llama-3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "llama-3-70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
}
SPLIT_ALONG_K = ("o", "down")
VOCABULARY = 128256
"""Outputs of the last layer, which both models have and which ``MODELS`` leaves out: it runs once a token."""
TENSOR_PARALLEL = (1, 2, 4, 8)
VARIANTS = 12
"""Most different kernels that a table gives one model; a schedule counts once for each number of chunks, in whatever
way it is launched.
"""
FEW = {1: 4, 2: 4, 4: 3, 8: 3}
"""How many of them are for up to ``THIN`` rows, by the number of GPUs: searched for by themselves, since weighed
against larger batches they would be given up. The narrow weights of many GPUs have so few tiles that for many rows
each wants its own.
"""
COMPROMISES = 20
"""Variants that are tried at every point of a model."""
AHEAD = 256
"""Elements of each row of the weight that the tuner tries to fetch ahead, the best of six sizes on an H200.
What does not arrive while a launch waits for the one before is in the way of that one's own bytes.
"""
LAUNCHED = 4
"""So many of the compromises, the fastest at a point, are launched in all ways there."""
WORTH_US = 30
"""Only where the estimate is less is an early launch tried, or counted if it was. It saves a microsecond or two, for
which it gives up the order in which programs lie on the chip; of a longer time, what it seems to save is luck.
"""
FINALISTS = 3
WORST = 10
"""The higher this power, the more many fast points count for less than one left slow."""
HOPELESS = 1.5
"""A compromise whose estimate is so many times the best one's is not tried."""
SPREAD = 0.08
"""How far one measured time may be off, as a share: so much slower is a kernel for few rows, or cuBLAS, if the
weights lie unluckily in memory. The best of many single times is a lucky one; so this much, over the root of the
number of times that are known, is added before any are compared.
"""
UNTRIED = 100.0
"""What a variant that was not tried at a point counts for there, in times of the yardstick: anything is better."""
TOKENS = (8, 16, 32, 64, 100, 128, 192, 256, 384, 512, 777, 1024, 2048, 4096, 8192)
"""Batches that are tuned; one in between runs as the next larger one does, so they lie close where tiles are few."""

Variant = tuple[int, MatmulSchedule]
"""Chunks of the plan and a schedule: what is compiled, and how it is launched."""


def compiled(variant: Variant) -> Variant:
    """What of a variant is compiled."""
    chunks, schedule = variant
    return chunks, schedule.compiled


def launches_of(schedule: MatmulSchedule) -> list[MatmulSchedule]:
    """All ways to launch a persistent or specialised schedule: late, early, and with bytes fetched ahead."""
    early = replace(schedule, early=True)
    return [schedule, early] if schedule.specialised else [schedule, early, replace(early, ahead=AHEAD)]


def worth_trying(m: int, n: int, plan: MatmulPlan, schedule: MatmulSchedule) -> bool:
    """Whether the schedule is launched late, or so short for ``m`` rows that it may well be early."""
    return not schedule.early or estimate_us(m, n, plan, schedule) < WORTH_US


def layers(model: str, tp: int) -> set[tuple[int, int]]:
    """(N, K) of one GPU's part of every weight of ``model``, the last layer's included."""
    last = VOCABULARY // tp, MODELS[model]["qkv"][1]
    return {shard(model, layer, tp) for layer in MODELS[model]} | {last}


def shard(model: str, layer: str, tp: int) -> tuple[int, int]:
    """(N, K) of one GPU's part of a layer's weight under tensor parallelism over ``tp`` GPUs."""
    n, k = MODELS[model][layer]
    return (n, k // tp) if layer in SPLIT_ALONG_K else (n // tp, k)


def thin_schedules(m: int, plan: MatmulPlan) -> Iterator[MatmulSchedule]:
    """For few rows: the weight on the left, a pipeline as deep as shared memory allows.

    As high as the rows, twice as high, to serve more rows too, and half as high: two row blocks ask memory for more
    where SMs would be idle. A tile of 8 rows leaves room for more of the weight.
    """
    lowest = max(8, triton.next_power_of_2(m))
    for block_m, block_n, block_k in product((lowest // 2, lowest, 2 * lowest), (64, 128), (128, 256)):
        if not 8 <= block_m <= 64:
            continue
        specialised = specialised_schedule(block_n, block_m, swap=True, block_k=block_k)
        plain = thin_schedule(block_m, block_n, block_k) if block_m > 8 else None  # below, by the older instruction
        for in_turn in filter(None, (specialised, plain)):
            yield in_turn
            if plan.chunks > 1:
                yield replace(in_turn, split=True)


WIDTHS = ((16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 32), (64, 48), (128, 0))
WIDTHS += ((128, 16), (128, 32), (128, 48), (128, 64), (128, 72), (128, 80), (128, 96), (128, 128), (256, 0))
"""Right sides of a specialised tile, and their tails."""


def specialised_schedules(plan: MatmulPlan) -> Iterator[MatmulSchedule]:
    """Every specialised schedule that ``plan`` allows."""
    flags = product((False, True), (False, True)[: 1 + (plan.chunks > 1)], (False, True))
    for (swap, split, relay), left, (right, tail) in product(flags, (64, 128, 256), WIDTHS):
        if left * right <= 128 * 256 and (swap or right + tail >= 32):
            found = specialised_schedule(left, right, tail, swap=swap, split=split, relay=relay)
            if found is not None and found.fits(plan):
                yield found


def candidates(m: int, n: int, plan: MatmulPlan, wgmma: bool, most: int = 8) -> list[MatmulSchedule]:
    """Schedules worth trying for ``m`` rows under ``plan``: common ones, and the ``most`` promising of all others.

    Of the common ones those that may come near; of relays, for which the estimate is too hopeful, three where it
    promises a fifth.
    """
    found = [s for s in thin_schedules(m, plan) if wgmma or not s.specialised] if m <= 64 else []
    if wgmma and m > THIN:
        highest = max(64, triton.next_power_of_2(m))
        ranked = sorted(
            (estimate_us(m, n, plan, s), at, s)
            for at, s in enumerate(specialised_schedules(plan))
            if s.tile[0] <= highest
        )
        best = min(us for us, _, s in ranked if not s.relay)
        found += [s for _, _, s in ranked if not s.relay][:most]
        found += [s for us, _, s in ranked if s.relay and us < 0.8 * best][:3]
        found += [s for us, _, s in ranked if s in SPECIALISED and us <= 1.35 * best]
    elif m > THIN:
        found += [s for s, _ in PERSISTENT_TILES if s.block_m <= 2 * m]
    return [s for s in dict.fromkeys(found) if s.fits(plan)]


def rows_of(n: int, tokens: Iterable[int]) -> list[int]:
    """Those of ``tokens`` that a weight of ``n`` outputs is tuned for: the last layer is given few rows at a time."""
    return sorted(m for m in tokens if m <= 512 or n not in [VOCABULARY // tp for tp in TENSOR_PARALLEL])


def reference_schedule(m: int) -> MatmulSchedule:
    """Another kernel altogether, through pointers: what every candidate is compared with."""
    return MatmulSchedule(64, 64, 64, 4, 3) if m > 16 else MatmulSchedule(16, 64, 64, 4, 3, swap=True)


def time_schedules(m: int, weights: list[torch.Tensor], schedules: Iterable[MatmulSchedule]) -> dict:
    """Time of every schedule in bf16 over that of ``torch.mm``, on ``weights`` (n, k) that rotate and so are cold.

    All are timed briefly, then the ``FINALISTS`` fastest again and for longer. The slow reference takes one turn in
    four, as the single tile does in lesson 5: in the company of fast kernels alone the chip lowers its clock further,
    and that flatters schedules which do not wait for the tensor cores.

    Raises:
        RuntimeError: a schedule's bits differ from the plan's.
    """
    n, k = weights[0].shape
    rows = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in weights]
    reference = reference_schedule(m)
    want = matmul(rows[0], weights[0].t(), schedule=reference)
    rings = {}
    for schedule in (reference, *schedules):
        got = matmul(rows[0], weights[0].t(), schedule=schedule)
        if not check.same_bits(got, want):
            raise RuntimeError(f"{schedule} at m={m}, n={n}, k={k} is no schedule: {check.compare(got, want)}")
        rings[schedule] = [partial(matmul, a, w.t(), schedule=schedule) for a, w in zip(rows, weights, strict=True)]

    def timed(chosen: list[MatmulSchedule], measure_ms: int) -> dict[MatmulSchedule, float]:
        company = {"torch.mm": [partial(torch.mm, a, w.t()) for a, w in zip(rows, weights, strict=True)]}
        company |= {schedule: rings[schedule] for schedule in chosen}
        company |= {f"slow {at}": rings[reference] for at in range(len(company) // 3)}
        times = time_graphs(company, replace(PRESETS["full"], warmup_ms=1, measure_ms=measure_ms))
        return {schedule: times[schedule].median_ms / times["torch.mm"].median_ms for schedule in chosen}

    times = timed(list(rings)[1:], 2)
    return times | timed(sorted(times, key=times.get)[:FINALISTS], 8)


def compromises_at(m: int, n: int, plan: MatmulPlan, few: set[Variant]) -> list[MatmulSchedule]:
    """Which of ``few`` variants to try for ``m`` rows: those with the plan's chunks that are not hopeless."""
    estimates = {s: estimate_us(m, n, plan, s) for s in specialised_schedules(plan)}
    most = HOPELESS * min(estimates.values())
    return [s for s, us in estimates.items() if (plan.chunks, s) in few and us < most]


def time_model(shapes: Iterable[tuple[int, int]], tokens: Iterable[int]) -> dict[tuple, dict[Variant, float]]:
    """Times of variants at every point (n, k, m), as ``time_schedules`` gives them.

    At first those that promise most there. Then, of the specialised ones, also those that serve other points well: a
    good compromise may be nobody's first choice. Last the best of both, launched in all ways, side by side.
    """
    wgmma = has_wgmma(torch.device("cuda"))
    times: dict[tuple, dict[Variant, float]] = {}

    def measure(wanted: Callable, tokens: Iterable[int], again: bool = False) -> None:
        """Time what of ``wanted(m, n, plan)`` has not been timed, or all of it ``again``."""
        for n, k in sorted(shapes):
            weights, plan = cold_weights(n, k), plan_matmul(n, k, 2)
            for m in rows_of(n, tokens):
                known = times.setdefault((n, k, m), {})
                if tried := [s for s in wanted(m, n, plan) if again or (plan.chunks, s) not in known]:
                    found = time_schedules(m, weights, tried)
                    known |= {(plan.chunks, schedule): time for schedule, time in found.items()}

    def good_ones(tokens: Iterable[int]) -> set[Variant]:
        return set(fastest_few({point: times[point] for point in times if point[2] in tokens}, COMPROMISES).values())

    def launched(m: int, n: int, plan: MatmulPlan, few: set[Variant]) -> list[MatmulSchedule]:
        known = times[n, plan.k, m]
        best = sorted(known.keys() & few, key=known.get)[:LAUNCHED]
        ways = [way for _, schedule in best for way in launches_of(schedule)]
        return [way for way in ways if worth_trying(m, n, plan, way)]

    measure(partial(candidates, wgmma=wgmma), tokens)
    many = [m for m in tokens if m > THIN]
    if wgmma and many:  # of few rows all tiles have been tried
        measure(partial(compromises_at, few=good_ones(many)), many)
    for some in filter(None, ([m for m in tokens if m <= THIN], many)):
        measure(partial(launched, few=good_ones(some)), some, again=True)
    return times


def cold_weights(n: int, k: int) -> list[torch.Tensor]:
    """So many bf16 weights that each has left L2 before its turn comes again."""
    count = min(ring_size(2 * n * k, current_device()), 64)
    return [(torch.randn(n, k, device="cuda") * k**-0.5).bfloat16() for _ in range(count)]


def fastest_few(times: dict[tuple, dict[Variant, float]], limit: int) -> dict[tuple, Variant]:
    """A variant for every point, at most ``limit`` different ones in all: each costs a compilation.

    Starts from the fastest of each point and gives up, one by one, what costs least; then exchanges one for another
    while that gains. The cost is the sum of the points' times, as shares of a yardstick, to the power ``WORST``.

    Raises:
        ValueError: no ``limit`` variants that were tried at every point between them have been found.
    """
    columns = sorted({tried for point in times.values() for tried in point}, key=repr)
    powers = torch.full((len(times), len(columns)), UNTRIED**WORST, dtype=torch.float64)
    for row, point in zip(powers, times.values(), strict=True):
        for at, tried in enumerate(columns):
            row[at] = point.get(tried, UNTRIED) ** WORST

    def cost(kept: list[int]) -> float:
        return float(powers[:, kept].amin(1).sum())

    kept = powers.argmin(1).unique().tolist()
    while len(kept) > limit:
        kept.remove(min(kept, key=lambda given_up: cost([at for at in kept if at != given_up])))
    gained = True
    while gained:
        gained = False
        for at, other in product(range(len(kept)), range(len(columns))):
            exchanged = [*kept[:at], other, *kept[at + 1 :]]
            if cost(exchanged) < (1 - 1e-9) * cost(kept):
                kept, gained = exchanged, True
    chosen = {point: columns[kept[at]] for point, at in zip(times, powers[:, kept].argmin(1).tolist(), strict=True)}
    for point, variant in chosen.items():
        if variant not in times[point]:
            raise ValueError(f"limit={limit} variants cannot serve all points: none of them was tried at {point}")
    return chosen


def choose_variants(times: dict[tuple, dict[Variant, float]], tp: int) -> dict[tuple, Variant]:
    """A variant for every point (n, k, m) of a model on ``tp`` GPUs.

    Compiled are at most ``FEW`` of them for few rows, and ``VARIANTS`` in all.
    """
    best: dict[tuple, dict[Variant, Variant]] = {}  # way to launch what is compiled
    kernels: dict[tuple, dict[Variant, float]] = {}  # and its time
    for point, found in times.items():
        best[point] = {compiled(variant): variant for variant in sorted(found, key=found.get, reverse=True)}
        kernels[point] = {kernel: found[variant] for kernel, variant in best[point].items()}
    chosen = {}
    for thin, limit in ((True, FEW[tp]), (False, VARIANTS - FEW[tp])):
        if points := {point: found for point, found in kernels.items() if (point[2] <= THIN) == thin}:
            chosen |= {point: best[point][kernel] for point, kernel in fastest_few(points, limit).items()}
    return chosen


Times = dict[tuple[int, int, int], dict[MatmulSchedule, float]]
"""Of schedules at points (n, k, m), over that of ``torch.mm``."""


def runs_of(gpu: str) -> Path:
    """Where the runs on the GPU called ``gpu`` are kept."""
    return ROOT / "data" / slugify(gpu) / "tune.json"


def read_runs(path: Path) -> list[tuple[dict, Times]]:
    """The runs kept in ``path``, oldest first: where each comes from, and its times. No runs if there is no file.

    Raises:
        ValueError: the file is damaged, or its runs are of several GPUs.
    """
    if not path.is_file():
        return []
    try:
        kept = json.loads(path.read_text())
        schedules = [MatmulSchedule(**fields) for fields in kept["schedules"]]
        runs = []
        for run in kept["runs"]:
            origin = {key: run[key] for key in ("gpu", "torch", "triton", "commit", "measured_at")}
            points = {(n, k, m): {schedules[int(i)]: t for i, t in found.items()} for n, k, m, found in run["points"]}
            runs.append((origin, points))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no runs of the tuner ({error!r})") from error
    if len({origin["gpu"] for origin, _ in runs}) > 1:
        raise ValueError(f"{path} holds runs of several GPUs: {sorted({origin['gpu'] for origin, _ in runs})}")
    return runs


def write_runs(path: Path, runs: list[tuple[dict, Times]]) -> None:
    """Keep ``runs`` in ``path``, all or nothing; times to five digits. A line for every schedule and every point."""
    index: dict[MatmulSchedule, int] = {}
    texts = []
    for origin, times in runs:
        points = [
            [*point, {str(index.setdefault(s, len(index))): float(f"{t:.5g}") for s, t in found.items()}]
            for point, found in sorted(times.items())
        ]
        lines = ",\n   ".join(map(json.dumps, points))
        texts.append(f'  {json.dumps(origin)[:-1]}, "points": [\n   {lines}\n  ]}}')
    schedules = ",\n  ".join(json.dumps(fields_of(schedule)) for schedule in index)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f'{{"schedules": [\n  {schedules}\n ],\n "runs": [\n' + ",\n".join(texts) + "\n]}\n")


def medians(
    runs: Iterable[tuple[dict, Times]], tokens: Iterable[int], spread: float = 0.0
) -> dict[tuple, dict[Variant, float]]:
    """Median times over all runs, longer by ``spread`` over the root of the number of times known of the same kernel.

    A batch counts for the row of a table that serves it, the next of ``tokens``.
    """
    rows = sorted(tokens)
    times: dict[tuple, dict[Variant, list[float]]] = {}
    for _, measured in runs:
        for (n, k, m), found in measured.items():
            if m > rows[-1]:
                continue
            known, plan = times.setdefault((n, k, rows[bisect_left(rows, m)]), {}), plan_matmul(n, k, 2)
            for schedule, time in found.items():
                if worth_trying(m, n, plan, schedule):
                    known.setdefault((plan.chunks, schedule), []).append(time)
    found = {}
    for point, known in times.items():
        count = Counter(compiled(variant) for variant, all_of in known.items() for _ in all_of)
        found[point] = {
            variant: median(all_of) * (1 + spread / count[compiled(variant)] ** 0.5)
            for variant, all_of in known.items()
        }
    return found


def draw_table(
    runs: list[tuple[dict, Times]], models: Iterable[tuple[str, int]], tokens: Iterable[int]
) -> dict[tuple[int, int], dict[int, dict]]:
    """What ``runs`` choose for (model, GPUs) in ``models``: shape to rows to fields of a schedule. Says how fast."""
    rows, table = {*TOKENS, *tokens}, {}
    usual, cautious = medians(runs, rows), medians(runs, rows, SPREAD)
    for model, tp in models:
        shapes = layers(model, tp)
        times = {point: found for point, found in cautious.items() if point[:2] in shapes and point[2] in tokens}
        chosen = choose_variants(times, tp)
        for (n, k, m), (_, schedule) in sorted(chosen.items()):
            table.setdefault((n, k), {})[m] = fields_of(schedule)
        if chosen:
            speed = [1 / usual[point][variant] for point, variant in chosen.items()]
            speeds = f"mean {geometric_mean(speed):.3f}, least {min(speed):.2f}"
            print(f"{model}, {tp} GPUs: torch.mm's time over ours, {speeds}")
    return table


def _compile(jobs: list[tuple[int, int, MatmulSchedule]]) -> None:
    for n, k, schedule in jobs:
        a = torch.zeros(64, k, device="cuda", dtype=torch.bfloat16)
        matmul(a, a.new_zeros(n, k).t(), schedule=schedule)


def compile_all(shapes: set[tuple[int, int]], tokens: Iterable[int]) -> None:
    """Compile every candidate into Triton's cache, in several processes: one alone would take minutes."""
    wgmma, everything = has_wgmma(torch.device("cuda")), {}
    for n, k in sorted(shapes):
        plan = plan_matmul(n, k, 2)
        for schedule in chain.from_iterable(candidates(m, n, plan, wgmma) for m in rows_of(n, tokens)):
            everything[plan.chunks, schedule] = (n, k, schedule)  # one shape for each number of chunks will do
    everything = list(everything.values())
    workers = max(min((os.cpu_count() or 2) - 2, 12), 1)
    context = multiprocessing.get_context("spawn")
    parts = [context.Process(target=_compile, args=(everything[i::workers],)) for i in range(workers)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()


def fields_of(schedule: MatmulSchedule) -> dict:
    """What distinguishes ``schedule`` from the defaults of its fields."""
    default = MatmulSchedule(0, 0, 0, 0, 0)
    return {key: value for key, value in asdict(schedule).items() if value != getattr(default, key)}


def as_text(origin: dict, table: dict[tuple[int, int], dict[int, dict]]) -> str:
    """The JSON of a table (shape to rows to fields), a line for every schedule and every shape."""
    schedules, shapes = [], []
    for (n, k), rows in sorted(table.items()):
        for fields in rows.values():
            if fields not in schedules:
                schedules.append(fields)
        shapes.append({"n": n, "k": k, "rows": {str(m): schedules.index(fields) for m, fields in rows.items()}})
    head = json.dumps(origin, indent=1).removesuffix("\n}")
    lists = {"schedules": schedules, "shapes": shapes}
    body = [f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]" for name, rows in lists.items()]
    return ",\n".join([head, *body]) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    """Tune the shapes asked for and merge them into this GPU's table."""
    parser = argparse.ArgumentParser(prog="python -m lab.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tp", nargs="+", type=int, choices=TENSOR_PARALLEL, default=list(TENSOR_PARALLEL))
    parser.add_argument(
        "--m", nargs="+", type=int, default=list(TOKENS), help="numbers of rows; one below runs as the least"
    )
    parser.add_argument("--runs", type=Path, help="measure nothing; draw the table from the runs kept in this file")
    options = parser.parse_args(arguments)
    models = list(product(options.model, options.tp))
    runs = read_runs(options.runs) if options.runs else measure_run(models, options.m, parser.error)
    if not runs:
        parser.error(f"--runs {options.runs} does not exist, or keeps no run")
    origin = runs[-1][0] | {"commit": ", ".join(dict.fromkeys(origin["commit"] for origin, _ in runs))}
    path, table = tuned.path_of(origin["gpu"]), {}
    if path.is_file():
        old = json.loads(path.read_text())
        for shape in old["shapes"]:
            rows = {int(m): old["schedules"][index] for m, index in shape["rows"].items()}
            table[shape["n"], shape["k"]] = rows
    for shape, rows in draw_table(runs, models, options.m).items():
        table[shape] = dict(sorted((table.get(shape, {}) | rows).items()))
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, as_text(origin, table))
    print(f"{len(table)} shapes in the table: {path.name}")
    return 0


def measure_run(
    models: list[tuple[str, int]], tokens: Iterable[int], refuse: Callable[[str], NoReturn]
) -> list[tuple[dict, Times]]:
    """All runs of the GPU at hand, the last of them new: what is measured is kept after every model."""
    device = current_device()
    if not device.is_gpu or not has_wgmma(torch.device("cuda")):
        refuse("tables are for the kernel with specialised warps, which needs a Hopper GPU; torch sees none here")
    path = runs_of(device.name)
    before = read_runs(path)
    compile_all(set().union(*(layers(model, tp) for model, tp in models)), tokens)
    origin = {"gpu": device.name, "torch": device.torch, "triton": device.triton, "commit": commit()}
    times: Times = {}
    for model, tp in tqdm(models, desc="models", file=sys.stdout):
        for point, found in time_model(layers(model, tp), tokens).items():
            times[point] = {schedule: time for (_, schedule), time in found.items()}
        origin["measured_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_runs(path, [*before, (origin, times)])
    return [*before, (origin, times)]


if __name__ == "__main__":
    raise SystemExit(main())
