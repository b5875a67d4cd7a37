"""The invariance checker: does a row keep its bits whatever batch it sits in?

Everything is compared through integer views: NaN equals itself, -0.0 differs from +0.0, and nothing is "close".
Batch invariance (same row, other batch) and run-to-run determinism (same call twice) are different properties
and are checked apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch

RowFn = Callable[[torch.Tensor], torch.Tensor]
"""Takes ``(M, ...)`` and returns ``(M, ...)``: row ``i`` of the result belongs to row ``i`` of the input."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of ``x`` as integers of the same size and shape."""
    return x.detach().contiguous().view(_INTEGERS[x.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


@dataclass(frozen=True)
class Difference:
    """How many rows of two equally shaped tensors differ in any bit, and where the first difference is."""

    rows: int
    rows_differing: int
    first: tuple[int, ...] | None = None
    got: float | None = None
    want: float | None = None
    got_bits: str | None = None
    want_bits: str | None = None

    def __str__(self) -> str:
        if not self.rows_differing:
            return f"all {self.rows} rows have the same bits"
        return (
            f"{self.rows_differing} of {self.rows} rows differ; first at {self.first}: "
            f"{self.got:.9g} ({self.got_bits}) instead of {self.want:.9g} ({self.want_bits})"
        )


def compare(got: torch.Tensor, want: torch.Tensor) -> Difference:
    """Compare two tensors of shape ``(rows, ...)`` bit by bit.

    Raises:
        ValueError: the shapes or dtypes differ, so there is nothing to compare.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        raise ValueError(f"got is {tuple(got.shape)} {got.dtype}, want is {tuple(want.shape)} {want.dtype}")
    rows = got.shape[0]
    differs = bits(got) != bits(want)
    if not differs.any():
        return Difference(rows, 0)
    first = tuple(differs.nonzero()[0].tolist())
    width = 2 * got.element_size()
    pattern = [f"0x{int(bits(x)[first]) & (16**width - 1):0{width}x}" for x in (got, want)]
    count = int(differs.reshape(rows, -1).any(1).sum())
    return Difference(rows, count, first, got[first].item(), want[first].item(), *pattern)


@dataclass
class Report:
    """One ``Difference`` per case tried. ``str()`` shows the failing ones."""

    cases: list[tuple[str, int, Difference]] = field(default_factory=list)
    """(what was done to the batch, its number of rows, what changed)."""
    verdict: str = "invariant"
    """What to call it if nothing changed."""

    @property
    def rows_differing(self) -> int:
        """Rows that changed bits, over all cases."""
        return sum(d.rows_differing for _, _, d in self.cases)

    @property
    def invariant(self) -> bool:
        """Whether there were cases, and no row changed a bit in any of them."""
        return bool(self.cases) and self.rows_differing == 0

    def frame(self) -> pd.DataFrame:
        """Columns case, rows (batch size), rows_differing."""
        columns = ["case", "rows", "rows_differing"]
        return pd.DataFrame([(c, m, d.rows_differing) for c, m, d in self.cases], columns=columns)

    def __str__(self) -> str:
        failing = [f"  {case}, {m} row{'s' * (m != 1)}: {d}" for case, m, d in self.cases if d.rows_differing]
        tried = f"{len(self.cases)} case{'s' * (len(self.cases) != 1)}"
        if self.invariant:
            return f"{self.verdict} ({tried})"
        if not self.cases:
            return "nothing was tried"
        more = [f"  ... and {len(failing) - 5} more"] * (len(failing) > 5)
        return "\n".join([f"NOT {self.verdict}: {len(failing)} of {tried} differ", *failing[:5], *more])

    __repr__ = __str__


def check_prefixes(fn: RowFn, x: torch.Tensor, batch_sizes: Iterable[int]) -> Report:
    """Compare ``fn(x[:m])`` with the same rows of ``fn(x)`` for every batch size ``m`` up to ``len(x)``."""
    whole = fn(x).clone()  # it may be a buffer that the next call writes again
    report = Report()
    for m in sorted({m for m in batch_sizes if 1 <= m <= len(x)}):
        report.cases.append(("prefix", m, compare(fn(x[:m]), whole[:m])))
    return report


def check_planted(fn: RowFn, x: torch.Tensor, row: torch.Tensor, positions: Iterable[int]) -> Report:
    """Plant ``row`` at several positions among the strangers ``x``; compare with ``row`` computed alone."""
    alone = fn(row[None]).clone()
    report = Report()
    for position in positions:
        batch = x.clone()
        batch[position] = row
        report.cases.append((f"planted at {position}", len(x), compare(fn(batch)[position][None], alone)))
    return report


NEIGHBOURS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "neighbours x1000": lambda x: x * 1000,
    "neighbours inf": lambda x: torch.full_like(x, float("inf")),
    "neighbours -inf": lambda x: torch.full_like(x, float("-inf")),
    "neighbours NaN": lambda x: torch.full_like(x, float("nan")),
    "neighbours 0": torch.zeros_like,
}


def check_neighbours(fn: RowFn, x: torch.Tensor, positions: Iterable[int]) -> Report:
    """Keep one row of ``x`` and spoil all others (huge, infinite, NaN, zero): the row must not notice."""
    whole, positions = fn(x).clone(), list(positions)
    report = Report()
    for case, spoil in NEIGHBOURS.items():
        for position in positions:
            batch = spoil(x)
            batch[position] = x[position]
            report.cases.append((case, len(x), compare(fn(batch)[position][None], whole[position][None])))
    return report


def check_invariance(
    fn: RowFn, x: torch.Tensor, batch_sizes: Sequence[int], positions: Sequence[int] | None = None
) -> Report:
    """All three checks over the rows of ``x``: prefixes, a planted row, spoiled neighbours.

    Args:
        fn: the operator, as a function of its rows alone.
        x: ``(M, ...)`` with at least two rows.
        batch_sizes: prefixes to try; those above M are left out.
        positions: where the row under test sits; first, second, middle and last if not given.

    Raises:
        ValueError: ``x`` has fewer than two rows, so that there is no batch to vary.
    """
    m = len(x)
    if m < 2:
        raise ValueError(f"x must have at least two rows to vary the batch, got x.shape={tuple(x.shape)}")
    positions = sorted({0, 1, m // 2, m - 1}) if positions is None else list(positions)
    report = check_prefixes(fn, x, batch_sizes)
    report.cases += check_planted(fn, x.flip(0), x[m // 3], positions).cases
    report.cases += check_neighbours(fn, x, positions).cases
    return report


def check_run_to_run(fn: Callable[[], torch.Tensor], runs: int = 10) -> Report:
    """Call ``fn`` again and again on the same inputs: run-to-run determinism, which is not batch invariance."""
    first = fn().clone()
    report = Report(verdict="deterministic")
    for run in range(1, runs):
        report.cases.append((f"run {run}", len(first), compare(fn(), first)))
    return report


def distinct_results(fn: Callable[..., torch.Tensor], schedules: Iterable) -> dict[bytes, list]:
    """Group schedules by the bits of ``fn(schedule)``: one group means that the schedule is free."""
    groups: dict[bytes, list] = {}
    for schedule in schedules:
        groups.setdefault(bits(fn(schedule)).cpu().numpy().tobytes(), []).append(schedule)
    return groups
