"""Linear attention over all tokens of a sequence, in time and memory O(N).

Normalised by division:

    o_i = (r_i phi(q_i)) sum_j w_j (r_j phi(k_j)) v_j^T / (phi(q_i) . sum_j w_j phi(k_j) + M eps),    j = 1..M

`phi` maps features, `w` weighs keys, and `r` rotates by position in the numerator only (RALA); each is optional. With a
global query g the weights are w_j = M softmax_j(g . phi(k_j)). LinFusion: 'elu' features, no weights, no rotation.

Normalised by subtraction, which leaves different queries different weights (`injective_attention`):

    o_i = sum_j w_j / W (scale q_i . (k_j - k_m) + 1) v_j,    W = sum_j w_j,    k_m = sum_j w_j k_j / W

Papers: 'Transformers are RNNs' - https://arxiv.org/abs/2006.16236, 'LinFusion' - https://arxiv.org/abs/2409.02097,
'Breaking the Low-Rank Dilemma of Linear Attention' (RALA) - https://arxiv.org/abs/2411.07635,
'Bridging the Divide: Reconsidering Softmax and Linear Attention' (InLine) - https://arxiv.org/abs/2412.06590
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.kernels.backend import Implementation, full_precision, pick, refuse_unlike
from vision_attn.kernels.linear.op import (
    feature_mean_triton,
    injective_attention_triton,
    linear_attention_triton,
    linear_output,
    linear_state,
)
from vision_attn.kernels.triton.launching import triton_reasons

__all__ = [
    "Features",
    "feature_mean",
    "injective_attention",
    "linear_attention",
    "linear_output",
    "linear_state",
    "rotate_pairs",
]

_MAPS = ("elu", "relu", "none")


@dataclass(frozen=True)
class Features:
    """The feature map of linear attention, on queries and keys alike.

    Args:
        map: 'elu' for elu(x) + 1, 'relu', or 'none' for q and k that are features already (not negative).
        rotary: Cosine and sine `[N, D]` that rotate the mapped features of the numerator, pair by pair: channels
            (2i, 2i + 1) turn by the angle at 2i. Needs as many queries as keys.

    Raises:
        ValueError: If the map is unknown.
    """

    map: str = "elu"
    rotary: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.map not in _MAPS:
            raise ValueError(f"the feature map must be one of {', '.join(_MAPS)}, got {self.map!r}")

    def of(self, x: Tensor) -> Tensor:
        """Return phi(x)."""
        if self.map == "elu":
            return F.elu(x) + 1
        return F.relu(x) if self.map == "relu" else x

    def rotated(self, features: Tensor) -> Tensor:
        """Return r phi(x) for features `[B, N, H, D]`."""
        return features if self.rotary is None else rotate_pairs(features, *self.rotary)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channels (2i, 2i + 1) of `[B, N, H, D]` by the angles whose cosine and sine `[N, D]` are given."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features: Features = Features(),
    key_weight: Tensor | None = None,
    global_query: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Attend from each query to all keys through a sum over the keys.

    Sums and the normaliser are computed in float32 at least.

    Args:
        q: Queries `[B, N, H, F]`, any strides.
        k: Keys `[B, M, H, F]`.
        v: Values `[B, M, H, D]`.
        features: The feature map, and the rotation of the numerator.
        key_weight: Weights w `[B, M, H]`, not negative, broadcasting; 0 hides a key.
        global_query: g `[B, H, F]`: multiply the weights by `M * softmax_j(g . phi(k_j))`.
        eps: Added to the normaliser's mean over keys.
        backend: 'triton' (CUDA, fused), 'torch' (any device), 'reference' (dense, small inputs), or 'auto' for the
            fastest that can run.

    Returns:
        `[B, N, H, D]` in the dtype of `q`.

    Raises:
        TypeError: If dtypes differ or are not floating point.
        ValueError: If shapes or devices do not fit each other, or a named backend cannot run (every reason is listed).
    """
    _check(q, k, v, features, key_weight, global_query)
    reasons = triton_reasons(v, constants=features.rotary or (), auto=backend == "auto")
    if q.shape[-1] > 256 and not (features.rotary is None and global_query is None):
        reasons.append(f"{q.shape[-1]} features, with a rotation or a global query, are above 256")
    implementations = {
        "triton": Implementation(linear_attention_triton, reasons),
        "torch": Implementation(_torch),
        "reference": Implementation(_reference),
    }
    run = pick("linear_attention", backend, implementations)
    return run(q, k, v, features, key_weight, global_query, eps)


def injective_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_weight: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from each query to all keys through a sum over the keys, with weights that subtraction makes sum to one.

    Sums are computed in float32 at least. A weight may be negative.

    Args:
        q: Features of the queries `[B, N, H, F]`, any strides.
        k: Features of the keys `[B, M, H, F]`.
        v: Values `[B, M, H, D]`.
        key_weight: Weights w `[B, M, H]`, not negative, broadcasting; 0 hides a key.
        scale: Factor of the products q . k, `F ** -0.5` if None.
        backend: 'triton' (CUDA, fused, without a gradient of `key_weight`), 'torch' (any device), 'reference' (dense,
            small inputs), or 'auto' for the fastest that can run.

    Returns:
        `[B, N, H, D]` in the dtype of `q`; zero if there are no keys.

    Raises:
        TypeError: If dtypes differ or are not floating point.
        ValueError: If shapes or devices do not fit each other, or a named backend cannot run (every reason is listed).
    """
    _check(q, k, v, Features("none"), key_weight, None)
    reasons = triton_reasons(q, v, auto=backend == "auto")
    if key_weight is not None and key_weight.requires_grad and torch.is_grad_enabled():
        reasons.append("key_weight needs a gradient")
    implementations = {
        "triton": Implementation(injective_attention_triton, reasons),
        "torch": Implementation(_injective_torch),
        "reference": Implementation(_injective_reference),
    }
    run = pick("injective_attention", backend, implementations)
    return run(q, k, v, key_weight, q.shape[-1] ** -0.5 if scale is None else scale)


def feature_mean(
    q: Tensor, *, features: Features = Features(), weight: Tensor | None = None, scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Return the mean of phi(q) over the tokens, weighed, times a number.

        m = scale * sum_i w_i phi(q_i) / sum_i w_i

    Args:
        q: Queries `[B, N, H, F]`, any strides.
        features: The feature map; its rotation has no part in this.
        weight: Weights w `[B, N, H]`, not negative, broadcasting.
        scale: The number.
        backend: 'triton' (CUDA, one pass), 'torch' or 'reference', which are the same here, or 'auto' for the fastest
            that can run.

    Returns:
        `[B, H, F]`, in float32 at least.

    Raises:
        TypeError: If the dtype is not floating point.
        ValueError: If the weights do not fit, or a named backend cannot run (every reason is listed).
    """
    refuse_unlike(q)
    if weight is not None and (weight.dim() != 3 or not _broadcasts(weight, tuple(q.shape[:3]))):
        raise ValueError(f"weight must be [B, N, H] = {tuple(q.shape[:3])}, got {tuple(weight.shape)}")
    implementations = {
        "triton": Implementation(feature_mean_triton, triton_reasons(q, auto=backend == "auto")),
        "torch": Implementation(_mean),
        "reference": Implementation(_mean),
    }
    return pick("feature_mean", backend, implementations)(q, features, weight, scale)


@full_precision
def _mean(q: Tensor, features: Features, weight: Tensor | None, scale: float) -> Tensor:
    phi = features.of(q.to(torch.promote_types(q.dtype, torch.float32)))
    if weight is None:
        return phi.mean(1) * scale
    weight = weight.to(phi.dtype)[..., None]
    return (phi * weight).sum(1) / weight.expand(*phi.shape[:3], 1).sum(1) * scale


def _check(
    q: Tensor, k: Tensor, v: Tensor, features: Features, key_weight: Tensor | None, global_query: Tensor | None
) -> None:
    refuse_unlike(q, k=k, v=v)
    B, N, H, C = q.shape
    M = k.shape[1]
    if (k.shape[0], k.shape[2], k.shape[3]) != (B, H, C):
        raise ValueError(f"k must be [B, M, H, F] = [{B}, M, {H}, {C}] for q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be [B, M, H, D] = [{B}, {M}, {H}, D] for k {tuple(k.shape)}, got {tuple(v.shape)}")
    for t in features.rotary or ():
        if tuple(t.shape) != (N, C) or N != M or C % 2:
            raise ValueError(
                f"rotary needs cosines and sines [N, F] of an even F and as many keys as queries, got {tuple(t.shape)} "
                f"for q {tuple(q.shape)} and k {tuple(k.shape)}"
            )
    if key_weight is not None and (key_weight.dim() != 3 or not _broadcasts(key_weight, (B, M, H))):
        raise ValueError(f"key_weight must be [B, M, H] = {(B, M, H)}, got {tuple(key_weight.shape)}")
    if global_query is not None and tuple(global_query.shape) != (B, H, C):
        raise ValueError(f"global_query must be [B, H, F] = {(B, H, C)}, got {tuple(global_query.shape)}")


def _broadcasts(t: Tensor, shape: tuple[int, ...]) -> bool:
    return all(have in (1, want) for have, want in zip(t.shape, shape, strict=True))


def _weigh(phi_k: Tensor, key_weight: Tensor | None, global_query: Tensor | None) -> Tensor:
    """Return w_j phi(k_j)."""
    if global_query is not None:
        logits = torch.einsum("bhc,bmhc->bmh", global_query.to(phi_k.dtype), phi_k)
        if key_weight is not None:
            logits = logits.masked_fill(key_weight == 0, -torch.inf)
        phi_k = phi_k * (phi_k.shape[1] * logits.softmax(1))[..., None]
    return phi_k if key_weight is None else phi_k * key_weight.to(phi_k.dtype)[..., None]


@full_precision
def _torch(
    q: Tensor, k: Tensor, v: Tensor, features: Features, key_weight: Tensor | None, global_query: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """One matrix of keys and values per head, then one product for each query."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    phi_q = features.of(q.to(dtype))
    phi_k = _weigh(features.of(k.to(dtype)), key_weight, global_query)
    count = max(k.shape[1], 1)  # without keys the sums are zero, and so is the output
    state = torch.einsum("bmhc,bmhd->bhcd", features.rotated(phi_k) / count, v.to(dtype))
    numerator = torch.einsum("bnhc,bhcd->bnhd", features.rotated(phi_q), state)
    normaliser = torch.einsum("bnhc,bhc->bnh", phi_q, phi_k.sum(1) / count) + eps
    return (numerator / normaliser[..., None]).to(q.dtype)


@full_precision
def _reference(
    q: Tensor, k: Tensor, v: Tensor, features: Features, key_weight: Tensor | None, global_query: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """The definition: a dense matrix of weights, in float64 if q is, else float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    phi_q = features.of(q.to(dtype))
    phi_k = _weigh(features.of(k.to(dtype)), key_weight, global_query)
    weights = torch.einsum("bnhc,bmhc->bhnm", features.rotated(phi_q), features.rotated(phi_k))
    normaliser = torch.einsum("bnhc,bmhc->bhn", phi_q, phi_k) + k.shape[1] * eps
    return torch.einsum("bhnm,bmhd->bnhd", weights / normaliser[..., None], v.to(dtype)).to(q.dtype)


def _shares(k: Tensor, key_weight: Tensor | None) -> Tensor:
    """Return w_j / W `[B, M, H, 1]`; zeros if all keys are hidden."""
    if key_weight is None:
        return torch.full((1, 1, 1, 1), 1 / max(k.shape[1], 1), dtype=k.dtype, device=k.device).expand(*k.shape[:3], 1)
    weight = key_weight.to(k.dtype)[..., None].expand(*k.shape[:3], 1)
    total = weight.sum(1, keepdim=True)
    return weight / torch.where(total > 0, total, 1)


@full_precision
def _injective_torch(q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor | None, scale: float) -> Tensor:
    """One matrix of centred keys and values per head, then one product for each query."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(dtype), v.to(dtype)
    share = _shares(k, key_weight)
    state = torch.einsum("bmhc,bmhd->bhcd", share * (k - (share * k).sum(1, keepdim=True)), v)
    o = torch.einsum("bnhc,bhcd->bnhd", q.to(dtype) * scale, state) + (share * v).sum(1, keepdim=True)
    return o.to(q.dtype)


@full_precision
def _injective_reference(q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor | None, scale: float) -> Tensor:
    """The definition: a dense matrix of weights, in float64 if q is, else float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.to(dtype)
    share = _shares(k, key_weight).permute(0, 2, 3, 1)  # [B, H, 1, M]
    products = torch.einsum("bnhc,bmhc->bhnm", q.to(dtype) * scale, k)
    weights = share * (products - (share * products).sum(-1, keepdim=True) + 1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v.to(dtype)).to(q.dtype)
