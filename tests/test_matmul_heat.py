"""The heat map of speeds relative to cuBLAS: right cells, right colours, and nothing that does not belong there."""

from itertools import product

import numpy as np
import pytest
from test_charts import Gpu, labels, small, times

from lab.charts import matmul_heat, speed_color
from lab.records import MissingRecord

SHAPES = {
    ("llama-3-8b", "o", 1): (4096, 4096),
    ("llama-3-8b", "o", 2): (4096, 2048),
    ("llama-3-70b", "qkv", 8): (1280, 8192),
}
CUBLAS_OVER = {"cublas": 1.0, "batch_invariant": 1.25, "single_tile": 0.2}


def row(impl, shape, m, ms, dtype="bfloat16"):
    (model, layer, tp), (n, k) = shape, SHAPES[shape]
    point = {"op": "matmul", "impl": impl, "dtype": dtype, "model": model, "layer": layer}
    return point | {"tp": tp, "m": m, "n": n, "k": k} | times(ms)


def rows(impls=CUBLAS_OVER, sizes=(1, 777)):
    return [row(impl, shape, m, 0.5 / CUBLAS_OVER[impl]) for impl, shape, m in product(impls, SHAPES, sizes)]


def draw(tmp_path, content):
    return matmul_heat(small(tmp_path, matmul=content), tmp_path / "figures")


def cells(axes):
    """What stands in the cells of a panel: {(row, column): text}."""
    return {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}


def test_a_cell_is_cublas_time_over_ours_in_per_cent(tmp_path):
    ours, single = draw(tmp_path, rows()).axes
    assert cells(ours) == dict.fromkeys(product(range(3), range(2)), "125")
    assert cells(single) == dict.fromkeys(product(range(3), range(2)), "20")
    assert "this collection (invariant): mean 125 %" in ours.get_title("left")
    assert [tick.get_text() for tick in ours.get_xticklabels()] == ["1", "777"]
    names = ["8B o · TP 1 · 4096 × 4096", "8B o · TP 2 · 4096 × 2048", "70B qkv · TP 8 · 1280 × 8192"]
    assert [tick.get_text() for tick in ours.get_yticklabels()] == names


def test_both_panels_share_one_scale_that_is_neutral_at_equal_speed(tmp_path):
    for axes, speed in zip(draw(tmp_path, rows()).axes, (1.25, 0.2), strict=True):
        (picture,) = axes.get_images()
        assert np.allclose(picture.get_array(), speed_color(speed))
    red, _, blue, _ = speed_color(1.0)
    assert red == pytest.approx(blue, abs=0.01)
    for factor in (1.1, 1.5, 3.0):
        slow, fast = speed_color(1 / factor), speed_color(factor)
        assert slow[0] > slow[2] and fast[0] < fast[2]  # orange and blue: told apart without telling red from green
    assert speed_color(0.01) == speed_color(0.25) and speed_color(100.0) == speed_color(4.0)


def test_other_types_models_and_points_without_cublas_are_left_out(tmp_path):
    shape = ("llama-3-8b", "o", 1)
    steps = [row | {"model": "llama-3-8b-steps"} for row in rows()]
    half = [row(impl, shape, 1, 9.0, dtype="float16") for impl in CUBLAS_OVER]
    alone = [row("batch_invariant", shape, 64, 9.0)]
    ours, _ = draw(tmp_path, [*steps, *rows(sizes=(1,)), *half, *alone]).axes
    assert cells(ours) == {(y, 0): "125" for y in range(3)}
    assert [tick.get_text() for tick in ours.get_xticklabels()] == ["1"]


def test_what_was_not_measured_stays_empty(tmp_path):
    content = [r for r in rows() if (r["impl"], r["m"], r["tp"]) != ("batch_invariant", 777, 8)]
    ours, single = draw(tmp_path, content).axes
    assert (2, 1) not in cells(ours) and len(cells(ours)) == 5 and len(cells(single)) == 6


def test_one_kernel_gets_one_panel(tmp_path):
    figure = draw(tmp_path, rows(("cublas", "batch_invariant")))
    assert len(figure.axes) == 1
    assert f"{Gpu.name} · torch {Gpu.torch} · triton {Gpu.triton} · " in "\n".join(labels(figure))


@pytest.mark.parametrize("impls", [("cublas",), ("batch_invariant",)])
def test_nothing_to_compare_is_said(tmp_path, impls):
    with pytest.raises(MissingRecord, match="lacks cublas in bf16, or anything to compare with it"):
        draw(tmp_path, rows(impls))
