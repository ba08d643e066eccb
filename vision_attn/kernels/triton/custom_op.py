"""Operators of PyTorch around Triton code, which autograd, `torch.compile` and modes see as one call each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class CustomOp:
    """A custom operator that is called directly where nothing of PyTorch has a part in the call.

    `torch.library` takes 50 us to get from Python to Python. In inference that is more than what it is for is worth.

    Attributes:
        registered: The operator of `torch.library`.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake, self.register_autograd = self.registered.register_fake, self.registered.register_autograd

    def __call__(self, *args: Any) -> Any:
        """Run the operator."""
        return self.registered(*args) if _watched(args) else self._function(*args)


def custom_op(name: str) -> Callable[[Callable[..., Any]], CustomOp]:
    """Return a decorator that registers a function of tensors and numbers under `name`."""
    return lambda function: CustomOp(name, function)


def _watched(args: tuple[Any, ...]) -> bool:
    """Whether autograd, a transform, a tracer, a mode or a subclass of tensors wants to know of a call."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(type(t) not in _PLAIN for t in tensors):
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


_PLAIN = (Tensor, nn.Parameter)
