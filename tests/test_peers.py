"""The peers that need PyTorch's settings changed leave them as they were."""

from __future__ import annotations

import pytest
import torch

from lab import peers


@pytest.fixture
def library(monkeypatch) -> list[str]:
    """The library that is preferred, as the only entry; a torch without CUDA knows but one."""
    chosen = ["default"]

    def preferred(backend: str | None = None) -> str:
        chosen[:] = [backend or chosen[0]]
        return chosen[0]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    return chosen


def reductions() -> list[bool | None]:
    names = [name + more for name in peers.REDUCTIONS for more in ("", "_split_k")]
    return [getattr(torch.backends.cuda.matmul, name, None) for name in names]


def test_mm_without_split_k_asks_for_it_and_puts_every_setting_back(library, monkeypatch):
    before, seen = reductions(), []
    monkeypatch.setattr(peers.torch, "mm", lambda a, b: seen.append((library[0], reductions())) or a @ b)
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert torch.equal(peers.mm_without_split_k(a, b), a @ b)
    assert seen == [("cublaslt", [False] * 4)]
    assert (library, reductions()) == (["default"], before)


def test_mm_without_split_k_puts_settings_back_after_an_error(library):
    before = reductions()
    with pytest.raises(RuntimeError):
        peers.mm_without_split_k(torch.randn(3, 4), torch.randn(3, 4))
    assert (library, reductions()) == (["default"], before)
