"""RAVLT's layers on maps `[B, C, height, width]`: stem, block and stage."""

from collections.abc import Sequence

import torch
from timm.layers import DropPath, LayerNorm2d, LayerScale2d
from timm.models import checkpoint
from torch import Tensor, nn

from vision_attn.backbones.conv_layers import ConvolvedFfn
from vision_attn.backbones.ravlt.attention import RALASelfAttention, rotary


class ConvStem(nn.Module):
    """Four 3 x 3 convolutions from an image to a map with a quarter of its sides."""

    def __init__(
        self, in_chans: int, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, out, stride in ((in_chans, dim // 2, 2), *[(dim // 2, dim // 2, 1)] * 2, (dim // 2, dim, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride=stride, padding=1, device=device, dtype=dtype)]
            layers += [nn.BatchNorm2d(out, device=device, dtype=dtype), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.proj(x)


class RALABlock(nn.Module):
    """A positional convolution, attention and an MLP.

        x = x + pos(x),    x = x + gamma_1 * attn(norm1(x)),    x = x + gamma_2 * ffn(norm2(x))

    Args:
        dim: Channels C.
        num_heads: Heads.
        linear: Use rank-augmented linear attention rather than softmax.
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
        num_heads: int,
        *,
        linear: bool = True,
        mlp_ratio: float = 3.5,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.norm1 = LayerNorm2d(dim, eps=1e-6, device=device, dtype=dtype)
        self.attn = RALASelfAttention(dim, num_heads, linear=linear, device=device, dtype=dtype)
        self.norm2 = LayerNorm2d(dim, eps=1e-6, device=device, dtype=dtype)
        self.ffn = ConvolvedFfn(dim, int(dim * mlp_ratio), drop=proj_drop, device=device, dtype=dtype)
        self.ls1: nn.Module = nn.Identity()
        self.ls2: nn.Module = nn.Identity()
        if layer_scale is not None:
            self.ls1 = LayerScale2d(dim, layer_scale, device=device, dtype=dtype)
            self.ls2 = LayerScale2d(dim, layer_scale, device=device, dtype=dtype)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, angles: list[Tensor]) -> Tensor:
        """Return a map of the shape of `x`; `angles` come from `rotary`."""
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpoint(self._forward, x, angles)
        return self._forward(x, angles)

    def _forward(self, x: Tensor, angles: list[Tensor]) -> Tensor:
        x = x + self.pos(x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), angles)))
        return x + self.drop_path2(self.ls2(self.ffn(self.norm2(x))))


class RALAStage(nn.Module):
    """A downsampling, which is an identity in the first stage, and blocks that share the angles of their map."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], head_dim: int) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's map."""
        x = self.downsample(x)
        angles = rotary(x, self.head_dim)
        for block in self.blocks:
            x = block(x, angles)
        return x
