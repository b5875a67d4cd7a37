"""8-bit matmul, in the interpreter or on the GPU at hand: right, invariant, strict about arguments.

What the plans and schedules leave free is tried on a GPU, in test_gpu_w8a8.py. Here the inputs are small integers,
whose sums are exact, because NumPy's dot product chooses an order of its own.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import quant, w8a8
from kernels.plan import EXACT_K, PROMOTE_KS, W8A8Plan, plan_w8a8
from kernels.quant import LARGEST, per_channel_quant, per_token_quant
from kernels.w8a8 import WIDE_TILES, W8A8Schedule, choose_schedule, thin_schedule, w8a8_matmul, w8a8_matmul_ref
from lab.check import check_invariance, same_bits
from lab.device import current_device
from lab.timing import relative_error

DEVICE = current_device().torch_device
EIGHT_BITS = [dtype for dtype in LARGEST if dtype == torch.int8 or quant.has_fp8(DEVICE)]


def integers(m, n, dtype, seed=0, largest=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, (m, n), generator=generator).float().to(DEVICE, dtype)


def scales(n, seed=0):
    return 2.0 ** -torch.randint(0, 5, (n,), generator=torch.Generator().manual_seed(seed)).float().to(DEVICE)


def operands(m, n, k, dtype):
    """Small integers and powers of two: every result is exact in fp32."""
    return integers(m, k, dtype), integers(n, k, dtype, seed=1).t(), scales(m), scales(n, seed=1)


# --------------------------------------------------------------------------------------------------- plans


def test_a_plan_is_the_same_object_for_every_batch():
    assert plan_w8a8(4096, False) is plan_w8a8(4096, False)
    assert plan_w8a8(4096, True, 128) == W8A8Plan(4096, exact=True, promote_k=None)  # nothing to promote


def test_int8_is_exact_up_to_its_bound_and_refused_beyond():
    assert EXACT_K * 128**2 <= 2**31 - 1 < (EXACT_K + 1) * 128**2
    assert plan_w8a8(EXACT_K, True).k == EXACT_K
    with pytest.raises(ValueError, match=f"at most {EXACT_K}.*K={EXACT_K + 1}"):
        plan_w8a8(EXACT_K + 1, True)
    assert plan_w8a8(EXACT_K + 1, False).k == EXACT_K + 1


def test_a_promotion_interval_that_no_kernel_takes_is_refused():
    with pytest.raises(ValueError, match="promote_k=100"):
        plan_w8a8(4096, False, 100)


@pytest.mark.parametrize("value", [-128, 127])
def test_the_largest_sum_of_int8_does_not_overflow(value):
    a = torch.full((1, EXACT_K), -128, dtype=torch.int8, device=DEVICE)
    b = torch.full((EXACT_K, 1), value, dtype=torch.int8, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    assert w8a8_matmul(a, b, one, one, out_dtype=torch.float32).item() == float(
        torch.tensor(-128 * value * EXACT_K, dtype=torch.int32)
    )


# ----------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("promote_k", PROMOTE_KS)
@pytest.mark.parametrize("specialised", [True, False])
def test_every_schedule_that_is_chosen_fits_its_plan(specialised, promote_k, exact):
    for k in (64, 4096, 14336):
        plan = plan_w8a8(k, exact, promote_k)
        for m in (1, 16, 17, 33, 64, 65, 128, 512, 4096):
            for n in (16, 1280, 4096, 28672):
                for sms in (1, 20, 132):
                    schedule = choose_schedule(m, n, plan, specialised, sms)
                    assert schedule.fits(plan)
                    assert schedule.specialised == specialised
                    assert schedule.split <= max(1, k // 1024)


def test_schedules_outside_a_plan_are_told_apart():
    wide = W8A8Schedule(128, 256, 128, 8, 3, specialised=True)
    assert wide.fits(plan_w8a8(4096, True))
    assert wide.fits(plan_w8a8(4096, False, None))
    assert not wide.fits(plan_w8a8(4096, False, 512))  # two sums of 128 registers each
    low = W8A8Schedule(16, 64, 128, 4, 3)
    assert low.fits(plan_w8a8(4096, True))
    assert not low.fits(plan_w8a8(4096, False))  # mma.sync, which rounds otherwise
    assert replace(low, swap=True).fits(plan_w8a8(4096, False))
    assert not W8A8Schedule(64, 64, 256, 4, 3).fits(plan_w8a8(4096, False, 128))
    assert not replace(low, swap=True, specialised=True, split=2).fits(plan_w8a8(4096, False, None))
    assert replace(low, swap=True, specialised=True, split=2).fits(plan_w8a8(4096, False, 512))


def test_the_ring_of_every_specialised_schedule_fits_shared_memory():
    every = [tile for tile, _ in WIDE_TILES]
    every += [thin_schedule(m, n, plan_w8a8(4096, True), 132) for m in (1, 32, 64) for n in (4096, 28672)]
    for s in every:
        staged = s.tile[0] * min(s.tile[1], 128 + s.tail_n) if not s.swap else s.tile[0] * s.tile[1]
        assert s.num_stages * sum(s.tile) * s.block_k + 2 * staged <= 226 * 1024
        assert s.num_stages >= 3


# -------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("sizes", [(1, 16, 64), (5, 33, 100), (33, 64, 256), (70, 130, 30), (16, 48, 1)])
def test_exact_inputs_give_exact_results(sizes, dtype):
    a, b, scale_a, scale_b = operands(*sizes, dtype)
    bias = integers(1, sizes[1], torch.float32, seed=2)[0]
    for arguments in ((a, b, scale_a, scale_b), (a, b, scale_a, scale_b, bias)):
        c = w8a8_matmul(*arguments, out_dtype=torch.float32)
        assert torch.equal(c.double(), w8a8_matmul_ref(*arguments))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("promote_k", PROMOTE_KS)
@pytest.mark.parametrize("k", [64, 512, 1100])
def test_promotion_adds_every_stretch_once(k, promote_k, dtype):
    a, b, scale_a, scale_b = operands(3, 16, k, dtype)
    plan = plan_w8a8(k, dtype == torch.int8, promote_k)
    c = w8a8_matmul(a, b, scale_a, scale_b, out_dtype=torch.float32, plan=plan)
    assert torch.equal(c.double(), w8a8_matmul_ref(a, b, scale_a, scale_b))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_quantised_operands_give_the_product_of_what_they_stand_for(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(m, 256, generator=generator).to(DEVICE) for m in (9, 48))
    a, scale_a = per_token_quant(x, dtype)
    w, scale_b = per_channel_quant(weight, dtype)
    c = w8a8_matmul(a, w.t(), scale_a, scale_b, out_dtype=torch.float32)
    assert relative_error(c, w8a8_matmul_ref(a, w.t(), scale_a, scale_b)) < (1e-6 if dtype == torch.int8 else 1e-3)
    assert relative_error(c, x.double() @ weight.double().t()) < (0.02 if dtype == torch.int8 else 0.05)


def test_scales_then_bias_with_a_rounding_each():
    """A sum of 1 makes the order visible: (1 * scale_a) * scale_b + bias, each step rounded to fp32."""
    one = torch.ones(64, 1, dtype=torch.int8, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    scale_a, scale_b, bias = (torch.rand(64, generator=generator).to(DEVICE) + 0.5 for _ in range(3))
    c = w8a8_matmul(one, one.t(), scale_a, scale_b, -bias, out_dtype=torch.float32)
    product = scale_a[:, None] * scale_b
    assert same_bits(c, product - bias)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_out_dtypes_and_out(dtype):
    arguments = operands(5, 32, 64, dtype)
    want = w8a8_matmul(*arguments, out_dtype=torch.float32)
    half = w8a8_matmul(*arguments, out_dtype=torch.float16)
    assert same_bits(half, want.half())
    out = torch.full((5, 40), float("nan"), device=DEVICE)[:, :32]
    assert w8a8_matmul(*arguments, out_dtype=torch.float32, out=out) is out
    assert same_bits(out, want)
    assert w8a8_matmul(*arguments).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_strides_change_no_bit(dtype):
    a, b, scale_a, scale_b = operands(6, 32, 64, dtype)
    want = w8a8_matmul(a, b, scale_a, scale_b, out_dtype=torch.float32)
    wide_a, wide_b = (torch.stack([x.float(), x.float()], -1).to(dtype)[..., 0] for x in (a, b))
    for other_a, other_b in ((wide_a, b), (a, wide_b), (a.t().contiguous().t(), b), (a, b.contiguous())):
        assert same_bits(w8a8_matmul(other_a, other_b, scale_a, scale_b, out_dtype=torch.float32), want)
    row = w8a8_matmul(a[:1].expand(6, 64), b, scale_a[:1].expand(6), scale_b, out_dtype=torch.float32)
    assert same_bits(row, want[:1].expand(6, 32))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("sizes", [(0, 16, 32), (3, 0, 32), (3, 16, 0)])
def test_empty_sizes(sizes, dtype):
    m, n, k = sizes
    a, b = torch.empty(m, k, dtype=dtype, device=DEVICE), torch.empty(k, n, dtype=dtype, device=DEVICE)
    bias = torch.arange(n, dtype=torch.float32, device=DEVICE)
    c = w8a8_matmul(a, b, scales(m), scales(n), bias, out_dtype=torch.float32)
    assert torch.equal(c, bias.expand(m, n))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 150), st.sampled_from(EIGHT_BITS))
def test_any_sizes_are_exact(m, n, k, dtype):
    arguments = operands(m, n, k, dtype)
    c = w8a8_matmul(*arguments, out_dtype=torch.float32)
    assert torch.equal(c.double(), w8a8_matmul_ref(*arguments))


# ---------------------------------------------------------------------------------------- batch invariance


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_rows_keep_their_bits_in_any_batch(dtype):
    """The quantiser in front: other rows may be huge, infinite, NaN or zero."""
    weight = integers(32, 64, torch.float32, seed=1)
    w, scale_b = per_channel_quant(weight, dtype)

    def linear(x):
        a, scale_a = per_token_quant(x, dtype)
        return w8a8_matmul(a, w.t(), scale_a, scale_b, out_dtype=torch.float32)

    # With a largest element of 127 or 448 a row's scale is 1, and its values are kept exactly.
    x = integers(33, 64, torch.float32)
    x[:, 0] = LARGEST[dtype]
    report = check_invariance(linear, x, [1, 2, 16, 17, 32])
    assert report.invariant, report


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_nan_stays_in_its_row(dtype):
    x = integers(4, 64, torch.float32)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    a, scale_a = per_token_quant(x, dtype)
    w, scale_b = per_channel_quant(integers(16, 64, torch.float32, seed=1), dtype)
    c = w8a8_matmul(a, w.t(), scale_a, scale_b, out_dtype=torch.float32)
    assert c[1:3].isnan().all()
    assert c[::3].isfinite().all()


# ------------------------------------------------------------------------------------------- bad arguments

A, B = torch.zeros(2, 32, dtype=torch.int8), torch.zeros(32, 16, dtype=torch.int8)
ONE_A, ONE_B = torch.ones(2), torch.ones(16)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"a": [1]}, TypeError, "a must be a torch.Tensor, got list"),
        ({"a": A.float()}, TypeError, r"a\.dtype=torch\.float32"),
        ({"b": B.to(torch.float8_e4m3fn)}, TypeError, r"b\.dtype=torch\.float8_e4m3fn"),
        ({"b": B.to("meta")}, ValueError, r"b\.device=meta"),
        ({"b": B[:31]}, ValueError, r"\(2, 32\) and \(31, 16\)"),
        ({"a": A[0]}, ValueError, r"\(32,\) and \(32, 16\)"),
        ({"scale_a": 1.0}, TypeError, "scale_a must be a torch.Tensor, got float"),
        ({"scale_a": ONE_A.half()}, TypeError, r"scale_a\.dtype=torch\.float16"),
        ({"scale_a": ONE_A[:, None]}, ValueError, r"scale_a\.shape=\(2, 1\)"),
        ({"scale_b": torch.ones(())}, ValueError, r"scale_b\.shape=\(\)"),
        ({"scale_b": ONE_B.to("meta")}, ValueError, r"scale_b\.device=meta"),
        ({"scale_b": torch.zeros(16)}, ValueError, r"scale_b\[0\]=0\.0 \(16 of 16"),
        ({"scale_b": torch.full((16,), math.inf)}, ValueError, r"scale_b\[0\]=inf"),
        ({"scale_b": torch.full((16,), math.nan)}, ValueError, r"scale_b\[0\]=nan"),
        ({"bias": torch.zeros(15)}, ValueError, r"bias\.shape=\(15,\)"),
        ({"bias": torch.zeros(16).int()}, TypeError, r"bias\.dtype=torch\.int32"),
        ({"out_dtype": torch.int32}, TypeError, r"out_dtype=torch\.int32"),
        ({"out": torch.zeros(2, 15)}, ValueError, r"out\.shape=\(2, 15\)"),
        ({"out": torch.zeros(2, 16)}, ValueError, r"out\.dtype=torch\.float32"),
        ({"out": torch.zeros(16, 2).bfloat16().t()}, ValueError, r"out\.stride\(\)=\(1, 2\)"),
        ({"plan": plan_w8a8(64, True)}, ValueError, "not for torch.int8 operands with K=32"),
        ({"plan": plan_w8a8(32, False)}, ValueError, "not for torch.int8 operands with K=32"),
        ({"schedule": W8A8Schedule(512, 512, 64, 4, 3)}, ValueError, "outside"),
        ({"schedule": W8A8Schedule(64, 64, 64, 4, 3, tail_n=32)}, ValueError, "tail_n=32.* has a tail"),
        (
            {"schedule": W8A8Schedule(64, 64, 64, 4, 3, swap=True, specialised=True, tail_n=32)},
            ValueError,
            "must be specialised and not swapped",
        ),
        ({"schedule": W8A8Schedule(128, 128, 128, 8, 4, specialised=True)}, ValueError, "needs a Hopper GPU"),
    ],
)
def test_bad_arguments_are_named_with_their_value(changed, error, message):
    arguments = {"a": A, "b": B, "scale_a": ONE_A, "scale_b": ONE_B, **changed}
    with pytest.raises(error, match=message):
        w8a8_matmul(**arguments)


def test_k_beyond_the_exact_bound_is_refused():
    a, b = (torch.zeros(EXACT_K + 1, dtype=torch.int8).view(shape) for shape in ((1, -1), (-1, 1)))
    with pytest.raises(ValueError, match=f"K={EXACT_K + 1}"):
        w8a8_matmul(a, b, torch.ones(1), torch.ones(1))


def test_a_gpu_without_fp8_is_offered_int8(monkeypatch):
    monkeypatch.setattr(quant, "has_fp8", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    a, b = A.to(torch.float8_e4m3fn), B.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"NVIDIA A100 does not have; use torch\.int8"):
        w8a8_matmul(a, b, ONE_A, ONE_B)


def test_scales_of_a_weight_are_looked_at_once_and_again_when_written(monkeypatch):
    looked = []
    check = w8a8.check_scale_values
    monkeypatch.setattr(w8a8, "check_scale_values", lambda *arguments: looked.append(1) or check(*arguments))
    arguments = operands(2, 16, 32, torch.int8)
    for _ in range(3):
        w8a8_matmul(*arguments)
    assert len(looked) == 1
    arguments[3][4] = 0
    with pytest.raises(ValueError, match=r"scale_b\[4\]=0\.0"):
        w8a8_matmul(*arguments)


def test_out_that_shares_memory_is_refused():
    memory = torch.zeros(64, dtype=torch.int8, device=DEVICE)
    a, out = memory.view(2, 32), memory.view(torch.bfloat16).view(2, 16)
    with pytest.raises(ValueError, match="out shares memory with a"):
        w8a8_matmul(a, B.to(DEVICE), ONE_A.to(DEVICE), ONE_B.to(DEVICE), out=out)
    out = torch.ones(2, 16, device=DEVICE)
    operands = {"scale_a": ONE_A.to(DEVICE), "scale_b": ONE_B.to(DEVICE), "bias": None}
    for name, x in {"scale_a": out[0, :2], "scale_b": out[1], "bias": out[0]}.items():
        with pytest.raises(ValueError, match=f"out shares memory with {name}"):
            w8a8_matmul(A.to(DEVICE), B.to(DEVICE), **(operands | {name: x}), out=out, out_dtype=torch.float32)
