"""The Hedgehog's features in Triton, for inference; the portable implementation has the gradients.

The kernel is in `forward.py`; triton is imported when it first runs.
"""

from torch import Tensor

from vision_attn.kernels.backend import custom_op
from vision_attn.kernels.triton.launching import inference_reasons, packed

LEAST = 1e-12  # of a feature: sums of them divide
MOST = 128  # channels of a head whose matrix shared memory holds


def hedgehog_reasons(x: Tensor, weight: Tensor, *, auto: bool) -> list[str]:
    """List why the Triton backend cannot run; empty if it can."""
    reasons = inference_reasons(x, weights=(weight,), auto=auto)
    if x.shape[-1] > MOST:
        reasons.append(f"head_dim {x.shape[-1]} is above {MOST}")
    return reasons


def hedgehog_triton(x: Tensor, weight: Tensor) -> Tensor:
    """Run `hedgehog` on checked inputs."""
    return _features(x, weight.float())


@custom_op("vision_attn::hedgehog_triton", repeats=True)
def _features(x: Tensor, weight: Tensor) -> Tensor:
    """Features `[B, N, H, 2 D]`."""
    from vision_attn.kernels.hedgehog.forward import forward  # noqa: PLC0415

    return forward(packed(x), weight.contiguous())


@_features.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:3], 2 * x.shape[3]))
