"""The layer-wise stage: each converted layer learns its teacher's outputs from its teacher's inputs.

    loss = sum over layers of |a_student(x) - a_teacher(x)|^2 / Var(a_teacher(x)),    x the teacher's input

Only the processors' own parameters learn, and the student runs no forward of its own. Inside the teacher's forward each
layer runs a second time, with its processor, and computes its gradient at once. So the memory is that of one layer.

Papers: 'LoLCATs' - https://arxiv.org/abs/2410.10254, 'MOHAWK' - https://arxiv.org/abs/2408.10189
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vision_attn.conversion.state import model_state
from vision_attn.distill.config import Config
from vision_attn.distill.denoiser import Batch
from vision_attn.distill.losses import Noisy, Step, explain
from vision_attn.distill.parameters import is_sharded
from vision_attn.distill.student import Student


def transfer(config: Config, accelerator: Any, computing: Step, batches: Iterator[Batch]) -> None:
    """Run the stage: `config.transfer.steps` updates of the processors' own parameters.

    Raises:
        ValueError: If the processor has no parameters, or the model is sharded.
        NonFiniteError: If the loss is NaN or infinite.
    """
    student, steps = computing.student, config.transfer.steps
    new = list(student.conversion.parameters())
    if not new:
        raise ValueError(f"transfer.steps: {config.student.processor} has no parameters of its own to train")
    if is_sharded(accelerator) or student.group is not None:
        raise ValueError("transfer.steps: the layer-wise stage runs on whole models: use DDP and run.share=1, or 0")
    optimizer = torch.optim.AdamW(new, lr=config.transfer.learning_rate, weight_decay=0)
    quiet = config.run.quiet or not accelerator.is_main_process
    with tqdm(total=steps, desc="layers", unit="step", disable=quiet) as bar, accelerator.autocast():
        for step in range(steps):
            batch = next(batches).to(accelerator.device, student.dtype)
            number = 10**9 + step * accelerator.num_processes + accelerator.process_index
            noisy = computing.noisy(batch, number)
            losses = transfer_losses(student, noisy)
            mean = sum(losses.values()) / len(losses)
            if not math.isfinite(mean):
                raise explain(step + 1, "the loss of the layer-wise stage", computing, noisy)
            for parameter in new:
                if parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix(loss=f"{mean:.4g}")


def transfer_losses(student: Student, noisy: Noisy) -> dict[str, float]:
    """Run the teacher on a batch and add to the gradients of each layer's own parameters.

    Returns:
        The loss of each layer by its name.
    """
    shared = model_state(student.model).shared
    losses: dict[str, float] = {}

    def learn(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            wanted = _image(output).detach()
            shared.bypassed = False
            try:
                with torch.enable_grad():
                    got = _image(type(layer).forward(layer, *args, **kwargs))
                    loss = F.mse_loss(got.float(), wanted.float()) / wanted.float().var().clamp(min=1e-12)
                    if loss.requires_grad:
                        loss.backward()
            finally:
                shared.bypassed = True
            losses[name] = loss.item()

        return hook

    hooks = [
        student.model.get_submodule(name).register_forward_hook(learn(name), with_kwargs=True)
        for name in student.conversion.specs
    ]
    try:
        with torch.no_grad(), student.conversion.bypassed():
            student.model(**noisy.call)
    finally:
        for handle in hooks:
            handle.remove()
    return losses


def _image(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
