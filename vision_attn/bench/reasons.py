"""Turns what went wrong with a candidate into the line that is reported."""

import torch

from vision_attn.bench.candidate import AbsentError


def reason_of(error: Exception) -> str:
    """Return one line: the message of an `AbsentError` or what failed, in one line."""
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, AbsentError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {first}"
    return f"cannot run: {type(error).__name__}: {first}"
