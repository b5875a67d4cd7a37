"""RMSNorm and LayerNorm, in the interpreter or on the GPU at hand: right, invariant, strict about arguments.

bfloat16 needs a GPU: the interpreter rounds it otherwise.
"""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.norm import (
    NormSchedule,
    layer_norm,
    layer_norm_ref,
    rms_norm,
    rms_norm_ref,
    tree_sum,
    tree_sum_ref,
)
from kernels.plan import plan_row
from lab.check import check_invariance, distinct_results, same_bits
from lab.device import current_device
from lab.timing import relative_error

DEVICE = current_device().torch_device
DTYPES = [torch.float16, torch.float32, *[torch.bfloat16] * current_device().is_gpu]
WIDTHS = [1, 2, 17, 256, 300, 1024]


def rows(m, n, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator).to(DEVICE, dtype)


def torch_error(fn, reference, dtype):
    """The error PyTorch itself makes in this dtype: the yardstick, with one rounding as a floor."""
    return max(2 * relative_error(fn(), reference), torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
def test_rms_norm_errs_no_more_than_twice_torch(n, dtype):
    x, weight = rows(5, n, dtype), rows(1, n, dtype, seed=1)[0]
    reference = rms_norm_ref(x, weight, 1e-6)
    limit = torch_error(lambda: torch.nn.functional.rms_norm(x, (n,), weight, 1e-6), reference, dtype)
    assert relative_error(rms_norm(x, weight), reference) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
def test_layer_norm_errs_no_more_than_twice_torch(n, dtype):
    x, weight, bias = rows(5, n, dtype), rows(1, n, dtype, seed=1)[0], rows(1, n, dtype, seed=2)[0]
    reference = layer_norm_ref(x, weight, bias)
    limit = torch_error(lambda: torch.nn.functional.layer_norm(x, (n,), weight, bias), reference, dtype)
    assert relative_error(layer_norm(x, weight, bias), reference) <= limit


def test_layer_norm_survives_a_large_mean():
    """E[x^2] - E[x]^2 would lose everything here."""
    x = rows(4, 512, torch.float32) + 10_000
    reference = layer_norm_ref(x)
    limit = torch_error(lambda: torch.nn.functional.layer_norm(x, (512,)), reference, x.dtype)
    assert relative_error(layer_norm(x), reference) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_residual_has_the_bits_of_the_two_steps(dtype):
    x, residual, weight = rows(5, 300, dtype), rows(5, 300, dtype, seed=1), rows(1, 300, dtype, seed=2)[0]
    y, summed = rms_norm(x, weight, residual=residual)
    assert same_bits(summed, x + residual)
    assert same_bits(y, rms_norm(x + residual, weight))


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_keep_their_bits_in_any_batch(norm, dtype):
    weight = rows(1, 96, dtype, seed=1)[0]
    report = check_invariance(lambda x: norm(x, weight), rows(33, 96, dtype), [1, 2, 7, 16, 17, 32])
    assert report.invariant, report


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_warps_change_no_bit(norm):
    x = rows(3, 512, torch.float32)
    groups = distinct_results(lambda w: norm(x, schedule=NormSchedule(w)), [1, 2, 4, 8])
    assert len(groups) == 1


@pytest.mark.parametrize("n", WIDTHS)
def test_the_kernel_adds_along_the_tree_of_its_plan(n):
    @triton.jit
    def sum_kernel(x_ptr, out_ptr, n_cols, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
        row, cols = tl.program_id(0), tl.arange(0, WIDTH)
        x = tl.load(x_ptr + row * n_cols + cols, mask=cols < n_cols, other=0.0)
        tl.store(out_ptr + row, tree_sum(x, WIDTH, LEVELS))

    x, out, plan = rows(4, n, torch.float32), torch.full((4,), float("nan"), device=DEVICE), plan_row(n)
    sum_kernel[(4,)](x, out, n, WIDTH=plan.width, LEVELS=plan.levels)
    assert same_bits(out, tree_sum_ref(x))


def test_strides_change_no_bit():
    wide = rows(10, 128, torch.float32)
    expanded = wide[:1].expand(5, 128)
    for x in (wide[::2], wide[:, 3:99], rows(96, 10, torch.float32).t(), expanded, wide.view(2, 5, 128)):
        assert same_bits(rms_norm(x), rms_norm(x.contiguous()))
        assert same_bits(layer_norm(x), layer_norm(x.contiguous()))
    residual = rows(5, 256, torch.float32)[:, ::2]
    assert same_bits(rms_norm(wide[::2], residual=residual)[0], rms_norm(wide[::2] + residual))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(1, 70), st.booleans())
def test_any_shape_comes_back_in_its_own_shape(m, n, with_residual):
    x = rows(m, n, torch.float16)
    y = rms_norm(x, residual=x) if with_residual else (rms_norm(x),)
    assert all(part.shape == x.shape and part.dtype == x.dtype for part in y)
    assert layer_norm(x.reshape(m, 1, n)).shape == (m, 1, n)


def test_zeros_stay_finite_and_a_nan_stays_in_its_row():
    x = rows(3, 64, torch.float32)
    x[0], x[1, 5] = 0, float("nan")
    y = rms_norm(x)
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    assert y[1].isnan().all()
    assert y[2].isfinite().all()


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X.int()}, TypeError, r"x\.dtype=torch\.int32"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(())}, ValueError, r"x\.shape=\(\)"),
        ({"x": torch.zeros(2, 0)}, ValueError, r"x\.shape=\(2, 0\)"),
        ({"x": X, "weight": torch.zeros(7)}, ValueError, r"weight\.shape=\(7,\)"),
        ({"x": X, "weight": torch.zeros(8).half()}, TypeError, r"weight\.dtype=torch\.float16"),
        ({"x": X, "weight": torch.zeros(8, device="meta")}, ValueError, r"weight\.device=meta"),
        ({"x": torch.zeros(1, 65537)}, ValueError, "n=65537"),
    ],
)
@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_bad_arguments_are_named_with_their_value(norm, arguments, error, message):
    with pytest.raises(error, match=message):
        norm(**arguments)


def test_a_residual_of_another_shape_or_dtype_is_refused():
    with pytest.raises(ValueError, match=r"residual\.shape=\(1, 8\)"):
        rms_norm(X, residual=X[:1])
    with pytest.raises(TypeError, match=r"residual\.dtype=torch\.float16"):
        rms_norm(X, residual=X.half())
