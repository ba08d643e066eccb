"""LITv2's layers: the MLP with a depth-wise convolution, the block, and deformable merging in pure PyTorch."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import checkpoint, register_notrace_module
from torch import Tensor, nn


class ConvolvedMlp(nn.Module):
    """An MLP with a 3 x 3 depth-wise convolution before its activation, on maps `[B, height, width, C]`."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.drop(self.act(x))))


class LITBlock(nn.Module):
    """A `PreNormBlock` with a convolution in its MLP, with or without attention.

    Args:
        dim: Channels C.
        attn: Turns a map into a map of the same shape; None for no attention.
        mlp_ratio: Hidden channels of the MLP over C.
        proj_drop: Dropout of the MLP.
        drop_path: Share of the samples that skip a branch in training.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module | None,
        *,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.norm1 = None if attn is None else nn.LayerNorm(dim, device=device, dtype=dtype)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = ConvolvedMlp(dim, int(dim * mlp_ratio), drop=proj_drop, device=device, dtype=dtype)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpoint(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.norm1 is not None and self.attn is not None:
            x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


@register_notrace_module
class DeformableConv(nn.Conv2d):
    """A convolution without overlap, whose taps are moved by offsets that another such convolution predicts.

        o(p) = sum_t w_t x(p + t + offset_t(p)),    x bilinear, zero outside the map

    Offsets are (row, column) per tap t. A map that the taps do not divide is padded with zeros.

    Paper: 'Deformable Convolutional Networks' - https://arxiv.org/abs/1703.06211

    Args:
        in_channels: C of `[B, C, height, width]`.
        out_channels: C of the output.
        kernel_size: Taps per side, and the stride.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=kernel_size, device=device, dtype=dtype)
        taps = 2 * kernel_size**2
        self.conv_offset = nn.Conv2d(in_channels, taps, kernel_size, stride=kernel_size, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset to a plain convolution: all offsets are zero."""
        super().reset_parameters()
        if hasattr(self, "conv_offset"):
            nn.init.zeros_(self.conv_offset.weight)
            nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, out_channels, ceil(height / kernel_size), ceil(width / kernel_size)]`."""
        K = self.kernel_size[0]
        down, right = -x.shape[2] % K, -x.shape[3] % K
        if down or right:
            x = F.pad(x, [0, right, 0, down])
        height, width = x.shape[2], x.shape[3]
        # Half precision cannot tell the coordinates of a large map apart.
        wide = torch.promote_types(x.dtype, torch.float32)
        offsets = self.conv_offset(x).to(wide)
        offsets = offsets.reshape(x.shape[0], K, K, 2, height // K, width // K)
        offsets = offsets.permute(0, 4, 1, 5, 2, 3).reshape(x.shape[0], height, width, 2)
        rows = torch.arange(height, device=x.device)[:, None] + offsets[..., 0]
        columns = torch.arange(width, device=x.device) + offsets[..., 1]
        places = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=3)
        sampled = F.grid_sample(x.to(wide), places, mode="bilinear", padding_mode="zeros", align_corners=False)
        return F.conv2d(sampled.to(x.dtype), self.weight, self.bias, stride=self.stride)


class DeformableMerging(nn.Module):
    """Halves the sides of a map `[B, height, width, C]` and doubles its channels."""

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dconv = DeformableConv(dim, 2 * dim, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(2 * dim, device=device, dtype=dtype)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, ceil(height / 2), ceil(width / 2), 2 C]`."""
        return self.act(self.norm(self.dconv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
