"""Remembered launches on a GPU: the bits of the first call, whatever lay where, and errors as before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import launch
from kernels.activation import silu_mul
from kernels.attention import attention, attention_paged
from kernels.matmul import matmul, specialised_schedule, thin_schedule
from kernels.norm import rms_norm
from kernels.quant import per_channel_quant, per_token_quant, rms_norm_per_token_quant, silu_mul_per_token_quant
from kernels.rope import rope_table, rope_to_cache
from kernels.w8a8 import w8a8_matmul
from lab.check import same_bits

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def randn(*shape: int, seed: int) -> torch.Tensor:
    made = torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    return made.to(BF16)


def paged(m: int, seed: int):
    cache = randn(2, 40, 64, 8, 128, seed=seed)
    ints = {"dtype": torch.int32, "device": "cuda"}
    table = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).to(**ints)[:32].view(2, 16)
    lens, cu = torch.tensor([900, 77], **ints), torch.tensor([0, m // 2, m], **ints)
    q = randn(m, 32, 128, seed=seed + 1)
    return attention_paged(q, cache[0], cache[1], table, lens, cu, m, validate=False)


def rotated(m: int, seed: int):
    cache, index = torch.zeros(2, 16, 64, 8, 128, dtype=BF16, device="cuda"), torch.arange(m, device="cuda").int()
    table = rope_table(1024, 128, 1e4, None, "cuda")
    q = rope_to_cache(randn(m, 48 * 128, seed=seed), table, index, index, cache[0], cache[1])
    return q, cache


def eight(m: int, seed: int, dtype: torch.dtype):
    (a, scale), (b, scales) = per_token_quant(randn(m, 4096, seed=seed), dtype), per_channel_quant(WEIGHT(), dtype)
    return w8a8_matmul(a, b.t(), scale, scales)


def WEIGHT(n: int = 1024, k: int = 4096):
    return randn(n, k, seed=99)


OPERATORS = {
    "matmul": lambda m, s: matmul(randn(m, 4096, seed=s), WEIGHT().t()),
    "matmul_bias": lambda m, s: matmul(randn(m, 4096, seed=s), WEIGHT().t(), randn(1024, seed=5)),
    "matmul_wide": lambda m, s: matmul(randn(m, 512, seed=s), WEIGHT(6144, 512).t()),
    "bmm": lambda m, s: matmul(randn(3, m, 64, seed=s), randn(3, 64, 80, seed=s + 1)),
    "vector": lambda m, s: matmul(randn(4096, seed=s), WEIGHT().t()),
    "rms_norm": lambda m, s: rms_norm(randn(m, 4096, seed=s), randn(4096, seed=4)),
    "rms_norm_residual": lambda m, s: rms_norm(randn(m, 4096, seed=s), residual=randn(m, 4096, seed=s + 1)),
    "silu_mul": lambda m, s: silu_mul(randn(m, 4096, seed=s)),
    "rope": rotated,
    "attention_paged": paged,
    "attention": lambda m, s: attention(*(randn(2, m, 8, 128, seed=s + i) for i in range(3)), validate=False),
    "int8": lambda m, s: eight(m, s, torch.int8),
    "fp8": lambda m, s: eight(m, s, torch.float8_e4m3fn),
    "norm_quant": lambda m, s: rms_norm_per_token_quant(randn(m, 4096, seed=s), residual=randn(m, 4096, seed=s + 1)),
    "silu_quant": lambda m, s: silu_mul_per_token_quant(randn(m, 4096, seed=s)),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("m", [2, 32, 130, 600])
def test_a_remembered_launch_has_the_bits_of_the_first(name, m):
    if name in ("fp8",) and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 here")
    fn, fresh = OPERATORS[name], {}
    for seed in (1, 2, 3):
        launch.forget()
        fresh[seed] = flat(fn(m, seed))
    kept = [flat(fn(m, seed)) for seed in (1, 2, 3, 1)]
    for seed, found in zip((1, 2, 3, 1), kept, strict=True):
        assert all(same_bits(x, y) for x, y in zip(found, fresh[seed], strict=True)), (name, m, seed)


def flat(result) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", ["matmul", "rms_norm_residual", "rope", "attention_paged", "fp8", "norm_quant"])
def test_the_second_call_does_not_reach_the_operator(name, monkeypatch):
    OPERATORS[name](8, 1)

    def watched(*args):
        raise AssertionError("launched in full")

    monkeypatch.setattr(launch, "_watched", watched)
    monkeypatch.setattr(launch, "launch", watched)
    OPERATORS[name](8, 2)


@pytest.mark.parametrize("sms", [132, 20])
def test_counters_are_zero_after_every_launch(sms, monkeypatch):
    """Launches of a stream share theirs: one that left anything behind would spoil the next."""
    from kernels import matmul as mm

    monkeypatch.setattr(mm, "sm_count", lambda device: sms)
    for m in (1, 7, 64, 300, 777):
        for n, k in ((1024, 4096), (512, 8192), (1536, 14336), (4096, 4096)):
            matmul(randn(m, k, seed=m), randn(n, k, seed=1).t())
    paged(2, 1)
    torch.cuda.synchronize()
    assert launch._of_stream
    assert not any(counters.any() for counters in launch._of_stream.values())


def test_streams_do_not_share_counters():
    a, b = randn(4, 14336, seed=1), randn(768, 14336, seed=2).t()
    want = matmul(a, b)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(matmul(a, b))
    torch.cuda.synchronize()
    assert all(same_bits(x, want) for x in found)


def test_a_graph_captured_after_a_launch_was_remembered():
    a, b = randn(4, 14336, seed=1), randn(768, 14336, seed=2).t()
    want = matmul(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [matmul(a, b), matmul(a, b)]
    for _ in range(3):
        for c in captured:
            c.fill_(float("nan"))
        graph.replay()
        assert same_bits(matmul(a, b), want)
        torch.cuda.synchronize()
        assert all(same_bits(c, want) for c in captured)


def test_scales_are_looked_at_whatever_is_remembered():
    (a, scale), (b, scales) = per_token_quant(randn(4, 512, seed=1)), per_channel_quant(WEIGHT(64, 512))
    w8a8_matmul(a, b.t(), scale, scales)
    for bad in (0.0, float("nan"), -1.0):
        wrong = scales.clone()
        wrong[7] = bad
        with pytest.raises(ValueError, match="scale_b"):
            w8a8_matmul(a, b.t(), scale, wrong)


@pytest.mark.parametrize("m", [3, 300])
def test_compiled_code_runs_the_schedule_of_its_own_batch(m):
    """The operator is left alone by torch.compile: a graph traced with one row must not fix the layout for 300."""
    weight = WEIGHT()

    @torch.compile(backend="eager", dynamic=True)
    def layer(x):
        return matmul(x * 2, weight.t()) + 1

    layer(randn(1, 4096, seed=1))
    x = randn(m, 4096, seed=2)
    assert same_bits(layer(x), matmul(x * 2, weight.t()) + 1)


@pytest.mark.parametrize("m", [1, 40, 300])
def test_a_chain_of_launches_that_overlap_has_the_bits_of_one_at_a_time(m):
    """Every launch reads what the one before wrote, into memory that held another chain's numbers a moment ago."""
    up, down, qkv = randn(6144, 1024, seed=1), randn(1024, 3072, seed=2), randn(3072, 1024, seed=3)

    def chain(x, finish=lambda: None):
        residual = torch.zeros_like(x)
        for _ in range(12):
            x, residual = rms_norm(x, residual=residual)
            finish()
            heads = matmul(x, qkv.t()).view(1, m, 3, 8, 128)
            finish()
            x = attention(*heads.unbind(2), validate=False).view(m, 1024)
            finish()
            x = silu_mul(matmul(x, up.t()))
            finish()
            x = matmul(x, down.t())
            finish()
        return x

    inputs = [randn(m, 1024, seed=seed) for seed in (4, 5)]
    with launch.launches_apart():
        want = [chain(x, torch.cuda.synchronize) for x in inputs]
    assert not same_bits(*want)
    graphs = []
    for x in inputs:
        chain(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs.append((graph, chain(x)))
    torch.cuda.synchronize()
    for _ in range(20):
        found = [chain(x) for x in inputs]
        assert all(same_bits(*pair) for pair in zip(found, want, strict=True))
        for (graph, captured), bits in zip(graphs, want, strict=True):
            captured.fill_(float("nan"))
            graph.replay()
            assert same_bits(captured, bits)


THIN_TILE = thin_schedule(16, 64, 128)
WAYS_TO_BEGIN = {
    "early": replace(THIN_TILE, early=True),
    "ahead": replace(THIN_TILE, early=True, ahead=256),
    "all ahead": replace(THIN_TILE, early=True, ahead=4096),
    "ahead alone": replace(THIN_TILE, ahead=256),
    "split": replace(THIN_TILE, early=True, ahead=256, split=True),
    "specialised": replace(specialised_schedule(64, 16, swap=True), early=True),
    "specialised and split": replace(specialised_schedule(64, 64, split=True), early=True),
}


@pytest.mark.parametrize("schedule", WAYS_TO_BEGIN.values(), ids=WAYS_TO_BEGIN)
def test_a_weight_that_the_launch_before_writes_is_read_when_it_is_written(schedule):
    """Also where its rows have been asked for before that: while the memory still held another weight."""
    n, k = (768, 4096) if schedule.split else (6144, 1024)
    factors, other, x = [randn(n, 256, seed=seed) for seed in (1, 2)], randn(k, 256, seed=3), randn(16, k, seed=4)
    weight, makes = torch.empty(n, k, dtype=BF16, device="cuda"), replace(specialised_schedule(128, 128), early=True)

    def chain():
        found = []
        for turn in range(20):
            matmul(factors[turn % 2], other.t(), out=weight, schedule=makes)
            found.append(matmul(x, weight.t(), schedule=schedule))
        return found

    with launch.launches_apart():
        want = chain()
    assert not same_bits(*want[:2])
    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(20):
        for c in captured:
            c.fill_(float("nan"))
        graph.replay()
        assert all(same_bits(*pair) for pair in zip(captured, want, strict=True))
