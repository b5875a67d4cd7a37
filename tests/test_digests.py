"""Digests of fixed products: the same operands give the same, another bit another."""

from __future__ import annotations

import hashlib

import pytest
import torch

from lab import digests

CPU = torch.device("cpu")


def test_a_digest_is_that_of_the_bytes_row_after_row():
    x = torch.arange(6, dtype=torch.float32).view(2, 3)
    assert digests.digest(x) == hashlib.sha256(x.numpy().tobytes()).hexdigest()
    assert digests.digest(x.t().contiguous().t()) == digests.digest(x)
    assert digests.digest(-x * 0) != digests.digest(x * 0), "-0 and +0 are equal, but not the same"


def test_every_shape_comes_with_every_number_of_rows_and_twice_the_same():
    options = {"seed": 3, "device": CPU, "dtype": "float32", "shapes": [(8, 16), (5, 7)], "rows": (1, 4)}
    found = list(digests.digests(torch.mm, **options))
    assert [(row["m"], row["n"], row["k"]) for row in found] == [(1, 8, 16), (4, 8, 16), (1, 5, 7), (4, 5, 7)]
    assert found == list(digests.digests(torch.mm, **options))
    other = list(digests.digests(torch.mm, **options | {"seed": 4}))
    assert all(a["digest"] != b["digest"] for a, b in zip(found, other, strict=True))


def test_the_shapes_are_those_of_one_model_whole_and_divided():
    assert len(digests.SHAPES) == len(set(digests.SHAPES)) == 16
    assert {(28672, 4096), (3584, 4096), (4096, 1792)} <= set(digests.SHAPES)


def test_processes_that_fail_say_why(monkeypatch):
    monkeypatch.setattr(digests.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit status 1"):
        digests.run_apart(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="computes everything on a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert digests.main([]) == 1
    assert "needs a GPU" in capsys.readouterr().err
