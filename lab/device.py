"""The machine at hand, the presets that size a run for it, and the commit a record names."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
"""The repository root."""

RECORDED_SLUG = "nvidia-h200"
"""The GPU whose records ship with the collection: what is drawn where there is no GPU."""


@dataclass(frozen=True)
class Device:
    """What a record says about the machine it was measured on."""

    name: str
    slug: str
    driver: str
    torch: str
    triton: str
    capability: tuple[int, int] | None
    sm_count: int
    l2_bytes: int
    total_bytes: int

    @property
    def is_gpu(self) -> bool:
        """Whether kernels are compiled for a GPU (otherwise Triton's interpreter runs them)."""
        return self.capability is not None

    @property
    def torch_device(self) -> torch.device:
        """Where the lessons put their tensors."""
        return torch.device("cuda" if self.is_gpu else "cpu")


@dataclass(frozen=True)
class Preset:
    """How much a run does: ``quick`` shows everything once, ``full`` measures every recorded point."""

    name: str
    warmup_ms: float
    measure_ms: float
    batch_sizes: tuple[int, ...]
    """Batch sizes of an invariance sweep."""


STRADDLING = (1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257,
              511, 512, 513, 1000, 1024, 1025, 2048, 4096)  # fmt: skip
"""Batch sizes around every power of two up to 1024, where thresholds in a kernel's configuration like to sit."""

PRESETS = {
    "quick": Preset("quick", warmup_ms=5, measure_ms=20, batch_sizes=(1, 2, 7, 16, 17, 33)),
    "full": Preset(
        "full",
        warmup_ms=20,
        measure_ms=60,
        batch_sizes=STRADDLING,
    ),
}


def slugify(name: str) -> str:
    """A folder name for a GPU: ``"NVIDIA H200"`` gives ``"nvidia-h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@lru_cache
def current_device() -> Device:
    """The GPU torch sees first; the CPU where there is none, or where TRITON_INTERPRET asks for the interpreter."""
    versions = {"torch": torch.__version__.split("+")[0], "triton": triton.__version__}
    if not torch.cuda.is_available() or triton.knobs.runtime.interpret:
        return Device("CPU (Triton interpreter)", "cpu", "none", **versions, capability=None, sm_count=0, l2_bytes=0,
                      total_bytes=0)  # fmt: skip
    p = torch.cuda.get_device_properties(0)
    return Device(
        p.name,
        slugify(p.name),
        _driver(),
        **versions,
        capability=(p.major, p.minor),
        sm_count=p.multi_processor_count,
        l2_bytes=p.L2_cache_size,
        total_bytes=p.total_memory,
    )


def resolve_preset(name: str, device: Device) -> Preset:
    """The preset called ``name``; ``"auto"`` is full on a GPU and quick elsewhere.

    Raises:
        ValueError: an unknown name, or ``"full"`` without a GPU.
    """
    if name == "auto":
        name = "full" if device.is_gpu else "quick"
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {['auto', *PRESETS]}, got preset={name!r}")
    if name == "full" and not device.is_gpu:
        raise ValueError("preset='full' measures on a GPU and torch sees none here; use 'quick' or 'auto'")
    return PRESETS[name]


@lru_cache
def commit() -> str:
    """Commit of the code: ``LAB_COMMIT`` if set, else git's HEAD, marked ``+dirty`` if the code is not HEAD's.

    Code is kernels/, lab/ and the lessons' code cells.
    """
    if os.environ.get("LAB_COMMIT"):
        return os.environ["LAB_COMMIT"]

    def git(*args: str) -> str:
        # A checkout that belongs to another user, as mounted into a container, is still this one.
        command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *args]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"  # an unpacked archive inside somebody's repository: that one's commit says nothing
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "kernels", "lab") or _lessons_changed(git)
        return head + ("+dirty" if changed else "")
    except (OSError, ValueError, subprocess.CalledProcessError):
        return "unknown"


def _lessons_changed(git: Callable[..., str]) -> bool:
    """Whether the code of a lesson differs from HEAD's; its outputs may, since recording rewrites them."""

    def code(text: str) -> list[str]:
        return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]

    names = git("diff", "--name-only", "--diff-filter=M", "HEAD", "--", "notebooks/*.ipynb").splitlines()
    return any(code(git("show", f"HEAD:{name}")) != code((ROOT / name).read_text("utf-8")) for name in names)
