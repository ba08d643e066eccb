"""Multipole attention: exact near by and in a few chosen cells, pooled with the right mass everywhere else.

    o_i = sum_j w_ij v_j,    w_i = softmax over { scale * q_i . k_j : j exact }
                                          + { scale * q_i . mean(k_c) + log |c| + m_l : c pooled at level l }

A local window throws the far field away, and a pretrained model misses it. Here each far token is still counted, in a
mean that weighs as much as the tokens |c| it stands for, so that a converted model draws well before any training. The
levels are those of the fast multipole method: the further away, the larger the means. m_l, an offset of each head and
level, and the weights of the tokens in a mean are learned, and neutral at the start. Tokens outside the grid are exact,
and attend densely.

Sources: 'A Fast Algorithm for Particle Simulations' (Greengard, Rokhlin, 1987); 'FMMformer' -
https://arxiv.org/abs/2108.02347; cells chosen by their means as in 'QuadTree Attention' -
https://arxiv.org/abs/2201.02767 and 'Native Sparse Attention' - https://arxiv.org/abs/2502.11089
"""

import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn._checks import check_int
from vision_attn.grid import Grid
from vision_attn.kernels.eight_bits import EIGHT_BIT_CALLS, EIGHT_BIT_PASSES
from vision_attn.kernels.multipole import Cells, choose_cells, multipole_attention
from vision_attn.processors.base import AttnSpec, Layer, Processor, register

_NEAR, _CHOSEN, _POOLED = 1.0, 0.4, 0.1  # tones of a picture
LEVELS = 12  # a grid of 8 * 2^12 tokens a side has no more


@register(
    tests={
        "multipole": dict(cell=2, near=0, pool=1, exact=1),
        "multipole-pool": dict(cell=2, pool=2, exact=2, group=2),
    },
    demo=[{}],
    bench={"multipole": {}, "multipole e0": dict(exact=0)},
    draws_untrained=True,
    first=True,
)
@dataclass(frozen=True)
class Multipole(AttnSpec):
    """Near cells and a few chosen ones exactly, the rest as means that count as their tokens. Needs no training.

    Args:
        cell: Side of a cell in tokens; all tokens of a cell see the same. Grids of any size will do: at the borders
            cells are what is left.
        near: Cells within this Chebyshev distance of a token's own are exact: 1 for 3 x 3 cells.
        pool: Side of the finest means in tokens; it must divide `cell`.
        exact: How many further cells are exact: those that a cell's mean query weighs most. They are chosen for each
            sample and head at every call.
        group: How many neighbouring heads choose together; the last group may have fewer.
        spread: How much the spread of a cell's keys counts in the choice: 0 weighs its mean key, 1 the best key that
            the bounds of its keys allow.
        hold: For how many calls of inference a choice is kept: 1 chooses at every call. Compiled code, and calls with
            gradients, choose at every call.
        precision: 'int8' or 'fp8' for products in 8 bits (SageAttention 2, https://arxiv.org/abs/2411.10958), in
            inference alone; None for those of the model's dtype, which train.
    """

    cell: int = 8
    near: int = 1
    pool: int = 4
    exact: int = 4
    group: int = 1
    spread: float = 0.5
    hold: int = 1
    precision: str | None = None

    def __post_init__(self) -> None:
        self.cells()
        check_int("hold", self.hold, 1)

    def cells(self, **learned: Any) -> Cells:
        """Return what the operator takes."""
        sizes = self.cell, self.near, self.pool, self.exact, self.group, self.spread
        return Cells(*sizes, precision=self.precision, **learned)

    def build(self, layer: Layer) -> "MultipoleAttention":
        """Return the processor of one layer."""
        return MultipoleAttention(self, layer)

    def attended(self, grid: Grid) -> float:
        """Return the mean share of a sequence's tokens that one token attends to, each mean counted as one."""
        near = math.prod(_near(side, self.cell, self.near) for side in (grid.height, grid.width))
        far = sum(self._means(grid, level) for level in range(self._levels(grid)))
        exact = min(self.exact * self.cell**2, grid.image_tokens - near)
        outside = grid.prefix + grid.suffix
        keys = min(near + exact + far, grid.image_tokens) + outside
        return (grid.image_tokens * keys + outside * grid.tokens) / grid.tokens**2

    def tones(self, grid: Grid, row: int, column: int) -> Tensor:
        """Return 1 for the tokens of near cells, 0.4 for those of chosen ones, and 0.1 for what is met as means.

        Queries and keys decide which cells are chosen; here they are random.
        """
        cells = self.cells()
        layout = cells.layout(grid, torch.device("cpu"))
        draw = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 1, grid.tokens, 1, 16, generator=draw)
        place = row // self.cell * layout.size[1] + column // self.cell
        found = torch.full((grid.height, grid.width), _POOLED)
        for exact, tone in ((choose_cells(q, k, grid, cells)[0, 0, place], _CHOSEN), (layout.near[place], _NEAR)):
            for top, bottom, left, right in layout.tokens[exact].tolist():
                found[top:bottom, left:right] = tone
        return found

    def _levels(self, grid: Grid) -> int:
        """How many levels a grid has: until the neighbourhood of every cell is all of it."""
        levels = 0
        while math.ceil(max(grid.height, grid.width) / (self.cell << levels)) - 1 > self.near:
            levels += 1
        return levels

    def _means(self, grid: Grid, level: int) -> float:
        """Mean number of means of one level that a token sees: those of its parent's neighbourhood but not its own."""
        cell, pool = self.cell << level, self.pool << level
        sides = grid.height, grid.width
        parents = math.prod(_near(side, 2 * cell, self.near, pool) for side in sides)
        return parents - math.prod(_near(side, cell, self.near, pool) for side in sides)

    @property
    def passes(self) -> float:
        """Means and the choice read q, k and v once more; in 8 bits they are read, written and read in fewer bytes."""
        return 1.0 + (EIGHT_BIT_PASSES if self.precision else 1.0)

    @property
    def calls(self) -> float:
        """Kernels of the means, of the choice and of the attention itself, and of what is quantised."""
        return (15.0 if self.exact else 10.0) + (EIGHT_BIT_CALLS - 1 if self.precision else 0.0)


def _near(side: int, cell: int, near: int, unit: int = 1) -> float:
    """Units of `unit` tokens along a side within `near` cells of a token's own, in the mean over the tokens."""
    total = 0
    for first in range(0, side, cell):
        begin, end = max(first - near * cell, 0), min(first + (near + 1) * cell, side)
        total += (min(first + cell, side) - first) * (math.ceil(end / unit) - begin // unit)
    return total / side


class MultipoleAttention(Processor):
    """`multipole_attention` with learned masses and weights.

    Attributes:
        mass: m, added to the logits of the means of each head and level `[H, levels]`.
        pool_weight: Logarithms of the weights of a mean's tokens `[pool, pool]`.
    """

    heads_alike = True  # groups of heads in the batch have rows of their own in `mass`

    def __init__(self, spec: Multipole, layer: Layer) -> None:
        super().__init__()
        self.spec, self.backend = spec, layer.backend
        self.counts_calls = spec.hold > 1 and spec.exact > 0
        self.mass = nn.Parameter(torch.zeros(layer.num_heads, LEVELS))
        self.pool_weight = nn.Parameter(torch.zeros(spec.pool, spec.pool))
        self._held = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_held": threading.local()})

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend near and far: see `Processor.forward`."""
        cells = self.spec.cells(
            mass=self.mass.to(q.device),  # offloading may have parked it elsewhere
            weights=self.pool_weight.to(q.device),
            chosen=self._chosen(q, k, grid, scale),
        )
        o = multipole_attention(q, k, v, grid, cells, mask=mask, scale=scale, backend=self.backend)
        if torch.is_grad_enabled() and cells.covers(grid):  # training over processes waits for every gradient
            o = o + (0 * (self.mass.sum() + self.pool_weight.sum())).to(o)
        return o

    def _chosen(self, q: Tensor, k: Tensor, grid: Grid, scale: float | None) -> Tensor | None:
        """Return the choice that is kept for this call; None lets the operator choose."""
        spec = self.spec
        if spec.hold == 1 or not spec.exact or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        key = (grid, q.shape, q.device)
        held, chosen, calls = getattr(self._held, "choice", (None, None, 0))
        if held != key or calls >= spec.hold:
            chosen, calls = choose_cells(q, k, grid, spec.cells(weights=self.pool_weight.to(q.device)), scale=scale), 0
        self._held.choice = key, chosen, calls + 1
        return chosen
