"""The charts: the same bytes from the same records, drawn from what is there, silent about nothing."""

import math
import tomllib
from dataclasses import dataclass
from itertools import product

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from lab import charts, records
from lab.charts import CHARTS, draw, redraw_all
from lab.charts.attention import DECODE_PREFILL, FREE
from lab.records import MissingRecord, RecordError, Store

NORMS = ("cuda_row_blocked", "python", "batch_invariant", "torch", "torch_compile", "liger")
MATMULS = ("cublas", "cublas_no_split_k", "batch_invariant", "single_tile")
SHAPES = {"qkv": (6144, 4096), "gate_up": (28672, 4096)}


@dataclass(frozen=True)
class Gpu:
    """What a record takes from lab.device.Device."""

    name: str = "NVIDIA H200"
    slug: str = "nvidia-h200"
    driver: str = "580.82.07"
    torch: str = "2.11.0"
    triton: str = "3.6.0"


def times(ms):
    return {"median_ms": ms, "p20_ms": 0.98 * ms, "p80_ms": 1.03 * ms}


def norm_rows(impls=NORMS, sizes=(1, 64, 1024)):
    rows = []
    for impl, hidden, residual, m in product(impls, (4096, 8192), (0, 1), sizes):
        point = {"op": "rms_norm", "impl": impl, "dtype": "bfloat16", "hidden": hidden}
        point |= {"residual": residual, "m": m}
        ms = math.hypot(0.002 + 0.001 * NORMS.index(impl), m * hidden / 1e9)
        rows.append(point | {"timing": "graph"} | times(ms))
        if hidden == 8192 and residual and impl in NORMS[:3] and m != 64:
            rows.append(point | {"timing": "eager"} | times(ms + 0.01))
    return rows


def matmul_rows(impls=MATMULS, sizes=(1, 32, 1024)):
    rows = []
    for impl, (layer, (n, k)), m in product(impls, SHAPES.items(), sizes):
        ms = (1 + 0.1 * MATMULS.index(impl)) * max(2 * n * k / 4e9, 2 * m * n * k / 7e11)
        point = {"op": "mm", "impl": impl, "dtype": "bfloat16", "model": "llama-3-8b", "layer": layer}
        rows.append(point | {"tp": 1, "m": m, "n": n, "k": k} | times(ms))
    return rows


def copy_rows():
    point = {"op": "copy", "impl": "triton", "dtype": "bfloat16"}
    return [point | {"bytes": size} | times(math.hypot(2e-3, size / 4.3e9)) for size in (2**16, 2**22, 2**28)]


def invariance_rows():
    return [
        {"op": "mm", "impl": impl, "dtype": "bfloat16", "case": "prefixes", "rows": rows}
        | {"rows_differing": rows // 2 if impl == "cublas" else 0}
        for impl, rows in product(("cublas", "batch_invariant"), (1, 17, 256))
    ]


def freedom_rows():
    point = {"op": "mm", "dtype": "bfloat16", "precision": "exact"}
    return [
        point | {"knob": knob, "settings": 4, "results": most} for knob, most in (("tile", 1), ("chunks of K", 4))
    ]


def random_shape_rows():
    return [
        {
            "op": "mm",
            "impl": impl,
            "dtype": "float32",
            "m": 64,
            "n": n,
            "k": 4096,
            "rows": 100,
            "rows_differing": more,
        }
        for n in (128, 1000)
        for impl, more in (("cublas", n // 10), ("batch_invariant", 0))
    ]


def forward_rows(impls=("torch", "batch_invariant"), tokens=(16, 64, 512)):
    point = {"op": "forward", "dtype": "bfloat16", "model": "llama-3.1-8b"}
    return [
        point | {"impl": impl, "tokens": count, "cuda_graph": graph} | times(max(4.0, count / 50) * (1.5 - graph / 2))
        for impl, count, graph in product(impls, tokens, (0, 1))
    ]


def generation_rows():
    point = {"op": "generate", "dtype": "bfloat16", "tokens": 64}
    rows = []
    for impl, (model, prompts) in product(("torch", "batch_invariant"), {"bytes": 8, "llama-3.1-8b": 2}.items()):
        same = impl == "batch_invariant"
        rows.append(
            point
            | {"impl": impl, "model": model, "case": "changing load", "requests": 256, "prompts": prompts}
            | {"completions": 1000 * prompts, "unique_completions": 1 if same else 37}
            | {"first_divergence": 64 if same else 9, "tokens_per_s": 9000.0}
        )
        if model != "bytes":
            rows += [
                point
                | {"impl": impl, "model": model, "case": "steady", "requests": requests, "prompts": requests}
                | {"completions": 3 * requests, "unique_completions": 1, "first_divergence": 64}
                | {"tokens_per_s": 200.0 * requests**0.8 * (0.97 if same else 1)}
                for requests in (1, 16, 64, 256)
            ]
    return rows


PROMPTS = ((16, 1024), (4, 4096), (1, 16384), (1, 32768))
CACHES = tuple(product((1, 4, 16, 64), (1024, 4096, 8192, 32768)))
ATTENTIONS = {"sdpa_flash": 1.5, "sdpa_cudnn": 1.05, "batch_invariant": 1.0}


def attention_point(phase, batch, kv_len, heads_kv, impl, ms, page_size=0):
    shape = {"batch": batch, "heads_q": 32, "heads_kv": heads_kv, "head_dim": 128}
    shape |= {"q_len": 1 if phase == "decode" else kv_len, "kv_len": kv_len, "causal": 1, "page_size": page_size}
    return {"op": "attention", "impl": impl, "dtype": "bfloat16", "phase": phase} | shape | times(ms)


def attention_rows(impls=tuple(ATTENTIONS)):
    rows = []
    for heads_kv, (batch, length) in product((8, 32), PROMPTS):
        ms = 2 * batch * 32 * 128 * length**2 / 6e11 * (1 + 200 / length)
        rows += [attention_point("prefill", batch, length, heads_kv, impl, ATTENTIONS[impl] * ms) for impl in impls]
        rows += [attention_point("prefill", batch, length, heads_kv, FREE["prefill"], 0.98 * ms)]
    for batch, length in CACHES:
        ms = 0.004 + batch * length * 8 * 512 / 4.3e9
        rows += [attention_point("decode", batch, length, 8, impl, ATTENTIONS[impl] * ms) for impl in impls]
        rows += [attention_point("decode", batch, length, 8, "batch_invariant", 1.02 * ms, 16)]
        rows += [attention_point("decode", batch, length, 8, FREE["decode"], 0.95 * ms)] * (batch < 16)
    return rows


def attention_invariance_rows():
    rows = []
    for impl, keys in product(ATTENTIONS, (128, 512, 1024, 4096)):
        where = {"op": "attention", "impl": impl, "dtype": "bfloat16"}
        case = f"{DECODE_PREFILL}, up to {keys} keys"
        share = {"sdpa_flash": 0.9, "sdpa_cudnn": 0.7, "batch_invariant": 0.0}[impl]
        rows.append(where | {"case": case, "rows": 256, "rows_differing": int(256 * share)})
        rows.append(where | {"case": f"{case}, elements", "rows": 32768, "rows_differing": int(9000 * share)})
    return rows


W8A8_LAYERS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
W8A8_SPEEDS = {
    ("bf16", "torch", "bfloat16"): 1.0,
    ("int8", "torch", "int8"): 1.02,
    ("int8", "batch_invariant", "int8"): 1.8,
    ("fp8", "torch", "float8_e4m3fn"): 1.7,
    ("fp8", "torch_fast_accum", "float8_e4m3fn"): 1.95,
    ("fp8", "batch_invariant", "float8_e4m3fn"): 1.75,
}


def w8a8_layer_rows():
    rows = []
    for (layer, (n, k)), m in product(W8A8_LAYERS.items(), (1, 16, 64, 128, 512, 1024, 2048, 8192)):
        bf16 = max(2 * n * k / 4e9, 2 * m * n * k / 7.5e11)
        for (scheme, impl, dtype), speed in W8A8_SPEEDS.items():
            if (scheme, impl) != ("int8", "torch") or m > 16:
                point = {"op": "mm", "impl": impl, "dtype": dtype, "model": "llama-3-8b", "layer": layer}
                rows.append(point | {"scheme": scheme, "m": m, "n": n, "k": k} | times(bf16 / speed))
    speeds = {"promote_128": 1.2, "promote_256": 1.28, "promote_512": 1.3, "promote_0": 1.37, "torch": 1.27}
    for layer, m, (impl, pflops) in product(("gate_up", "down"), (1024, 8192), speeds.items()):
        n, k = W8A8_LAYERS[layer]
        point = {"op": "mm", "impl": impl, "dtype": "float8_e4m3fn", "model": "llama-3-8b-steps", "layer": layer}
        rows.append(point | {"scheme": "fp8", "m": m, "n": n, "k": k} | times(2 * m * n * k / pflops / 1e12))
    return rows


def w8a8_error_rows():
    found = {("either sign", 0): 2.9e-3, ("either sign", 512): 3.4e-4, ("either sign", 128): 1.3e-4}
    found |= {("all positive", 0): 0.22, ("all positive", 512): 5.8e-3, ("all positive", 128): 5.5e-4}
    point = {"op": "mm", "impl": "batch_invariant", "dtype": "float8_e4m3fn", "k": 14336}
    return [{**point, "case": case, "promote_k": p, "error": error} for (case, p), error in found.items()]


def w8a8_model_rows():
    rows = []
    precisions = {("torch", "fp16"): 1.0, ("batch_invariant", "fp16"): 1.03}
    precisions |= {("batch_invariant", "w8a8_int8"): 0.57, ("batch_invariant", "w8a8_fp8"): 0.6}
    for batch, ((impl, precision), share) in product((128, 256, 512, 1024), precisions.items()):
        point = {"op": "forward", "impl": impl, "model": "llama-3.1-8b", "precision": precision, "batch": batch}
        rows.append(point | times(0.36 * batch * share))
    return rows


def w8a8_accuracy_rows():
    found = {("fp16", 0): 6e-4, ("fp16", 1): 6e-4, ("w8a8_int8", 0): 0.064, ("w8a8_int8", 1): 0.015}
    found |= {("w8a8_fp8", 0): 0.048, ("w8a8_fp8", 1): 0.048}
    point = {"op": "logits", "model": "llama-3.2-1b"}
    return [{**point, "precision": p, "migrated": migrated, "error": e} for (p, migrated), e in found.items()]


ROWS = {
    "attention": attention_rows,
    "w8a8": w8a8_layer_rows,
    "w8a8_error": w8a8_error_rows,
    "w8a8_model": w8a8_model_rows,
    "w8a8_accuracy": w8a8_accuracy_rows,
    "forward_latency": forward_rows,
    "generation": generation_rows,
    "rms_norm": norm_rows,
    "matmul": matmul_rows,
    "bandwidth": copy_rows,
    "invariance": lambda: invariance_rows() + attention_invariance_rows(),
    "freedom": freedom_rows,
    "random_shapes": random_shape_rows,
}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("full") / "data", Gpu.slug)
    for name, rows in ROWS.items():
        store.append(name, rows(), Gpu(), "0a1b2c")
    return store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(scope="module")
def drawn(full, folder):
    """Every chart of the full records by name; their files are in `folder`."""
    return {name: chart(full, folder) for name, chart in CHARTS.items()}


def labels(figure):
    """Every text of a figure, the legend's included."""
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def small(tmp_path, **rows):
    """A store of only these experiments."""
    store = Store(tmp_path / "data", Gpu.slug)
    for name, content in rows.items():
        store.append(name, content, Gpu(), "0a1b2c")
    return store


# ------------------------------------------------------------------------------------ the same pictures


def test_drawing_again_gives_the_same_bytes(full, drawn, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(charts.plt.rcParams, "font.size", 20)  # a reader's own settings change nothing
    monkeypatch.setitem(charts.plt.rcParams, "axes.facecolor", "black")
    assert redraw_all(full, tmp_path) == list(drawn)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted(f"{name}{suffix}" for name in CHARTS for suffix in (".svg", ".png"))
    for name in files:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), f"{name} differs"


def test_drawing_leaves_the_readers_settings_alone(full, tmp_path):
    before = dict(charts.plt.rcParams)
    CHARTS["matmul_ratio"](full, tmp_path)
    assert dict(charts.plt.rcParams) == before
    assert charts.plt.get_fignums() == []  # else a notebook shows the figure twice


def test_files_fit_a_readme(drawn, folder):
    assert len(drawn) == len(list(folder.glob("*.png")))
    for path in folder.glob("*.png"):
        height, width = matplotlib.image.imread(path).shape[:2]
        assert path.stat().st_size < 200_000 and 1000 <= width <= 1300 and height < 1100, path.name


def test_every_chart_says_where_its_data_come_from(drawn):
    for name, figure in drawn.items():
        text = "\n".join(labels(figure))
        assert "NVIDIA H200 · torch 2.11.0 · triton 3.6.0 · " in text and "commit 0a1b2c" in text
        assert ("by eye" in text) == ("_seed_vs_here" in name)
        assert ("arXiv 2601.17768" in text) == ("_seed_vs_here" in name and "source unknown" not in text)


def pinned(package):
    project = tomllib.loads((records.ROOT / "pyproject.toml").read_text())["project"]
    return next(pin.split("==")[1] for pin in project["dependencies"] if pin.startswith(f"{package}=="))


def test_committed_figures_are_what_the_records_give(tmp_path):
    """figures/ can be deleted and drawn again; only letters move from one matplotlib to the next."""
    if matplotlib.__version__ != pinned("matplotlib"):
        pytest.skip(f"figures are drawn with matplotlib {pinned('matplotlib')}, here is {matplotlib.__version__}")
    measured = charts.gpu_folders(records.ROOT / "data")
    if not measured:
        pytest.skip("no measured records are committed yet")
    for slug in measured:
        redraw_all(Store(records.ROOT / "data", slug, writable=False), tmp_path / slug)
        committed, new = records.ROOT / "figures" / slug, tmp_path / slug
        assert sorted(path.name for path in committed.iterdir()) == sorted(path.name for path in new.iterdir())
        for path in sorted(new.glob("*.svg")):
            assert path.read_bytes() == (committed / path.name).read_bytes(), f"{slug}/{path.name} is outdated"
        for path in sorted(new.glob("*.png")):  # pixels: how they are packed is zlib's business
            here, there = (matplotlib.image.imread(folder / path.name) for folder in (new, committed))
            assert np.array_equal(here, there), f"{slug}/{path.name} is outdated"


# ------------------------------------------------------------------------------------ the numbers


def test_operations_and_bytes():
    one = pd.DataFrame([{"m": 8, "n": 4, "k": 16, "dtype": "bfloat16", "median_ms": 1e-6}])
    assert charts.matmul_tflops(one).tolist() == [pytest.approx(2 * 8 * 4 * 16 / 1e-9 / 1e12)]
    assert charts.matmul_intensity(one).tolist() == [2 * 8 * 4 * 16 / (2 * (8 * 16 + 16 * 4 + 8 * 4))]
    norms = pd.DataFrame({"m": 8, "hidden": 32, "residual": [0, 1], "dtype": ["bfloat16", "float32"]})
    assert charts.rms_norm_bytes(norms).tolist() == [2 * (2 * 8 * 32 + 32), 4 * (4 * 8 * 32 + 32)]


def lines(axes):
    """The plotted lines of a panel by colour: x, y."""
    return {line.get_color(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_seed_panel_shows_the_reference_and_the_other_what_was_measured(full, drawn):
    published, here = drawn["rms_norm_seed_vs_here"].axes
    seed = records.reference("rms_norm")
    red = seed[seed["series"] == "Batch-invariant (Python)"]["value"].tolist()
    assert lines(published)[charts.RED] == (list(range(9)), red)
    frame = full.load("rms_norm").query("impl == 'python' and timing == 'eager'")
    assert lines(here)[charts.RED] == ([0, 6], frame["median_ms"].tolist())  # 1 and 1024 tokens
    assert set(lines(published)) == set(lines(here)) == {charts.GREEN, charts.RED, charts.BLUE}
    assert published.get_ylim() == here.get_ylim() and published.get_ylim()[0] == 0


def test_matmul_panels_share_a_logarithmic_axis(full, drawn):
    published, here = drawn["matmul_seed_vs_here"].axes
    assert published.get_yscale() == here.get_yscale() == "log" and published.get_ylim() == here.get_ylim()
    assert set(lines(published)) == {charts.BLUE, charts.RED}
    assert set(lines(here)) == {charts.BLUE, charts.RED, charts.ORANGE}
    assert lines(published)[charts.BLUE][1][-1] == 305
    frame = full.load("matmul").query("impl == 'cublas' and layer == 'gate_up'")
    assert lines(here)[charts.BLUE][1] == charts.matmul_tflops(frame).tolist()


def test_ratio_is_the_peers_time_over_ours(full, drawn):
    figure = drawn["matmul_ratio"]
    ours = lines(figure.axes[0])
    assert ours[charts.RED][1] == pytest.approx([1 / 1.2] * 3, rel=1e-4)
    figure = drawn["rms_norm_speedup"]
    frame = full.load("rms_norm").query("timing == 'graph' and hidden == 4096 and residual == 0")
    ms = frame.pivot_table(index="m", columns="impl", values="median_ms")
    expected = ms[["torch", "torch_compile", "liger"]].min(axis=1) / ms["batch_invariant"]
    assert lines(figure.axes[0])[charts.BLUE][1] == pytest.approx(expected.tolist())


def test_roof_is_the_best_measured_rate_and_the_copy_bandwidth(full, drawn):
    text = labels(drawn["matmul_roofline"])
    best = charts.matmul_tflops(full.load("matmul")).max()
    assert f"highest rate measured: {best:.0f} TFLOPS" in text and "copy kernel: 4.30 TB/s" in text


def test_latency_per_token_is_the_time_of_the_pass_over_its_tokens(full, drawn):
    published, eager, graph = drawn["forward_latency_seed_vs_here"].axes
    assert lines(published)[charts.SKY] == ([16, 32, 64, 128, 256, 512], [0.76, 0.38, 0.19, 0.095, 0.05, 0.04])
    assert lines(eager)[charts.BLUE][1] == pytest.approx([6 / 16, 6 / 64, 15.36 / 512])
    assert lines(graph)[charts.ORANGE][1] == pytest.approx([4 / 16, 4 / 64, 10.24 / 512])
    assert published.get_ylim() == graph.get_ylim() and published.get_ylim()[0] == 0
    floor = lines(graph)[charts.INK][1]
    assert floor[0] == pytest.approx(2 * 7.505e9 / 4.3e12 * 1e3 / 16, rel=1e-2)  # 7.5 billion weights, at 4.3 TB/s


def test_completions_and_their_speed_are_counted(drawn):
    text = labels(drawn["completions"])
    assert {"37 of 1000", "1 of 1000", "9 of 64", "all 64"} <= set(text)
    speed, ratio = drawn["tokens_per_s"].axes
    assert lines(ratio)[charts.BLUE] == ([1, 16, 64, 256], pytest.approx([0.97] * 4, rel=1e-4))
    assert lines(speed)[charts.ORANGE][1][0] == 200


def test_invariance_map_counts_rows(drawn):
    text = labels(drawn["invariance_map"])
    assert "0 / 274" in text and f"{17 // 2 + 256 // 2} / 274" in text
    assert text.count("0") == 4  # ours at three sizes, and cuBLAS at one row


def test_invariance_map_joins_the_cases_without_a_change(tmp_path):
    rows = [
        row | {"case": case, "rows_differing": row["rows_differing"] * (case == "wide")}
        for row, case in product(invariance_rows(), ("long", "square", "wide"))
    ]
    text = labels(CHARTS["invariance_map"](small(tmp_path, invariance=rows), tmp_path / "figures"))
    on_the_left = list(dict.fromkeys(label for label in text if label.startswith("mm")))
    assert on_the_left == ["mm · batch_invariant · all 3 cases", "mm · cublas · wide", "mm · cublas · 2 other cases"]
    assert {f"0 / {3 * 274}", f"{17 // 2 + 256 // 2} / 274", f"0 / {2 * 274}"} <= set(text)


def test_invariance_map_leaves_out_single_rows(tmp_path):
    singles = [
        row | {"case": case} for row, case in product(invariance_rows()[:1], ("planted at 1", "neighbours NaN"))
    ]
    store = small(tmp_path, invariance=invariance_rows() + singles)
    assert not any("planted" in text or "NaN" in text for text in labels(CHARTS["invariance_map"](store, tmp_path)))


# ------------------------------------------------------------------------------------ what is missing


def test_what_was_not_measured_is_left_out(tmp_path):
    store = small(
        tmp_path,
        rms_norm=norm_rows(("python", "batch_invariant", "torch"), sizes=(1, 1024)),
        matmul=matmul_rows(("cublas", "batch_invariant"), sizes=(1,)),
        invariance=invariance_rows()[:1],
    )
    for name in ("rms_norm_seed_vs_here", "rms_norm_speedup", "matmul_ratio", "invariance_map"):
        CHARTS[name](store, tmp_path / "figures")
    text = labels(CHARTS["rms_norm_gpu_time"](store, tmp_path / "figures"))
    assert "torch" in text and "Liger" not in text and "torch.compile" not in text


def test_one_size_and_one_point_can_be_drawn(tmp_path):
    store = small(
        tmp_path,
        rms_norm=[row for row in norm_rows(sizes=(1,)) if row["hidden"] == 8192 and row["residual"]],
        matmul=[row for row in matmul_rows(sizes=(7,)) if row["layer"] == "qkv"],
        bandwidth=copy_rows()[:1],
    )
    drawn = redraw_all(store, tmp_path / "figures")
    assert drawn == [name for name in CHARTS if name.startswith(("rms_norm", "matmul"))]


def test_an_implementation_nobody_knows_is_drawn_too(tmp_path):
    rows = norm_rows(("batch_invariant",))
    store = small(tmp_path, rms_norm=rows + [row | {"impl": "my_kernel"} for row in rows])
    assert "my_kernel" in labels(CHARTS["rms_norm_gpu_time"](store, tmp_path / "figures"))


def test_missing_records_skip_a_chart_with_a_sentence(tmp_path, capsys):
    store = small(tmp_path, matmul=matmul_rows(("cublas",)))
    drawn = redraw_all(store, tmp_path / "figures")
    assert drawn == ["matmul_seed_vs_here", "matmul_layers", "matmul_roofline"]
    said = capsys.readouterr().out
    assert "rms_norm_gpu_time: not drawn, " in said and "rms_norm.csv does not exist yet: lesson 02" in said
    assert "matmul_ratio: not drawn, " in said and "lacks cublas, or anything to compare with it" in said
    with pytest.raises(MissingRecord):
        CHARTS["rms_norm_gpu_time"](store, tmp_path / "figures")
    assert draw("rms_norm_gpu_time", store, tmp_path / "figures") is None


def test_a_fault_of_one_chart_costs_no_other(tmp_path, monkeypatch):
    def faulty(store, figures):
        raise ZeroDivisionError("of its own")

    store = small(tmp_path, matmul=matmul_rows(), invariance=invariance_rows())
    monkeypatch.setitem(CHARTS, "matmul_ratio", faulty)
    with pytest.raises(RecordError, match=r"matmul_ratio: ZeroDivisionError\('of its own'\)"):
        redraw_all(store, tmp_path / "figures")
    assert (tmp_path / "figures" / "invariance_map.svg").is_file()


def test_a_damaged_record_is_an_error_after_the_other_charts_are_drawn(tmp_path):
    store = small(tmp_path, matmul=matmul_rows(), invariance=invariance_rows())
    with open(store.path("matmul"), "ab") as out:
        out.write(b"mm,cub")
    with pytest.raises(RecordError, match=r"matmul\.csv, line \d+: cut off"):
        redraw_all(store, tmp_path / "figures")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "invariance_map.svg",
        "invariance_map.png",
    }


def test_an_unknown_chart_names_those_that_exist(full, tmp_path):
    with pytest.raises(RecordError, match="'matmul' is no chart; there are: rms_norm_seed_vs_here, "):
        draw("matmul", full, tmp_path)


# ------------------------------------------------------------------------------------ the command


def command(*arguments):
    return charts.main([str(argument) for argument in arguments])


def test_command_draws_every_gpu_folder_or_the_one_named(tmp_path, capsys):
    small(tmp_path, invariance=invariance_rows())
    other = Gpu(name="NVIDIA A100", slug="nvidia-a100")
    Store(tmp_path / "data", other.slug).append("invariance", invariance_rows(), other, "0a1b2c")
    (tmp_path / "data" / "reference").mkdir()
    where = ("--data", tmp_path / "data", "--figures", tmp_path / "figures")
    assert command(*where, "--gpu", "nvidia-a100") == 0
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["nvidia-a100"]
    assert command(*where) == 0
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["nvidia-a100", "nvidia-h200"]
    assert capsys.readouterr().out.count(": drawn: invariance_map\n") == 3


def test_command_refuses_a_gpu_without_records(tmp_path, capsys):
    small(tmp_path, invariance=invariance_rows())
    with pytest.raises(SystemExit) as stopped:
        command("--data", tmp_path / "data", "--figures", tmp_path / "figures", "--gpu", "nvidia-b200")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "--gpu nvidia-b200: no such records in " in said and "there are: nvidia-h200" in said
    assert not (tmp_path / "figures").exists()


def test_command_without_any_records_says_how_to_get_them(tmp_path, capsys):
    assert command("--data", tmp_path, "--figures", tmp_path / "figures") == 0
    assert "has no records yet; on a GPU: python -m lab.run --preset full" in capsys.readouterr().out


def test_command_fails_on_a_damaged_record(tmp_path, capsys):
    store = small(tmp_path, invariance=invariance_rows())
    store.path("invariance").write_bytes(store.path("invariance").read_bytes()[:-3])
    assert command("--data", tmp_path / "data", "--figures", tmp_path / "figures") == 1
    assert "invariance.csv, line 7: cut off" in capsys.readouterr().err
