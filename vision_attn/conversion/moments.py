"""What processors that ask for it are told of the forward that runs: see `processors.base.Moment`."""

from typing import Any

import torch
from torch import Tensor

from vision_attn.conversion.grids import backward_running
from vision_attn.conversion.state import LayerState
from vision_attn.processors.base import Moment


def rotary_of(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return the cosine and sine `[N, D]` among a layer's arguments, as FLUX gives them."""
    given = kwargs.get("image_rotary_emb")
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        return None
    cos, sin = given
    real = all(isinstance(t, Tensor) and t.dim() == 2 and t.is_floating_point() for t in given)
    return (cos, sin) if real else None


def moment_of(state: LayerState, rotary: tuple[Tensor, Tensor] | None) -> Moment:
    """Return what is known about the forward that begins; the block's input is handed over only once."""
    shared, block_input = state.shared, state.take_over()
    if torch.compiler.is_compiling() or shared.traced:
        known = shared.moment
    elif backward_running() != -1 and not shared.running:
        known = shared.awaiting.recall("moment", "at different moments of the denoising, or of different sizes,")
    else:
        known = shared.here.moment or shared.moment
    return Moment(*known, block_input, rotary, None if block_input is None else shared.random)
