"""Batch-invariant GPU kernels in Triton: one reduction tree, many schedules."""

import os

import torch

# Triton reads this when a kernel is defined, so it must be set before the first kernel file is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

__version__ = "0.1.0"
