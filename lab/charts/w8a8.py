"""Charts of 8-bit layers and models: latency against a published chart, speed, and what fp8 promotion buys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lab.charts import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    RED,
    Look,
    _finish,
    _gpu,
    _line,
    _plain,
    _rows,
    _sheet,
    _style,
    _tidy,
    _token_axis,
)
from lab.records import EXPERIMENTS, MissingRecord, Store, describe, reference, shown

LIGHT_GREY, DARK_RED = "#C9C9C9", "#8B1A1A"
BARS = {
    "fp16": Look("FP16", LIGHT_GREY, ""),
    "w8a8_int8": Look("w8a8 (int8)", DARK_RED, ""),
    "w8a8_fp8": Look("w8a8 (fp8)", "#C8674F", ""),
}
SCHEMES = {
    "int8": (Look("int8, this collection", RED, "D"), Look("int8, torch._int_mm (not scaled)", ORANGE, "^", "--")),
    "fp8": (Look("fp8, this collection", BLUE, "D"), Look("fp8, torch._scaled_mm", GREEN, "o", "--")),
}
FAST = Look("fp8, torch._scaled_mm, fast accumulation", INK, "v", ":")
MODEL_LAYERS = ("qkv", "o", "gate_up", "down")


def _bars(axes: Axes, groups: Sequence, series: dict[Look, Sequence[float]], show: str) -> None:
    """Bars side by side in each group, the value on each."""
    width = 0.84 / len(series)
    for at, (look, values) in enumerate(series.items()):
        places = [group + (at - (len(series) - 1) / 2) * width for group in range(len(groups))]
        drawn = axes.bar(places, values, width=0.94 * width, color=look.color, zorder=3)
        axes.bar_label(drawn, [show.format(value) for value in values], padding=1.5, fontsize=8)
    axes.set_xticks(range(len(groups)), [str(group) for group in groups])
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)


def w8a8_latency_seed_vs_here(store: Store, figures: Path) -> Figure:
    """Latency of one pass over the batch size, FP16 and w8a8: the published bars, and those measured here."""
    here = _rows(store, "w8a8_model", op="forward", model="llama-3.1-8b")
    table = here.pivot_table(index="batch", columns="precision", values="median_ms", aggfunc="min")
    seed = reference("w8a8_model")
    with _style():
        sheet = _sheet(1, 2, height=4.7, sharey=True, gridspec_kw={"width_ratios": (1, 1.5)})
        left, right = sheet.panels.flat
        published = {
            look: seed[seed["series"] == name]["value"].to_list()
            for name, look in (("FP16", BARS["fp16"]), ("w8a8", BARS["w8a8_int8"]))
        }
        _bars(left, sorted(seed["tokens"].unique()), published, "{:.0f}")
        left.set_title("As published: source unknown")
        _bars(right, table.index.to_list(), {BARS[p]: table[p].to_list() for p in BARS if p in table}, "{:.3g}")
        right.set_title(f"Here: {_gpu(here)}, Llama-3.1-8B shape, 16 tokens a sequence")
        for look in (look for precision, look in BARS.items() if precision in table):
            sheet.note(look.label, Patch(facecolor=look.color))
        for axes in (left, right):
            axes.set_xlabel("Batch Size")
        left.set_ylabel("Latency (ms)")
        _tidy(sheet)
        ratios = [
            f"{BARS[p].label} {low:.2f} to {high:.2f}"
            for p in BARS
            if p != "fp16" and p in table and "fp16" in table
            for low, high in [((table["fp16"] / table[p]).min(), (table["fp16"] / table[p]).max())]
        ]
        return _finish(
            sheet,
            store,
            figures,
            "w8a8_latency_seed_vs_here",
            title="Latency vs. Batch Size",
            subtitle=f"One forward pass. Here, times as fast as the faster FP16: {', '.join(ratios) or 'unknown'}",
            footer=["Left: source unknown, read off the picture by eye", f"Right: {describe(here)}"],
        )


def w8a8_speedup(store: Store, figures: Path) -> Figure:
    """Speed of 8-bit products relative to bf16 cuBLAS over the tokens, for each layer: ours and torch's."""
    frame = _rows(store, "w8a8", op="mm", model="llama-3-8b")
    ms = frame.pivot_table(index=["layer", "m"], columns=["scheme", "impl"], values="median_ms").sort_index(axis=1)
    if ("bf16", "torch") not in ms:
        raise MissingRecord(f"{shown(store.path('w8a8'))} has no bf16 times: {EXPERIMENTS['w8a8'].how}")
    ratio = ms.rdiv(ms["bf16", "torch"], axis=0)
    lines = {(scheme, impl): look for scheme, pair in SCHEMES.items()
             for impl, look in zip(("batch_invariant", "torch"), pair, strict=True)}  # fmt: skip
    lines["fp8", "torch_fast_accum"] = FAST
    layers = [layer for layer in MODEL_LAYERS if layer in ratio.index.get_level_values("layer")]
    with _style():
        rows = -(-len(layers) // 2)
        sheet = _sheet(rows, min(len(layers), 2), height=1.9 + 2.1 * rows, sharex=True, sharey=True)
        for axes, layer in zip(sheet.panels.flat, layers, strict=False):
            for key, look in lines.items():
                if key in ratio:
                    values = ratio.loc[layer][key].dropna()
                    _line(sheet, axes, values.index.to_list(), values.to_list(), look)
            n, k = frame[frame["layer"] == layer][["n", "k"]].iloc[0]
            axes.axhline(1, color=MUTED, linewidth=1, zorder=2)
            axes.set_title(f"{layer}, {n} × {k}")
            _token_axis(axes, frame["m"])
        sheet.panels[0, 0].set_ylim(0, 1.08 * max(1.0, ratio[[key for key in lines if key in ratio]].max().max()))
        for axes in sheet.panels[:, 0]:
            axes.set_ylabel("times as fast as bf16")
        for axes in sheet.panels[:-1].flat:
            axes.set_xlabel("")
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "w8a8_speedup",
            title="8-bit products relative to bf16 cuBLAS",
            subtitle="Layers of Llama-3-8B, quantisers not included. torch._int_mm: more than 16 rows, int32 left",
            footer=[describe(frame)],
        )


PROMOTED = (128, 256, 512, 0)
MARKS = {"either sign": Look("random signs", BLUE, "o"), "all positive": Look("all positive", RED, "s")}


def _interval(promote_k: int) -> str:
    return str(promote_k) if promote_k else "never"


def w8a8_promotion(store: Store, figures: Path) -> Figure:
    """What the promotion interval of fp8 sums does to the error, and what it costs, next to torch's two modes."""
    wrong = _rows(store, "w8a8_error", op="mm", impl="batch_invariant")
    times = _rows(store, "w8a8", op="mm", model="llama-3-8b-steps", scheme="fp8")
    k = wrong["k"].max()
    with _style():
        sheet = _sheet(1, 2, height=4.6)
        left, right = sheet.panels.flat
        for case, look in MARKS.items():
            values = wrong[(wrong["case"] == case) & (wrong["k"] == k)].set_index("promote_k")["error"]
            known = [p for p in PROMOTED if p in values.index]
            _line(sheet, left, [PROMOTED.index(p) for p in known], values[known].to_list(), look)
        left.axhline(2**-8, color=MUTED, linewidth=1, linestyle=":", zorder=2)
        left.annotate("half a unit of bf16", (0, 2**-8), xytext=(0, 4), textcoords="offset points", fontsize=8.5,
                      color=MUTED)  # fmt: skip
        left.set_yscale("log")
        left.set_xticks(range(len(PROMOTED)), [_interval(p) for p in PROMOTED])
        left.set_xlabel("products between promotions")
        left.set_title(f"Relative error of the fp32 result, K = {k}")
        ms = times.pivot_table(index=["layer", "m"], columns="impl", values="median_ms")
        points = ms.index[ms.index.get_level_values("m") >= 1024]
        series = {f"promote_{p}": _interval(p) for p in PROMOTED}
        series |= {"torch": "torch", "torch_fast_accum": "torch, fast"}
        shown_as = [impl for impl in series if impl in ms]
        for at, (layer, m) in enumerate(points):
            look = Look(f"{layer}, {m} tokens", (BLUE, ORANGE, GREEN, RED)[at % 4], "os^D"[at % 4])
            tflops = [2.0 * m * _nk(times, layer) / ms.loc[(layer, m), impl] / 1e9 for impl in shown_as]
            beside = 0.15 * (at - (len(points) - 1) / 2)  # next to each other: most are close
            _line(sheet, right, [place + beside for place in range(len(shown_as))], tflops, look, linestyle="")
        right.set_xticks(range(len(shown_as)), [series[impl] for impl in shown_as], fontsize=8.5)
        right.grid(axis="x", visible=False)
        right.yaxis.set_major_formatter(_plain)
        right.set_title("TFLOPS: ours by interval, and torch._scaled_mm")
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "w8a8_promotion",
            title="fp8: how often to promote the tensor core's sum to fp32",
            subtitle="The shorter the interval, the smaller the error. torch never promotes with fast accumulation",
            footer=[describe(wrong, times)],
        )


def _nk(frame: pd.DataFrame, layer: str) -> float:
    row = frame[frame["layer"] == layer].iloc[0]
    return float(row["n"]) * float(row["k"])


def w8a8_accuracy(store: Store, figures: Path) -> Figure:
    """Relative error of a model's logits by precision, outliers as they are and migrated."""
    frame = _rows(store, "w8a8_accuracy", op="logits")
    frame = frame[frame["model"] == frame["model"].iloc[-1]]
    table = frame.pivot_table(index="precision", columns="migrated", values="error") * 100
    table = table.reindex([p for p in BARS if p in table.index])
    looks = {0: Look("outliers as they are", ORANGE, ""), 1: Look("outliers migrated into the weights", BLUE, "")}
    with _style():
        sheet = _sheet(height=3.8)
        axes = sheet.panels[0, 0]
        _bars(axes, [BARS[p].label for p in table.index], {looks[c]: table[c].to_list() for c in table}, "{:.2g} %")
        for migrated in table:
            sheet.note(looks[migrated].label, Patch(facecolor=looks[migrated].color))
        axes.set_ylabel("relative error (%)")
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "w8a8_accuracy",
            title="Logits against an fp32 run of the same weights",
            subtitle=f"Shape of {frame['model'].iloc[0]}, random weights with planted outliers",
            footer=[describe(frame)],
        )
