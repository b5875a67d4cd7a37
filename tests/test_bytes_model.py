"""The small model of bytes: its text, that it learns, and that its file brings back what was saved."""

from dataclasses import replace

import pytest
import torch

from lab import bytes_model
from lab.checkpoint import CheckpointError, named_tensors
from lab.llama import llama_ref, random_weights

SMALL = replace(bytes_model.CONFIG, name="small", hidden=32, layers=1, heads_q=2, heads_kv=1, head_dim=32, ffn=48)


def test_the_model_fits_into_a_file_of_8_megabytes():
    assert 2 * bytes_model.CONFIG.parameters < 7_500_000


def test_the_library_is_read_in_order_and_without_its_tests(tmp_path):
    for name in ("b.py", "a.py", "test/c.py", "site-packages/d.py", "sub/e.py", "empty.py", "f.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if name == "empty.py" else name)
    assert bytes_model.read_library(tmp_path) == [b"a.py", b"b.py", b"sub/e.py"]
    with pytest.raises(ValueError, match="holds no Python sources"):
        bytes_model.read_library(tmp_path / "test" / "nothing")


def test_text_held_out_is_not_trained_on():
    sources = [bytes([65 + i]) * 3 for i in range(22)]
    train, held_out = (bytes(part.tolist()) for part in bytes_model.split(sources))
    assert held_out == b"AAA\0UUU"
    assert train.split(b"\0") == [s for i, s in enumerate(sources) if i not in (0, 20)]


def test_tokens_are_bytes():
    assert bytes_model.encode("aé") == [97, 0xC3, 0xA9]
    assert bytes_model.decode([97, 0xC3, 0xA9, 0xFF]) == "aé\ufffd"


def test_training_learns_a_text_that_repeats():
    text = torch.frombuffer(bytearray(b"abcdefgh" * 40), dtype=torch.uint8)
    sizes = {"config": SMALL, "batch": 4, "length": 32, "rate": 1e-2, "device": "cpu"}
    weights, losses = bytes_model.train(text, 60, **sizes)
    assert losses[0] > 7 and losses[-1] < 2
    assert weights.embed.dtype == torch.bfloat16 and not weights.embed.requires_grad
    assert bytes_model.bits_per_byte(SMALL, weights, text, length=32) < 2
    again, _ = bytes_model.train(text, 60, **sizes)
    assert torch.equal(again.embed, weights.embed), "the seed decides"


@pytest.mark.parametrize(("length", "steps"), [(33, 5), (100, 0)])
def test_what_cannot_be_trained_is_refused(length, steps):
    with pytest.raises(ValueError, match="steps must be positive and text longer than 32"):
        bytes_model.train(torch.zeros(length, dtype=torch.uint8), steps, config=SMALL, length=32, device="cpu")


def test_a_saved_model_comes_back_with_its_facts(tmp_path):
    weights = random_weights(SMALL, 0, torch.bfloat16, "cpu")
    path = tmp_path / "data" / bytes_model.FILE
    bytes_model.save(path, SMALL, weights, {"gpu": "NVIDIA H200", "steps": "60"})
    assert [file.name for file in path.parent.iterdir()] == [bytes_model.FILE]
    config, loaded, facts = bytes_model.load(path, torch.bfloat16, "cpu")
    assert config == SMALL and facts == {"gpu": "NVIDIA H200", "steps": "60"}
    for (name, got), (_, want) in zip(named_tensors(SMALL, loaded), named_tensors(SMALL, weights), strict=True):
        assert torch.equal(got, want), name
    config, nearest, note = bytes_model.load_nearest([tmp_path, path.parent], torch.float32, "cpu")
    assert config == SMALL and nearest.embed.dtype == torch.float32 and "gpu: NVIDIA H200" in note


def test_without_a_file_the_weights_are_random_and_it_says_so(tmp_path):
    config, weights, note = bytes_model.load_nearest([tmp_path], torch.float32, "cpu")
    assert config == bytes_model.CONFIG and "random" in note
    assert llama_ref(config, weights, torch.tensor([[1, 2, 3]])).isfinite().all()


def test_a_damaged_or_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"bytes_model\.safetensors is not there yet: lesson 10 trains it"):
        bytes_model.load(tmp_path / bytes_model.FILE, torch.float32, "cpu")
    path = tmp_path / bytes_model.FILE
    bytes_model.save(path, SMALL, random_weights(SMALL, 0, torch.bfloat16, "cpu"), {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        bytes_model.load(path, torch.float32, "cpu")
