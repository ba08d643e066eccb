"""What every processor is: a frozen spec with the paper's hyperparameters, which builds a module on q, k, v."""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from vision_attn.grid import Grid


@dataclass(frozen=True)
class Layer:
    """What a spec may know of the attention layer that it builds a processor for.

    Args:
        name: Name of the layer in its model.
        num_heads: H.
        head_dim: D.
        backend: How the processor's operators run.
    """

    name: str
    num_heads: int
    head_dim: int
    backend: str = "auto"


class Processor(nn.Module, ABC):
    """Attention as one paper defines it, on projected, normalised and (where the host has one) rotated q, k, v."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend over the tokens of one sequence.

        Args:
            q: Queries `[B, N, H, D]`.
            k: Keys, like `q`.
            v: Values, like `q`.
            grid: Where the image tokens lie, `grid.tokens == N`.
            mask: Bool `[B, prefix + suffix]`, False for padding keys outside the grid.
            scale: The host's factor of the logits, `D ** -0.5` if None.

        Returns:
            `[B, N, H, D]` in the dtype of `q`.
        """


class AttnSpec(ABC):
    """A processor's hyperparameters. Subclasses are frozen dataclasses that check their fields."""

    def __str__(self) -> str:
        """Name the spec with the fields that differ from their defaults."""
        fields = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields)})"

    @abstractmethod
    def build(self, layer: Layer) -> Processor:
        """Return the processor of one layer.

        Raises:
            ValueError: If the spec does not fit the layer.
        """

    @abstractmethod
    def attended(self, grid: Grid) -> float:
        """Return the mean share of a sequence's tokens that one of its tokens attends to, 1.0 if dense.

        Raises:
            ValueError: If the spec does not fit the grid.
        """
