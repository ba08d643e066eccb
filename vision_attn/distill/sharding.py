"""Models whose parameters are spread over the processes (FSDP): each process holds a shard of every parameter.

PyTorch's `fully_shard` puts a new parameter, the shard, in the place of the old one. So what is clipped, averaged and
checkpointed is looked up again after `accelerator.prepare`, and what is saved is gathered. All of these functions are
called by all processes alike; they do nothing to models that are whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from vision_attn.distill.student import Student


def is_sharded(accelerator: Any) -> bool:
    """Whether the parameters (FSDP) or the optimiser's state (DeepSpeed) are spread over the processes."""
    return str(accelerator.distributed_type).rpartition(".")[2] in ("FSDP", "DEEPSPEED")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whose shards are gathered from all processes; a tensor that is whole is returned."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Spread a whole tensor as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


class Shards:
    """What became of a student's parameters when its model was prepared.

    Args:
        student: Before `accelerator.prepare`.

    Attributes:
        before: The parameters of the model by name, as they were.
    """

    def __init__(self, student: Student) -> None:
        self.student = student
        self.before = dict(student.model.named_parameters())

    def look_up(self) -> None:
        """Have the student know its parameters as they are now, and free those that were replaced."""
        now = dict(self.student.model.named_parameters())
        self.student.parameters = {name: now[name] for name in self.student.parameters}
        for name, parameter in self.before.items():
            if now[name] is not parameter:
                parameter.data = parameter.data.new_empty(0)

    def reshard(self) -> None:
        """Free the whole parameters that the last forward left: the next one is to see what was written since."""
        for module in self.student.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def gathered(self, main: bool) -> Iterator[None]:
        """Have the model whole in the memory of the main process' CPU inside the `with` block.

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


def holds_shards(parameters: dict[str, nn.Parameter]) -> bool:
    """Whether some of the parameters are shards."""
    return any(isinstance(parameter, DTensor) for parameter in parameters.values())


def checksum(parameters: dict[str, nn.Parameter]) -> Tensor:
    """Return a sum `[1]` over what this process holds of the parameters."""
    return torch.stack([own(p.detach()).double().abs().sum() for p in parameters.values()]).sum().reshape(1)
