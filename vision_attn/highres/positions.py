"""The positions of FLUX's image tokens above the training size: exact, and stretched.

The pipelines make position ids in the prompt's dtype, and bfloat16 cannot tell row 256 from row 257: beyond 4096 pixels
rows and columns merge. Here the ids are made again in float32. The rotary embedding is stretched by the base of its
frequencies (NTK: theta * stretch^(d / (d - 2))), or by scaling the positions to those of the first level.

Source: 'NTK-aware scaled RoPE' (bloc97, 2023); CLEAR multiplies theta by 10 - https://arxiv.org/abs/2412.16112
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def stretched_positions(model: Any, grid: tuple[int, int], stretch: float, rope: str) -> Iterator[None]:
    """Give a FLUX.1 transformer exact and stretched positions inside the `with` block.

    Args:
        model: The denoiser; models other than FLUX.1 are left as they are.
        grid: Height and width of the image in tokens.
        stretch: Side of the grid divided by that of the first level.
        rope: 'ntk', 'interpolate' or 'none'.
    """
    embed: Any = getattr(model, "pos_embed", None)
    if type(embed).__name__ != "FluxPosEmbed":
        yield
        return
    theta, inner = embed.theta, min(embed.axes_dim[1:])
    ids = position_ids(grid, stretch if rope == "interpolate" else 1.0)
    if rope == "ntk" and stretch > 1:
        embed.theta = theta * stretch ** (inner / (inner - 2))

    def exact(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs.get("img_ids")
        if given is None or given.shape[-2] != len(ids):
            return args, kwargs
        return args, {**kwargs, "img_ids": ids.to(given.device)}

    hook = model.register_forward_pre_hook(exact, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        hook.remove()
        embed.theta = theta


def position_ids(grid: tuple[int, int], stretch: float) -> Tensor:
    """Return ids `[height * width, 3]` in float32: segment 0, row, column, divided by `stretch` about the centres."""
    rows, columns = ((torch.arange(side, device="cpu") + 0.5) / stretch - 0.5 for side in grid)
    ids = torch.zeros(*grid, 3, device="cpu")
    ids[..., 1], ids[..., 2] = rows[:, None], columns
    return ids.flatten(0, 1)
