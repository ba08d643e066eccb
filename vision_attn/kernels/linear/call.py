"""The inputs of one call of linear attention in Triton, and the launch that fits the GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vision_attn.kernels.launches import Launch, fitting
from vision_attn.kernels.triton.launching import block_of, layout, precision_of, roomless
from vision_attn.kernels.triton.rows import Plan

MOST = 256  # features of a program


@dataclass(frozen=True)
class Call:
    """The inputs of one call, checked; see `linear_attention`. `weight` is `[B, M, H]`, `query` float32 `[B, H, F]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor | None
    sin: Tensor | None
    weight: Tensor | None
    query: Tensor | None
    map: str
    eps: float

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Everything that a launch depends on, except the values of the tensors."""
        tensors = self.q, self.k, self.v, self.cos, self.sin, self.weight, self.query
        return self.q.device, self.map, self.eps, *map(layout, tensors)

    @property
    def floor(self) -> float:
        """The least divisor of the state."""
        return max(self.eps, 1e-30)

    @property
    def scaled(self) -> bool:
        """Whether products need factors that keep them in range."""
        return self.q.dtype == torch.float16

    @property
    def wide(self) -> bool:
        """Whether the features are more than one program holds: see `wide.py`."""
        return self.k.shape[-1] > MOST

    @cached_property
    def blocks(self) -> tuple[int, int, int]:
        """Channels of a tile of features, of values, and of the values that one program takes."""
        f, d = block_of(self.k.shape[-1]), block_of(self.v.shape[-1])
        f = 128 if self.wide else f
        # a program's part of the state must fit in registers and shared memory
        most = (64 if f > 128 else 128) if self.q.element_size() == 2 else 4096 // max(f, 64)
        if f > 128 and roomless(self.q):
            most = max(16, most // 2)
        return f, d, min(d, most)

    def rotary(self) -> tuple[Any, Any, int]:
        """Return cosine, sine and the stride of a token."""
        return (self.q, self.q, 0) if self.cos is None else (self.cos, self.sin, self.cos.stride(0))

    def constants(self) -> dict[str, Any]:
        """Return the constants that all kernels are compiled for."""
        f, _, d = self.blocks
        return dict(
            MAP=self.map, ROTARY=self.cos is not None, F=self.k.shape[-1], BLOCK_F=f, D=self.v.shape[-1], BLOCK_D=d,
            PRECISION=precision_of(self.q),
        )  # fmt: skip


def fitting_plan(call: Call, name: str, plan: Callable[[Launch], Plan], tensors: Sequence[Any], boxed: Any) -> Plan:
    """Return the plan of the launch that fits; a dtype stands for a tensor that is yet to be made."""
    f, d, _ = call.blocks

    def attempt(launch: Launch) -> tuple[Plan, int]:
        return plan(launch).needs(*tensors, boxed=boxed)

    def without_pipeline(launch: Launch) -> Launch:
        return replace(launch, walk=launch.walk if f <= 64 else (min(launch.length, 32),), stages=1, boxes=None)

    # where the rotation is loaded too, there is no room for a pipeline
    adjust = None if call.cos is None else without_pipeline
    return fitting(name, call.q, attempt, channels=max(f, d), adjust=adjust)
