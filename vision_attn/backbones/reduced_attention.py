"""The attention of a pyramid: keys and values come from a map that a strided convolution reduces, softmax or agents.

    q = W_q x,    [k, v] = W_kv LN(conv_r(x)) (r = 1: W_kv x),    o = W (attention(q, k, v) [+ dwc(upsampled v)])

Papers: 'Pyramid Vision Transformer' - https://arxiv.org/abs/2102.12122, 'Agent Attention: On the Integration of Softmax
and Linear Attention' - https://arxiv.org/abs/2312.08874
"""

from typing import Any

import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from vision_attn.backbones.agent.attention import Size, add_biases, agent_grid_of, attend, reset_biases
from vision_attn.backbones.blocks import refuse_heads


def attend_densely(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from each query `[B, N, H, D]` to every key: `kernels.dense` in words that TorchScript knows."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@register_notrace_module
class ReducedAttention(nn.Module):
    """Softmax attention to keys of a reduced map.

    Args:
        dim: Channels C.
        num_heads: H.
        sr_ratio: The keys' map is this many times smaller per side.
        qkv_bias: Whether the projections to q, k and v have a bias.
        proj_drop: Dropout rate of the output.
        **dd: Device and dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        refuse_heads(dim, num_heads)
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        reduces = sr_ratio > 1
        self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **dd) if reduces else None
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd) if reduces else None

    def project(self, x: Tensor) -> list[Tensor]:
        """Return q `[B, N, H, D]`, k and v `[B, M, H, D]` of a map `[B, height, width, C]`.

        A map that is smaller than one step of the convolution is padded with zeros.
        """
        q = self.q(x).flatten(1, 2).unflatten(2, [self.num_heads, -1])
        if self.sr is not None and self.norm is not None:
            down, right = max(0, self.sr_ratio - x.shape[1]), max(0, self.sr_ratio - x.shape[2])
            image = F.pad(x, [0, 0, 0, right, 0, down]).permute(0, 3, 1, 2)
            x = self.norm(self.sr(image).permute(0, 2, 3, 1))
        kv = self.kv(x).flatten(1, 2).unflatten(2, [2, self.num_heads, -1])
        return [q, kv[:, :, 0], kv[:, :, 1]]

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended map `[B, height, width, C]`."""
        q, k, v = self.project(x)
        return self.proj_drop(self.proj(attend_densely(q, k, v).reshape(x.shape)))


@register_notrace_module
class AgentReducedAttention(ReducedAttention):
    """Agent attention to keys of a reduced map.

    Args:
        dim: Channels C.
        num_heads: H.
        agent_num: Agents that the biases are for, a square number.
        size: Height and width of the map that the biases are for.
        agent_grid: Rows and columns of the agents at use, the square root of `agent_num` each if None.
        sr_ratio: The keys' map is this many times smaller per side.
        qkv_bias: Whether the projections to q, k and v have a bias.
        proj_drop: Dropout rate of the output.
        **dd: Device and dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agent_num: int,
        size: Size,
        *,
        agent_grid: Size | None = None,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__(dim, num_heads, sr_ratio=sr_ratio, qkv_bias=qkv_bias, proj_drop=proj_drop, **dd)
        self.agents = agent_grid_of(agent_num, agent_grid)
        key_size = max(1, size[0] // sr_ratio), max(1, size[1] // sr_ratio)
        add_biases(self, num_heads, agent_num, size, key_size=key_size, **dd)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def reset_parameters(self) -> None:
        """Draw the biases anew."""
        reset_biases(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended map `[B, height, width, C]`."""
        tables = [self.an_bias, self.na_bias, self.ah_bias, self.aw_bias, self.ha_bias, self.wa_bias]
        height, width = x.shape[1], x.shape[2]
        keys = [max(1, height // self.sr_ratio), max(1, width // self.sr_ratio)]
        sizes = [height, width, keys[0], keys[1], height, width, self.agents[0], self.agents[1]]
        o = attend(self.project(x), tables, self.dwc.weight, self.dwc.bias, sizes)  # type: ignore[arg-type]
        return self.proj_drop(self.proj(o)).reshape(x.shape)
