"""How the layers of a host find their grid: a probe reads it from the arguments of the forward that begins."""

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.grid import Grid
from vision_attn.hosts.host import Found, Probe
from vision_attn.parallel.models import cut_of
from vision_attn.parallel.ranks import Cut
from vision_attn.parallel.rows import LEVEL

UNSEEN = "no forward pass of the host has been seen"
OUTSIDE = "it runs outside of a forward of its model"
_GRID = "_vision_attn_grid"  # attribute of a watched module


def _capturing() -> bool:
    """Whether a CUDA graph is being captured: no value can be read then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Seen:
    """Remembers a tensor that was read, until it is freed or written to. It does not keep the tensor alive.

    PyTorch does not count writes through `.data`, NumPy or kernels of others, so on a CPU the values are compared too.
    On a GPU that would wait for all that runs there.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.reference, self.version = weakref.ref(tensor), self._version(tensor)
        self.values = tensor.detach().clone() if tensor.device.type == "cpu" else None

    def is_of(self, tensor: Tensor | None) -> bool:
        """Whether `tensor` is the one remembered, unchanged; Dynamo, which cannot call weak references, is told no."""
        if torch.compiler.is_compiling():
            return False
        if tensor is None or self.reference() is not tensor or not self.version == self._version(tensor) != -1:
            return False
        return self.values is None or torch.equal(self.values, tensor)

    @staticmethod
    def _version(tensor: Tensor) -> int:
        """The count of writes to a tensor; -1 in inference mode, which counts none, so the tensor is read each time."""
        return -1 if tensor.is_inference() else tensor._version


def backward_running() -> int:
    """Return which backward pass runs in this thread, in which checkpointing runs layers again; -1 if none does."""
    return torch._C._current_graph_task_id()


@dataclass
class AwaitingBackward:
    """What forwards knew, for layers that gradient checkpointing runs again during backward.

    Attributes:
        known: What the last forward knew, by name.
        pending: Names that were noted by forwards whose backward has not begun.
        ambiguous: Names under which two pending forwards noted different things.
    """

    known: dict[Any, Any] = field(default_factory=dict)
    pending: set[Any] = field(default_factory=set)
    ambiguous: set[Any] = field(default_factory=set)

    def remember(self, name: Any, value: Any) -> None:
        """Note what a forward knows."""
        if name not in self.pending:
            self.ambiguous.discard(name)
        elif self.known[name] != value:
            self.ambiguous.add(name)
        self.known[name] = value
        self.pending.add(name)

    def recall(self, name: Any, what: str) -> Any:
        """Return what was known to the forward that runs again.

        Args:
            name: What is asked for.
            what: The same in words, as in 'over 12 tokens'.

        Raises:
            RuntimeError: If no such forward is known, or if two knew different things.
        """
        self.pending.discard(name)
        if name in self.ambiguous:
            raise RuntimeError(
                f"two different forward passes {what} came before this backward pass, and with gradient checkpointing "
                "they cannot be told apart: run backward after each forward"
            )
        if name not in self.known:
            raise RuntimeError(
                f"gradient checkpointing runs a layer again, but no forward pass with gradients {what} has been seen"
            )
        return self.known[name]


class _Here(threading.local):
    """What one thread's forward found.

    Attributes:
        found: A grid, or the reason for none; None if no forward has begun in this thread.
        gradients: Whether gradients are on where the forward began (gradient checkpointing switches them off inside).
        backward: The backward pass in which it began.
    """

    found: Found | None = None
    gradients = False
    backward = -1


@dataclass
class GridContext:
    """The grid of the forward that runs, for all layers under the watched module.

    Eager forwards in several threads do not see each other's grid; compiled ones share one.

    Attributes:
        probe: Reads the grid from the arguments of the watched module.
        names: The names of its positional arguments.
        others: Where the tokens lie that the probe does not count: 'prefix', 'suffix', or 'none' if there are none.
        reads: Name of the argument whose values the probe reads, if any: once, and not under `torch.compile`.
        counted: Name of the argument that has as many tokens as the grid, if it is not the one that is read.
        after: Names of arguments that bring tokens after the grid.
        of_model: Whether the watched module is the whole model, so that a layer which runs outside of its forward (in
            another model that shares the layer) has no grid.
        cut: The processes over which the forward that began last cuts its tokens, None if it does not.
        fixed: A grid given by the user; what the probe finds must agree with it. If the probe would have to read
            values, `torch.compile` and the capture of a CUDA graph take it as it is, and check only the token count.
        found: What the probe found last, in any thread: a grid, or the reason for none.
        awaiting: What forwards found whose backward is still to come, by token count.
        last_read: The tensor that the probe read last, and what it found there.
        here: What the forward of this thread found.
        traced: Whether the forward that began last is compiled.
    """

    probe: Probe
    names: tuple[str, ...]
    others: str
    reads: str = ""
    counted: str = ""
    after: tuple[str, ...] = ()
    of_model: bool = False
    cut: Cut | None = None
    fixed: Grid | None = None
    found: Found = UNSEEN
    awaiting: AwaitingBackward = field(default_factory=AwaitingBackward)
    last_read: tuple[Seen, Found] | None = None
    here: _Here = field(default_factory=_Here)
    traced: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_read": None, "here": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, here=_Here())

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Read the grid of a forward that begins.

        Raises:
            TypeError: If the probe returns neither a grid nor a reason.
            RuntimeError: If values cannot be read and no fitting grid was given.
        """
        tracing = torch.compiler.is_compiling()
        inputs = by_name(self.names, args, kwargs)
        if any(isinstance(value, torch.fx.Proxy) for value in inputs.values()):
            return  # it has no sizes; a layer that is not bypassed refuses it
        values = inputs.get(self.reads) if self.reads else None
        empty = isinstance(values, Tensor) and values.is_meta
        if values is not None and (tracing or empty or (self.fixed is not None and _capturing())):
            found: Found = self._unread(inputs)
        else:
            found = self.probe(module, inputs) if values is None else self._read(module, inputs)
            each = found if isinstance(found, tuple) and found else (found,)
            if not isinstance(found, str) and not all(isinstance(one, Grid) for one in each):
                raise TypeError(
                    "a host's probe must return a Grid, a tuple with one for each sample, or a string that says why "
                    f"not, got {found!r}"
                )
            found = self._agreed(found)
            if tracing and self.fixed is not None and isinstance(found, str):
                raise RuntimeError(found)
        if self.after and isinstance(found, Grid):
            more = [inputs[name].shape[-2] for name in self.after if inputs.get(name) is not None]
            found = Grid(found.height, found.width, found.prefix, found.suffix + sum(more))
        if self.cut is not None or LEVEL in vars(module) or getattr(module, "_parallel_config", None) is not None:
            self.cut, found = cut_of(module, inputs, found, self.cut)
        self.traced = tracing
        if tracing:
            self.found = found
            return
        if found == self.found:
            found = self.found  # the same object: decisions about it are found faster
        self.found = self.here.found = found
        self.here.gradients, self.here.backward = torch.is_grad_enabled(), backward_running()

    def _unread(self, inputs: Mapping[str, Any]) -> Grid:
        """Return the grid that was given for a forward whose values cannot be read.

        Raises:
            RuntimeError: If none was given, or the forward has another number of tokens.
        """
        if self.fixed is None:
            given = "give the grid with convert(..., grid=) or use_grid()"
            if not torch.compiler.is_compiling():
                raise RuntimeError(f"{self.reads} on the meta device cannot be read: {given}")
            raise RuntimeError(
                f"torch.compile cannot read {self.reads}: {given}, or compile the blocks only (compile_repeated_blocks)"
            )
        name = self.counted or self.reads
        tokens = inputs.get(name)
        if tokens is not None and tokens.shape[-2] != self.fixed.tokens:
            raise RuntimeError(
                f"the grid given, {self.fixed.height} x {self.fixed.width}, is not that of this forward, whose "
                f"{name} has {tokens.shape[-2]} tokens"
            )
        return self.fixed

    def _agreed(self, found: Found) -> Found:
        """Return what was found, or the user's grid if nothing was; a reason if the two disagree."""
        if self.fixed is None:
            return found
        if isinstance(found, str):
            return self.fixed
        if isinstance(found, tuple):
            return f"one grid is given, and the samples have {len(found)}"
        if (found.height, found.width) == (self.fixed.height, self.fixed.width):
            return found
        return (
            f"the grid given, {self.fixed.height} x {self.fixed.width}, is not that of this forward, "
            f"{found.height} x {found.width}"
        )

    def fix(self, grid: Grid | None) -> None:
        """Set the grid that the user gives; None removes it."""
        self.fixed, self.found, self.here = grid, UNSEEN, _Here()

    def _read(self, module: nn.Module, inputs: Mapping[str, Any]) -> Found:
        """Run a probe that reads the values of a tensor, unless it read the same tensor last time."""
        tensor = inputs[self.reads]
        last = self.last_read  # another thread may replace it
        if last is not None and last[0].is_of(tensor):
            return last[1]
        found = self.probe(module, inputs)
        self.last_read = Seen(tensor), found
        return found

    def known(self, inside: bool = True) -> Found:
        """Return the grid of the forward that runs, without the tokens that `others` places, or why there is none.

        Args:
            inside: Whether the forward of the whole model is running in this thread.
        """
        if self.of_model and not inside and not torch.compiler.is_compiling():
            return OUTSIDE if self.fixed is None else self.fixed
        found = None if torch.compiler.is_compiling() or self.traced else self.here.found
        if found is None:
            found = self.found
        return self.fixed if self.fixed is not None and found == UNSEEN else found

    def locate(self, tokens: int, inside: bool = True) -> Found:
        """Return the grid in a sequence of `tokens` tokens, or the reason why it is not known.

        Args:
            tokens: N.
            inside: Whether the forward of the whole model is running in this thread. In a backward pass a layer
                outside of it was run again by gradient checkpointing, and its grid is that of an earlier forward.

        Raises:
            RuntimeError: If it was run again, and the forward to which it belongs cannot be told.
        """
        if torch.compiler.is_compiling():
            return self.placed(self.known(), tokens)
        backward = backward_running()
        placed = self.placed(self.known(inside or backward != -1), tokens)
        if backward != -1 and not inside:
            return self._recalled(tokens, placed if self.here.backward == backward else None)
        if self.here.gradients:
            self.awaiting.remember(tokens, placed)
        return placed

    def _recalled(self, tokens: int, again: Found | None) -> Found:
        """Return the grid of a layer that runs again; `again` was seen in the same backward pass, if any was."""
        if again is not None and tokens not in self.awaiting.known:
            return again
        found: Found = self.awaiting.recall(tokens, f"over {tokens} tokens")
        if again is not None and again != found:
            raise RuntimeError(
                f"gradient checkpointing runs a layer again over {tokens} tokens, and it may be over {found} or "
                f"{again}: run backward after each forward"
            )
        return found

    def placed(self, found: Found, tokens: int) -> Found:
        """Place the tokens that the probe did not count; some layers of a DiT see the grid alone."""
        if isinstance(found, str):
            return found
        if isinstance(found, tuple):
            each = [self.placed(own, tokens) for own in found]
            grids = tuple(own for own in each if isinstance(own, Grid))
            return grids if len(grids) == len(each) else next(own for own in each if not isinstance(own, Grid))
        if self.cut is not None:
            return self._cut(found, tokens)
        if tokens == found.image_tokens and self.others != "none":
            return Grid(found.height, found.width)
        others = tokens - found.tokens
        if others < 0 or (others and self.others == "none"):
            return f"{tokens} tokens do not hold {found}"
        prefix = found.prefix + (others if self.others == "prefix" else 0)
        suffix = found.suffix + (others if self.others == "suffix" else 0)
        return Grid(found.height, found.width, prefix, suffix)

    def _cut(self, found: Grid, tokens: int) -> Grid | str:
        """Return the grid of the whole sequence, of which this process holds `tokens` tokens."""
        assert self.cut is not None
        ranks = self.cut.of(found)
        if self.cut.apart and tokens == ranks.count(ranks.image) != ranks.tokens:  # a layer over the grid alone
            found = Grid(found.height, found.width)
            ranks = self.cut.of(found)
        if min(ranks.count(ranks.image, rank) for rank in range(ranks.size)) < 1:
            return f"{found} is smaller than the {ranks.size} processes are many"
        return found if ranks.tokens == tokens else f"{tokens} tokens are not this process's slice of {found}"


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
            for flags in (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                flags.pop(key, None)
