"""Attention inside stripes that cross the map, softmax or agents, of q, k and v that are projected outside.

    o = attention(q, k, v inside the stripe) + dwc(v inside the stripe)

A branch has stripes of full height and `split_size` columns (`idx` 0), of `split_size` rows and full width (1), or one
stripe, the map (-1). Where `split_size` does not divide the map, the last stripe is smaller; agents are then pooled
with zeros in the missing places.

Papers: 'CSWin Transformer' - https://arxiv.org/abs/2107.00652, 'Agent Attention: On the Integration of Softmax and
Linear Attention' - https://arxiv.org/abs/2312.08874
"""

from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from vision_attn.backbones.agent.attention import add_biases, agent_grid_of, attend, reset_biases
from vision_attn.backbones.blocks import refuse_heads
from vision_attn.backbones.scripted import operator
from vision_attn.grid import Grid
from vision_attn.kernels.window import from_cells, to_cells, window_attention
from vision_attn.processors.positional import add_depthwise


@operator("attend_in_stripes(Tensor[] qkv, Tensor weight, Tensor? bias, SymInt[] sizes) -> Tensor")
def attend_in_stripes(qkv: list[Tensor], weight: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
    """Attend inside cells and add the convolution of each cell's values.

    Args:
        qkv: Queries, keys and values `[B, N, H, D]`.
        weight: Of the convolution `[C, 1, 3, 3]`.
        bias: Of the convolution `[C]`.
        sizes: Height and width of the map, and of a cell.

    Returns:
        `[B, N, C]`.
    """
    assert bias is not None  # a convolution's type allows None
    size, cell = (sizes[0], sizes[1]), (sizes[2], sizes[3])
    q, k, v = qkv
    grid = Grid(*size)
    o = window_attention(q, k, v, grid, cell)
    if cell == size:
        return add_depthwise(o, v, grid, weight, bias).flatten(2)
    o, v = (to_cells(t, grid, cell).flatten(0, 1) for t in (o, v))
    o = add_depthwise(o, v, Grid(*cell), weight, bias).unflatten(0, (len(q), -1))
    return from_cells(o, grid, cell).flatten(2)


@register_notrace_module
class StripeAttention(nn.Module):
    """Softmax attention inside stripes.

    Args:
        dim: Channels C of the branch.
        resolution: Height and width of the map that the layer is for.
        idx: 0 for vertical stripes, 1 for horizontal ones, -1 for the map.
        split_size: Width of a stripe in tokens.
        num_heads: H of the branch.
        **dd: Device and dtype of the parameters.

    Raises:
        ValueError: If `idx` is another number, or `num_heads` does not divide `dim`.
    """

    def __init__(
        self, dim: int, resolution: tuple[int, int], idx: int, split_size: int, num_heads: int, **dd: Any
    ) -> None:
        super().__init__()
        refuse_heads(dim, num_heads)
        if idx not in (-1, 0, 1):
            raise ValueError(f"idx must be -1, 0 or 1, got {idx}")
        self.resolution, self.idx, self.split_size, self.num_heads = resolution, idx, split_size, num_heads
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def cell(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of a stripe in a map of `size`."""
        return (
            size[0] if self.idx < 1 else min(self.split_size, size[0]),
            size[1] if self.idx != 0 else min(self.split_size, size[1]),
        )

    def forward(self, qkv: Tensor, size: tuple[int, int]) -> Tensor:
        """Return `[B, N, C]` for `[3, B, N, C]` of a map of `size` (height, width)."""
        heads = qkv.unflatten(3, [self.num_heads, -1]).unbind(0)
        cell = self.cell(size)
        sizes = [size[0], size[1], cell[0], cell[1]]
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return torch.ops.vision_attn.attend_in_stripes(heads, self.get_v.weight, self.get_v.bias, sizes)
        return attend_in_stripes(heads, self.get_v.weight, self.get_v.bias, sizes)


@register_notrace_module
class AgentStripeAttention(StripeAttention):
    """Agent attention inside stripes: see `StripeAttention` for the other arguments.

    Args:
        agent_num: Agents of a stripe that the biases are for, a square number.
        agent_grid: Rows and columns of the agents at use, the square root of `agent_num` each if None.
    """

    def __init__(
        self,
        dim: int,
        resolution: tuple[int, int],
        idx: int,
        split_size: int,
        num_heads: int,
        *,
        agent_num: int,
        agent_grid: tuple[int, int] | None = None,
        **dd: Any,
    ) -> None:
        super().__init__(dim, resolution, idx, split_size, num_heads, **dd)
        self.agents = agent_grid_of(agent_num, agent_grid)
        add_biases(self, num_heads, agent_num, self.cell(resolution), **dd)

    def reset_parameters(self) -> None:
        """Draw the biases anew."""
        reset_biases(self)

    def forward(self, qkv: Tensor, size: tuple[int, int]) -> Tensor:
        """Return `[B, N, C]` for `[3, B, N, C]` of a map of `size` (height, width)."""
        heads = qkv.unflatten(3, [self.num_heads, -1]).unbind(0)
        tables = [self.an_bias, self.na_bias, self.ah_bias, self.aw_bias, self.ha_bias, self.wa_bias]
        cell = self.cell(size)
        sizes = [size[0], size[1], size[0], size[1], cell[0], cell[1], self.agents[0], self.agents[1]]
        return attend(heads, tables, self.get_v.weight, self.get_v.bias, sizes)  # type: ignore[arg-type]
