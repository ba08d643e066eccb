"""Super token attention with its own projections, under the parameter names of the authors' code.

    s = join(x),    [q, k, v] = W_1 s,    o = W_2 softmax(q k^T / sqrt(D)) v,    y = read(o)

`join` and `read` are those of `vision_attn.processors.super_token`, here with the layer's input as the features, and as
the authors pad: maps are filled up with zeros to whole cells, and beyond the border there are super tokens of zeros.

Paper: 'Vision Transformer with Super Token Sampling' - https://arxiv.org/abs/2211.11167
"""

from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from vision_attn.backbones.blocks import attend_densely, refuse_heads
from vision_attn.backbones.conv_layers import PointwiseConv2d
from vision_attn.backbones.registry import operator
from vision_attn.grid import Grid
from vision_attn.kernels.window import from_cells, to_cells
from vision_attn.processors.super_token import associate, join, read


@operator("sample_super_tokens(Tensor x, int size, int iterations) -> (Tensor, Tensor)")
def sample_super_tokens(x: Tensor, size: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Average a map into super tokens.

    Args:
        x: The map `[B, C, height, width]`.
        size: Side of a super token's cell.
        iterations: How often the association is computed.

    Returns:
        The map of super tokens `[B, C, rows, columns]`, and the association `[B, rows, columns, size^2, 9]`.
    """
    height, width = x.shape[2:]
    tokens = x.flatten(2).transpose(1, 2).unsqueeze(2)  # [B, height * width, 1, C]
    cells = to_cells(tokens, Grid(height, width), (size, size)).squeeze(3)
    cells = cells.unflatten(1, (-(-height // size), -1)).to(torch.promote_types(x.dtype, torch.float32))
    weight = associate(cells, iterations, padded=True)
    return join(weight, cells).permute(0, 3, 1, 2).to(x.dtype), weight


@operator("read_super_tokens(Tensor s, Tensor weight, int[] size) -> Tensor")
def read_super_tokens(s: Tensor, weight: Tensor, size: list[int]) -> Tensor:
    """Mix super tokens into the tokens that joined them.

    Args:
        s: The map of super tokens `[B, C, rows, columns]`.
        weight: The association.
        size: Height and width of the map.

    Returns:
        The map `[B, C, height, width]`.
    """
    side = round(weight.shape[3] ** 0.5)
    cells = read(weight, s.permute(0, 2, 3, 1)).flatten(1, 2).unsqueeze(3)  # [B, cells, L, 1, C]
    tokens = from_cells(cells, Grid(*size), (side, side)).squeeze(2)
    return tokens.transpose(1, 2).unflatten(2, (size[0], size[1])).to(s.dtype)


@register_notrace_module
class MapAttention(nn.Module):
    """Softmax attention over a map.

    Args:
        dim: Channels C.
        num_heads: H.
        **dd: Device and dtype of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        refuse_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = PointwiseConv2d(dim, 3 * dim, **dd)
        self.proj = PointwiseConv2d(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended map `[B, C, height, width]`."""
        tokens = self.qkv(x).flatten(2).transpose(1, 2)
        q, k, v = tokens.unflatten(2, [self.num_heads, 3, -1]).unbind(3)  # each head has its q, k and v together
        o = attend_densely(q, k, v).flatten(2).transpose(1, 2)
        return self.proj(o.unflatten(2, [x.shape[2], x.shape[3]]))


@register_notrace_module
class SuperTokenSelfAttention(nn.Module):
    """Attention among the super tokens of a map.

    Args:
        dim: Channels C.
        num_heads: H.
        size: Side of a super token's cell; with 1 all tokens attend to each other.
        iterations: How often the association is computed.
        **dd: Device and dtype of the parameters.

    Raises:
        ValueError: If `dim` is not a multiple of `num_heads`, or `size` or `iterations` is below 1.
    """

    def __init__(self, dim: int, num_heads: int, *, size: int = 8, iterations: int = 1, **dd: Any) -> None:
        super().__init__()
        if size < 1 or iterations < 1:
            raise ValueError(f"size and iterations of super tokens must be at least 1, got {size} and {iterations}")
        self.size, self.iterations = size, iterations
        self.attend = MapAttention(dim, num_heads, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended map `[B, C, height, width]`."""
        if self.size == 1:
            return self.attend(x)
        shape = [x.shape[2], x.shape[3]]
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            s, weight = torch.ops.vision_attn.sample_super_tokens(x, self.size, self.iterations)
            return torch.ops.vision_attn.read_super_tokens(self.attend(s), weight, shape)
        s, weight = sample_super_tokens(x, self.size, self.iterations)
        return read_super_tokens(self.attend(s), weight, shape)
