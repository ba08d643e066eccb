"""PVT's layers on maps `[B, height, width, C]`: position embedding, merging, attention to a reduced map, and the stage.

    q = W_q x,    [k, v] = W_kv LN(conv_r(x)) (r = 1: W_kv x),    o = W attention(q, k, v)

Paper: 'Pyramid Vision Transformer' - https://arxiv.org/abs/2102.12122
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from vision_attn.backbones.blocks import attend_densely, refuse_heads
from vision_attn.backbones.position import resized_positions


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
