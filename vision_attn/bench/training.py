"""A step of a distillation over processes: a frozen teacher, a student, its losses, their gradients, and an update."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vision_attn.conversion.conversion import convert
from vision_attn.distill.config import LossConfig, StudentConfig
from vision_attn.distill.losses import Outputs, distillation_losses
from vision_attn.distill.student import attention_outputs, choose_trainables
from vision_attn.parallel import enable
from vision_attn.processors import AttnSpec


@contextmanager
def training(
    model: Any, spec: AttnSpec | None, arguments: dict[str, Any], group: dist.ProcessGroup | None
) -> Iterator[Callable[[], None]]:
    """Yield a function that takes one step, as `vision_attn.distill` takes it by default.

    The projections of the converted layers train in float32 under autocast, with AdamW and gradient checkpointing; the
    losses are those of `LossConfig()`. Over processes a gradient is added up as soon as it is there, as
    `DistributedDataParallel` does it. The model comes back as it was, but for what it learned.

    Args:
        model: The denoiser.
        spec: What the student is converted to.
        arguments: Of one forward.
        group: All processes, which share one picture; None for one process.

    Raises:
        ValueError: If there is no spec.
    """
    if spec is None:
        raise ValueError("a student needs a spec")
    dtype = next(model.parameters()).dtype
    teacher = copy.deepcopy(model)
    conversion = convert(model, spec)
    trained: dict[str, nn.Parameter] = {}
    cuts, hooks, works = [], [], list[Any]()
    try:
        trained = choose_trainables(conversion, StudentConfig("Softmax"))
        model.enable_gradient_checkpointing()
        model.train()
        if group is not None:
            cuts = [enable(part) for part in (model, teacher)]
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-6, fused=next(model.parameters()).is_cuda)
        if group is not None:
            hooks = [p.register_post_accumulate_grad_hook(_adding(works, group)) for p in trained.values()]
        noisy = _latents(arguments)
        names = list(conversion.specs)

        def step() -> None:
            with torch.autocast(noisy.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                with torch.no_grad():
                    taught = _forward(teacher, arguments, noisy, names)
                learned = _forward(model, arguments, noisy, names)
                losses = distillation_losses(learned, taught, noisy, LossConfig(), group)
            losses["total"].backward()
            while works:
                works.pop().wait()
            optimizer.step()
            optimizer.zero_grad()

        yield step
    finally:
        for hook in hooks:
            hook.remove()
        for cut in cuts:
            cut.disable()
        for parameter in trained.values():
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
        model.disable_gradient_checkpointing()
        model.eval().requires_grad_(False)
        conversion.revert()


def _adding(works: list[Any], group: dist.ProcessGroup) -> Callable[[Tensor], None]:
    """Return a hook that begins to add a parameter's gradient over all processes, and notes what is under way."""

    def add(parameter: Tensor) -> None:
        works.append(dist.all_reduce(parameter.grad, group=group, async_op=True))

    return add


def _latents(arguments: dict[str, Any]) -> Tensor:
    found: Tensor = arguments["hidden_states" if "hidden_states" in arguments else "sample"]
    return found


def _forward(model: nn.Module, arguments: dict[str, Any], latents: Tensor, names: list[str]) -> Outputs:
    with attention_outputs(model, names) as attention:
        output = model(**arguments)[0]
    return Outputs.of(output, latents, dict(attention))
