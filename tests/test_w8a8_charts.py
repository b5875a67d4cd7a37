"""The charts of 8-bit layers and models, from made-up records."""

from itertools import product

import pytest
from test_charts import Gpu, times

from lab import charts
from lab.charts import draw
from lab.records import Store, reference

NAMES = ["w8a8_latency_seed_vs_here", "w8a8_speedup", "w8a8_promotion", "w8a8_accuracy"]
LAYERS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
SPEEDS = {
    ("bf16", "torch", "bfloat16"): 1.0,
    ("int8", "torch", "int8"): 1.02,
    ("int8", "batch_invariant", "int8"): 1.8,
    ("fp8", "torch", "float8_e4m3fn"): 1.7,
    ("fp8", "torch_fast_accum", "float8_e4m3fn"): 1.95,
    ("fp8", "batch_invariant", "float8_e4m3fn"): 1.75,
}


def layer_rows():
    rows = []
    for (layer, (n, k)), m in product(LAYERS.items(), (1, 16, 64, 128, 512, 1024, 2048, 8192)):
        bf16 = max(2 * n * k / 4e9, 2 * m * n * k / 7.5e11)
        for (scheme, impl, dtype), speed in SPEEDS.items():
            if (scheme, impl) != ("int8", "torch") or m > 16:
                point = {"op": "mm", "impl": impl, "dtype": dtype, "model": "llama-3-8b", "layer": layer}
                rows.append(point | {"scheme": scheme, "m": m, "n": n, "k": k} | times(bf16 / speed))
    speeds = {"promote_128": 1.2, "promote_256": 1.28, "promote_512": 1.3, "promote_0": 1.37, "torch": 1.27}
    for layer, m, (impl, pflops) in product(("gate_up", "down"), (1024, 8192), speeds.items()):
        n, k = LAYERS[layer]
        point = {"op": "mm", "impl": impl, "dtype": "float8_e4m3fn", "model": "llama-3-8b-steps", "layer": layer}
        rows.append(point | {"scheme": "fp8", "m": m, "n": n, "k": k} | times(2 * m * n * k / pflops / 1e12))
    return rows


def error_rows():
    found = {("either sign", 0): 2.9e-3, ("either sign", 512): 3.4e-4, ("either sign", 128): 1.3e-4}
    found |= {("all positive", 0): 0.22, ("all positive", 512): 5.8e-3, ("all positive", 128): 5.5e-4}
    point = {"op": "mm", "impl": "batch_invariant", "dtype": "float8_e4m3fn", "k": 14336}
    return [{**point, "case": case, "promote_k": p, "error": error} for (case, p), error in found.items()]


def model_rows():
    rows = []
    precisions = {("torch", "fp16"): 1.0, ("batch_invariant", "fp16"): 1.03}
    precisions |= {("batch_invariant", "w8a8_int8"): 0.57, ("batch_invariant", "w8a8_fp8"): 0.6}
    for batch, ((impl, precision), share) in product((128, 256, 512, 1024), precisions.items()):
        point = {"op": "forward", "impl": impl, "model": "llama-3.1-8b", "precision": precision, "batch": batch}
        rows.append(point | times(0.36 * batch * share))
    return rows


def accuracy_rows():
    found = {("fp16", 0): 6e-4, ("fp16", 1): 6e-4, ("w8a8_int8", 0): 0.064, ("w8a8_int8", 1): 0.015}
    found |= {("w8a8_fp8", 0): 0.048, ("w8a8_fp8", 1): 0.048}
    point = {"op": "logits", "model": "llama-3.2-1b"}
    return [{**point, "precision": p, "migrated": migrated, "error": e} for (p, migrated), e in found.items()]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("w8a8") / "data", Gpu.slug)
    made = {"w8a8": layer_rows(), "w8a8_error": error_rows(), "w8a8_model": model_rows()}
    for name, rows in (made | {"w8a8_accuracy": accuracy_rows()}).items():
        store.append(name, rows, Gpu(), "0a1b2c")
    return store


def heights(axes):
    """The bars of a panel, group by group: one list for each series."""
    return [[round(bar.get_height(), 3) for bar in group] for group in axes.containers]


@pytest.mark.parametrize("name", NAMES)
def test_drawing_again_gives_the_same_bytes(name, full, tmp_path):
    for folder in ("one", "two"):
        draw(name, full, tmp_path / folder)
    for suffix in (".svg", ".png"):
        one, two = ((tmp_path / folder / f"{name}{suffix}").read_bytes() for folder in ("one", "two"))
        assert one == two


@pytest.mark.parametrize("name", NAMES)
def test_without_records_it_says_what_would_measure_them(name, tmp_path, capsys):
    assert draw(name, Store(tmp_path / "data", Gpu.slug), tmp_path) is None
    assert "lesson 08 measures it" in capsys.readouterr().out


def test_the_published_bars_and_the_measured_ones(full, tmp_path):
    left, right = draw("w8a8_latency_seed_vs_here", full, tmp_path).axes
    seed = reference("w8a8_model")
    assert heights(left) == [seed[seed["series"] == name]["value"].to_list() for name in ("FP16", "w8a8")]
    fp16, int8, fp8 = heights(right)
    assert fp16 == [round(0.36 * batch, 3) for batch in (128, 256, 512, 1024)]  # the faster of the two
    assert int8 == [round(0.57 * ms, 3) for ms in fp16] and fp8 == [round(0.6 * ms, 3) for ms in fp16]
    assert "source unknown" in left.get_title("left")


def test_speed_is_relative_to_bf16_and_only_of_finished_kernels(full, tmp_path):
    panels = draw("w8a8_speedup", full, tmp_path).axes
    assert [axes.get_title("left").split(",")[0] for axes in panels] == list(LAYERS)
    lines = {len(line.get_xdata()): line.get_ydata() for line in panels[0].get_lines()}
    assert lines[6] == pytest.approx([1.02] * 6, rel=1e-4)  # torch._int_mm from 64 rows on
    assert max(line.get_ydata()[0] for line in panels[0].get_lines()) == pytest.approx(1.95, rel=1e-4)


def test_promotion_shows_errors_and_speeds(full, tmp_path):
    left, right = draw("w8a8_promotion", full, tmp_path).axes
    shown = [list(line.get_ydata()) for line in left.get_lines()]
    assert [1.3e-4, 3.4e-4, 2.9e-3] in shown and [5.5e-4, 5.8e-3, 0.22] in shown
    for line in right.get_lines():
        assert list(line.get_ydata()) == pytest.approx([1200, 1280, 1300, 1370, 1270], rel=1e-4)


def test_every_chart_is_listed():
    assert set(NAMES) <= set(charts.CHARTS)
