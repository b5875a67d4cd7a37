"""Timing on a GPU: correctness first, cold inputs, CUDA-graph replay, median and spread."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch.profiler import ProfilerActivity, profile

from kernels.launch import borrowed_counters, launches_apart
from lab.device import Device, Preset

RING_CALLS = 256
"""Most calls in one ring. Tiny calls reach it before they fill L2: their inputs stay in cache, like activations
that the previous kernel has just written."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: the median and the 20th and 80th percentile."""

    median_ms: float
    p20_ms: float
    p80_ms: float

    def row(self) -> dict[str, float]:
        """The three columns of a record."""
        return {"median_ms": self.median_ms, "p20_ms": self.p20_ms, "p80_ms": self.p80_ms}


def ring_size(bytes_per_call: int, device: Device) -> int:
    """How many input sets to rotate among so that a call finds none of its inputs in L2 (at most RING_CALLS)."""
    return max(2, min(RING_CALLS, 2 * device.l2_bytes // max(bytes_per_call, 1) + 1))


def _timing(samples_ms: Sequence[float]) -> Timing:
    quantiles = torch.tensor(samples_ms, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double())
    return Timing(*quantiles.tolist())


def _capture(calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    for call in calls[:2]:
        call()  # compiles and allocates workspaces: nothing of that may happen under capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def _take_turns(runs: dict[str, Callable[[], object]], stream: torch.cuda.Stream, preset: Preset) -> dict[str, list]:
    """Milliseconds of each run, all of them in turn, round after round.

    A chip under load lowers its clock within milliseconds: taking turns, every contender meets the same clock. And it
    raises it again within milliseconds, so the order is drawn anew for each round: a contender that always came after
    the most power-hungry one would meet the clock that one leaves behind. Calls of ten milliseconds show it.
    """
    order = random.Random(len(runs))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    warm = started + len(runs) * preset.warmup_ms / 1e3
    enough = warm + len(runs) * preset.measure_ms / 1e3
    rounds = 0
    while rounds < 10 or (time.perf_counter() < enough and rounds < 1000):
        counts = time.perf_counter() >= warm
        for name, run in order.sample(list(runs.items()), len(runs)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            run()
            end.record(stream)
            end.synchronize()
            if counts:
                samples[name].append(start.elapsed_time(end))
        rounds += counts
    return samples


def time_graphs(rings: dict[str, Sequence[Callable[[], object]]], preset: Preset) -> dict[str, Timing]:
    """GPU time of one call of each ring: every ring is captured in a CUDA graph, and the graphs are replayed.

    A graph leaves no gap for the host to fill, so launch overhead on the CPU does not count.
    """
    stream = torch.cuda.Stream()
    with borrowed_counters(), torch.cuda.stream(stream):
        graphs = {name: _capture(calls, stream) for name, calls in rings.items()}
        samples = _take_turns({name: graph.replay for name, graph in graphs.items()}, stream, preset)
    return {name: _timing([ms / len(rings[name]) for ms in times]) for name, times in samples.items()}


def kernel_times(run: Callable[[], object], replays: int = 5) -> dict[str, tuple[int, float]]:
    """Kernels of one call: the name of each, how often it is launched, and its milliseconds in all.

    The call is replayed from a CUDA graph under torch's profiler, with launches kept apart: a kernel that is set up
    early spends time waiting, which is not its own.
    """
    stream = torch.cuda.Stream()
    with launches_apart(), borrowed_counters(), torch.cuda.stream(stream):
        graph = _capture([run], stream)
        graph.replay()
        stream.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
            for _ in range(replays):
                graph.replay()
            stream.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in seen.key_averages():
        if event.self_device_time_total > 0:
            name = short_name(event.key)
            launches, ms = found.get(name, (0, 0.0))
            found[name] = launches + event.count // replays, ms + event.self_device_time_total / replays / 1e3
    return found


def short_name(kernel: str) -> str:
    """A kernel's name without return type, namespaces, template and function arguments."""
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name, maxsplit=1)[0].rsplit("::", maxsplit=1)[-1].strip() or kernel


def time_eager(rings: dict[str, Sequence[Callable[[], object]]], preset: Preset) -> dict[str, Timing]:
    """Time of one call of each ring launched from Python onto an idle GPU: launch overhead included."""
    turns = {name: cycle(calls) for name, calls in rings.items()}
    runs = {name: lambda turn=turn: next(turn)() for name, turn in turns.items()}
    samples = _take_turns(runs, torch.cuda.current_stream(), preset)
    return {name: _timing(times) for name, times in samples.items()}


def relative_error(got: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN if anything is."""
    return float((got.double() - reference.double()).norm() / reference.double().norm())


def check_accuracy(name: str, got: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error of ``got``, refused above twice the machine epsilon of its dtype.

    One rounding of the result costs at most half an epsilon; a kernel that forgets a term is off by far more.

    Raises:
        ValueError: the error is larger, or NaN.
    """
    error, limit = relative_error(got, reference), 2 * torch.finfo(got.dtype).eps
    if not error <= limit:
        raise ValueError(f"{name}: relative error {error:.3g} is above {limit:.3g}; a wrong kernel is not timed")
    return error


def poison(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    """Leave NaN in the memory that the next output of this size is likely to get: unwritten elements show."""
    torch.full(shape, float("nan"), dtype=dtype, device=device)


def measure(
    contenders: dict[str, Callable[..., object]],
    inputs: Sequence[tuple],
    reference: torch.Tensor,
    preset: Preset,
    timer: Callable[[dict[str, Sequence[Callable[[], object]]], Preset], dict[str, Timing]] = time_graphs,
) -> dict[str, Timing]:
    """Time every contender on the same ring of inputs, each checked against ``reference`` first.

    Args:
        contenders: name to function of one input tuple, returning the result or a tuple that begins with it.
        inputs: the ring; ``reference`` belongs to its first tuple.
        timer: ``time_graphs`` or ``time_eager``.

    Raises:
        ValueError: a contender is wrong beyond rounding.
    """
    for name, fn in contenders.items():
        poison(reference.shape, inputs[0][0].dtype, reference.device)
        got = fn(*inputs[0])
        check_accuracy(name, got[0] if isinstance(got, tuple) else got, reference)
    rings = {name: [partial(fn, *args) for args in inputs] for name, fn in contenders.items()}
    return timer(rings, preset)
