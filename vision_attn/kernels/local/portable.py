"""Portable local attention in plain PyTorch: O(N * window) memory, any device, tuned for a CPU.

The grid is cut into strips, and each strip into tiles of queries. The keys that a strip can see are copied once, column
by column, into a buffer where the box of keys of every tile is one contiguous, overlapping view. So a strip is two
batched matrix products and a softmax; the keys that all queries share (prefix, suffix, pooled) are one more product
without a copy. Queries outside the grid are dense and left to `scaled_dot_product_attention`.

The grid part is a custom operator whose backward computes the weights again: autograd keeps nothing but its inputs.
A dilated window is an undilated one on each of the dilation's sub-grids; a strip is some rows of a sub-grid. Inside a
tile, tokens are ordered column by column (`[tile_width, strip_height]`): there any run of columns is contiguous. What
else PyTorch may want of the operator, `plain.py` answers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import custom_op
from vision_attn.kernels.dense import dense_attention, full_mask, outside, with_dense_rows
from vision_attn.kernels.local.plain import plain_attention, window_start

if TYPE_CHECKING:
    from vision_attn.kernels.local import Window

HIDDEN = -1e30
_MAX_SCORES = 1 << 23  # logits computed at a time: 32 MiB in float32


@dataclass(frozen=True)
class Subgrid:
    """`n_y * n_x` sub-grids of one shape, by their rows `[n_y, L_y]` and columns `[n_x, L_x]` in the whole grid."""

    size: tuple[int, int]
    rows: Tensor
    columns: Tensor

    @property
    def _whole(self) -> bool:
        return self.size == (self.rows.shape[1], self.columns.shape[1])

    @property
    def _index(self) -> tuple[slice, Tensor, Tensor]:
        return slice(None), self.rows[:, None, :, None], self.columns[None, :, None, :]

    def take(self, t: Tensor) -> Tensor:
        """`[B, height * width, H, D]` to `[B, n_y * n_x, L_y, L_x, H, D]`; a view if nothing is dilated."""
        t = t.unflatten(1, self.size)
        return t[:, None] if self._whole else t[self._index].flatten(1, 2)

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write a sub-grid back into `whole`."""
        whole = whole.unflatten(1, self.size)
        if self._whole:
            whole.copy_(part[:, 0])
        else:
            whole[self._index] = part.unflatten(1, (len(self.rows), len(self.columns)))


def subgrids(size: Sequence[int], steps: Sequence[int], device: torch.device) -> Iterator[Subgrid]:
    """Yield the sub-grids of a dilation, those of one shape together."""

    def groups(length: int, d: int) -> list[Tensor]:
        long = length % d  # the first `long` groups have one token more
        first = torch.arange(d, device=device)[:, None]
        cuts = ((first[:long], length // d + 1), (first[long:], length // d))
        return [g + d * torch.arange(n, device=device) for g, n in cuts if len(g)]

    for rows in groups(size[0], steps[0]):
        for columns in groups(size[1], steps[1]):
            yield Subgrid((size[0], size[1]), rows, columns)


@dataclass(frozen=True)
class Strip:
    """Rows `top .. bottom` of a sub-grid and the rows `first .. last` their windows reach.

    `columns` tiles of `tile` columns cover the width; the box of a tile starts `lead` columns before the tile and has
    `box` columns.
    """

    shape: tuple[int, ...]  # [B, G, L_y, L_x, H, D] of the sub-grids
    radius: float
    kernel: tuple[int, int]
    device: torch.device
    masks: dict  # the masks of a call's strips, by the rows that they depend on
    top: int
    bottom: int
    first: int
    last: int
    columns: int
    tile: int
    lead: int
    box: int

    @property
    def _width(self) -> int:
        return self.columns * self.tile

    def queries(self, t: Tensor) -> Tensor:
        """Copy the strip's queries: `[B * H, G * columns, L, D]`, L = tile * rows, in float32 at least."""
        B, G, _, width, H, D = self.shape
        rows = self.bottom - self.top
        out = t.new_empty(B, H, G, self._width, rows, D, dtype=torch.promote_types(t.dtype, torch.float32))
        out[:, :, :, width:] = 0
        out[:, :, :, :width] = t[:, :, self.top : self.bottom].permute(0, 4, 1, 3, 2, 5)
        return out.view(B * H, G * self.columns, self.tile * rows, D)

    def put_queries(self, out: Tensor, t: Tensor) -> None:
        """Write queries (or outputs) back into a sub-grid."""
        B, G, _, width, H, D = self.shape
        out = out.view(B, H, G, self._width, self.bottom - self.top, D)[:, :, :, :width]
        t[:, :, self.top : self.bottom] = out.permute(0, 2, 4, 3, 1, 5)

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Return memory for the keys of a strip: `[lead + B * H * G * width + rest, rows, D]`."""
        B, G, _, _, H, D = self.shape
        columns = B * H * G * self._width + max(self.box - self.tile, 0)
        return torch.empty(columns, self.last - self.first, D, dtype=dtype, device=self.device)

    def _inside(self, buffer: Tensor) -> Tensor:
        B, G, _, _, H, D = self.shape
        inside = buffer[self.lead : self.lead + B * H * G * self._width]
        return inside.view(B, H, G, self._width, -1, D)

    def keys(self, t: Tensor) -> Tensor:
        """Copy the keys and return the boxes, an overlapping view `[B * H, G * columns, S, D]`, S = box * rows."""
        B, G, _, _, H, D = self.shape
        buffer, width = self.buffer(torch.promote_types(t.dtype, torch.float32)), self.shape[3]
        inside = self._inside(buffer)
        inside[:, :, :, :width] = t[:, :, self.first : self.last].permute(0, 4, 1, 3, 2, 5)
        for hidden in (inside[:, :, :, width:], buffer[: self.lead], buffer[self.lead + B * H * G * self._width :]):
            hidden.zero_()
        column = (self.last - self.first) * D
        tiles = G * self.columns
        size = (B * H, tiles, self.box * (self.last - self.first), D)
        return buffer.as_strided(size, (tiles * self.tile * column, self.tile * column, D, 1))

    def add_keys(self, grad: Tensor, buffer: Tensor, c: slice) -> None:
        """Add gradients of boxes `[heads * tiles, S, D]` of the heads `c` to a buffer, a tile's width at a time."""
        rows, D = self.last - self.first, self.shape[-1]
        tiles = self.shape[1] * self.columns
        column, start = rows * D, c.start * tiles * self.tile * rows * D
        for j in range(0, self.box, self.tile):
            part = grad[:, j * rows : min(j + self.tile, self.box) * rows].flatten(1)
            target = buffer.as_strided(part.shape, (self.tile * column, 1), start + j * column)
            target += part

    def put_keys(self, buffer: Tensor, t: Tensor) -> None:
        """Add a buffer's gradients to a sub-grid."""
        inside = self._inside(buffer)[:, :, :, : self.shape[3]]
        t[:, :, self.first : self.last] += inside.permute(0, 2, 4, 3, 1, 5)

    def per_head(self, t: Tensor, c: slice) -> Tensor:
        """Rows `[B or 1, M]` repeated for the heads `c` of the batch: `[heads, M]`."""
        B, H = self.shape[0], self.shape[4]
        return t.expand(B, -1).repeat_interleave(H, 0)[c]

    def hidden(self, value: float, dtype: torch.dtype) -> Tensor:
        """Return `value` where a query of a tile does not see a key of its box, else 0: `[columns, L, S]`."""
        starts = tuple(self._row_start(y) - self.first for y in range(self.top, self.bottom))
        pattern = (starts, self.last - self.first)
        if pattern not in self.masks:
            seen = self._seen().permute(0, 3, 1, 4, 2).flatten(3).flatten(1, 2)
            self.masks[pattern] = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, value)
        return self.masks[pattern]

    def mass(self, cell: int, none: float, dtype: torch.dtype) -> Tensor:
        """Return the logarithm of how many tokens of each cell are outside a query's disc: `[columns, L, cells]`.

        Args:
            cell: Side of a cell in tokens; 0 for no cells.
            none: What stands for the logarithm of 0.
            dtype: Of the result.
        """
        L_y, L_x = self.shape[2:4]
        if not cell:
            return torch.empty(self.columns, 0, 0, dtype=dtype, device=self.device)
        tiles = self._offsets(self.columns)[:, None] * self.tile
        x = (tiles + self._offsets(self.tile))[..., None, None, None]  # [columns, tile, 1, 1, 1]
        dy = self._offsets(L_y) - (self._offsets(self.bottom - self.top) + self.top)[:, None]
        rest = (math.ceil(self.radius**2) - 1 - dy**2).double()
        reach = torch.where(rest < 0, -1, rest.clamp(min=0).sqrt().floor()).int()[..., None]  # [rows, L_y, 1]
        first = torch.arange(0, L_x, cell, dtype=torch.int32, device=self.device)
        inside = (x + reach).clamp(max=first + cell - 1) - (x - reach).clamp(min=first) + 1
        inside = inside.clamp(min=0).unflatten(3, (-1, cell)).sum(4)  # [columns, tile, rows, cells down, cells across]
        left = (cell**2 - inside).flatten(3).flatten(1, 2)
        return torch.where(left > 0, left.clamp(min=1).to(dtype).log(), none)

    def _row_start(self, y: int) -> int:
        return window_start(y, self.shape[2], self.kernel[0]) if self.kernel[0] else y

    def _seen(self) -> Tensor:
        """The window as a mask `[columns, rows of queries, rows of keys, tile, box]`."""
        L_y, L_x = self.shape[2:4]
        tiles = torch.arange(self.columns, device=self.device)[:, None] * self.tile
        x, key_x = tiles + torch.arange(self.tile, device=self.device), tiles + self._offsets(self.box) - self.lead
        y, key_y = self._offsets(self.bottom - self.top) + self.top, self._offsets(self.last - self.first) + self.first
        if not self.kernel[0]:
            dy, dx = (key_y - y[:, None]).double(), (key_x[:, None] - x[:, :, None]).double()
            seen = (dx**2)[:, None, None] + (dy**2)[None, :, :, None, None] < self.radius**2
            return seen & ((key_x >= 0) & (key_x < L_x))[:, None, None, None]
        rows, columns = (
            key[..., None, :] - (i - K // 2).clamp(0, length - K)[..., None]
            for i, key, K, length in zip((y, x), (key_y, key_x), self.kernel, (L_y, L_x), strict=True)
        )
        rows, columns = ((t >= 0) & (t < K) for t, K in zip((rows, columns), self.kernel, strict=True))
        return rows[None, :, :, None, None] & columns[:, None, None]

    def _offsets(self, n: int) -> Tensor:
        return torch.arange(n, device=self.device)

    def _bias_index(self) -> tuple[Tensor, Tensor]:
        y = torch.arange(self.top, self.bottom, device=self.device)
        rows = torch.arange(self.first, self.last, device=self.device) - y[:, None]
        columns = torch.arange(self.box, device=self.device) - self.lead
        columns = columns - torch.arange(self.tile, device=self.device)[:, None]
        rows, columns = ((t + K - 1).clamp(0, 2 * K - 2) for t, K in zip((rows, columns), self.kernel, strict=True))
        return rows[None, :, None, :], columns[:, None, :, None]

    def bias(self, bias: Tensor, c: slice) -> Tensor:
        """Lay out the relative position bias for the heads `c` as `[heads, L, S]`, the same for every tile."""
        rows, columns = self._bias_index()
        tiled = bias[:, rows, columns].flatten(3).flatten(1, 2)
        return tiled[torch.arange(c.start, c.stop, device=self.device) % len(bias)]

    def add_bias(self, d_scores: Tensor, dbias: Tensor, c: slice) -> None:
        """Add the gradient of the logits `[heads, tiles, L, S]` to the table `[H, 2 K_y - 1, 2 K_x - 1]`."""
        rows, columns = self._bias_index()
        H, (K_y, K_x) = len(dbias), self.kernel
        index = (rows * (2 * K_x - 1) + columns).flatten()
        heads = torch.arange(c.start, c.stop, device=self.device) % H
        grad = torch.zeros(H, len(index), dtype=dbias.dtype, device=self.device)
        grad.index_add_(0, heads, d_scores.sum(1).flatten(1))
        dbias.view(H, (2 * K_y - 1) * (2 * K_x - 1)).index_add_(1, index, grad)


def strips(shape: Sequence[int], radius: float, kernel: Sequence[int], device: torch.device) -> Iterator[Strip]:
    """Yield the strips of sub-grids `[B, G, L_y, L_x, H, D]`, for a disc (`kernel` 0) or a square."""
    L_y, L_x = shape[2:4]
    reach = math.ceil(radius) - 1
    span = kernel[1] or 2 * reach + 1
    tile = _tile(span, square=bool(kernel[1]))
    tile = L_x if tile + span > L_x else tile
    columns = -(-L_x // tile)
    edges = [(x, min(x + tile, L_x) - 1) for x in range(0, L_x, tile)]
    if columns == 1:
        lead, box = 0, tile
    elif kernel[1]:
        starts = [(x, window_start(x, L_x, kernel[1]), window_start(end, L_x, kernel[1])) for x, end in edges]
        lead = max(0, *(x - start for x, start, _ in starts))
        box = lead + max(start + kernel[1] - x for x, _, start in starts)
    else:
        lead, box = reach, tile + 2 * reach
    masks: dict = {}
    step = min(tile, 16)
    for top in range(0, L_y, step):
        bottom = min(top + step, L_y)
        if kernel[0]:
            first = window_start(top, L_y, kernel[0])
            last = window_start(bottom - 1, L_y, kernel[0]) + kernel[0]
        else:
            first, last = max(0, top - reach), min(L_y, bottom + reach)
        yield Strip(tuple(shape), radius, (kernel[0], kernel[1]), device, masks, top, bottom, first, last,
                    columns, tile, lead, box)  # fmt: skip


def _tile(span: int, *, square: bool) -> int:
    """Tile side. A square's tile holds half its window, so that border boxes are no wider than inner ones."""
    return max(8, -(-(span // 2 + 1) // 8) * 8) if square else 8 if span <= 32 else 16


def local_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: "Window", mask: Tensor | None, scale: float
) -> Tensor:
    """Run `local_attention` on checked inputs."""
    image, covers = grid.image, window.covers(grid)
    pooled = window.pooled or (k[:, :0], v[:, :0])
    if window.cell and covers:  # no token is outside the disc
        pooled = pooled[0][:, :0], pooled[1][:, :0]
    if covers and window.bias is None:
        keys, values = torch.cat([k, pooled[0]], 1), torch.cat([v, pooled[1]], 1)
        o = dense_attention(q[:, image], keys, values, mask=full_mask(mask, grid, pooled[0].shape[1]), scale=scale)
    else:
        k_shared, v_shared = (torch.cat([outside(t, grid), p], 1) for t, p in zip((k, v), pooled, strict=True))
        hidden = None
        if mask is not None:
            hidden = F.pad((~mask).to(torch.promote_types(q.dtype, torch.float32)) * HIDDEN, (0, pooled[0].shape[1]))
        o = grid_attention(
            q[:, image], k[:, image], v[:, image], k_shared, v_shared, window.bias, hidden,
            [grid.height, grid.width], *window.geometry(grid), window.cell, scale,
        )  # fmt: skip
    return with_dense_rows(o, q, k, v, grid, mask=mask, scale=scale)


@custom_op("vision_attn::local_grid", plain_attention)
def grid_attention(
    q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, bias: Tensor | None, hidden: Tensor | None,
    size: Sequence[int], radius: float, kernel: Sequence[int], steps: Sequence[int], cell: int, scale: float,
) -> Tensor:  # fmt: skip
    """Grid queries `[B, height * width, H, D]` over their windows and the shared keys `[B, M, H, D]`.

    With `cell` > 0 the last shared keys are those of cells, counted as their tokens outside the disc.
    """
    return attend_grid(q, k, v, k_shared, v_shared, bias, hidden, size, radius, kernel, steps, cell, scale)


def attend_grid(
    q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, bias: Tensor | None, hidden: Tensor | None,
    size: Sequence[int], radius: float, kernel: Sequence[int], steps: Sequence[int], cell: int, scale: float,
    softmax: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Attend as `grid_attention` does; `softmax` may be another one over the last axis."""
    o = q.new_empty(q.shape)
    if o.numel() == 0:
        return o
    k_all, v_all = _heads_first(k_shared), _heads_first(v_shared)
    weights = None
    for sub in subgrids(size, steps, q.device):
        q_sub, k_sub, v_sub, o_sub = (sub.take(t) for t in (q, k, v, o))
        for strip in strips(q_sub.shape, radius, kernel, q.device):
            queries, keys, values = strip.queries(q_sub) * scale, strip.keys(k_sub), strip.keys(v_sub)
            out, mass = torch.empty_like(queries), strip.mass(cell, HIDDEN, queries.dtype)
            for c in _chunks(queries, keys, k_all):
                weights = _weights(strip, c, queries[c], keys[c], k_all[c], bias, hidden, mass, weights, softmax)
                _mix(weights, values[c], v_all[c], out[c])
            strip.put_queries(out, o_sub)
        sub.put(o_sub, o)
    return o


@grid_attention.register_fake
def _(q: Tensor, *args: object) -> Tensor:
    return q.new_empty(q.shape)


@custom_op("vision_attn::local_grid_backward")
def _grid_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, bias: Tensor | None,
    hidden: Tensor | None, size: Sequence[int], radius: float, kernel: Sequence[int], steps: Sequence[int],
    cell: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, k_shared, v_shared and bias (empty without one)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (q.new_empty(q.shape, dtype=dtype) for _ in range(3))
    k_all, v_all = _heads_first(k_shared), _heads_first(v_shared)
    dk_all, dv_all = torch.zeros_like(k_all), torch.zeros_like(v_all)
    dbias = torch.zeros_like(bias, dtype=dtype) if bias is not None else q.new_empty(0)
    parts = () if q.numel() == 0 else subgrids(size, steps, q.device)
    for sub in parts:
        q_sub, k_sub, v_sub, do_sub = (sub.take(t) for t in (q, k, v, do))
        dq_sub, dk_sub, dv_sub = (q_sub.new_zeros(q_sub.shape, dtype=dtype) for _ in range(3))
        for strip in strips(q_sub.shape, radius, kernel, q.device):
            queries, keys, values = strip.queries(q_sub) * scale, strip.keys(k_sub), strip.keys(v_sub)
            do_rows = strip.queries(do_sub)
            d_queries, mass = torch.empty_like(queries), strip.mass(cell, HIDDEN, queries.dtype)
            dk_buffer, dv_buffer = strip.buffer(dtype).zero_(), strip.buffer(dtype).zero_()
            for c in _chunks(queries, keys, k_all):
                weights = _weights(strip, c, queries[c], keys[c], k_all[c], bias, hidden, mass)
                d_weights = _scores(do_rows[c], values[c], v_all[c])
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, dtype)
                _mix(d_scores, keys[c], k_all[c], d_queries[c])
                strip.add_keys(_mix_back(d_scores, queries[c], dk_all[c]), dk_buffer, c)
                strip.add_keys(_mix_back(weights, do_rows[c], dv_all[c]), dv_buffer, c)
                if bias is not None:
                    strip.add_bias(d_scores[..., k_all.shape[1] :], dbias, c)
            strip.put_queries(d_queries.mul_(scale), dq_sub)
            strip.put_keys(dk_buffer, dk_sub)
            strip.put_keys(dv_buffer, dv_sub)
        for part, whole in ((dq_sub, dq), (dk_sub, dk), (dv_sub, dv)):
            sub.put(part, whole)
    dq, dk, dv = (t.to(q.dtype) for t in (dq, dk, dv))
    dk_shared, dv_shared = (_heads_last(t, k_shared) for t in (dk_all, dv_all))
    return dq, dk, dv, dk_shared, dv_shared, dbias.to(bias.dtype if bias is not None else q.dtype)


@_grid_attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, bias: Tensor | None, *args: object
) -> tuple[Any, ...]:
    shapes = [q.shape, q.shape, q.shape, k_shared.shape, k_shared.shape]
    return *(q.new_empty(shape) for shape in shapes), q.new_empty(0) if bias is None else bias.new_empty(bias.shape)


grid_attention.register_gradient(_grid_attention_backward)


def _heads_first(t: Tensor) -> Tensor:
    """`[B, M, H, D]` to `[B * H, M, D]`, in float32 at least."""
    return t.transpose(1, 2).flatten(0, 1).to(torch.promote_types(t.dtype, torch.float32)).contiguous()


def _heads_last(t: Tensor, like: Tensor) -> Tensor:
    return t.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2).to(like.dtype).contiguous()


def _chunks(queries: Tensor, keys: Tensor, shared: Tensor) -> list[slice]:
    """Cut B * H so that one chunk's logits stay below `_MAX_SCORES`."""
    heads, tiles, length, _ = queries.shape
    step = max(1, _MAX_SCORES // (tiles * length * (keys.shape[2] + shared.shape[1])))
    return [slice(i, min(i + step, heads)) for i in range(0, heads, step)]


def _scores(queries: Tensor, keys: Tensor, shared: Tensor, memory: Tensor | None = None) -> Tensor:
    """Products with the shared keys, then with the box: `[heads, tiles, L, M + S]`, in `memory` if that fits."""
    M = shared.shape[1]
    shape = (*queries.shape[:3], M + keys.shape[2])
    scores = memory if memory is not None and memory.shape == shape else queries.new_empty(shape)
    torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).mT, out=scores.flatten(0, 1)[..., M:])
    if M:
        torch.bmm(queries.flatten(1, 2), shared.mT, out=scores.flatten(1, 2)[..., :M])
    return scores


def _weights(
    strip: Strip, c: slice, queries: Tensor, keys: Tensor, shared: Tensor, bias: Tensor | None, hidden: Tensor | None,
    mass: Tensor, memory: Tensor | None = None, softmax: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Softmax over the shared keys and the box: `[heads, tiles, L, M + S]`, in `memory` if that fits."""
    scores, M = _scores(queries, keys, shared, memory), shared.shape[1]
    if hidden is not None:
        scores[..., :M] += strip.per_head(hidden, c)[:, None, None]
    if mass.shape[2]:
        scores[..., M - mass.shape[2] : M].unflatten(1, (-1, strip.columns)).add_(mass)
    scores[..., M:].unflatten(1, (-1, strip.columns)).add_(strip.hidden(HIDDEN, scores.dtype))
    if bias is not None:
        scores[..., M:] += strip.bias(bias, c)[:, None]
    return torch.softmax(scores, -1, out=scores) if softmax is None else softmax(scores)


def _mix(weights: Tensor, values: Tensor, shared: Tensor, out: Tensor) -> None:
    """Write the weighted sum of shared and box values into `out`."""
    M = shared.shape[1]
    torch.bmm(weights.flatten(0, 1)[..., M:], values.flatten(0, 1), out=out.flatten(0, 1))
    if M:
        out.flatten(1, 2).baddbmm_(weights.flatten(1, 2)[..., :M], shared)


def _mix_back(weights: Tensor, do_rows: Tensor, d_shared: Tensor) -> Tensor:
    """Return the gradient of the box values `[heads * tiles, S, D]`; add that of the shared ones to `d_shared`."""
    M = d_shared.shape[1]
    if M:
        d_shared.baddbmm_(weights.flatten(1, 2)[..., :M].mT, do_rows.flatten(1, 2))
    return torch.bmm(weights.flatten(0, 1)[..., M:].mT, do_rows.flatten(0, 1))
