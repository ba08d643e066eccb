"""Portable multipole attention in plain PyTorch: O(N * keys met) memory, any device, tuned for a CPU.

Keys of the grid are laid out cell by cell, so that near and chosen cells are whole rows to gather. A part of the cells
of one head is worked on at a time; the backward computes their weights again. What else PyTorch may want of the
operator, `plain.py` answers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import custom_op, full_precision
from vision_attn.kernels.dense import dense_attention, full_mask, outside, with_dense_rows
from vision_attn.kernels.multipole.cells import Cells, Layout, choose_cells, counts_of, means_of, of_one_head
from vision_attn.kernels.multipole.plain import plain_multipole

_HIDDEN = -1e30
_MOST_SCORES = 1 << 19  # logits computed at a time: 2 MiB in float32, which a cache holds


def multipole_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells, mask: Tensor | None, scale: float
) -> Tensor:
    """Run `multipole_attention` on checked inputs."""
    if cells.covers(grid):
        return dense_attention(q, k, v, mask=full_mask(mask, grid), scale=scale)
    chosen = choose_cells(q, k, grid, cells, scale=scale) if cells.chosen is None else cells.chosen
    o = _grid_rows(q, k, v, grid, cells, mask, scale, chosen)
    return with_dense_rows(o, q, k, v, grid, mask=mask, scale=scale)


@full_precision
def part_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells, means: tuple[Tensor, Tensor], rows: tuple[int, int],
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Run `part_attention`."""
    columns, image = -(-grid.width // cells.cell), grid.image
    size = [grid.height, grid.width, cells.cell, cells.near, cells.pool, *(row * columns for row in rows)]
    assert cells.chosen is not None
    return grid_multipole(
        q[:, image], k[:, image], v[:, image], outside(k, grid), outside(v, grid), *means, cells.mass,
        hidden_keys(mask, q), cells.chosen, size, scale,
    )  # fmt: skip


@full_precision
def _grid_rows(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells, mask: Tensor | None, scale: float, chosen: Tensor
) -> Tensor:
    layout, image = cells.layout(grid, q.device), grid.image
    means = [means_of(of_one_head(t)[:, image], grid, cells, layout.sides) for t in (k, v)]
    means = [t.expand(-1, -1, q.shape[2], -1) for t in means]
    hidden = hidden_keys(mask, q)
    return grid_multipole(
        q[:, image], k[:, image], v[:, image], outside(k, grid), outside(v, grid), *means, cells.mass, hidden, chosen,
        [grid.height, grid.width, cells.cell, cells.near, cells.pool], scale,
    )  # fmt: skip


def hidden_keys(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return what is added to the logits of shared keys `[B, E]`, of a mask that is False for hidden ones."""
    return None if mask is None else (~mask).to(torch.promote_types(q.dtype, torch.float32)) * _HIDDEN


@dataclass(frozen=True)
class _Part:
    """Some cells of one head, and all that their logits are made of.

    Attributes:
        cells: Which cells `[n]`; all have as many near ones.
        queries: `[n, L, D]`, scaled.
        near: Cells that are met exactly `[n, S]`, of those of the head.
        slots: Means that are met `[n, P]`.
        bias: Added to the logits of means `[n, P]`.
        cut: Places in `near`, by row and column, of cells that are not whole.
        hidden: Added to the logits of their tokens `[places, L]`.
    """

    cells: Tensor
    queries: Tensor
    near: Tensor
    slots: Tensor
    bias: Tensor
    cut: tuple[Tensor, Tensor]
    hidden: Tensor


class _Head:
    """One head of one sample: its queries and keys cell by cell, its means and shared keys, in float32 at least.

    The last cell and the last mean are zeros, which stand for none.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, shared: Sequence[Tensor], means: Sequence[Tensor], bias: Tensor | None
    ) -> None:
        self.q, self.k, self.v = q, k, v  # [C, L, D], [C + 1, L, D]
        self.k_shared, self.v_shared = shared  # [T, D]
        self.k_means, self.v_means = means  # [M + 1, D]
        self.bias = bias  # of the shared keys [T], if any is hidden

    def weights(self, part: _Part, memory: Tensor | None, softmax: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Softmax over shared keys, tokens of cells, and means `[n, L, T + S * L + P]`, in `memory` if that fits.

        `softmax` takes the place of PyTorch's.
        """
        scores, (T, S) = _scores(part.queries, part, self.k_shared, self.k, self.k_means, memory), self._sizes(part)
        if T and self.bias is not None:
            scores[..., :T] += self.bias
        cut, slot = part.cut
        if len(cut):  # cells that the border cuts, or that are none
            tokens = scores[..., T : T + S].unflatten(2, (*part.near.shape[1:], -1))
            tokens[cut, :, slot] += part.hidden[:, None]
        scores[..., T + S :] += part.bias[:, None]
        return torch.softmax(scores, -1, out=scores) if softmax is None else softmax(scores)

    def _sizes(self, part: _Part) -> tuple[int, int]:
        return len(self.k_shared), part.near.shape[1] * part.queries.shape[1]

    def mix(self, weights: Tensor, part: _Part, shared: Tensor, tokens: Tensor, means: Tensor) -> Tensor:
        """Return the sums of rows `shared`, `tokens` of cells and `means`, weighted: `[n, L, D]`."""
        T, S = self._sizes(part)
        out = torch.bmm(weights[..., T : T + S], _rows(tokens, part.near))
        out.baddbmm_(weights[..., T + S :], _rows(means, part.slots))
        return out.baddbmm_(weights[..., :T], shared.expand(len(out), -1, -1)) if T else out


def _heads(
    q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, k_means: Tensor, v_means: Tensor,
    hidden: Tensor | None, layout: Layout, size: Sequence[int], scale: float,
) -> Iterator[tuple[int, int, _Head]]:  # fmt: skip
    """Yield sample, head and what it holds."""
    height, width, cell, *_ = size
    wide = torch.promote_types(q.dtype, torch.float32)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            queries = _to_cells(q[b, :, h], height, width, cell, wide) * scale
            keys, values = (_to_cells(t[b, :, h], height, width, cell, wide, 1) for t in (k, v))
            shared = [t[b, :, h].to(wide) for t in (k_shared, v_shared)]
            means = [F.pad(t[b, :, h].to(wide), (0, 0, 0, 1)) for t in (k_means, v_means)]
            bias = None if hidden is None else hidden[b % len(hidden)].to(wide)
            yield b, h, _Head(queries, keys, values, shared, means, bias)


def _parts(
    head: _Head, layout: Layout, chosen: Tensor, mass: Tensor | None, there: Tensor, size: Sequence[int]
) -> Iterator[_Part]:
    """Cut the cells of one head so that the logits of a part stay below `_MOST_SCORES`."""
    L = head.q.shape[1]
    whole = (there == 0).all(1)
    begin, end = size[5:] or (0, len(layout.near))
    for every, near_every in _groups(layout):
        own = (every >= begin) & (every < end)
        group, around = every[own], near_every[own]
        keys = len(head.k_shared) + (around.shape[1] + chosen.shape[1]) * L + layout.slots.shape[1]
        step = max(1, _MOST_SCORES // (L * keys))
        for cells, close in zip(group.split(step), around.split(step), strict=True):
            if not len(cells):
                continue
            near, slots = torch.cat([close, chosen[cells]], 1), layout.slots[cells]
            count = counts_of(layout, slots, chosen[cells])
            bias = torch.where(count > 0, count.clamp(min=1).to(head.q.dtype).log(), _HIDDEN)
            if mass is not None:
                bias = bias + mass[layout.levels[slots].clamp(max=len(mass) - 1)]
            cut = whole[near].logical_not().nonzero(as_tuple=True)
            yield _Part(cells, head.q[cells], near, slots, bias, (cut[0], cut[1]), there[near[cut]])


def _groups(layout: Layout) -> list[tuple[Tensor, Tensor]]:
    """Return the cells `[n]` that have as many near ones, and these `[n, S]`: at the border there are fewer."""
    near = layout.near.sort(1).values  # the number of cells, which stands for none, comes last
    count = (near < len(near)).sum(1)
    groups = [(count == n).nonzero()[:, 0] for n in count.unique().tolist()]
    return [(group, near[group, : int(count[group[0]])]) for group in groups]


def _there(layout: Layout, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """0 for the tokens of each cell that are in the grid, else hugely negative `[C + 1, L]`."""
    cell = size[2]
    y, x = torch.meshgrid(*[torch.arange(cell, device=layout.near.device)] * 2, indexing="ij")
    box = layout.tokens[:, :, None, None]
    inside = (box[:, 0] + y < box[:, 1]) & (box[:, 2] + x < box[:, 3])
    return torch.where(inside, 0.0, _HIDDEN).to(dtype).flatten(1)


def _layout_of(size: Sequence[int], device: torch.device) -> Layout:
    height, width, cell, near, pool = size[:5]
    return Cells(cell, near, pool, 0).layout(Grid(height, width), device)


def _row(mass: Tensor, b: int, h: int, q: Tensor) -> int:
    """Return the row of a head's masses: see `Cells.mass`."""
    return (b * q.shape[2] + h) % len(mass)


@custom_op("vision_attn::multipole_grid", plain_multipole)
def grid_multipole(
    q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, k_means: Tensor, v_means: Tensor,
    mass: Tensor | None, hidden: Tensor | None, chosen: Tensor, size: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    """Grid queries `[B, height * width, H, D]` over their cells, the means `[B, M, H, D]` and shared keys.

    `size` is height, width, cell, near, pool, and optionally the first and the last + 1 of the cells whose queries are
    to attend; the output of others is zero.
    """
    return attend_cells(q, k, v, k_shared, v_shared, k_means, v_means, mass, hidden, chosen, size, scale)


@grid_multipole.register_fake
def _(q: Tensor, *args: object) -> Tensor:
    return torch.empty_like(q)


def attend_cells(
    q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, k_means: Tensor, v_means: Tensor,
    mass: Tensor | None, hidden: Tensor | None, chosen: Tensor, size: Sequence[int], scale: float,
    softmax: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Do what `grid_multipole` does; `softmax` over the last axis takes the place of PyTorch's."""
    layout, o, weights = _layout_of(size, q.device), torch.empty_like(q), None
    wide = torch.promote_types(q.dtype, torch.float32)
    there = _there(layout, size, wide)
    for b, h, head in _heads(q, k, v, k_shared, v_shared, k_means, v_means, hidden, layout, size, scale):
        out = torch.zeros_like(head.q)
        for part in _parts(
            head, layout, chosen[b, h], None if mass is None else mass[_row(mass, b, h, q)].to(wide), there, size
        ):
            weights = head.weights(part, weights, softmax)
            out[part.cells] = head.mix(weights, part, head.v_shared, head.v, head.v_means)
        o[b, :, h] = _from_cells(out, *size[:3])
    return o


@custom_op("vision_attn::multipole_grid_backward")
def _multipole_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, k_means: Tensor, v_means: Tensor,
    mass: Tensor | None, hidden: Tensor | None, chosen: Tensor, size: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, k_shared, v_shared, k_means, v_means and mass (empty without one)."""
    layout, wide = _layout_of(size, q.device), torch.promote_types(q.dtype, torch.float32)
    height, width, cell = size[:3]
    there, weights = _there(layout, size, wide), None
    inputs = q, k, v, k_shared, v_shared, k_means, v_means
    grads = [torch.zeros(t.shape, dtype=wide, device=t.device) for t in inputs]
    d_mass = q.new_empty(0, dtype=wide) if mass is None else torch.zeros(mass.shape, dtype=wide, device=q.device)
    for b, h, head in _heads(*inputs, hidden, layout, size, scale):
        d_out = _to_cells(do[b, :, h], height, width, cell, wide)
        d_head = [torch.zeros_like(t) for t in (head.q, head.k, head.v, head.k_shared, head.v_shared)]
        d_head += [torch.zeros_like(t) for t in (head.k_means, head.v_means)]
        d_q, d_k, d_v, d_ks, d_vs, d_km, d_vm = d_head
        for part in _parts(
            head, layout, chosen[b, h], None if mass is None else mass[_row(mass, b, h, q)].to(wide), there, size
        ):
            weights = head.weights(part, weights)
            rows = d_out[part.cells]
            d_weights = _scores(rows, part, head.v_shared, head.v, head.v_means)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, wide)
            d_q[part.cells] = head.mix(d_scores, part, head.k_shared, head.k, head.k_means) * scale
            _mix_back(d_scores, part.queries, part, d_ks, d_k, d_km)
            _mix_back(weights, rows, part, d_vs, d_v, d_vm)
            if mass is not None:
                of_means = d_scores[..., -part.slots.shape[1] :].sum(1)
                level = layout.levels[part.slots].clamp(max=mass.shape[1] - 1)
                d_mass[_row(mass, b, h, q)].index_add_(0, level.flatten(), of_means.flatten())
        for grad, part_grad in zip(grads[:3], (d_q, d_k[:-1], d_v[:-1]), strict=True):
            grad[b, :, h] = _from_cells(part_grad, height, width, cell)
        for grad, part_grad in zip(grads[3:], (d_ks, d_vs, d_km[:-1], d_vm[:-1]), strict=True):
            grad[b, :, h] = part_grad
    dq, dk, dv, dks, dvs, dkm, dvm = (g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))
    return dq, dk, dv, dks, dvs, dkm, dvm, d_mass if mass is None else d_mass.to(mass.dtype)


@_multipole_backward.register_fake
def _(do: Tensor, *args: Any) -> tuple[Any, ...]:
    mass = args[7]
    none = do.new_empty(0, dtype=torch.promote_types(do.dtype, torch.float32))
    return *(t.new_empty(t.shape) for t in args[:7]), none if mass is None else mass.new_empty(mass.shape)


grid_multipole.register_gradient(_multipole_backward)


def _scores(
    rows: Tensor, part: _Part, shared: Tensor, tokens: Tensor, means: Tensor, memory: Tensor | None = None
) -> Tensor:
    """Products of rows `[n, L, D]` with shared rows, those of cells, and means, in `memory` if that fits."""
    n, L, _ = rows.shape
    T, S = len(shared), part.near.shape[1] * L
    shape = (n, L, T + S + part.slots.shape[1])
    scores = memory if memory is not None and memory.shape == shape else rows.new_empty(shape)
    if T:
        torch.bmm(rows, shared.mT.expand(n, -1, -1), out=scores[..., :T])
    torch.bmm(rows, _rows(tokens, part.near).mT, out=scores[..., T : T + S])
    torch.bmm(rows, _rows(means, part.slots).mT, out=scores[..., T + S :])
    return scores


def _rows(t: Tensor, index: Tensor) -> Tensor:
    """Gather cells `[C + 1, L, D]` or means `[M + 1, D]` by index `[n, S]`: `[n, S * L, D]` or `[n, S, D]`."""
    return t.index_select(0, index.flatten()).view(len(index), -1, t.shape[-1])


def _mix_back(weights: Tensor, rows: Tensor, part: _Part, d_shared: Tensor, d_tokens: Tensor, d_means: Tensor) -> None:
    """Add the gradients of shared rows `[T, D]`, cells `[C + 1, L, D]` and means `[M + 1, D]` of one part."""
    T, L, S = len(d_shared), d_tokens.shape[1], part.near.shape[1]
    if T:
        d_shared.addmm_(weights[..., :T].flatten(0, 1).mT, rows.flatten(0, 1))
    of_tokens = weights[..., T : T + S * L].mT @ rows  # [n, S * L, D]
    d_tokens.index_add_(0, part.near.flatten(), of_tokens.unflatten(1, (S, L)).flatten(0, 1))
    d_means.index_add_(0, part.slots.flatten(), (weights[..., T + S * L :].mT @ rows).flatten(0, 1))


def _to_cells(t: Tensor, height: int, width: int, cell: int, dtype: torch.dtype, more: int = 0) -> Tensor:
    """Lay `[height * width, D]` out cell by cell `[C + more, cell * cell, D]`, zeros beyond the border and `more`."""
    image = t.unflatten(0, (height, width))
    if height % cell or width % cell:
        image = F.pad(image, (0, 0, 0, -width % cell, 0, -height % cell))
    rows, columns, D = image.shape[0] // cell, image.shape[1] // cell, t.shape[1]
    found = t.new_empty((rows * columns + more, cell * cell, D), dtype=dtype)
    whole = image.unflatten(1, (columns, cell)).unflatten(0, (rows, cell)).transpose(1, 2)
    found[: rows * columns].view(rows, columns, cell, cell, D).copy_(whole)
    found[rows * columns :].zero_()
    return found


def _from_cells(t: Tensor, height: int, width: int, cell: int) -> Tensor:
    """Undo `_to_cells`."""
    rows, columns = -(-height // cell), -(-width // cell)
    image = t.view(rows, columns, cell, cell, -1).transpose(1, 2).reshape(rows * cell, columns * cell, -1)
    return image[:height, :width].flatten(0, 1)
