"""What `vision-attn inspect` shows beside `estimate`: processors that fit, and a picture of what a token attends to."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_attn.estimation.model import LayerEstimate
from vision_attn.grid import Grid
from vision_attn.processors import REGISTRY, Schedule, Softmax
from vision_attn.processors.base import AttnSpec, Layer

_CELL = 6  # pixels of a token in the picture


def fitting(layers: Sequence[LayerEstimate]) -> str:
    """Return lines that say which processors fit all grids with their defaults, and why the others do not."""
    grids = {row.grid: row.name for row in reversed(layers)}
    fit, others = [], []
    for name, known in REGISTRY.items():
        kind = known.spec
        if kind in (Schedule, Softmax):
            continue
        for grid, layer in grids.items():
            try:
                kind().attended(grid)
            except ValueError as error:
                others.append(f"{name} does not fit {layer} ({error})")
                break
        else:
            fit.append(name)
    return "\n".join([f"processors that fit every grid with their defaults: {', '.join(fit)}", *others])


def shades(spec: AttnSpec, grid: Grid, row: int, column: int) -> Tensor:
    """Return the darkness of each token of the grid in a picture: the spec's `tones`, else its `attended` weights.

    The arguments, the result and the errors are those of `attended`.
    """
    _check_token(grid, row, column)
    tones = spec.tones(grid, row, column)
    return attended(spec, grid, row, column) if tones is None else tones


def attended(spec: AttnSpec, grid: Grid, row: int, column: int) -> Tensor:
    """Return how much a token attends to each token of the grid if all keys are alike.

    This is the derivative of the token's output with respect to the values, so it works for any processor.

    Args:
        spec: The processor.
        grid: The sequence.
        row: Row of the token.
        column: Column of the token.

    Returns:
        `[height, width]`.

    Raises:
        ValueError: If the token is not in the grid, or the spec does not fit it.
    """
    _check_token(grid, row, column)
    heads, channels = 10, 4
    if getattr(spec, "precision", None) is not None:  # 8 bits have no derivative, and round the same weights
        spec = replace(spec, precision=None)  # type: ignore[type-var]
    processor = spec.build(Layer("", heads, channels, dim=heads * channels))
    q = k = torch.zeros(1, grid.tokens, heads, channels)
    v = torch.zeros(1, grid.tokens, heads, channels, requires_grad=True)
    token = grid.prefix + row * grid.width + column
    processor(q, k, v, grid)[0, token].sum().backward()
    assert v.grad is not None
    return v.grad[0, grid.image].sum((1, 2)).view(grid.height, grid.width) / (heads * channels)


def _check_token(grid: Grid, row: int, column: int) -> None:
    if not (0 <= row < grid.height and 0 <= column < grid.width):
        raise ValueError(f"token ({row}, {column}) is not in a grid of {grid.height} x {grid.width}")


def check_picture(path: Path) -> None:
    """Refuse a file that no picture can be written to, before anything is computed.

    Raises:
        ValueError: If its folder does not exist, or its name does not end with a known format.
    """
    from PIL import Image  # noqa: PLC0415

    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path} does not name a picture format: end it with .png, .jpg or .webp")


def picture(weights: Tensor, row: int, column: int) -> Any:
    """Draw what a token attends to.

    Args:
        weights: How much the token attends to each token of the grid, or in how much detail, `[height, width]`; more is
            darker.
        row: Row of the token, which is drawn in red.
        column: Column of the token.

    Returns:
        A PIL image.
    """
    from PIL import Image  # noqa: PLC0415

    shade = (weights.clamp(min=0) / weights.max().clamp(min=1e-12)).sqrt()
    pixels = (torch.stack([1 - shade, 1 - 0.6 * shade, 1 - 0.2 * shade], -1) * 255).byte()
    pixels[row, column] = torch.tensor([220, 30, 30], dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    return image.resize((image.width * _CELL, image.height * _CELL), Image.Resampling.NEAREST)
