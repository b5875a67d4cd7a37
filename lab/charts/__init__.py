"""Charts, drawn from `data/` alone and the same to the last byte each time.

Every chart is a function `chart(store, figures) -> Figure` that reads records, draws, and saves
`figures/<chart>.svg` and `.png`. `CHARTS` lists them; `redraw_all` draws what the records allow, and
`python -m lab.charts` does that for every GPU in `data/`. A chart leaves out an implementation or a size that
was not measured; if nothing is left it raises `MissingRecord`, whose message says what would measure it.

Colours: Okabe and Ito's palette, except where a published chart fixes them (green, red, blue); markers
differ as well, so that no line is told apart by colour alone.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from PIL import Image

from lab.device import ROOT
from lab.records import EXPERIMENTS, MissingRecord, RecordError, Store, describe, reference, shown

DPI = 130
INK, MUTED = "#222222", "#5f5f5f"
GREEN, RED, BLUE = "#009E73", "#CC3311", "#0072B2"
ORANGE, PURPLE, SKY, YELLOW, BLACK = "#E69F00", "#AA4499", "#56B4E9", "#B8A800", "#333333"

STYLE = {
    **sns.axes_style("whitegrid"),
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same letters on every machine
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9.5,
    "axes.edgecolor": "#b0b0b0",
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "path",
    "svg.hashsalt": "lab.charts",
    "figure.dpi": 100,
    "savefig.dpi": DPI,
}


@dataclass(frozen=True)
class Look:
    label: str
    color: str
    marker: str
    line: str | tuple = "-"


LOOKS = {
    "rms_norm": {
        "cuda_row_blocked": Look("CUDA, block by row count (not invariant)", GREEN, "o"),
        "python": Look("Python (invariant)", RED, "s"),
        "batch_invariant": Look("Triton, this collection (invariant)", BLUE, "D"),
        "torch": Look("torch", ORANGE, "^", "--"),
        "torch_compile": Look("torch.compile", PURPLE, "v", "--"),
        "liger": Look("Liger", BLACK, "X", "--"),
    },
    "matmul": {
        "cublas": Look("cuBLAS", BLUE, "o"),
        "batch_invariant": Look("Triton, this collection (invariant)", RED, "D"),
        "single_tile": Look("Triton, one tile for every M (invariant)", ORANGE, "^", "--"),
        "cublas_no_split_k": Look("cuBLAS without split-K", SKY, "v", "--"),
    },
}
SPARE = [
    Look("", PURPLE, "P", ":"),
    Look("", GREEN, "*", ":"),
    Look("", BLACK, "h", ":"),
    Look("", YELLOW, "p", ":"),
]

LAYERS = {
    "qkv": Look("qkv", BLUE, "o"),
    "o": Look("o", ORANGE, "s"),
    "gate_up": Look("gate_up", RED, "D"),
    "down": Look("down", GREEN, "^"),
}

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}
DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SEED_TOKENS = [1, 8, 32, 128, 256, 512, 1024, 2048, 4096]


# ------------------------------------------------------------------------------------ numbers from rows


def matmul_tflops(frame: pd.DataFrame) -> pd.Series:
    """2 m n k floating-point operations over the median time, in 10^12 a second."""
    return 2.0 * frame["m"] * frame["n"] * frame["k"] / frame["median_ms"] / 1e9


def matmul_intensity(frame: pd.DataFrame) -> pd.Series:
    """Operations per byte when both inputs are read once and the output is written once."""
    m, n, k = (frame[name].astype(float) for name in "mnk")
    return 2 * m * n * k / ((m * k + k * n + m * n) * frame["dtype"].map(ITEM_BYTES))


def rms_norm_bytes(frame: pd.DataFrame) -> pd.Series:
    """Bytes a call has to move: x, y and the weight; with a residual also the old and the new one."""
    passes = 2 + 2 * frame["residual"]
    return (passes * frame["m"] + 1) * frame["hidden"] * frame["dtype"].map(ITEM_BYTES)


def _tb_per_s(bytes_moved: pd.Series, median_ms: pd.Series) -> pd.Series:
    return bytes_moved / median_ms / 1e9


# ------------------------------------------------------------------------------------------ house style


@contextmanager
def _style() -> Iterator[None]:
    """Our style on top of matplotlib's defaults, whatever the reader's matplotlibrc or notebook has set."""
    with plt.style.context(["default", STYLE]):
        yield


@dataclass
class Sheet:
    """A figure with a title, room for one legend, panels, and a footer that says where the data come from."""

    figure: Figure
    panels: np.ndarray
    entries: dict[str, Line2D | Patch] = field(default_factory=dict)

    def note(self, label: str, handle: Line2D | Patch) -> None:
        """Puts one entry into the legend; the same label in several panels is one entry."""
        self.entries.setdefault(label, handle)


def _sheet(rows: int = 1, columns: int = 1, height: float = 4.6, **axes: object) -> Sheet:
    figure = plt.figure(figsize=(9, height))
    panels = figure.subplots(rows, columns, squeeze=False, **axes)
    plt.close(figure)  # pyplot lets go of it: a notebook then shows the returned figure once, not twice
    return Sheet(figure, panels)


def _finish(
    sheet: Sheet,
    store: Store,
    figures: Path,
    name: str,
    *,
    title: str,
    subtitle: str,
    footer: Sequence[str],
    legend_columns: int | None = None,
) -> Figure:
    """Title on top, legend below it, footer at the bottom, the panels in what is left; then both files."""
    figure, inch = sheet.figure, 1 / sheet.figure.get_figheight()
    left = 0.012
    figure.text(left, 1 - 0.10 * inch, title, fontsize=12.5, fontweight="bold", va="top")
    figure.text(left, 1 - 0.37 * inch, subtitle, color=MUTED, va="top")
    top, columns = 0.62, legend_columns or min(len(sheet.entries), 3)
    if sheet.entries:
        figure.legend(
            sheet.entries.values(),
            sheet.entries.keys(),
            loc="upper left",
            bbox_to_anchor=(0.0, 1 - 0.58 * inch),
            ncols=columns,
            frameon=False,
            columnspacing=1.6,
            handlelength=2.4,
            borderpad=0.2,
        )
        top += 0.08 + 0.21 * -(-len(sheet.entries) // columns)
    bottom = 0.10 + 0.17 * len(footer)
    figure.text(left, 0.08 * inch, "\n".join(footer), fontsize=8.5, color=MUTED, va="bottom", linespacing=1.35)
    figure.set_layout_engine("constrained", rect=(0.005, bottom * inch, 0.985, 1 - (top + bottom) * inch))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # both files, and the notebook, get the layout that was just made
    for axes in figure.axes:  # rounded: the solver's last digits vary, and names inside an SVG follow them
        axes.set_position([round(number, 6) for number in axes.get_position().bounds])
    _save(figure, figures, name)
    return figure


def _save(figure: Figure, figures: Path, name: str) -> None:
    """Writes both files whole, without the date, which would change the bytes each time."""
    figures = Path(figures)
    figures.mkdir(parents=True, exist_ok=True)
    vector = io.BytesIO()
    figure.savefig(vector, format="svg", metadata={"Date": None})
    for suffix, content in ((".svg", vector.getvalue()), (".png", small_png(figure))):
        temporary = figures / f".{name}.{os.getpid()}{suffix}"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, figures / f"{name}{suffix}")
        finally:
            temporary.unlink(missing_ok=True)


def small_png(figure: Figure, **options: object) -> bytes:
    """A PNG of 256 colours: plenty for lines and letters, and a third of the bytes. Options go to ``savefig``."""
    raster, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raster, format="png", **options)
    Image.open(raster).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def _looks(op: str, impls: Sequence[str]) -> dict[str, Look]:
    """The look of each implementation that is there, known ones first; strangers get spare colours."""
    known = {impl: look for impl, look in LOOKS.get(op, {}).items() if impl in impls}
    strangers = sorted(set(impls) - set(known))
    spare = {impl: SPARE[index % len(SPARE)] for index, impl in enumerate(strangers)}
    return known | {impl: Look(impl, look.color, look.marker, look.line) for impl, look in spare.items()}


def _line(sheet: Sheet, axes: Axes, x: Sequence, y: Sequence, look: Look, **more: object) -> None:
    # The collection's own line lies on top of those it is compared with.
    order = 3 if "this collection" in look.label else 2.5
    style = {
        "color": look.color,
        "marker": look.marker,
        "linestyle": look.line,
        "zorder": order,
        "markeredgecolor": "white",
        "markeredgewidth": 0.4 if more.get("markersize", 5) < 5 else 0.6,
    }
    (line,) = axes.plot(x, y, **(style | more))
    sheet.note(look.label, line)


def _plain(value: float, _position: int = 0) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:g}"


def _token_axis(axes: Axes, values: Sequence[int], label: str = "Tokens (rows)", step: int = 2) -> None:
    """Powers of two from the smallest to the largest value, written out as numbers."""
    low, high = int(np.log2(min(values))), int(np.ceil(np.log2(max(values))))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in range(low, high + 1, step)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.set_xlabel(label)


def _log_axis(axis: object, subs: Sequence[float] = (1.0,)) -> None:
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain))


def _tidy(sheet: Sheet) -> None:
    for axes in sheet.panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)


def _dtype(frame: pd.DataFrame) -> str:
    """bf16 if it was measured, else whatever has the most points."""
    counts = frame["dtype"].value_counts()
    return "bfloat16" if "bfloat16" in counts else str(counts.idxmax())


def _rows(store: Store, name: str, **wanted: object) -> pd.DataFrame:
    """The newest rows that hold these values, of all dtypes; MissingRecord if there are none."""
    frame = store.load(name)
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    if frame.empty:
        said = ", ".join(f"{column} = {value}" for column, value in wanted.items())
        raise MissingRecord(f"{shown(store.path(name))} has no rows with {said}: {EXPERIMENTS[name].how}")
    return frame


def _pick(store: Store, name: str, **wanted: object) -> pd.DataFrame:
    """As ``_rows``, but of one dtype."""
    frame = _rows(store, name, **wanted)
    return frame[frame["dtype"] == _dtype(frame)]


def _dtype_name(frame: pd.DataFrame) -> str:
    return DTYPE_NAMES.get(_dtype(frame), _dtype(frame))


def _gpu(frame: pd.DataFrame) -> str:
    return ", ".join(frame["gpu"].unique())


# -------------------------------------------------------------------------------------- RMSNorm charts

SEED_FOOTER = "Left: LLM-42 (arXiv 2601.17768), NVIDIA H100, read off the published picture by eye"
SEED_NORM = {
    "Non-batch-invariant (CUDA)": "cuda_row_blocked",
    "Batch-invariant (Python)": "python",
    "Batch-invariant (Triton)": "batch_invariant",
}
SEED_MATMUL = {"Non-batch-invariant (cuBLAS)": "cublas", "Batch-invariant (Triton)": "batch_invariant"}


def rms_norm_seed_vs_here(store: Store, figures: Path) -> Figure:
    """Launch-inclusive time over tokens: the published chart on the left, the same measured here."""
    here = _pick(store, "rms_norm", op="rms_norm", timing="eager", hidden=8192, residual=1)
    here = here[here["m"].isin(SEED_TOKENS) & here["impl"].isin(SEED_NORM.values())]
    if here.empty:
        raise MissingRecord(f"{shown(store.path('rms_norm'))} lacks the points of this chart")
    seed = reference("rms_norm").assign(impl=lambda frame: frame["series"].map(SEED_NORM))
    looks = {
        "cuda_row_blocked": Look("Non-batch-invariant (CUDA)", GREEN, "o"),
        "python": Look("Batch-invariant (Python)", RED, "s"),
        "batch_invariant": Look("Batch-invariant (Triton)", BLUE, "D"),
    }
    with _style():
        sheet = _sheet(1, 2, height=4.7, sharey=True)
        panels = [
            (seed, "tokens", "value", "As published: NVIDIA H100"),
            (here, "m", "median_ms", f"Measured here: {_gpu(here)}"),
        ]
        for axes, (frame, x, y, heading) in zip(sheet.panels.flat, panels, strict=True):
            for impl, look in looks.items():
                rows = frame[frame["impl"] == impl].sort_values(x)
                if len(rows):
                    _line(sheet, axes, rows[x].map(SEED_TOKENS.index).to_list(), rows[y].to_list(), look)
            axes.set_title(heading)
            axes.set_xticks(range(len(SEED_TOKENS)), [str(tokens) for tokens in SEED_TOKENS])
            axes.set_xlim(-0.4, len(SEED_TOKENS) - 0.6)
            axes.set_xlabel("# Tokens")
            axes.grid(axis="x", visible=False)
        sheet.panels[0, 0].set_ylabel("Execution Time (ms)")
        sheet.panels[0, 0].set_ylim(bottom=0)
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "rms_norm_seed_vs_here",
            title="RMSNorm: Execution Time vs. # Tokens",
            subtitle=f"{_norm_case(here)}; each call launched from Python, its launch included",
            footer=[SEED_FOOTER, f"Right: {describe(here)}"],
        )


def _norm_case(frame: pd.DataFrame) -> str:
    residual = "with residual" if frame["residual"].iloc[0] else "without residual"
    return f"hidden {frame['hidden'].iloc[0]}, {residual}, {_dtype_name(frame)}"


def _norm_panels(frame: pd.DataFrame, **axes: object) -> tuple[Sheet, list[tuple[Axes, pd.DataFrame]]]:
    """One panel per hidden size (row) and residual (column), each with its rows."""
    hidden, residual = sorted(frame["hidden"].unique()), sorted(frame["residual"].unique())
    sheet = _sheet(len(hidden), len(residual), height=1.9 + 2.15 * len(hidden), sharex=True, **axes)
    found = []
    for row, size in enumerate(hidden):
        for column, added in enumerate(residual):
            panel = sheet.panels[row, column]
            rows = frame[(frame["hidden"] == size) & (frame["residual"] == added)]
            panel.set_title(f"hidden {size}, {'with' if added else 'without'} residual")
            found.append((panel, rows))
    return sheet, found


def rms_norm_gpu_time(store: Store, figures: Path) -> Figure:
    """GPU time alone over tokens, both axes logarithmic, one panel per hidden size and residual."""
    frame = _pick(store, "rms_norm", op="rms_norm", timing="graph")
    with _style():
        sheet, found = _norm_panels(frame, sharey=True)
        looks = _looks("rms_norm", frame["impl"].unique())
        for axes, rows in found:
            for impl, look in looks.items():
                points = rows[rows["impl"] == impl].sort_values("m")
                if len(points):
                    x = points["m"].to_list()
                    axes.fill_between(
                        x, points["p20_ms"] * 1e3, points["p80_ms"] * 1e3, color=look.color, alpha=0.18, lw=0
                    )
                    _line(sheet, axes, x, (points["median_ms"] * 1e3).to_list(), look, markersize=4)
        for axes in sheet.panels.flat:
            axes.set_yscale("log")
            _log_axis(axes.yaxis, subs=(1, 3))
            _token_axis(axes, frame["m"])
        _outer_labels(sheet, "Time (µs)")
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "rms_norm_gpu_time",
            title=f"RMSNorm: GPU time vs. tokens, {_dtype_name(frame)}",
            subtitle="One call, by CUDA-graph replay: median, with a band from 20th to 80th percentile",
            footer=[describe(frame)],
        )


def _outer_labels(sheet: Sheet, y_label: str) -> None:
    """Axis labels at the outer edges only."""
    for axes in sheet.panels[:, 0]:
        axes.set_ylabel(y_label)
    for axes in sheet.panels[:-1].flat:
        axes.set_xlabel("")


def _copy_rate(store: Store) -> pd.DataFrame | None:
    """What a copy kernel reaches: columns bytes (ascending), rate (TB/s); None if it was not measured.

    The last row, the largest copy, is the memory's own rate: smaller ones are helped by the L2 cache.
    """
    if not store.has("bandwidth"):
        return None
    frame = store.load("bandwidth")
    frame = frame.assign(rate=_tb_per_s(frame["bytes"], frame["median_ms"]))
    best = frame.loc[frame.groupby("bytes")["rate"].idxmax()].sort_values("bytes")
    return best.reset_index(drop=True) if len(best) else None


def rms_norm_bandwidth(store: Store, figures: Path) -> Figure:
    """Memory bandwidth over tokens, beside that of a copy kernel moving as many bytes."""
    frame = _pick(store, "rms_norm", op="rms_norm", timing="graph")
    frame = frame.assign(rate=_tb_per_s(rms_norm_bytes(frame), frame["median_ms"]))
    copy = _copy_rate(store)
    with _style():
        sheet, found = _norm_panels(frame, sharey=True)
        looks = _looks("rms_norm", frame["impl"].unique())
        for axes, rows in found:
            for impl, look in looks.items():
                points = rows[rows["impl"] == impl].sort_values("m")
                if len(points):
                    _line(sheet, axes, points["m"].to_list(), points["rate"].to_list(), look, markersize=4)
            if copy is not None and len(rows):
                _copy_line(sheet, axes, rows, copy)
        for axes in sheet.panels.flat:
            _token_axis(axes, frame["m"])
        best = max(frame["rate"].max(), 0 if copy is None else copy["rate"].max())
        sheet.panels[0, 0].set_ylim(0, 1.17 * best)  # room for the ceiling's label
        _outer_labels(sheet, "TB/s")
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "rms_norm_bandwidth",
            title=f"RMSNorm: memory bandwidth vs. tokens, {_dtype_name(frame)}",
            subtitle="Bytes a call has to read and write, over its GPU time (CUDA-graph replay)",
            footer=[describe(frame) if copy is None else describe(frame, copy)],
        )


def _copy_line(sheet: Sheet, axes: Axes, rows: pd.DataFrame, copy: pd.DataFrame) -> None:
    """The copy kernel where it moves as many bytes as the norm, and the largest copy's rate as a ceiling."""
    per_token = float((rms_norm_bytes(rows) / rows["m"]).min())
    best = float(copy["rate"].iloc[-1])
    axes.axhline(best, color=MUTED, linewidth=1, linestyle=(0, (5, 2)), zorder=2)
    axes.annotate(
        f"largest copy, {best:.2f} TB/s",
        (0.015, best),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        color=MUTED,
        fontsize=8.5,
    )
    tokens = copy["bytes"] / per_token
    inside = tokens.between(rows["m"].min(), rows["m"].max())
    if inside.sum() > 1:
        (line,) = axes.plot(tokens[inside], copy["rate"][inside], color="#9a9a9a", linewidth=4, alpha=0.55, zorder=2)
        sheet.note("copy kernel, same bytes", line)


PEERS = ("torch", "torch_compile", "liger")


def rms_norm_speedup(store: Store, figures: Path) -> Figure:
    """How many times faster the invariant kernel is than the fastest production kernel, over tokens."""
    frame = _pick(store, "rms_norm", op="rms_norm", timing="graph")
    point = ["hidden", "residual", "m"]
    ours = frame[frame["impl"] == "batch_invariant"].set_index(point)["median_ms"]
    others = frame[frame["impl"].isin(PEERS)]
    ratio = (others.groupby(point)["median_ms"].min() / ours).dropna().rename("ratio").reset_index()
    if ratio.empty:
        raise MissingRecord(f"{shown(store.path('rms_norm'))} lacks batch_invariant, or each of {', '.join(PEERS)}")
    looks = _looks("rms_norm", others["impl"].unique())
    sizes = [Look("", BLUE, "D"), Look("", ORANGE, "s"), Look("", GREEN, "o"), Look("", PURPLE, "^")]
    residuals = sorted(ratio["residual"].unique())
    with _style():
        sheet = _sheet(1, len(residuals), height=4.0, sharey=True)
        for axes, added in zip(sheet.panels.flat, residuals, strict=True):
            for look, (hidden, rows) in zip(sizes, ratio[ratio["residual"] == added].groupby("hidden"), strict=False):
                _line(
                    sheet,
                    axes,
                    rows["m"].to_list(),
                    rows["ratio"].to_list(),
                    Look(f"hidden {hidden}", look.color, look.marker),
                )
            _one_line(axes)
            axes.set_title("with residual" if added else "without residual")
            _token_axis(axes, ratio["m"])
        sheet.panels[0, 0].set_ylim(min(0.8, 0.95 * ratio["ratio"].min()), max(1.2, 1.05 * ratio["ratio"].max()))
        sheet.panels[0, 0].set_ylabel("Relative speed")
        _tidy(sheet)
        peers = ", ".join(look.label for look in looks.values())
        return _finish(
            sheet,
            store,
            figures,
            "rms_norm_speedup",
            title=f"RMSNorm: this collection's kernel relative to the fastest peer, {_dtype_name(frame)}",
            subtitle=f"GPU time of the fastest of {peers}, divided by ours (above 1: ours is faster)",
            footer=[describe(frame)],
        )


def _one_line(axes: Axes) -> None:
    axes.axhline(1, color=INK, linewidth=1, zorder=2)


# --------------------------------------------------------------------------------------- matmul charts


def _llama(store: Store) -> pd.DataFrame:
    frame = _pick(store, "matmul", model="llama-3-8b", tp=1)
    return frame.assign(tflops=matmul_tflops(frame), intensity=matmul_intensity(frame))


def _layers(frame: pd.DataFrame) -> list[str]:
    known = [layer for layer in LAYERS if layer in set(frame["layer"])]
    return known + sorted(set(frame["layer"]) - set(known))


def _layer_name(frame: pd.DataFrame) -> str:
    first = frame.iloc[0]
    return f"{first['layer']} ({first['n']} × {first['k']})"


def matmul_seed_vs_here(store: Store, figures: Path, layer: str = "gate_up") -> Figure:
    """TFLOPS over tokens: the published chart on the left, one layer measured here on the right."""
    frame = _llama(store)
    layers = _layers(frame)
    layer = layer if layer in layers else layers[0]
    here = frame[(frame["layer"] == layer) & frame["impl"].isin(["cublas", "batch_invariant", "single_tile"])]
    if here.empty:
        raise MissingRecord(f"{shown(store.path('matmul'))} lacks the implementations of this chart")
    seed = reference("matmul").assign(impl=lambda rows: rows["series"].map(SEED_MATMUL))
    looks = {
        "cublas": Look("Non-batch-invariant (cuBLAS)", BLUE, "o"),
        "batch_invariant": Look("Batch-invariant (Triton)", RED, "D"),
        "single_tile": Look("Batch-invariant (Triton, one tile for every M)", ORANGE, "^", "--"),
    }
    with _style():
        sheet = _sheet(1, 2, height=4.7, sharey=True)
        panels = [
            (seed, "tokens", "value", "As published: NVIDIA H100"),
            (here, "m", "tflops", f"Measured here: {_gpu(here)}, {_layer_name(here)}"),
        ]
        for axes, (rows, x, y, heading) in zip(sheet.panels.flat, panels, strict=True):
            for impl, look in looks.items():
                points = rows[rows["impl"] == impl].sort_values(x)
                if len(points):
                    _line(sheet, axes, points[x].to_list(), points[y].to_list(), look)
            axes.set_title(heading)
            _token_axis(axes, seed["tokens"], "# Tokens", step=1)
            axes.tick_params(axis="x", rotation=45)
        axes = sheet.panels[0, 0]
        axes.set_yscale("log")
        _log_axis(axes.yaxis)
        axes.set_ylabel("TFLOPS")
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "matmul_seed_vs_here",
            title="Matrix multiplication: TFLOPS vs. # Tokens",
            subtitle=f"Llama-3-8B layer shapes, {_dtype_name(here)}; right: weight N × K as given",
            footer=[SEED_FOOTER, f"Right: {describe(here)}"],
        )


def matmul_layers(store: Store, figures: Path) -> Figure:
    """TFLOPS over tokens, one panel per layer, every implementation."""
    frame = _llama(store)
    layers = _layers(frame)
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    with _style():
        sheet = _sheet(rows, columns, height=1.9 + 2.15 * rows, sharex=True, sharey=True)
        looks = _looks("matmul", frame["impl"].unique())
        for axes, layer in zip(sheet.panels.flat, layers, strict=False):
            here = frame[frame["layer"] == layer]
            for impl, look in looks.items():
                points = here[here["impl"] == impl].sort_values("m")
                if len(points):
                    _line(sheet, axes, points["m"].to_list(), points["tflops"].to_list(), look, markersize=4)
            axes.set_title(_layer_name(here))
        for axes in sheet.panels.flat:
            axes.set_yscale("log")
            _log_axis(axes.yaxis)
            _token_axis(axes, frame["m"])
        for axes in sheet.panels.flat[len(layers) :]:
            axes.set_visible(False)
        _outer_labels(sheet, "TFLOPS")
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "matmul_layers",
            title=f"Matrix multiplication: TFLOPS vs. tokens, Llama-3-8B, {_dtype_name(frame)}",
            subtitle="Each layer of the model, weight N × K: 2 M N K operations over the GPU time of a call",
            footer=[describe(frame)],
            legend_columns=2,
        )


def matmul_roofline(store: Store, figures: Path) -> Figure:
    """TFLOPS over operations per byte, under two measured ceilings: copy bandwidth and best rate."""
    frame = _llama(store)
    frame = frame[frame["impl"].isin(["cublas", "batch_invariant", "single_tile"])]
    if frame.empty:
        raise MissingRecord(f"{shown(store.path('matmul'))} lacks the implementations of this chart")
    copy = _copy_rate(store)
    roof = float(frame["tflops"].max())
    with _style():
        sheet = _sheet(1, 1, height=5.0)
        axes = sheet.panels[0, 0]
        _roof(axes, frame["intensity"], roof, None if copy is None else float(copy["rate"].iloc[-1]))
        for impl, look in _looks("matmul", frame["impl"].unique()).items():
            points = frame[frame["impl"] == impl]
            spot = {"markersize": 5.5}
            if impl == "cublas":  # a ring around the others: where both are as fast, both are seen
                spot = {
                    "markersize": 9,
                    "markerfacecolor": "none",
                    "markeredgecolor": look.color,
                    "markeredgewidth": 1.3,
                }
            _line(
                sheet,
                axes,
                points["intensity"].to_list(),
                points["tflops"].to_list(),
                look,
                linestyle="none",
                **spot,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        _log_axis(axes.xaxis)
        _log_axis(axes.yaxis)
        axes.set_ylim(frame["tflops"].min() / 1.5, 2.2 * roof)
        axes.set_xlabel("Arithmetic intensity (operations per byte)")
        axes.set_ylabel("TFLOPS")
        _tidy(sheet)
        tokens = f"{frame['m'].min()} to {frame['m'].max()} tokens"
        return _finish(
            sheet,
            store,
            figures,
            "matmul_roofline",
            title=f"Matrix multiplication: measured rates under a measured roofline, {_dtype_name(frame)}",
            subtitle=f"Llama-3-8B layers {', '.join(_layers(frame))} at {tokens}, one point each",
            footer=[describe(frame) if copy is None else describe(frame, copy)],
        )


def _roof(axes: Axes, intensity: pd.Series, roof: float, bandwidth: float | None) -> None:
    """The two ceilings, both measured: bandwidth times intensity, and the highest rate of any matmul here."""
    low, high = float(intensity.min()) / 1.3, float(intensity.max()) * 1.3
    ridge = low if bandwidth is None else min(max(roof / bandwidth, low), high)
    axes.plot([ridge, high], [roof, roof], color=MUTED, linewidth=1.4, zorder=2)
    axes.annotate(
        f"highest rate measured: {roof:.0f} TFLOPS",
        (high, roof),
        xytext=(0, 10),
        textcoords="offset points",
        ha="right",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over the grid line behind it
        color=MUTED,
        fontsize=9,
    )
    if bandwidth is not None:
        axes.plot([low, ridge], [bandwidth * low, bandwidth * ridge], color=MUTED, linewidth=1.4, zorder=2)
        middle = (low * ridge) ** 0.5
        axes.annotate(
            f"copy kernel: {bandwidth:.2f} TB/s",
            (middle, bandwidth * middle),
            xytext=(-6, 6),
            textcoords="offset points",
            ha="right",
            color=MUTED,
            fontsize=9,
        )


def matmul_ratio(store: Store, figures: Path) -> Figure:
    """Speed relative to cuBLAS over tokens, one panel per implementation, one line per layer."""
    frame = _llama(store)
    point = ["layer", "n", "k", "m"]
    cublas = frame[frame["impl"] == "cublas"].set_index(point)["median_ms"].rename("cublas_ms")
    frame = frame[frame["impl"] != "cublas"].join(cublas, on=point).dropna(subset=["cublas_ms"])
    if frame.empty:
        raise MissingRecord(f"{shown(store.path('matmul'))} lacks cublas, or anything to compare with it")
    frame = frame.assign(ratio=frame["cublas_ms"] / frame["median_ms"])
    impls = _looks("matmul", frame["impl"].unique())
    with _style():
        sheet = _sheet(1, len(impls), height=4.2, sharey=True)
        for axes, (impl, impl_look) in zip(sheet.panels.flat, impls.items(), strict=True):
            here = frame[frame["impl"] == impl]
            for layer in _layers(here):
                rows = here[here["layer"] == layer].sort_values("m")
                look = LAYERS.get(layer, Look(layer, BLACK, "X", ":"))
                look = Look(_layer_name(rows), look.color, look.marker, look.line)
                _line(sheet, axes, rows["m"].to_list(), rows["ratio"].to_list(), look, markersize=4)
            _one_line(axes)
            axes.set_title(impl_look.label)
            _token_axis(axes, frame["m"], step=3)
        sheet.panels[0, 0].set_ylim(0, max(1.2, 1.08 * frame["ratio"].max()))
        sheet.panels[0, 0].set_ylabel("Speed relative to cuBLAS")
        _tidy(sheet)
        return _finish(
            sheet,
            store,
            figures,
            "matmul_ratio",
            title=f"Matrix multiplication: speed relative to cuBLAS, Llama-3-8B, {_dtype_name(frame)}",
            subtitle="GPU time of cuBLAS divided by that of the kernel (above 1: it is faster); weight N × K",
            footer=[describe(frame)],
            legend_columns=4,
        )


# ------------------------------------------------------------------------------------- invariance chart

CLEAN = "#DDEFF9"
CHANGED = LinearSegmentedColormap.from_list("changed", ["#F7D9A8", "#E69F00", "#CC3311", "#7A1500"])


def invariance_map(store: Store, figures: Path) -> Figure:
    """Share of a batch's rows whose bits change with the batch: a column per size, a line per case that changes.

    The cases in which no row of an implementation changes share one line per dtype. Left out is what does not compare
    whole batches: one way of computing a row "against" another (`attention_bits` shows them), and the checker's few
    planted rows and rows with spoiled neighbours.
    """
    frame = store.load("invariance")
    frame = frame[~frame["case"].str.contains(r" against |^planted at |^neighbours ")]
    if frame.empty:
        raise MissingRecord(f"{shown(store.path('invariance'))} has no rows: {EXPERIMENTS['invariance'].how}")
    lines = _map_lines(frame)
    sizes = sorted(frame["rows"].unique())
    with _style():
        sheet = _sheet(1, 1, height=max(2.6, 1.75 + 0.215 * len(lines)))
        axes = sheet.panels[0, 0]
        totals = []
        for y, (_, rows) in enumerate(lines):
            for size, differing in rows.groupby("rows")["rows_differing"].max().items():
                _cell(axes, sizes.index(size), y, differing / max(size, 1), len(sizes))
            totals.append((int(rows["rows_differing"].sum()), int(rows["rows"].sum())))
        _map_axes(axes, [label for label, _ in lines], sizes, totals)
        _separate(axes, [rows["op"].iloc[0] for _, rows in lines], len(sizes))
        sheet.note("no row changes", Patch(facecolor=CLEAN, edgecolor="#9ecae8"))
        for share in (0.01, 0.25, 0.5, 1.0):
            sheet.note(f"{share:.0%} of rows", Patch(facecolor=CHANGED(share)))
        return _finish(
            sheet,
            store,
            figures,
            "invariance_map",
            title="Rows whose bits change with the batch they are in",
            subtitle="Share of the rows of each batch that differ from the same row in its reference batch",
            footer=[describe(frame)],
            legend_columns=5,
        )


def _map_lines(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Label and rows of each line of the map, this collection's own first within an operator."""
    several_dtypes = frame["dtype"].nunique() > 1
    frame = frame.assign(last=frame["impl"] != "batch_invariant")
    lines = []
    for (op, _, impl, dtype), group in frame.groupby(["op", "last", "impl", "dtype"]):
        clean = group.groupby("case")["rows_differing"].transform("sum") == 0
        found = list(group[~clean].groupby("case"))
        unchanged = group.loc[clean, "case"].unique()
        if len(unchanged):
            counted = f"{len(unchanged)} other cases" if found else f"all {len(unchanged)} cases"
            found.append((unchanged[0] if len(unchanged) == 1 else counted, group[clean]))
        for case, rows in found:
            parts = [op, impl, case] + [dtype] * several_dtypes
            lines.append((" · ".join(_short_dtype(part) for part in parts), rows))
    return lines


def _short_dtype(text: str) -> str:
    return DTYPE_NAMES.get(text, text)


def _cell(axes: Axes, x: int, y: int, share: float, columns: int) -> None:
    clean = share == 0
    color = CLEAN if clean else CHANGED(share)
    axes.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=1))
    if clean:
        axes.text(x, y, "0", ha="center", va="center", fontsize=7.5, color=BLUE)
    elif columns <= 15:
        text = f"{share:.0%}" if share >= 0.01 else "<1%"
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if share > 0.45 else INK)


def _map_axes(axes: Axes, labels: list[str], sizes: list[int], totals: list[tuple[int, int]]) -> None:
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes], rotation=90 if len(sizes) > 14 else 0)
    axes.set_xlabel("Rows in the batch")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.text(len(sizes) - 0.35, -0.65, "changed / compared", fontsize=8, color=MUTED, va="bottom")
    for y, (differing, compared) in enumerate(totals):
        text = f"{differing:,} / {compared:,}"
        weight, color = ("bold", BLUE) if differing == 0 else ("normal", INK)
        axes.text(len(sizes) - 0.35, y, text, fontsize=8, va="center", color=color, fontweight=weight)


def _separate(axes: Axes, ops: list[str], columns: int) -> None:
    """A thin rule between operators."""
    for y in range(1, len(ops)):
        if ops[y] != ops[y - 1]:
            axes.plot([-0.5, columns - 0.5], [y - 0.5, y - 0.5], color=MUTED, linewidth=1, zorder=4)


# --------------------------------------------------------------------- what may change, and what others do

PLAIN = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8"}


def _first_seen(values: pd.Series, known: Sequence[str]) -> list[str]:
    """Known values in their own order, then strangers as they come."""
    found = list(dict.fromkeys(values))
    return [value for value in known if value in found] + [value for value in found if value not in known]


def freedom_map(store: Store, figures: Path) -> Figure:
    """Different results over the settings of each knob: a line per operation and type, a column per knob."""
    frame = store.load("freedom")
    if frame.empty:
        raise MissingRecord(f"{shown(store.path('freedom'))} has no rows: {EXPERIMENTS['freedom'].how}")
    knobs = _first_seen(frame["knob"], [])
    point = ["op", "dtype", "precision"]
    lines = frame[point].drop_duplicates()
    with _style():
        sheet = _sheet(1, 1, height=2.15 + 0.31 * len(lines))
        axes = sheet.panels[0, 0]
        for y, line in enumerate(lines.itertuples(index=False)):
            here = frame[(frame[point] == list(line)).all(axis=1)].set_index("knob")
            for x, knob in enumerate(knobs):
                if knob in here.index:
                    _freedom_cell(axes, x, y, int(here.loc[knob, "results"]), int(here.loc[knob, "settings"]))
        axes.set_xlim(-0.5, len(knobs) - 0.5)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_yticks(range(len(lines)), [_line_name(*line) for line in lines.itertuples(index=False)])
        axes.set_xticks(range(len(knobs)), [_two_lines(knob) for knob in knobs])
        axes.xaxis.tick_top()
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        sheet.note("one result: free, a schedule may choose it", Patch(facecolor=CLEAN, edgecolor="#9ecae8"))
        sheet.note("several: it shapes the sum and belongs to the plan", Patch(facecolor="#F3B54A"))
        return _finish(
            sheet,
            store,
            figures,
            "freedom_map",
            title="What may change without changing a bit",
            subtitle="Different results, bit for bit, of the settings tried: results / settings",
            footer=[describe(frame)],
            legend_columns=2,
        )


def _line_name(op: str, dtype: str, precision: str) -> str:
    name = PLAIN.get(dtype, dtype)
    return f"{op} · {name}" if precision == "exact" else f"{op} · {name} · {precision}"


def _two_lines(text: str) -> str:
    """Broken at the space nearest its middle, so that a column can be narrow."""
    spaces = [at for at, letter in enumerate(text) if letter == " "]
    if not spaces:
        return text
    at = min(spaces, key=lambda at: abs(at - len(text) / 2))
    return f"{text[:at]}\n{text[at + 1 :]}"


def _freedom_cell(axes: Axes, x: int, y: int, results: int, settings: int) -> None:
    free = results == 1
    color = CLEAN if free else "#F3B54A"
    axes.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=1.5))
    weight, ink = ("normal", BLUE) if free else ("bold", INK)
    axes.text(x, y, f"{results} / {settings}", ha="center", va="center", fontsize=9, color=ink, fontweight=weight)


def random_shapes(store: Store, figures: Path) -> Figure:
    """Shapes on which rows change bits with the batch: their share by type, and where they lie."""
    frame = store.load("random_shapes")
    if frame.empty:
        raise MissingRecord(f"{shown(store.path('random_shapes'))} has no rows: {EXPERIMENTS['random_shapes'].how}")
    frame = frame.assign(changes=frame["rows_differing"] > 0)
    looks = _looks("matmul", frame["impl"].unique())
    impls = _first_seen(pd.Series(list(looks)), ["cublas", "cublas_no_split_k", "batch_invariant"])
    dtypes = _first_seen(frame["dtype"], ["bfloat16", "float16", "float32"])
    with _style():
        sheet = _sheet(2, len(impls), height=5.6, gridspec_kw={"height_ratios": [1, 2.5]})
        for (bars, plane), impl in zip(sheet.panels.T, impls, strict=True):
            here = frame[frame["impl"] == impl]
            bars.set_title(_two_lines(looks[impl].label))
            _share_bars(bars, here, dtypes)
            _shape_plane(sheet, plane, here, dtypes)
        sheet.panels[1, 0].set_ylabel("K (length of the sum)")
        for axes in sheet.panels[:, 1:].flat:
            axes.tick_params(labelleft=False)
        _tidy(sheet)
        sizes = ", ".join(str(m) for m in sorted(frame["m"].unique()))
        return _finish(
            sheet,
            store,
            figures,
            "random_shapes",
            title="Random weights: for how many does a row change bits with the batch?",
            subtitle=f"Smaller batches against one of {sizes} rows; a point is a weight of N outputs and K inputs",
            footer=[describe(frame)],
            legend_columns=5,
        )


def _share_bars(axes: Axes, frame: pd.DataFrame, dtypes: Sequence[str]) -> None:
    """Share of the shapes that change, with the counts written out."""
    for y, dtype in enumerate(dtypes):
        changes = frame[frame["dtype"] == dtype]["changes"]
        if len(changes) == 0:
            continue
        share = changes.mean()
        axes.barh(y, 1, color=CLEAN, height=0.72)
        axes.barh(y, share, color=RED, height=0.72)
        text = f"{int(changes.sum())} of {len(changes)}"
        inside = share > 0.5
        at, ink = (0.02, "white") if inside else (share + 0.02, BLUE if share == 0 else INK)
        axes.text(at, y, text, va="center", fontsize=9, color=ink, fontweight="bold")
    axes.set_yticks(range(len(dtypes)), [PLAIN.get(dtype, dtype) for dtype in dtypes])
    axes.set_ylim(len(dtypes) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.get_xticklabels()[-1].set_horizontalalignment("right")
    axes.grid(False)


def _shape_plane(sheet: Sheet, axes: Axes, frame: pd.DataFrame, dtypes: Sequence[str]) -> None:
    """Every shape in the plane of N and K: crosses where rows change, open markers where none does."""
    markers = dict(zip(dtypes, "os^Dvp"[: len(dtypes)], strict=True))
    for dtype in dtypes:
        here = frame[frame["dtype"] == dtype]
        for changes, color, fill in ((False, BLUE, "none"), (True, RED, RED)):
            rows = here[here["changes"] == changes]
            axes.scatter(
                rows["n"],
                rows["k"],
                s=15,
                marker=markers[dtype],
                facecolor=fill,
                edgecolor=color,
                linewidth=0.8,
                alpha=0.85,
                zorder=3 if changes else 2,
            )
        name = PLAIN.get(dtype, dtype)
        sheet.note(name, Line2D([], [], marker=markers[dtype], color=MUTED, linestyle="", markerfacecolor="none"))
    sheet.note("no row changes", Patch(facecolor=CLEAN, edgecolor="#9ecae8"))
    sheet.note("rows change bits", Patch(facecolor=RED))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator([2.0**power for power in range(7, 14, 2)]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(_plain))
    axes.set_xlim(100, 10500)
    axes.set_ylim(100, 10500)
    axes.set_xlabel("N (outputs)")


# ------------------------------------------------------------------------------------ speed over a grid

HEAT_MODELS = {"llama-3-8b": "8B", "llama-3-70b": "70B"}
SLOWER = {0: "#4D1500", 0.25: "#B35806", 0.37: "#EE9F38", 0.46: "#FBDDB0"}
FASTER = {0.54: "#CFE4F3", 0.58: "#8ABCE0", 0.65: "#2C7FB8", 1: "#083D77"}
SLOWER_FASTER = LinearSegmentedColormap.from_list("slower_faster", list((SLOWER | {0.5: "#F7F7F7"} | FASTER).items()))


def speed_color(speed: float) -> tuple[float, float, float, float]:
    """A quarter of the speed or less at one end, white at equal speed, four times as fast at the other end."""
    return SLOWER_FASTER(float(np.clip(0.5 + np.log2(speed) / 4, 0, 1)))


def matmul_heat(store: Store, figures: Path) -> Figure:
    """Speed relative to cuBLAS over a grid: layers and their shards down, tokens across, a panel per kernel."""
    frame = store.load("matmul")
    frame = frame[frame["model"].isin(HEAT_MODELS) & frame["impl"].isin(["cublas", "batch_invariant", "single_tile"])]
    point = ["model", "layer", "tp", "n", "k"]
    ms = frame[frame["dtype"] == "bfloat16"].pivot_table(index=[*point, "m"], columns="impl", values="median_ms")
    speeds = ms.drop(columns="cublas").rdiv(ms["cublas"], axis=0).dropna(how="all") if "cublas" in ms else ms[:0]
    if speeds.empty:
        raise MissingRecord(f"{shown(store.path('matmul'))} lacks cublas in bf16, or anything to compare with it")
    order = {name: at for at, name in enumerate([*HEAT_MODELS, *LAYERS])}
    shapes = sorted(speeds.index.droplevel("m").unique(), key=lambda s: (order[s[0]], order.get(s[1], 99), s[2:]))
    tokens = sorted(speeds.index.unique("m"))
    with _style():
        sheet = _sheet(1, len(speeds.columns), height=2.05 + 0.18 * len(shapes), sharey=True)
        for axes, (impl, look) in zip(sheet.panels.flat, _looks("matmul", speeds.columns).items(), strict=True):
            grid = speeds[impl].unstack("m").reindex(index=shapes, columns=tokens).to_numpy()
            mean = np.exp(np.nanmean(np.log(grid)))
            axes.set_title(f"{look.label.removeprefix('Triton, ')}: mean {100 * mean:.0f} %", fontsize=9)
            _heat(axes, grid)
            axes.set_xticks(range(len(tokens)), [str(m) for m in tokens], rotation=90, fontsize=8)
            axes.set_xlabel("Tokens")
        names = [f"{HEAT_MODELS[model]} {layer} · TP {tp} · {n} × {k}" for model, layer, tp, n, k in shapes]
        sheet.panels[0, 0].set_yticks(range(len(shapes)), names, fontsize=8)
        for percent in (25, 50, 70, 90, 100, 110, 125):
            sheet.note(str(percent), Patch(facecolor=speed_color(percent / 100), edgecolor="#b0b0b0"))
        return _finish(
            sheet,
            store,
            figures,
            "matmul_heat",
            title="Matrix multiplication: speed relative to cuBLAS over models, shards and tokens, bf16",
            subtitle="Per cent: GPU time of cuBLAS over that of the kernel; weight N × K of one GPU; mean: geometric",
            footer=[describe(frame[frame["dtype"] == "bfloat16"])],
            legend_columns=7,
        )


def _heat(axes: Axes, grid: np.ndarray) -> None:
    """A cell per value, its colour and its per cent; nothing where nothing was measured."""
    rows, columns = grid.shape
    picture = np.ones((rows, columns, 4))
    for y, x in np.argwhere(np.isfinite(grid)):
        picture[y, x] = speed_color(grid[y, x])
        dark = picture[y, x, :3] @ (0.3, 0.6, 0.1) < 0.5
        ink = "white" if dark else INK
        axes.text(x, y, f"{100 * grid[y, x]:.0f}", ha="center", va="center", fontsize=6.2, color=ink)
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="white", linewidth=0.6)
    axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color="white", linewidth=0.6)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


# ---------------------------------------------------------------------------------------------- drawing

Chart = Callable[[Store, Path], Figure]

# Charts of other families live in modules of their own, which draw with what is defined above.
from lab.charts.attention import (  # noqa: E402
    attention_bits,
    attention_cost,
    attention_decode,
    attention_prefill,
)
from lab.charts.model import completions, forward_latency_seed_vs_here, tokens_per_s  # noqa: E402
from lab.charts.w8a8 import (  # noqa: E402
    w8a8_accuracy,
    w8a8_latency_seed_vs_here,
    w8a8_promotion,
    w8a8_speedup,
)

CHARTS: dict[str, Chart] = {
    chart.__name__: chart
    for chart in (
        rms_norm_seed_vs_here,
        rms_norm_gpu_time,
        rms_norm_bandwidth,
        rms_norm_speedup,
        matmul_seed_vs_here,
        matmul_layers,
        matmul_roofline,
        matmul_ratio,
        invariance_map,
        freedom_map,
        random_shapes,
        matmul_heat,
        attention_prefill,
        attention_decode,
        attention_cost,
        attention_bits,
        w8a8_latency_seed_vs_here,
        w8a8_speedup,
        w8a8_promotion,
        w8a8_accuracy,
        forward_latency_seed_vs_here,
        completions,
        tokens_per_s,
    )
}


def draw(name: str, store: Store, figures: Path) -> Figure | None:
    """Draws one chart, or prints why there is nothing to draw. RecordError for an unknown name."""
    if name not in CHARTS:
        raise RecordError(f"name = {name!r} is no chart; there are: {', '.join(CHARTS)}")
    try:
        return CHARTS[name](store, figures)
    except MissingRecord as missing:
        print(f"{name}: not drawn, {missing}")
        return None


def redraw_all(store: Store, figures: Path) -> list[str]:
    """Draws every chart the records allow and returns their names; the others are named with the reason.

    A damaged record, or a fault of a chart's own, stops only the charts concerned: RecordError at the end, after all
    others are drawn.
    """
    drawn, damaged = [], []
    for name in CHARTS:
        try:
            if draw(name, store, figures) is not None:
                drawn.append(name)
        except Exception as error:  # whatever it was, the charts after this one are still drawn
            said = str(error) if isinstance(error, RecordError) else repr(error)
            damaged.append(f"{name}: {said}")
    if damaged:
        raise RecordError("; ".join(damaged))
    return drawn


def gpu_folders(data: Path) -> list[str]:
    """The GPUs with records in `data`, by slug."""
    return sorted(
        folder.name
        for folder in Path(data).glob("*")
        if folder.name != "reference" and any((folder / f"{name}.csv").is_file() for name in EXPERIMENTS)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.charts", description="Draw the charts from the records.")
    parser.add_argument("--gpu", metavar="SLUG", help="one GPU, such as nvidia-h200 (default: all)")
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        default=ROOT / "data",
        help="where the records are (default: data)",
    )
    parser.add_argument(
        "--figures",
        type=Path,
        default=ROOT / "figures",
        metavar="DIR",
        help="draw into DIR/<gpu> (default: figures)",
    )
    options = parser.parse_args(arguments)
    found = gpu_folders(options.data)
    if options.gpu is not None and options.gpu not in found:
        known = ", ".join(found) or "none"
        parser.error(f"--gpu {options.gpu}: no such records in {shown(options.data)}; there are: {known}")
    if not found:
        print(f"{shown(options.data)} has no records yet; on a GPU: python -m lab.run --preset full")
    status = 0
    for slug in [options.gpu] if options.gpu else found:
        figures = options.figures / slug
        try:
            drawn = redraw_all(Store(options.data, slug, writable=False), figures)
            print(f"{shown(figures)}: drawn: {', '.join(drawn) or 'none'}")
        except (RecordError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status
