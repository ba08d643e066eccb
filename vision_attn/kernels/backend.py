"""What every operator does around its formula: it checks its inputs, picks an implementation, and keeps float32 sums.

An implementation is `reference`, `torch` or `triton`. `auto` takes the first of `triton`, `torch` that can run. An
implementation asked for by name runs or raises: it never falls back to another one.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from vision_attn._checks import is_int
from vision_attn.grid import Grid

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# `torch.compile` of torch 2.11 cannot trace the question
_AUTOCAST = {device: torch.amp.is_autocast_available(device) for device in ("cpu", "cuda", "xpu", "mps", "meta")}

P = ParamSpec("P")
R = TypeVar("R")
PerAxis = int | tuple[int, int]


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator: `run` computes it, `reasons` lists why it cannot for the inputs at hand."""

    run: Callable[..., Any]
    reasons: Sequence[str] = ()


def check_backend(backend: str, known: Sequence[str] = ("triton", "torch", "reference")) -> None:
    """Refuse a backend name that no operator has.

    Raises:
        ValueError: If `backend` is neither 'auto' nor in `known`.
    """
    if backend != "auto" and backend not in known:
        names = ", ".join(repr(name) for name in ("auto", *known))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")


def pick(operator: str, backend: str, implementations: Mapping[str, Implementation]) -> Callable[..., Any]:
    """Return the function that runs `operator` with the chosen backend.

    Args:
        operator: Name of the operator, for the message.
        backend: 'auto' or a key of `implementations`.
        implementations: By name, the fastest first; 'auto' never chooses 'reference'.

    Raises:
        ValueError: If the named backend is unknown or cannot run; every reason is listed.
    """
    check_backend(backend, tuple(implementations))
    if backend != "auto":
        chosen = implementations[backend]
        if chosen.reasons:
            raise ValueError(f"{operator} with backend={backend!r}: {'; '.join(chosen.reasons)}")
        return chosen.run
    for name, implementation in implementations.items():
        if name != "reference" and not implementation.reasons:
            return implementation.run
    refusals = "; ".join(f"{name}: {', '.join(i.reasons)}" for name, i in implementations.items() if i.reasons)
    raise ValueError(f"no backend of {operator} can run: {refusals}")


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


def refuse_unlike(q: Tensor, **others: Tensor) -> None:
    """Refuse tensors that are not `[B, N, H, D]` of one floating dtype on one device.

    Raises:
        TypeError: If a dtype is not floating point, or differs from that of `q`.
        ValueError: If a tensor has no four axes, or is on another device.
    """
    _check_alike("all inputs", {"q": q, **others})


def _check_alike(who: str, tensors: Mapping[str, Tensor]) -> None:
    q = tensors["q"]
    for name, t in tensors.items():
        if t.dim() != 4:
            raise ValueError(f"{name} must be [B, N, H, D], got shape {tuple(t.shape)}")
        if t.dtype not in FLOATS:
            raise TypeError(f"{who} must be floating point, got {name} {t.dtype}")
        if t.dtype != q.dtype:
            raise TypeError(f"{who} must share one floating dtype, got q {q.dtype} and {name} {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{who} must be on one device, got q on {q.device} and {name} on {t.device}")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> None:
    """Refuse q, k, v that do not agree with each other or with the grid.

    Raises:
        TypeError: If dtypes differ or are not floating point.
        ValueError: If shapes or devices differ, or N is not the number of the grid's tokens.
    """
    tensors = dict(q=q, k=k, v=v)
    _check_alike("q, k and v", tensors)
    for name, t in tensors.items():
        if t.shape != q.shape:
            raise ValueError(f"q, k and v must have one shape, got q {tuple(q.shape)} and {name} {tuple(t.shape)}")
    if q.shape[1] != grid.tokens:
        raise ValueError(f"N = {q.shape[1]} tokens, but {grid} has {grid.tokens}")


def check_mask(q: Tensor, grid: Grid, mask: Tensor | None) -> None:
    """Refuse a mask of the keys outside the grid that has another dtype, shape or device.

    Raises:
        TypeError: If the mask is not bool.
        ValueError: If its shape is not `[B, prefix + suffix]` or `[1, prefix + suffix]`, or it is on another device.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where a key is seen, got {mask.dtype}")
    outside = grid.prefix + grid.suffix
    if mask.dim() != 2 or mask.shape[1] != outside or mask.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"mask must be [B, prefix + suffix] = [{q.shape[0]}, {outside}] for {grid}, got {tuple(mask.shape)}"
        )
    if mask.device != q.device:
        raise ValueError(f"mask must be on the device of q, {q.device}, got {mask.device}")


def per_axis(value: PerAxis, name: str, least: int) -> tuple[int, int]:
    """Return `value` as a (vertical, horizontal) pair of integers of at least `least`.

    Raises:
        TypeError: If it is neither an int nor a pair of ints.
        ValueError: If a side is below `least`.
    """
    if type(value) is int and value >= least:
        return value, value
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(map(is_int, pair)):
        raise TypeError(f"{name} must be an int or a pair of ints (vertical, horizontal), got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return pair
