"""What a converted model remembers: the grid its layers attend over, and what became of each layer.

All state lives on the host's modules, without closures: copies, pickles and saved models take it along.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.grid import Grid
from vision_attn.processors.base import AttnSpec

Probe = Callable[[nn.Module, Mapping[str, Any]], Grid | str]
"""Returns the grid that a forward of a module attends over, from its arguments by name, or the reason for none.

Tokens of the sequence that the grid leaves out (the text of a DiT) are placed by the host's `others`.
"""


class Seen:
    """Remembers a tensor that was read, without keeping it alive, until it is gone or written to."""

    def __init__(self, tensor: Tensor) -> None:
        self.reference, self.version = weakref.ref(tensor), self._version(tensor)

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Seen | None":
        """Remember `tensor`, if there is one."""
        return None if tensor is None else cls(tensor)

    def is_of(self, tensor: Tensor | None) -> bool:
        """Whether `tensor` is the one remembered, unchanged."""
        return tensor is not None and self.reference() is tensor and self.version == self._version(tensor) != -1

    @staticmethod
    def _version(tensor: Tensor) -> int:
        """Writes are counted, but not to a tensor of inference mode, which is therefore read again each time."""
        return -1 if tensor.is_inference() else tensor._version


@dataclass
class AwaitingBackward:
    """The grids of training forwards by token count, for gradient checkpointing runs the layers again in backward."""

    grids: dict[int, Grid] = field(default_factory=dict)
    ambiguous: set[int] = field(default_factory=set)
    backward_ran: bool = False

    def remember(self, tokens: int, grid: Grid) -> None:
        """Note a forward."""
        if self.backward_ran:
            self.grids.clear()
            self.ambiguous.clear()
            self.backward_ran = False
        if self.grids.setdefault(tokens, grid) != grid:
            self.ambiguous.add(tokens)
        self.grids[tokens] = grid

    def recall(self, tokens: int) -> Grid | str:
        """Return the grid of the forward that runs again.

        Raises:
            RuntimeError: If forwards over two grids of this many tokens await their backward.
        """
        self.backward_ran = True
        if tokens in self.ambiguous:
            raise RuntimeError(
                f"two forward passes over different grids of {tokens} tokens came before this backward pass, and with "
                "gradient checkpointing they cannot be told apart: run backward after each forward"
            )
        return self.grids.get(tokens, f"no training forward with {tokens} tokens has been seen")


@dataclass
class GridContext:
    """The grid of the forward that runs, for all layers under the probed module.

    Attributes:
        probe: Reads the grid from the arguments of the probed module.
        names: The names of its positional arguments.
        others: Where tokens go that the probe does not count: 'prefix', 'suffix', or 'none' if there are none.
        reads: Name of the argument whose values the probe reads, if any: once, and not under `torch.compile`.
        fixed: A grid given by the user, which the probe then does not look for.
    """

    probe: Probe
    names: tuple[str, ...]
    others: str
    reads: str = ""
    fixed: Grid | None = None
    grid: Grid | None = None
    reason: str = "no forward pass of the host has been seen"
    awaiting: AwaitingBackward = field(default_factory=AwaitingBackward)
    last_read: "Seen | None" = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_read": None}

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Read the grid of a forward that begins."""
        if self.fixed is not None:
            return
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.reads:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"torch.compile cannot read {self.reads}: give the grid with convert(..., grid=) or use_grid(), or "
                    "compile the blocks only (compile_repeated_blocks)"
                )
            if self.last_read is not None and self.last_read.is_of(inputs.get(self.reads)):
                return
            self.last_read = Seen.of(inputs.get(self.reads))
        found = self.probe(module, inputs)
        if isinstance(found, Grid):
            self.grid = found
        else:
            self.grid, self.reason = None, found

    def locate(self, tokens: int, training: bool) -> Grid | str:
        """Return the grid in a sequence of `tokens` tokens, or the reason why it is not known."""
        tracing = torch.compiler.is_compiling()
        if not tracing and torch._C._current_graph_task_id() != -1:
            return self.awaiting.recall(tokens)
        base = self.grid if self.fixed is None else self.fixed
        if base is None:
            return self.reason
        others = tokens - base.tokens
        if others < 0 or (others and self.others == "none"):
            return f"{tokens} tokens do not hold {base}"
        prefix = base.prefix + (others if self.others == "prefix" else 0)
        suffix = base.suffix + (others if self.others == "suffix" else 0)
        grid = Grid(base.height, base.width, prefix, suffix)
        if training and not tracing:
            self.awaiting.remember(tokens, grid)
        return grid


@dataclass
class Shared:
    """What all layers of one converted model share."""

    min_tokens: int = 0
    bypassed: bool = False
    rerouted: int = 0
    ran: int = 0
    warned: bool = False


@dataclass
class LayerState:
    """What a rerouted layer knows.

    Attributes:
        name: Name of the module in its model.
        num_heads: H.
        spec: What its processor was built from.
        context: Where it finds its grid.
        shared: State of the whole conversion.
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
    replaced: dict[str, Any] = field(default_factory=dict)
    grid: Grid | None = None
    status: str = "not run yet"
    padding: Any = None  # the last mask that was checked, see key_padding.py

    def note(self, grid: Grid | None, status: str, *, expected: bool = False) -> None:
        """Record a call, unless it is being traced. An `expected` one of the host's own attention is no failure."""
        if torch.compiler.is_compiling():
            return
        self.grid, self.status = grid, status
        self.shared.ran += 1
        self.shared.rerouted += status == "rerouted" or expected

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "padding": None}
