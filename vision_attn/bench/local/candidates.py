"""Who computes local attention, or dense attention in its place: ours, PyTorch's, xformers', NATTEN's."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vision_attn.bench.candidate import AbsentError, Candidate, Prepared
from vision_attn.bench.local.flops import triton_pairs
from vision_attn.bench.local.problem import DENSE, LOCAL, UNDILATED, LocalProblem
from vision_attn.kernels.local import local_attention
from vision_attn.kernels.local.window import Window


def _flop(problem: LocalProblem, pairs_of_all_heads: int) -> int:
    return 4 * problem.head_dim * pairs_of_all_heads


def _dense_flop(problem: LocalProblem) -> int:
    return _flop(problem, problem.heads * problem.grid.tokens**2)


def _with_window(problem: LocalProblem, device: torch.device, window: Window) -> Prepared:
    backend = "triton" if device.type == "cuda" else "torch"

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_attention(q, k, v, problem.grid, window, backend=backend)

    if backend == "torch":
        return Prepared(run)
    shape = 1, problem.grid.tokens, problem.heads, problem.head_dim
    return Prepared(run, _flop(problem, triton_pairs(problem.grid, window, shape, problem.torch_dtype, device)))


def _ours(problem: LocalProblem, device: torch.device) -> Prepared:
    return _with_window(problem, device, problem.window)


def _undilated(problem: LocalProblem, device: torch.device) -> Prepared:
    return _with_window(problem, device, problem.undilated())


def _sdpa(backend: SDPBackend | None, problem: LocalProblem, device: torch.device) -> Prepared:
    if backend is not None and device.type != "cuda":
        raise AbsentError(f"{backend.name} runs on CUDA only")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return Prepared(run, _dense_flop(problem))


def _imported(module: str, function: str) -> Callable[..., Any]:
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, OSError, AttributeError) as error:
        raise AbsentError(f"{module} cannot be imported: {error}") from error


def _xformers(problem: LocalProblem, device: torch.device) -> Prepared:
    del device
    return Prepared(_imported("xformers.ops", "memory_efficient_attention"), _dense_flop(problem))


def _natten(problem: LocalProblem, device: torch.device) -> Prepared:
    del device
    grid, window = problem.grid, problem.window
    if window.radius is not None or grid.prefix + grid.suffix:
        raise AbsentError("NATTEN has neither discs nor tokens outside the grid")
    na2d = _imported("natten", "na2d")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(1, (grid.height, grid.width)) for t in (q, k, v))
        return na2d(q, k, v, kernel_size=window.kernel, dilation=window.steps).flatten(1, 2)

    return Prepared(run)


OPERATORS = (
    Candidate("ours", LOCAL, _ours),
    Candidate("ours undilated", UNDILATED, _undilated),
    Candidate("cuDNN", DENSE, partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
    Candidate("flash", DENSE, partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
    Candidate("SDPA", DENSE, partial(_sdpa, None)),
    Candidate("xformers", DENSE, _xformers),
    Candidate("NATTEN", LOCAL, _natten),
)
