"""Measured points, kept as tidy CSV: one folder per GPU, one file per experiment, one row per point.

`data/<gpu-slug>/<experiment>.csv` holds the experiment's key columns, its values, and where each row comes
from (GPU, driver, torch, triton, commit, time in UTC). Measuring only appends; drawing only reads. A point
that is measured again gets a new row, and `Store.load` returns the newest row of each point.

Units: `*_ms` are milliseconds, `bytes` are bytes (in `bandwidth` those read plus those written), `error` is relative;
a whole number is a count.
Whatever is wrong with a record raises `RecordError`, which names the file and the line, or the argument.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import math
import operator
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lab.device import ROOT, slugify

if TYPE_CHECKING:
    from lab.device import Device

TIMES = ("median_ms", "p20_ms", "p80_ms")
PROVENANCE = ("gpu", "driver", "torch", "triton", "commit", "measured_at")

# Columns of whole numbers; `*_ms` and `*_per_s` are positive decimals, and these may be zero; the rest is text.
MAY_BE_ZERO = frozenset({"error", "largest_difference", "kl", "reading"})
COUNTS = frozenset(
    {"hidden", "residual", "m", "n", "k", "tp", "bytes", "rows", "rows_differing", "settings", "results"}
    | {"passed", "failed", "skipped", "batch", "heads_q", "heads_kv", "head_dim", "q_len", "kv_len", "causal"}
    | {"page_size", "tokens", "cuda_graph", "requests", "prompts", "completions", "unique_completions"}
    | {"first_divergence", "promote_k", "migrated", "launches", "program", "sm"}
)

LOCK_SECONDS = 60.0


class RecordError(ValueError):
    """A record that cannot be written, or cannot be trusted as it was read."""


class MissingRecord(RecordError):
    """Nothing has been measured yet; the message says what would measure it."""


@dataclass(frozen=True)
class Experiment:
    """What one file holds: `keys` name a point, `values` are what was measured there.

    `lesson` is the lesson that measures it on a GPU, None if the tests do.
    """

    name: str
    keys: tuple[str, ...]
    values: tuple[str, ...] = TIMES
    lesson: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return self.keys + self.values + PROVENANCE

    @property
    def how(self) -> str:
        """The command that measures it."""
        if self.lesson is None:
            return "the tests measure it, on a GPU: make test ARGS=--record-tests"
        return f"lesson {self.lesson} measures it, on a GPU: python -m lab.run {self.lesson} --preset full"


def _table(*experiments: Experiment) -> dict[str, Experiment]:
    return {experiment.name: experiment for experiment in experiments}


EXPERIMENTS = _table(
    Experiment("rms_norm", ("op", "impl", "dtype", "hidden", "residual", "m", "timing"), lesson="02"),
    Experiment("matmul", ("op", "impl", "dtype", "model", "layer", "tp", "m", "n", "k"), lesson="03"),
    Experiment("bandwidth", ("op", "impl", "dtype", "bytes"), lesson="02"),
    Experiment("invariance", ("op", "impl", "dtype", "case", "rows"), ("rows_differing",), lesson="00"),
    Experiment("freedom", ("op", "dtype", "precision", "knob"), ("settings", "results"), lesson="04"),
    Experiment("random_shapes", ("op", "impl", "dtype", "m", "n", "k"), ("rows", "rows_differing"), lesson="04"),
    Experiment(
        "attention",
        (
            "op",
            "impl",
            "dtype",
            "phase",
            "batch",
            "heads_q",
            "heads_kv",
            "head_dim",
            "q_len",
            "kv_len",
            "causal",
            "page_size",
        ),
        lesson="06",
    ),
    Experiment("w8a8", ("op", "impl", "dtype", "model", "layer", "scheme", "m", "n", "k"), lesson="08"),
    Experiment("w8a8_error", ("op", "impl", "dtype", "case", "promote_k", "k"), ("error",), lesson="08"),
    Experiment("w8a8_model", ("op", "impl", "model", "precision", "batch"), lesson="08"),
    Experiment("w8a8_accuracy", ("op", "model", "precision", "migrated"), ("error",), lesson="08"),
    Experiment("forward_latency", ("op", "impl", "dtype", "model", "tokens", "cuda_graph"), lesson="09"),
    Experiment(
        "pass_kernels", ("op", "impl", "dtype", "model", "tokens", "kernel"), ("launches", "total_ms"), lesson="09"
    ),
    Experiment("memory", ("op", "impl", "dtype", "model", "case"), ("bytes",), lesson="09"),
    Experiment(
        "generation",
        ("op", "impl", "dtype", "model", "case", "requests", "tokens"),
        ("prompts", "completions", "unique_completions", "first_divergence", "tokens_per_s"),
        lesson="10",
    ),
    Experiment(
        "trainer_sampler",
        ("op", "impl", "dtype", "model", "tokens"),
        ("rows_differing", "largest_difference", "kl"),
        lesson="11",
    ),
    Experiment("digests", ("op", "dtype", "precision", "case", "m", "n", "k"), ("digest",), lesson="05"),
    Experiment("counters", ("op", "impl", "dtype", "m", "n", "k", "counter"), ("reading",), lesson="05"),
    Experiment("placement", ("op", "case", "program"), ("sm",), lesson="05"),
    Experiment("tests", ("suite",), ("passed", "failed", "skipped")),
)


def experiment(name: str) -> Experiment:
    """The experiment called `name`; RecordError with the list of those that exist if there is none."""
    try:
        return EXPERIMENTS[name]
    except KeyError:
        known = ", ".join(EXPERIMENTS)
        raise RecordError(f"experiment = {name!r} is unknown; there are: {known}") from None


# ---------------------------------------------------------------------------------------------- values


def _is_decimal(column: str) -> bool:
    return column.endswith(("_ms", "_per_s")) or column in MAY_BE_ZERO


def _number(column: str, text: str) -> int | float:
    """The number in a numeric column; ValueError saying what it should have been."""
    if column in COUNTS:
        if not re.fullmatch(r"\d+", text):
            raise ValueError("should be a whole number, zero or more")
        return int(text)
    value = float(text)
    if column in MAY_BE_ZERO:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError("should be a finite number, zero or more")
    elif not (math.isfinite(value) and value > 0):
        raise ValueError("should be a finite number above zero")
    return value


def _to_text(column: str, value: Any) -> str:
    """One cell as it is written; RecordError naming the column and the value if it does not fit there."""
    try:
        if column in COUNTS:
            text = str(int(operator.index(value)))  # refuses 3.0: a count that is a float was computed wrong
        elif _is_decimal(column):
            text = format(float(value), ".6g")  # six digits are far below the noise of any timer here
        elif not isinstance(value, str) or not value.strip():
            raise TypeError("should be text that is not empty")
        else:
            text = value
        _check_text(column, text)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{column} = {value!r}: {error}") from None
    return text


def _check_text(column: str, text: str) -> None:
    if column in COUNTS or _is_decimal(column):
        _number(column, text)
    elif not text.strip():
        raise ValueError("should not be empty")
    elif not text.isprintable():
        raise ValueError("should be one line of printable text")  # one row is one line
    elif column == "measured_at":
        datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")


def _check_row(cells: Mapping[str, str], slug: str) -> None:
    """What has to hold between the cells of one row; ValueError if it does not."""
    for column, text in cells.items():
        try:
            _check_text(column, text)
        except ValueError as error:
            raise ValueError(f"{column} = {text!r}: {error}") from None
    if slugify(cells["gpu"]) != slug:
        raise ValueError(f"gpu = {cells['gpu']!r}, but this is the data folder for {slug!r}")
    if "median_ms" in cells:
        low, median, high = (float(cells[name]) for name in ("p20_ms", "median_ms", "p80_ms"))
        if not low <= median <= high:
            raise ValueError(f"median_ms = {median:g} is not between p20_ms = {low:g} and p80_ms = {high:g}")
    if "rows_differing" in cells:
        compared = "rows" if "rows" in cells else "tokens"
        if int(cells["rows_differing"]) > int(cells[compared]):
            raise ValueError(f"rows_differing = {cells['rows_differing']} of only {compared} = {cells[compared]}")
    if "results" in cells and not 1 <= int(cells["results"]) <= int(cells["settings"]):
        raise ValueError(f"results = {cells['results']} of settings = {cells['settings']}: should be 1 to as many")


# --------------------------------------------------------------------------------------------- reading


def shown(path: Path) -> str:
    """A path as messages name it: from the repository root when it lies inside, so that it says no more."""
    try:
        return path.resolve().relative_to(ROOT).as_posix()
    except ValueError:
        return str(path)


def _decode(path: Path, raw: bytes) -> str:
    if not raw:
        raise RecordError(f"{shown(path)}, line 1: the file is empty; the header is missing")
    if not raw.endswith(b"\n"):
        line = raw.count(b"\n") + 1
        raise RecordError(f"{shown(path)}, line {line}: cut off, the line has no end; remove it to go on")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecordError(f"{shown(path)}, line {line}: not UTF-8 text") from None


_sound: dict[tuple[Path, str], tuple[int, int, bytes]] = {}
"""Of record files (path, slug) that were checked: how many lines, how many bytes, and their SHA-256.

Files only grow, and a lesson adds to one hundreds of times: what was checked once need not be again.
"""


def _checked(path: Path, raw: bytes, kind: Experiment, slug: str) -> str:
    """The text of a record file after every line of it was checked; RecordError with file and line."""
    text = _decode(path, raw)
    lines, size, digest = _sound.get((path, slug), (0, 0, b""))
    if hashlib.sha256(raw[:size]).digest() != digest:
        lines = 0
    line = 0
    try:
        # Line by line: a stray quote must not swallow the lines after it.
        for line, content in enumerate(text.split("\n")[:-1], start=1):
            if line <= lines:
                continue
            cells = next(csv.reader([content.removesuffix("\r")], strict=True), [])
            if line == 1:
                if tuple(cells) != kind.columns:
                    raise ValueError(f"header {','.join(cells)!r}, should be {','.join(kind.columns)!r}")
            elif len(cells) != len(kind.columns):
                raise ValueError(f"{len(cells)} columns, should be {len(kind.columns)}")
            else:
                _check_row(dict(zip(kind.columns, cells, strict=True)), slug)
    except (ValueError, csv.Error) as error:
        raise RecordError(f"{shown(path)}, line {line}: {error}") from None
    _sound[path, slug] = line, len(raw), hashlib.sha256(raw).digest()
    return text


def _frame(text: str, kind: Experiment) -> pd.DataFrame:
    # keep_default_na: a case that is called "NA" is a name, not a gap.
    frame = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    for column in kind.columns:
        if column in COUNTS:
            frame[column] = pd.Series([int(cell) for cell in frame[column]], dtype="int64")
        elif _is_decimal(column):  # Python's own conversion: pandas' default may be off in the last digit
            frame[column] = pd.Series([float(cell) for cell in frame[column]], dtype="float64")
    return frame


def _newest(frame: pd.DataFrame, kind: Experiment) -> pd.DataFrame:
    """The newest row of each point, in the order of the file; of equally old rows the later one."""
    by_age = frame.sort_values("measured_at", kind="stable")
    return by_age.drop_duplicates(list(kind.keys), keep="last").sort_index().reset_index(drop=True)


def reference(name: str) -> pd.DataFrame:
    """A published chart read off its picture: columns series, tokens, value (unit: data/README.md)."""
    folder = ROOT / "data" / "reference"
    path = folder / f"{name}.csv"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in folder.glob("*.csv")))
        raise RecordError(f"name = {name!r}: there is no {shown(path)}; there are: {known or 'none'}")
    return pd.read_csv(path, comment="#", dtype={"series": str, "tokens": "int64", "value": "float64"})


# --------------------------------------------------------------------------------------------- writing


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder for one writer. The kernel frees the lock of a process that dies."""
    with open(folder / ".lock", "w") as lock:
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise RecordError(f"{shown(folder)} is locked by another process") from None
                time.sleep(0.002)
        yield  # closing the file frees the lock


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces ``path`` as a whole: a reader, or a crash, sees all of the old file or all of the new one."""
    mode = path.stat().st_mode if path.exists() else 0o644
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content.encode("utf-8") if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, mode & 0o777)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, has to reach the disk
    finally:
        os.close(folder)


def _csv(rows: Sequence[Sequence[str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode("utf-8")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ----------------------------------------------------------------------------------------------- store


class Store:
    """The records of one GPU: the folder `root/slug`, for instance data/nvidia-h200."""

    def __init__(self, root: Path, slug: str, writable: bool = True) -> None:
        if not slug or slugify(slug) != slug:
            raise RecordError(f"slug = {slug!r} is no folder name of a GPU, such as 'nvidia-h200'")
        self.slug = slug
        self.folder = Path(root) / slug
        self.writable = writable

    def __repr__(self) -> str:
        return f"Store({shown(self.folder)}{'' if self.writable else ', read-only'})"

    def path(self, name: str) -> Path:
        return self.folder / f"{experiment(name).name}.csv"

    def has(self, name: str) -> bool:
        """Whether anything was recorded for this experiment (it may still turn out to be unreadable)."""
        return self.path(name).is_file()

    def load(self, name: str, newest: bool = True) -> pd.DataFrame:
        """The rows of an experiment, with one row per point (the newest) unless `newest` is False.

        MissingRecord if there is no file; RecordError with file and line if any line of it is damaged.
        """
        kind, path = experiment(name), self.path(name)
        if not path.is_file():
            raise MissingRecord(f"{shown(path)} does not exist yet: {kind.how}")
        frame = _frame(_checked(path, path.read_bytes(), kind, self.slug), kind)
        return _newest(frame, kind) if newest else frame

    def append(
        self,
        name: str,
        rows: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        device: Device,
        commit: str | None = None,
    ) -> None:
        """Adds measured rows (keys and values; the rest is filled in), all of them or none.

        What was recorded before is never lost: the file is replaced as a whole, under a lock, once the new
        one is on the disk. RecordError, with nothing changed, for a device that is not this folder's GPU,
        missing or extra columns, a number that is not finite, a time that is not positive, and for a file
        that is damaged already.
        """
        kind = experiment(name)
        self._check_writable(device)
        rows = [rows] if isinstance(rows, Mapping) else list(rows)
        origin = self._origin(device, commit)
        lines = [self._line(row, origin, kind, index) for index, row in enumerate(rows)]
        if not lines:
            return
        path = self.path(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            old = path.read_bytes() if path.exists() else _csv([kind.columns])
            _checked(path, old, kind, self.slug)
            write_atomically(path, old + _csv(lines))

    def provenance(self, name: str, frame: pd.DataFrame | None = None) -> str:
        """Where the rows of `frame` (default: the newest of the experiment) come from, in one line."""
        return describe(self.load(name) if frame is None else frame)

    def _check_writable(self, device: Device) -> None:
        if not self.writable:
            raise RecordError(f"{shown(self.folder)} is open for reading only")
        if device.slug == "cpu":
            raise RecordError(f"device = {device.name!r}: what runs without a GPU is never recorded")
        if device.slug != self.slug or slugify(device.name) != self.slug:
            raise RecordError(f"device = {device.name!r}: {shown(self.folder)} is a data folder for another GPU")

    def _origin(self, device: Device, commit: str | None) -> dict[str, str]:
        if commit is None:
            from lab.device import commit as current_commit

            commit = current_commit()
        fields = {"gpu": device.name, "commit": commit, "measured_at": _now()}
        fields.update({name: getattr(device, name) or "none" for name in ("driver", "torch", "triton")})
        return fields

    def _line(self, row: Mapping[str, Any], origin: Mapping[str, str], kind: Experiment, index: int) -> list[str]:
        own = kind.keys + kind.values
        where = f"rows[{index}] for {kind.name}"
        missing = [column for column in own if column not in row]
        extra = [column for column in row if column not in own]
        if missing or extra:
            said = f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(extra) or 'none'}"
            raise RecordError(f"{where}: columns {said}; they should be {', '.join(own)}")
        try:
            cells = {column: _to_text(column, {**row, **origin}[column]) for column in kind.columns}
            _check_row(cells, self.slug)
        except ValueError as error:
            raise RecordError(f"{where}: {error}") from None
        return list(cells.values())


def describe(*frames: pd.DataFrame) -> str:
    """Where rows come from: "NVIDIA H200 · torch 2.11.0 · triton 3.6.0 · 2026-11-21 · commit 0a1b2c"."""
    rows = pd.concat([frame[list(PROVENANCE)] for frame in frames], ignore_index=True)
    if rows.empty:
        return "no rows"
    days = sorted({moment[:10] for moment in rows["measured_at"]})
    return " · ".join(
        [
            ", ".join(rows["gpu"].unique()),
            "torch " + ", ".join(sorted(rows["torch"].unique())),
            "triton " + ", ".join(sorted(rows["triton"].unique())),
            days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
            _commits(rows.sort_values("measured_at", kind="stable")["commit"].unique()),
        ]
    )


def _commits(commits: Sequence[str]) -> str:
    """Commits from the oldest measurement to the newest, in twelve digits, the middle ones only counted."""
    commits = [re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", commit) for commit in commits]
    if len(commits) == 1:
        return f"commit {commits[0]}"
    if len(commits) == 2:
        return f"commits {commits[0]}, {commits[1]}"
    return f"{len(commits)} commits, {commits[0]} to {commits[-1]}"
