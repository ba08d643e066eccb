"""Dense attention to a part of the keys, to be merged with other parts by the log-sum-exp of the logits.

    o = softmax(scale * q k^T) v over the part,    lse = log2 sum_j 2^(scale log2(e) q . k_j)

The gradients of a part follow from the merged output and log-sum-exp alone: no other part is needed.
"""

import math
from typing import Any

import torch
from torch import Tensor

_HIDDEN = -1e30
LOG2E = math.log2(math.e)


def dense_part(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend to a part of the keys. It has no gradient.

    Args:
        q: Queries `[B, N, H, D]`.
        k: Keys of the part `[B, M, H, D]`.
        v: Values of the part, like `k`.
        mask: Bool `[B, M]` (or batch 1): False hides a key.
        scale: Factor of the logits.
        bias: Added to the logits `[H, N, M]`.

    Returns:
        `[B, N, H, D]` in the dtype of `q`, and the log-sum-exp in base 2 `[B, H, N]`, in float32 at least; hugely
        negative if the part has no key to see.
    """
    with torch.no_grad():
        if not k.shape[1]:
            wide = torch.promote_types(q.dtype, torch.float32)
            return torch.zeros_like(q), q.new_full((q.shape[0], q.shape[2], q.shape[1]), _HIDDEN, dtype=wide)
        if q.is_cuda and q.dtype != torch.float64:
            from vision_attn.kernels.agent.forward import forward  # noqa: PLC0415

            rows, floats = forward(_pairs(q, k, v, mask, scale, bias))
            return rows, floats[0]
        o, lse = torch.empty_like(q), []
        for h in range(q.shape[2]):
            logits = _logits(q[:, :, h], k[:, :, h], mask, scale, None if bias is None else bias[h])
            lse.append(logits.logsumexp(-1))
            o[:, :, h] = (logits - lse[-1][..., None]).exp() @ v[:, :, h].to(logits.dtype)
        return o, torch.stack(lse, 1) * LOG2E


def dense_part_gradients(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return what a part of the keys gives to the gradient of q, and the gradients of its keys, values and bias.

    Args:
        do: Gradient of the merged output `[B, N, H, D]`.
        o: The merged output, like `do`.
        lse: The merged log-sum-exp in base 2 `[B, H, N]`.
        q: As for `dense_part`.
        k: As for `dense_part`.
        v: As for `dense_part`.
        mask: As for `dense_part`.
        scale: As for `dense_part`.
        bias: As for `dense_part`.
    """
    d_bias = None if bias is None else torch.zeros_like(bias)
    if not (k.shape[1] and q.shape[1]):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), d_bias
    if q.is_cuda and q.dtype != torch.float64:
        from vision_attn.kernels.agent.backward import backward  # noqa: PLC0415

        pairs = _pairs(q, k, v, mask, scale, bias)
        *grads, added = backward(pairs, do.contiguous(), o.contiguous(), lse.contiguous()[None])
        return *grads, None if bias is None else added  # type: ignore[return-value]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for h in range(q.shape[2]):
        queries, keys, values, grad, out = (t[:, :, h].to(lse.dtype) for t in (q, k, v, do, o))
        logits = _logits(queries, keys, mask, scale, None if bias is None else bias[h])
        weights = (logits - lse[:, h, :, None] / LOG2E).exp()
        d_logits = weights * (grad @ values.mT - (grad * out).sum(-1, keepdim=True))
        if d_bias is not None:
            d_bias[h] = d_logits.sum(0)
        d_logits = d_logits * scale
        dq[:, :, h], dk[:, :, h], dv[:, :, h] = d_logits @ keys, d_logits.mT @ queries, weights.mT @ grad
    return dq, dk, dv, d_bias


def _logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(wide) * scale) @ k.to(wide).mT
    logits = logits if bias is None else logits + bias.to(wide)
    return logits if mask is None else logits.masked_fill(~mask[:, None], _HIDDEN)


def _pairs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, bias: Tensor | None) -> Any:
    from vision_attn.kernels.agent.op import pairs_of  # noqa: PLC0415

    return pairs_of(q, k, v, bias, mask, 0 if bias is None else k.shape[1], (scale, scale))
