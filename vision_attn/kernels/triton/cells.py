"""Attention inside cells of a grid in Triton: what window attention and linear-local attention have in common.

Tokens are walked cell by cell, in slots: a cell of L tokens has as many slots as the next power of two, so a tile of
queries holds many small cells (and sees no key of another one) or a part of a large one. Keys that all queries share
come after those of the cell, in the same softmax.
"""

# ruff: noqa: ANN001, E741  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.triton.launching import (
    Kernel,
    block_of,
    bytes_of_mask,
    launch_of,
    next_power,
    packed,
    precision_of,
)
from vision_attn.kernels.triton.pairs import logits_of, update_softmax
from vision_attn.kernels.triton.rows import HIDDEN, LOG2E, load_rows_below


@dataclass(frozen=True)
class Cells:
    """The inputs of one call, checked. q, k and v are the grid's tokens; `mask` is uint8 `[B, E]` or `[1, E]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    shared_k: Tensor | None
    shared_v: Tensor | None
    mask: Tensor | None
    size: tuple[int, int]
    cell: tuple[int, int]
    scale: float
    halo: tuple[int, int] = (0, 0)

    @property
    def count(self) -> int:
        """Cells of the grid."""
        return math.prod(math.ceil(s / c) for s, c in zip(self.size, self.cell, strict=True))

    @property
    def slots(self) -> int:
        """Slots of a cell."""
        return max(2, next_power(self.cell[0] * self.cell[1]))

    @property
    def wide_slots(self) -> int:
        """Slots of a cell and its halo."""
        (h, w), (a, b) = self.cell, self.halo
        return max(2, next_power((h + 2 * a) * (w + 2 * b)))

    def shared(self) -> dict[str, Any]:
        """Return the shared keys, by the names of the kernels' arguments."""
        k, v, mask = self.shared_k, self.shared_v, self.mask
        if k is None or v is None:
            k, v, E = self.k, self.v, 0
        else:
            E = k.shape[1]
        mask_b = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
        k_strides = dict(zip(("sk_b", "sk_n", "sk_h"), k.stride()[:3], strict=True))
        v_strides = dict(zip(("sv_b", "sv_n", "sv_h"), v.stride()[:3], strict=True))
        tensors = dict(sk=k, sv=v, mask=self.q if mask is None else mask)
        return dict(**tensors, **k_strides, **v_strides, mask_b=mask_b, outside=E, SHARED=E > 0, MASK=mask is not None)

    def around(self) -> dict[str, Any]:
        """Return the halo of a cell, by the names of the kernels' arguments."""
        halo = any(self.halo)
        return dict(halo_h=self.halo[0], halo_w=self.halo[1], HALO=self.wide_slots if halo else 0)

    def launch(
        self, name: str, kernel: Kernel, args: Sequence[Any], more: Callable[[Launch], dict[str, Any]] = lambda _: {},
        constants: tuple[Any, ...] = (),
    ) -> tuple[int, dict[str, Any]]:  # fmt: skip
        """Plan a launch whose programs own slots: programs, and the geometry by the names of arguments.

        Args:
            name: Operator and kernel.
            kernel: The kernel.
            args: Its arguments in order; a dtype stands for a tensor that is yet to be made.
            more: Takes a launch and returns further arguments by name.
            constants: What of these the kernel is compiled for.
        """
        B, _, H, D = self.q.shape

        def named(launch: Launch) -> dict[str, Any]:
            return dict(
                height=self.size[0], width=self.size[1], cell_h=self.cell[0], cell_w=self.cell[1], heads=H,
                batch_heads=B * H, scale=self.scale, SLOTS=self.slots, ROWS=launch.rows,
                TILES=max(1, self.slots // launch.rows), D=D, BLOCK_D=block_of(D), PRECISION=precision_of(self.q),
                **launch.options, **more(launch),
            )  # fmt: skip

        about = self.slots, self.shared_k is None, self.mask is None, *constants
        launch = launch_of(name, self.q, about, lambda launch: kernel.needs(*args, **named(launch)))
        return math.ceil(self.count * self.slots / launch.rows) * B * H, named(launch)


def cells_of(
    q: Tensor, k: Tensor, v: Tensor, shared_k: Tensor | None, shared_v: Tensor | None, mask: Tensor | None,
    size: Sequence[int], cell: Sequence[int], scale: float, halo: Sequence[int] = (0, 0),
) -> Cells:  # fmt: skip
    """Pack the tokens of a grid, and those outside it, for the kernels."""
    k_out, v_out = (None if t is None else packed(t) for t in (shared_k, shared_v))
    height, width = size
    return Cells(
        packed(q), packed(k), packed(v), k_out, v_out, bytes_of_mask(mask), (height, width), (cell[0], cell[1]), scale,
        (halo[0], halo[1]),
    )  # fmt: skip


@triton.jit
def slots_of(first, height, width, cell_h, cell_w, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """The cell of each slot from `first` on and its token, `[ROWS]` both; height * width where there is none."""
    slot = first + tl.arange(0, ROWS)  # [ROWS]
    cell, i = slot // SLOTS, slot % SLOTS  # [ROWS]
    across = tl.cdiv(width, cell_w)
    y, x = cell // across * cell_h + i // cell_w, cell % across * cell_w + i % cell_w  # [ROWS]
    there = (i < cell_h * cell_w) & (y < height) & (x < width)
    return cell, tl.where(there, y * width + x, height * width)


@triton.jit
def wide_slots_of(
    first, height, width, cell_h, cell_w, halo_h, halo_w, SLOTS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """What `slots_of` returns for cells with their halos, whose slots are more: tokens are in several of them."""
    slot = first + tl.arange(0, ROWS)  # [ROWS]
    cell, i = slot // SLOTS, slot % SLOTS  # [ROWS]
    across, tall, wide = tl.cdiv(width, cell_w), cell_h + 2 * halo_h, cell_w + 2 * halo_w
    y = cell // across * cell_h - halo_h + i // wide  # [ROWS]
    x = cell % across * cell_w - halo_w + i % wide  # [ROWS]
    there = (i < tall * wide) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return cell, tl.where(there, y * width + x, height * width)


@triton.jit
def near_slots_of(
    first, near, height, width, cell_h, cell_w, halo_h, halo_w, SLOTS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """For each slot of some cells, the cell and the token of the slot in the cell that is their neighbor `near`.

    Neighbors are counted row by row. The token is height * width where there is none.
    """
    slot = first + tl.arange(0, ROWS)  # [ROWS]
    cell, i = slot // SLOTS, slot % SLOTS  # [ROWS]
    across, reach_h, reach_w = tl.cdiv(width, cell_w), tl.cdiv(halo_h, cell_h), tl.cdiv(halo_w, cell_w)
    down = cell // across + near // (2 * reach_w + 1) - reach_h  # [ROWS]
    right = cell % across + near % (2 * reach_w + 1) - reach_w  # [ROWS]
    y, x = down * cell_h + i // cell_w, right * cell_w + i % cell_w  # [ROWS]
    there = (i < cell_h * cell_w) & (down >= 0) & (y < height) & (right >= 0) & (x < width)
    return cell, tl.where(there, y * width + x, height * width)


@triton.jit
def neighbors_of(cell_h, cell_w, halo_h, halo_w):
    """How many cells have tokens in the halo of a cell, with the cell itself."""
    return (2 * tl.cdiv(halo_h, cell_h) + 1) * (2 * tl.cdiv(halo_w, cell_w) + 1)


@triton.jit
def in_halo(row, column, width, cell_h, cell_w, halo_h, halo_w):
    """Whether the keys `column` are in the halos of the cells of the queries `row`, `[rows, columns]`."""
    top, left = row // width // cell_h * cell_h - halo_h, row % width // cell_w * cell_w - halo_w  # [rows]
    y, x = (column // width)[None, :] - top[:, None], (column % width)[None, :] - left[:, None]  # [rows, columns]
    return (y >= 0) & (y < cell_h + 2 * halo_h) & (x >= 0) & (x < cell_w + 2 * halo_w)


@triton.jit
def first_slot(block, ROWS: tl.constexpr, TILES: tl.constexpr):
    """The first slot that a block of `ROWS` slots meets: of the `TILES` tiles of its cell."""
    return block // TILES * TILES * ROWS


@triton.jit
def cell_logits(q_rows, k_rows, cell, other, column, tokens, scale, PRECISION: tl.constexpr):
    """Logits in base 2 `[rows, columns]` of queries in `cell` and keys of the cells `other`."""
    s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION) * (scale * LOG2E)  # [rows, columns]
    return tl.where((cell[:, None] == other[None, :]) & (column < tokens)[None, :], s, HIDDEN)


@triton.jit
def shared_logits(
    q_rows, k_rows, row, column, outside, b, h, mask, mask_b, scale, tokens, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 `[rows, columns]` of queries and shared keys."""
    s, _ = logits_of(
        q_rows, k_rows, row, column, outside, b, h, mask, 0, 0, 0, mask, mask_b, 0, scale, scale, tokens, False, MASK,
        PRECISION,
    )  # fmt: skip
    return s


@triton.jit
def meet_shared(
    q_rows, m, l, acc, sk, sv, k_n, v_n, mask, mask_b, outside, row, b, h, tokens, scale, MASK: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the shared keys of a head, sk and sv, to the softmax of a tile of queries."""
    for j in tl.range(0, outside, ROWS):
        column = j + tl.arange(0, ROWS)  # [ROWS]
        k_rows = load_rows_below(sk, column, outside, k_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        v_rows = load_rows_below(sv, column, outside, v_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        s = shared_logits(
            q_rows, k_rows, row, column, outside, b, h, mask, mask_b, scale, tokens, MASK, PRECISION
        )  # [ROWS, ROWS]
        m, l, acc = update_softmax(s, v_rows, m, l, acc, PRECISION)
    return m, l, acc
