"""AgentSD: agent attention for Stable Diffusion without training, by merging similar tokens.

    x'  = merge(x, ratio),    a = merge(q, agent_ratio)
    o'  = softmax(D^(-k_scale / 2) q' a^T) softmax(scale * a k'^T) v' + shortcut * v',    o = unmerge(o')

Each cell of `cell` x `cell` tokens keeps one token. Of the other tokens, those most similar to a kept one are averaged
into it, by the cosine of the tokens that enter the block. Agents are used only if they are fewer than half of the
merged tokens; otherwise the merged tokens attend to each other (which is token merging). Tokens outside the grid are
not merged; they see everything, and every grid token sees them directly beside the agents.

Papers: 'Agent Attention' (section 4.3) - https://arxiv.org/abs/2312.08874, 'Token Merging for Fast Stable Diffusion' -
https://arxiv.org/abs/2303.17604
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn._checks import check_bool, check_int, check_number
from vision_attn.grid import Grid
from vision_attn.kernels.agent import Agents
from vision_attn.kernels.backend import exporting
from vision_attn.kernels.dense import around, dense_attention, full_mask, outside, with_dense_rows
from vision_attn.processors.agent import attend_through
from vision_attn.processors.base import AttnSpec, Layer, Moment, Processor, register
from vision_attn.processors.schedule import Schedule
from vision_attn.processors.token_merging import Matching


@register(
    tests={"agent-sd": dict(cell=(1, 2), ratio=0.5, agent_ratio=0.9, max_downsample=2, random=False)},
)
@dataclass(frozen=True)
class AgentSD(AttnSpec):
    """Agents from merged tokens, at the host's full resolution only. Needs no training, and has no parameters.

    `AgentSD.schedule()` is what the authors run: agents early, token merging alone later.

    Args:
        cell: Side of a cell in tokens, or its (height, width).
        ratio: Share of the tokens that are merged away.
        agent_ratio: Share of the tokens that are merged away to make the agents.
        k_scale: Exponent: the logits of queries and agents are scaled by `D ** (-0.5 * k_scale)`.
        shortcut: Factor of a token's own value, which is added to its output.
        max_downsample: Layers whose grid is smaller than the finest by more than this factor per side stay dense.
        random: Whether the token that a cell keeps is drawn (if the batch is even); otherwise it is the top left one.
    """

    cell: int | tuple[int, int] = 4
    ratio: float = 0.4
    agent_ratio: float = 0.95
    k_scale: float = 0.3
    shortcut: float = 0.075
    max_downsample: int = 1
    random: bool = True

    def __post_init__(self) -> None:
        sides = self.cell if isinstance(self.cell, tuple) else (self.cell,)
        if isinstance(self.cell, tuple) and len(sides) != 2:
            raise ValueError(f"cell must be a side or (height, width), got {self.cell}")
        for name, value in (*(("cell", side) for side in sides), ("max_downsample", self.max_downsample)):
            check_int(name, value, 1)
        check_bool("random", self.random)
        for name in ("ratio", "agent_ratio", "k_scale", "shortcut"):
            value = getattr(self, name)
            check_number(name, value)
            if math.isinf(value):
                raise ValueError(f"{name} must be finite, got {value}")
            if name in ("ratio", "agent_ratio") and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")

    @property
    def cell_size(self) -> tuple[int, int]:
        """Height and width of a cell."""
        return self.cell if isinstance(self.cell, tuple) else (self.cell, self.cell)

    @staticmethod
    def schedule() -> Schedule:
        """Return the authors' schedule: agents in the first 40 % of the steps, then token merging alone."""
        return Schedule(((0.4, AgentSD()), (1.0, AgentSD(cell=2, ratio=0.4, agent_ratio=0.5))))

    def build(self, layer: Layer) -> "AgentSDAttention":
        """Return the processor of one layer."""
        return AgentSDAttention(self, layer)

    def attended(self, grid: Grid) -> float:
        """Return the mean share of tokens that one token attends to, at full resolution."""
        kept, agents = self.counts(grid)
        outside = grid.prefix + grid.suffix
        through = 2 * kept * agents + kept * outside if self.has_agents(kept, agents) else kept * (kept + outside)
        return min(1.0, (through + outside * grid.tokens) / grid.tokens**2)

    @property
    def calls(self) -> float:
        """Matching and merging are many small operations of PyTorch."""
        return 75.0

    def counts(self, grid: Grid) -> tuple[int, int]:
        """Return how many grid tokens remain, and how many agents there are."""
        n = grid.image_tokens
        height, width = self.cell_size
        others = n - (grid.height // height) * (grid.width // width)
        return n - min(others, int(n * self.ratio)), n - min(others, int(n * self.agent_ratio))

    @staticmethod
    def has_agents(kept: int, agents: int) -> bool:
        """Whether the agents are few enough to be of use."""
        return agents * 2 < kept


class AgentSDAttention(Processor):
    """Merges q, k and v (the same as projecting merged tokens), attends, and unmerges the outputs."""

    wants = True

    def __init__(self, spec: AgentSD, layer: Layer) -> None:
        super().__init__()
        self.spec, self.backend = spec, layer.backend

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid,
        mask: Tensor | None = None,
        scale: float | None = None,
        moment: Moment | None = None,
    ) -> Tensor:
        """Attend through agents: see `Processor.forward`; `moment` has the tokens that entered the block."""
        spec, moment = self.spec, moment or Moment()
        height, width = spec.cell_size
        if moment.downsample(grid) > spec.max_downsample or grid.height < height or grid.width < width:
            return dense_attention(q, k, v, mask=full_mask(mask, grid), scale=scale)
        matching = Matching.of(_metric(moment.block_input, k, grid), grid, spec.cell_size, self._generator(q, moment))
        kept, agents = spec.counts(grid)
        n = grid.image_tokens
        short_q, short_k, short_v = (self._merge(t, grid, matching, n - kept) for t in (q, k, v))
        inner = Grid(1, kept, grid.prefix, grid.suffix)
        if spec.has_agents(kept, agents):
            through = Agents(
                matching.merge(q[:, grid.image], n - agents), query_scale=q.shape[-1] ** (-0.5 * spec.k_scale)
            )
            o = attend_through(short_q, short_k, short_v, through, inner, mask=mask, scale=scale, backend=self.backend)[
                :, inner.image
            ]
            o = o + spec.shortcut * short_v[:, inner.image]
        else:
            o = dense_attention(short_q, short_k, short_v, mask=full_mask(mask, inner), scale=scale)[:, inner.image]
        return with_dense_rows(matching.unmerge(o, n - kept), q, k, v, grid, mask=mask, scale=scale)

    def _generator(self, q: Tensor, moment: Moment) -> torch.Generator | None:
        """Draw for even batches only, as the authors do: they expect the unconditional half in the same batch."""
        if not self.spec.random or moment.random is None:
            return None
        if exporting():
            raise NotImplementedError("AgentSD(random=True) draws anew at each step, so export AgentSD(random=False)")
        if q.shape[0] % 2:
            return None
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "AgentSD(random=True) drew the tokens that cells keep, and gradient checkpointing would draw others: "
                "AgentSD(random=False)"
            )
        return moment.random(q.device)

    @staticmethod
    def _merge(t: Tensor, grid: Grid, matching: Matching, merged: int) -> Tensor:
        return around(outside(t, grid), matching.merge(t[:, grid.image], merged), grid)


def _metric(block_input: Tensor | None, k: Tensor, grid: Grid) -> Tensor:
    """Return the tokens `[B, height * width, C]` whose cosines tell which are alike, scaled to length 1."""
    tokens = block_input
    if tokens is not None and tokens.shape[1] == grid.tokens:
        tokens = tokens[:, grid.image]
    if tokens is None or tokens.shape[:2] != (k.shape[0], grid.image_tokens):
        tokens = k[:, grid.image].flatten(2)
    return F.normalize(tokens.detach().to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)
