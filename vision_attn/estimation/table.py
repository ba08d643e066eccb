"""What `estimate` returns: a row for each layer, and shares of the whole model; prints as a table."""

from dataclasses import dataclass

from vision_attn.conversion.layer_table import aligned
from vision_attn.grid import Grid
from vision_attn.processors.base import AttnSpec


@dataclass(frozen=True)
class LayerEstimate:
    """One layer.

    Attributes:
        name: Of the layer.
        spec: Its processor, `Softmax()` if it is not converted.
        grid: Its tokens.
        dense_flops: Operations of dense attention over one sequence, without projections.
        flops: Operations that the processor needs.
        attended: Mean share of the tokens that one token attends to.
        bytes: Of q, k, v and o.
        dense_seconds: Estimated time of dense attention.
        seconds: Estimated time of the processor.
    """

    name: str
    spec: AttnSpec
    grid: Grid
    dense_flops: float
    flops: float
    attended: float
    bytes: int
    dense_seconds: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a conversion would need at one size; prints as a table.

    Attributes:
        layers: All attention layers over a grid.
        other_flops: Operations of the linear and convolution layers of the model, without small ones.
        pays_from: The smallest (height, width) in pixels, of the asked shape, from which on the conversion is faster;
            None if it never is.
    """

    layers: list[LayerEstimate]
    other_flops: float
    pays_from: tuple[int, int] | None

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence."""
        return max(row.grid.tokens for row in self.layers)

    @property
    def attention_share(self) -> float:
        """Share of attention in the operations of the dense model."""
        dense = sum(row.dense_flops for row in self.layers)
        return dense / (dense + self.other_flops)

    @property
    def converted_share(self) -> float:
        """Operations of the converted model, as a share of the dense one's."""
        dense = sum(row.dense_flops for row in self.layers) + self.other_flops
        return (sum(row.flops for row in self.layers) + self.other_flops) / dense

    def __str__(self) -> str:
        header = ("layer", "processor", "grid", "tokens", "attended", "GFLOP dense", "GFLOP", "MB")
        cells = [header]
        cells += [
            (
                row.name,
                str(row.spec),
                f"{row.grid.height} x {row.grid.width}",
                str(row.grid.tokens),
                f"{row.attended:.1%}",
                f"{row.dense_flops / 1e9:.3g}",
                f"{row.flops / 1e9:.3g}",
                f"{row.bytes / 1e6:.3g}",
            )
            for row in self.layers
        ]
        pays = "never faster" if self.pays_from is None else "faster from {} x {} pixels on".format(*self.pays_from)
        return (
            f"{aligned(cells)}\nattention is {self.attention_share:.1%} of the model's operations; converted, the "
            f"model needs {self.converted_share:.1%} of them; the conversion is {pays}"
        )
