"""Agent attention with its own projections, under the parameter names of the authors' checkpoints.

    o = proj(agents(q, k, v, B_1, B_2) + dwc(v))

See `vision_attn.processors.agent` for the formula. The biases are resized (bilinear) to the map and, on request, to
another grid of agents, as the authors do for detection. So one set of weights works for any height and width.

Paper: 'Agent Attention: On the Integration of Softmax and Linear Attention' - https://arxiv.org/abs/2312.08874
"""

from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from vision_attn.backbones.blocks import refuse_heads
from vision_attn.backbones.cswin_layers import StripeAttention
from vision_attn.backbones.pvt_layers import ReducedAttention
from vision_attn.backbones.registry import operator
from vision_attn.backbones.swin_layers import RolledAttention
from vision_attn.grid import Grid
from vision_attn.kernels.agent import Agents, agent_attention
from vision_attn.kernels.image import Windows, add_depthwise, means
from vision_attn.kernels.window import from_cells, inside_cells, to_cells
from vision_attn.processors.agent import AgentBiases, HoldsTables, position_biases

Size = tuple[int, int]


def attend(qkv: list[Tensor], tables: list[Tensor], weight: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
    """Attend through agents inside every cell of the grid and add the convolution of the values.

    Args:
        qkv: Queries `[B, N, H, D]`, keys and values `[B, M, H, D]`; the first token is a class token if there are
            eight tables.
        tables: `AgentBiases.tables`, and for a class token ac_bias `[1, H, A, 1]` and ca_bias `[1, H, 1, A]`.
        weight: Weight of the convolution `[C, 1, 3, 3]`.
        bias: Bias of the convolution `[C]`.
        sizes: Height and width of the queries' grid, of the keys' grid and of a cell, then rows and columns of the
            agents. If there is more than one cell, both grids are equal.

    Returns:
        `[B, N, C]`.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return torch.ops.vision_attn.attend_through_agents(qkv, tables, weight, bias, sizes)
    return attend_through_agents(qkv, tables, weight, bias, sizes)


@operator("attend_through_agents(Tensor[] qkv, Tensor[] tables, Tensor weight, Tensor? bias, SymInt[] sizes) -> Tensor")
def attend_through_agents(
    qkv: list[Tensor], tables: list[Tensor], weight: Tensor, bias: Tensor | None, sizes: list[int]
) -> Tensor:
    """Compute `attend`."""
    q, k, v = qkv
    assert bias is not None  # a convolution's type allows None
    local = (weight, bias)
    size, key_size, cell, agents = ((sizes[i], sizes[i + 1]) for i in (0, 2, 4, 6))
    if cell == size:
        return _attend(q, k, v, tables, local, (size, key_size, agents), None).flatten(2)
    grid, batch = Grid(*size), q.shape[0]
    inside = inside_cells(grid, cell, q.device)
    mask = None if inside is None else inside.repeat(batch, 1)
    q, k, v = (to_cells(t, grid, cell).flatten(0, 1) for t in (q, k, v))
    o = _attend(q, k, v, tables, local, (cell, cell, agents), mask)
    return from_cells(o.unflatten(0, (batch, -1)), grid, cell).flatten(2)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    local: tuple[Tensor, Tensor],
    sizes: tuple[Size, Size, Size],
    mask: Tensor | None,
) -> Tensor:
    size, key_size, agents = sizes
    side = isqrt(tables[0].shape[1])
    key_bias, query_bias = position_biases(tables[:6], ((side, side), agents), size, key_size)
    prefix = 0
    if len(tables) > 6:
        ac, ca = (t[0] for t in tables[6:])
        key_bias, query_bias, prefix = torch.cat([ac, key_bias], -1), torch.cat([ca, query_bias], 1), 1
    grid = Grid(*size, prefix=prefix)
    tokens, _ = means(q, grid, Windows(count=agents), backend="torch")
    o = agent_attention(q, k, v, Agents(tokens, key_bias, query_bias), mask=mask)
    if size != key_size:
        image = v.flatten(2).transpose(1, 2).unflatten(2, key_size)
        image = F.interpolate(image, size, mode="bilinear")
        v = image.flatten(2).transpose(1, 2).unflatten(2, v.shape[2:])
    return add_depthwise(o, v, grid, *local, backend="torch")


def add_biases(
    layer: nn.Module,
    num_heads: int,
    agent_num: int,
    size: Size,
    *,
    key_size: Size | None = None,
    class_token: bool = False,
    **dd: Any,
) -> None:
    """Register the biases of agents as parameters of a layer.

    Args:
        layer: The layer; its `reset_parameters` must call `reset_biases`.
        num_heads: H.
        agent_num: Number of agents for which the biases are made; a square number.
        size: Height and width of the map for which the biases are made.
        key_size: Height and width of the keys' map; `size` if None.
        class_token: Also register the biases ac_bias and ca_bias of a class token.
        **dd: Device and dtype of the parameters.

    Raises:
        ValueError: If `agent_num` is not a square number.
    """
    side = isqrt(max(agent_num, 0))
    if side < 1 or side**2 != agent_num:
        raise ValueError(f"agent_num must be a square number, got {agent_num}")
    biases = AgentBiases(num_heads, (side, side), size, key_size or size, **dd)
    for name, table in biases.named_parameters():
        layer.register_parameter(name, table)
    shapes = dict(ac_bias=(1, num_heads, agent_num, 1), ca_bias=(1, num_heads, 1, agent_num))
    for name, shape in shapes.items():
        layer.register_parameter(name, nn.Parameter(torch.zeros(shape, **dd)) if class_token else None)
    reset_biases(layer)


def reset_biases(layer: nn.Module) -> None:
    """Draw new biases of a layer, as the authors do."""
    for table in layer.parameters(recurse=False):
        trunc_normal_(table, std=0.02)


def agent_grid_of(agent_num: int, agent_grid: Size | None) -> Size:
    """Return rows and columns of the agents in use."""
    return agent_grid or (isqrt(agent_num), isqrt(agent_num))


@register_notrace_module
class AgentSelfAttention(HoldsTables, RolledAttention):
    """Agent attention over all tokens of a map, with or without a class token.

    Args:
        dim: Channels C.
        num_heads: H.
        agent_num: Number of agents for which the biases are made; a square number.
        size: Height and width of the map for which the biases are made.
        class_token: Whether a class token precedes the tokens of the map.
        agent_grid: Rows and columns of the agents in use; if None, the square root of `agent_num` for both.
        window: Height and width of windows inside which tokens attend; None for the whole map.
        qkv_bias: Whether the projection to q, k and v has a bias.
        proj_drop: Dropout of the output.
        **dd: Device and dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agent_num: int,
        size: Size,
        *,
        class_token: bool = False,
        agent_grid: Size | None = None,
        window: Size | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__(window)
        refuse_heads(dim, num_heads)
        self.num_heads, self.class_token = num_heads, class_token
        self.agents = agent_grid_of(agent_num, agent_grid)
        add_biases(self, num_heads, agent_num, size, class_token=class_token, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """Draw new biases."""
        reset_biases(self)

    def attend(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Attend inside windows at their place: see `RolledAttention.forward`."""
        shape = x.shape
        if size is None:
            size = (shape[1], shape[2])
            x = x.flatten(1, 2)
        qkv = self.qkv(x).unflatten(2, [3, self.num_heads, -1]).unbind(2)
        tables = [self.an_bias, self.na_bias, self.ah_bias, self.aw_bias, self.ha_bias, self.wa_bias]
        if self.ac_bias is not None and self.ca_bias is not None:
            tables += [self.ac_bias, self.ca_bias]
        cell = self.cell(size)
        sizes = [size[0], size[1], size[0], size[1], cell[0], cell[1], self.agents[0], self.agents[1]]
        o = attend(qkv, tables, self.dwc.weight, self.dwc.bias, sizes)  # type: ignore[arg-type]
        return self.proj_drop(self.proj(o)).reshape(shape)


@register_notrace_module
class AgentReducedAttention(HoldsTables, ReducedAttention):
    """PVT's attention to the keys of a reduced map, through agents: `o = W (agents(q, k, v) + dwc(upsampled v))`.

    Args:
        dim: Channels C.
        num_heads: H.
        agent_num: Number of agents for which the biases are made; a square number.
        size: Height and width of the map for which the biases are made.
        agent_grid: Rows and columns of the agents in use; if None, the square root of `agent_num` for both.
        sr_ratio: The keys' map is this many times smaller per side.
        qkv_bias: Whether the projections to q, k and v have a bias.
        proj_drop: Dropout of the output.
        **dd: Device and dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agent_num: int,
        size: Size,
        *,
        agent_grid: Size | None = None,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__(dim, num_heads, sr_ratio=sr_ratio, qkv_bias=qkv_bias, proj_drop=proj_drop, **dd)
        self.agents = agent_grid_of(agent_num, agent_grid)
        key_size = max(1, size[0] // sr_ratio), max(1, size[1] // sr_ratio)
        add_biases(self, num_heads, agent_num, size, key_size=key_size, **dd)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def reset_parameters(self) -> None:
        """Draw new biases."""
        reset_biases(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended map `[B, height, width, C]`."""
        tables = [self.an_bias, self.na_bias, self.ah_bias, self.aw_bias, self.ha_bias, self.wa_bias]
        height, width = x.shape[1], x.shape[2]
        keys = [max(1, height // self.sr_ratio), max(1, width // self.sr_ratio)]
        sizes = [height, width, keys[0], keys[1], height, width, self.agents[0], self.agents[1]]
        o = attend(self.project(x), tables, self.dwc.weight, self.dwc.bias, sizes)  # type: ignore[arg-type]
        return self.proj_drop(self.proj(o)).reshape(x.shape)


@register_notrace_module
class AgentStripeAttention(HoldsTables, StripeAttention):
    """CSwin's attention inside stripes, through agents. See `StripeAttention` for the other arguments.

    Where the last stripe is smaller, agents are pooled with zeros in the missing places.

    Args:
        agent_num: Number of agents of a stripe for which the biases are made; a square number.
        agent_grid: Rows and columns of the agents in use; if None, the square root of `agent_num` for both.
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
        """Draw new biases."""
        reset_biases(self)

    def forward(self, qkv: Tensor, size: tuple[int, int]) -> Tensor:
        """Return `[B, N, C]` for `[3, B, N, C]` of a map of `size` (height, width)."""
        heads = qkv.unflatten(3, [self.num_heads, -1]).unbind(0)
        tables = [self.an_bias, self.na_bias, self.ah_bias, self.aw_bias, self.ha_bias, self.wa_bias]
        cell = self.cell(size)
        sizes = [size[0], size[1], size[0], size[1], cell[0], cell[1], self.agents[0], self.agents[1]]
        return attend(heads, tables, self.get_v.weight, self.get_v.bias, sizes)  # type: ignore[arg-type]
