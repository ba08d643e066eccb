"""HiLo attention with its own projections, under the parameter names of the authors' checkpoints.

    high: o = W_h attention(q, k, v) inside windows, on the first heads
    low:  o = W_l attention(W_q x, W_kv mean_window(x)) on the last int(H * alpha) heads

The output is [high, low] on the channels. A map that the windows do not divide is padded with zeros, as the authors do
for detection. With a window of one token all heads are low: plain attention with separate projections.

Paper: 'Fast Vision Transformers with HiLo Attention' - https://arxiv.org/abs/2205.13213
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from vision_attn.backbones.blocks import refuse_heads
from vision_attn.backbones.registry import operator
from vision_attn.grid import Grid
from vision_attn.kernels.dense import dense_attention
from vision_attn.kernels.image import Windows, means
from vision_attn.kernels.window import window_attention
from vision_attn.processors.hilo import HiLo, low_heads


@operator("attend_high(Tensor qkv, int num_heads, int window_size) -> Tensor")
def attend_high(qkv: Tensor, num_heads: int, window_size: int) -> Tensor:
    """Attend inside windows; `[B, height, width, 3 C]` gives `[B, height, width, C]`."""
    grid = Grid(*qkv.shape[1:3])
    q, k, v = qkv.flatten(1, 2).unflatten(2, (3, num_heads, -1)).unbind(2)
    return window_attention(q, k, v, grid, window_size).flatten(2).unflatten(1, qkv.shape[1:3])


@operator("attend_low(Tensor q, Tensor kv, int num_heads) -> Tensor")
def attend_low(q: Tensor, kv: Tensor, num_heads: int) -> Tensor:
    """Attend from queries `[B, height, width, C]` to pooled keys and values `[B, M, 2 C]`."""
    k, v = kv.unflatten(2, (2, num_heads, -1)).unbind(2)
    o = dense_attention(q.flatten(1, 2).unflatten(2, (num_heads, -1)), k, v)
    return o.flatten(2).unflatten(1, q.shape[1:3])


@operator("window_means(Tensor x, int window_size) -> Tensor")
def window_means(x: Tensor, window_size: int) -> Tensor:
    """Return the means `[B, M, C]` of a map `[B, height, width, C]` over windows."""
    windows = Windows(size=window_size)
    return means(x.flatten(1, 2)[:, :, None], Grid(*x.shape[1:3]), windows, backend="torch")[0][:, :, 0]


@register_notrace_module
class HiLoSelfAttention(nn.Module):
    """HiLo attention over a map.

    Args:
        dim: Channels C.
        num_heads: H.
        window_size: Side of a window in tokens.
        alpha: Share of low heads; their number is int(H * alpha).
        qkv_bias: Whether the projections to q, k and v have a bias.
        **dd: Device and dtype of the parameters.

    Raises:
        ValueError: If `num_heads` does not divide `dim`, or `alpha` or `window_size` is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 2,
        alpha: float = 0.9,
        qkv_bias: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__()
        HiLo(alpha=alpha, window_size=window_size)  # its checks
        refuse_heads(dim, num_heads)
        self.window_size = window_size
        self.low = low_heads(num_heads, alpha, window_size)
        self.high = num_heads - self.low
        low, high = self.low * (dim // num_heads), self.high * (dim // num_heads)
        self.l_q = nn.Linear(dim, low, bias=qkv_bias, **dd) if low else None
        self.l_kv = nn.Linear(dim, 2 * low, bias=qkv_bias, **dd) if low else None
        self.l_proj = nn.Linear(low, low, **dd) if low else None
        self.h_qkv = nn.Linear(dim, 3 * high, bias=qkv_bias, **dd) if high else None
        self.h_proj = nn.Linear(high, high, **dd) if high else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended map `[B, height, width, C]`."""
        height, width = x.shape[1], x.shape[2]
        down, right = -height % self.window_size, -width % self.window_size
        if down or right:
            x = F.pad(x, [0, 0, 0, right, 0, down])
        outputs: list[Tensor] = []
        if self.h_qkv is not None and self.h_proj is not None:
            outputs.append(self.h_proj(self.attend_high(self.h_qkv(x))))
        if self.l_q is not None and self.l_kv is not None and self.l_proj is not None:
            kv = self.l_kv(self.means(x))
            outputs.append(self.l_proj(self.attend_low(self.l_q(x), kv)))
        return torch.cat(outputs, 3)[:, :height, :width]

    def attend_high(self, qkv: Tensor) -> Tensor:
        """Attend inside windows."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return torch.ops.vision_attn.attend_high(qkv, self.high, self.window_size)
        return attend_high(qkv, self.high, self.window_size)

    def means(self, x: Tensor) -> Tensor:
        """Return the means `[B, M, C]` to which the low heads attend."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return torch.ops.vision_attn.window_means(x, self.window_size)
        return window_means(x, self.window_size)

    def attend_low(self, q: Tensor, kv: Tensor) -> Tensor:
        """Attend to pooled cells."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return torch.ops.vision_attn.attend_low(q, kv, self.low)
        return attend_low(q, kv, self.low)
