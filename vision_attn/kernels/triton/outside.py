"""Tokens outside a grid in Triton: programs that own them and meet the whole sequence, and meeting them as keys.

Their loops are the longest of a launch: their programs come first, and where few heads would leave them running alone,
their keys are split and the parts merged.
"""

# the compiler of a kernel reads no annotations
# ruff: noqa: ANN001, ANN202, E741  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math

import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.triton.launching import Kernel, block_of, multiprocessors
from vision_attn.kernels.triton.rows import HIDDEN, load_rows, load_tile, own_head, store_rows


@triton.jit
def outside_program(pid, outside, heads, N, prefix, image, M: tl.constexpr, PARTS: tl.constexpr):
    """What program `pid` of the tokens outside the grid owns.

    Batch entry, head, number of both, part of its loop; and of each row, `[M]`: its rank among the tokens outside the
    grid, whether there is one, and its place in the sequence, at most the last.
    """
    blocks = tl.cdiv(outside, M)
    bh = pid // (blocks * PARTS)
    rank = (pid % blocks) * M + tl.arange(0, M)  # [M]
    token = tl.minimum(outside_tokens(rank, prefix, image), N - 1)  # [M]
    return bh // heads, bh % heads, bh, (pid // blocks) % PARTS, rank, rank < outside, token


@triton.jit
def outside_tokens(rank, prefix, image):
    """Places in the sequence of tokens outside the grid; the rank after the last may be any."""
    return tl.where(rank < prefix, rank, rank + image)


@triton.jit
def seen_tokens(index, stop, mask, prefix, image, MASK: tl.constexpr):
    """Which tokens exist (are below `stop`) and are not hidden by one batch entry's mask."""
    seen = index < stop
    if MASK:
        outside = (index < prefix) | (index >= prefix + image)
        place = tl.where(index < prefix, index, index - image)
        seen = seen & (tl.load(mask + place, mask=seen & outside, other=1) != 0)
    return seen


@triton.jit
def update_raw(s, v_rows, m, l, acc, c, PRECISION: tl.constexpr):
    """Add a tile of keys to an online softmax over raw logits s `[M, LEN]`, which `c` scales to base 2.

    Values `[LEN, BLOCK_D]`; maximum m `[M]`, sum l `[M, 8]`, weighed values acc `[M, BLOCK_D]`.
    """
    top = tl.maximum(m, tl.max(s, 1) * c)  # [M]
    p = tl.math.exp2(s * c - top[:, None])  # [M, LEN]
    shrink = tl.math.exp2(m - top)  # [M]
    # eight sums a row that no two threads share: they are added up once, at the end
    l = l * shrink[:, None] + tl.sum(p.reshape(p.shape[0], p.shape[1] // 8, 8), 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v_rows.dtype), v_rows, acc, input_precision=PRECISION)
    return top, l, acc


@triton.jit
def meet_sequence(
    q_rows, m, l, acc, k, v, k_box, v_box, mask, b, h, first, stop, k_n, v_n, prefix, image, c,
    LEN: tl.constexpr, RAGGED: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Meet the tokens `first .. stop - 1` of a sequence."""
    for j in tl.range(first, stop, LEN):
        k_rows = load_tile(k, k_box, b, h, j, stop, k_n, LEN, D, BLOCK_D, TMA)  # [LEN, BLOCK_D]
        s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)  # [M, LEN]
        if RAGGED or MASK:
            seen = seen_tokens(j + tl.arange(0, LEN), stop, mask, prefix, image, MASK)  # [LEN]
            s = tl.where(seen[None, :], s, HIDDEN)
        v_rows = load_tile(v, v_box, b, h, j, stop, v_n, LEN, D, BLOCK_D, TMA)  # [LEN, BLOCK_D]
        m, l, acc = update_raw(s, v_rows, m, l, acc, c, PRECISION)
    return m, l, acc


@Kernel
@triton.jit
def _merge(
    part_o, part_lse, o, lse, N, heads, batch, prefix, image, outside, PARTS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the parts of the tokens outside the grid by their log-sum-exp.

    Inputs: part_o `[PARTS, B, H, outside, D]`, part_lse `[PARTS, B, H, outside]`.
    Outputs: o `[B, N, H, D]`, lse `[B, H, N]`.
    """
    rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    bh = tl.program_id(1)
    keep = rank < outside
    top = tl.full([ROWS], HIDDEN, tl.float32)  # [ROWS]
    for i in range(PARTS):
        place = (i * batch * heads + bh).to(tl.int64) * outside
        top = tl.maximum(top, tl.load(part_lse + place + rank, mask=keep, other=0.0))
    total = tl.zeros([ROWS], tl.float32)  # [ROWS]
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    for i in range(PARTS):
        place = (i * batch * heads + bh).to(tl.int64) * outside
        weight = tl.math.exp2(tl.load(part_lse + place + rank, mask=keep, other=0.0) - top)  # [ROWS]
        rows = load_rows(part_o + place * D, tl.minimum(rank, outside - 1), D, D, BLOCK_D)  # [ROWS, BLOCK_D]
        total += weight
        acc += rows * weight[:, None]
    token = outside_tokens(rank, prefix, image)  # [ROWS]
    base = own_head(o, bh // heads, bh % heads, N, heads, D)
    store_rows(base, token, heads * D, acc / total[:, None], keep, D, BLOCK_D)
    tl.store(lse + bh.to(tl.int64) * N + token, top + tl.log2(total), mask=keep)


def splits(t: Tensor, programs: int, length: int, others: int, block: int) -> tuple[int, int]:
    """Return into how many parts, and of what length, the long loop of the tokens outside a grid is cut.

    Their programs start first, so they may run for half of the launch; where they would run longer they are cut.

    Args:
        t: A tensor on the GPU.
        programs: Programs with a long loop.
        length: Tokens of a long loop.
        others: Tokens met by all other programs together.
        block: Tokens of one step.
    """
    if not programs:
        return 1, length
    share = max((programs * length + others) / multiprocessors(t) / 2, 4 * block)
    parts = max(1, min(math.ceil(length / share), 32))
    step = math.ceil(length / parts / block) * block
    return math.ceil(length / step), step


def merge_outside(part_o: Tensor, part_lse: Tensor, o: Tensor, lse: Tensor, prefix: int) -> None:
    """Merge the parts of the tokens outside the grid into o `[B, N, H, D]` and lse `[B, H, N]`.

    Args:
        part_o: Outputs of the parts `[parts, B, H, outside, D]`.
        part_lse: Their log-sum-exp `[parts, B, H, outside]`.
        o: Output of all tokens.
        lse: Log-sum-exp of all tokens.
        prefix: Tokens before the grid.
    """
    B, N, H, D = o.shape
    parts, outside = part_lse.shape[0], part_lse.shape[3]
    _merge[(math.ceil(outside / 16), B * H)](
        part_o, part_lse, o, lse, N, H, B, prefix, N - outside, outside, parts, 16, D, block_of(D), num_warps=4
    )
