"""Timing without a GPU: who runs when."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch

from lab import timing
from lab.device import PRESETS


class Event:
    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self, stream): ...

    def synchronize(self): ...

    def elapsed_time(self, end) -> float:
        return 1.0


def test_contenders_take_turns_and_nobody_always_follows_the_same_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    ran = []
    runs = {name: lambda name=name: ran.append(name) for name in "abcd"}
    samples = timing._take_turns(runs, None, PRESETS["quick"])
    rounds = [ran[i : i + 4] for i in range(0, len(ran), 4)]
    assert all(sorted(one) == sorted(runs) for one in rounds)
    assert len(rounds) >= 10
    assert {len(ms) for ms in samples.values()} == {len(samples["a"])}
    before_d = Counter(first for first, then in pairwise(ran) if then == "d")
    assert set(before_d) >= {"a", "b", "c"}


def test_a_kernel_is_known_by_its_short_name():
    names = {
        "_rms_norm_kernel": "_rms_norm_kernel",
        "nvjet_tst_128x64_64x8_2x1_v_bz_TNT": "nvjet_tst_128x64_64x8_2x1_v_bz_TNT",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, true>(int, float)": (
            "vectorized_layer_norm_kernel"
        ),
        "void cutlass::Kernel2<cutlass_80_tensorop<bf16>>(Params)": "Kernel2",
        "Memset (Device)": "Memset",
    }
    assert {name: timing.short_name(name) for name in names} == names
