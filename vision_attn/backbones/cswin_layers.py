"""CSwin's own layers on maps `[B, height, width, C]`: stem, merging, and the block with one or two branches."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import checkpoint
from torch import Tensor, nn

from vision_attn.backbones.cross_shaped_attention import AgentStripeAttention, StripeAttention


class ConvEmbed(nn.Module):
    """A 7 x 7 convolution of an image and a norm; the image goes on with zeros to whole cells.

    Args:
        in_chans: Channels of an image.
        dim: Channels C.
        patch_size: Pixels per side of a cell.
        device: Where parameters are made.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, 7, stride=patch_size, padding=2, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of images `[B, in_chans, height, width]`."""
        x = F.pad(x, [0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size])
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class NormedConv(nn.Module):
    """A strided 3 x 3 convolution and a norm: half of the side, rounded up."""

    def __init__(
        self, dim: int, out_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the merged map."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def branches(
    dim: int, size: tuple[int, int], num_heads: int, split: int | None, *, agent_num: int | None = None, **dd: Any
) -> list[nn.Module]:
    """Return the attention of a block: two branches of half of the channels, or one over the whole map.

    Args:
        dim: Channels of the block.
        size: Height and width of the map.
        num_heads: Heads of the block.
        split: Width of the stripes, None for the whole map.
        agent_num: Agents of each branch, None for softmax attention.
        **dd: Device and dtype of the parameters.
    """
    shares = [(dim, -1, max(size), num_heads)]
    if split is not None:
        shares = [(dim // 2, idx, split, num_heads // 2) for idx in (0, 1)]
    made: list[nn.Module] = []
    for channels, idx, width, heads in shares:
        if agent_num is None:
            made.append(StripeAttention(channels, size, idx, width, heads, **dd))
        else:
            made.append(AgentStripeAttention(channels, size, idx, width, heads, agent_num=agent_num, **dd))
    return made


class CSwinBlock(nn.Module):
    """Attention of one or two branches that share its projections, and an MLP, each behind a norm.

    Args:
        dim: Channels C.
        attns: The branches, which split the channels evenly.
        mlp_ratio: Hidden channels of the MLP over C.
        qkv_bias: Whether queries, keys and values have a bias.
        proj_drop: Dropout of the MLP.
        drop_path: Share of samples that skip a branch in training.
        device: Where parameters are made.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attns: list[nn.Module],
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.norm1 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attns = nn.ModuleList(attns)
        self.share = dim // len(attns)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, device=device, dtype=dtype)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpoint(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        qkv = self.qkv(self.norm1(x)).flatten(1, 2).unflatten(2, [3, -1]).permute(2, 0, 1, 3)
        outputs: list[Tensor] = []
        for i, attn in enumerate(self.attns):
            outputs.append(attn(qkv[..., i * self.share : (i + 1) * self.share], size))
        attended = self.proj(torch.cat(outputs, 2)).reshape(x.shape)
        x = x + self.drop_path1(attended)
        return x + self.drop_path2(self.mlp(self.norm2(x)))
