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
