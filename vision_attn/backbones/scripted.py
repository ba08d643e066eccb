"""Registers Python functions as operators of torch, which TorchScript can call and save by name.

TorchScript compiles neither the package's operators nor what they take. A layer therefore calls, where it is scripted,
`torch.ops.vision_attn.<name>`; a saved script runs wherever `vision_attn.backbones` has been imported.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])

_LIBRARY = torch.library.Library("vision_attn", "FRAGMENT")


def operator(schema: str) -> Callable[[F], F]:
    """Register the decorated function, whose gradient is that of what it calls.

    Args:
        schema: Name, arguments and result as torch writes them: 'name(Tensor x, int[] sizes) -> Tensor'.
    """
    _LIBRARY.define(schema)

    def register(function: F) -> F:
        _LIBRARY.impl(schema.split("(", maxsplit=1)[0], function, "CompositeImplicitAutograd")
        return function

    return register
