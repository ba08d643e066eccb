"""Who computes the linear family: ours, the papers' formulas eager and compiled, dense SDPA, and a copy."""

import importlib
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.bench.candidate import AbsentError, Candidate, Prepared
from vision_attn.bench.linear.problem import COPY, DENSE, LOOSE, SAME, LinearProblem
from vision_attn.kernels.agent import Agents, agent_attention
from vision_attn.kernels.linear import linear_attention
from vision_attn.processors.base import Layer
from vision_attn.processors.hilo import HiLo
from vision_attn.processors.rala import rank_augmented_attention


def _ours(problem: LinearProblem, device: torch.device) -> Prepared:
    return _with_backend("triton" if device.type == "cuda" else "torch", problem, device)


def _with_backend(backend: str, problem: LinearProblem, device: torch.device) -> Prepared:
    del device
    if problem.kind == "linear":
        return Prepared(partial(linear_attention, eps=1e-4, backend=backend))
    if problem.kind == "rala":
        return Prepared(partial(rank_augmented_attention, backend=backend))
    if problem.kind == "agent":
        return Prepared(lambda q, k, v, agents: agent_attention(q, k, v, Agents(agents), backend=backend))
    processor = HiLo(alpha=0.5, window_size=2).build(Layer("hilo", problem.heads, problem.head_dim, backend))
    return Prepared(lambda q, k, v: processor(q, k, v, problem.grid))


def _formula(compiled: bool, problem: LinearProblem, device: torch.device) -> Prepared:
    eager = _with_backend("torch", problem, device).run if problem.kind == "hilo" else problem.formula()
    if not compiled:
        return Prepared(eager)
    if device.type == "cpu":
        raise AbsentError("compiled for CUDA only")
    torch._dynamo.reset()
    return Prepared(torch.compile(eager, fullgraph=True, dynamic=False))


def _sdpa(problem: LinearProblem, device: torch.device) -> Prepared:
    del problem, device

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return Prepared(run)


def _fbi_la(problem: LinearProblem, device: torch.device) -> Prepared:
    if problem.kind != "linear":
        raise AbsentError("fbi_la has no such attention")
    try:
        module: Any = importlib.import_module("fbi_la.ops.linear_attn")
    except (ImportError, OSError) as error:
        raise AbsentError(f"fbi_la cannot be imported: {error}") from error
    del device

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2).contiguous() for t in (F.elu(q) + 1, F.elu(k) + 1, v))
        return module.linear_attn(q, k, v).transpose(1, 2)

    return Prepared(run)


class _Copy(torch.autograd.Function):
    """Moves the bytes of the floor and no more: half of them are read, half written."""

    @staticmethod
    def forward(ctx: Any, moved: tuple[int, int], *tensors: Tensor) -> Tensor:
        """Return a copy of the first tensor."""
        ctx.moved = moved[1]
        ctx.save_for_backward(*tensors)
        return _copies(tensors, moved[0])[0]

    @staticmethod
    def backward(ctx: Any, *do: Tensor) -> tuple:
        """Return copies of the cotangent."""
        others = [torch.zeros_like(t) for t in ctx.saved_tensors[3:]]
        return None, *_copies((do[0],) * 4, ctx.moved)[:3], *others


def _copies(tensors: tuple[Tensor, ...], moved: int) -> list[Tensor]:
    """Copy `moved / 2` tensors; an odd number ends with half of one."""
    copies = [t.clone() for t in tensors[: moved // 2]]
    return [*copies, tensors[0][:, : tensors[0].shape[1] // 2].clone()] if moved % 2 else copies


def _copy(problem: LinearProblem, device: torch.device) -> Prepared:
    del device
    return Prepared(partial(_Copy.apply, (problem.tensors_moved(False), problem.tensors_moved(True))))


CANDIDATES = (
    Candidate("ours", SAME, _ours),
    Candidate("copy", COPY, _copy),
    Candidate("eager", LOOSE, partial(_formula, False)),
    Candidate("compiled", LOOSE, partial(_formula, True)),
    Candidate("fbi_la", LOOSE, _fbi_la),
    Candidate("SDPA", DENSE, _sdpa),
)
