"""What pyramids of maps `[B, height, width, C]` share: the last layers, and the sizes of their stages."""

from collections.abc import Sequence
from typing import Any

from timm.layers import ClassifierHead, to_2tuple
from torch import nn


def last_layers(
    dim: int, num_classes: int, global_pool: str, drop_rate: float, **dd: Any
) -> tuple[nn.LayerNorm, ClassifierHead]:
    """Return the norm of the last map, and the head."""
    head = ClassifierHead(dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd)
    return nn.LayerNorm(dim, **dd), head


def levels_of(dims: Sequence[int], patch_size: int) -> list[tuple[int, int]]:
    """Return channels and reduction of each stage; each halves the side of the one before."""
    return [(dim, patch_size * 2**i) for i, dim in enumerate(dims)]


def map_size(img_size: int | tuple[int, int], reduction: int, *, up: bool = True) -> tuple[int, int]:
    """Return height and width of the map of an image, rounded up, or down to 1 at least."""
    height, width = to_2tuple(img_size)
    if up:
        return -(-height // reduction), -(-width // reduction)
    return max(1, height // reduction), max(1, width // reduction)
