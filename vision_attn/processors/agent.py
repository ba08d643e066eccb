"""Agent attention: agents pooled from the queries gather from all keys, and each grid token reads from the agents.

    a = pool(q over the grid),    V_a = softmax(scale * a k^T + B_1) v
    o = softmax([scale * q a^T + B_2,  scale * q k_t^T]) [V_a, v_t] + dwc(v)

k_t, v_t are those of the tokens outside the grid (text), which every grid token sees beside the agents, in one softmax.
Agents attend to all tokens; tokens outside the grid attend densely. The biases B are learned on a small table and
resized to the grid; dwc is a depth-wise 3 x 3 convolution over the grid.

Paper: 'Agent Attention: On the Integration of Softmax and Linear Attention' - https://arxiv.org/abs/2312.08874
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn._checks import check_bool, check_int
from vision_attn.grid import Grid
from vision_attn.kernels.agent import Agents, Direct, agent_attention
from vision_attn.kernels.backend import PerAxis, for_inference, per_axis
from vision_attn.kernels.dense import full_mask, outside, with_dense_rows
from vision_attn.kernels.image import Windows, means
from vision_attn.processors.base import AttnSpec, Layer, Processor, register
from vision_attn.processors.positional import DepthwiseBranch


@register(tests={"agent": dict(num_agents=9, biases=True, dwc=True)}, demo=[dict(num_agents=256)], bench={"agent": {}})
@dataclass(frozen=True)
class Agent(AttnSpec):
    """Agent attention as a module that can learn. Untrained it blurs; biases and convolution start at zero.

    For Stable Diffusion without training see `AgentSD`.

    Args:
        num_agents: Number of agents, which form a square of side int(sqrt(num_agents)); or (rows, columns).
        biases: Whether to learn the position biases B_1 and B_2.
        dwc: Whether to learn the convolution.
    """

    num_agents: PerAxis = 49
    biases: bool = False
    dwc: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.num_agents, (tuple, list)):
            object.__setattr__(self, "num_agents", per_axis(self.num_agents, "num_agents", 1))
        else:
            check_int("num_agents", self.num_agents, 1, "an int or (rows, columns)")
        for name in ("biases", "dwc"):
            check_bool(name, getattr(self, name))

    @property
    def agent_grid(self) -> tuple[int, int]:
        """Rows and columns of the agents."""
        if isinstance(self.num_agents, tuple):
            return self.num_agents
        side = isqrt(self.num_agents)
        return side, side

    def build(self, layer: Layer) -> "AgentAttention":
        """Return the processor of one layer."""
        return AgentAttention(self, layer)

    def attended(self, grid: Grid) -> float:
        """Return the mean share of tokens that one token attends to: agents, and tokens outside the grid."""
        agents, outside = self.agent_grid[0] * self.agent_grid[1], grid.prefix + grid.suffix
        seen = grid.image_tokens * (agents + outside) + agents * grid.tokens + outside * grid.tokens
        return min(1.0, seen / grid.tokens**2)

    @property
    def passes(self) -> float:
        """Agents are pooled of the queries, and both softmaxes read what they attend to."""
        return 1.8

    @property
    def calls(self) -> float:
        """Kernels of pooling, of both softmaxes and of their merge; the biases are resized at each call."""
        return 7.0 + 12.0 * self.biases + 2.0 * self.dwc


class AgentAttention(Processor):
    """`agent_attention` with agents pooled from the grid's queries."""

    def __init__(self, spec: Agent, layer: Layer) -> None:
        super().__init__()
        self.spec, self.backend = spec, layer.backend
        self.heads_alike = not (spec.biases or spec.dwc)
        if spec.biases:
            self.position = AgentBiases(layer.num_heads, spec.agent_grid, (7, 7), (7, 7))
        if spec.dwc:
            self.dwc = DepthwiseBranch(layer.num_heads * layer.head_dim, 3, layer.backend)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend through agents: see `Processor.forward`."""
        key_bias = query_bias = None
        if self.spec.biases:
            size = (grid.height, grid.width)
            key_bias, query_bias = self.position(size, size)
            key_bias = F.pad(key_bias, (grid.prefix, grid.suffix))
        tokens, _ = means(q, grid, Windows(count=self.spec.agent_grid), backend=for_inference(self.backend, q))
        agents = Agents(tokens, key_bias, query_bias)
        o = attend_through(q, k, v, agents, grid, mask=mask, scale=scale, backend=self.backend)
        return self.dwc(o, v, grid) if self.spec.dwc else o


def attend_through(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Agents,
    grid: Grid,
    *,
    mask: Tensor | None,
    scale: float | None,
    backend: str,
) -> Tensor:
    """Attend through agents from the tokens of the grid, and densely from the tokens outside it.

    Args:
        q: Queries `[B, N, H, D]`.
        k: Keys, like `q`.
        v: Values, like `q`.
        agents: The agents and their biases.
        grid: Where the image tokens lie.
        mask: Bool `[B, prefix + suffix]`, False for padding keys outside the grid, or None.
        scale: Factor of the logits, `D ** -0.5` if None.
        backend: How the operator runs.

    Returns:
        `[B, N, H, D]`.
    """
    whole = full_mask(mask, grid)
    everything = None if whole is None else whole[:, 0, 0]
    direct = None
    if grid.prefix + grid.suffix:
        direct = Direct(outside(k, grid), outside(v, grid), mask)
    o = agent_attention(q[:, grid.image], k, v, agents, mask=everything, direct=direct, scale=scale, backend=backend)
    return with_dense_rows(o, q, k, v, grid, mask=mask, scale=scale)


class HoldsTables(nn.Module):
    """Holds tables `[1, ...]` of five axes. A memory format of four axes, `channels_last`, takes the last four of them.

    PyTorch alone refuses it, after it has changed a part of the model.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(functools.partial(_changed, fn), recurse)


def _changed(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    try:
        return fn(t)
    except RuntimeError:
        if t.dim() != 5:
            raise
        return fn(t[0])[None]


class AgentBiases(HoldsTables):
    """The position biases of agents and tokens: each is the sum of a table, rows and columns, resized bilinearly.

    Args:
        num_heads: H.
        agent_grid: Rows and columns of the agents that the parameters are for; A is their product.
        query_size: Height and width of the queries' grid that the parameters are for.
        key_size: Height and width of the keys' grid that the parameters are for.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        an_bias: Table of B_1 `[H, A, 7, 7]`; ah_bias `[1, H, A, height, 1]` and aw_bias `[1, H, A, 1, width]` are its
            rows and columns.
        na_bias: Table of B_2 `[H, A, 7, 7]`; ha_bias `[1, H, height, 1, A]`, wa_bias `[1, H, 1, width, A]`.
    """

    def __init__(
        self,
        num_heads: int,
        agent_grid: tuple[int, int],
        query_size: tuple[int, int],
        key_size: tuple[int, int],
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        H, A = num_heads, agent_grid[0] * agent_grid[1]
        shapes = dict(
            an_bias=(H, A, 7, 7),
            na_bias=(H, A, 7, 7),
            ah_bias=(1, H, A, key_size[0], 1),
            aw_bias=(1, H, A, 1, key_size[1]),
            ha_bias=(1, H, query_size[0], 1, A),
            wa_bias=(1, H, 1, query_size[1], A),
        )
        self.agent_grid = agent_grid
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)))

    def tables(self) -> list[Tensor]:
        """Return the parameters in the order that `position_biases` takes."""
        return [getattr(self, name) for name in ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias")]

    def forward(
        self, query_size: tuple[int, int], key_size: tuple[int, int], agent_grid: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return B_1 `[H, A, keys]` and B_2 `[H, queries, A]`, for any sizes and any grid of agents."""
        return position_biases(self.tables(), (self.agent_grid, agent_grid or self.agent_grid), query_size, key_size)


def position_biases(
    tables: list[Tensor],
    agent_grids: tuple[tuple[int, int], tuple[int, int]],
    query_size: tuple[int, int],
    key_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Return B_1 `[H, A, keys]` and B_2 `[H, queries, A]` of `AgentBiases.tables`.

    Args:
        tables: `[an_bias, na_bias, ah_bias, aw_bias, ha_bias, wa_bias]`.
        agent_grids: Rows and columns of the agents that the tables are for, and of the agents to return biases for.
        query_size: Height and width of the queries' grid.
        key_size: Height and width of the keys' grid.
    """
    an, na, ah, aw, ha, wa = tables
    rows, columns = (t[0].permute(0, 3, 1, 2) for t in (ha, wa))  # [H, A, height, width]
    first = agent_bias(an, ah[0], aw[0], key_size)
    second = agent_bias(na, rows, columns, query_size)
    if agent_grids[0] != agent_grids[1]:
        first, second = (_resize_agents(t, *agent_grids) for t in (first, second))
    return first, second.transpose(1, 2)


def agent_bias(table: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a table `[H, A, 7, 7]`, rows `[H, A, height, 1]` and columns `[H, A, 1, width]`: `[H, A, tokens]`."""
    return (_resize(table, size) + _resize(rows + columns, size)).flatten(2)


def _resize(t: Tensor, size: tuple[int, int]) -> Tensor:
    return t if tuple(t.shape[-2:]) == tuple(size) else F.interpolate(t, size, mode="bilinear")


def _resize_agents(t: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize the agent axis of `[H, A, tokens]`."""
    grid = t.transpose(1, 2).unflatten(2, old)  # [H, tokens, rows, columns]
    return _resize(grid, new).flatten(2).transpose(1, 2)
