"""PVT, and its layers on maps `[B, height, width, C]`: position embedding, merging, attention to a reduced map, stage.

    q = W_q x,    [k, v] = W_kv LN(conv_r(x)) (r = 1: W_kv x),    o = W attention(q, k, v)

Paper: 'Pyramid Vision Transformer' - https://arxiv.org/abs/2102.12122
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, calculate_drop_path_rates, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from vision_attn.backbones.blocks import PreNormBlock, attend_densely, levels_of, map_size, patches, refuse_heads
from vision_attn.backbones.checkpoints import Rule
from vision_attn.backbones.leaplab import PositionedBackbone
from vision_attn.backbones.position import resized_positions

PVT_RULES: tuple[Rule, ...] = (
    (r"^patch_embed1\.", "patch_embed."),
    (r"^patch_embed([2-9])\.", lambda match: f"stages.{int(match[1]) - 1}.downsample."),
    (r"^pos_embed(\d)$", lambda match: f"stages.{int(match[1]) - 1}.positions.pos_embed"),
    (r"^block(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
)


@register_notrace_module
class Positions(nn.Module):
    """Adds a position embedding to a map; it is resized (bilinear) to maps of another size.

    Args:
        dim: Channels C.
        size: Height and width of the map for which it is made.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        size: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.pos_embed = nn.Parameter(torch.empty(1, size[0] * size[1], dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new embedding."""
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Add the embedding to a map `[B, height, width, C]`."""
        return x + resized_positions(self.pos_embed, self.size, (x.shape[1], x.shape[2]))


class MapPatches(nn.Module):
    """Joins 2 x 2 cells of a map `[B, height, width, C]`.

    An odd side loses its last cells, as in the authors' code; a side of one cell is padded with zeros.
    """

    def __init__(
        self, dim: int, out_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 2, stride=2, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, max(1, height // 2), max(1, width // 2), out_dim]`."""
        x = F.pad(x, [0, 0, 0, 2 // (x.shape[2] + 1), 0, 2 // (x.shape[1] + 1)])  # 1 for a side of one cell
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@register_notrace_module
class ReducedAttention(nn.Module):
    """Softmax attention to the keys of a map that a strided convolution reduces.

    Args:
        dim: Channels C.
        num_heads: H.
        sr_ratio: Stride of the convolution: the keys' map is this many times smaller per side.
        qkv_bias: Whether the projections to q, k and v have a bias.
        proj_drop: Dropout of the output.
        **dd: Device and dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        refuse_heads(dim, num_heads)
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        reduces = sr_ratio > 1
        self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **dd) if reduces else None
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd) if reduces else None

    def project(self, x: Tensor) -> list[Tensor]:
        """Return q `[B, N, H, D]`, k and v `[B, M, H, D]` of a map `[B, height, width, C]`.

        A map that is smaller than one step of the convolution is padded with zeros.
        """
        q = self.q(x).flatten(1, 2).unflatten(2, [self.num_heads, -1])
        if self.sr is not None and self.norm is not None:
            down, right = max(0, self.sr_ratio - x.shape[1]), max(0, self.sr_ratio - x.shape[2])
            image = F.pad(x, [0, 0, 0, right, 0, down]).permute(0, 3, 1, 2)
            x = self.norm(self.sr(image).permute(0, 2, 3, 1))
        kv = self.kv(x).flatten(1, 2).unflatten(2, [2, self.num_heads, -1])
        return [q, kv[:, :, 0], kv[:, :, 1]]

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended map `[B, height, width, C]`."""
        q, k, v = self.project(x)
        return self.proj_drop(self.proj(attend_densely(q, k, v).reshape(x.shape)))


class PositionedStage(nn.Module):
    """A downsampling, which is an identity in the first stage, a position embedding, and blocks."""

    def __init__(self, downsample: nn.Module, positions: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.positions = positions
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's map."""
        return self.blocks(self.positions(self.downsample(x)))


class PVTBackbone(PositionedBackbone):
    """PVT with another attention in some stages.

    Args:
        attend: Makes this attention: from the number of a stage, and its map's height and width.
        attn_types: A letter per stage, of `letters`.
        letters: The letter of this attention, and that of softmax attention to reduced maps.
        img_size: Height and width of the images, or one number for both, for which position embeddings are made.
        patch_size: Pixels per side of a patch.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        mlp_ratios: Hidden channels of an MLP over its channels, in each stage.
        sr_ratios: How many times smaller per side the keys' maps of softmax attention are, in each stage.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of attention and MLP outputs.
        drop_path_rate: Share of samples that skip a branch in the last block; it rises linearly from 0 in the first.
        **dd: Device and dtype of the parameters.

    Raises:
        ValueError: If the arguments have different numbers of stages, or a letter is unknown.
    """

    def __init__(  # noqa: PLR0913 - timm builds models from flat arguments
        self,
        attend: Callable[[int, tuple[int, int]], nn.Module],
        attn_types: str,
        letters: str,
        *,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        sr_ratios: Sequence[int],
        qkv_bias: bool,
        drop_rate: float,
        proj_drop_rate: float,
        drop_path_rate: float,
        **dd: Any,
    ) -> None:
        given: dict[str, Any] = dict(depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        given |= dict(attn_types=attn_types)
        if any(len(values) != len(embed_dims) for values in given.values()) or set(attn_types) - set(letters):
            known = " or ".join(map(repr, letters))
            raise ValueError(f"there must be one value per stage of embed_dims={embed_dims}, {known}, got {given}")
        skips = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, dim in enumerate(embed_dims):
            size = map_size(img_size, patch_size * 2**i, up=False)
            options: dict[str, Any] = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **dd)
            blocks = []
            for _ in range(depths[i]):
                if attn_types[i] == letters[0]:
                    attn = attend(i, size)
                else:
                    attn = ReducedAttention(dim, num_heads[i], sr_ratio=sr_ratios[i], **options)
                block = PreNormBlock(
                    dim, attn, mlp_ratio=mlp_ratios[i], proj_drop=proj_drop_rate, drop_path=next(skips), **dd
                )
                block.norm1.eps = block.norm2.eps = 1e-6  # in the authors' code only blocks have this eps
                blocks.append(block)
            merging = MapPatches(embed_dims[i - 1], dim, **dd) if i else nn.Identity()
            stages.append(PositionedStage(merging, Positions(dim, size, **dd), blocks))
        super().__init__(
            patches(in_chans, embed_dims[0], patch_size, **dd),
            stages,
            nn.Identity(),
            ClassifierHead(
                embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
            ),
            in_chans=in_chans,
            num_classes=num_classes,
            levels=levels_of(embed_dims, patch_size),
            cut=patch_size,
        )
