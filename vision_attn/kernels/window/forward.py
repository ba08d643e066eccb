"""The forward of window attention in Triton: tiles of slots, see `cells.py`."""

# ruff: noqa: ANN001, ANN202, E741  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.triton.cells import Cells, cell_logits, first_slot, meet_shared, slots_of, wide_slots_of
from vision_attn.kernels.triton.launching import Kernel, floats_of, strides_of
from vision_attn.kernels.triton.pairs import update_softmax
from vision_attn.kernels.triton.rows import (
    NO_KEY,
    START,
    head_of,
    load_rows_below,
    own_head,
    program_of,
    store_lse,
    store_rows_below,
)


@Kernel
@triton.jit
def _forward(
    q, k, v, o, lse, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, sk, sv, sk_b, sk_n, sk_h, sv_b, sv_n, sv_h,
    mask, mask_b, outside, height, width, cell_h, cell_w, halo_h, halo_w, heads, batch_heads, scale,
    SHARED: tl.constexpr, MASK: tl.constexpr, HALO: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile of queries.

    Inputs: q, k, v `[B, n, H, D]` of the grid's n tokens, shared keys sk and values sv `[B, outside, H, D]`, each with
    strides `_b, _n, _h`; mask `[B, outside]` with its own.
    Outputs: o `[B, n, H, D]`, lse `[1 + TWO, B, H, n]`.
    Grid: `height` x `width` tokens in cells of `cell_h` x `cell_w`, of `SLOTS` slots, walked in `TILES` of `ROWS`; keys
    also in the `halo_h` rows and `halo_w` columns around a cell, then `HALO` slots hold it.
    """
    b, h, bh, _, block = program_of(heads, batch_heads, 1)
    tokens = height * width
    cell, row = slots_of(block * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
    q_rows = load_rows_below(head_of(q, b, h, q_b, q_h), row, tokens, q_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    m = tl.full([ROWS], START, tl.float32)  # [ROWS]
    l = tl.zeros([ROWS], tl.float32)  # [ROWS]
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    start = first_slot(block, ROWS, TILES)
    KEY_TILES: tl.constexpr = TILES * HALO // SLOTS if HALO else TILES
    for j in tl.range(0, KEY_TILES):
        if HALO:
            other, column = wide_slots_of(
                start // SLOTS * HALO + j * ROWS, height, width, cell_h, cell_w, halo_h, halo_w, HALO, ROWS
            )  # [ROWS]
        else:
            other, column = slots_of(start + j * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
        k_rows = load_rows_below(head_of(k, b, h, k_b, k_h), column, tokens, k_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        v_rows = load_rows_below(head_of(v, b, h, v_b, v_h), column, tokens, v_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        s = cell_logits(q_rows, k_rows, cell, other, column, tokens, scale, PRECISION)  # [ROWS, ROWS]
        m, l, acc = update_softmax(s, v_rows, m, l, acc, PRECISION)
    if SHARED:
        m, l, acc = meet_shared(
            q_rows, m, l, acc, head_of(sk, b, h, sk_b, sk_h), head_of(sv, b, h, sv_b, sv_h), sk_n, sv_n, mask, mask_b,
            outside, row, b, h, tokens, scale, MASK, ROWS, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    total = tl.maximum(l, NO_KEY)  # [ROWS], a slot without a token has no key
    acc = acc * (1.0 / total)[:, None]
    store_rows_below(own_head(o, b, h, tokens, heads, D), row, tokens, heads * D, 0, acc, D, BLOCK_D)
    low = tl.cast(batch_heads, tl.int64) * tokens
    store_lse(lse, bh.to(tl.int64) * tokens + row, low, m, total, row < tokens, TWO)


def forward(call: Cells) -> tuple[Tensor, Tensor]:
    """Return the output `[B, N, H, D]` and its log-sum-exp in base 2, `[floats, B, H, N]` in float32."""
    q, k, v = call.q, call.k, call.v
    B, N, H, _ = q.shape
    o, lse = q.new_empty(q.shape), q.new_empty((floats_of(q), B, H, N), dtype=torch.float32)
    if o.numel():
        args = q, k, v, o, lse, *strides_of(q, k, v)
        more = call.shared() | call.around() | dict(TWO=len(lse) == 2)
        programs, named = call.launch("window.forward", _forward, args, lambda _: more, (call.halo,))
        _forward[(programs,)](*args, **named)
    return o, lse
