"""What a first call costs: seconds to compile, in a fresh process with an empty cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from kernels import launch, matmul
from kernels.matmul import specialised_schedule, thin_schedule
from lab.device import ROOT
from lab.tune import launches_of

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


@pytest.mark.parametrize(
    "schedule", [thin_schedule(16, 64, 128), thin_schedule(16, 64, 128, split=True), specialised_schedule(64, 64)]
)
def test_all_ways_to_launch_share_what_is_compiled(schedule, monkeypatch):
    from kernels import matmul_hopper

    compiled, launches = set(), []

    def watched(kernel, grid, *args, **constants):
        launches.append(kernel)
        compiled.add(made := launch.launch(kernel, grid, *args, **constants))
        return made

    monkeypatch.setattr(matmul, "launch", watched)
    monkeypatch.setattr(matmul_hopper, "launch_kernel", watched)
    a, b = (torch.ones(rows, 4096, device="cuda", dtype=torch.bfloat16) for rows in (40, 768))
    for way in launches_of(schedule):
        matmul.matmul(a, b.t(), schedule=way)
    assert len(launches) == len(launches_of(schedule)) >= 2
    assert len(compiled) == 1
