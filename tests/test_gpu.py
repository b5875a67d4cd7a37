"""What only a GPU can show: that every freedom the schedules use is one, on this GPU, and that the checker bites."""

import hashlib
import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kernels import launch
from kernels import matmul as mm
from kernels.matmul import PERSISTENT_TILES, SPECIALISED, MatmulSchedule, matmul, specialised_schedule
from kernels.norm import NormSchedule, layer_norm, rms_norm, rms_norm_ref
from kernels.plan import plan_matmul
from lab import peers
from lab.check import check_invariance, check_prefixes, check_run_to_run, compare, distinct_results, same_bits
from lab.device import PRESETS, ROOT, STRADDLING
from lab.timing import measure, time_eager

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODES = [
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "tf32x3"),
]


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


# ---------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [300, 4096, 5120, 8192])
def test_norm_rows_keep_their_bits(n, dtype):
    x, weight = randn(4096, n, dtype=dtype), randn(n, dtype=dtype, seed=1)
    for fn in (rms_norm, layer_norm):
        report = check_invariance(lambda x, fn=fn: fn(x, weight), x, STRADDLING)
        assert report.invariant, report
    report = check_prefixes(lambda x: rms_norm(x, weight, residual=x)[0], x, STRADDLING)
    assert report.invariant, report


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [96, 300, 4096, 5120, 8192, 16384])
def test_warps_are_free_in_a_norm(n, dtype):
    x, warps = randn(64, n, dtype=dtype), [w for w in (1, 2, 4, 8, 16, 32) if n // w <= 4096]
    for fn in (rms_norm, layer_norm):
        groups = distinct_results(lambda w, fn=fn: fn(x, schedule=NormSchedule(w)), warps)
        assert list(groups.values()) == [warps]


# --------------------------------------------------------------------------------------------------- matmul


def pointer_schedules(precision):
    free = precision != "tf32x3"
    tiles = itertools.product(
        (16, 64, 128), (32, 128), (32, 64) if free else (64,), (4, 8), (False, True)[: 1 + free]
    )
    return [MatmulSchedule(m, n, k, warps, 3, swap=swap) for m, n, k, warps, swap in tiles if m * n <= 8192]


def specialised():
    """Tiles of one, two and three parts, each swapped, split, in relay, and all of it together."""
    tiles = ((64, 64, 32), (128, 128, 0), (128, 128, 32), (256, 128, 0), (64, 64, 48), (128, 128, 80))
    for tile, swap, split, relay in itertools.product(tiles, *[(False, True)] * 3):
        yield specialised_schedule(*tile, swap=swap, split=split, relay=relay)
    for left, swap in itertools.product((64, 128), (False, True)):  # three instructions
        yield replace(specialised_schedule(left, 128, 80, swap=swap), wide=False)
    for tile in ((128, 32, 16), (128, 128, 128), (128, 128, 72), (64, 256, 16)):  # the last takes two instructions
        yield specialised_schedule(*tile)
    for tile in ((64, 256, 16), (128, 128, 16), (128, 128, 72), (64, 16, 8)):
        yield specialised_schedule(*tile, swap=True)


@pytest.mark.parametrize("sizes", [(777, 4096, 4096), (777, 1536, 8192), (300, 768, 4096), (129, 4112, 1096)])
@pytest.mark.parametrize("sms", [132, 20, 1])
def test_a_relay_hands_over_every_bit(sizes, sms, monkeypatch):
    """With more and fewer tiles than programs, with a bias, three times: counters are left as they were found."""
    if not mm.has_wgmma(torch.device("cuda")):
        pytest.skip("the specialised kernel is Hopper's")
    monkeypatch.setattr(mm, "sm_count", lambda device: sms)
    launch.forget()
    m, n, k = sizes
    a, b = randn(m, k, dtype=torch.bfloat16), randn(n, k, dtype=torch.bfloat16, seed=1).t()
    plan = plan_matmul(n, k, 2)
    for bias in (None, randn(n, dtype=torch.bfloat16, seed=2)):
        want = matmul(a, b, bias, schedule=MatmulSchedule(64, 64, 64, 4, 3))
        for schedule in specialised():
            for _ in range(3 * schedule.fits(plan)):
                got = matmul(a, b, bias, schedule=schedule)
                assert same_bits(got, want), (schedule, compare(got, want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.7), (1.0, 0.3), (0.3, 1.0)])
def test_rows_of_a_scaled_addmm_keep_their_bits(dtype, alpha, beta):
    """Its tiles differ in which product a compiler would fuse into the sum of the two."""
    whole = max(STRADDLING)
    a, b, addend = randn(whole, 1024, dtype=dtype), randn(1024, 512, dtype=dtype, seed=1), randn(whole, 512, seed=2)
    both = torch.cat((a, addend.to(dtype)), dim=1)
    report = check_prefixes(lambda x: mm.addmm(x[:, 1024:], x[:, :1024], b, alpha=alpha, beta=beta), both, STRADDLING)
    assert report.invariant, report


@pytest.mark.parametrize("m", [1, 9, 255, 256, 257, 265, 272, 273, 512, 777, 1000])
@pytest.mark.parametrize("shape", [(4096, 512), (768, 4096)])
def test_tails_that_are_dealt_out_leave_out_no_row(m, shape):
    if not mm.has_wgmma(torch.device("cuda")):
        pytest.skip("the specialised kernel is Hopper's")
    n, k = shape
    a, b = randn(m, k, dtype=torch.bfloat16), randn(n, k, dtype=torch.bfloat16, seed=1).t()
    want, plan = matmul(a, b, schedule=MatmulSchedule(64, 64, 64, 4, 3)), plan_matmul(n, k, 2)
    for schedule in (s for s in specialised() if len(s.parts) > 1 and s.fits(plan)):
        out = torch.full_like(want, float("nan"))
        assert same_bits(matmul(a, b, schedule=schedule, out=out), want), (schedule, compare(out, want))


@pytest.mark.parametrize(("dtype", "precision"), MODES)
@pytest.mark.parametrize(
    "sizes", [(100, 512, 1024), (33, 3008, 776), (5, 130, 33), (100, 1536, 4160), (70, 768, 5000), (257, 1280, 8192)]
)
def test_schedules_are_free_in_a_matmul(sizes, dtype, precision):
    m, n, k = sizes
    a, b = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1).t()
    a[:, ::7], b[:, ::5] = -0.0, -0.0  # columns of zeros of either sign: a schedule must not turn them round
    schedules = pointer_schedules(precision)
    if mm.has_tma(a.device) and dtype != torch.float32 and k % 8 == n % 16 == 0:
        in_turn = [schedule for schedule, _ in PERSISTENT_TILES]
        in_turn += [MatmulSchedule(m, 128, 128, 4, 3, swap=True, persistent=True) for m in (16, 32)]
        schedules += in_turn + [replace(schedule, split=True) for schedule in in_turn]
        schedules += [*SPECIALISED, *specialised()] * mm.has_wgmma(a.device)
    plan = plan_matmul(n, k, a.element_size(), precision)
    schedules = [schedule for schedule in schedules if schedule.fits(plan)]
    groups = distinct_results(lambda s: matmul(a, b, precision=precision, schedule=s), schedules)
    assert [len(group) for group in groups.values()] == [len(schedules)]


@pytest.mark.parametrize(("dtype", "precision"), MODES)
@pytest.mark.parametrize("sizes", [(4096, 1024), (1000, 776), (130, 33), (768, 4096), (1536, 8192)])
def test_matmul_rows_keep_their_bits(sizes, dtype, precision):
    n, k = sizes
    a, b = randn(4096, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1).t()
    report = check_invariance(lambda a: matmul(a, b, precision=precision), a, STRADDLING)
    assert report.invariant, report


@pytest.mark.parametrize("layout", [(False, False), (False, True), (True, False), (True, True)])
def test_layouts_are_free_in_a_matmul(layout):
    a, b = randn(70, 256, dtype=torch.bfloat16), randn(256, 144, dtype=torch.bfloat16, seed=1)
    a_transposed, b_transposed = (
        x.t().contiguous().t() if swap else x for x, swap in zip((a, b), layout, strict=True)
    )
    assert same_bits(matmul(a_transposed, b_transposed), matmul(a, b))
    sliced = torch.stack([a, a], dim=-1)[..., 0]
    assert same_bits(matmul(sliced, b), matmul(a, b))


@pytest.mark.parametrize("n", [32, 33])
def test_tensors_past_2_31_elements(n):
    """The last rows of a matrix whose elements an int32 cannot count, by descriptors (n = 32) and by pointers."""
    k = 1024
    a, b = torch.zeros(2**31 // k + 300, k, dtype=torch.bfloat16, device="cuda"), randn(k, n, dtype=torch.bfloat16)
    a[-5:] = randn(5, k, dtype=torch.bfloat16, seed=1)
    c = matmul(a, b)
    assert same_bits(c[-5:], matmul(a[-5:].clone(), b))
    assert not c[:-5].any()


def test_a_batch_element_has_the_bits_of_its_own_product():
    a, b = randn(3, 70, 4160, dtype=torch.bfloat16), randn(3, 768, 4160, dtype=torch.bfloat16, seed=1).mT
    assert same_bits(matmul(a, b), torch.stack([matmul(x, y) for x, y in zip(a, b, strict=True)]))


def test_the_number_of_sms_is_free_in_a_matmul(monkeypatch):
    a, b = randn(300, 512, dtype=torch.bfloat16), randn(1024, 512, dtype=torch.bfloat16, seed=1).t()
    results = []
    for sms in (1, 20, 78, 132, 188):
        monkeypatch.setattr(mm, "sm_count", lambda device, sms=sms: sms)
        launch.forget()
        results.append(matmul(a, b))
    assert all(same_bits(result, results[0]) for result in results)


def test_ieee_is_not_tf32():
    """An fp32 product that silently went through TF32 would give 2048."""
    a, b = torch.full((1, 16), 2049.0, device="cuda"), torch.eye(16, device="cuda")
    assert matmul(a, b).unique().tolist() == [2049.0]
    assert matmul(a, b, precision="tf32").unique().tolist() == [2048.0]


# ------------------------------------------------------------------------------------- how they are launched


def test_a_captured_graph_replays_the_eager_bits():
    x, weight = randn(33, 4096, dtype=torch.bfloat16), randn(4096, dtype=torch.bfloat16, seed=1)
    b = randn(1024, 4096, dtype=torch.bfloat16, seed=2).t()
    eager = matmul(rms_norm(x, weight), b)
    graph, buffer = torch.cuda.CUDAGraph(), torch.empty_like(x)
    buffer.copy_(x)
    with torch.cuda.graph(graph):
        captured = matmul(rms_norm(buffer, weight), b)
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(captured, eager)


DIGEST = """
import hashlib, torch, lab
from kernels.matmul import matmul
from kernels.norm import rms_norm
from lab.check import bits
x = torch.randn(100, 4096, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
c = matmul(rms_norm(x), x.t().contiguous())
print(hashlib.sha256(bits(c).cpu().numpy().tobytes()).hexdigest())
"""


def test_a_captured_split_keeps_counters_of_its_own():
    """Two replays of two captured products, and an eager one between: each finds its counters at zero."""
    a, b = randn(8, 4096, dtype=torch.bfloat16), randn(768, 4096, dtype=torch.bfloat16, seed=1).t()
    schedule = MatmulSchedule(16, 64, 256, 4, 4, swap=True, persistent=True, split=True)
    eager = matmul(a, b, schedule=schedule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [matmul(a, b, schedule=schedule) for _ in range(2)]
    for _ in range(2):
        for c in captured:
            c.fill_(float("nan"))
        graph.replay()
        assert same_bits(matmul(a, b, schedule=schedule), eager)
        torch.cuda.synchronize()
        assert all(same_bits(c, eager) for c in captured)


def test_borrowed_counters_are_given_back():
    a, b = randn(8, 4096, dtype=torch.bfloat16), randn(768, 4096, dtype=torch.bfloat16, seed=1).t()
    schedule = MatmulSchedule(16, 64, 256, 4, 4, swap=True, persistent=True, split=True)
    eager = matmul(a, b, schedule=schedule)
    before = launch._reserve[a.device][1]
    with launch.borrowed_counters():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = matmul(a, b, schedule=schedule)
        assert launch._reserve[a.device][1] > before
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(captured, eager)
    assert launch._reserve[a.device][1] == before


def test_without_counters_a_captured_split_takes_the_chunks_in_turn(monkeypatch):
    a, b = randn(8, 4096, dtype=torch.bfloat16), randn(768, 4096, dtype=torch.bfloat16, seed=1).t()
    schedule = MatmulSchedule(16, 64, 256, 4, 4, swap=True, persistent=True, split=True)
    eager = matmul(a, b, schedule=schedule)
    matmul(a, b, schedule=replace(schedule, split=False))  # compiled before the capture
    monkeypatch.setattr(launch, "FINISHED_COUNTERS", 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = matmul(a, b, schedule=schedule)
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(captured, eager)


def test_two_fresh_processes_agree():
    digests = {
        subprocess.run([sys.executable, "-c", DIGEST], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == len(hashlib.sha256().hexdigest())


# ------------------------------------------------------------------------------------------ negative controls


def test_the_checker_catches_a_block_size_that_follows_the_batch():
    x, weight = randn(512, 8192, dtype=torch.bfloat16), randn(8192, dtype=torch.bfloat16, seed=1)
    try:
        peers.rms_norm_row_blocked(x, None, weight)
    except ImportError as missing:
        pytest.skip(f"needs cuda.core: {missing}")

    def fn(x):
        return peers.rms_norm_row_blocked(x, None, weight)

    assert not check_prefixes(fn, x, STRADDLING).invariant
    assert check_prefixes(fn, x[:4], [1, 2, 4]).invariant, "one row against four sits below the threshold"
    assert check_run_to_run(lambda: fn(x)).invariant, "it is deterministic all the same"


def test_the_checker_catches_torch_mm():
    differing = 0
    for n, k in ((1000, 3000), (2560, 2560), (4096, 4096), (130, 4096)):
        a, b = randn(1024, k), randn(n, k, seed=1).t()
        differing += not check_prefixes(lambda a, b=b: torch.mm(a, b), a, STRADDLING).invariant
    assert differing


# ----------------------------------------------------------------------------------------------------- timer


def test_a_wrong_contender_is_never_timed():
    x = randn(8, 256, dtype=torch.bfloat16)
    contenders = {"right": lambda x: rms_norm(x), "wrong": lambda x: 1.1 * x}
    with pytest.raises(ValueError, match="wrong: relative error"):
        measure(contenders, [(x,)], rms_norm_ref(x), PRESETS["quick"])


@pytest.mark.parametrize("timer", [None, time_eager])
def test_more_work_takes_longer_and_percentiles_are_ordered(timer):
    options = {} if timer is None else {"timer": timer}
    medians = []
    for m in (64, 16384):
        ring = [(randn(m, 8192, dtype=torch.bfloat16, seed=seed),) for seed in range(2)]
        timing = measure({"ours": rms_norm}, ring, rms_norm_ref(*ring[0]), PRESETS["quick"], **options)["ours"]
        assert 0 < timing.p20_ms <= timing.median_ms <= timing.p80_ms
        medians.append(timing.median_ms)
    assert medians[1] > 4 * medians[0]


def test_poisoned_memory_shows_what_a_kernel_leaves_out():
    x = randn(64, 4096, dtype=torch.bfloat16)

    def writes_half(x):
        y = torch.empty_like(x)
        y[:32] = rms_norm(x[:32])
        return y

    with pytest.raises(ValueError, match="relative error nan"):
        measure({"half": writes_half}, [(x,)], rms_norm_ref(x), PRESETS["quick"])
