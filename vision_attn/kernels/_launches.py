"""What the launches of all Triton kernels ask of numbers and of the GPU."""

import torch
from torch import Tensor


def next_power(n: int) -> int:
    """Return the next power of two; triton's own takes ten times as long, and every call of an operator asks."""
    return 1 << (n - 1).bit_length()


def multiprocessors(t: Tensor) -> int:
    """Multiprocessors of the GPU; in the interpreter, those of an H200."""
    return torch.cuda.get_device_properties(t.device).multi_processor_count if t.is_cuda else 132


def overlapping(t: Tensor) -> bool:
    """Whether a launch may start before the one before it has ended: Hopper and later GPUs."""
    return t.is_cuda and torch.cuda.get_device_capability(t.device)[0] >= 9
