"""Optimisers by name: PyTorch's, and those of libraries that may be installed."""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vision_attn.distill.config import OptimizerConfig

_LIBRARIES = {
    "adamw8bit": ("bitsandbytes", "optim.AdamW8bit"),
    "schedulefree": ("schedulefree", "AdamWScheduleFree"),
    "prodigy": ("prodigyopt", "Prodigy"),
}


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> Any:
    """Return the optimiser.

    Raises:
        ValueError: If its library is not installed.
    """
    values: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **values)
    library, path = _LIBRARIES[config.name]
    try:
        found: Any = importlib.import_module(library)
    except ImportError as error:
        raise ValueError(f"optimizer.name: '{config.name}' needs {library} (pip install {library}): {error}") from None
    for part in path.split("."):
        found = getattr(found, part)
    if config.name == "prodigy":
        values |= {"use_bias_correction": True, "safeguard_warmup": True}  # as CLEAR was trained
    if config.name == "schedulefree":
        values["warmup_steps"] = config.warmup
    return found(parameters, **values)


def make_schedule(config: OptimizerConfig, optimizer: Any, steps: int) -> Any:
    """Return the schedule of the learning rate. A schedule-free optimiser has its own warmup."""
    from diffusers.optimization import get_scheduler  # noqa: PLC0415, diffusers is optional

    own = config.name == "schedulefree"
    name = config.schedule if config.schedule != "constant" else "constant_with_warmup"
    return get_scheduler(
        "constant" if own else name,
        optimizer,
        num_warmup_steps=0 if own else config.warmup,
        num_training_steps=steps,
    )
