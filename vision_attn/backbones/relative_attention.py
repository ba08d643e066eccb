"""Dense attention with a relative position bias, the twin that the isotropic NAT is compared with ('ViT-rpb').

    o_i = proj( sum_j softmax_j( scale * q_i . k_j + rpb[h, j - i] ) v_j ),    j in the whole map

Paper: 'Dilated Neighborhood Attention Transformer' - https://arxiv.org/abs/2209.15001
"""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from vision_attn.backbones.nat.attention import NeighborhoodAttention


@register_notrace_module
class RelativeAttention(NeighborhoodAttention):
    """The window is the whole map `[B, height, width, C]`; `kernel_size` is the side that the bias is made for.

    For a map of another size the bias is resized (bicubic).
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
        """Return the bias of every query and key, `[H, N, N]`."""
        table: Tensor = self.rpb
        size = [2 * height - 1, 2 * width - 1]
        if table.shape[1] != size[0] or table.shape[2] != size[1]:
            table = F.interpolate(table[None], size=size, mode="bicubic", align_corners=False)[0]
        rows, columns = offsets(height, table.device), offsets(width, table.device)
        return table[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3).flatten(1, 2)


def offsets(length: int, device: torch.device) -> Tensor:
    """Return `key - query + length - 1` of every query and key of an axis, `[length, length]`."""
    i = torch.arange(length, device=device)
    return i - i[:, None] + length - 1
