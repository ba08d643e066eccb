"""Multipole attention in Triton: the inputs of a call, the operators, and their gradients.

The kernels are in `means.py`, `choice.py`, `masses.py`, `forward.py`, `backward.py` and `mean_gradients.py`; triton is
imported when they first run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import custom_op, upright
from vision_attn.kernels.launches import Launch
from vision_attn.kernels.multipole.cells import Cells, choose_cells, of_one_head
from vision_attn.kernels.multipole.pyramid import MeanTiles, Pyramid, pyramid
from vision_attn.kernels.triton.launching import (
    block_of,
    bytes_of_mask,
    layout,
    next_power,
    packed,
)

_AMD = torch.version.hip is not None  # the kernel that chooses multiplies as its GPUs cannot


@dataclass(frozen=True)
class Call:
    """The inputs of one call, checked; see `multipole_attention`.

    `means_k` and `means_v` are `[B, M, H, D]`, `chosen` is int32 `[B, H, C, exact]`; `size` is height, width, prefix,
    suffix, cell, near, pool, and for a part of the queries first and last + 1 of the rows of cells that attend.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    means_k: Tensor
    means_v: Tensor
    chosen: Tensor
    mass: Tensor | None
    mask: Tensor | None
    size: Sequence[int]
    scale: float

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """All that a launch depends on but the values of tensors."""
        tensors = self.q, self.k, self.v, self.means_k, self.means_v, self.chosen, self.mass, self.mask
        return self.q.device, *self.size, self.scale, *map(layout, tensors)

    @cached_property
    def block_d(self) -> int:
        """Channels of a tile: the next power of two."""
        return block_of(self.q.shape[-1])

    @property
    def pyramid(self) -> Pyramid:
        """Where the means of all levels lie."""
        return pyramid(self.size)

    @property
    def rows(self) -> tuple[int, int]:
        """First and last + 1 of the rows of cells whose queries attend."""
        first, stop = self.size[7:] or (0, self.pyramid.cells[0])
        return first, stop

    @property
    def queries(self) -> tuple[int, int]:
        """First and last + 1 of the tokens that attend."""
        if not self.partial:
            return 0, self.q.shape[1]
        height, width, prefix, _, cell, *_ = self.size
        first, stop = (prefix + min(row * cell, height) * width for row in self.rows)
        return first, stop

    @property
    def partial(self) -> bool:
        """Whether only some rows of cells attend, and no token outside the grid."""
        return len(self.size) > 7

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return memory for what launches over queries write: zero where they write only a part."""
        return (self.q.new_zeros if self.partial else self.q.new_empty)(shape, dtype=dtype)

    @property
    def count(self) -> int:
        """Cells."""
        return math.prod(self.pyramid.cells)

    def tiles(self, most: int) -> MeanTiles:
        """Return the tiles of means that a cell meets, of at most `most` rows."""
        return MeanTiles.of(self.pyramid, most)

    @property
    def outside(self) -> int:
        """Tokens outside the grid."""
        return self.size[2] + self.size[3]

    def tile(self, launch: Launch) -> int:
        """Return the side of a tile of tokens: a cell is cut into as few as hold it."""
        return min(*launch.own, next_power(self.size[4]))

    def split(self, tile: int) -> int:
        """Return the tiles along the side of a cell."""
        return math.ceil(self.size[4] / tile)

    @property
    def alike(self) -> bool:
        """Whether the means have one mass in all heads."""
        return self.chosen.shape[3] == 0 and self.mass is None

    def ragged(self, tile: int) -> bool:
        """Return whether some tile is not full."""
        height, width, _, _, cell, *_ = self.size
        return cell % tile > 0 or height % cell > 0 or width % cell > 0

    @property
    def together(self) -> int:
        """Heads that take turns in the launch at each tile, as in local attention: all where a cache holds the keys."""
        B, N, H, D = self.q.shape
        return B * H if 2 * B * N * H * D * self.q.element_size() <= 2**26 else 1


def multipole_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells, mask: Tensor | None, scale: float
) -> Tensor:
    """Run `multipole_attention` on checked inputs."""
    return _run(q, k, v, grid, cells, mask, scale)[0]


def multipole_attention_lse(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Also return the log-sum-exp of the logits, `[B, H, N]` in float32, with which outputs can be merged."""
    o, lse = _run(q, k, v, grid, cells, mask, scale)
    return o, lse * math.log(2)


def part_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells, means: tuple[Tensor, Tensor], rows: tuple[int, int],
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Run `part_attention`."""
    size = [grid.height, grid.width, grid.prefix, 0, cells.cell, cells.near, cells.pool, *rows]
    order = pyramid(size).order(q.device)
    means_k, means_v = (F.pad(t, (0, 0, 0, 0, 0, 1))[:, order] for t in means)
    assert cells.chosen is not None
    chosen = cells.chosen.sort(-1).values.int()  # the kernels want those that are none last
    return _multipole(q, k, v, means_k, means_v, chosen, cells.mass, mask, size, scale)[0][:, grid.image]


def slab_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells, means: tuple[Tensor, Tensor], rows: tuple[int, int],
    mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Do what `part_attention` does, with means and exact cells as the kernels make them.

    Returns:
        All tokens, and their log-sum-exp in base 2 `[B, H, N]`.
    """
    assert cells.chosen is not None
    o, lse = _multipole(q, k, v, *means, cells.chosen, cells.mass, mask, _slab_size(grid, cells, rows), scale)
    return o, lse


def slab_gradients(
    do: Tensor, found: tuple[Tensor, Tensor], tensors: tuple[Tensor, Tensor, Tensor], means: tuple[Tensor, Tensor],
    grid: Grid, cells: Cells, rows: tuple[int, int], mask: Tensor | None, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of q, k, v, the means of keys and of values, and the masses: empty for None.

    Args:
        do: Gradient of the output `[B, N, H, D]`, zero but for the tokens that attend.
        found: What `slab_attention` returned.
        tensors: Its q, k and v; q is zero but for the tokens that attend, and k and v are finite.
        means: Its means.
        grid: As for it.
        cells: As for it.
        rows: As for it.
        mask: As for it.
        scale: As for it.
    """
    size = _slab_size(grid, cells, rows)
    grads: tuple[Tensor, ...] = _multipole_backward(
        do, None, *found, *tensors, *means, cells.chosen, cells.mass, mask, size, scale
    )
    return grads


def slab_means_gradients(d_means: Tensor, weights: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return what means of all levels, of k and v `[2, B, M, H, D]`, give to their gradients `[B, N, H, D]`."""
    dk, dv = _means_backward(d_means[0], d_means[1], weights, size)
    return dk, dv


def _slab_size(grid: Grid, cells: Cells, rows: tuple[int, int]) -> list[int]:
    return [grid.height, grid.width, grid.prefix, 0, cells.cell, cells.near, cells.pool, *rows]


def eight_bit_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells, mask: Tensor | None, scale: float
) -> Tensor:
    """Run `multipole_attention` with a `precision` on checked inputs."""
    size, *met = _met(q, k, v, grid, cells, scale)
    return _eight_bit(q, k, v, *met, cells.mass, mask, size, scale, cells.precision)


def _run(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    size, *met = _met(q, k, v, grid, cells, scale)
    return _multipole(q, k, v, *met, cells.mass, mask, size, scale)


def _met(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cells: Cells, scale: float
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Return the numbers of a call, the means of keys and of values, and the exact cells."""
    size = [grid.height, grid.width, grid.prefix, grid.suffix, cells.cell, cells.near, cells.pool]
    asks = bool(cells.spread and cells.exact) and cells.group == 1 and cells.chosen is None and not _AMD
    own = (k, v) if k.stride(2) or v.stride(2) else (of_one_head(k), of_one_head(v))
    *means, low, high = _means(*own, cells.weights, size, asks)
    bounds: Any = low, high
    if means[0].shape[2] != q.shape[2]:
        means = [t.expand(-1, -1, q.shape[2], -1) for t in means]
        bounds = tuple(t.expand(-1, -1, q.shape[2], -1).contiguous() for t in bounds)
    chosen = None if cells.chosen is None else cells.chosen.sort(-1).values  # the kernels want those that are none last
    if chosen is None and (cells.group > 1 or _AMD or not means[0].shape[1]):
        chosen = choose_cells(q, k, grid, cells, scale=scale)
    elif chosen is None:
        tensors = (t.detach() for t in (q, means[0].contiguous(), *bounds))
        chosen = _choice(*tensors, size, cells.exact, float(cells.spread), scale)
    assert chosen is not None
    return size, means[0], means[1], chosen.int()


@custom_op("vision_attn::multipole_triton_means", repeats=True)
def _means(
    k: Tensor, v: Tensor, weights: Tensor | None, size: Sequence[int], bounds: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The means of all levels of k and v, each `[B, M, H, D]`, in the rows of `pyramid.py`.

    And the least and largest of the keys in each finest mean and channel, like the rows of the first level, if they are
    asked for; they have no gradient.
    """
    from vision_attn.kernels.multipole.means import means  # noqa: PLC0415

    return means(packed(k), packed(v), weights, size, bounds)


@_means.register_fake
def _(
    k: Tensor, v: Tensor, weights: Tensor | None, size: Sequence[int], bounds: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, _, H, D = k.shape
    rows = pyramid(size)
    M, finest = rows.rows, rows.finest if bounds else 0
    low, high = (k.new_empty((B, finest, H, D)) for _ in range(2))
    return k.new_empty((B, M, H, D)), v.new_empty((B, M, H, D)), low, high


@custom_op("vision_attn::multipole_triton_choice", repeats=True)
def _choice(
    q: Tensor, means_k: Tensor, low: Tensor, high: Tensor, size: Sequence[int], exact: int, spread: float, scale: float
) -> Tensor:
    """The exact cells, int32 `[B, H, C, exact]`, of queries and what `_means` returned."""
    from vision_attn.kernels.multipole.choice import choose  # noqa: PLC0415

    return choose(packed(q), packed(means_k), low, high, size, exact, spread, scale)


@_choice.register_fake
def _(
    q: Tensor, means_k: Tensor, low: Tensor, high: Tensor, size: Sequence[int], exact: int, spread: float, scale: float
) -> Tensor:
    rows, columns = (math.ceil(side / size[4]) for side in size[:2])
    return q.new_empty((q.shape[0], q.shape[2], rows * columns, exact), dtype=torch.int32)


@custom_op("vision_attn::multipole_triton_means_backward")
def _means_backward(
    d_means_k: Tensor, d_means_v: Tensor, weights: Tensor | None, size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The gradients of k and v, zero outside the grid."""
    from vision_attn.kernels.multipole.means import means_backward  # noqa: PLC0415

    return means_backward(d_means_k.contiguous(), d_means_v.contiguous(), weights, size)


@_means_backward.register_fake
def _(d_means_k: Tensor, d_means_v: Tensor, weights: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    B, _, H, D = d_means_k.shape
    N = size[0] * size[1] + size[2] + size[3]
    return d_means_k.new_empty((B, N, H, D)), d_means_v.new_empty((B, N, H, D))


def _save_means(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    k, v, weights, ctx.size, _ = inputs
    ctx.save_for_backward(*((k, v) if ctx.needs_input_grad[2] else (None, None)), weights)
    ctx.mark_non_differentiable(*output[2:])


def _backward_means(ctx: Any, d_means_k: Tensor, d_means_v: Tensor, *bounds: object) -> tuple:
    k, v, weights = ctx.saved_tensors
    dk, dv = _means_backward(d_means_k, d_means_v, weights, ctx.size)
    d_weights = None
    if k is not None:
        first = ctx.size[2]
        image = slice(first, first + ctx.size[0] * ctx.size[1])
        d_weights = weight_gradient([(k[:, image], dk[:, image]), (v[:, image], dv[:, image])], weights, ctx.size)
    return dk, dv, d_weights, None, None


def weight_gradient(pairs: Sequence[tuple[Tensor, Tensor]], weights: Tensor, size: Sequence[int]) -> Tensor:
    """Return the gradient of the logarithms of the weights of a mean's tokens, `[pool, pool]`.

        m = sum_i s_i t_i,  s_i = w_i / sum_j w_j:    dlog w_i = a_i - s_i sum_j a_j  with  a_i = t_i . dt_i

    Args:
        pairs: Tokens of a grid `[B, height * width, H, D]`, and the part of their gradient that the means give them.
        weights: The logarithms.
        size: Height, width, prefix, suffix, cell, near, pool, ...
    """
    height, width, pool = size[0], size[1], size[6]
    wide = torch.promote_types(weights.dtype, torch.float32)
    dots = torch.stack([(t.to(wide) * dt).sum((0, 2, 3)) for t, dt in pairs]).sum(0).view(height, width)
    more = 0, -width % pool, 0, -height % pool
    each = F.pad(dots, more).unflatten(1, (-1, pool)).unflatten(0, (-1, pool))  # [rows, pool, columns, pool]
    there = F.pad(torch.ones_like(dots), more).view_as(each)
    share = there * weights.to(wide).exp()[:, None]
    share = share / share.sum((1, 3), keepdim=True)
    found: Tensor = (each - share * each.sum((1, 3), keepdim=True)).sum((0, 2))
    return found.to(weights.dtype)


_means.register_autograd(_backward_means, setup_context=_save_means)


@custom_op("vision_attn::multipole_triton", repeats=True)
def _multipole(
    q: Tensor, k: Tensor, v: Tensor, means_k: Tensor, means_v: Tensor, chosen: Tensor, mass: Tensor | None,
    mask: Tensor | None, size: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp in base 2; `size` is height, width, prefix, suffix, cell, near, pool."""
    from vision_attn.kernels.multipole.forward import forward  # noqa: PLC0415

    q, scale = upright(q, scale)
    return forward(_call(q, k, v, means_k, means_v, chosen, mass, mask, size, scale))


@_multipole.register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, N), dtype=torch.float32)


@custom_op("vision_attn::multipole_eight_bit", repeats=True)
def _eight_bit(
    q: Tensor, k: Tensor, v: Tensor, means_k: Tensor, means_v: Tensor, chosen: Tensor, mass: Tensor | None,
    mask: Tensor | None, size: Sequence[int], scale: float, precision: str,
) -> Tensor:  # fmt: skip
    """Output in 8 bits, see `_multipole`."""
    from vision_attn.kernels.multipole.eight_bit_forward import forward  # noqa: PLC0415

    q, scale = upright(q, scale)
    return forward(_call(q, k, v, means_k, means_v, chosen, mass, mask, size, scale), precision)


@_eight_bit.register_fake
def _(q: Tensor, *args: object) -> Tensor:
    return q.new_empty(q.shape)


@custom_op("vision_attn::multipole_triton_backward")
def _multipole_backward(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, means_k: Tensor,
    means_v: Tensor, chosen: Tensor, mass: Tensor | None, mask: Tensor | None, size: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, means_k, means_v and mass; empty for what is None."""
    from vision_attn.kernels.multipole.backward import backward  # noqa: PLC0415

    wide = None if mass is None else mass.float()
    call = _call(q, k, v, means_k, means_v, chosen, wide, mask, size, scale)
    dq, dk, dv, d_means_k, d_means_v, d_mass = backward(call, packed(do), dlse, o, lse)
    return dq, dk, dv, d_means_k, d_means_v, d_mass if mass is None else d_mass.to(mass.dtype)


@_multipole_backward.register_fake
def _(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, means_k: Tensor,
    means_v: Tensor, chosen: Tensor, mass: Tensor | None, *args: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    d_mass = q.new_empty(0, dtype=torch.float32) if mass is None else mass.new_empty(mass.shape)
    return *(t.new_empty(t.shape) for t in (q, k, v, means_k, means_v)), d_mass


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.rest = inputs[8:]


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple:
    *inputs, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    *grads, d_mass = _multipole_backward(do, dlse, o, lse, *inputs, *ctx.rest)
    return *grads, None, None if inputs[6] is None else d_mass, None, None, None


_multipole.register_autograd(_backward, setup_context=_save)


def _call(
    q: Tensor, k: Tensor, v: Tensor, means_k: Tensor, means_v: Tensor, chosen: Tensor, mass: Tensor | None,
    mask: Tensor | None, size: Sequence[int], scale: float,
) -> Call:  # fmt: skip
    mass = None if mass is None else mass.contiguous()
    return Call(
        packed(q), packed(k), packed(v), packed(means_k), packed(means_v), chosen.contiguous(), mass,
        bytes_of_mask(mask), size, scale,
    )  # fmt: skip
