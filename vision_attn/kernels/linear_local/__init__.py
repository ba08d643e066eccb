"""Softmax inside windows and linear attention outside of them, in one normaliser.

    s_ij = scale * q_i . k_j,    m_i = max_j s_ij over j in W(i),    W(i) = cell(i) + tokens outside the grid
    o_i  = (g sum_{j in W(i)} e^{s_ij - m_i} v_j + sum_{j not in W(i)} (a_i . b_j) v_j) / (the same without v)

a and b are non-negative features of queries and keys, g > 0 is the weight of the softmax part per head. The grid is cut
into cells of `window_size`; the linear part of a cell is the sum over the grid minus its own. Time and memory are O(N).

Paper: 'LoLCATs: On Low-Rank Linearizing of Large Language Models' - https://arxiv.org/abs/2410.10254
"""

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import (
    FLOATS,
    Implementation,
    PerAxis,
    check_inputs,
    check_mask,
    full_precision,
    per_axis,
    pick,
    refuse_unlike,
)
from vision_attn.kernels.dense import full_mask, outside
from vision_attn.kernels.linear_local.op import linear_local_attention_triton
from vision_attn.kernels.triton.launching import triton_reasons
from vision_attn.kernels.window import cell_numbers, from_cells, inside_cells, to_cells


def linear_local_attention(
    q: tuple[Tensor, Tensor],
    k: tuple[Tensor, Tensor],
    v: Tensor,
    grid: Grid,
    window_size: PerAxis,
    gate: Tensor,
    *,
    far: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from each grid token exactly to its cell and to tokens outside the grid, linearly to all others.

    Args:
        q: Queries `[B, N, H, D]` and features of them `[B, N, H, F]`; only those of the grid are used.
        k: Keys and features of them, like `q`.
        v: Values `[B, N, H, D]`.
        grid: Where the image tokens lie in the sequence.
        window_size: Side of a cell in tokens, or a (height, width) pair.
        gate: Weight g of the softmax part `[H]`, above 0.
        far: Sums over the features b of the keys, `sum b v^T` `[B, H, F, D]` and `sum b` `[B, H, F]`, in float32 at
            least; those over the grid if None. Where the grid is a part of a larger one, give those of the larger one.
        mask: Bool `[B, prefix + suffix]` (or batch 1): False hides a key outside the grid.
        scale: Factor of the logits, `D ** -0.5` if None.
        backend: 'triton' (CUDA, fused), 'torch' (any device), 'reference' (dense, small inputs), or
            'auto' for the fastest that can run.

    Returns:
        Outputs of the grid's tokens `[B, height * width, H, D]` in the dtype of `v`.

    Raises:
        TypeError: If dtypes differ or are not floating point.
        ValueError: If shapes, devices and the grid do not fit each other, or a named backend cannot run.
    """
    check_inputs(q[0], k[0], v, grid)
    check_mask(v, grid, mask)
    refuse_unlike(v, features_q=q[1], features_k=k[1])
    if q[1].shape != k[1].shape or q[1].shape[:3] != v.shape[:3]:
        raise ValueError(f"features must be [B, N, H, F] for v {tuple(v.shape)}, got {tuple(q[1].shape)}")
    if tuple(gate.shape) != (v.shape[2],):
        raise ValueError(f"gate must be [H] = [{v.shape[2]}], got {tuple(gate.shape)}")
    if gate.dtype not in FLOATS:
        raise TypeError(f"gate must be floating point, got {gate.dtype}")
    if gate.device != v.device:
        raise ValueError(f"all inputs must be on one device, got v on {v.device} and gate on {gate.device}")
    cell = per_axis(window_size, "window_size", 1)
    reasons = triton_reasons(v, auto=backend == "auto")
    implementations = {
        "triton": Implementation(linear_local_attention_triton, reasons),
        "torch": Implementation(_torch),
        "reference": Implementation(_reference),
    }
    run = pick("linear_local_attention", backend, implementations)
    scale = v.shape[-1] ** -0.5 if scale is None else scale
    return run(v, q, k, grid, cell, gate, far, mask, scale)


@full_precision
def _torch(
    v: Tensor,
    q: tuple[Tensor, Tensor],
    k: tuple[Tensor, Tensor],
    grid: Grid,
    cell: tuple[int, int],
    gate: Tensor,
    far: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    wide, image, shared = torch.promote_types(v.dtype, torch.float32), grid.image, grid.prefix + grid.suffix
    queries, keys, values, a, b = (to_cells(t[:, image].to(wide), grid, cell) for t in (q[0], k[0], v, q[1], k[1]))
    inside = inside_cells(grid, cell, v.device)
    scores = torch.einsum("bclhd,bcmhd->bchlm", queries * scale, keys)
    if inside is not None:
        scores = scores.masked_fill(~inside[:, None, None], -torch.inf)
        b = b * inside[..., None, None]
    if shared:
        k_out, v_out = (outside(t, grid).to(wide) for t in (k[0], v))
        beside = torch.einsum("bclhd,behd->bchle", queries * scale, k_out)
        if mask is not None:
            beside = beside.masked_fill(~mask[:, None, None, None], -torch.inf)
        scores = torch.cat([scores, beside], -1)
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * gate.to(wide)[:, None, None]
    L = keys.shape[2]
    o = torch.einsum("bchlm,bcmhd->bclhd", weights[..., :L], values)
    if shared:
        o = o + torch.einsum("bchle,behd->bclhd", weights[..., L:], v_out)
    own, norm = torch.einsum("bcmhf,bcmhd->bchfd", b, values), b.sum(2)  # of each cell
    state, norms = (own.sum(1), norm.sum(1)) if far is None else far
    o = o + torch.einsum("bclhf,bchfd->bclhd", a, state[:, None] - own)
    total = weights.sum(-1).transpose(2, 3) + torch.einsum("bclhf,bchf->bclh", a, norms[:, None] - norm)
    return from_cells(o / total[..., None], grid, cell).to(v.dtype)


@full_precision
def _reference(
    v: Tensor,
    q: tuple[Tensor, Tensor],
    k: tuple[Tensor, Tensor],
    grid: Grid,
    cell: tuple[int, int],
    gate: Tensor,
    far: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The definition: dense matrices of both parts, in float64 if v is, else float32."""
    wide, image = torch.promote_types(v.dtype, torch.float32), grid.image
    number = cell_numbers(grid, cell, v.device)
    own = torch.ones(grid.image_tokens, grid.tokens, dtype=torch.bool, device=v.device)
    own[:, image] = number == number[:, None]
    seen = own.expand(v.shape[0], -1, -1)
    whole = full_mask(mask, grid)
    if whole is not None:
        seen = seen & whole[:, 0]
    scores = torch.einsum("bnhd,bmhd->bhnm", q[0][:, image].to(wide), k[0].to(wide)) * scale
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    exact = (scores - scores.amax(-1, keepdim=True)).exp() * gate.to(wide)[:, None, None]
    a = q[1][:, image].to(wide)
    linear = torch.einsum("bnhf,bmhf->bhnm", a, k[1].to(wide)) * ~own
    weights = exact + linear
    o, total = torch.einsum("bhnm,bmhd->bnhd", weights, v.to(wide)), weights.sum(-1)
    if far is not None:  # what lies beyond this part of the grid
        keys, values = k[1][:, image].to(wide), v[:, image].to(wide)
        beyond = far[0] - torch.einsum("bmhf,bmhd->bhfd", keys, values)
        o = o + torch.einsum("bnhf,bhfd->bnhd", a, beyond)
        total = total + torch.einsum("bnhf,bhf->bhn", a, far[1] - keys.sum(1))
    return (o / total.mT[..., None]).to(v.dtype)
