"""Block-sparse attention in an order of tokens of each head's own, to blocks that were chosen beforehand.

    o_i = softmax_j(scale * q_i . k_j) v_j,    j in the kept blocks of the block of i + tokens outside the grid

Each head puts the n tokens of the grid in an order of its own and cuts it into blocks, as equal as they can be: place p
is in block p * blocks // n. A block of queries attends to the same number of blocks of keys everywhere, so all shapes
are known before anything runs. Tokens outside the grid attend to everything.

On a GPU it is PyTorch's FlexAttention. Elsewhere the kept blocks are gathered, some rows of blocks at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vision_attn.grid import Grid
from vision_attn.kernels.backend import (
    Implementation,
    check_inputs,
    check_mask,
    exporting,
    full_precision,
    pick,
    transformed,
)
from vision_attn.kernels.block_sparse.flex import flex_block_attention
from vision_attn.kernels.dense import dense_attention, full_mask, outside, with_dense_rows
from vision_attn.kernels.triton.launching import triton_reasons

_MOST = 1 << 24  # elements of keys and logits gathered at a time: 64 MiB in float32


@dataclass(frozen=True)
class Blocks:
    """Which blocks of tokens attend to which.

    Args:
        order: The grid's token at each place, `[H, n]`: a permutation for each head.
        kept: The blocks of keys of each block of queries `[H, blocks, K]`, all different. One of them must hold a
            token; a block's own does if it has queries.
    """

    order: Tensor
    kept: Tensor

    def check(self, num_heads: int, grid: Grid) -> None:
        """Refuse an order or kept blocks of other shapes.

        Raises:
            ValueError: If the shapes do not fit the heads and the grid.
        """
        order, kept = tuple(self.order.shape), tuple(self.kept.shape)
        if order != (num_heads, grid.image_tokens):
            raise ValueError(f"order must be [H, tokens] = [{num_heads}, {grid.image_tokens}] for {grid}, got {order}")
        if len(kept) != 3 or kept[0] != num_heads or not 1 <= kept[2] <= kept[1]:
            raise ValueError(f"kept must be [H, blocks, K] with H = {num_heads} and 1 <= K <= blocks, got {kept}")


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    blocks: Blocks,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from each grid token to the kept blocks of its block, and to every token outside the grid.

    Args:
        q: Queries `[B, N, H, D]`, with `N == grid.tokens`; any strides.
        k: Keys, like `q`.
        v: Values, like `q`.
        grid: Where the image tokens lie in the sequence.
        blocks: The order of the tokens, and the blocks that are kept.
        mask: Bool `[B, prefix + suffix]` (or batch 1): False hides a key outside the grid from all queries.
        scale: Factor of the logits, `D ** -0.5` if None.
        backend: 'triton' (CUDA; PyTorch's FlexAttention), 'torch' (any device), 'reference' (dense, small inputs), or
            'auto' for the fastest that can run.

    Returns:
        `[B, N, H, D]` in the dtype of `q`.

    Raises:
        TypeError: If dtypes differ or are not floating point.
        ValueError: If shapes, devices, blocks and the grid do not fit each other, or a named backend cannot run
            (every reason is listed).
    """
    check_inputs(q, k, v, grid)
    check_mask(q, grid, mask)
    blocks.check(q.shape[2], grid)
    reasons = triton_reasons(q, auto=backend == "auto")
    if not q.is_cuda and not reasons:
        reasons.append(f"q is on {q.device}: FlexAttention is compiled for CUDA, and Triton cannot interpret it")
    implementations = {
        "triton": Implementation(flex_block_attention, reasons),
        "torch": Implementation(_torch),
        "reference": Implementation(_reference),
    }
    run = pick("block_sparse_attention", backend, implementations)
    return run(q, k, v, grid, blocks.order, blocks.kept, mask, q.shape[-1] ** -0.5 if scale is None else scale)


@full_precision
def _reference(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, order: Tensor, kept: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The definition: a dense mask and a softmax, in float64 if q is, else float32."""
    wide, image = torch.promote_types(q.dtype, torch.float32), grid.image
    heads, n, count = torch.arange(q.shape[2], device=q.device), grid.image_tokens, kept.shape[1]
    own = inverse(order) * count // n
    allowed = torch.zeros(len(heads), count, count, dtype=torch.bool, device=q.device).scatter(2, kept, True)
    seen = torch.ones(len(heads), grid.tokens, grid.tokens, dtype=torch.bool, device=q.device)
    seen[:, image, image] = allowed[heads[:, None, None], own[:, :, None], own[:, None]]
    whole = full_mask(mask, grid)
    logits = torch.einsum("bnhd,bmhd->bhnm", q.to(wide), k.to(wide)) * scale
    weights = logits.masked_fill(~(seen if whole is None else seen & whole), -torch.inf).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v.to(wide)).to(q.dtype)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, order: Tensor, kept: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Gather the kept blocks of some rows of blocks at a time: no more memory than the kept keys of these."""
    B, _, H, D = q.shape
    n, count, K = grid.image_tokens, kept.shape[1], kept.shape[2]
    place, there = places(n, count, q.device)
    L = place.shape[1]
    heads = torch.arange(H, device=q.device)
    index = order[:, place]  # [H, blocks, L]
    queries, keys, values = (t[:, grid.image].transpose(1, 2)[:, heads[:, None, None], index] for t in (q, k, v))
    rest = [outside(t, grid).transpose(1, 2) for t in (k, v)]  # [B, H, E, D]
    E = rest[0].shape[2]
    step = count if exporting() else max(1, _MOST // max(1, B * H * (K * L + E) * max(L, 2 * D)))
    outputs = []
    for first in range(0, count, step):
        part = slice(first, first + step)
        arguments: tuple[Any, ...] = (queries[:, :, part], keys, values, kept[:, part], there, *rest, mask, scale)
        many = step < count and torch.is_grad_enabled() and not transformed()
        outputs.append(checkpoint(_rows, *arguments, use_reentrant=False) if many else _rows(*arguments))
    o = torch.cat(outputs, 2).flatten(2, 3)  # [B, H, blocks * L, D]
    at = inverse(order)
    block = at * count // n
    slot = block * L + at - (block * n + count - 1) // count
    o = o[:, heads[:, None], slot].transpose(1, 2)
    return with_dense_rows(o, q, k, v, grid, mask=mask, scale=scale)


def _rows(
    q: Tensor, keys: Tensor, values: Tensor, kept: Tensor, there: Tensor, k_rest: Tensor, v_rest: Tensor,
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Attend from rows of blocks `[B, H, R, L, D]` to their kept blocks of `[B, H, blocks, L, D]` and to the rest."""
    H, R = q.shape[1:3]
    heads = torch.arange(H, device=q.device)[:, None, None]
    some = [
        torch.cat([t[:, heads, kept].flatten(3, 4), rest[:, :, None].expand(-1, -1, R, -1, -1)], 3).flatten(1, 2)
        for t, rest in ((keys, k_rest), (values, v_rest))
    ]  # [B, H * R, K * L + E, D]
    seen = there[kept].flatten(2)  # [H, R, K * L]
    seen = (seen | ~seen.any(-1, keepdim=True)).flatten(0, 1)[None]  # a row of no keys has no queries either
    outside_seen = seen.new_ones(1, H * R, k_rest.shape[2]) if mask is None else mask[:, None].expand(-1, H * R, -1)
    seen = torch.cat([seen.expand(len(outside_seen), -1, -1), outside_seen], 2)[:, :, None]
    rows = (t.transpose(1, 2) for t in (q.flatten(1, 2), *some))  # [B, keys or queries, H * R, D]
    return dense_attention(*rows, mask=seen, scale=scale).transpose(1, 2).unflatten(1, (H, R))


def inverse(order: Tensor) -> Tensor:
    """Return the place of each token, `[H, n]`, for the token at each place."""
    return torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


def places(n: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the places of each block `[count, L]`, filled up with any, and which of them are its own.

    Place p of n is in block p * count // n.
    """
    first = (torch.arange(count + 1, device=device) * n + count - 1) // count
    place = first[:-1, None] + torch.arange(-(-n // count), device=device)
    return place.clamp(max=n - 1), place < first[1:, None]
