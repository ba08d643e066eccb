"""Multipole attention in differentiable PyTorch, for derivatives of any kind, `torch.func` and export.

`multipole_attention` runs it where PyTorch must look into the operator of `portable.py`. It is slower, and holds the
logits of all cells at once. No value of a tensor decides what runs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.multipole.cells import Cells, by_head, counts_of
from vision_attn.kernels.window import from_cells, inside_cells, to_cells


def plain_multipole(
    q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, k_means: Tensor, v_means: Tensor,
    mass: Tensor | None, hidden: Tensor | None, chosen: Tensor, size: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    """Grid queries `[B, height * width, H, D]` over their cells, the means `[B, M, H, D]` and shared keys.

    `size` is height, width, cell, near, pool, and what else `portable.py` takes: here all queries attend.
    """
    height, width, cell, near, pool = size[:5]
    grid, sides, wide = Grid(height, width), (cell, cell), torch.promote_types(q.dtype, torch.float32)
    layout = Cells(cell, near, pool, 0).layout(grid, q.device)
    C = len(layout.near)
    queries, keys, values = (to_cells(t.to(wide), grid, sides).permute(0, 3, 1, 2, 4) for t in (q, k, v))
    queries = queries * scale  # [B, H, C, L, D]
    exact = torch.cat([layout.near.expand(*chosen.shape[:3], -1), chosen], 3)  # [B, H, C, S]
    scores = queries @ _cells(keys, exact).mT  # [B, H, C, L, S * L]
    inside = inside_cells(grid, sides, q.device)
    there = layout.near.new_ones(C, cell * cell, dtype=torch.bool) if inside is None else inside
    there = F.pad(there, (0, 0, 0, 1))[exact].flatten(3)  # [B, H, C, S * L], no token of the cell that is none
    scores = scores.masked_fill(~there[:, :, :, None], -torch.inf)
    count = counts_of(layout, layout.slots, chosen)  # [B, H, C, P]
    bias = count.clamp(min=1).to(wide).log()
    if mass is not None:
        level = layout.levels[layout.slots].clamp(max=mass.shape[1] - 1)
        bias = bias + by_head(mass.to(wide), *chosen.shape[:2])[..., level]
    bias = bias.masked_fill(count == 0, -torch.inf)[:, :, :, None]
    means_k, means_v = (_means(t.to(wide), layout.slots) for t in (k_means, v_means))  # [B, H, C, P, D]
    parts, seen = [scores, queries @ means_k.mT + bias], [_cells(values, exact), means_v]
    if k_shared.shape[1]:
        shared_k, shared_v = (t.to(wide).transpose(1, 2)[:, :, None] for t in (k_shared, v_shared))
        beside = queries @ shared_k.mT  # [B, H, C, L, T]
        parts.append(beside if hidden is None else beside + hidden.to(wide)[:, None, None, None])
        seen.append(shared_v)
    weights = torch.cat(parts, -1).softmax(-1).split([t.shape[-1] for t in parts], -1)
    o = sum(part @ t for part, t in zip(weights, seen, strict=True))
    assert isinstance(o, Tensor)
    return from_cells(o.permute(0, 2, 3, 1, 4), grid, sides).to(q.dtype)


def _cells(t: Tensor, exact: Tensor) -> Tensor:
    """Gather the tokens of cells `[B, H, C, L, D]` by index `[B, H, C, S]`, C for none: `[B, H, C, S * L, D]`."""
    L, D = t.shape[3:]
    rows = F.pad(t.flatten(3), (0, 0, 0, 1))  # [B, H, C + 1, L * D]
    index = exact.flatten(2)[..., None].expand(-1, -1, -1, L * D)
    return rows.gather(2, index).unflatten(2, exact.shape[2:]).unflatten(4, (L, D)).flatten(3, 4)


def _means(t: Tensor, slots: Tensor) -> Tensor:
    """Gather means `[B, M, H, D]` by index `[C, P]`, M for none: `[B, H, C, P, D]`."""
    rows = F.pad(t.transpose(1, 2), (0, 0, 0, 1))
    return rows.index_select(2, slots.flatten()).unflatten(2, slots.shape)
