"""Tables that launches read: nobody writes to them, and a CUDA graph that reads one keeps it."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_fixed = WeakTensorKeyDictionary()
_captured: dict[int, Tensor] = {}


def fixed(t: Tensor) -> Tensor:
    """Say that nobody ever writes to `t`, which outlives the call that reads it: a table. Returns it."""
    _fixed[t] = True
    return t


def is_fixed(t: Tensor) -> bool:
    """Whether `t` is a table that was passed to `fixed`."""
    return t in _fixed


def lasting(t: Tensor) -> Tensor:
    """Return a table that is about to be read; where a CUDA graph is captured, it is never freed from now on.

    A graph keeps only the address of what it reads, and the tables of other sizes may drive this one out of its cache.
    """
    if _captures(t):
        _captured[id(t)] = t
    return t


def _captures(t: Tensor) -> bool:
    return t.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
