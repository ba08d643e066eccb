"""Linear attention over processes: the states of all are added, and nothing else travels.

With a softmax window (LinearLocal) cells that a slice cuts are completed by their other tokens.
"""

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import full_precision
from vision_attn.kernels.linear import Features, linear_output, linear_state
from vision_attn.kernels.linear_local import linear_local_attention
from vision_attn.kernels.triton.launching import aligned, inference_reasons
from vision_attn.parallel.local import Halo, Slab
from vision_attn.parallel.outside import Outside
from vision_attn.parallel.ranks import Ranks
from vision_attn.parallel.sums import Total


@full_precision
def linear_attention_over(
    q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, features: Features, *, key_weight: Tensor | None = None,
    global_query: Tensor | None = None, eps: float, backend: str,
) -> Tensor:  # fmt: skip
    """Attend as `linear_attention` does over the whole sequence, from the tokens of the own slice.

    Args:
        q: Queries of the own slice `[B, tokens, H, F]`.
        k: Keys, like `q`.
        v: Values `[B, tokens, H, D]`.
        ranks: Who holds what.
        features: The feature map, without a rotation.
        key_weight: Weights of the own keys `[B, tokens, H]`, broadcasting; 0 hides a key.
        global_query: g `[B, H, F]`, the same on all processes.
        eps: Added to the normaliser's mean over keys.
        backend: How the operators run.

    Returns:
        `[B, tokens, H, D]`.
    """
    count = ranks.grid.tokens
    weights = () if key_weight is None else (key_weight,)
    fused = not inference_reasons(q, k, v, weights=weights, auto=backend == "auto")
    if fused and backend in ("auto", "triton") and global_query is None:
        weight = None if key_weight is None else key_weight.expand(k.shape[:3])
        state, norm = linear_state(aligned(k), aligned(v), weight, features.map, 1.0 / count)
        state, norm = _total(state, norm, ranks)
        return linear_output(aligned(q), state, norm, features.map, eps)
    wide = torch.promote_types(q.dtype, torch.float32)
    phi = features.of(k.to(wide))
    scale = None
    if global_query is not None:
        logits = torch.einsum("bhc,bmhc->bmh", global_query.to(wide), phi)
        if key_weight is not None:
            logits = logits.masked_fill(key_weight == 0, -torch.inf)
        scale = logits.logsumexp(1)  # [B, H], -inf if this process has no key
        phi = phi * (logits - scale[:, None].clamp(min=torch.finfo(wide).min)).exp()[..., None]
    if key_weight is not None:
        phi = phi * key_weight.to(wide)[..., None]
    state, norm = torch.einsum("bmhc,bmhd->bhcd", phi, v.to(wide)), phi.sum(1)
    if scale is None:
        state, norm = _total(state / count, norm / count, ranks)
    else:
        state, norm = _weighed(state, norm, scale, ranks)
    phi_q = features.of(q.to(wide))
    numerator = torch.einsum("bnhc,bhcd->bnhd", phi_q, state)
    return (numerator / (torch.einsum("bnhc,bhc->bnh", phi_q, norm) + eps)[..., None]).to(q.dtype)


def _total(state: Tensor, norm: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Add the states `[B, H, F, D]` and norms `[B, H, F]` of all processes."""
    both = Total(torch.cat([state, norm[..., None]], -1), ranks, "state").wait()
    return both[..., :-1], both[..., -1]


def _weighed(state: Tensor, norm: Tensor, scale: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Merge states that are softmax means over each process's keys, by the log-sum-exp `[B, H]` of their logits."""
    B, H, F, D = state.shape
    rows = torch.cat([state.flatten(2), norm, scale[..., None]], -1)
    parts = Total(rows, ranks, "state").parts()  # [processes, B, H, F * D + F + 1]
    weight = parts[..., -1].softmax(0)[..., None]
    sums = (parts[..., :-1] * weight).sum(0)
    return sums[..., : F * D].view(B, H, F, D), sums[..., F * D :]


def feature_mean_over(q: Tensor, ranks: Ranks, features: Features, weight: Tensor | None) -> Tensor:
    """Return `feature_mean` over the whole sequence `[B, H, F]`, from the own queries `[B, tokens, H, F]`."""
    phi = features.of(q.to(torch.promote_types(q.dtype, torch.float32)))
    if weight is None:
        return Total(phi.sum(1), ranks, "mean").wait() / ranks.grid.tokens
    weight = weight.to(phi.dtype).expand(phi.shape[:3])[..., None]
    both = Total(torch.cat([(phi * weight).sum(1), weight.sum(1)], -1), ranks, "mean").wait()
    return both[..., :-1] / both[..., -1:]


def linear_local_attention_over(
    q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], v: Tensor, ranks: Ranks, cell: int, gate: Tensor, *,
    mask: Tensor | None, scale: float | None, backend: str,
) -> Tensor:  # fmt: skip
    """Attend as `linear_local_attention` does, and densely from tokens outside the grid: see there.

    Tensors are those of the own slice, `mask` is that of the own tokens outside the grid.
    """
    scale = v.shape[-1] ** -0.5 if scale is None else scale
    slabs = [cells_slab(ranks, cell, rank) for rank in range(ranks.size)]
    slab = slabs[ranks.rank]
    outside = Outside(q[0], k[0], v, ranks, mask, scale)
    wide = torch.promote_types(v.dtype, torch.float32)
    features, values = ranks.own_image(k[1]), outside.image[2]
    halo = Halo((outside.image[1], features, values), slabs)
    state = torch.einsum("bmhc,bmhd->bhcd", features.to(wide), values.to(wide))
    both = Total(torch.cat([state, features.to(wide).sum(1)[..., None]], -1), ranks, "state")
    outside.wait()
    both_sums = both.wait()
    far = both_sums[..., :-1], both_sums[..., -1]
    keys, key_features, values = halo.wait()
    queries, query_features = (slab.around(ranks.own_image(t)) for t in q)
    if not queries.shape[1]:
        nothing = queries + keys + values + (query_features.sum() + key_features.sum() + both_sums.sum()) * 0
        return ranks.together(outside.rows(), nothing)
    sequences = [
        torch.cat([rest, image], 1)
        for rest, image in (
            (outside.k, queries), (_like(outside.k, query_features), query_features), (outside.k, keys),
            (_like(outside.k, key_features), key_features), (outside.v, values),
        )
    ]  # fmt: skip
    grid = Grid(slab.grid.height, slab.grid.width, prefix=outside.k.shape[1])
    o = linear_local_attention(
        (sequences[0], sequences[1]), (sequences[2], sequences[3]), sequences[4], grid, cell, gate, far=far,
        mask=outside.mask, scale=scale, backend=backend,
    )  # fmt: skip
    return ranks.together(outside.rows(), slab.own(o))


def _like(rest: Tensor, features: Tensor) -> Tensor:
    """Return zeros for the features of tokens outside the grid, which are not used."""
    return features.new_zeros((*rest.shape[:3], features.shape[-1]))


def cells_slab(ranks: Ranks, cell: int, rank: int) -> Slab:
    """Return the rows of whole cells that a slice touches."""
    first, stop = (row * cell for row in ranks.rows(rank, cell))
    return Slab(ranks, min(first, ranks.grid.height), min(stop, ranks.grid.height))
