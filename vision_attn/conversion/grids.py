"""How the layers of a host find their grid: a probe reads it from the arguments of the forward that begins."""

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.grid import Grid
from vision_attn.hosts.host import Probe

UNSEEN = "no forward pass of the host has been seen"
_GRID = "_vision_attn_grid"  # attribute of a watched module


def _capturing() -> bool:
    """Whether a CUDA graph is being captured: no value can be read then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Seen:
    """Remembers a tensor that was read, until it is freed or written to. It does not keep the tensor alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.reference, self.version = weakref.ref(tensor), self._version(tensor)

    def is_of(self, tensor: Tensor | None) -> bool:
        """Whether `tensor` is the one remembered, unchanged."""
        return tensor is not None and self.reference() is tensor and self.version == self._version(tensor) != -1

    @staticmethod
    def _version(tensor: Tensor) -> int:
        """The count of writes to a tensor; -1 in inference mode, which counts none, so the tensor is read each time."""
        return -1 if tensor.is_inference() else tensor._version


@dataclass
class AwaitingBackward:
    """What forwards found, by token count: gradient checkpointing runs their layers again during backward.

    Attributes:
        found: What the last forward over a number of tokens found.
        pending: Token counts of forwards whose backward has not begun.
        ambiguous: Token counts over which two pending forwards found different grids.
    """

    found: dict[int, Grid | str] = field(default_factory=dict)
    pending: set[int] = field(default_factory=set)
    ambiguous: set[int] = field(default_factory=set)

    def remember(self, tokens: int, found: Grid | str) -> None:
        """Note what a forward found."""
        if self.found.get(tokens, found) != found:
            (self.ambiguous.add if tokens in self.pending else self.ambiguous.discard)(tokens)
        self.found[tokens] = found
        self.pending.add(tokens)

    def recall(self, tokens: int) -> Grid | str:
        """Return what was found by the forward that runs again.

        Raises:
            RuntimeError: If no such forward is known, or if two over different grids have this many tokens.
        """
        self.pending.discard(tokens)
        if tokens in self.ambiguous:
            raise RuntimeError(
                f"two forward passes over different grids of {tokens} tokens came before this backward pass, and with "
                "gradient checkpointing they cannot be told apart: run backward after each forward"
            )
        if tokens not in self.found:
            raise RuntimeError(
                f"gradient checkpointing runs a layer again on {tokens} tokens, but no forward pass with gradients on "
                "that many tokens has been seen"
            )
        return self.found[tokens]


@dataclass
class GridContext:
    """The grid of the forward that runs, for all layers under the watched module.

    Eager forwards in several threads do not see each other's grid; compiled ones share one.

    Attributes:
        probe: Reads the grid from the arguments of the watched module.
        names: The names of its positional arguments.
        others: Where the tokens lie that the probe does not count: 'prefix', 'suffix', or 'none' if there are none.
        reads: Name of the argument whose values the probe reads, if any: once, and not under `torch.compile`.
        fixed: A grid given by the user; what the probe finds must agree with it. If the probe would have to read
            values, `torch.compile` and the capture of a CUDA graph take it as it is, and check only the token count.
        found: What the probe found last: a grid, or the reason for none.
        gradients: Whether gradients are on where the forward begins (gradient checkpointing switches them off inside).
        awaiting: What forwards found whose backward is still to come.
        last_read: The tensor that the probe read last, and what it found there.
        thread: `found` of each thread.
    """

    probe: Probe
    names: tuple[str, ...]
    others: str
    reads: str = ""
    fixed: Grid | None = None
    found: Grid | str = UNSEEN
    gradients: bool = False
    awaiting: AwaitingBackward = field(default_factory=AwaitingBackward)
    last_read: tuple[Seen, Grid | str] | None = None
    thread: threading.local = field(default_factory=threading.local)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_read": None, "thread": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, thread=threading.local())

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Read the grid of a forward that begins.

        Raises:
            TypeError: If the probe returns neither a grid nor a reason.
            RuntimeError: If values cannot be read and no fitting grid was given.
        """
        tracing = torch.compiler.is_compiling()
        if not tracing:
            self.gradients = torch.is_grad_enabled()
        inputs = by_name(self.names, args, kwargs)
        if self.reads and (tracing or (self.fixed is not None and _capturing())):
            self.found = self._unread(inputs)
            if not tracing:
                self.thread.found = self.found
            return
        found = self._read(module, inputs) if self.reads else self.probe(module, inputs)
        if not isinstance(found, (Grid, str)):
            raise TypeError(f"a host's probe must return a Grid, or a string that says why not, got {found!r}")
        self.found = self._agreed(found)
        if tracing and self.fixed is not None and isinstance(self.found, str):
            raise RuntimeError(self.found)
        if not tracing:
            self.thread.found = self.found

    def _unread(self, inputs: Mapping[str, Any]) -> Grid:
        """Return the grid that was given for a forward whose values cannot be read.

        Raises:
            RuntimeError: If none was given, or the forward has another number of tokens.
        """
        if self.fixed is None:
            raise RuntimeError(
                f"torch.compile cannot read {self.reads}: give the grid with convert(..., grid=) or use_grid(), or "
                "compile the blocks only (compile_repeated_blocks)"
            )
        positions = inputs.get(self.reads)
        if positions is not None and positions.shape[-2] != self.fixed.tokens:
            raise RuntimeError(
                f"the grid given, {self.fixed.height} x {self.fixed.width}, is not that of this forward, whose "
                f"{self.reads} has {positions.shape[-2]} tokens"
            )
        return self.fixed

    def _agreed(self, found: Grid | str) -> Grid | str:
        """Return what was found, or the user's grid if nothing was; a reason if the two disagree."""
        if self.fixed is None:
            return found
        if isinstance(found, str):
            return self.fixed
        if (found.height, found.width) == (self.fixed.height, self.fixed.width):
            return found
        return (
            f"the grid given, {self.fixed.height} x {self.fixed.width}, is not that of this forward, "
            f"{found.height} x {found.width}"
        )

    def fix(self, grid: Grid | None) -> None:
        """Set the grid that the user gives; None removes it."""
        self.fixed, self.found = grid, UNSEEN
        self.thread = threading.local()

    def _read(self, module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
        """Run a probe that reads the values of a tensor, unless it read the same tensor last time."""
        tensor = inputs.get(self.reads)
        if self.last_read is not None and self.last_read[0].is_of(tensor):
            return self.last_read[1]
        found = self.probe(module, inputs)
        self.last_read = None if tensor is None else (Seen(tensor), found)
        return found

    def known(self) -> Grid | str:
        """Return the grid of the forward that runs, without the tokens that `others` places, or why there is none."""
        found = self.found if torch.compiler.is_compiling() else getattr(self.thread, "found", self.found)
        return self.fixed if self.fixed is not None and found == UNSEEN else found

    def locate(self, tokens: int) -> Grid | str:
        """Return the grid in a sequence of `tokens` tokens, or the reason why it is not known."""
        if torch.compiler.is_compiling():
            return self._place(self.known(), tokens)
        if torch._C._current_graph_task_id() != -1:
            return self.awaiting.recall(tokens)
        placed = self._place(self.known(), tokens)
        if self.gradients:
            self.awaiting.remember(tokens, placed)
        return placed

    def _place(self, found: Grid | str, tokens: int) -> Grid | str:
        """Place the tokens that the probe did not count."""
        if isinstance(found, str):
            return found
        others = tokens - found.tokens
        if others < 0 or (others and self.others == "none"):
            return f"{tokens} tokens do not hold {found}"
        prefix = found.prefix + (others if self.others == "prefix" else 0)
        suffix = found.suffix + (others if self.others == "suffix" else 0)
        return Grid(found.height, found.width, prefix, suffix)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward by their names."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def watch(module: nn.Module, context: GridContext) -> None:
    """Let `context` see the grid of every forward of `module`."""
    setattr(module, _GRID, context)
    module.register_forward_pre_hook(_see_grid, with_kwargs=True)


def unwatch(module: nn.Module) -> None:
    """Undo `watch`, if the module is watched."""
    remove_hooks(module, _see_grid)
    vars(module).pop(_GRID, None)


def _see_grid(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    context: GridContext = module.__dict__[_GRID]
    context.see(module, args, kwargs)


def remove_hooks(module: nn.Module, function: Callable[..., Any]) -> None:
    """Remove a forward hook by its function: unlike handles, this works on a copy of the module too."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
            for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                flags.pop(key, None)
