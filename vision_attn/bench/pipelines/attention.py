"""The ways in which a denoiser attends: stock diffusers on native backends, FlexAttention, and our processors.

Each is a context manager over a model that is built once: inside, the model attends that way; afterwards it is as it
was before.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vision_attn.bench.candidate import AbsentError
from vision_attn.bench.local.flex import FlexClear
from vision_attn.conversion.conversion import Conversion, convert
from vision_attn.grid import Grid
from vision_attn.processors import AttnSpec, Clear, Neighborhood, Softmax, registrations

_FLASH_FIRST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, *_FLASH_FIRST]


@dataclass(frozen=True)
class Way:
    """A candidate.

    Args:
        name: Short and stable.
        computes: What it computes, in words.
        use: From the model, the grid of its finest attention and the device to a context in which the model attends
            this way. The context yields the conversion, if there is one, and raises `AbsentError` where it cannot run.
        spec: Estimates its time.
        min_tokens: Layers with fewer tokens keep the host's attention.
    """

    name: str
    computes: str
    use: Callable[[nn.Module, Grid, torch.device], AbstractContextManager[Conversion | None]]
    spec: AttnSpec
    min_tokens: int = 0


@contextmanager
def _stock(model: nn.Module, grid: Grid, device: torch.device) -> Iterator[None]:
    yield None


@contextmanager
def _backends(first: list[SDPBackend], model: nn.Module, grid: Grid, device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        raise AbsentError("cuDNN's and FlashAttention's kernels run on CUDA only")
    with sdpa_kernel(first, set_priority=True):
        yield None


@contextmanager
def _converted(spec: AttnSpec, least: int, model: nn.Module, grid: Grid, device: torch.device) -> Iterator[Conversion]:
    conversion = convert(model, spec, min_tokens=least)
    try:
        yield conversion
    finally:
        conversion.revert()


def _flex(radius: float, model: nn.Module, grid: Grid, device: torch.device) -> AbstractContextManager[Conversion]:
    return _converted(FlexClear.on(grid, radius, device), 0, model, grid, device)


def _ours(name: str, spec: AttnSpec) -> Way:
    """Return the way of a spec; on levels of a UNet that are smaller than a window the host's attention stays."""
    least = spec.kernel_size**2 if isinstance(spec, Neighborhood) and isinstance(spec.kernel_size, int) else 0
    return Way(name, str(spec), partial(_converted, spec, least), spec, least)


STOCK = ("stock sdpa", "stock cudnn")
FLASH = "stock flash"
DENSE = (FLASH, *STOCK)
WAYS = {
    way.name: way
    for way in (
        Way(STOCK[0], "dense attention, PyTorch's choice of backend", _stock, Softmax()),
        Way(STOCK[1], "dense attention, cuDNN wherever it can", partial(_backends, _CUDNN_FIRST), Softmax()),
        Way(FLASH, "dense attention, PyTorch's FlashAttention", partial(_backends, _FLASH_FIRST), Softmax()),
        Way("flex r16", "Clear(radius=16) by FlexAttention", partial(_flex, 16), Clear(radius=16)),
        *(_ours(name, spec) for known in registrations() for name, spec in known.bench.items()),
    )
}
