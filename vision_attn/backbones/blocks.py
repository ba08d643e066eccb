"""The block and the stage of a vision transformer on maps `[B, height, width, C]`; the attention is handed in."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp
from timm.models import checkpoint
from torch import Tensor, nn


class PreNormBlock(nn.Module):
    """Attention and an MLP, each behind a norm.

        x = x + gamma_1 * attn(norm1(x)),    x = x + gamma_2 * mlp(norm2(x))

    Args:
        dim: Channels C.
        attn: From a map to a map of the same shape.
        mlp_ratio: Hidden channels of the MLP over C.
        layer_scale: First value of the gammas, None for none.
        proj_drop: Dropout of the MLP.
        drop_path: Share of samples that skip a branch in training.
        device: Where parameters are made.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.grad_checkpointing = False
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpoint(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Stage(nn.Module):
    """A downsampling, an identity in the first stage, and blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's map."""
        return self.blocks(self.downsample(x))


def refuse_heads(dim: int, num_heads: int) -> None:
    """Refuse heads that do not divide the channels.

    Raises:
        ValueError: If `dim` is not a multiple of `num_heads`.
    """
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
