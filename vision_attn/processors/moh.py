"""Mixture of heads: each token takes its best heads of another processor, and some heads always.

    o_ih = g_ih a_ih,    a the outputs of the other processor, head by head
    g_ih = 1 for the first `shared` heads, and for those of the others where |q_ih| is among the largest; else 0

The router has no parameters: a head's score is the length of its query, which a rotation does not change. The gate is
1 or 0, so a head that is taken counts as before, and the gradient of the gate goes straight through to
softmax_h(|q_ih| / std_h |q_ih|) over the heads that are not shared. This is how the paper continues the training of a
dense model, LLaMA3. Models that it trains from scratch have a learned router, and weights of the heads instead.

Training should add `balance`, the paper's loss of the load: sum_h f_h P_h, where f_h is the share of tokens that take a
head and P_h the mean of its softmax. Tokens outside the grid take their best heads too.

Paper: 'MoH: Multi-Head Attention as Mixture-of-Head Attention' - https://arxiv.org/abs/2410.11842
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vision_attn._checks import check_number
from vision_attn.grid import Grid
from vision_attn.processors.base import AttnSpec, Layer, Moment, Processor, register
from vision_attn.processors.clear import Clear
from vision_attn.processors.schedule import Schedule
from vision_attn.processors.softmax import Softmax

_DENSE = Softmax()


@register(
    tests={"moh": dict(share=0.5, shared=0), "moh-clear": dict(spec=Clear(radius=2), share=0.5, shared=0)},
    bench={"moh": {}},
)
@dataclass(frozen=True)
class MoH(AttnSpec):
    """A mixture of the heads of another processor. It starts from the dense model; a short training makes it good.

    All heads are computed, and those that a token does not take are left out of its output: it saves no time.

    Args:
        spec: The other processor; the host's own attention by default. In a `Schedule`, mix the stages.
        share: Share of the heads that a token takes, with those that are shared.
        shared: Share of the heads that every token takes: the first ones. Both are rounded to whole heads.
    """

    spec: AttnSpec = _DENSE
    share: float = 0.75
    shared: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.spec, AttnSpec) or isinstance(self.spec, (Schedule, type(self))):
            raise TypeError(f"spec must be the spec of a processor, and neither a Schedule nor MoH, got {self.spec!r}")
        for name in ("share", "shared"):
            check_number(name, getattr(self, name), least=0)
        if not self.shared <= self.share <= 1 or not self.share:
            raise ValueError(f"0 <= shared <= share <= 1 must hold, got shared {self.shared} and share {self.share}")

    def heads(self, num_heads: int) -> tuple[int, int]:
        """Return how many heads are shared, and how many of the others a token takes."""
        shared = int(num_heads * self.shared + 0.5)
        return shared, max(int(num_heads * self.share + 0.5) - shared, 0 if shared else 1)

    def build(self, layer: Layer) -> "MoHAttention":
        """Return the processor of one layer."""
        return MoHAttention(self, layer)

    def attended(self, grid: Grid) -> float:
        """Return the mean share of tokens that one token attends to on a head that it takes."""
        return self.spec.attended(grid)

    def tones(self, grid: Grid, row: int, column: int) -> Tensor | None:
        """Return the picture of the other processor."""
        return self.spec.tones(grid, row, column)

    def flops(self, grid: Grid, layer: Layer) -> float:
        """Return the operations of the other processor on all heads, and of the gates."""
        return self.spec.flops(grid, layer) + 3 * grid.tokens * layer.num_heads * layer.head_dim

    def products(self, grid: Grid, layer: Layer) -> float:
        """Return those of the other processor."""
        return self.spec.products(grid, layer)

    @property
    def passes(self) -> float:
        """Lengths read q, and the gates read and write o."""
        return self.spec.passes + 0.75

    @property
    def calls(self) -> float:
        """Those of the other processor, and of the gates."""
        return self.spec.calls + 14.0


class MoHAttention(Processor):
    """Another processor, and gates of its heads.

    Attributes:
        inner: The other processor.
        shared: How many heads, the first ones, every token takes.
        routed: How many of the others a token takes.
    """

    def __init__(self, spec: MoH, layer: Layer) -> None:
        super().__init__()
        self.inner = spec.spec.build(layer)
        self.shared, self.routed = spec.heads(layer.num_heads)
        self.wants, self.counts_calls = self.inner.wants, self.inner.counts_calls

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid,
        mask: Tensor | None = None,
        scale: float | None = None,
        *moment: Moment,
    ) -> Tensor:
        """Attend as the other processor, and take heads: see `Processor.forward`."""
        return self._take(q, self.inner(q, k, v, grid, mask, scale, *moment))

    def biased(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, bias: Tensor, scale: float | None = None) -> Tensor:
        """Attend as the other processor with a bias, and take heads: see `Processor.biased`."""
        return self._take(q, self.inner.biased(q, k, v, grid, bias, scale))

    def residuals(self) -> Mapping[str, nn.Module]:
        """Return those of the other processor."""
        return self.inner.residuals()

    def add_residuals(self, x: Tensor, roles: Sequence[str]) -> Sequence[Tensor] | None:
        """Return those of the other processor."""
        return self.inner.add_residuals(x, roles)

    def balance(self, q: Tensor) -> Tensor:
        """Return the paper's loss of the load, sum_h f_h P_h; it is least where all heads are taken equally often.

        Args:
            q: The queries `[B, N, H, D]` of a call.
        """
        taken, p = self._route(q)
        return (taken.mean((0, 1)) * p.mean((0, 1))).sum()

    def _route(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of the heads that are not shared a token takes, 1 or 0, and their softmax, in float32."""
        wide = torch.promote_types(q.dtype, torch.float32)
        length = torch.linalg.vector_norm(q[:, :, self.shared :], dim=-1, dtype=wide)
        from_mean = length - length.mean(-1, keepdim=True)  # no softmax sees the mean, but its gradient would round
        p = (from_mean / from_mean.square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()).softmax(-1)
        best = length.topk(self.routed, -1).indices
        return torch.zeros_like(p).scatter(-1, best, 1.0), p

    def _take(self, q: Tensor, o: Tensor) -> Tensor:
        """Zero the heads that a token does not take."""
        others = q.shape[2] - self.shared
        if self.routed >= others:
            return o
        taken, p = self._route(q)
        gate = (taken + (p - p.detach())).to(o.dtype)[..., None]
        return torch.cat([o[:, :, : self.shared], o[:, :, self.shared :] * gate], 2)
