"""What a first call costs: seconds to compile, in a fresh process with an empty cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lab.device import ROOT

pytestmark = pytest.mark.gpu

FIRST_CALLS = """
import json, sys, time
import lab, torch
from kernels.matmul import matmul
from kernels.norm import rms_norm

torch.ones(1, device="cuda") @ torch.ones(1, device="cuda")
torch.cuda.synchronize()
seconds = {}
for dtype, options, sizes in [
    (torch.bfloat16, {}, [(1, 4096, 4096), (64, 4096, 4096), (777, 28672, 4096)]),
    (torch.bfloat16, {}, [(8192, 4096, 14336), (16, 768, 8192)]),
    (torch.float16, {}, [(300, 6144, 4096)]),
    (torch.float32, {"precision": "ieee"}, [(8, 4096, 4096), (512, 4096, 4096)]),
    (torch.float32, {"precision": "tf32x3"}, [(8, 4096, 4096), (512, 4096, 4096)]),
]:
    for m, n, k in sizes:
        a, b = torch.zeros(m, k, device="cuda", dtype=dtype), torch.zeros(n, k, device="cuda", dtype=dtype)
        torch.cuda.synchronize()
        start = time.perf_counter()
        matmul(a, b.t(), **options)
        torch.cuda.synchronize()
        seconds[f"{dtype} {options} {m, n, k}"] = time.perf_counter() - start
print(json.dumps(seconds))
"""


def test_a_first_call_compiles_in_under_five_seconds(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALLS], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    seconds = json.loads(done.stdout.splitlines()[-1])
    assert len(seconds) == 10
    assert max(seconds.values()) < 5, seconds
