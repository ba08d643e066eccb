"""The ways of accelerate and diffusers to keep weights elsewhere until a module runs; here all of them on the CPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import accelerate
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

CPU = torch.device("cpu")


OFFLOADS: dict[str, Callable[[nn.Module], Any]] = {
    "model": lambda model: accelerate.cpu_offload_with_hook(model, execution_device=CPU),
    "sequential": lambda model: accelerate.cpu_offload(model, execution_device=CPU),
    "group-leaf": partial(apply_group_offloading, onload_device=CPU, offload_type="leaf_level"),
    "group-block": partial(
        apply_group_offloading, onload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    ),
}  # fmt: skip
