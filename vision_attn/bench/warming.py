"""Compiles a converted model's kernels ahead: `vision-attn warm` fills Triton's cache, so that no first step waits."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from vision_attn.estimation.model import estimate, read, specs_of
from vision_attn.grid import Grid
from vision_attn.hosts.host import heads_of, input_dim
from vision_attn.kernels.triton import launching
from vision_attn.processors.base import AttnSpec, Layer
from vision_attn.processors.softmax import Softmax


@dataclass(frozen=True)
class Warmth:
    """A processor whose kernels are compiled: for heads, their channels, those of the layer's input, and a grid."""

    spec: AttnSpec
    num_heads: int
    head_dim: int
    dim: int | None
    grid: Grid

    @property
    def key(self) -> tuple[Any, ...]:
        """All that is compiled for; sizes of the grid are not, but whether cells of 8 tokens cover it."""
        grid = self.grid
        whole = grid.height % 8 == 0 and grid.width % 8 == 0
        return self.spec, self.num_heads, self.head_dim, self.dim, grid.prefix, grid.suffix, whole


def layers_to_warm(target: Any, spec: Any, *, height: int, width: int) -> list[Warmth]:
    """Return one layer of each kind that a conversion has at an image size, that of the fewest tokens.

    Args:
        target: As for `estimate`.
        spec: As for `convert`.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """
    rows = {row.name: row.grid for row in estimate(target, spec, height=height, width=width, device="cuda").layers}
    found: dict[tuple[Any, ...], Warmth] = {}
    for denoiser in read(target, None, None)[0]:
        modules = dict(denoiser.model.named_modules())
        for name, chosen in specs_of(denoiser, spec).items():
            if name not in rows or isinstance(chosen, Softmax):
                continue
            heads, head_dim = heads_of(name, modules[name])
            one = Warmth(chosen, heads, head_dim, input_dim(modules[name]), rows[name])
            other = found.get(one.key)
            if other is None or one.grid.tokens < other.grid.tokens:
                found[one.key] = one
    return list(found.values())


def compile_layer(one: Warmth, dtype: torch.dtype, training: bool, device: str) -> str:
    """Compile a layer's kernels and run none; return what was done, or why it was not."""
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    name = f"{type(one.spec).__name__}, {one.num_heads} heads of {one.head_dim}, {one.grid}"
    try:
        with launching.compile_only(), torch.set_grad_enabled(training):
            layer = Layer("", one.num_heads, one.head_dim, "triton", one.dim)
            processor = one.spec.build(layer).to(where, dtype)
            shape = 1, one.grid.tokens, one.num_heads, one.head_dim
            q, k, v = (torch.zeros(shape, device=where, dtype=dtype, requires_grad=training) for _ in range(3))
            o = processor(q, k, v, one.grid)
            if training:
                (o[0] if isinstance(o, tuple) else o).sum().backward()
    except Exception as error:  # one layer that cannot be compiled is no reason to leave the others out
        return f"{name}: {type(error).__name__}: {str(error)[:200]}"
    return f"{name}: compiled"


def warm(
    target: Any, spec: Any, *, height: int, width: int, dtype: torch.dtype = torch.bfloat16, training: bool = False,
    say: Callable[[str], None] = print,
) -> int:  # fmt: skip
    """Fill Triton's cache with what a converted model launches, in processes side by side.

    Args:
        target: As for `estimate`.
        spec: As for `convert`.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        dtype: The dtype of the model.
        training: Whether the gradients' kernels are compiled too.
        say: Takes lines for the user.

    Returns:
        How many kinds of layers there are.

    Raises:
        ValueError: If there is no GPU to compile for.
    """
    if not torch.cuda.is_available():
        raise ValueError("kernels are compiled for the GPU that is there, and none can be used here")
    layers = layers_to_warm(target, spec, height=height, width=width)
    workers = max(1, min(len(layers), 8, (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(compile_layer, one, dtype, training, "cuda") for one in layers]
        for job in as_completed(jobs):
            say(job.result())
    return len(layers)
