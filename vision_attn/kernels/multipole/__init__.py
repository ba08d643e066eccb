"""Multipole attention: exact near by and in a few chosen cells, pooled with the right mass everywhere else.

    o_i = sum_j w_ij v_j,    w_i = softmax over { scale * q_i . k_j : j exact }
                                          + { scale * q_i . mean(k_c) + log |c| + mass : c pooled }

Exact are the tokens outside the grid, the tokens of the cells within `near` cells of the query's own, and the tokens of
the `exact` further cells that its cell weighs most. Everything else is met once, as a mean that counts as the tokens
|c| it stands for: see `cells.py`. Tokens outside the grid attend densely.

Sources: 'A Fast Algorithm for Particle Simulations' (Greengard, Rokhlin, 1987) for the levels; 'FMMformer' -
https://arxiv.org/abs/2108.02347 and 'Fast Multipole Attention' - https://arxiv.org/abs/2310.11960 for attention in one
dimension that is trained with them. This file holds the signature, the checks and the definition; `portable.py` is the
portable implementation, `op.py` the fused one; `eight_bit.py` says what is rounded where cells have a precision.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import Implementation, check_inputs, check_mask, full_precision, pick
from vision_attn.kernels.dense import full_mask
from vision_attn.kernels.eight_bits import eight_bit_reasons, refuse_gradients, rounded_weights
from vision_attn.kernels.multipole.cells import Cells, by_head, choose_cells, counts_of, means_of
from vision_attn.kernels.multipole.eight_bit import eight_bit_attention_torch, rounded_inputs
from vision_attn.kernels.multipole.op import (
    eight_bit_attention_triton,
    multipole_attention_triton,
    part_attention_triton,
)
from vision_attn.kernels.multipole.portable import multipole_attention_torch, part_attention_torch
from vision_attn.kernels.triton.launching import triton_reasons

_MOST_CELLS = 1 << 21  # whose rows and columns kernels find by products of floats

__all__ = ["Cells", "choose_cells", "multipole_attention", "part_attention", "slab_reasons"]


def multipole_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    cells: Cells,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from each grid token to near tokens exactly and to all others as means that count as their tokens.

    Prefix and suffix tokens see and are seen by everything. Logits and sums are computed in float32 at least.

    Args:
        q: Queries `[B, N, H, D]`, with `N == grid.tokens`; any strides.
        k: Keys, like `q`.
        v: Values, like `q`.
        grid: Where the image tokens lie in the sequence; any height and width.
        cells: Sides of cells and means, how many cells are exact, and what was learned of the means.
        mask: Bool `[B, prefix + suffix]` (or batch 1): False hides a key outside the grid from all queries. Keys of the
            grid cannot be hidden.
        scale: Factor of the logits, `D ** -0.5` if None.
        backend: 'triton' (CUDA, fused), 'torch' (any device), 'reference' (dense, small inputs), or 'auto' for the
            fastest that can run.

    Returns:
        `[B, N, H, D]` in the dtype of `q`.

    Raises:
        TypeError: If dtypes differ or are not floating point.
        ValueError: If shapes, devices, the cells and the grid do not fit each other, or a named backend cannot run
            (every reason is listed), or cells with a precision meet a tensor that wants a gradient.
    """
    check_inputs(q, k, v, grid)
    check_mask(q, grid, mask)
    check_cells(q, grid, cells)
    runs = multipole_attention_triton, multipole_attention_torch
    if cells.precision is not None:
        refuse_gradients(cells.precision, q, k, v, cells.mass, cells.weights)
        runs = eight_bit_attention_triton, eight_bit_attention_torch
    implementations = {
        "triton": Implementation(runs[0], _triton_reasons(q, grid, cells, backend == "auto")),
        "torch": Implementation(runs[1]),
        "reference": Implementation(_reference),
    }
    run = pick("multipole_attention", backend, implementations)
    return run(q, k, v, grid, cells, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def _triton_reasons(q: Tensor, grid: Grid, cells: Cells, auto: bool) -> list[str]:
    """List why the Triton backend cannot run; empty if it can."""
    reasons = triton_reasons(q, auto=auto) if cells.precision is None else eight_bit_reasons(q, auto=auto)
    if cells.cell < 3:
        reasons.append(f"a cell of {cells.cell} x {cells.cell} tokens is too small for a tile")
    if cells.count(grid) >= _MOST_CELLS:
        reasons.append(f"there are {cells.count(grid)} cells, and a launch has fewer than {_MOST_CELLS}")
    if auto and cells.covers(grid) and cells.precision is None:
        reasons.append("the neighbourhood of every token is the whole grid, which is dense attention")
    return reasons


def slab_reasons(q: Tensor, grid: Grid, cells: Cells, auto: bool) -> list[str]:
    """List why processes cannot attend from slabs in Triton, as `slabs.py` lays them out; empty if they can."""
    return [*_triton_reasons(q, grid, cells, auto), *["no choice on AMD's GPUs"] * (torch.version.hip is not None)]


def check_cells(q: Tensor, grid: Grid, cells: Cells) -> None:
    """Refuse tensors of `cells` that do not fit q and the grid."""
    B, _, H, _ = q.shape
    if cells.mass is not None and not _fits(cells.mass, B, H):
        raise ValueError(f"mass must be [H, levels] = [{H}, levels], got {tuple(cells.mass.shape)}")
    if cells.weights is not None and tuple(cells.weights.shape) != (cells.pool, cells.pool):
        raise ValueError(f"weights must be [pool, pool] = {(cells.pool,) * 2}, got {tuple(cells.weights.shape)}")
    want = (B, H, cells.count(grid), cells.exact)
    if cells.chosen is not None and tuple(cells.chosen.shape) != want:
        raise ValueError(f"chosen must be [B, H, cells, exact] = {want}, got {tuple(cells.chosen.shape)}")


def _fits(mass: Tensor, B: int, H: int) -> bool:
    """Whether masses are those of the heads, or of several samples' heads that repeat over the batch."""
    return mass.dim() == 2 and mass.shape[1] > 0 and mass.shape[0] % H == 0 and B * H % max(mass.shape[0], 1) == 0


@full_precision
def _reference(q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells, mask: Tensor | None, scale: float) -> Tensor:
    """The definition: a softmax over all tokens and all means, with dense masks, in float64 if q is, else float32."""
    wide, device, dtype = torch.promote_types(q.dtype, torch.float32), q.device, q.dtype
    layout, image = cells.layout(grid, device), grid.image
    chosen = choose_cells(q, k, grid, cells, scale=scale) if cells.chosen is None else cells.chosen
    softmax = partial(torch.softmax, dim=-1) if cells.precision is None else rounded_weights
    if cells.precision is None:
        q, k, v = (t.to(wide) for t in (q, k, v))
        means_k, means_v = (means_of(t[:, image], grid, cells, layout.sides) for t in (k, v))
    else:
        q, k, v, means_k, means_v = (t.to(wide) for t in rounded_inputs(q, k, v, grid, cells).all)
    number = _cell_of_token(layout.tokens[:-1], grid)  # [n]
    C, B, H = layout.near.shape[0], q.shape[0], q.shape[2]
    # who sees which cell exactly, [B, H, C, C]; none is the index C, which is dropped
    exact = torch.zeros(B, H, C, C + 1, dtype=torch.bool, device=device).scatter(3, chosen, 1)
    exact = exact.scatter(3, layout.near.expand(B, H, -1, -1), True)[..., :C]
    seen = F.pad(exact[:, :, number][..., number], (grid.prefix, grid.suffix), value=True)  # [B, H, n, N]
    hidden = full_mask(mask, grid)
    seen = seen if hidden is None else seen & hidden
    logits = torch.einsum("bnhd,bmhd->bhnm", q[:, image], k) * scale
    M = means_k.shape[1]
    left = counts_of(layout, layout.slots, chosen)  # [B, H, C, P]
    count = torch.zeros(B, H, C, M + 1, dtype=left.dtype, device=device)
    count = count.scatter_add(3, layout.slots.expand_as(left), left)[..., :M]
    count = count[:, :, number].to(wide)  # [B, H, n, M]
    far = torch.einsum("bnhd,bmhd->bhnm", q[:, image], means_k) * scale
    if cells.mass is not None:
        level = layout.levels[:M].clamp(max=cells.mass.shape[1] - 1)
        far = far + by_head(cells.mass.to(device, wide), B, H)[..., level][:, :, None]
    far = (far + count.clamp(min=1).log()).masked_fill(count == 0, -torch.inf)
    weights = softmax(torch.cat([logits.masked_fill(~seen, -torch.inf), far], -1))
    o_image = torch.einsum("bhnm,bmhd->bnhd", weights, torch.cat([v, means_v], 1))
    dense = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    if hidden is not None:
        dense = dense.masked_fill(~hidden, -torch.inf)
    o = torch.einsum("bhnm,bmhd->bnhd", softmax(dense), v)
    return torch.cat([o[:, : grid.prefix], o_image, o[:, image.stop :]], 1).to(dtype)


def _cell_of_token(boxes: Tensor, grid: Grid) -> Tensor:
    """The cell of each grid token `[height * width]`."""
    n = torch.arange(grid.image_tokens, device=boxes.device)
    y, x = (n // grid.width)[:, None], (n % grid.width)[:, None]
    inside = (y >= boxes[:, 0]) & (y < boxes[:, 1]) & (x >= boxes[:, 2]) & (x < boxes[:, 3])
    return inside.int().argmax(1)


def part_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells, means: tuple[Tensor, Tensor], rows: tuple[int, int], *,
    mask: Tensor | None, scale: float, backend: str,
) -> Tensor:  # fmt: skip
    """Attend from the tokens of some rows of cells, with means and exact cells that are known.

    Args:
        q: Queries `[B, N, H, D]`; those of other rows and outside the grid are not used.
        k: Keys, like `q`; those that no query meets are not used, but must be finite for the portable implementation
            and for gradients.
        v: Values, like `k`.
        grid: Where the image tokens lie, without a suffix.
        cells: Sides of cells and means, their masses, and the exact cells of all cells, none for those of other rows.
        means: Means of keys and values of all levels `[B, M, H, D]`, row by row and level by level.
        rows: First and last + 1 of the rows of cells.
        mask: As for `multipole_attention`.
        scale: Factor of the logits.
        backend: As for `multipole_attention`.

    Returns:
        `[B, height * width, H, D]`; arbitrary for other rows.
    """
    reasons = _triton_reasons(q, Grid(grid.height, grid.width), cells, backend == "auto")
    implementations = {
        "triton": Implementation(part_attention_triton, reasons),
        "torch": Implementation(part_attention_torch),
    }
    run = pick("multipole_attention", "torch" if backend == "reference" else backend, implementations)
    return run(q, k, v, grid, cells, means, rows, mask, scale)
