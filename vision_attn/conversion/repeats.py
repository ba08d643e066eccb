"""A call of attention that looks like an earlier one of its layer repeats the launches of that one at once.

How a call looks is all that decides about it: the grid of the forward, the scale, and the layouts of its tensors as the
host has them. To find the grid in a call and to turn its tensors took the host as long as the launches.
"""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vision_attn.conversion.grids import backward_running
from vision_attn.grid import Grid
from vision_attn.kernels.tapes import Tape, can_repeat, planned
from vision_attn.processors.base import Processor

if TYPE_CHECKING:
    from vision_attn.conversion.answers import Answers

_MOST = 64  # looks that a layer remembers


class Known(NamedTuple):
    """What an earlier call came to.

    Attributes:
        tape: Its launches.
        grid: The grid that was found in it.
        about: The processor that answered it, as it was.
        plans: How often launches had been planned anew.
    """

    tape: Tape
    grid: Grid
    about: Any
    plans: int


def look_of(call: "Answers", tensors: Sequence[Tensor], scale: float | None) -> Any:
    """Return how a call without a mask looks; None if more decides about it.

    Args:
        call: The answers of the layer's forward.
        tensors: Queries, keys and values `[B, H, N, D]` as the host has them.
        scale: The factor of the logits.
    """
    (q, k, v), state = tensors, call.state
    context, projections = state.context, call.projections
    if (
        not can_repeat(q)  # first: code that is compiled goes no further
        or call.backend is not None
        or call.moment is not None
        or call.parallel is not None
        or call.processor.repeats_itself
        or context.cut is not None
        or not type(q) is type(k) is type(v) is Tensor
        or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16
        or context.here.gradients
        or state.shared.traced
        or backward_running() != -1
        or torch.is_autocast_enabled(q.device.type)
        or (projections is not None and projections.missing())
    ):
        return None
    found = context.known(state.shared.running)
    places = q.get_device(), k.get_device(), v.get_device(), q.dtype, k.dtype, v.dtype
    layouts = q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride()
    return threading.get_ident(), found, scale, places, layouts


def repeated(call: "Answers", look: Any, tensors: Sequence[Tensor]) -> tuple[Grid, Tensor] | None:
    """Return the grid and the output `[B, N, H, D]` of a call that looks like a known one; None if none is known."""
    known: Known | None = call.state.looks.get(look)
    if known is None or known.plans != planned() or known.about != _about(call.processor) or not known.tape.valid():
        return None
    output: Tensor = known.tape.repeat(tensors)
    return known.grid, output


def remember(call: "Answers", look: Any, args: tuple[Any, ...]) -> None:
    """Remember the launches of a call that was answered, if they are recorded by now.

    Args:
        call: The answers of the layer's forward.
        look: How the call looked.
        args: The arguments that its processor was given; the fourth is the grid.
    """
    looks = call.state.looks
    tape = call.state.tapes.of(args, call.processor)
    if tape is not None:
        if len(looks) >= _MOST:
            looks.clear()
        looks[look] = Known(tape, args[3], _about(call.processor), planned())


def _about(processor: Processor) -> Any:
    return processor, processor.training, processor.changes
