"""RALA with its own projections, under the parameter names of the authors' checkpoints.

    [q, k, v, g] = W_1 x,    o = W_2 ((attention(q, k, v) + dwc_5x5(v)) * g)

`attention` is rank-augmented linear attention, or softmax attention in the last stages of RAVLT. Both rotate queries
and keys by their row (first half of a head's channels) and column (second half). See `vision_attn.processors.rala`.

Paper: 'Breaking the Low-Rank Dilemma of Linear Attention' - https://arxiv.org/abs/2411.07635
"""

from typing import Any

import torch
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from vision_attn.backbones.conv_layers import PointwiseConv2d
from vision_attn.backbones.registry import operator
from vision_attn.grid import Grid
from vision_attn.kernels.dense import dense_attention
from vision_attn.kernels.image import add_depthwise
from vision_attn.kernels.linear import rotate_pairs
from vision_attn.processors.rala import rank_augmented_attention


@register_notrace_function
def rotary(x: Tensor, head_dim: int) -> list[Tensor]:
    """Return cosine and sine `[N, D]` of the angles of a map's tokens, in float32.

    The D / 4 frequencies go from 1 to 1e-4, both included. Rows turn the first D / 2 channels, columns the others.

    Args:
        x: The map `[B, C, height, width]`; only its size and device count.
        head_dim: D, a multiple of four.
    """
    height, width = x.shape[2], x.shape[3]
    frequencies = rotary_frequencies(head_dim, x.device)
    rows = torch.arange(height, device=x.device)[:, None] * frequencies
    columns = torch.arange(width, device=x.device)[:, None] * frequencies
    shape = [height, width, head_dim // 2]
    angles = torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], 2).flatten(0, 1)
    return [angles.cos(), angles.sin()]


def rotary_frequencies(head_dim: int, device: torch.device | None = None) -> Tensor:
    """Return the frequencies of D / 2 channels in float32; two neighbouring channels share one."""
    exponents = torch.linspace(0.0, 1.0, head_dim // 4, device=device, dtype=torch.float32)
    return (1.0 / torch.pow(10000.0, exponents)).repeat_interleave(2)


@operator(
    "attend_gated(Tensor qkvg, int num_heads, Tensor[] angles, Tensor weight, Tensor? bias, bool linear) -> Tensor"
)
def attend_gated(
    qkvg: Tensor, num_heads: int, angles: list[Tensor], weight: Tensor, bias: Tensor | None, linear: bool
) -> Tensor:
    """Attend, add the convolution of the values, and multiply by the gate.

    Args:
        qkvg: Queries, keys, values and gate `[B, 4 C, height, width]`.
        num_heads: H.
        angles: Cosine and sine `[N, D]`.
        weight: Weight of the convolution `[C, 1, 5, 5]`.
        bias: Bias of the convolution `[C]`.
        linear: Use rank-augmented linear attention rather than softmax.

    Returns:
        `[B, C, height, width]`.
    """
    assert bias is not None  # a convolution's type allows None
    size = qkvg.shape[2:]
    qkv, g = qkvg.split([qkvg.shape[1] // 4 * 3, qkvg.shape[1] // 4], 1)
    q, k, v = qkv.flatten(2).transpose(1, 2).unflatten(2, (3, num_heads, -1)).unbind(2)
    cos, sin = angles
    if linear:
        o = rank_augmented_attention(q, k, v, rotary=(cos, sin))
    else:
        o = dense_attention(rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin), v)
    o = add_depthwise(o, v, Grid(*size), weight, bias, backend="torch")
    return o.flatten(2).transpose(1, 2).unflatten(2, size) * g


@register_notrace_module
class RALASelfAttention(nn.Module):
    """Gated attention over a map.

    Args:
        dim: Channels C.
        num_heads: H; C / H must be a multiple of four.
        linear: Use rank-augmented linear attention rather than softmax.
        **dd: Device and dtype of the parameters.

    Raises:
        ValueError: If `dim` is not a multiple of `4 * num_heads`.
    """

    def __init__(self, dim: int, num_heads: int, *, linear: bool = True, **dd: Any) -> None:
        super().__init__()
        if num_heads < 1 or dim % (4 * num_heads):
            raise ValueError(f"dim {dim} is not a multiple of 4 * num_heads {num_heads}: rows and columns turn pairs")
        self.num_heads, self.linear = num_heads, linear
        self.qkvo = PointwiseConv2d(dim, 4 * dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = PointwiseConv2d(dim, dim, **dd)

    def forward(self, x: Tensor, angles: list[Tensor]) -> Tensor:
        """Return the attended map `[B, C, height, width]`; `angles` are cosine and sine of `rotary`."""
        weight, bias = self.lepe.weight, self.lepe.bias
        qkvg = self.qkvo(x)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            o = torch.ops.vision_attn.attend_gated(qkvg, self.num_heads, angles, weight, bias, self.linear)
        else:
            o = attend_gated(qkvg, self.num_heads, angles, weight, bias, self.linear)
        return self.proj(o)
