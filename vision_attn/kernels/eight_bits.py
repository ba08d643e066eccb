"""Attention in 8 bits, for inference, of local and multipole attention: what is rounded how, and the same in PyTorch.

    s_ij = c q8_i . k8_j,    p_ij = e4m3(2^(s_ij log2(e) - t_i)),    o_i = e_v sum_j p_ij v8_j / sum_j 2^(...)

- Keys lose a mean, which changes no softmax: of all tokens, or of about 4096 at equal distances where there are more.
  Queries keep theirs, as in the paper's 8-bit kernel.
- q and k become int8 or e4m3, with one scale for each head of a block: an 8 x 8 tile of a cell, or 64 of the tokens
  outside the grid by their rank. c is the product of both scales and of the logits' factor.
- Values become e4m3, with a scale for each channel of a head.
- Weights become e4m3 against t, the row's maximum rounded up to a whole number, less 8: so they are at most 2^8, and
  tiles in any order round them alike, for another maximum moves them by a power of two.
- The products with the values are summed in each tile, and the tiles in float32.

Paper: 'SageAttention2: Efficient Attention with Thorough Outlier Smoothing and Per-thread INT4 Quantization' -
https://arxiv.org/abs/2411.10958
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels import launches
from vision_attn.kernels.backend import passing
from vision_attn.kernels.dense import full_mask, outside
from vision_attn.kernels.tables import fixed, lasting
from vision_attn.kernels.triton.launching import triton_reasons

PRECISIONS = ("int8", "fp8")
CELL, SLOTS = 8, 64
_SAMPLED = 4096  # keys that a mean is taken of, at least, if there are as many
# For estimates. v is read for its scales; k and v are read and written in half of the bytes; then q, and k and v from 8
# bits, are read, and o is written. Four kernels run.
EIGHT_BIT_PASSES, EIGHT_BIT_CALLS = (1 + 3 + 2 + 1) / 4, 9.0
_HIDDEN = -1e30
_LEAST = 1e-20


def check_precision(precision: str) -> None:
    """Refuse a name that is no precision.

    Raises:
        ValueError: If it is none of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be None (that of q), 'int8' or 'fp8', got {precision!r}")


def refuse_gradients(precision: str, *tensors: Tensor | None) -> None:
    """Refuse tensors that want a gradient.

    Raises:
        ValueError: If one does.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            f"attention with precision={precision!r} has no gradient, and q, k, v or a parameter wants one: train with "
            "precision=None, or call it under torch.no_grad()"
        )


def sampled(k: Tensor) -> Tensor:
    """Return the keys whose mean all of them lose: a view `[B, n, H, D]` of k `[B, N, H, D]`."""
    return k[:, :: max(1, k.shape[1] // _SAMPLED)]


def eight_bit_reasons(q: Tensor, *, auto: bool) -> list[str]:
    """List why products in 8 bits cannot run in Triton; empty if they can."""
    reasons = triton_reasons(q, auto=auto)
    if not torch.compiler.is_compiling():  # which cannot trace the question; the launch asks it too
        reasons += launches.target_of(q.device).without_eight_bits
    return reasons


@dataclass(frozen=True)
class Blocks:
    """How the tokens of a sequence are cut into blocks that share a scale.

    Attributes:
        size: Height, width, prefix and suffix.
        steps: Rows and columns between neighbours of a sub-grid.
        cell: Side of the cells that a sub-grid is cut into; a cell is cut into tiles of 8 x 8.
    """

    size: tuple[int, int, int, int]
    steps: tuple[int, int] = (1, 1)
    cell: int = CELL

    @classmethod
    def of(cls, grid: Grid, steps: Sequence[int] = (1, 1), cell: int = CELL) -> "Blocks":
        """Return the blocks of a grid."""
        return cls((grid.height, grid.width, grid.prefix, grid.suffix), (steps[0], steps[1]), cell)

    @property
    def split(self) -> int:
        """Tiles along the side of a cell."""
        return math.ceil(self.cell / CELL)

    @property
    def outside(self) -> int:
        """Blocks of tokens outside the grid, which come first."""
        return math.ceil(sum(self.size[2:]) / SLOTS)

    @property
    def cells(self) -> int:
        """Blocks of cells: sub-grid by sub-grid, cell by cell, and tile by tile."""
        sides = [math.ceil(math.ceil(s / d) / self.cell) for s, d in zip(self.size[:2], self.steps, strict=True)]
        return math.prod(sides) * math.prod(self.steps) * self.split**2

    @property
    def count(self) -> int:
        """All blocks."""
        return self.outside + self.cells

    def places(self, device: torch.device) -> Tensor:
        """Return the token in each slot of each block, int32 `[blocks, 64]`; -1 where there is none."""
        return _places(self, device) if passing() else lasting(_kept_places(self, device))


def _places(blocks: Blocks, device: torch.device) -> Tensor:
    height, width, prefix, suffix = blocks.size
    tokens = torch.arange(prefix + height * width + suffix, dtype=torch.int32, device="cpu")
    grid = Grid(height, width, prefix, suffix)
    beside = outside(tokens[None, :, None, None], grid).flatten()
    cut = [F.pad(beside, (0, -len(beside) % SLOTS), value=-1).view(-1, SLOTS)]
    image = tokens[grid.image].view(height, width)
    cell, tiled = blocks.cell, blocks.split * CELL
    most = [math.ceil(math.ceil(s / d) / cell) * cell for s, d in zip(image.shape, blocks.steps, strict=True)]
    for y in range(blocks.steps[0]):
        for x in range(blocks.steps[1]):
            sub = image[y :: blocks.steps[0], x :: blocks.steps[1]]
            sub = F.pad(sub, (0, most[1] - sub.shape[1], 0, most[0] - sub.shape[0]), value=-1)
            cells = sub.unflatten(1, (-1, cell)).unflatten(0, (-1, cell)).transpose(1, 2).flatten(0, 1)
            cells = F.pad(cells, (0, tiled - cell, 0, tiled - cell), value=-1)  # [cells, tiled, tiled]
            tiles = cells.unflatten(2, (-1, CELL)).unflatten(1, (-1, CELL)).transpose(2, 3)
            cut.append(tiles.reshape(-1, SLOTS))
    # from the CPU, so that nothing kept here is of the memory of a CUDA graph that is being captured
    return torch.cat(cut).to(device)


@functools.lru_cache(maxsize=256)
def _kept_places(blocks: Blocks, device: torch.device) -> Tensor:
    return fixed(_places(blocks, device))


@dataclass(frozen=True)
class Rounded:
    """q, k and v `[B, N, H, D]` in float32, with the values that they have in 8 bits; k without its mean.

    Attributes:
        k_mean: What k has lost `[B, 1, H, D]`.
        v_scale: What a whole number of v stands for `[B, 1, H, D]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_mean: Tensor
    v_scale: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, precision: str | None) -> "Rounded":
        """Round the tokens of a sequence."""
        q, k, v = (t.float() for t in (q, k, v))
        places, k_mean = blocks.places(q.device), sampled(k).mean(1, keepdim=True)
        v_scale = v.abs().amax(1, keepdim=True) / 448
        q, k = (_rounded_blocks(t, places, precision) for t in (q, k - k_mean))
        return cls(q, k, rounded_values(v, v_scale), k_mean, v_scale)


def _rounded_blocks(t: Tensor, places: Tensor, precision: str | None) -> Tensor:
    """Round `[B, N, H, D]` with a scale for each head of each of the blocks `[blocks, 64]`."""
    N = t.shape[1]
    top = (t.abs().amax(3)[:, places.clamp(min=0)] * (places >= 0)[None, :, :, None]).amax(2)  # [B, blocks, H]
    slots = torch.where(places < 0, N, places).flatten().long()
    block = torch.arange(len(slots), device=t.device) // SLOTS
    of_token = block.new_zeros(N + 1).scatter(0, slots, block)[:N]
    return rounded_to(t, top[:, of_token, :, None], precision)


def rounded_to(t: Tensor, top: Tensor, precision: str | None) -> Tensor:
    """Round numbers of which `top` are the largest ones that share a scale: to int8 or e4m3."""
    top = top.clamp(min=_LEAST)
    if precision == "int8":
        return torch.round(t * (127 / top)) * (top / 127)
    return to_e4m3(t * (448 / top)) * (top / 448)


def rounded_values(v: Tensor, scale: Tensor) -> Tensor:
    """Round values to e4m3."""
    return to_e4m3(v * (1 / scale.clamp(min=_LEAST))) * scale


def to_e4m3(t: Tensor) -> Tensor:
    """Round to the nearest number of e4m3, which has three bits behind the first; at most 448."""
    return t.to(torch.float8_e4m3fn).to(t.dtype)


def rounded_weights(scores: Tensor) -> Tensor:
    """Return a softmax over the last axis, of weights that are rounded to e4m3 before they are divided by their sum."""
    scores = scores * math.log2(math.e)
    weights = torch.exp2(scores - (scores.amax(-1, keepdim=True).ceil() - 8))
    return to_e4m3(weights) / weights.sum(-1, keepdim=True)


def rounded_dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Attend where `seen`, which broadcasts to `[B, H, N, M]`, with rounded weights."""
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    if seen is not None:
        logits = logits.masked_fill(~seen, _HIDDEN)
    return torch.einsum("bhnm,bmhd->bnhd", rounded_weights(logits), v)


def dense_rows(o: Tensor, x: Rounded, grid: Grid, rows: Sequence[slice], mask: Tensor | None, scale: float) -> None:
    """Write to `o` `[B, N, H, D]` what the tokens of some rows get, each of which attends to every token."""
    seen = full_mask(mask, grid)
    for part in rows:
        for h in range(o.shape[2]):  # the logits of one head at a time
            one = slice(h, h + 1)
            o[:, part, one] = rounded_dense(x.q[:, part, one], x.k[:, :, one], x.v[:, :, one], seen, scale)


def rows_outside(grid: Grid) -> tuple[slice, slice]:
    """Return the tokens before and after a grid."""
    return slice(0, grid.prefix), slice(grid.image.stop, grid.tokens)
