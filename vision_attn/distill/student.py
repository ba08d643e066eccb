"""The student and its teacher: one model where the host's weights stay as they are, else the model and a copy."""

import copy
import fnmatch
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.adapters.published import check_clear, check_linfusion
from vision_attn.conversion.conversion import Conversion, convert, load
from vision_attn.distill.config import Config
from vision_attn.distill.denoiser import denoiser_of
from vision_attn.distill.trainables import choose_trainables, randomise


@dataclass
class Student:
    """A converted denoiser that is to be trained.

    Attributes:
        pipe: Its pipeline.
        model: The denoiser.
        conversion: Of the model.
        parameters: What is trained, by name.
        copy: The teacher, if the model cannot be both.
        dtype: Of the frozen weights.
    """

    pipe: Any
    model: nn.Module
    conversion: Conversion
    parameters: dict[str, nn.Parameter]
    copy: nn.Module | None
    dtype: torch.dtype

    def to(self, device: torch.device) -> None:
        """Move the models that training needs; the rest of the pipeline stays."""
        for model in (self.model, self.copy):
            if model is not None:
                model.to(device)

    @contextmanager
    def teaching(self, model: Any) -> Iterator[Any]:
        """Return the teacher inside the `with` block, without gradients.

        Args:
            model: The student's model as it is called: wrapped for several processes.
        """
        with torch.no_grad(), ExitStack() as restored:
            if self.copy is None:
                restored.enter_context(self.conversion.bypassed())
                restored.enter_context(_without_lora(self.model))
            yield model if self.copy is None else self.copy

    def compared(self, pattern: str, every: int) -> list[str]:
        """Return the names of the layers whose outputs are compared: one in `every` layers, if it fits the pattern.

        Raises:
            ValueError: If there are none.
        """
        names = [name for name in list(self.conversion.specs)[::every] if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            some = ", ".join(list(self.conversion.specs)[::every][:4])
            one = f"one in {every} of " if every > 1 else ""
            raise ValueError(f"loss.layers: {pattern!r} is none of {one}the converted layers, such as {some}")
        return names


def make_student(config: Config, pipe: Any) -> Student:
    """Convert the denoiser of a pipeline and choose what is trained. The random numbers of PyTorch must be seeded.

    Raises:
        ValueError: If the processor does not fit, nothing would be trained, or `run.export` cannot hold the result.
        FileNotFoundError: If there is no such adapter.
    """
    name, model = denoiser_of(pipe)
    dtype = next(model.parameters()).dtype
    own = config.student.trainable == "attention"
    teacher = copy.deepcopy(model).requires_grad_(False).eval() if own else None
    student = config.student
    if student.adapter is not None:
        conversion = load(pipe, student.adapter, spec=student.spec())
    else:
        least = student.min_tokens
        conversion = convert(pipe, student.spec(), where=student.where, min_tokens=least, components=(name,))
    _check_export(config, conversion)  # before LoRA, which renames the projections until it is merged
    if student.init == "random":
        randomise(conversion)
    parameters = choose_trainables(conversion, student)
    if config.run.checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
        model.train()  # diffusers checkpoints in training mode only
    return Student(pipe, model, conversion, parameters, teacher, dtype)


def _check_export(config: Config, conversion: Conversion) -> None:
    """Refuse a student that `run.export` cannot hold."""
    try:
        if config.run.export == "clear":
            check_clear(conversion)
        elif config.run.export == "linfusion":
            check_linfusion(conversion)
    except ValueError as error:
        raise ValueError(f"run.export: {error}") from None


@contextmanager
def _without_lora(model: nn.Module) -> Iterator[None]:
    """Run without LoRA layers. Peft's own switch also freezes them, which DistributedDataParallel would miss."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def attention_outputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the outputs of attention layers, of the image tokens where the host has others apart.

    Layers that run again in a backward pass after the block are not kept.
    """
    kept: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            kept[name] = output[0] if isinstance(output, tuple) else output

        return keep

    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield kept
    finally:
        for handle in hooks:
            handle.remove()
