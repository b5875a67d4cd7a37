"""8 bits on a GPU: that every freedom of the schedules is one, that int8 is exact, that rows keep to themselves."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from kernels import launch, quant, w8a8
from kernels.activation import silu_mul
from kernels.matmul import has_wgmma
from kernels.norm import NormSchedule, rms_norm
from kernels.plan import PROMOTE_KS, plan_w8a8
from kernels.quant import (
    LARGEST,
    per_channel_quant,
    per_token_quant,
    per_token_quant_ref,
    rms_norm_per_token_quant,
    silu_mul_per_token_quant,
)
from kernels.w8a8 import WIDE_TILES, W8A8Schedule, thin_schedule, w8a8_matmul, w8a8_matmul_ref
from lab.check import check_invariance, check_run_to_run, distinct_results, same_bits
from lab.device import STRADDLING
from lab.timing import relative_error

pytestmark = pytest.mark.gpu

EIGHT_BITS = [
    torch.int8,
    pytest.param(
        torch.float8_e4m3fn,
        marks=pytest.mark.skipif(
            not torch.cuda.is_available() or not quant.has_fp8(torch.device("cuda")), reason="this GPU has no fp8"
        ),
    ),
]
SIZES = [(1, 4096, 4096), (33, 512, 1024), (100, 3008, 784), (257, 1280, 4160), (300, 1536, 5008), (90, 512, 5000)]


def randn(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def operands(m, n, k, dtype):
    """Operands of ``w8a8_matmul``, a bias last. Columns of zeros of either sign among them."""
    x, weight = randn(m, k), randn(n, k, seed=1)
    x[:, ::7], weight[:, ::5] = -0.0, -0.0
    a, scale_a = per_token_quant(x, dtype)
    w, scale_b = per_channel_quant(weight, dtype)
    return a, w.t(), scale_a, scale_b, randn(n, seed=2)


def schedules(m, n, k, plan):
    """Pointer schedules, and on Hopper specialised ones: wide, thin, swapped, split."""
    every = [
        W8A8Schedule(rows, columns, block_k, warps, 3, swap=swap)
        for rows, columns, block_k, warps, swap in (
            (16, 64, 64, 4, True),
            (32, 128, 128, 8, True),
            (64, 64, 128, 4, False),
            (64, 32, 64, 4, False),
            (128, 128, 64, 8, False),
            (128, 64, 64, 4, True),
        )
    ]
    if plan.exact:
        every += [W8A8Schedule(16, 64, 64, 4, 3), W8A8Schedule(32, 32, 128, 2, 2)]
    if has_wgmma(torch.device("cuda")) and k % 16 == n % 16 == 0:
        thin = thin_schedule(min(m, 64), n, plan, 132)
        wide = [tile for tile, _ in WIDE_TILES]
        every += wide + [replace(tile, split=2) for tile in wide]
        every += [replace(thin, split=split) for split in (1, 2, 3, 7)]
        every += [replace(thin, block_k=128, split=1)]
        every += [replace(thin, block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=4)]
    return [schedule for schedule in every if schedule.fits(plan)]


# ---------------------------------------------------------------------------------------------- quantisers


@pytest.mark.parametrize("eight", EIGHT_BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [300, 4096, 14336])
def test_quantisers_and_what_is_fused_into_them(n, dtype, eight):
    x, residual, weight = (randn(m, n, dtype=dtype, seed=m) for m in (97, 97, 1))
    x[5], x[6, 7], x[7, 9] = 0, float("nan"), float("inf")
    x[8] *= 1e-6
    x[9] = torch.finfo(dtype).smallest_normal / 8  # a row of denormals
    q, scale = per_token_quant(x, eight)
    want_q, want_scale = per_token_quant_ref(x, eight)
    assert torch.equal(scale.isnan(), want_scale.isnan())
    assert same_bits(scale.nan_to_num(), want_scale.nan_to_num())
    assert torch.equal(q.float(), want_q.float())
    y, summed = rms_norm(x, weight[0], residual=residual)
    fused = rms_norm_per_token_quant(x, weight[0], dtype=eight, residual=residual)
    for got, want in zip(fused, (*per_token_quant(y, eight), summed), strict=True):
        assert same_bits(got, want)
    gate_up = torch.cat([x, residual], dim=-1)
    fused = silu_mul_per_token_quant(gate_up, eight)
    for got, want in zip(fused, per_token_quant(silu_mul(gate_up), eight), strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("eight", EIGHT_BITS)
@pytest.mark.parametrize("n", [300, 4096, 14336])
def test_warps_are_free_in_a_quantiser(n, eight):
    x, warps = randn(64, n), [w for w in (1, 2, 4, 8, 16, 32) if n // w <= 4096]
    for fn in (per_token_quant, rms_norm_per_token_quant):
        for part in (0, 1):
            groups = distinct_results(
                lambda w, fn=fn, part=part: fn(x, dtype=eight, schedule=NormSchedule(w))[part], warps
            )
            assert [len(group) for group in groups.values()] == [len(warps)]


# --------------------------------------------------------------------------------------------- the products


@pytest.mark.parametrize("sizes", SIZES)
def test_int8_is_exact_in_every_schedule(sizes):
    m, n, k = sizes
    a, b, scale_a, scale_b, bias = operands(m, n, k, torch.int8)
    exact = (a.double() @ b.double()).float() * scale_a[:, None] * scale_b + bias.float()
    for schedule in schedules(m, n, k, plan_w8a8(k, True)):
        c = w8a8_matmul(a, b, scale_a, scale_b, bias, schedule=schedule)
        assert same_bits(c, exact.bfloat16()), schedule


@pytest.mark.parametrize("promote_k", PROMOTE_KS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", EIGHT_BITS[1:])
def test_schedules_are_free_in_fp8(dtype, sizes, promote_k):
    m, n, k = sizes
    arguments = operands(m, n, k, dtype)
    plan = plan_w8a8(k, False, promote_k)
    every = schedules(m, n, k, plan)
    groups = distinct_results(lambda s: w8a8_matmul(*arguments, plan=plan, schedule=s), every)
    assert [len(group) for group in groups.values()] == [len(every)]


@pytest.mark.parametrize("dtype", EIGHT_BITS[1:])
def test_promotion_lessens_the_error_of_fp8(dtype):
    """All products positive, so that the running sum outgrows them and what the tensor core cuts off adds up."""
    x, weight = torch.rand(64, 14336, device="cuda"), torch.rand(256, 14336, device="cuda")
    (a, scale_a), (w, scale_b) = per_token_quant(x, dtype), per_channel_quant(weight, dtype)
    want = w8a8_matmul_ref(a, w.t(), scale_a, scale_b)

    def error(promote_k):
        plan = plan_w8a8(14336, False, promote_k)
        c = w8a8_matmul(a, w.t(), scale_a, scale_b, out_dtype=torch.float32, plan=plan)
        return relative_error(c, want)

    assert error(128) < error(256) < error(512) < error(None)
    assert error(128) < 1e-3 and error(512) < 1e-2


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_results_are_rounded_once(dtype, out_dtype):
    arguments = operands(70, 512, 1024, dtype)
    exact = w8a8_matmul(*arguments, out_dtype=torch.float32)
    assert same_bits(w8a8_matmul(*arguments, out_dtype=out_dtype), exact.to(out_dtype))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_layouts_are_free(dtype):
    a, b, scale_a, scale_b, bias = operands(70, 512, 1024, dtype)
    want = w8a8_matmul(a, b, scale_a, scale_b, bias)
    sliced = torch.stack([a.view(torch.int8)] * 2, dim=-1).view(dtype)[..., 0]
    padded = torch.zeros(70, 1040, dtype=torch.int8, device="cuda").view(dtype)[:, 3:1027]
    padded.view(torch.int8).copy_(a.view(torch.int8))
    for other_a, other_b in ((sliced, b), (padded, b), (a.t().contiguous().t(), b), (a, b.contiguous())):
        assert same_bits(w8a8_matmul(other_a, other_b, scale_a, scale_b, bias), want)
    out = torch.full((70, 600), float("nan"), device="cuda", dtype=torch.bfloat16)
    assert same_bits(w8a8_matmul(a, b, scale_a, scale_b, bias, out=out[:, :512]), want)
    assert out[:, 512:].isnan().all()


def test_the_number_of_sms_is_free(monkeypatch):
    arguments = operands(300, 1024, 512, torch.int8)
    results = []
    for sms in (1, 20, 78, 132, 188):
        monkeypatch.setattr(w8a8, "sm_count", lambda device, sms=sms: sms)
        launch.forget()
        results.append(w8a8_matmul(*arguments))
        results.append(w8a8_matmul(arguments[0][:5], *arguments[1:2], arguments[2][:5], *arguments[3:]))
    assert all(same_bits(result, results[i % 2]) for i, result in enumerate(results))


# ---------------------------------------------------------------------------------------- batch invariance


@pytest.mark.parametrize("eight", EIGHT_BITS)
@pytest.mark.parametrize("sizes", [(4096, 1024), (1000, 776), (130, 33), (768, 4096)])
def test_rows_keep_their_bits(sizes, eight):
    n, k = sizes
    w, scale_b = per_channel_quant(randn(n, k, seed=1), eight)

    def linear(x):
        a, scale_a = per_token_quant(x, eight)
        return w8a8_matmul(a, w.t(), scale_a, scale_b)

    report = check_invariance(linear, randn(4096, k), STRADDLING)
    assert report.invariant, report


@pytest.mark.parametrize("eight", EIGHT_BITS)
def test_a_fused_chain_keeps_its_rows(eight):
    """A Llama MLP in 8 bits: norm and quantiser, gate and up, SiLU and quantiser, down."""
    norm_weight = randn(1024, seed=1)
    gate_up, gate_up_scale = per_channel_quant(randn(4096, 1024, seed=2), eight)
    down, down_scale = per_channel_quant(randn(1024, 2048, seed=3), eight)

    def mlp(x):
        a, scale = rms_norm_per_token_quant(x, norm_weight, dtype=eight)
        a, scale = silu_mul_per_token_quant(w8a8_matmul(a, gate_up.t(), scale, gate_up_scale), eight)
        return w8a8_matmul(a, down.t(), scale, down_scale)

    report = check_invariance(mlp, randn(1025, 1024), STRADDLING)
    assert report.invariant, report


def test_the_checker_catches_a_scale_for_the_whole_tensor():
    w, scale_b = per_channel_quant(randn(256, 256, seed=1))

    def linear(x):
        scale = (x.float().abs().amax() / LARGEST[torch.int8]).clamp(min=1e-30)
        a = (x.float() / scale).round().clamp(-127, 127).to(torch.int8)
        return w8a8_matmul(a, w.t(), scale.expand(len(x)), scale_b)

    assert not check_invariance(linear, randn(64, 256), STRADDLING).invariant


@pytest.mark.parametrize("eight", EIGHT_BITS)
def test_runs_agree(eight):
    arguments = operands(16, 4096, 4096, eight)
    assert check_run_to_run(partial(w8a8_matmul, *arguments)).invariant


# ------------------------------------------------------------------------------------- how they are launched


@pytest.mark.parametrize("eight", EIGHT_BITS)
def test_a_captured_graph_replays_the_eager_bits(eight):
    """Two captured products that split, and an eager one between: each finds its counters at zero."""
    arguments = operands(8, 768, 4096, eight)
    eager = w8a8_matmul(*arguments)
    schedule = None
    if has_wgmma(torch.device("cuda")):
        schedule = replace(thin_schedule(8, 768, plan_w8a8(4096, eight == torch.int8), 132), split=4)
    call = partial(w8a8_matmul, *arguments, schedule=schedule)
    assert same_bits(call(), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [call() for _ in range(2)]
    for _ in range(2):
        for c in captured:
            c.fill_(float("nan"))
        graph.replay()
        assert same_bits(call(), eager)
        torch.cuda.synchronize()
        assert all(same_bits(c, eager) for c in captured)


def test_tensors_past_2_31_elements():
    k = 1024
    a = torch.zeros(2**31 // k + 300, k, dtype=torch.int8, device="cuda")
    tail, b, scale_a, scale_b, _ = operands(5, 32, k, torch.int8)
    a[-5:] = tail
    scale = torch.ones(len(a), device="cuda")
    scale[-5:] = scale_a
    c = w8a8_matmul(a, b, scale, scale_b)
    assert same_bits(c[-5:], w8a8_matmul(tail, b, scale_a, scale_b))
    assert not c[:-5].any()


@pytest.mark.parametrize("m", [1, 5, 16, 17, 31, 600])
def test_what_torch_refuses_works(m):
    """Fewer than 17 rows, K or N not a multiple of 8."""
    for n, k in ((512, 1024), (30, 100), (7, 33)):
        arguments = operands(m, n, k, torch.int8)
        assert relative_error(w8a8_matmul(*arguments), w8a8_matmul_ref(*arguments)) < 2**-8
