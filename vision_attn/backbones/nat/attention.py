"""NAT's attention layer: each cell of a map attends to the window around it, with a relative position bias.

    o_i = proj( sum_j softmax_j( scale * q_i . k_j + rpb[h, j - i] ) v_j ),    j in window(i)

A map that is smaller than `kernel_size * dilation` is padded with zeros after the norm and before the projection, as
in the training of the released models (NATTEN 0.14). A padded cell is a key and a value equal to the projection's bias.

Papers: 'Neighborhood Attention Transformer' - https://arxiv.org/abs/2204.07143,
'Dilated Neighborhood Attention Transformer' - https://arxiv.org/abs/2209.15001
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from vision_attn.backbones.blocks import refuse_heads
from vision_attn.backbones.registry import operator
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention


@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Neighborhood attention over a map `[B, height, width, C]` of any size.

    Args:
        dim: Channels C.
        num_heads: Heads, a divisor of `dim`.
        kernel_size: Side of the window in cells.
        dilation: Distance between the window's cells.
        qkv_bias: Whether queries, keys and values have a bias.
        scale: Factor of the logits; `(dim / num_heads) ** -0.5` if None or 0.
        proj_drop: Dropout of the output.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If `num_heads` does not divide `dim`, or the window is empty.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        *,
        dilation: int = 1,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refuse_heads(dim, num_heads)
        _ = Window(kernel_size=kernel_size, dilation=dilation).steps
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation
        self.scale = scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new position bias; linear layers reset themselves."""
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        B, height, width, C = x.shape
        least = self.kernel_size * self.dilation
        padded = height < least or width < least
        if padded:  # padding by zero would give a compiler more complicated sizes
            x = F.pad(x, (0, 0, 0, max(0, least - width), 0, max(0, least - height)))
        rows, columns = x.shape[1], x.shape[2]
        qkv = self.qkv(x).reshape(B, rows * columns, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.unbind(2)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            o = torch.ops.vision_attn.neighborhood(q, k, v, self.rpb, rows, columns, self.dilation, self.scale)
        else:
            o = neighborhood(q, k, v, self.rpb, rows, columns, self.dilation, self.scale)
        o = o.reshape(B, rows, columns, C)
        if padded:
            o = o[:, :height, :width]
        return self.proj_drop(self.proj(o))


@operator(
    "neighborhood(Tensor q, Tensor k, Tensor v, Tensor rpb, int height, int width, int dilation, float scale) -> Tensor"
)
def neighborhood(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, height: int, width: int, dilation: int, scale: float
) -> Tensor:
    """Attend from each cell to its window, whose side follows from the bias `[H, 2 * side - 1, 2 * side - 1]`."""
    window = Window(kernel_size=(rpb.shape[1] + 1) // 2, dilation=dilation, bias=rpb)
    return local_attention(q, k, v, Grid(height, width), window, scale=scale)


@register_notrace_module
class RelativeAttention(NeighborhoodAttention):
    """Dense attention with a relative position bias: 'ViT-rpb', with which the paper compares the isotropic NAT.

        o_i = proj( sum_j softmax_j( scale * q_i . k_j + rpb[h, j - i] ) v_j ),    j in the whole map

    The window is the whole map `[B, height, width, C]`. The bias is made for maps of side `kernel_size` and resized
    (bicubic) to others.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        B, height, width, C = x.shape
        qkv = self.qkv(x).reshape(B, height * width, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.bias(height, width).to(q.dtype)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return self.proj_drop(self.proj(o.transpose(1, 2).reshape(B, height, width, C)))

    def bias(self, height: int, width: int) -> Tensor:
        """Return the bias `[H, N, N]` of each query and key."""
        table: Tensor = self.rpb
        size = [2 * height - 1, 2 * width - 1]
        if table.shape[1] != size[0] or table.shape[2] != size[1]:
            table = F.interpolate(table[None], size=size, mode="bicubic", align_corners=False)[0]
        rows, columns = offsets(height, table.device), offsets(width, table.device)
        return table[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3).flatten(1, 2)


def offsets(length: int, device: torch.device) -> Tensor:
    """Return `key - query + length - 1` for each query and key of an axis, `[length, length]`."""
    i = torch.arange(length, device=device)
    return i - i[:, None] + length - 1
