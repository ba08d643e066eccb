"""The floating point rules of all operators: one dtype for q, k and v, and sums that autocast leaves alone."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

# `torch.compile` of torch 2.11 cannot trace the question
_AUTOCAST = {device: torch.amp.is_autocast_available(device) for device in ("cpu", "cuda", "xpu", "mps", "meta")}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

P = ParamSpec("P")
R = TypeVar("R")


def refuse_unlike(q: Tensor, **others: Tensor) -> None:
    """Refuse tensors that are not `[B, N, H, D]` of one floating dtype on one device.

    Raises:
        TypeError: If a dtype is not floating point, or differs from that of `q`.
        ValueError: If a tensor has no four axes, or is on another device.
    """
    for name, t in {"q": q, **others}.items():
        if t.dim() != 4:
            raise ValueError(f"{name} must be [B, N, H, D], got shape {tuple(t.shape)}")
        if t.dtype not in FLOATS:
            raise TypeError(f"all inputs must be floating point, got {name} {t.dtype}")
        if t.dtype != q.dtype:
            raise TypeError(f"all inputs must share one floating dtype, got q {q.dtype} and {name} {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"all inputs must be on one device, got q on {q.device} and {name} on {t.device}")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run an implementation outside of autocast, which would round the sums that it keeps in float32."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device.type  # type: ignore[attr-defined]
        available = _AUTOCAST[device] if device in _AUTOCAST else torch.amp.is_autocast_available(device)
        if not available or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
