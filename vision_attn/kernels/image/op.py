"""Means over windows and the depth-wise convolution in Triton, for inference; PyTorch has the gradients.

The kernels are in `forward.py`; triton is imported when they first run.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import custom_op
from vision_attn.kernels.triton.launching import inference_reasons, packed

if TYPE_CHECKING:
    from vision_attn.kernels.image import Windows

MOST = 128  # channels of a head: shared memory holds the matrix of a gate


def means_triton(t: Tensor, other: Tensor | None, grid: Grid, windows: "Windows") -> tuple[Tensor, Tensor]:
    """Run `means` on checked inputs."""
    counts, steps = windows.along((grid.height, grid.width))
    first, second = _means(t, other, [grid.height, grid.width, grid.prefix], counts, steps)
    return first, first if other is None else second


def depthwise_reasons(
    o: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, *, auto: bool
) -> list[str]:
    """List why `add_depthwise` cannot run in Triton; empty if it can."""
    weights = tuple(t for t in (weight, bias, gate) if t is not None)
    reasons = inference_reasons(v, o, weights=weights, auto=auto)
    if v.shape[-1] > MOST:
        reasons.append(f"head_dim {v.shape[-1]} is above {MOST}")
    return reasons


def add_depthwise_triton(
    o: Tensor, v: Tensor, grid: Grid, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None
) -> Tensor:
    """Run `add_depthwise` on checked inputs."""
    return _depthwise(o, v, weight, bias, gate, [grid.height, grid.width, grid.prefix])


@custom_op("vision_attn::image_means_triton", repeats=True)
def _means(
    t: Tensor, other: Tensor | None, size: Sequence[int], counts: Sequence[int], steps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Means `[B, windows, H, D]`, the second empty if there is no other tensor; `size` is height, width, prefix."""
    from vision_attn.kernels.image.forward import means  # noqa: PLC0415

    first = means(packed(t), size, counts, steps)
    return first, t.new_empty((0,)) if other is None else means(packed(other), size, counts, steps)


@_means.register_fake
def _(
    t: Tensor, other: Tensor | None, size: Sequence[int], counts: Sequence[int], steps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    shape = t.shape[0], counts[0] * counts[1], *t.shape[2:]
    return t.new_empty(shape), t.new_empty((0,) if other is None else shape)


@custom_op("vision_attn::image_depthwise_triton", repeats=True)
def _depthwise(
    o: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, size: Sequence[int]
) -> Tensor:
    """The sum, and its gate; `size` is height, width, prefix."""
    from vision_attn.kernels.image.forward import depthwise  # noqa: PLC0415

    weight, bias, gate = (None if t is None else t.contiguous() for t in (weight, bias, gate))
    return depthwise(packed(o), packed(v), weight, bias, gate, size)


@_depthwise.register_fake
def _(o: Tensor, v: Tensor, *args: object) -> Tensor:
    return o.new_empty(o.shape)
