"""The charts of attention, from made-up records, and the peers it is measured against."""

import pandas as pd
import pytest
import torch
from test_charts import Gpu, attention_invariance_rows, attention_point, attention_rows

from kernels.attention import attention_ref
from kernels.plan import plan_attention
from lab import charts, peers
from lab.charts import draw
from lab.charts.attention import FREE, HIGHEST, attention_tflops, cache_bytes
from lab.records import Store
from lab.timing import check_accuracy

NAMES = ["attention_prefill", "attention_decode", "attention_cost", "attention_bits"]


def filled(root):
    store = Store(root / "data", Gpu.slug)
    store.append("attention", attention_rows(), Gpu(), "0a1b2c")
    batches = {"op": "attention", "impl": "sdpa_flash", "dtype": "bfloat16", "case": "decode, 2048 keys", "rows": 17}
    rows = [*attention_invariance_rows(), batches | {"rows_differing": 3}]
    store.append("invariance", rows, Gpu(), "0a1b2c")
    return store


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("attention"))


def values(figure):
    """All points of all lines of a figure."""
    return [y for axes in figure.axes for line in axes.get_lines() for y in line.get_ydata()]


@pytest.mark.parametrize("name", NAMES)
def test_drawing_again_gives_the_same_bytes(name, full, tmp_path):
    for folder in ("one", "two"):
        assert draw(name, full, tmp_path / folder) is not None
    for suffix in (".svg", ".png"):
        assert (tmp_path / "one" / (name + suffix)).read_bytes() == (tmp_path / "two" / (name + suffix)).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_what_was_not_measured_is_said(name, tmp_path, capsys):
    assert draw(name, Store(tmp_path, Gpu.slug), tmp_path) is None
    assert f"{name}: not drawn" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES[:3])
def test_part_of_the_records_can_be_drawn(name, tmp_path):
    store = Store(tmp_path / "data", Gpu.slug)
    rows = [row for row in attention_rows(("batch_invariant",)) if row["batch"] == 1 and row["kv_len"] == 32768]
    store.append("attention", rows, Gpu(), "0a1b2c")
    assert draw(name, store, tmp_path) is not None


def test_operations_and_bytes():
    frame = pd.DataFrame(
        [attention_point("prefill", 2, 3, 8, "x", 1.0), attention_point("decode", 5, 7, 8, "x", 1.0)]
    )
    assert attention_tflops(frame).to_list() == [4 * 2 * 32 * 128 * 6 / 1e9, 4 * 5 * 32 * 128 * 7 / 1e9]
    assert cache_bytes(frame).to_list() == [2 * 2 * 3 * 8 * 128 * 2, 2 * 5 * 7 * 8 * 128 * 2]


def test_speeds_are_shown_without_the_kernels_that_only_price_the_chunks(full, tmp_path):
    for name in NAMES[:2]:
        labels = [text.get_text() for text in draw(name, full, tmp_path).legends[0].get_texts()]
        assert not [label for label in labels if label in FREE.values()]
    assert "This collection, paged cache (invariant)" in labels


def test_cost_is_the_time_with_free_chunks_over_ours(full, tmp_path):
    found = {round(y, 3) for y in values(draw("attention_cost", full, tmp_path))}
    assert found == {0.98, 0.95, 1.0}, "and the line at one"


def test_a_cost_too_high_to_draw_is_written_out(tmp_path):
    rows = [row | {"median_ms": row["median_ms"] * 9, "p80_ms": row["p80_ms"] * 9} if row["impl"] == FREE["decode"]
            else row for row in attention_rows()]  # fmt: skip
    store = Store(tmp_path / "data", Gpu.slug)
    store.append("attention", rows, Gpu(), "0a1b2c")
    figure = draw("attention_cost", store, tmp_path)
    written = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert written and all("↑" in text and "keys" in text for text in written)
    assert max(y for y in values(figure) if y == y) <= HIGHEST < figure.axes[0].get_ylim()[1]


def test_bits_are_shares_of_rows_and_of_elements(full, tmp_path):
    rows, elements = draw("attention_bits", full, tmp_path).axes
    assert {y for line in rows.get_lines() for y in line.get_ydata()} == {230 / 256, 179 / 256, 0}
    assert {y for line in elements.get_lines() for y in line.get_ydata()} == {8100 / 32768, 6300 / 32768, 0}
    assert "0 of 1,024 at all lengths" in [text.get_text() for text in rows.texts]


def test_map_of_batches_leaves_out_what_has_no_batch(full, tmp_path):
    figure = charts.invariance_map(full, tmp_path)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["17"]


# ------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize(("backend", "q_len"), [("math", 1), ("math", 40), ("flash", 40)])
@pytest.mark.parametrize("heads_kv", [2, 4])
def test_sdpa_called_like_ours_computes_the_same(backend, q_len, heads_kv):
    q = torch.randn(2, q_len, 4, 64).half()
    k, v = torch.randn(2, 2, 40, heads_kv, 64).half()
    check_accuracy("sdpa", peers.causal_sdpa(backend)(q, k, v), attention_ref(q, k, v))


def test_sdpa_refuses_what_torch_would_mask_otherwise():
    q, k = torch.randn(1, 3, 2, 64), torch.randn(1, 9, 2, 64)
    with pytest.raises(ValueError, match="math cannot mask 3 queries at the end of 9 keys"):
        peers.causal_sdpa("math")(q, k, k)
    with pytest.raises(ValueError, match="backend='cutlass'"):
        peers.causal_sdpa("cutlass")


def test_another_plan_computes_the_same_attention():
    q, k = torch.randn(1, 3, 2, 64).half(), torch.randn(2, 1, 600, 1, 64).half()
    plan = plan_attention(64, 2)
    for other in (plan, peers.plan_by_load(plan, 1, 1, 600, 132), peers.plan_by_load(plan, 999, 1, 600, 132)):
        check_accuracy("attention", peers.attention_by(other)(q, *k), attention_ref(q, *k))


def test_a_plan_by_load_follows_the_load():
    plan = plan_attention(128, 2)
    chunks = {batch: peers.plan_by_load(plan, batch, 8, 8192, 132).chunks(8192) for batch in (1, 2, 4, 16, 64)}
    assert chunks == {1: 8, 2: 8, 4: 4, 16: 1, 64: 1}
