"""The trained parameters: what updates them, what averages them, and how FSDP spreads them over the processes.

PyTorch's `fully_shard` replaces each parameter by a new one, its shard. So clipping, averages and checkpoints look the
parameters up again after `accelerator.prepare`, and saving gathers them. Every process calls these functions; models
that are not sharded stay as they are.
"""

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from vision_attn.distill.config import OptimizerConfig
from vision_attn.distill.student import Student

_LIBRARIES = {
    "adamw8bit": ("bitsandbytes", "optim.AdamW8bit"),
    "schedulefree": ("schedulefree", "AdamWScheduleFree"),
    "prodigy": ("prodigyopt", "Prodigy"),
}


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> Any:
    """Return the optimiser: PyTorch's, or that of a library.

    Raises:
        ValueError: If the library is not installed.
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


class Averaging:
    """Gives the parameters that are drawn with and saved: their exponential mean, or a schedule-free optimiser's mean.

    Args:
        config: `ema` is used.
        parameters: The trained ones, on their device.
        optimizer: Updates these parameters.

    Attributes:
        ema: The exponential mean, None without one.
    """

    def __init__(self, config: OptimizerConfig, parameters: list[nn.Parameter], optimizer: Any) -> None:
        from diffusers.training_utils import EMAModel  # noqa: PLC0415, diffusers is optional

        self.parameters, self.optimizer = parameters, optimizer
        self.ema = EMAModel(parameters, decay=config.ema, use_ema_warmup=True, power=0.75) if config.ema else None

    def begin(self) -> None:
        """Begin an update: a schedule-free optimiser needs the parameters that learn."""
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()

    def update(self) -> None:
        """End an update: it enters the mean."""
        if self.ema is not None:
            self.ema.step(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return the mean for a checkpoint; a sharded one is gathered."""
        assert self.ema is not None, "registered only with a mean"
        state = self.ema.state_dict()
        return {**state, "shadow_params": [whole(p) for p in state["shadow_params"]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the mean of a checkpoint, which Accelerate reads to the CPU, beside the parameters."""
        assert self.ema is not None, "registered only with a mean"
        pairs = zip(state["shadow_params"], self.parameters, strict=True)
        self.ema.load_state_dict({**state, "shadow_params": [placed_like(p, like) for p, like in pairs]})

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Put the mean into the model inside the `with` block.

        The parameters that learn come back bit for bit: in a run of several processes only one draws.
        """
        switches = hasattr(self.optimizer, "eval")
        if self.ema is None and not switches:
            yield
            return
        learning = [p.detach().cpu().clone() for p in self.parameters]
        if switches:
            self.optimizer.eval()
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if switches:
                self.optimizer.train()
            for parameter, value in zip(self.parameters, learning, strict=True):
                parameter.data.copy_(value)


def is_sharded(accelerator: Any) -> bool:
    """Whether the parameters (FSDP) or the optimiser's state (DeepSpeed) are spread over the processes."""
    return str(accelerator.distributed_type).rpartition(".")[2] in ("FSDP", "DEEPSPEED")


def holds_shards(parameters: dict[str, nn.Parameter]) -> bool:
    """Whether some of the parameters are shards."""
    return any(isinstance(parameter, DTensor) for parameter in parameters.values())


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from all processes; return any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor on the device of `like`, and sharded as `like` is."""
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def checksum(parameters: dict[str, nn.Parameter]) -> Tensor:
    """Return the sum `[1]` of all absolute values that this process holds."""
    return torch.stack([own(p.detach()).double().abs().sum() for p in parameters.values()]).sum().reshape(1)


class Shards:
    """Follows a student's parameters through `accelerator.prepare`, which may replace them.

    Args:
        student: Before `accelerator.prepare`.

    Attributes:
        before: The parameters of the model by name, as they were.
    """

    def __init__(self, student: Student) -> None:
        self.student = student
        self.before = dict(student.model.named_parameters())

    def look_up(self) -> None:
        """Give the student the parameters that its model has now, and free those that were replaced."""
        now = dict(self.student.model.named_parameters())
        self.student.parameters = {name: now[name] for name in self.student.parameters}
        for name, parameter in self.before.items():
            if now[name] is not parameter:
                parameter.data = parameter.data.new_empty(0)

    def reshard(self) -> None:
        """Free the gathered parameters of the last forward, so that the next forward sees what was written since."""
        for module in self.student.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def gathered(self, main: bool) -> Iterator[None]:
        """Gather the whole model on the CPU of the main process inside the `with` block.

        Args:
            main: Whether this is the main process; the others only send their shards.
        """
        self.reshard()
        known, replaced = self.student.parameters, []
        for name, old in self.before.items():
            outer, _, leaf = name.rpartition(".")
            module = self.student.model.get_submodule(outer)
            shard = module.get_parameter(leaf)
            if shard is old:
                continue
            full = whole(shard.detach())
            if main:
                old.data = full.cpu()
                module._parameters[leaf] = old
                replaced.append((module, leaf, shard, old))
        self.student.parameters = {name: self.before[name] for name in known} if replaced else known
        try:
            yield
        finally:
            self.student.parameters = known
            for module, leaf, shard, old in replaced:
                module._parameters[leaf] = shard
                old.data = old.data.new_empty(0)
