"""The few things every lesson does: see where it runs, keep its store at hand, show a source, test an exercise."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from IPython import get_ipython
from IPython.display import Markdown, display
from tqdm import tqdm

from lab import records
from lab.device import RECORDED_SLUG, ROOT, Device, Preset, current_device, resolve_preset


@dataclass(frozen=True)
class Here:
    """Where a lesson runs and where its numbers go.

    On a GPU the full preset measures into ``data/<gpu-slug>/`` and draws into ``figures/<gpu-slug>/``; the quick
    one into ``build/quick/``, so that a short look never mixes with records. Without a GPU the store holds the
    recorded GPU's points, read-only.
    """

    device: Device
    preset: Preset
    store: records.Store
    figures: Path

    @property
    def is_gpu(self) -> bool:
        """Whether kernels run on a GPU here (otherwise in Triton's interpreter)."""
        return self.device.is_gpu

    @property
    def full(self) -> bool:
        """Whether every recorded point is measured."""
        return self.preset.name == "full"

    @property
    def torch_device(self) -> torch.device:
        """Where the lesson puts its tensors."""
        return self.device.torch_device

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU; float16 in the interpreter, whose bfloat16 arithmetic is not the GPU's."""
        return torch.bfloat16 if self.is_gpu else torch.float16

    @property
    def banner(self) -> str:
        """One paragraph of Markdown: what runs where, and where the charts come from."""
        versions = f"torch {self.device.torch}, Triton {self.device.triton}"
        if self.is_gpu:
            return (
                f"**Running on {self.device.name}** ({versions}), preset `{self.preset.name}`. "
                f"Everything below is measured here and now; records go to `{_shown(self.store.folder)}`."
            )
        return (
            f"**No GPU here**: kernels run in Triton's interpreter on small sizes ({versions}), which shows what "
            f"they compute, never how fast. Charts are redrawn from the records in `{_shown(self.store.folder)}`, "
            "each naming its GPU and date."
        )

    def _repr_markdown_(self) -> str:
        return self.banner

    def chart(self, name: str) -> object:
        """Draw the chart called ``name`` from the store, save it, and return the figure; says what is missing."""
        from lab import charts  # matplotlib takes a second to import, and not every lesson draws

        return charts.draw(name, self.store, self.figures)

    def progress(self, points: Iterable, name: str) -> Iterable:
        """``points``, counted in one line of output while a GPU measures them."""
        bar = "{desc}: {n_fmt} of {total_fmt} points, {elapsed}"
        return tqdm(points, desc=name, bar_format=bar, file=sys.stdout, mininterval=1, disable=not self.is_gpu)

    def record(self, experiment: str, rows: list[dict]) -> None:
        """Append measured rows to the store of the GPU at hand."""
        self.store.append(experiment, rows, self.device)


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def start(preset: str = "auto") -> Here:
    """Look at the machine and return what a lesson needs.

    Raises:
        ValueError: an unknown preset, or ``"full"`` without a GPU.
    """
    device = current_device()
    chosen = resolve_preset(preset, device)
    _show_small_pictures()
    if not device.is_gpu:
        store = records.Store(ROOT / "data", RECORDED_SLUG, writable=False)
        return Here(device, chosen, store, ROOT / "figures" / RECORDED_SLUG)
    base = ROOT if chosen.name == "full" else ROOT / "build" / "quick"
    return Here(device, chosen, records.Store(base / "data", device.slug), base / "figures" / device.slug)


def _show_small_pictures() -> None:
    """In a notebook, store pictures with 256 colours: kept in the file, each of them is read at every opening."""
    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return
    import matplotlib_inline.backend_inline  # noqa: F401  first: on loading it installs its own formatter
    from matplotlib.figure import Figure

    from lab.charts import small_png

    def picture(figure: Figure) -> bytes:
        return small_png(figure, dpi=figure.dpi, bbox_inches="tight")

    shell.display_formatter.formatters["image/png"].for_type(Figure, picture)


def show_source(obj: object) -> Markdown:
    """The source of a function, class or Triton kernel, read from its file."""
    return Markdown(f"```python\n{inspect.getsource(getattr(obj, 'fn', obj)).rstrip()}\n```")


def exercise(solution: Callable, check: Callable[[Callable], None]) -> None:
    """Run ``check(solution)`` and say how it went; a stub that raises NotImplementedError is simply not solved yet.

    ``check`` raises AssertionError with a sentence about what is wrong.
    """
    try:
        check(solution)
    except NotImplementedError:
        verdict = f"`{solution.__name__}`: not solved yet"
    except AssertionError as wrong:
        verdict = f"`{solution.__name__}`: not right yet. {wrong}"
    else:
        verdict = f"`{solution.__name__}`: passed"
    display(Markdown(verdict))
