"""The Hedgehog's feature map: non-negative features whose inner products imitate the exponential.

    phi(x) = [softmax(W x), softmax(-W x)]

Paper: 'The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry' -
https://arxiv.org/abs/2402.04347
"""

import torch
from torch import Tensor

from vision_attn.kernels.backend import FLOATS, Implementation, full_precision, pick
from vision_attn.kernels.hedgehog.op import LEAST, hedgehog_reasons, hedgehog_triton


def hedgehog(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """Return features of queries or keys, at least 1e-12 (0 in float16, which has no number that small).

    Args:
        x: Queries or keys `[B, N, H, D]`; any strides.
        weight: W of each head, `[H, D, D]`, transposed: channel e of W x is the sum over d of `x[d] weight[d, e]`.
        backend: 'triton' (CUDA, fused, without gradients), 'torch' (any device), or 'auto' for the fastest that can
            run.

    Returns:
        `[B, N, H, 2 D]` in the dtype of `x`.

    Raises:
        TypeError: If a dtype is not floating point.
        ValueError: If shapes or devices do not fit each other, or a named backend cannot run (every reason is listed).
    """
    if x.dim() != 4:
        raise ValueError(f"x must be [B, N, H, D], got shape {tuple(x.shape)}")
    H, D = x.shape[2:]
    if tuple(weight.shape) != (H, D, D):
        raise ValueError(f"weight must be [H, D, D] = [{H}, {D}, {D}], got {tuple(weight.shape)}")
    if x.dtype not in FLOATS or weight.dtype not in FLOATS:
        raise TypeError(f"x and weight must be floating point, got x {x.dtype} and weight {weight.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x and weight must be on one device, got x on {x.device} and weight on {weight.device}")
    implementations = {
        "triton": Implementation(hedgehog_triton, hedgehog_reasons(x, weight, auto=backend == "auto")),
        "torch": Implementation(_torch),
    }
    return pick("hedgehog", backend, implementations)(x, weight)


@full_precision
def _torch(x: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = torch.einsum("bnhd,hde->bnhe", x.to(dtype), weight.to(dtype))
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp(min=LEAST).to(x.dtype)
