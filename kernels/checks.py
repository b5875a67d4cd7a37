"""Argument checks shared by the launchers: every message names the argument and the value, before any launch."""

from __future__ import annotations

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_float(name: str, x: torch.Tensor) -> None:
    """``x`` is a tensor of a dtype the kernels take.

    Raises:
        TypeError: not a tensor, or a dtype other than bfloat16, float16 and float32.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {name}.dtype={x.dtype}")


def check_like(name: str, x: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """``x`` has the dtype and device of ``like``.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another device.
    """
    check_float(name, x)
    if x.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name} ({like.dtype}), got {name}.dtype={x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {name}.device={x.device}")


def check_shape(name: str, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    """``x`` has exactly this shape.

    Raises:
        ValueError: another shape.
    """
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {name}.shape={tuple(x.shape)}")
