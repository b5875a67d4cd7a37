"""Charts of attention: prefill, decode, what fixed chunks cost, and which rows change bits between the two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.charts import (
    BLUE,
    GREEN,
    INK,
    ITEM_BYTES,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Look,
    Sheet,
    _copy_rate,
    _dtype_name,
    _finish,
    _line,
    _looks,
    _one_line,
    _pick,
    _sheet,
    _style,
    _tidy,
    _token_axis,
)
from lab.records import EXPERIMENTS, MissingRecord, Store, describe, shown

LOOKS = {
    "sdpa_flash": Look("FlashAttention-2 (torch)", ORANGE, "^", "--"),
    "sdpa_cudnn": Look("cuDNN (torch)", GREEN, "o", "--"),
    "tiled": Look("Triton, first version of lesson 6 (invariant)", PURPLE, "v", ":"),
    "batch_invariant": Look("This collection (invariant)", BLUE, "D"),
    "batch_invariant_paged": Look("This collection, paged cache (invariant)", SKY, "s", "-"),
}
"""What the charts of speed show. There, a paged cache is an implementation of its own."""

FREE = {"prefill": "batch_invariant_one_chunk", "decode": "batch_invariant_free_splits"}
"""The same kernel with the chunks that invariance forbids: one endless chunk; as many as the load asks for."""

HEADS = {(32, 8): "32 query, 8 key-value heads", (32, 32): "32 query, 32 key-value heads"}

DECODE_PREFILL = "decode against prefill"
"""Records of it are one per range of positions, ``..., up to <n> keys``, and one more that counts ``elements``."""


# ------------------------------------------------------------------------------------ numbers from rows


def attention_tflops(frame: pd.DataFrame) -> pd.Series:
    """Operations of both products over the median time, in 10^12 a second; what the mask hides does not count."""
    q_len, kv_len = frame["q_len"].astype(float), frame["kv_len"].astype(float)
    pairs = q_len * kv_len - frame["causal"] * q_len * (q_len - 1) / 2
    return 4 * frame["batch"] * frame["heads_q"] * frame["head_dim"] * pairs / frame["median_ms"] / 1e9


def cache_bytes(frame: pd.DataFrame) -> pd.Series:
    """Bytes of all keys and values of a call, each read once."""
    elements = 2.0 * frame["batch"] * frame["kv_len"] * frame["heads_kv"] * frame["head_dim"]
    return elements * frame["dtype"].map(ITEM_BYTES)


def _missing(store: Store, name: str, what: str, lesson: str) -> MissingRecord:
    """An experiment of which two lessons measure their part names the right one here."""
    how = f"lesson {lesson} measures it, on a GPU: python -m lab.run {lesson} --preset full"
    return MissingRecord(f"{shown(store.path(name))} has no {what} yet: {how}")


def _speeds(store: Store, phase: str, lesson: str) -> pd.DataFrame:
    """Rows of one phase without the kernels of ``FREE``; a paged cache as an implementation of its own."""
    missing = _missing(store, "attention", f"rows of {phase}", lesson)
    try:
        frame = _pick(store, "attention", op="attention", phase=phase)
    except MissingRecord:
        raise missing from None
    frame = frame[~frame["impl"].isin(FREE.values())]
    if frame.empty:
        raise missing
    return frame.assign(impl=frame["impl"].where(frame["page_size"] == 0, frame["impl"] + "_paged"))


def _known(impls: pd.Series) -> dict[str, Look]:
    """The looks of this module for those that are there, spare ones for strangers."""
    found = set(impls)
    return {impl: look for impl, look in LOOKS.items() if impl in found} | _looks("", sorted(found - set(LOOKS)))


def _kinds(frame: pd.DataFrame) -> list[tuple[int, int]]:
    """Pairs of heads that were measured, the one with most points first."""
    return list(frame.groupby(["heads_q", "heads_kv"]).size().sort_values(ascending=False, kind="stable").index)


def _kind_name(heads: tuple[int, int]) -> str:
    return HEADS.get(heads, "{} query, {} key-value heads".format(*heads))


def _of_kind(frame: pd.DataFrame, heads: tuple[int, int]) -> pd.DataFrame:
    return frame[(frame["heads_q"] == heads[0]) & (frame["heads_kv"] == heads[1])]


def _thousands(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


# ---------------------------------------------------------------------------------------------- prefill


def _sizes_axis(axes: Axes, frame: pd.DataFrame) -> dict[tuple[int, int], int]:
    """Evenly spaced (length, batch) pairs, written out; where each of them lies."""
    pairs = sorted({(length, batch) for length, batch in zip(frame["kv_len"], frame["batch"], strict=True)})
    axes.set_xticks(range(len(pairs)), [f"{_thousands(length)}\n× {batch}" for length, batch in pairs])
    axes.set_xlim(-0.3, len(pairs) - 0.7)
    axes.set_xlabel("Tokens of a prompt × prompts")
    return {pair: at for at, pair in enumerate(pairs)}


def _over_sizes(sheet: Sheet, axes: Axes, frame: pd.DataFrame, column: str, look: Look, places: dict) -> None:
    rows = frame.assign(at=[places[pair] for pair in zip(frame["kv_len"], frame["batch"], strict=True)])
    rows = rows.sort_values("at")
    _line(sheet, axes, rows["at"].to_list(), rows[column].to_list(), look)


def attention_prefill(store: Store, figures: Path) -> Figure:
    """TFLOPS of causal attention over whole prompts, a panel for each pair of heads."""
    frame = _speeds(store, "prefill", "06")
    frame = frame.assign(tflops=attention_tflops(frame))
    kinds = _kinds(frame)
    with _style():
        sheet = _sheet(1, len(kinds), height=4.5, sharey=True)
        for axes, heads in zip(sheet.panels.flat, kinds, strict=True):
            places = _sizes_axis(axes, frame)
            here = _of_kind(frame, heads)
            for impl, look in _known(frame["impl"]).items():
                _over_sizes(sheet, axes, here[here["impl"] == impl], "tflops", look, places)
            axes.set_title(_kind_name(heads))
        sheet.panels[0, 0].set_ylim(0, 1.08 * frame["tflops"].max())
        sheet.panels[0, 0].set_ylabel("TFLOPS")
        _tidy(sheet)
        head_dim = ", ".join(str(width) for width in sorted(frame["head_dim"].unique()))
        return _finish(
            sheet,
            store,
            figures,
            "attention_prefill",
            title=f"Attention, prefill: rate over the length of the prompt, {_dtype_name(frame)}",
            subtitle=f"Causal, heads of {head_dim}; operations left by the mask, over GPU time (graph replay)",
            footer=[describe(frame)],
            legend_columns=2,
        )


# ----------------------------------------------------------------------------------------------- decode


def attention_decode(store: Store, figures: Path) -> Figure:
    """TB/s of keys and values over the number of sequences: a column per cache length, a row per pair of heads."""
    frame = _speeds(store, "decode", "07")
    frame = frame.assign(rate=cache_bytes(frame) / frame["median_ms"] / 1e9)
    copy = _copy_rate(store)
    kinds, lengths = _kinds(frame), sorted(frame["kv_len"].unique())
    with _style():
        sheet = _sheet(len(kinds), len(lengths), height=1.9 + 2.3 * len(kinds), sharex=True, sharey=True)
        for row, heads in zip(sheet.panels, kinds, strict=True):
            for axes, length in zip(row, lengths, strict=True):
                here = _of_kind(frame, heads)
                here = here[here["kv_len"] == length]
                axes.set_title(f"{heads[0]}/{heads[1]} heads, {_thousands(length)} keys", fontsize=9)
                for impl, look in _known(frame["impl"]).items():
                    rows = here[here["impl"] == impl].sort_values("batch")
                    _line(sheet, axes, rows["batch"].to_list(), rows["rate"].to_list(), look, markersize=4)
                if copy is not None:
                    ceiling = Look("Copy kernel, large", INK, "", ":")
                    ends = [int(frame["batch"].min()), int(frame["batch"].max())]
                    _line(sheet, axes, ends, [copy["rate"].iloc[-1]] * 2, ceiling, linewidth=1.2)
                _token_axis(axes, frame["batch"], label="Sequences")
            row[0].set_ylabel("TB/s")
        for axes in sheet.panels[:-1].flat:
            axes.set_xlabel("")
        sheet.panels[0, 0].set_ylim(0)
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "attention_decode",
            title=f"Attention, decode: bandwidth over the number of sequences, {_dtype_name(frame)}",
            subtitle="Bytes of keys and values in the cache, over GPU time (CUDA-graph replay); one query a sequence",
            footer=[describe(frame) if copy is None else describe(frame, copy)],
        )


# ------------------------------------------------------------------------------------- what chunks cost

POINT = ["batch", "heads_q", "heads_kv", "head_dim", "q_len", "kv_len"]
HIGHEST = 1.25
"""Largest relative speed that is drawn."""


def _against_free(store: Store, phase: str) -> pd.DataFrame:
    """Points of a phase at which the same kernel was measured with other chunks, and the speed relative to that."""
    frame = store.load("attention")
    frame = frame[(frame["phase"] == phase) & (frame["page_size"] == 0) & (frame["dtype"] == "bfloat16")]
    free = frame[frame["impl"] == FREE[phase]].set_index(POINT)["median_ms"].rename("free_ms")
    ours = frame[frame["impl"] == "batch_invariant"].join(free, on=POINT).dropna(subset=["free_ms"])
    return ours.assign(speed=ours["free_ms"] / ours["median_ms"])


def attention_cost(store: Store, figures: Path) -> Figure:
    """Speed with the plan's chunks relative to the same kernel with the chunks that would suit the load."""
    prefill, decode = (_against_free(store, phase) for phase in ("prefill", "decode"))
    if prefill.empty and decode.empty:
        raise MissingRecord(
            f"{shown(store.path('attention'))} lacks {', '.join(FREE.values())}: {EXPERIMENTS['attention'].how}"
        )
    with _style():
        sheet = _sheet(1, 2, height=4.3, sharey=True)
        left, right = sheet.panels.flat
        if len(prefill):
            places = _sizes_axis(left, prefill)
            for heads, color, marker in zip(_kinds(prefill), (BLUE, ORANGE, GREEN), "D^o", strict=False):
                look = Look(f"prefill, {_kind_name(heads)}", color, marker)
                _over_sizes(sheet, left, _of_kind(prefill, heads), "speed", look, places)
        left.set_title("Prefill: against one endless chunk")
        for length, color, marker in zip(
            sorted(decode["kv_len"].unique()), (SKY, PURPLE, RED, INK), "osvX", strict=False
        ):
            rows = decode[decode["kv_len"] == length].groupby("batch")["speed"].last()
            rows = rows.where(rows <= HIGHEST)  # what lies higher is written out: one point shall not rule the axis
            look = Look(f"decode, {_thousands(length)} keys", color, marker, "--")
            _line(sheet, right, rows.index.to_list(), rows.to_list(), look)
        if len(decode):
            _token_axis(right, decode["batch"], label="Sequences", step=1)
        right.set_title("Decode: against splits chosen from the load")
        for axes in (left, right):
            _one_line(axes)
        speeds = pd.concat([prefill["speed"], decode["speed"]])
        left.set_ylim(min(0.7, 0.95 * speeds.min()), HIGHEST + 0.1)
        for point in decode[decode["speed"] > HIGHEST].itertuples():
            said = f"{point.speed:.2f} ↑\n{point.batch} × {_thousands(point.kv_len)} keys"
            right.annotate(said, (point.batch, HIGHEST), ha="center", va="bottom", fontsize=8.5, color=INK)
        left.set_ylabel("Relative speed")
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "attention_cost",
            title="What invariance costs attention: chunks by position against chunks by load, bf16",
            subtitle="GPU time of the same kernel with free chunks, divided by that with the plan's (1: no cost)",
            footer=[describe(*(frame for frame in (prefill, decode) if len(frame)))],
            legend_columns=2,
        )


# ----------------------------------------------------------------------------------------- which bits change


def _shares(frame: pd.DataFrame, what: Callable[[pd.Series], pd.Series]) -> pd.DataFrame:
    """Share that differs, by implementation and the most keys that a row of the range sees."""
    cases = frame["case"].str.extract(rf"^{DECODE_PREFILL}, up to (?P<keys>\d+) keys(?P<elements>, elements)?$")
    chosen = cases["keys"].notna() & what(cases["elements"])
    found = frame[chosen].assign(keys=cases["keys"][chosen].astype(int))
    return found.assign(share=found["rows_differing"] / found["rows"].clip(lower=1))


def attention_bits(store: Store, figures: Path) -> Figure:
    """Share of rows, and of single numbers, whose bits depend on whether a token was decoded or prefilled."""
    missing = _missing(store, "invariance", f"rows of '{DECODE_PREFILL}'", "07")
    try:
        frame = _pick(store, "invariance", op="attention")
    except MissingRecord:
        raise missing from None
    rows, elements = (_shares(frame, what) for what in (pd.Series.isna, pd.Series.notna))
    if rows.empty:
        raise missing
    with _style():
        sheet = _sheet(1, 2, height=4.3, sharey=True)
        panels = {"rows (one head of one token)": rows, "single numbers": elements}
        for axes, (name, found) in zip(sheet.panels.flat, panels.items(), strict=True):
            axes.set_title(f"Share of {name} that differ")
            ends = {}
            for impl, look in _known(rows["impl"]).items():
                here = found[found["impl"] == impl].sort_values("keys")
                _line(sheet, axes, here["keys"].to_list(), here["share"].to_list(), look)
                if len(here):
                    said = f"{int(here['rows_differing'].sum()):,} of {int(here['rows'].sum()):,} at all lengths"
                    ends[impl] = here["share"].iloc[-1], said, look.color
            height = -1.0
            for share, said, color in sorted(ends.values()):
                # Counts of lines that end close together lie above each other.
                height = max(share + 0.03, height + 0.06)
                place = int(rows["keys"].max()), height
                axes.annotate(said, place, ha="right", va="bottom", fontsize=8.5, color=color)
            _token_axis(axes, rows["keys"], label="Keys that a token sees, at most", step=1)
        sheet.panels[0, 0].set_ylim(-0.03, 1.2)  # room for two counts above 100 %
        sheet.panels[0, 0].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "attention_bits",
            title=f"The same token, decoded or read with its prompt: whose bits differ? {_dtype_name(frame)}",
            subtitle="One query against its cache, compared with the same row of one pass over the whole prompt",
            footer=[describe(rows, elements)],
        )
