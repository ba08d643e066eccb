"""What a rerouted layer remembers, and what all layers of one converted model share.

All state lives on the host's modules, without closures: copies, pickles and saved models take it along.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from vision_attn.conversion.grids import GridContext
from vision_attn.grid import Grid
from vision_attn.processors.base import AttnSpec


@dataclass
class Shared:
    """What all layers of one converted model share.

    Attributes:
        min_tokens: Layers with fewer grid tokens run their own attention.
        bypassed: Whether all layers do.
        rerouted: Calls answered by processors in the forward that runs, or expected not to be.
        ran: Calls over a grid in that forward.
        warned: Whether the user was told of dense layers.
        thresholds: Where the schedules of the layers change, as shares of the denoising.
        progress: The last threshold that the forward that runs has passed, None if it is not known.
        finest: Tokens of the host's finest grid, None if all grids are equal.
        generator: Random numbers of all layers.
    """

    min_tokens: int = 0
    bypassed: bool = False
    rerouted: int = 0
    ran: int = 0
    warned: bool = False
    thresholds: tuple[float, ...] = ()
    progress: float | None = None
    finest: int | None = None
    generator: torch.Generator | None = None

    def random(self, device: torch.device) -> torch.Generator:
        """Return the generator that all layers share, which starts as a copy of PyTorch's own."""
        if self.generator is None or self.generator.device != device:
            default = (
                torch.get_rng_state() if device.type == "cpu" else getattr(torch, device.type).get_rng_state(device)
            )
            self.generator = torch.Generator(device)
            self.generator.set_state(default)
        return self.generator

    def __getstate__(self) -> dict[str, Any]:
        # a copy made inside bypassed() is not bypassed for ever
        return {**self.__dict__, "bypassed": False, "generator": None}


@dataclass
class LayerState:
    """What a rerouted layer knows.

    Attributes:
        name: Name of the module in its model.
        num_heads: H.
        spec: What its processor was built from.
        context: Where it finds its grid.
        shared: State of the whole conversion.
        break_even: Grids of fewer tokens run the host's own attention, for it is faster there.
        mask_means_dense: Whether a mask says that the grid is not at one place in the batch.
        replaced: Attributes of the module to put back on revert.
        grid: Grid of the last call over the grid.
        status: What became of that call.
    """

    name: str
    num_heads: int
    spec: AttnSpec
    context: GridContext
    shared: Shared
    mask_means_dense: bool = False
    break_even: float = 0
    replaced: dict[str, Any] = field(default_factory=dict)
    grid: Grid | None = None
    status: str = "not run yet"
    padding: Any = None  # the last mask that was checked, see key_padding.py
    block_input: torch.Tensor | None = None  # from the beginning of a block until its attention

    def note(self, grid: Grid | None, status: str, *, expected: bool = False) -> None:
        """Record a call, unless it is being traced. An `expected` one of the host's own attention is no failure."""
        if torch.compiler.is_compiling():
            return
        self.grid, self.status = grid, status
        self.shared.ran += 1
        self.shared.rerouted += status == "rerouted" or expected

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "padding": None, "block_input": None}
