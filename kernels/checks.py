"""Argument checks shared by the launchers: every message names the argument and the value, before any launch."""

from __future__ import annotations

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_float(name: str, x: torch.Tensor) -> None:
    """``x`` is a tensor of a dtype the kernels take.

    Raises:
        TypeError: not a tensor, or a dtype other than bfloat16, float16 and float32.
        ValueError: a gradient is wanted.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {name}.dtype={x.dtype}")
    if x.requires_grad and torch.is_grad_enabled():
        # Its result would look like a constant to whatever comes after, and the gradient be wrong without a word.
        raise ValueError(
            f"{name} must not require a gradient, because there is no backward pass, got {name}.requires_grad=True:"
            " detach it, or call this under torch.no_grad()"
        )


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


def check_dense(name: str, x: torch.Tensor) -> None:
    """Every element of ``x`` has a place of its own in memory, so that all of them can be written.

    Raises:
        ValueError: two elements may share one.
    """
    end = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride < end:
            raise ValueError(f"the elements of {name} must not overlap, got {name}.stride()={x.stride()}")
        end = stride * (size - 1) + end


def check_apart(out: torch.Tensor, **operands: torch.Tensor | None) -> None:
    """``out`` shares no memory with what is read while it is written.

    Raises:
        ValueError: it does, with the operand of this name.
    """
    for name, x in operands.items():
        if x is not None and x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() != 0:
            raise ValueError(f"out shares memory with {name}, which is still read while out is written")
