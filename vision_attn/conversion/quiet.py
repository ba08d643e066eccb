"""A layer that left its attention to the host runs the host's code unwatched, as long as its calls look the same.

Layers that stay dense (`min_tokens`, `only_if_faster`) and those of `Softmax` change nothing. To open doors around each
of their calls took a twentieth of a step's host time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.conversion.doors import describe
from vision_attn.conversion.grids import backward_running
from vision_attn.conversion.state import LayerState
from vision_attn.grid import Grid
from vision_attn.processors.base import CHILD


@dataclass(frozen=True)
class Left:
    """What became of a call that the host answered.

    Attributes:
        grid: The grid in it, None if it is not known.
        status: Why the host answered.
        expected: Whether that is no failure.
    """

    grid: Grid | None
    status: str
    expected: bool


@dataclass(frozen=True)
class Quiet:
    """A forward in which the host answered all calls.

    Attributes:
        found: The grid that the model's forward had.
        stock: diffusers' processor of the layer, None if it has none.
        backend: Its attention backend.
        shapes: Those of the layer's tensors.
        left: What became of its calls.
    """

    found: Any
    stock: Any
    backend: Any
    shapes: list[torch.Size]
    left: Left


def remembered(
    module: nn.Module, state: LayerState, stock: Any, left: Left, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Quiet | None:
    """Return what tells forwards that look like the one which ended; None if the next one must be watched again.

    Args:
        module: The layer.
        state: Its state.
        stock: diffusers' processor of the layer, None if it has none.
        left: What became of its calls.
        args: Arguments of the layer.
        kwargs: Named arguments of the layer.
    """
    if getattr(module._modules[CHILD], "wants", False) or not _is_usual(state, stock, kwargs):
        return None
    backend = getattr(stock, "_attention_backend", None)
    return Quiet(state.context.known(state.shared.running), stock, backend, _shapes(args, kwargs), left)


def is_quiet(state: LayerState, stock: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the forward that begins looks like the last one, in which the host answered; see `remembered`."""
    quiet = state.quiet
    return (
        quiet is not None
        and quiet.stock is stock
        and quiet.found is state.context.known(state.shared.running)
        and quiet.backend is getattr(stock, "_attention_backend", None)
        and _is_usual(state, stock, kwargs)
        and quiet.shapes == _shapes(args, kwargs)
    )


def run_quietly(
    state: LayerState, stock: Any, run: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Run a layer's own code, and record that the host answered."""
    left: Left = state.quiet.left
    state.note(left.grid, left.status, expected=left.expected)
    described = describe(stock)
    try:
        return run(*args, **kwargs)
    finally:
        if described is not None:
            described.pop("__call__", None)


def _is_usual(state: LayerState, stock: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether nothing but shapes decides what becomes of a call."""
    context = state.context
    return (
        context.cut is None
        and not context.here.gradients
        and backward_running() == -1
        and kwargs.get("attention_mask") is None
        and getattr(stock, "_parallel_config", None) is None
    )


def _shapes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Size]:
    return [t.shape for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
