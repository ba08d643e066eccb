"""Runs the feed-forward layers of FLUX.1 in chunks of tokens: their hidden layer is four times as wide as a token.

diffusers offers this for other models (`enable_forward_chunking`), but not for FLUX. Nothing of the blocks is
rewritten: a single-stream block passes the tokens on where it would compute the hidden layer, and computes it chunk by
chunk where it projects it back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn._checks import check_int


@contextmanager
def chunked_feed_forward(transformer: nn.Module, tokens: int) -> Iterator[None]:
    """Chunk the feed-forward layers of a FLUX.1 transformer inside the `with` block; the results are the same.

    Args:
        transformer: A `FluxTransformer2DModel`; other models are left as they are.
        tokens: Tokens in a chunk, at least 1.

    Raises:
        TypeError: If `tokens` is not an int.
        ValueError: If `tokens` is below 1.
    """
    check_int("tokens", tokens, 1)
    changed: list[nn.Module] = []
    try:
        for module in transformer.modules():
            kind = type(module).__name__
            if kind == "FluxTransformerBlock":
                for name in ("ff", "ff_context"):
                    _replace(getattr(module, name), _chunked, tokens, changed)
            elif kind == "FluxSingleTransformerBlock":
                _single(module, tokens, changed)
        yield
    finally:
        for module in changed:
            del module.forward


def _replace(module: nn.Module, make: Callable[..., Any], tokens: int, changed: list[nn.Module]) -> None:
    module.forward = make(module.forward, tokens)
    changed.append(module)


def _chunked(forward: Callable[[Tensor], Tensor], tokens: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([forward(part) for part in x.split(tokens, 1)], 1)


def _single(block: Any, tokens: int, changed: list[nn.Module]) -> None:
    """Let `proj_mlp` and `act_mlp` pass the tokens on: `proj_out` then gets [attention, tokens], not [.., hidden]."""
    widen, activate, project = block.proj_mlp.forward, block.act_mlp.forward, block.proj_out.forward
    width = block.proj_mlp.in_features

    def late(x: Tensor) -> Tensor:
        parts = (part.split([part.shape[-1] - width, width], -1) for part in x.split(tokens, 1))
        return torch.cat([project(torch.cat([attended, activate(widen(own))], -1)) for attended, own in parts], 1)

    for module, forward in ((block.proj_mlp, _same), (block.act_mlp, _same), (block.proj_out, late)):
        module.forward = forward
        changed.append(module)


def _same(x: Tensor) -> Tensor:
    return x
