"""Block-sparse attention by PyTorch's FlexAttention: tokens in the order of each head, and a mask of blocks.

FlexAttention skips squares of 128 x 128 tokens of which no pair is seen. Which these are follows from the kept blocks
by sums over rectangles, without a mask of all pairs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from vision_attn.grid import Grid
from vision_attn.kernels.dense import around, outside

SQUARE = 128


def flex_block_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, order: Tensor, kept: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attend as `block_sparse_attention` does.

    Args:
        q: Queries `[B, N, H, D]`.
        k: Keys, like `q`.
        v: Values, like `q`.
        grid: Where the image tokens lie.
        order: The grid's token at each place `[H, n]`.
        kept: The blocks of keys of each block of queries `[H, blocks, K]`.
        mask: Bool `[B or 1, prefix + suffix]`, False for padding keys, or None.
        scale: Factor of the logits.

    Returns:
        `[B, N, H, D]`.
    """
    rest, n = grid.prefix + grid.suffix, grid.image_tokens
    index = order.T[None, :, :, None].expand(q.shape[0], -1, -1, q.shape[3])  # [B, n, H, D]
    tensors = [torch.cat([outside(t, grid), t[:, grid.image].gather(1, index)], 1).transpose(1, 2) for t in (q, k, v)]
    run: Callable[..., Any] = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        run = _compiled
    o = run(*tensors, block_mask=_known_squares(kept, n, rest, mask), scale=scale).transpose(1, 2)
    image = torch.zeros_like(o[:, rest:]).scatter(1, index, o[:, rest:])
    return around(o[:, :rest], image, grid)


def _compiled(*tensors: Tensor, **options: Any) -> Any:
    """Run FlexAttention, compiled once for each shape: beyond the usual limit of eight it would make all logits."""
    with torch._dynamo.config.patch(recompile_limit=256):
        return _compilation()(*tensors, **options)


@functools.cache
def _compilation() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def _known_squares(kept: Tensor, n: int, rest: int, mask: Tensor | None) -> BlockMask:
    """Return `squares`, of an earlier call if the same tensor has the same blocks: they take fifty operations."""
    passing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or kept.is_inference()
    if passing or mask is not None:
        return squares(kept, n, rest, mask)
    known = _squares.setdefault(kept, {})
    state = kept._version, kept.data_ptr()
    if (n, rest) not in known or known[n, rest][0] != state:
        known[n, rest] = state, squares(kept, n, rest, None)
    found: BlockMask = known[n, rest][1]
    return found


_squares = WeakTensorKeyDictionary()


def squares(kept: Tensor, n: int, rest: int, mask: Tensor | None) -> BlockMask:
    """Return the mask of `rest` tokens that see and are seen by all, and then n tokens in blocks.

    Args:
        kept: The blocks of keys of each block of queries `[H, blocks, K]`.
        n: Tokens in blocks.
        rest: Tokens before them.
        mask: Bool `[B or 1, rest]`, False for keys that nobody sees, or None.
    """
    H, count, _ = kept.shape
    tokens, device = rest + n, kept.device
    seen = torch.zeros(H, count, count, dtype=torch.bool, device=device).scatter(2, kept, True)
    block = torch.arange(-rest, n, device=device).clamp(min=0) * count // n  # of each token

    def pair(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        within = (i < rest) | (j < rest) | seen[h, block[i.clamp(max=tokens - 1)], block[j.clamp(max=tokens - 1)]]
        if mask is None:
            return within
        return within & ((j >= rest) | mask[b if len(mask) > 1 else 0, j.clamp(max=rest - 1)])

    first = torch.arange(0, tokens, SQUARE, device=device)
    last = (first + SQUARE).clamp(max=tokens) - 1
    sums = torch.nn.functional.pad(seen.int().cumsum(1).cumsum(2), (1, 0, 1, 0))  # of rectangles from the corner
    begin, end = block[first], block[last] + 1
    found = sums[:, end[:, None], end] - sums[:, begin[:, None], end] - sums[:, end[:, None], begin]
    found = found + sums[:, begin[:, None], begin]  # how many pairs of blocks of a square are seen
    inside = (first >= rest) & (first + SQUARE <= tokens)
    full = (found == (end - begin)[:, None] * (end - begin)) & inside[:, None] & inside
    partial = ((found > 0) | (first < rest)[:, None] | (first < rest)) & ~full
    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK_SIZE=SQUARE, mask_mod=pair, seq_lengths=(tokens, tokens)
    )


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many squares of each row are chosen `[1, H, rows]`, and all, these first `[1, H, rows, rows]`."""
    order = chosen.int().sort(dim=2, descending=True, stable=True).indices.int()
    return chosen.sum(2).int()[None], order[None]
