"""Training that meets a number that is not finite stops, and says at which step and in which layer."""

from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.distill.sharding import holds_shards, own
from vision_attn.distill.step import Noisy, Step


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite."""


def explain(step: int, what: str, computing: Step, noisy: Noisy) -> NonFiniteError:
    """Run the student once more on the batch and name the first layer whose output is not finite."""
    model, parameters = computing.student.model, computing.student.parameters
    bad = [name for name, p in parameters.items() if not torch.isfinite(own(p)).all()]
    if bad:
        layer: str | None = f"parameters are not finite: {', '.join(bad[:4])}"
    elif holds_shards(parameters):  # the other processes would have to run the model too
        layer = "in which layer is not looked for in a sharded model"
    else:
        layer = _first(model, noisy)
    if layer is None:
        gradients = [
            name for name, p in parameters.items() if p.grad is not None and not torch.isfinite(own(p.grad)).all()
        ]
        named = f"its first non-finite gradients are those of {', '.join(gradients[:4])}"
        layer = f"the forward pass is finite; {named}" if gradients else "the forward pass is finite here"
    return NonFiniteError(
        f"step {step}: {what} is not finite; {layer}. Lower optimizer.learning_rate, keep optimizer.clip at 1, or "
        "compute in bf16 rather than fp16"
    )


def _first(model: nn.Module, noisy: Noisy) -> str | None:
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(t, Tensor) and not torch.isfinite(t).all() for t in tensors):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(**noisy.call)
    finally:
        for handle in hooks:
            handle.remove()
    return f"the first layer whose output is not: {found[0]}" if found else None
