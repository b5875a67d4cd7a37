"""Tables of schedules that measurement found fastest, one JSON file per GPU in ``kernels/tuned/``.

A table can make a kernel faster or slower, never change a bit: it names schedules, and schedules are free.
``lab/tune.py`` writes the tables; a GPU without one runs on the defaults. A table has the ``schedules`` that occur in
it and, for every shape of a weight, which of them (counted from 0) serves batches up to so many rows.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent / "tuned"


def path_of(gpu: str) -> Path:
    """Where the table of the GPU called ``gpu`` lives: ``"NVIDIA H200"`` in ``nvidia-h200.json``."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@lru_cache
def _table(gpu: str) -> dict[tuple[int, int], tuple[list[int], list[dict]]]:
    path = path_of(gpu)
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text())
        return {
            (shape["n"], shape["k"]): (
                [int(m) for m in shape["rows"]],
                [table["schedules"][index] for index in shape["rows"].values()],
            )
            for shape in table["shapes"]
            if shape["rows"]
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of schedules ({error!r}): tune again, or delete it") from error


def find(gpu: str, n: int, k: int, m: int) -> dict | None:
    """Fields of the schedule tuned for a weight (n, k) and the first tabulated number of rows at or above ``m``.

    Beyond the table its last row counts; ``None`` if the GPU or the shape was not tuned.

    Raises:
        ValueError: the GPU's file is damaged.
    """
    if (n, k) not in _table(gpu):
        return None
    rows, schedules = _table(gpu)[n, k]
    return schedules[min(bisect_left(rows, m), len(rows) - 1)]
