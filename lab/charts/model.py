"""Charts of a whole model: what a token costs, how many completions one prompt gets, what invariance costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from lab.charts import (
    BLUE,
    GREEN,
    INK,
    ITEM_BYTES,
    MUTED,
    ORANGE,
    SEED_FOOTER,
    SKY,
    Look,
    Sheet,
    _copy_rate,
    _dtype_name,
    _finish,
    _gpu,
    _line,
    _looks,
    _pick,
    _plain,
    _sheet,
    _style,
    _tidy,
    _token_axis,
)
from lab.llama import CONFIGS
from lab.records import Store, describe, reference

OURS = Look("This collection (invariant)", BLUE, "o")
STOCK = Look("Stock operators (torch)", ORANGE, "^", "--")
LOOKS = {"torch": STOCK, "batch_invariant": OURS}
PUBLISHED = Look("Published system (stock kernels)", SKY, "s")
FLOOR = Look("Floor: weights / memory bandwidth", INK, "", ":")

CHANGING_LOAD, STEADY = "changing load", "steady"
"""The cases of a generation record: requests that come and go, and a fixed number that start together."""


def _model_looks(impls: pd.Series) -> dict[str, Look]:
    strangers = [impl for impl in impls.unique() if impl not in LOOKS]
    return {impl: look for impl, look in LOOKS.items() if impl in set(impls)} | _looks("", strangers)


# -------------------------------------------------------------------------------------- what a token costs


def forward_latency_seed_vs_here(store: Store, figures: Path) -> Figure:
    """Latency per token over the tokens of one pass: as published; here eager; here in a CUDA graph."""
    model = "llama-3.1-8b"
    here = _pick(store, "forward_latency", op="forward", model=model)
    copy = _copy_rate(store)
    seed = reference("forward_latency").assign(impl="seed")
    looks = _model_looks(here["impl"])
    with _style():
        sheet = _sheet(1, 3, height=4.7, sharey=True)
        published, *measured = sheet.panels.flat
        _filled(sheet, published, seed["tokens"], seed["value"], PUBLISHED)
        published.set_title("As published: NVIDIA H100, eager")
        headings = {0: f"Here: {_gpu(here)}, eager", 1: f"Here: {_gpu(here)}, CUDA graph"}
        for axes, (graph, heading) in zip(measured, headings.items(), strict=True):
            axes.set_title(heading)
            for impl, look in looks.items():
                rows = here[(here["impl"] == impl) & (here["cuda_graph"] == graph)].sort_values("tokens")
                if rows.empty:
                    continue
                draw = _filled if impl == "batch_invariant" else _line
                draw(sheet, axes, rows["tokens"].to_list(), (rows["median_ms"] / rows["tokens"]).to_list(), look)
            if copy is not None:
                tokens = np.array(sorted(here["tokens"].unique()))
                floor = CONFIGS[model].weights_read * ITEM_BYTES[here["dtype"].iloc[0]] / copy["rate"].iloc[-1] / 1e9
                _line(sheet, axes, tokens, floor / tokens, FLOOR, linewidth=1.4)
        for axes in sheet.panels.flat:
            _token_axis(axes, seed["tokens"], label="Number of Tokens", step=1)
            axes.set_ylim(bottom=0)
        published.set_ylabel("Latency per Token (ms)")
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "forward_latency_seed_vs_here",
            title="Latency per Token vs. Number of Tokens",
            subtitle=f"One forward pass of Llama-3.1-8B, one sequence, {_dtype_name(here)}: its time over its tokens",
            legend_columns=2,
            footer=[SEED_FOOTER, f"Middle and right: {describe(here) if copy is None else describe(here, copy)}"],
        )


def _filled(sheet: Sheet, axes: Axes, x: list[int], y: list[float], look: Look) -> None:
    """A line with the area below it in a light green, as the published chart has it."""
    axes.fill_between(x, y, color=GREEN, alpha=0.15, linewidth=0)
    _line(sheet, axes, x, y, look)


# --------------------------------------------------------------------------------------------- completions


def completions(store: Store, figures: Path) -> Figure:
    """How many different completions one prompt got under changing load, and what all of them have in common."""
    frame = _pick(store, "generation", case=CHANGING_LOAD)
    looks, models = _model_looks(frame["impl"]), list(dict.fromkeys(frame["model"]))
    with _style():
        sheet = _sheet(1, 2, height=2.3 + 0.75 * len(models), sharey=True)
        left, right = sheet.panels.flat
        for at, (impl, look) in enumerate(looks.items()):
            for y, model in enumerate(models):
                rows = frame[(frame["impl"] == impl) & (frame["model"] == model)]
                for _, row in rows[-1:].iterrows():
                    place = y + (at - (len(looks) - 1) / 2) * 0.36
                    each = row["completions"] // row["prompts"]
                    _bar(left, place, row["unique_completions"], f"{row['unique_completions']} of {each}", look)
                    common, tokens = row["first_divergence"], row["tokens"]
                    said = f"all {tokens}" if common == tokens else f"{common} of {tokens}"
                    _bar(right, place, common / tokens, said, look)
                    sheet.note(look.label, Patch(facecolor=look.color))
        left.set_yticks(range(len(models)), models)
        left.invert_yaxis()
        left.set_xscale("log")
        left.xaxis.set_major_formatter(_plain)
        left.set_xlim(0.8, 6 * max(frame["unique_completions"].max(), 10))
        left.set_title("Different completions (the most of any prompt)")
        right.set_xlim(0, 1.22)
        right.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        right.set_title("Tokens that all have in common (the least of any prompt)")
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "completions",
            title="The same prompt again and again, temperature 0, under changing load",
            subtitle="; ".join(_load(frame, model) for model in models),
            footer=[describe(frame)],
        )


def _bar(axes: Axes, y: float, value: float, said: str, look: Look) -> None:
    axes.barh(y, value, height=0.32, color=look.color)
    axes.annotate(said, (value, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip


def _load(frame: pd.DataFrame, model: str) -> str:
    row = frame[frame["model"] == model].iloc[-1]
    prompts = f"{row['prompts']} prompt{'s' * int(row['prompts'] != 1)}"
    return f"{model}: {prompts}, up to {row['requests']} requests at once"


def tokens_per_s(store: Store, figures: Path) -> Figure:
    """Tokens a second over concurrent requests, and ours relative to stock operators in the same engine."""
    frame = _pick(store, "generation", case=STEADY)
    models = list(dict.fromkeys(frame["model"]))
    looks = _model_looks(frame["impl"])
    with _style():
        sheet = _sheet(len(models), 2, height=1.7 + 2.2 * len(models), sharex=True)
        for (speed, ratio), model in zip(sheet.panels, models, strict=True):
            rows = frame[frame["model"] == model]
            rates = rows.pivot_table(index="requests", columns="impl", values="tokens_per_s")
            for impl, look in looks.items():
                if impl in rates:
                    _line(sheet, speed, rates.index.to_list(), rates[impl].to_list(), look)
            speed.set_yscale("log")
            speed.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            speed.yaxis.set_minor_locator(NullLocator())
            speed.yaxis.set_major_formatter(_plain)
            speed.set_title(f"{model}: tokens per second")
            ratio.set_title("this collection relative to stock operators")
            ratio.axhline(1, color=MUTED, linewidth=1, zorder=2)
            share = pd.Series(dtype=float)
            if set(LOOKS) <= set(rates.columns):
                share = (rates["batch_invariant"] / rates["torch"]).dropna()
                _line(sheet, ratio, share.index.to_list(), share.to_list(), OURS)
                for x, y in share.items():
                    off = 8 if y >= 1 else -14  # away from the line at 1
                    ratio.annotate(f"{y:.2f}", (x, y), xytext=(0, off), textcoords="offset points", ha="center",
                                   fontsize=8.5)  # fmt: skip
            ratio.set_ylim(0, max([1.25, *(1.2 * share)]))
        for axes in sheet.panels.flat:
            _token_axis(axes, frame["requests"], label="Requests at once")
        for axes in sheet.panels[:-1].flat:
            axes.set_xlabel("")
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "tokens_per_s",
            title=f"What invariance costs: one engine on two sets of operators, {_dtype_name(frame)}",
            subtitle="All requests start together; prefill, decode, sampling and the host's work included",
            footer=[describe(frame)],
        )
