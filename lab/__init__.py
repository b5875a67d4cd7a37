"""What the lessons share: the machine, the checker, the timer, records, charts, peers and the headless runner."""

import warnings

import kernels as _kernels  # noqa: F401  first: it decides whether Triton compiles or interprets kernels
from lab.lesson import exercise, show_source, start

# Checks feed inf and NaN on purpose; in the interpreter NumPy does the arithmetic and would warn about each.
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")

__all__ = ["exercise", "show_source", "start"]
