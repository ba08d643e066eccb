"""A launch worked out: its kernel with all numbers, and how it finds tiles of its tensors.

On Hopper and later GPUs TMA fetches tiles: it takes no registers, and what lies beyond a tensor reads as zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vision_attn.kernels.triton.launching import Bound, hopper


@dataclass(frozen=True)
class Shifted:
    """The address `elements` after the start of a tensor, before it if negative. TMA only counts from it."""

    tensor: Tensor
    elements: int

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's."""
        return self.tensor.dtype

    def data_ptr(self) -> int:
        """Return the address."""
        return self.tensor.data_ptr() + self.elements * self.tensor.element_size()


@dataclass(frozen=True)
class Box:
    """Tiles of a tensor that TMA fetches: where the first starts, and the lengths, strides and tile of each axis."""

    first: int
    shape: list[int]
    strides: list[int]
    tile: list[int]

    def of(self, t: Tensor) -> TensorDescriptor:
        """Return the descriptor of tensor `t`."""
        base: Any = Shifted(t, self.first) if self.first else t
        return TensorDescriptor(base, self.shape, self.strides, self.tile)


@dataclass(frozen=True)
class Plan:
    """A launch without its tensors.

    Args:
        launch: The kernel with its numbers.
        parts: Into how many parts its long loops are cut.
        boxes: Tiles of tensors; None where they are read by their strides.
    """

    launch: Bound
    parts: int
    boxes: tuple[Box | None, ...]

    def run(self, *tensors: Tensor, boxed: tuple[Tensor, ...]) -> None:
        """Launch; `boxed` has a tensor for each of the boxes."""
        boxes = tuple([t if box is None else box.of(t) for t, box in zip(boxed, self.boxes, strict=True)])
        self.launch(*tensors, boxes=boxes)


def uses_boxes(tensors: Sequence[Tensor]) -> bool:
    """Whether TMA can fetch tiles of these `[B, N, H, D]` tensors: Hopper or later, and 16-byte strides."""
    return hopper(tensors[0]) and all(boxable(t) for t in tensors)


def boxable(t: Tensor) -> bool:
    """Whether the strides of `t` suit TMA."""
    size = t.element_size()
    outer = zip(t.shape[:3], t.stride()[:3], strict=True)
    return t.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for n, s in outer if n > 1)


def sequence_box(t: Tensor, length: int, block_d: int) -> Box:
    """Boxes of `length` tokens of one head of `[B, N, H, D]`."""
    return Box(0, list(t.shape), box_strides(t), [1, length, 1, block_d])


def box_strides(t: Tensor) -> list[int]:
    """Strides; that of an axis of one element is free, and TMA wants a multiple of 16 bytes."""
    return [s if n > 1 else 16 * t.shape[-1] for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)] + [1]
