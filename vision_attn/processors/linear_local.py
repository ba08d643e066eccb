"""LinearLocal: exact attention to near tokens and the text, linear attention to far ones, with one normaliser.

    o_i = (g sum_near e^{s_ij - m_i} v_j + (1 - g) sum_far (phi_q(q_i) . phi_k(k_j)) v_j) / (the same without v)

Near tokens are those of the same `window_size` x `window_size` cell of the grid and all tokens outside the grid; s are
the host's logits, m_i is the largest of them, and phi are the Hedgehog's features. Tokens outside the grid attend
densely. The paper weighs the near part alone, by g. Here the far part is weighed too, so that training starts close to
the host: the host gives far tokens small weights, and the features give all of them nearly the same.

Paper: 'LoLCATs: On Low-Rank Linearizing of Large Language Models' - https://arxiv.org/abs/2410.10254
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vision_attn._checks import check_int, check_number
from vision_attn.grid import Grid
from vision_attn.kernels.dense import with_dense_rows
from vision_attn.kernels.linear_local import linear_local_attention
from vision_attn.processors.base import AttnSpec, Layer, Processor, register
from vision_attn.processors.linfusion import Hedgehog


@register(tests={"linear-local": dict(window_size=4)}, demo=[{}], bench={"linear local": {}}, draws_untrained=True)
@dataclass(frozen=True)
class LinearLocal(AttnSpec):
    """A softmax window with linear features for everything outside it. Needs training, but less than linear attention.

    Args:
        window_size: Side of a cell in tokens.
        gate: g at the start, between 0 and 1; it is learned per head. On the embedded teacher 0.99 starts five to
            twenty times closer to the host than 0.5.
    """

    window_size: int = 8
    gate: float = 0.99

    def __post_init__(self) -> None:
        check_int("window_size", self.window_size, 1)
        check_number("gate", self.gate)
        if not 0 < self.gate < 1:
            raise ValueError(f"gate must lie between 0 and 1, got {self.gate}")

    def build(self, layer: Layer) -> "LinearLocalAttention":
        """Return the processor of one layer."""
        return LinearLocalAttention(self, layer)

    def attended(self, grid: Grid) -> float:
        """Return 1.0: every token is seen, the far ones through a sum."""
        return 1.0

    def flops(self, grid: Grid, layer: Layer) -> float:
        """Return the operations of windows, text, sums and features."""
        near = self.window_size**2 + grid.prefix + grid.suffix
        # above 128 features of a head they do not stay on the multiprocessor: what that takes as long as on an H200
        again = 56 if layer.head_dim > 64 else 0
        per_token = 4 * near + (8 + 4 + again) * layer.head_dim
        outside = 4 * grid.tokens * (grid.prefix + grid.suffix)
        return (grid.image_tokens * per_token + outside) * layer.num_heads * layer.head_dim

    @property
    def passes(self) -> float:
        """Several, because the features are written and read too."""
        return 9.0

    @property
    def calls(self) -> float:
        """Kernels of the features, of the state and of the attention itself."""
        return 15.0


class LinearLocalAttention(Processor):
    """`linear_local_attention` with learned features.

    Attributes:
        features_q: phi_q.
        features_k: phi_k.
        gate: The logit of g `[H]`.
    """

    def __init__(self, spec: LinearLocal, layer: Layer) -> None:
        super().__init__()
        self.spec, self.backend = spec, layer.backend
        self.features_q, self.features_k = (Hedgehog(layer.num_heads, layer.head_dim, layer.backend) for _ in range(2))
        self.gate = nn.Parameter(torch.full((layer.num_heads,), math.log(spec.gate / (1 - spec.gate))))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend to near and far: see `Processor.forward`."""
        o = linear_local_attention(
            (q, self.features_q(q)),
            (k, self.features_k(k)),
            v,
            grid,
            self.spec.window_size,
            self.gate.to(v.device).exp(),  # g / (1 - g)
            mask=mask,
            scale=scale,
            backend=self.backend,
        )
        return with_dense_rows(o, q, k, v, grid, mask=mask, scale=scale)
