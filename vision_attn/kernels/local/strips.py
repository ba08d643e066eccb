"""Cuts a grid into sub-grids, strips and tiles for the portable local attention, and moves tensors in and out of them.

On each sub-grid of a dilation a dilated window is an undilated one; a strip is some rows of a sub-grid.

Inside a tile, tokens are ordered column by column (`[tile_width, strip_height]`), because the buffer of a strip's keys
is `[columns, rows, D]`: there any run of columns is contiguous, so the boxes of all tiles are one strided view.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def window_start(i: int, length: int, kernel_size: int) -> int:
    """Return the first key of query `i` on an undilated axis: the window is moved inside, never shrunk."""
    return min(max(i - kernel_size // 2, 0), length - kernel_size)


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
        if self._whole:
            return t[:, None]
        return t[self._index].flatten(1, 2)

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
