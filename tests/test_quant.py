"""Quantisers and SiLU-and-multiply, in the interpreter or on the GPU at hand: right, invariant, strict.

bfloat16 needs a GPU: the interpreter rounds it otherwise.
"""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import quant
from kernels.activation import silu_mul, silu_mul_ref
from kernels.norm import NormSchedule, rms_norm
from kernels.quant import (
    LARGEST,
    SMALLEST_SCALE,
    check_scale_values,
    dequantise_ref,
    migrate_outliers,
    per_channel_quant,
    per_token_quant,
    per_token_quant_ref,
    rms_norm_per_token_quant,
    round_eight_bits,
    silu_mul_per_token_quant,
)
from lab.check import check_invariance, distinct_results, same_bits
from lab.device import current_device
from lab.timing import relative_error

DEVICE = current_device().torch_device
DTYPES = [torch.float16, torch.float32, *[torch.bfloat16] * current_device().is_gpu]
EIGHT_BITS = [dtype for dtype in LARGEST if dtype == torch.int8 or quant.has_fp8(DEVICE)]
WIDTHS = [1, 2, 17, 256, 300]


def rows(m, n, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator).to(DEVICE, dtype)


def same_numbers(a, b):
    """The same bits, but for the sign of an e4m3 zero."""
    return same_bits(a, b) if a.dtype == torch.int8 else torch.equal(a.float(), b.float())


# -------------------------------------------------------------------------------------------- the rounding


@triton.jit
def _round_kernel(x_ptr, q_ptr, INT8: tl.constexpr, WIDTH: tl.constexpr):
    cols = tl.arange(0, WIDTH)
    tl.store(q_ptr + cols, round_eight_bits(tl.load(x_ptr + cols), INT8))


def rounded(x, dtype):
    width = 1 << (len(x) - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, width - len(x)))
    q = torch.empty(width, dtype=dtype, device=DEVICE)
    _round_kernel[(1,)](x, q, INT8=dtype == torch.int8, WIDTH=width, enable_fp_fusion=False)
    return q


def test_int8_rounds_to_nearest_even_everywhere():
    halves = torch.arange(-254, 255, device=DEVICE) / 2
    near = torch.cat([halves, halves.nextafter(halves + 1), halves.nextafter(halves - 1)]).clamp(-127, 127)
    want = torch.nn.functional.pad(near, (0, 2048 - len(near))).round().to(torch.int8)
    assert same_bits(rounded(near, torch.int8), want)


@pytest.mark.skipif(torch.float8_e4m3fn not in EIGHT_BITS, reason="no fp8 on this GPU")
def test_fp8_rounds_to_nearest_even_between_all_neighbours():
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # all up to 448
    between = (numbers[1:] + numbers[:-1]) / 2
    points = torch.cat([numbers, between, between.nextafter(numbers[1:]), between.nextafter(numbers[:-1])])
    points = torch.cat([points, -points]).to(DEVICE)
    want = torch.nn.functional.pad(points, (0, 1024 - len(points))).to(torch.float8_e4m3fn)
    assert same_numbers(rounded(points, torch.float8_e4m3fn), want)


# ------------------------------------------------------------------------------------------- one row's scale


@pytest.mark.parametrize("eight", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
def test_per_token_quant_is_its_reference_bit_for_bit(n, dtype, eight):
    x = rows(5, n, dtype) * torch.logspace(-6, 4, 5, device=DEVICE)[:, None].to(dtype)
    q, scale = per_token_quant(x, eight)
    want_q, want_scale = per_token_quant_ref(x, eight)
    assert same_bits(scale, want_scale)
    assert same_numbers(q, want_q)


@pytest.mark.parametrize("eight", EIGHT_BITS)
def test_quantised_values_lie_within_half_a_step(eight):
    x = rows(7, 300)
    q, scale = per_token_quant(x, eight)
    step = scale.double()[:, None]
    if eight != torch.int8:  # the step grows with the number, from 2^-9 to 2^5
        step = step * torch.frexp(q.float()).exponent.sub(4).clamp(min=-9).double().exp2()
    assert ((dequantise_ref(q, scale) - x.double()).abs() <= step * (0.5 + 1e-6)).all()


@pytest.mark.parametrize("eight", EIGHT_BITS)
def test_the_largest_of_a_row_reaches_the_end_of_the_range(eight):
    x = rows(64, 17)
    q, _ = per_token_quant(torch.cat([x, -x]), eight)
    assert (q.float().abs().amax(1) == LARGEST[eight]).all()
    assert (q.float().abs() <= LARGEST[eight]).all()  # for int8: no -128


@pytest.mark.parametrize("eight", EIGHT_BITS)
def test_rows_of_zeros_and_of_denormals(eight):
    x = torch.zeros(3, 64, device=DEVICE)
    x[1] = 1e-41
    x[2, 3], x[2, 4] = 127 * SMALLEST_SCALE, -SMALLEST_SCALE / 4
    q, scale = per_token_quant(x, eight)
    assert (scale == SMALLEST_SCALE).all()
    assert not q[:2].any() if eight == torch.int8 else not q[0].float().any()
    assert q[2, 3].float().item() == (127 if eight == torch.int8 else 128)
    assert (dequantise_ref(q, scale) - x.double()).abs().max() <= 4 * SMALLEST_SCALE


@pytest.mark.parametrize("eight", EIGHT_BITS)
@pytest.mark.parametrize("odd", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(odd, eight):
    x = rows(3, 300)
    clean = per_token_quant(x, eight)
    x[1, 7] = odd
    q, scale = per_token_quant(x, eight)
    assert scale[1].isnan()
    assert not q[1].float().any()
    assert same_bits(q[::2], clean[0][::2])
    assert same_bits(scale[::2], clean[1][::2])


def test_the_largest_float_does_not_overflow():
    x = torch.tensor([[3.4e38, -1.7e38, 1.0]], device=DEVICE)
    for eight in EIGHT_BITS:
        q, scale = per_token_quant(x, eight)
        assert scale.isfinite().all()
        assert relative_error(dequantise_ref(q, scale), x) < 0.04


# ------------------------------------------------------------------------------------------------ fusing


@pytest.mark.parametrize("eight", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
def test_a_fused_norm_has_the_bits_of_the_two_steps(n, dtype, eight):
    x, residual, weight = rows(5, n, dtype), rows(5, n, dtype, seed=1), rows(1, n, dtype, seed=2)[0]
    x[3], residual[3, 0] = 0, float("nan")
    for arguments in ((x,), (x, weight)):
        q, scale = rms_norm_per_token_quant(*arguments, dtype=eight)
        want = per_token_quant(rms_norm(*arguments), eight)
        assert same_bits(q, want[0])
        assert same_bits(scale, want[1])
    q, scale, summed = rms_norm_per_token_quant(x, weight, 1e-5, eight, residual=residual)
    y, want_summed = rms_norm(x, weight, 1e-5, residual=residual)
    want = per_token_quant(y, eight)
    assert same_bits(summed, want_summed)
    assert same_bits(q, want[0])
    assert same_bits(scale, want[1])


@pytest.mark.parametrize("eight", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
def test_a_fused_silu_has_the_bits_of_the_two_steps(n, dtype, eight):
    gate_up = 4 * rows(5, 2 * n, dtype)
    gate_up[3, 0] = float("nan")
    q, scale = silu_mul_per_token_quant(gate_up, eight)
    want = per_token_quant(silu_mul(gate_up), eight)
    assert same_bits(q, want[0])
    assert same_bits(scale, want[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*WIDTHS, 3000])
def test_silu_mul_errs_no_more_than_twice_torch(n, dtype):
    gate_up = 4 * rows(3, 2 * n, dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    reference = silu_mul_ref(gate_up)
    limit = max(2 * relative_error(torch.nn.functional.silu(gate) * up, reference), torch.finfo(dtype).eps)
    assert relative_error(silu_mul(gate_up), reference) <= limit


def test_silu_mul_at_the_ends_of_the_range():
    gate = torch.tensor([[0.0, 100.0, -100.0, 3e38, -3e38, float("inf"), float("nan")]], device=DEVICE)
    y = silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=-1))[0]
    assert y[:6].tolist() == pytest.approx([0.0, 100.0, 0.0, 3e38, 0.0, float("inf")], rel=1e-6, abs=1e-30)
    assert y[6].isnan()


# --------------------------------------------------------------------------------------- batch invariance

ROW_FUNCTIONS = {
    "per_token_quant": lambda x, dtype: per_token_quant(x, dtype),
    "rms_norm_per_token_quant": lambda x, dtype: rms_norm_per_token_quant(x, dtype=dtype),
    "silu_mul_per_token_quant": lambda x, dtype: silu_mul_per_token_quant(x, dtype),
}


@pytest.mark.parametrize("eight", EIGHT_BITS)
@pytest.mark.parametrize("fn", ROW_FUNCTIONS.values(), ids=list(ROW_FUNCTIONS))
def test_rows_keep_their_bits_in_any_batch(fn, eight):
    for part in (0, 1):
        report = check_invariance(lambda x, part=part: fn(x, eight)[part], rows(33, 96), [1, 2, 16, 17, 32])
        assert report.invariant, report


def test_silu_mul_keeps_its_rows_in_any_batch():
    report = check_invariance(silu_mul, rows(33, 96), [1, 2, 16, 17, 32])
    assert report.invariant, report


def test_the_checker_catches_a_scale_for_the_whole_tensor():
    def per_tensor(x):
        scale = x.abs().amax() / 127
        return (x / scale).round().to(torch.int8)

    assert not check_invariance(per_tensor, rows(8, 96), [1, 2, 4]).invariant


@pytest.mark.parametrize("fn", ROW_FUNCTIONS)
def test_warps_change_no_bit(fn):
    x = rows(3, 1024)
    for part in (0, 1):
        groups = distinct_results(
            lambda warps, part=part: getattr(quant, fn)(x, schedule=NormSchedule(warps))[part], [1, 2, 4, 8]
        )
        assert len(groups) == 1


def test_strides_change_no_bit():
    wide = rows(10, 128)
    for x in (wide[::2], wide[:, 4:100], rows(96, 10).t(), wide[:1].expand(5, 128), wide.view(2, 5, 128)):
        for fn in (*ROW_FUNCTIONS.values(), lambda x, _: (silu_mul(x),)):
            got, want = fn(x, torch.int8), fn(x.contiguous(), torch.int8)
            assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 4), st.integers(1, 40), st.sampled_from(EIGHT_BITS))
def test_any_shape_comes_back_in_its_own_shape(m, n, eight):
    x = rows(m, 2 * n, torch.float16).view(m, 1, 2 * n)
    for q, scale in (per_token_quant(x, eight), rms_norm_per_token_quant(x, dtype=eight)):
        assert (q.shape, q.dtype, scale.shape, scale.dtype) == (x.shape, eight, (m, 1), torch.float32)
    q, scale = silu_mul_per_token_quant(x, eight)
    assert (q.shape, scale.shape, silu_mul(x).shape) == ((m, 1, n), (m, 1), (m, 1, n))


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("eight", EIGHT_BITS)
def test_per_channel_quant_gives_every_output_channel_a_scale(eight):
    weight = rows(9, 64, torch.float16)
    q, scale = per_channel_quant(weight, eight)
    want_q, want_scale = per_token_quant_ref(weight, eight)
    assert same_numbers(q, want_q)
    assert same_bits(scale, want_scale)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(odd):
    weight = rows(4, 8)
    weight[2, 3] = odd
    with pytest.raises(ValueError, match=r"weight must be finite.*weight\[2\]"):
        per_channel_quant(weight)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_of_weights_must_be_finite_and_positive(value):
    scale = torch.ones(4, device=DEVICE)
    check_scale_values("scale_b", scale)
    scale[2] = value
    with pytest.raises(ValueError, match=rf"scale_b\[2\]={value} \(1 of 4"):
        check_scale_values("scale_b", scale)


def test_migration_changes_no_product_and_lessens_the_error_of_int8():
    x, weight = rows(32, 64), rows(48, 64, seed=1)
    x[:, ::16] *= 100
    moved, factor = migrate_outliers(weight, x.abs().amax(0))
    assert torch.equal(x.double() * factor.double() @ moved.double().t(), x.double() @ weight.double().t())
    exact = x.double() @ weight.double().t()

    def error(x, weight):
        x, weight = dequantise_ref(*per_token_quant(x)), dequantise_ref(*per_channel_quant(weight))
        return relative_error(x @ weight.t(), exact)

    assert error(x * factor, moved) < 0.5 * error(x, weight)


def test_migration_leaves_dead_channels_alone():
    weight, act_max = rows(4, 6), torch.tensor([1.0, 0.0, 100.0, 1.0, 1.0, 1.0], device=DEVICE)
    weight[:, 4] = 0
    moved, factor = migrate_outliers(weight, act_max)
    assert factor[1] == factor[4] == 1
    assert moved.isfinite().all()
    assert same_bits(moved * factor, weight)


# ------------------------------------------------------------------------------------------- bad arguments

X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: per_token_quant(X.int()), TypeError, r"x\.dtype=torch\.int32"),
        (lambda: per_token_quant(X, torch.uint8), TypeError, r"dtype=torch\.uint8"),
        (lambda: per_token_quant(torch.zeros(2, 0)), ValueError, r"x\.shape=\(2, 0\)"),
        (lambda: per_token_quant(torch.zeros(1, 65537)), ValueError, "n=65537"),
        (lambda: rms_norm_per_token_quant(X, torch.zeros(7)), ValueError, r"weight\.shape=\(7,\)"),
        (lambda: rms_norm_per_token_quant(X, residual=X[:1]), ValueError, r"residual\.shape=\(1, 8\)"),
        (lambda: rms_norm_per_token_quant(X, residual=X.half()), TypeError, r"residual\.dtype=torch\.float16"),
        (lambda: silu_mul(X[:, :7]), ValueError, r"gate_up\.shape=\(2, 7\)"),
        (lambda: silu_mul([1.0]), TypeError, "gate_up must be a torch.Tensor, got list"),
        (lambda: silu_mul_per_token_quant(X[:, :7]), ValueError, r"gate_up\.shape=\(2, 7\)"),
        (lambda: per_channel_quant(X[0]), ValueError, r"weight\.shape=\(8,\)"),
        (lambda: migrate_outliers(X[0], X[0]), ValueError, r"weight\.shape=\(8,\)"),
        (lambda: migrate_outliers(X, X), ValueError, r"act_max\.shape=\(2, 8\)"),
        (lambda: migrate_outliers(X, X[0], alpha=1.5), ValueError, "alpha=1.5"),
        (lambda: migrate_outliers(X, X[0] - 1), ValueError, "act_max must be finite"),
    ],
)
def test_bad_arguments_are_named_with_their_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_gpu_without_fp8_is_offered_int8(monkeypatch):
    monkeypatch.setattr(quant, "has_fp8", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"NVIDIA A100 does not have; use torch\.int8"):
        per_token_quant(X, torch.float8_e4m3fn)
    assert per_token_quant(X.to(DEVICE), torch.int8)[0].dtype == torch.int8
