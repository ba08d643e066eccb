"""The residual networks in Triton, for inference; the portable implementation has the gradients.

The kernels are in `forward.py`; triton is imported when they first run.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vision_attn.kernels.backend import custom_op
from vision_attn.kernels.triton.launching import inference_reasons

if TYPE_CHECKING:
    from vision_attn.kernels.residual import Network

# Multiplications of a network's layer, B N C mid, up to which the fused networks are chosen: those of SDXL at 2048 px.
# Up to there the calls of PyTorch's ten operators take the host longer than they take an H200. Above, the time is that
# of the products, and cuBLAS has the faster ones.
MOST = 16384 * 640 * 640
WIDEST = 128  # channels of the last row of the launches: a wider product has more tiles, not other ones
_UNIT = 8  # channels that one load takes


def network_reasons(x: Tensor, networks: "tuple[Network, ...]", *, auto: bool) -> list[str]:
    """List why the Triton backend cannot run; empty if it can."""
    weights = tuple([t for network in networks for t in network[:6]])
    reasons = inference_reasons(x[..., :1], weights=weights, auto=auto)  # C is the width of all heads, not of one
    if x.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"products are of 16 bits, and x is {x.dtype}")
    first, mid = networks[0], networks[0].weight.shape[0]
    if any(t.dtype != x.dtype for t in weights):
        reasons.append("weights have another dtype than x")
    if any(not t.is_contiguous() for t in weights):
        reasons.append("a weight is not contiguous")
    if any(n.weight.shape[0] != mid or (n.eps, n.slope) != (first.eps, first.slope) for n in networks):
        reasons.append("the networks differ in width, eps or slope")
    reasons += [f"{_UNIT} does not divide {n} channels" for n in sorted({x.shape[-1], mid}) if n % _UNIT]
    if auto and x.numel() * mid > MOST:
        reasons.append(f"PyTorch is faster at {x.numel() * mid:.1e} multiplications a layer, above {MOST:.1e}")
    return reasons


def add_networks_triton(x: Tensor, networks: "tuple[Network, ...]") -> tuple[Tensor, ...]:
    """Run `add_networks` on checked inputs."""
    first, *others = networks
    other = others[0][:6] if others else (None,) * 6
    return _add_networks(x, *first[:6], *other, first.eps, first.slope)[: len(networks)]


@custom_op("vision_attn::add_networks_triton", repeats=True)
def _add_networks(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, last_weight: Tensor,
    last_bias: Tensor, weight_2: Tensor | None, bias_2: Tensor | None, norm_weight_2: Tensor | None,
    norm_bias_2: Tensor | None, last_weight_2: Tensor | None, last_bias_2: Tensor | None, eps: float, slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sums `[B, N, C]` of both networks, the second empty if there is no second network."""
    from vision_attn.kernels.residual.forward import forward  # noqa: PLC0415

    first = weight, bias, norm_weight, norm_bias, last_weight, last_bias
    second = weight_2, bias_2, norm_weight_2, norm_bias_2, last_weight_2, last_bias_2
    return forward(x.contiguous(), first, None if weight_2 is None else second, eps, slope)


@_add_networks.register_fake
def _(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((0,) if args[6] is None else x.shape)
