"""Attention of cells of the grid to themselves and their halos; tokens outside the grid see and are seen by everything.

    o_i = softmax_j(scale * q_i . k_j) v_j,    j in cell(i) + halo of cell(i) + prefix + suffix

The grid is cut into cells from its top left corner; cells at the right and bottom border are smaller where it does not
divide. The halo of a cell is a frame of rows and columns around it; the border cuts it.

Papers: 'Swin Transformer' - https://arxiv.org/abs/2103.14030, 'Fast Vision Transformers with HiLo Attention' -
https://arxiv.org/abs/2205.13213, 'Scaling Local Self-Attention for Parameter Efficient Visual Backbones' (HaloNet) -
https://arxiv.org/abs/2103.12731
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vision_attn.grid import Grid
from vision_attn.kernels.backend import (
    Implementation,
    PerAxis,
    check_inputs,
    check_mask,
    exporting,
    full_precision,
    per_axis,
    pick,
    transformed,
)
from vision_attn.kernels.dense import dense_attention, full_mask, outside, with_dense_rows
from vision_attn.kernels.triton.launching import triton_reasons
from vision_attn.kernels.window.op import window_attention_triton

_MAX_SCORES = 1 << 24  # logits computed at a time: 64 MiB in float32


@dataclass(frozen=True)
class Haloed:
    """Cells of a grid, each with a halo.

    Args:
        size: Side of a cell in tokens, or a (height, width) pair.
        halo: Rows and columns of tokens around a cell that its queries see too, or a (vertical, horizontal) pair.

    Raises:
        TypeError: If a side is no int or pair of ints.
        ValueError: If a cell has no token, or a halo is below 0.
    """

    size: PerAxis
    halo: PerAxis = 0

    def __post_init__(self) -> None:
        _ = self.cell, self.around

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width of a cell."""
        return per_axis(self.size, "window_size", 1)

    @property
    def around(self) -> tuple[int, int]:
        """Rows and columns of the halo on each side."""
        return per_axis(self.halo, "halo", 0)

    def pairs(self, grid: Grid) -> int:
        """Count the (query, key) pairs inside the grid."""
        counts = []
        for side, cell, halo in zip((grid.height, grid.width), self.cell, self.around, strict=True):
            spans = ((i, min(i + cell, side)) for i in range(0, side, cell))
            counts.append(sum((stop - i) * (min(i + cell + halo, side) - max(i - halo, 0)) for i, stop in spans))
        return counts[0] * counts[1]

    def allowed(self, grid: Grid, device: torch.device | None = None) -> Tensor:
        """Return the definition: a bool mask `[height * width, height * width]`, True where query (row) sees key."""
        rows, columns = (
            _near(length, cell, halo, device)
            for length, cell, halo in zip((grid.height, grid.width), self.cell, self.around, strict=True)
        )
        return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    window_size: PerAxis | Haloed,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from each grid token to its cell of the grid, the halo of that and to every token outside the grid.

    Args:
        q: Queries `[B, N, H, D]`, with `N == grid.tokens`; any strides.
        k: Keys, like `q`.
        v: Values, like `q`.
        grid: Where the image tokens lie in the sequence.
        window_size: Side of a cell in tokens, or a (height, width) pair; cells and their halos as `Haloed`.
        mask: Bool `[B, prefix + suffix]` (or batch 1): False hides a key outside the grid from all queries.
        scale: Factor of the logits, `D ** -0.5` if None.
        backend: 'triton' (CUDA, fused), 'torch' (any device), 'reference' (dense, small inputs), or 'auto' for the
            fastest that can run.

    Returns:
        `[B, N, H, D]` in the dtype of `q`.

    Raises:
        TypeError: If dtypes differ or are not floating point.
        ValueError: If shapes, devices and the grid do not fit each other, or a named backend cannot run
            (every reason is listed).
    """
    check_inputs(q, k, v, grid)
    check_mask(q, grid, mask)
    cells = window_size if isinstance(window_size, Haloed) else Haloed(window_size)
    # a cell or a halo is never larger than the grid
    cell, halo = ((min(a, grid.height), min(b, grid.width)) for a, b in (cells.cell, cells.around))
    implementations = {
        "triton": Implementation(window_attention_triton, triton_reasons(q, auto=backend == "auto")),
        "torch": Implementation(_torch),
        "reference": Implementation(_reference),
    }
    run = pick("window_attention", backend, implementations)
    return run(q, k, v, grid, cell, halo, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cell: tuple[int, int], halo: tuple[int, int], mask: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    image, shared = grid.image, grid.prefix + grid.suffix
    queries = to_cells(q[:, image], grid, cell)
    keys, values = (_to_halos(t[:, image], grid, cell, halo) for t in (k, v))
    inside = inside_cells(grid, cell, q.device, halo)
    if shared:
        k_shared, v_shared = (outside(t, grid).transpose(1, 2) for t in (k, v))
        o = _with_shared(queries * scale, keys, values, k_shared, v_shared, inside, mask)
    else:
        hidden = None if inside is None else inside[:, None, None]
        if hidden is not None:
            hidden = hidden.expand(q.shape[0], -1, -1, -1, -1).flatten(0, 1)
        o = dense_attention(*(t.flatten(0, 1) for t in (queries, keys, values)), mask=hidden, scale=scale)
        o = o.unflatten(0, queries.shape[:2])
    return with_dense_rows(from_cells(o, grid, cell), q, k, v, grid, mask=mask, scale=scale)


def to_cells(t: Tensor, grid: Grid, cell: tuple[int, int]) -> Tensor:
    """Cut `[B, height * width, H, D]` into `[B, cells, L, H, D]`, with zeros beyond the border."""
    h, w = cell
    t = t.unflatten(1, (grid.height, grid.width))
    if grid.height % h or grid.width % w:
        t = F.pad(t, (0, 0, 0, 0, 0, -grid.width % w, 0, -grid.height % h))
    t = t.unflatten(2, (-1, w)).unflatten(1, (-1, h))  # [B, rows, h, columns, w, H, D]
    return t.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_cells(t: Tensor, grid: Grid, cell: tuple[int, int]) -> Tensor:
    """Undo `to_cells`."""
    h, w = cell
    rows, columns = -(-grid.height // h), -(-grid.width // w)
    t = t.unflatten(1, (rows, columns)).unflatten(3, (h, w)).transpose(2, 3)
    return t.flatten(3, 4).flatten(1, 2)[:, : grid.height, : grid.width].flatten(1, 2)


def _to_halos(t: Tensor, grid: Grid, cell: tuple[int, int], halo: tuple[int, int]) -> Tensor:
    """Cut `[B, height * width, H, D]` into `[B, cells, L, H, D]` of cells and halos, with zeros beyond the border."""
    if not any(halo):
        return to_cells(t, grid, cell)
    (h, w), (a, b) = cell, halo
    t = F.pad(t.unflatten(1, (grid.height, grid.width)), (0, 0, 0, 0, b, b + -grid.width % w,
                                                          a, a + -grid.height % h))  # fmt: skip
    t = t.unfold(1, h + 2 * a, h).unfold(2, w + 2 * b, w)  # [B, rows, columns, H, D, h + 2 a, w + 2 b]
    return t.permute(0, 1, 2, 5, 6, 3, 4).flatten(3, 4).flatten(1, 2)


def inside_cells(
    grid: Grid, cell: tuple[int, int], device: torch.device, halo: tuple[int, int] = (0, 0)
) -> Tensor | None:
    """Bool `[cells, L]`: which places of a cell and its halo lie in the grid; None if all do."""
    if not (grid.height % cell[0] or grid.width % cell[1] or any(halo)):
        return None
    ones = torch.ones(1, grid.image_tokens, 1, 1, dtype=torch.bool, device=device)
    return _to_halos(ones, grid, cell, halo)[0, :, :, 0, 0]


@full_precision
def _with_shared(
    q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, inside: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Attend to the own cell and to the shared keys `[B, H, E, D]`, some cells at a time."""
    if transformed() or exporting():  # neither knows of checkpoints, and an exported batch has any size
        return _cells(q, k, v, k_shared, v_shared, inside, mask)
    cells, L = q.shape[1:3]
    step = max(1, _MAX_SCORES // max(1, q.shape[0] * q.shape[3] * L * (k.shape[2] + k_shared.shape[2])))
    outputs = []
    for i in range(0, cells, step):
        part = slice(i, i + step)
        some = None if inside is None else inside[part]
        arguments: tuple[Any, ...] = (q[:, part], k[:, part], v[:, part], k_shared, v_shared, some, mask)
        many = step < cells and torch.is_grad_enabled()
        outputs.append(checkpoint(_cells, *arguments, use_reentrant=False) if many else _cells(*arguments))
    return torch.cat(outputs, 1)


def _cells(
    q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, inside: Tensor | None, mask: Tensor | None
) -> Tensor:
    """`[B, cells, L, H, D]`: one softmax over the cell and the shared keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dtype, E = q.dtype, k_shared.shape[2]
    q, k, v, k_shared, v_shared = (t.to(wide) for t in (q, k, v, k_shared, v_shared))
    beside = torch.einsum("bclhd,bhed->bchle", q, k_shared)
    if mask is not None:
        beside = beside.masked_fill(~mask[:, None, None, None], -torch.inf)
    own = torch.einsum("bclhd,bcmhd->bchlm", q, k)
    if inside is not None:
        own = own.masked_fill(~inside[:, None, None], -torch.inf)
    weights = torch.cat([beside, own], -1).softmax(-1)
    o = torch.einsum("bchle,bhed->bclhd", weights[..., :E], v_shared)
    return (o + torch.einsum("bchlm,bcmhd->bclhd", weights[..., E:], v)).to(dtype)


@full_precision
def _reference(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cell: tuple[int, int], halo: tuple[int, int], mask: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """The definition: a dense mask and a softmax, in float64 if q is, else float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    seen = torch.ones(q.shape[0], grid.tokens, grid.tokens, dtype=torch.bool, device=q.device)
    seen[:, grid.image, grid.image] = Haloed(cell, halo).allowed(grid, q.device)
    whole = full_mask(mask, grid)
    if whole is not None:
        seen = seen & whole[:, 0]
    logits = torch.einsum("bnhd,bmhd->bhnm", q.to(dtype), k.to(dtype)) * scale
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v.to(dtype)).to(q.dtype)


def _near(length: int, cell: int, halo: int, device: torch.device | None) -> Tensor:
    """Return which keys (columns) the queries (rows) of an axis see, `[length, length]`."""
    i = torch.arange(length, device=device)
    offset = i - (i // cell * cell)[:, None]
    return (offset >= -halo) & (offset < cell + halo)


def cell_numbers(grid: Grid, cell: tuple[int, int], device: torch.device) -> Tensor:
    """Return the number of each grid token's cell `[height * width]`."""
    y = torch.arange(grid.height, device=device) // cell[0]
    x = torch.arange(grid.width, device=device) // cell[1]
    return (y[:, None] * grid.width + x).flatten()
