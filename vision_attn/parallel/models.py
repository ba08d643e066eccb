"""How a model's tokens are cut over processes: by diffusers' plan of its class, or by `enable`."""

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vision_attn.grid import Grid
from vision_attn.hosts.host import Found
from vision_attn.parallel.ranks import Cut

_TEXT = "encoder_hidden_states"  # argument of the models with a plan; its text comes before the image


def cut_of(model: nn.Module, inputs: Mapping[str, Any], found: Found, last: Cut | None) -> tuple[Cut | None, Found]:
    """Return over which processes the forward that begins cuts its tokens, and the grid of the whole sequence.

    Args:
        model: The model, whose arguments are still whole.
        inputs: Its arguments by name.
        found: The grid that its probe found, without the text.
        last: The cut of the forward before, which is kept if it is the same.

    Returns:
        None if nothing is cut; the grid with its text, or the reason why it cannot be told.
    """
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if config is None:
        return None, found
    group = config._flattened_mesh.get_group()
    cut = last if last is not None and last.group == group.group_name else Cut.over(group)
    if isinstance(found, str):
        return cut, found
    if isinstance(found, tuple):
        return cut, "each sample has its own grid, and their tokens are cut over processes"
    if getattr(type(model), "_cp_plan", None) is None or not isinstance(inputs.get(_TEXT), Tensor):
        return cut, f"how a {type(model).__name__} cuts its tokens over processes is not known"
    return cut, Grid(found.height, found.width, prefix=inputs[_TEXT].shape[1], suffix=found.suffix)


def stock_attention(
    processor: Any, config: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """Attend over processes as diffusers does, with its own exchange of heads or keys.

    Args:
        processor: diffusers' processor of the layer.
        config: The configuration of its parallelism.
        query: Queries of the own slice `[B, H, tokens, D]`.
        key: Keys, like `query`.
        value: Values, like `query`.
        attn_mask: Key padding of the own slice, or None.
        scale: Factor of the logits.
    """
    dispatch = sys.modules["diffusers.models.attention_dispatch"].dispatch_attention_fn
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    backend = getattr(processor, "_attention_backend", None)
    output: Tensor = dispatch(q, k, v, attn_mask=attn_mask, scale=scale, backend=backend, parallel_config=config)
    return output.transpose(1, 2)
