"""A small language model of bytes, trained in about a minute on the Python standard library's own source.

Real text that is on every machine: `read_library` collects it, `train` fits a four-layer decoder to it, and `save`
writes the weights (under 8 MB) with everything that tells where they come from, so that `load` can generate with them
on a machine that could not train them.

Two trainings give two models: the source differs from one Python to the next, and gradients are summed by stock
operators, whose order nobody promises. Whoever compares completions compares those of one set of weights.
"""

from __future__ import annotations

import json
import math
import os
import sysconfig
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kernels.rope import RopeScaling
from lab.checkpoint import CheckpointError, Layer, LlamaConfig, Weights, empty_weights, named_tensors
from lab.llama import llama_ref, random_weights

CONFIG = LlamaConfig(
    "bytes",
    vocab=256,
    hidden=256,
    layers=4,
    heads_q=4,
    heads_kv=2,
    head_dim=64,
    ffn=768,
    rope_theta=10_000.0,
    max_positions=2048,
)
"""3.3 million weights."""

FILE = "bytes_model.safetensors"
"""Its name in the folder of a GPU's records."""

HELD_OUT = 20
"""One file in so many is kept from training, to measure on."""

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip", "__pycache__"}


# -------------------------------------------------------------------------------------------------- text


def read_library(folder: str | Path | None = None) -> list[bytes]:
    """The sources of the running Python's standard library, without its tests, in a fixed order.

    Raises:
        ValueError: the folder holds no sources.
    """
    folder = Path(folder or sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.rglob("*.py") if not LEFT_OUT & set(path.relative_to(folder).parts))
    sources = [content for path in paths if (content := path.read_bytes())]
    if not sources:
        raise ValueError(f"folder={folder.name!r} holds no Python sources to train on")
    return sources


def split(sources: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    """Text to train on and text held out, ``(bytes,)`` uint8 each; a zero byte stands between two files."""
    parts = ([s for i, s in enumerate(sources) if (i % HELD_OUT == 0) == held] for held in (False, True))
    train, held_out = (torch.frombuffer(bytearray(b"\0".join(part)), dtype=torch.uint8) for part in parts)
    return train, held_out


def encode(text: str) -> list[int]:
    """A token is a byte."""
    return list(text.encode())


def decode(tokens: list[int]) -> str:
    """The text of tokens; a byte that is no UTF-8 shows as a question mark in a box."""
    return bytes(tokens).decode(errors="replace")


# ---------------------------------------------------------------------------------------------- training


def _tensors(weights: Weights) -> list[torch.Tensor]:
    """Every tensor once."""
    found = [getattr(layer, f.name) for layer in weights.layers for f in fields(Layer)]
    return [weights.embed, weights.norm, weights.lm_head] + [x for x in found if x is not None]


def _windows(text: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """``length`` bytes and the one after them, from each start: (starts, length + 1) int64."""
    return text[starts[:, None] + torch.arange(length + 1, device=text.device)].long()


def _loss(config: LlamaConfig, weights: Weights, window: torch.Tensor) -> torch.Tensor:
    """Mean negative log-probability of each next byte, in nats. Products are bfloat16 on a GPU, sums fp32."""
    with torch.autocast("cuda", torch.bfloat16, enabled=window.is_cuda):
        logits = llama_ref(config, weights, window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


def train(
    text: torch.Tensor,
    steps: int,
    *,
    config: LlamaConfig = CONFIG,
    batch: int = 64,
    length: int = 512,
    rate: float = 2e-3,
    seed: int = 0,
    device: torch.device | str = "cuda",
) -> tuple[Weights, list[float]]:
    """Fit a model to ``text`` (uint8): AdamW, a short warm-up, then a cosine down to nothing.

    Args:
        steps, batch, length: each step takes ``batch`` windows of ``length`` bytes from random places.
        rate: highest learning rate.

    Returns:
        weights in bfloat16, and the loss of every 50th step in bits per byte.

    Raises:
        ValueError: a text shorter than one window, or no steps.
    """
    if len(text) < length + 2 or steps < 1:
        raise ValueError(f"steps must be positive and text longer than {length}, got {steps} and {len(text)} bytes")
    text = text.to(device)
    weights = random_weights(config, seed, torch.float32, device)
    tensors = [x.requires_grad_() for x in _tensors(weights)]
    groups = [
        {"params": [x for x in tensors if x.ndim == 2], "weight_decay": 0.1},
        {"params": [x for x in tensors if x.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=text.is_cuda)
    generator = torch.Generator(device).manual_seed(seed)
    losses = []
    for step in range(steps):
        warm, done = min(1.0, (step + 1) / (0.03 * steps + 1)), step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * done))
        starts = torch.randint(len(text) - length - 1, (batch,), generator=generator, device=device)
        loss = _loss(config, weights, _windows(text, starts, length))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            losses.append(loss.detach() / math.log(2))  # left on the device: reading it would wait every time
    return weights.map(lambda x: x.detach().bfloat16()), torch.stack(losses).tolist()


@torch.no_grad()
def bits_per_byte(config: LlamaConfig, weights: Weights, text: torch.Tensor, length: int = 512) -> float:
    """How many bits a byte of ``text`` costs the model, each window of ``length`` bytes on its own."""
    device = weights.embed.device
    text, wide = text.to(device), weights.map(lambda x: x.float())
    starts = torch.arange(0, len(text) - length - 1, length, device=device)
    losses = [_loss(config, wide, _windows(text, part, length)) * len(part) for part in starts.split(64)]
    return float(sum(losses)) / len(starts) / math.log(2)


# ----------------------------------------------------------------------------------------------- storage


def save(path: str | Path, config: LlamaConfig, weights: Weights, facts: dict[str, str]) -> None:
    """Write the weights, the configuration and ``facts`` about their making into one file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in named_tensors(config, weights)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another process may be saving its own
    save_file(tensors, temporary, metadata={"format": "pt", "config": json.dumps(asdict(config)), **facts})
    os.replace(temporary, path)


def load(
    path: str | Path, dtype: torch.dtype, device: torch.device | str
) -> tuple[LlamaConfig, Weights, dict[str, str]]:
    """What `save` wrote, with the weights cast to ``dtype``.

    Raises:
        CheckpointError: no such file, or one that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path.name} is not there yet: lesson 10 trains it, on a GPU, in the full preset")
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata())
            settings = json.loads(facts.pop("config"))
            scaling = settings.pop("rope_scaling")
            config = LlamaConfig(**settings, rope_scaling=RopeScaling(**scaling) if scaling else None)
            weights = empty_weights(config, dtype, device)
            for name, target in named_tensors(config, weights):
                tensor = file.get_tensor(name)
                if tensor.shape != target.shape:
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, needs {tuple(target.shape)}")
                target.copy_(tensor)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from None
    facts.pop("format", None)
    return config, weights, facts


def load_nearest(
    folders: list[Path], dtype: torch.dtype, device: torch.device | str
) -> tuple[LlamaConfig, Weights, str]:
    """The weights in the first folder that has them, else random ones; and a sentence that says which."""
    for folder in folders:
        if (Path(folder) / FILE).is_file():
            config, weights, facts = load(Path(folder) / FILE, dtype, device)
            return config, weights, "Weights trained on " + ", ".join(f"{k}: {v}" for k, v in facts.items())
    note = "No trained weights are recorded yet (lesson 10 trains them, on a GPU): these are random, and write noise."
    return CONFIG, random_weights(CONFIG, 0, dtype, device), note
