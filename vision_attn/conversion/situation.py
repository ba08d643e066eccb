"""What is known when a converted layer begins its forward: whether it is rerouted, and the moment of the denoising."""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from vision_attn.conversion.state import LayerState
from vision_attn.grid import Grid
from vision_attn.processors.base import Moment

_log = logging.getLogger(__name__)


def runs_dense(state: LayerState, kwargs: dict[str, Any]) -> bool:
    """Whether the forward that begins is known to run the host's own attention."""
    if state.mask_means_dense and kwargs.get("attention_mask") is not None:
        return True
    found = state.context.known()
    return isinstance(found, str) or found.image_tokens < max(state.shared.min_tokens, state.break_even)


def moment_of(state: LayerState) -> Moment:
    """Return what is known of the forward that begins; the block's input is handed over once."""
    shared, found = state.shared, state.context.known()
    block_input, state.block_input = state.block_input, None
    downsample = 1
    if shared.finest is not None and not isinstance(found, str):
        downsample = math.ceil(math.sqrt(shared.finest // found.image_tokens))
    generator = None if block_input is None else shared.random(block_input.device)
    return Moment(shared.progress, downsample, block_input, generator)


def locate(state: LayerState, query: Tensor, key: Tensor, attn_mask: Tensor | None) -> Grid | None:
    """Return the grid of a call that is to be rerouted; None lets it through."""
    if query.dim() != 4 or query.shape[-2] != key.shape[-2]:
        return None  # cross-attention
    found = state.context.locate(query.shape[-2])
    if isinstance(found, str):
        state.note(None, f"dense: {found}")
    elif attn_mask is not None and state.mask_means_dense:
        status = "dense: the attention mask says that the grid lies elsewhere in each sample"
        state.note(found, status, expected=True)
        if not torch.compiler.is_compiling() and not state.shared.warned:
            state.shared.warned = True
            _log.warning("%s runs %s", state.name, status)
    elif found.image_tokens < state.shared.min_tokens:
        few = f"dense: {found.image_tokens} tokens are below min_tokens={state.shared.min_tokens}"
        state.note(found, few, expected=True)
    elif found.image_tokens < state.break_even:
        least = "never faster" if state.break_even == math.inf else f"faster from {state.break_even:.0f} tokens on"
        state.note(found, f"dense: {state.spec} is {least}, and there are {found.image_tokens}", expected=True)
    else:
        return found
    return None
