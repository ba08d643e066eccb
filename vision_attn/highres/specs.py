"""The processors of the levels of `generate_highres`."""

import math
from dataclasses import dataclass
from typing import Any

from vision_attn.grid import Grid
from vision_attn.processors.base import AttnSpec
from vision_attn.processors.clear import Clear
from vision_attn.processors.schedule import Schedule


@dataclass(frozen=True)
class Proportional(Clear):
    """`Clear` whose native tokens are those of the first level: its image and the text at hand.

    Args:
        first: Image tokens of the first level.
    """

    first: int = 0

    def native(self, grid: Grid) -> int:
        """Return the tokens of a sequence at the first level."""
        return self.first + grid.prefix + grid.suffix


def cell_of(attn: Any) -> int:
    """Return the tokens that the sides of every level must be multiples of."""
    given = [attn] if isinstance(attn, AttnSpec) else attn or []
    specs = [s for spec in given for s in ([s for _, s in spec.stages] if isinstance(spec, Schedule) else [spec])]
    return math.lcm(*(spec.pool for spec in specs if isinstance(spec, Clear)))


def specs_of(attn: Any, levels: int) -> list[AttnSpec | None]:
    """Return the processor of each level."""
    if attn is None or isinstance(attn, AttnSpec):
        return [None, *[attn] * (levels - 1)]
    specs = list(attn)
    if len(specs) != levels or not all(spec is None or isinstance(spec, AttnSpec) for spec in specs):
        raise ValueError(f"attn must be a spec, or a list of {levels} specs or None, one for each level, got {attn!r}")
    return specs
