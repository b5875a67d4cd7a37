"""Every kernel compiles for GPUs that are not here, with few spills, within the shared memory of each."""

import json
import os
import subprocess
import sys

import pytest

from lab.device import ROOT

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MOST_STACK = 1024  # bytes a thread; the most today are 792, in a 128 x 128 matmul tile for GPUs without TMA
CONSUMER_BYTES = 99 * 1024  # Nvidia's 8.6, 8.9 and 12.0: what runs without TMA must fit there too


def probe(what: str) -> list[dict]:
    command = [sys.executable, "tests/compile_probe.py", what]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module", params=SHARED_BYTES)
def compiled(request):
    return request.param, probe(request.param)


def test_all_families_compile(compiled):
    _, kernels = compiled
    families = {kernel["kernel"].split()[0] for kernel in kernels}
    eight_bit = {"w8a8", "per_token_quant", "rms_norm_per_token_quant", "silu_mul_per_token_quant", "silu_mul"}
    assert families == {"rms_norm", "layer_norm", "rope", "matmul", "addmm", "attention"} | eight_bit


def test_few_registers_are_spilled(compiled):
    """None on AMD; on Nvidia the stack, which also holds what is spilled outside of loops, stays small."""
    _, kernels = compiled
    assert not [kernel for kernel in kernels if kernel.get("spills", 0) or kernel.get("stack", 0) > MOST_STACK]


def test_launches_that_may_overlap_wait_before_they_touch_memory(compiled):
    """From Hopper on, all of them; before, there is nothing to wait for."""
    target, kernels = compiled
    waiting = [kernel["kernel"] for kernel in kernels if kernel.get("waits_first")]
    assert waiting == ([kernel["kernel"] for kernel in kernels] if target in ("sm_90", "sm_100") else [])


def test_scales_are_fused_alike_in_every_tile(compiled):
    """``fma(total, alpha, beta * bias)``, as written; left to itself the compiler takes the other in some tiles."""
    _, kernels = compiled
    fused = [kernel["fused"] for kernel in kernels if "fused" in kernel]
    assert all(names == ["alpha"] for names in fused)


def test_instructions_are_as_wide_as_the_schedule_says(compiled):
    """One for all parts of a wide tile, or one for each part, and 208 among them."""
    target, kernels = compiled
    found = [(kernel["widths"], kernel["widths_asked"]) for kernel in kernels if "widths" in kernel]
    assert all(widths == asked for widths, asked in found)
    assert any(208 in widths for widths, _ in found) == bool(found) == (target == "sm_90")


def test_the_ring_of_a_tile_with_a_tail_begins_shared_memory(compiled):
    """The kernel takes it to be there, since Gluon does not say where a buffer is. The next is right behind it."""
    target, kernels = compiled
    found = [kernel["rings_accepted"] for kernel in kernels if "rings_accepted" in kernel]
    assert all(accepted == [True, False] for accepted in found) and bool(found) == (target == "sm_90")


def test_a_missing_and_a_late_wait_are_seen():
    found = {kernel["kernel"]: kernel["waits_first"] for kernel in probe("controls")}
    assert found == {
        "_never_waits": False,
        "_waits_late": False,
        "_waits": True,
        "_waits_once_it_has_fetched": True,
    }


def test_shared_memory_fits(compiled):
    target, kernels = compiled
    assert not [kernel for kernel in kernels if kernel["shared"] > SHARED_BYTES[target]]


def test_what_needs_no_tma_fits_a_consumer_gpu(compiled):
    _, kernels = compiled
    larger = ("persistent=True", "specialised=True", "for 163 KB", "for 227 KB")
    plain = [kernel for kernel in kernels if not any(word in kernel["kernel"] for word in larger)]
    assert plain
    assert not [kernel for kernel in plain if kernel["shared"] > CONSUMER_BYTES]
