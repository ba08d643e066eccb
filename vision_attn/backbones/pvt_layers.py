"""PVT's own layers on maps `[B, height, width, C]`: position embedding, merging, and the stage that has them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from vision_attn.backbones.position import resized_positions


@register_notrace_module
class Positions(nn.Module):
    """A position embedding `pos_embed` of a map, resized bilinearly for maps of another size.

    Args:
        dim: Channels C.
        size: Height and width of the map that it is for.
        device: Where parameters are made.
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
        """Draw the embedding anew."""
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Add the embedding to a map `[B, height, width, C]`."""
        return x + resized_positions(self.pos_embed, self.size, (x.shape[1], x.shape[2]))


class MapPatches(nn.Module):
    """Joins 2 x 2 cells of a map `[B, height, width, C]`.

    An odd side loses its last cells, as with the authors; a side of one cell goes on with zeros.
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


class PositionedStage(nn.Module):
    """A downsampling, an identity in the first stage, a position embedding, and blocks."""

    def __init__(self, downsample: nn.Module, positions: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.positions = positions
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's map."""
        return self.blocks(self.positions(self.downsample(x)))
