"""Local attention in 8 bits, for inference: what is rounded how, and the same in PyTorch.

    s_ij = c q8_i . k8_j,    p_ij = e4m3(2^(s_ij log2(e) - t_i)),    o_i = e_v sum_j p_ij v8_j / sum_j 2^(...)

- Keys lose their mean over all tokens, which changes no softmax. Queries keep theirs, as in the paper's 8-bit kernel.
- q and k become int8 or e4m3, with one scale for each head of a block: an 8 x 8 cell of a sub-grid, or 64 of the tokens
  outside the grid by their rank. c is the product of both scales and of the logits' factor.
- Values become e4m3, with a scale for each channel of a head.
- Weights become e4m3 against t, the row's maximum rounded up to a whole number, less 8: so they are at most 2^8, and
  tiles in any order round them alike, for another maximum moves them by a power of two.
- The products with the values are summed in each tile, and the tiles in float32.

Paper: 'SageAttention2: Efficient Attention with Thorough Outlier Smoothing and Per-thread INT4 Quantization' -
https://arxiv.org/abs/2411.10958
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import custom_op
from vision_attn.kernels.dense import full_mask, outside
from vision_attn.kernels.local.portable import HIDDEN, attend_grid

if TYPE_CHECKING:
    from vision_attn.kernels.local import Window

PRECISIONS = ("int8", "fp8")
CELL, SLOTS = 8, 64
# For estimates. k and v are read for their mean and scales; q, k and v are read and written in half of the bytes, and
# read again (from 16 bits); o is written. Four kernels run.
EIGHT_BIT_PASSES, EIGHT_BIT_CALLS = (2 + 3 + 1.5 + 1.5 + 1) / 4, 9.0
_LEAST = 1e-20


def refuse_gradients(precision: str, *tensors: Tensor) -> None:
    """Refuse tensors that want a gradient.

    Raises:
        ValueError: If one does.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(
            f"attention with precision={precision!r} has no gradient, and q, k or v want one: train with "
            "precision=None, or call it under torch.no_grad()"
        )


def places(grid: Grid, steps: Sequence[int], device: torch.device) -> Tensor:
    """Return the token in each slot of each block, `[blocks, 64]`; -1 where there is none."""
    tokens = torch.arange(grid.tokens, device=device)
    beside = outside(tokens[None, :, None, None], grid).flatten()
    cut = [F.pad(beside, (0, -len(beside) % SLOTS), value=-1).view(-1, SLOTS)]
    image = tokens[grid.image].view(grid.height, grid.width)
    sides = [math.ceil(math.ceil(side / step) / CELL) * CELL for side, step in zip(image.shape, steps, strict=True)]
    for y in range(steps[0]):
        for x in range(steps[1]):
            sub = image[y :: steps[0], x :: steps[1]]
            sub = F.pad(sub, (0, sides[1] - sub.shape[1], 0, sides[0] - sub.shape[0]), value=-1)
            cells = sub.unflatten(1, (-1, CELL)).unflatten(0, (-1, CELL)).transpose(1, 2)
            cut.append(cells.reshape(-1, SLOTS))
    return torch.cat(cut)


@dataclass(frozen=True)
class Rounded:
    """q, k and v `[B, N, H, D]` in float32, with the values that they have in 8 bits; k without its mean."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: "Window") -> "Rounded":
        """Round the tokens of a sequence."""
        q, k, v = (t.float() for t in (q, k, v))
        blocks = places(grid, window.geometry(grid)[2], q.device)
        q, k = (_rounded_blocks(t, blocks, window.precision) for t in (q, k - k.mean(1, keepdim=True)))
        scale = v.abs().amax(1, keepdim=True) / 448
        return cls(q, k, to_e4m3(v * (1 / scale.clamp(min=_LEAST))) * scale)


def _rounded_blocks(t: Tensor, blocks: Tensor, precision: str | None) -> Tensor:
    """Round `[B, N, H, D]` with a scale for each head of each of the blocks `[blocks, 64]`."""
    there = (blocks >= 0)[None, :, :, None]
    slots = blocks.clamp(min=0)
    top = (t.abs().amax(3)[:, slots] * there).amax(2).clamp(min=_LEAST)  # [B, blocks, H]
    of_token = torch.empty(t.shape[1], dtype=torch.long, device=t.device)
    of_token[blocks[blocks >= 0]] = (blocks >= 0).nonzero()[:, 0]
    top = top[:, of_token, :, None]  # [B, N, H, 1]
    if precision == "int8":
        return torch.round(t * (127 / top)) * (top / 127)
    return to_e4m3(t * (448 / top)) * (top / 448)


def eight_bit_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: "Window", mask: Tensor | None, scale: float
) -> Tensor:
    """Run `local_attention` with a `precision` on checked inputs, in memory O(N * window)."""
    x, image = Rounded.of(q, k, v, grid, window), grid.image
    hidden = None if mask is None else (~mask).float() * HIDDEN
    o = torch.empty_like(x.q)
    o[:, image] = rounded_grid_attention(
        x.q[:, image], x.k[:, image], x.v[:, image], outside(x.k, grid), outside(x.v, grid), hidden,
        [grid.height, grid.width], *window.geometry(grid), scale,
    )  # fmt: skip
    whole = full_mask(mask, grid, 0)
    for rows in (slice(0, grid.prefix), slice(image.stop, grid.tokens)):
        for h in range(q.shape[2]):  # the logits of one head at a time
            one = slice(h, h + 1)
            o[:, rows, one] = _dense(x.q[:, rows, one], x.k[:, :, one], x.v[:, :, one], whole, scale)
    return o.to(q.dtype)


def eight_bit_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: "Window", mask: Tensor | None, scale: float
) -> Tensor:
    """The same by a dense mask."""
    x = Rounded.of(q, k, v, grid, window)
    seen = torch.ones(1, 1, grid.tokens, grid.tokens, dtype=torch.bool, device=q.device)
    seen[..., grid.image, grid.image] = window.allowed(grid, q.device)
    whole = full_mask(mask, grid, 0)
    return _dense(x.q, x.k, x.v, seen if whole is None else seen & whole, scale).to(q.dtype)


@custom_op("vision_attn::local_grid_rounded")
def rounded_grid_attention(
    q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, hidden: Tensor | None, size: Sequence[int],
    radius: float, kernel: Sequence[int], steps: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    """Attend as `grid_attention` does, without a bias and cells, and with the weights of `rounded_weights`."""
    return attend_grid(
        q, k, v, k_shared, v_shared, None, hidden, size, radius, kernel, steps, 0, scale, rounded_weights
    )


@rounded_grid_attention.register_fake
def _(q: Tensor, *args: object) -> Tensor:
    return q.new_empty(q.shape)


def to_e4m3(t: Tensor) -> Tensor:
    """Round to the nearest number of e4m3, which has three bits behind the first; at most 448."""
    return t.to(torch.float8_e4m3fn).to(t.dtype)


def rounded_weights(scores: Tensor) -> Tensor:
    """Return a softmax over the last axis, of weights that are rounded to e4m3 before they are divided by their sum."""
    scores = scores * math.log2(math.e)
    weights = torch.exp2(scores - (scores.amax(-1, keepdim=True).ceil() - 8))
    return to_e4m3(weights) / weights.sum(-1, keepdim=True)


def _dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Attend where `seen`, which broadcasts to `[B, H, N, M]`."""
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    if seen is not None:
        logits = logits.masked_fill(~seen, HIDDEN)
    return torch.einsum("bhnm,bmhd->bnhd", rounded_weights(logits), v)
