"""The linear family: LinFusion's, RALA's, InLine, agent, HiLo and Halo on a square grid, and who computes them.

The papers' formulas, in plain PyTorch and any precision, are peers of our operators and their definition. They share no
code with the operators. All take and return `[B, N, H, D]`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.bench.candidate import (
    SHORT_DTYPE,
    AbsentError,
    Candidate,
    Inputs,
    Prepared,
    budget_shares,
    results_of,
)
from vision_attn.grid import Grid
from vision_attn.kernels.agent import Agents, agent_attention
from vision_attn.kernels.linear import injective_attention, linear_attention
from vision_attn.processors.base import Layer
from vision_attn.processors.halo import Halo
from vision_attn.processors.hilo import HiLo
from vision_attn.processors.rala import rank_augmented_attention

# What a candidate can compute.
SAME, LOOSE, DENSE, COPY = "the same function", "the paper's formula in this dtype", "dense attention", "a copy"
HALO = Halo(block=8, halo=3)
_ROWS = 24


@dataclass(frozen=True)
class LinearProblem:
    """Attention of batch 1 on a square grid; see `Problem`.

    Args:
        group: The table it belongs to.
        kind: 'linear', 'rala', 'inline', 'agent', 'hilo' or 'halo'.
        side: Side of the grid in tokens.
        peers: Names of the candidates besides ours.
        backward: Names of the candidates whose backward is timed too.
        heads: H.
        head_dim: D.
        agents: Number of agents, a square number.
        dtype: Name of a torch dtype.
    """

    group: str
    kind: str
    side: int
    peers: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    heads: int = 10
    head_dim: int = 64
    agents: int = 0
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """As in 'linear-256-h10-d64', 'agent-256-a49-h10-d64-fp16'."""
        words = [self.kind, str(self.side), *([f"a{self.agents}"] if self.agents else [])]
        words += [f"h{self.heads}", f"d{self.head_dim}"]
        return "-".join([*words, *([SHORT_DTYPE[self.dtype]] if self.dtype != "bfloat16" else [])])

    @property
    def label(self) -> str:
        """As in '65536 tokens, 10 heads, D 64, bf16, floor 335.5 MB'."""
        agents = f", {self.agents} agents" if self.agents else ""
        size = f"{self.heads} heads, D {self.head_dim}, {SHORT_DTYPE[self.dtype]}"
        return f"{self.side**2} tokens{agents}, {size}, floor {self.moved(False) / 1e6:.1f} MB"

    @property
    def grid(self) -> Grid:
        """The grid."""
        return Grid(self.side, self.side)

    def tensors_moved(self, gradients: bool) -> int:
        """Count the tensors `[1, N, H, D]` that must be read or written.

        Forward: q, k, v and o; RALA reads q a second time for its mean. Backward: q, k, v and the gradients of all
        four.
        """
        return 7 if gradients else 5 if self.kind == "rala" else 4

    @property
    def windowed(self) -> bool:
        """Whether pairs of tokens have a softmax; such a kind has no formula, and sampled rows are its definition."""
        return self.kind in ("hilo", "halo")

    def moved(self, gradients: bool) -> int:
        """Count the bytes of these tensors; 'copy' moves as many."""
        size = self.side**2 * self.heads * self.head_dim * torch.empty(0, dtype=self.torch_dtype).element_size()
        return self.tensors_moved(gradients) * size

    def shape(self) -> dict[str, Any]:
        """Return batch, tokens, heads, channels, dtype, and the bytes of the floor."""
        floor = dict(floor_bytes_forward=self.moved(False), floor_bytes_backward=self.moved(True))
        size = dict(batch=1, tokens=self.side**2, heads=self.heads, head_dim=self.head_dim, dtype=self.dtype)
        return dict(kind=self.kind, **size, agents=self.agents, **floor)

    def twin(self) -> "LinearProblem":
        """Return a small problem of the same kind."""
        return replace(self, group="twin", side=24, heads=min(self.heads, 4), peers=(), backward=())

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names."""
        return getattr(torch, self.dtype)

    def inputs(self, device: torch.device) -> Inputs:
        """Draw q, k, v and the cotangent of o; agents are pooled from q."""
        drawn = Inputs.drawn((1, self.side**2, self.heads, self.head_dim), self.torch_dtype, device)
        if not self.agents:
            return drawn
        q = drawn.tensors[0]
        image = q.flatten(2).unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        pooled = F.adaptive_avg_pool2d(image, isqrt(self.agents)).flatten(2).mT
        agents = pooled.unflatten(2, q.shape[2:]).contiguous() * isqrt(self.side)
        return Inputs((*drawn.tensors, agents), drawn.cotangent)

    def formula(self) -> Callable[..., Tensor]:
        """Return the paper's formula, for all kinds but HiLo and Halo."""
        known: dict[str, Callable[..., Tensor]] = dict(
            linear=linfusion_formula, rala=rala_formula, inline=inline_formula, agent=agent_formula
        )
        return known[self.kind]

    def errors(self, computes: str, run: Callable[..., Tensor], inputs: Inputs, gradients: bool) -> dict[str, float]:
        """Check a candidate against float64.

        The formula in float32 sets the budget, see `budget_shares`; for a candidate that is itself the formula in the
        inputs' dtype, the formula in that dtype does. HiLo, Halo and dense attention are checked at sampled rows.
        """
        got = results_of(run, inputs, gradients)
        if computes == COPY:
            whole = [inputs.tensors[0], *[inputs.cotangent] * 3]
            return {"o": 0.0 if all(map(torch.equal, got[:4], whole)) else 2.0}
        narrow = self.torch_dtype if computes == LOOSE else torch.float32
        if self.windowed or computes == DENSE:
            rows = _sampled(self.side**2).to(got[0].device)
            true, near = (self._rows(computes, inputs, dtype, rows) for dtype in (torch.float64, narrow))
            return budget_shares([got[0][:, rows]], [true], [near.to(self.torch_dtype)], "o")
        exact: list[list[Tensor]] = []
        plain: list[list[Tensor]] = []
        for h in range(self.heads):
            one = Inputs(tuple(t[:, :, h : h + 1] for t in inputs.tensors), inputs.cotangent[:, :, h : h + 1])
            for results, dtype in ((exact, torch.float64), (plain, narrow)):
                wide = Inputs(tuple(t.to(dtype) for t in one.tensors), one.cotangent.to(dtype))
                results.append(results_of(self.formula(), wide, gradients))
        whole_exact, whole_plain = ([torch.cat(ts, 2) for ts in zip(*parts, strict=True)] for parts in (exact, plain))
        return budget_shares(got, whole_exact, [t.to(self.torch_dtype) for t in whole_plain], (*"oqkv", "agents"))

    def _rows(self, computes: str, inputs: Inputs, dtype: torch.dtype, rows: Tensor) -> Tensor:
        q, k, v = (t.to(dtype) for t in inputs.tensors[:3])
        if computes == DENSE:
            return dense_rows(q, k, v, rows)
        return (hilo_rows if self.kind == "hilo" else halo_rows)(q, k, v, self.grid, rows)

    def needed_flop(self, gradients: bool) -> int:
        """Count 4 D^2 operations per token and head, or 4 D per pair that is attended to; twice that for gradients."""
        N = self.side**2
        if self.kind == "agent":
            pairs = 2 * N * self.agents * self.heads
        elif self.kind == "halo":
            pairs = HALO.cells.pairs(self.grid) * self.heads
        elif self.kind == "hilo":
            pairs = N * (4 * (self.heads - self.heads // 2) + N // 4 * (self.heads // 2))
        else:
            pairs = N * self.head_dim * self.heads
        return (8 if gradients else 4) * self.head_dim * pairs


def _sampled(tokens: int) -> Tensor:
    drawn = torch.randint(tokens, (_ROWS,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor([0, tokens - 1]), drawn])


def linfusion_formula(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-4) -> Tensor:
    """LinFusion as its authors write it, https://github.com/Huage001/LinFusion."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _linear(F.elu(q) + 1, F.elu(k) + 1, v, eps)


def rala_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RALA's sums as its authors write them, without gate, rotation and convolution, https://github.com/qhfan/RALA."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
    logits = q.shape[-1] ** -0.5 * phi_q.mean(2, keepdim=True) @ phi_k.transpose(2, 3)
    return _linear(phi_q, phi_k * (k.shape[2] * logits.softmax(-1)).transpose(2, 3), v, 1e-6)


def _linear(phi_q: Tensor, phi_k: Tensor, v: Tensor, eps: float) -> Tensor:
    share = v.shape[2] ** -0.5
    normaliser = phi_q @ phi_k.mean(2, keepdim=True).transpose(2, 3) + eps
    return (phi_q @ ((phi_k * share).transpose(2, 3) @ (v * share)) / normaliser).transpose(1, 2)


def inline_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """InLine's sums as its authors write them, without the local residual, https://github.com/LeapLabTHU/InLine."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5
    share = (scale / k.shape[2]) ** 0.5
    state = (k * share).transpose(2, 3) @ (v * share)
    rest = 1 - q @ k.mean(2, keepdim=True).transpose(2, 3) * scale
    return (q @ state + rest * v.mean(2, keepdim=True)).transpose(1, 2)


def agent_formula(q: Tensor, k: Tensor, v: Tensor, agents: Tensor) -> Tensor:
    """Agent attention as its authors write it, without biases, https://github.com/LeapLabTHU/Agent-Attention."""
    q, k, v, agents = (t.transpose(1, 2) for t in (q, k, v, agents))
    scale = q.shape[-1] ** -0.5
    gathered = ((agents * scale) @ k.transpose(2, 3)).softmax(-1) @ v
    return (((q * scale) @ agents.transpose(2, 3)).softmax(-1) @ gathered).transpose(1, 2)


def dense_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Softmax attention of some queries, head by head."""
    heads = (slice(h, h + 1) for h in range(q.shape[2]))
    return torch.cat([_dense(q[:, rows, head], k[:, :, head], v[:, :, head]) for head in heads], 2)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)


def hilo_rows(q: Tensor, k: Tensor, v: Tensor, grid: Grid, rows: Tensor) -> Tensor:
    """HiLo of some queries, with windows of 2 x 2 and alpha 0.5: the first heads in windows, the last over means."""
    high = q.shape[2] // 2
    y, x = rows // grid.width // 2 * 2, rows % grid.width // 2 * 2
    places = torch.stack([(y + i) * grid.width + x + j for i in (0, 1) for j in (0, 1)], 1)  # [rows, 4]
    near, seen = (t[:, places.flatten(), :high].unflatten(1, (-1, 4)) for t in (k, v))
    logits = torch.einsum("bqhd,bqkhd->bqhk", q[:, rows, :high], near) * q.shape[-1] ** -0.5
    o = torch.einsum("bqhk,bqkhd->bqhd", logits.softmax(-1), seen)
    means = (t[:, :, high:].unflatten(1, (grid.height // 2, 2, grid.width // 2, 2)).mean((2, 4)) for t in (k, v))
    keys, values = (t.flatten(1, 2) for t in means)
    return torch.cat([o, dense_rows(q[:, :, high:], keys, values, rows)], 2)


def halo_rows(q: Tensor, k: Tensor, v: Tensor, grid: Grid, rows: Tensor) -> Tensor:
    """Halo attention of some queries: one after another, with the keys of its block and the halo."""
    (cell, _), (halo, _) = HALO.cells.cell, HALO.cells.around
    outputs = []
    for row in rows.tolist():
        top, left = (i // cell * cell - halo for i in divmod(row, grid.width))
        y, x = (
            torch.arange(max(first, 0), min(first + cell + 2 * halo, side), device=q.device)
            for first, side in ((top, grid.height), (left, grid.width))
        )
        places = (y[:, None] * grid.width + x).flatten()
        outputs.append(dense_rows(q, k[:, places], v[:, places], torch.tensor([row], device=q.device)))
    return torch.cat(outputs, 1)


def _ours(problem: LinearProblem, device: torch.device) -> Prepared:
    return _with_backend("triton" if device.type == "cuda" else "torch", problem, device)


def _with_backend(backend: str, problem: LinearProblem, device: torch.device) -> Prepared:
    del device
    if problem.kind == "linear":
        return Prepared(partial(linear_attention, eps=1e-4, backend=backend))
    if problem.kind == "rala":
        return Prepared(partial(rank_augmented_attention, backend=backend))
    if problem.kind == "inline":
        return Prepared(partial(injective_attention, backend=backend))
    if problem.kind == "agent":
        return Prepared(lambda q, k, v, agents: agent_attention(q, k, v, Agents(agents), backend=backend))
    spec = HALO if problem.kind == "halo" else HiLo(alpha=0.5, window_size=2)
    processor = spec.build(Layer(problem.kind, problem.heads, problem.head_dim, backend))
    return Prepared(lambda q, k, v: processor(q, k, v, problem.grid))


def _formula(compiled: bool, problem: LinearProblem, device: torch.device) -> Prepared:
    eager = _with_backend("torch", problem, device).run if problem.windowed else problem.formula()
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
    """Moves the bytes of the floor and no more: half are read and half are written."""

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
    """Return copies of `moved / 2` tensors; if `moved` is odd, the last copy is of half a tensor."""
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
