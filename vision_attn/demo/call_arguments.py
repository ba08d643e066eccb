"""Arguments of a pipeline's call that a command line gives as text: read, and held against the call's signature."""

import ast
import inspect
from collections.abc import Sequence
from typing import Any, get_args

import torch

_TENSORS = {torch.Tensor, torch.FloatTensor, torch.LongTensor}


def call_of_text(items: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that a command line gives as `name=value`: Python values, or else text.

    Raises:
        ValueError: If one has no value.
    """
    call: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set takes name=value, got {item!r}")
        try:
            call[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            call[name] = value
    return call


def check_call(pipe: Any, call: dict[str, Any]) -> None:
    """Refuse arguments that the pipeline's call does not have, and no tensors where it takes nothing else."""
    known: dict[str, inspect.Parameter] = {}
    for kind in type(pipe).__mro__:
        if "__call__" in vars(kind):
            parameters = inspect.signature(kind.__call__).parameters
            known = {**parameters, **known}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    own = {"self", "prompt", "height", "width", "generator", "output_type", "return_dict", "args", "kwargs"}
    names = sorted(set(known) - own)
    if unknown := sorted(set(call) - set(names)):
        raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}: it takes {', '.join(names)}")
    for name, value in call.items():
        kinds = set(get_args(known[name].annotation) or [known[name].annotation]) - {type(None)}
        if kinds <= _TENSORS and not isinstance(value, torch.Tensor | None):
            raise ValueError(f"{type(pipe).__name__} takes a tensor as {name}, got {value!r}")
