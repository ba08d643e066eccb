"""The softmax twin of a backbone: the same model with dense attention over all cells where it was local or linear."""

from typing import Any

from torch import Tensor, nn

from vision_attn.backbones.agent.attention import AgentSelfAttention
from vision_attn.backbones.litv2.attention import HiLoSelfAttention
from vision_attn.backbones.nat.attention import NeighborhoodAttention
from vision_attn.backbones.ravlt.attention import RALASelfAttention
from vision_attn.kernels.dense import dense_attention


class DenseSelfAttention(nn.Module):
    """Softmax attention of a map `[B, height, width, C]` over all of its cells, without position bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return self.proj(dense_attention(q, k, v).flatten(2).unflatten(1, x.shape[1:3]))


def make_dense(model: nn.Module) -> nn.Module:
    """Replace a backbone's local and linear attention by dense softmax attention, in place.

    RALA's layers have softmax attention of their own, which they switch to. Windows of Agent-Swin's last stage stay.

    Raises:
        ValueError: If there is nothing to replace.
    """
    changed = 0
    module: Any
    for module in model.modules():
        attn = getattr(module, "attn", None)
        if isinstance(attn, RALASelfAttention):
            attn.linear = False
        elif isinstance(attn, (NeighborhoodAttention, AgentSelfAttention)):
            module.attn = DenseSelfAttention(attn.proj.in_features, attn.num_heads)
        elif isinstance(attn, HiLoSelfAttention):
            module.attn = DenseSelfAttention(module.norm1.normalized_shape[0], attn.low + attn.high)
        else:
            continue
        changed += 1
    if not changed:
        raise ValueError(f"{type(model).__name__} has no local or linear attention to replace")
    return model
