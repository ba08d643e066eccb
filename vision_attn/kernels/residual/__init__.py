"""Small residual networks on tokens, as LinFusion adds them to the inputs of the projections to queries and keys.

    y = x + W_2 leaky_relu(layer_norm(W_1 x + b_1)) + b_2

The networks that read the same tokens are computed together. The kernels are for inference; PyTorch has the gradients.

Paper: 'LinFusion: 1 GPU, 1 Minute, 16K Image' - https://arxiv.org/abs/2409.02097
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.kernels.backend import FLOATS, Implementation, pick
from vision_attn.kernels.residual.op import MOST, add_networks_triton, network_reasons

__all__ = ["MOST", "Network", "add_networks", "network_reasons", "run"]


class Network(NamedTuple):
    """The weights of f = Linear - LayerNorm - LeakyReLU - Linear, from C channels to `mid` and back.

    Args:
        weight: Of the first layer, `[mid, C]`.
        bias: Of the first layer, `[mid]`.
        norm_weight: Of the norm, `[mid]`.
        norm_bias: Of the norm, `[mid]`.
        last_weight: Of the last layer, `[C, mid]`.
        last_bias: Of the last layer, `[C]`.
        eps: Of the norm.
        slope: Of the activation below zero.
    """

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    last_weight: Tensor
    last_bias: Tensor
    eps: float = 1e-5
    slope: float = 0.01


def add_networks(x: Tensor, networks: tuple[Network, ...], *, backend: str = "auto") -> tuple[Tensor, ...]:
    """Return x + f(x) of one or two networks.

    Args:
        x: Tokens `[B, N, C]`.
        networks: The networks; two have the same width, `eps` and `slope` for 'triton'.
        backend: 'triton' (CUDA, 16 bits, without gradients), 'torch' (any device), or 'auto': 'torch' above `MOST`
            multiplications a layer, and else the fastest that can run.

    Returns:
        `[B, N, C]` in the dtype of `x`, for each network.

    Raises:
        TypeError: If a dtype is not floating point.
        ValueError: If there is no network or more than two, if shapes or devices do not fit each other, or if a named
            backend cannot run (every reason is listed).
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, N, C], got shape {tuple(x.shape)}")
    if not 1 <= len(networks) <= 2:
        raise ValueError(f"networks must be one or two, got {len(networks)}")
    for network in networks:
        _check(x, network)
    implementations = {
        "triton": Implementation(add_networks_triton, network_reasons(x, networks, auto=backend == "auto")),
        "torch": Implementation(_torch),
    }
    return tuple(pick("add_networks", backend, implementations)(x, networks))


def _check(x: Tensor, network: Network) -> None:
    C, mid = x.shape[-1], network.weight.shape[0]
    wanted = dict(
        weight=(mid, C), bias=(mid,), norm_weight=(mid,), norm_bias=(mid,), last_weight=(C, mid), last_bias=(C,)
    )
    for name, shape in wanted.items():
        t: Tensor = getattr(network, name)
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} for x of {C} channels, got {list(t.shape)}")
        if x.dtype not in FLOATS or t.dtype not in FLOATS:
            raise TypeError(f"x and {name} must be floating point, got x {x.dtype} and {name} {t.dtype}")
        if x.device != t.device:
            raise ValueError(f"x and {name} must be on one device, got x on {x.device} and {name} on {t.device}")


def run(x: Tensor, network: Network) -> Tensor:
    """Return f(x) in the dtype of x, computed in those of the weights."""
    hidden = F.linear(x.to(network.weight.dtype), network.weight, network.bias)
    hidden = torch.layer_norm(hidden, network.norm_weight.shape, network.norm_weight, network.norm_bias, network.eps)
    hidden = F.leaky_relu(hidden, network.slope)
    return F.linear(hidden.to(network.last_weight.dtype), network.last_weight, network.last_bias).to(x.dtype)


def _torch(x: Tensor, networks: tuple[Network, ...]) -> tuple[Tensor, ...]:
    return tuple([x + run(x, network) for network in networks])
