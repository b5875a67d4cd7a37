"""The charts of 8-bit layers and models, from made-up records."""

import pytest
from test_charts import ROWS, W8A8_LAYERS, Gpu

from lab import charts
from lab.charts import draw
from lab.records import Store, reference

NAMES = ["w8a8_latency_seed_vs_here", "w8a8_speedup", "w8a8_promotion", "w8a8_accuracy"]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("w8a8") / "data", Gpu.slug)
    for name in ("w8a8", "w8a8_error", "w8a8_model", "w8a8_accuracy"):
        store.append(name, ROWS[name](), Gpu(), "0a1b2c")
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
    assert [axes.get_title("left").split(",")[0] for axes in panels] == list(W8A8_LAYERS)
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
