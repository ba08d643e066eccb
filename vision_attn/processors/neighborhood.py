"""Neighborhood attention: each token attends to the `kernel_size`^2 tokens nearest to it.

    o_i = softmax_j(scale * q_i . k_j) v_j,    j in neighborhood(i) + tokens outside the grid

Near a border the neighborhood is moved inside the grid, so every grid token sees exactly `kernel_size`^2 grid tokens;
with `dilation` d they lie d tokens apart. Tokens outside the grid (text, class, registers, reference images) are seen
by everything and see everything.

Papers: 'Neighborhood Attention Transformer' - https://arxiv.org/abs/2204.07143,
'Dilated Neighborhood Attention Transformer' - https://arxiv.org/abs/2209.15001
"""

from dataclasses import dataclass

from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import PerAxis, per_axis
from vision_attn.kernels.eight_bits import EIGHT_BIT_CALLS, EIGHT_BIT_PASSES
from vision_attn.kernels.local import Window, biased_attention, local_attention
from vision_attn.processors.base import AttnSpec, Layer, Processor, register


@register(
    tests={"neighborhood": dict(kernel_size=3)},
    demo=[dict(kernel_size=13)],
    bench={"neighborhood k33": dict(kernel_size=33), "neighborhood k13": dict(kernel_size=13)},
    draws_untrained=True,
)
@dataclass(frozen=True)
class Neighborhood(AttnSpec):
    """A window of `kernel_size` x `kernel_size` tokens, `dilation` apart, kept inside the grid.

    It has no parameters. A pretrained model keeps its layout and loses long-range detail until it is fine-tuned.

    Args:
        kernel_size: Window side in tokens, odd or even, at least 2; or a (vertical, horizontal) pair.
        dilation: Distance between neighbors in tokens, or a pair.
        precision: 'int8' or 'fp8' for products in 8 bits, in inference alone; None for those of the model's dtype.
    """

    kernel_size: PerAxis = 7
    dilation: PerAxis = 1
    precision: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("kernel_size", 2), ("dilation", 1)):
            pair = per_axis(getattr(self, name), name, least)
            object.__setattr__(self, name, pair[0] if pair[0] == pair[1] else pair)
        _ = self.window  # which checks the precision

    @property
    def window(self) -> Window:
        """The operator's window."""
        return Window(kernel_size=self.kernel_size, dilation=self.dilation, precision=self.precision)

    def build(self, layer: Layer) -> "NeighborhoodAttention":
        """Return the processor of one layer."""
        return NeighborhoodAttention(self, layer)

    def attended(self, grid: Grid) -> float:
        """Return the mean share of tokens that one token attends to."""
        self.window.check(grid)
        return self.window.share(grid)

    @property
    def passes(self) -> float:
        """As those of `Clear`."""
        return EIGHT_BIT_PASSES if self.precision else 1.0

    @property
    def calls(self) -> float:
        """One kernel, and what quantises in 8 bits."""
        return EIGHT_BIT_CALLS if self.precision else 3.0


class NeighborhoodAttention(Processor):
    """`local_attention` over a square window."""

    heads_alike = True

    def __init__(self, spec: Neighborhood, layer: Layer) -> None:
        super().__init__()
        self.spec, self.backend = spec, layer.backend

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend locally: see `Processor.forward`.

        Raises:
            ValueError: If `kernel_size * dilation` is above a side of the grid.
        """
        return local_attention(q, k, v, grid, self.spec.window, mask=mask, scale=scale, backend=self.backend)

    def biased(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, bias: Tensor, scale: float | None = None) -> Tensor:
        """Attend locally, with a bias for each pair of tokens: see `Processor.biased`."""
        return biased_attention(q, k, v, grid, self.spec.window, bias, scale=scale)
