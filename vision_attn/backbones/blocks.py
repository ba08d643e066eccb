"""The parts that families on maps `[B, height, width, C]` share, from the patches to the head, and their sizes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerScale, Mlp, PatchEmbed, to_2tuple
from timm.models import checkpoint
from torch import Tensor, nn

from vision_attn.kernels.dense import dense_attention


def patches(in_chans: int, dim: int, patch_size: int, *, norm: bool = True, **dd: Any) -> PatchEmbed:
    """Return the embedding of patches of images of any size in a map `[B, height, width, C]`."""
    norm_layer = nn.LayerNorm if norm else None
    return PatchEmbed(
        None, patch_size, in_chans, dim, norm_layer=norm_layer, output_fmt="NHWC", dynamic_img_pad=True, **dd
    )


class PreNormBlock(nn.Module):
    """Attention and an MLP, each after a norm.

        x = x + gamma_1 * attn(norm1(x)),    x = x + gamma_2 * mlp(norm2(x))

    Args:
        dim: Channels C.
        attn: Turns a map into a map of the same shape.
        mlp_ratio: Hidden channels of the MLP over C.
        layer_scale: Initial value of the gammas; None for no gammas.
        proj_drop: Dropout of the MLP.
        drop_path: Share of the samples that skip a branch in training.
        device: Device of the parameters.
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
    """A downsampling, which is an identity in the first stage, and blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's map."""
        return self.blocks(self.downsample(x))


def refuse_heads(dim: int, num_heads: int) -> None:
    """Refuse a number of heads that does not divide the channels.

    Raises:
        ValueError: If `dim` is not a multiple of `num_heads`.
    """
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")


def attend_densely(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from each query `[B, N, H, D]` to every key; what TorchScript compiles has first derivatives only."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        return dense_attention(q, k, v)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def last_layers(
    dim: int, num_classes: int, global_pool: str, drop_rate: float, **dd: Any
) -> tuple[nn.LayerNorm, ClassifierHead]:
    """Return the norm of the last map, and the head."""
    head = ClassifierHead(dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd)
    return nn.LayerNorm(dim, **dd), head


def levels_of(dims: Sequence[int], patch_size: int) -> list[tuple[int, int]]:
    """Return channels and reduction of each stage; each stage has half the side of the one before."""
    return [(dim, patch_size * 2**i) for i, dim in enumerate(dims)]


def map_size(img_size: int | tuple[int, int], reduction: int, *, up: bool = True) -> tuple[int, int]:
    """Return height and width of the map of an image, rounded up; with `up=False` down, but to at least 1."""
    height, width = to_2tuple(img_size)
    if up:
        return -(-height // reduction), -(-width // reduction)
    return max(1, height // reduction), max(1, width // reduction)
