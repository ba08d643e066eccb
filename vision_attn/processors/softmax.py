"""Softmax attention, unchanged: every token attends to every token. It is the control of experiments.

    o = softmax(scale * q k^T) v

Paper: 'Attention Is All You Need' - https://arxiv.org/abs/1706.03762
"""

from dataclasses import dataclass

from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.dense import dense_attention, full_mask
from vision_attn.processors.base import AttnSpec, Layer, Processor, register


@register(tests={}, demo=[{}], draws_untrained=True)
@dataclass(frozen=True)
class Softmax(AttnSpec):
    """The host's own attention. Needs no training: a model converted to it computes what it did before."""

    def build(self, layer: Layer) -> "SoftmaxAttention":
        """Return the processor of one layer."""
        return SoftmaxAttention()

    def attended(self, grid: Grid) -> float:
        """Return 1.0."""
        return 1.0

    @property
    def calls(self) -> float:
        """The host's own."""
        return 2.0


class SoftmaxAttention(Processor):
    """`scaled_dot_product_attention` over all tokens."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend densely: see `Processor.forward`."""
        return dense_attention(q, k, v, mask=full_mask(mask, grid), scale=scale)
