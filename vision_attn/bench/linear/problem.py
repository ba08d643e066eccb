"""One case of the linear family: LinFusion's, RALA's, agent or HiLo attention on a square grid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.bench.candidate import Inputs
from vision_attn.bench.linear import formulas
from vision_attn.grid import Grid

# What a candidate can compute.
SAME, LOOSE, DENSE, COPY = "the same function", "the paper's formula in this dtype", "dense attention", "a copy"
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_ROWS = 24


@dataclass(frozen=True)
class LinearProblem:
    """Attention of batch 1 on a square grid; see `Problem`.

    Args:
        group: The table it belongs to.
        kind: 'linear', 'rala', 'agent' or 'hilo'.
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
        return "-".join([*words, *([_SHORT[self.dtype]] if self.dtype != "bfloat16" else [])])

    @property
    def label(self) -> str:
        """As in '65536 tokens, 10 heads, D 64, bf16, floor 335.5 MB'."""
        agents = f", {self.agents} agents" if self.agents else ""
        size = f"{self.heads} heads, D {self.head_dim}, {_SHORT[self.dtype]}, floor {self.moved(False) / 1e6:.1f} MB"
        return f"{self.side**2} tokens{agents}, {size}"

    @property
    def grid(self) -> Grid:
        """The grid."""
        return Grid(self.side, self.side)

    def tensors_moved(self, gradients: bool) -> int:
        """Count the tensors `[1, N, H, D]` that must be read or written.

        Forward: q, k, v and o; RALA reads q once more for its mean. Backward: q, k, v and the gradients of all four.
        """
        return 7 if gradients else 5 if self.kind == "rala" else 4

    def moved(self, gradients: bool) -> int:
        """Count the bytes of these tensors: what 'copy' moves."""
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
        """Draw q, k, v and the cotangent of o from a normal distribution; agents are pooled from q."""
        draw = torch.Generator(device).manual_seed(0)
        shape = 1, self.side**2, self.heads, self.head_dim
        q, k, v, do = (torch.randn(shape, generator=draw, device=device, dtype=self.torch_dtype) for _ in range(4))
        if not self.agents:
            return Inputs((q, k, v), do)
        image = q.flatten(2).unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        agents = F.adaptive_avg_pool2d(image, isqrt(self.agents)).flatten(2).mT
        return Inputs((q, k, v, agents.unflatten(2, q.shape[2:]).contiguous() * isqrt(self.side)), do)

    def formula(self) -> Callable[..., Tensor]:
        """Return the paper's formula, for all kinds but HiLo."""
        known: dict[str, Callable[..., Tensor]] = dict(
            linear=formulas.linfusion, rala=formulas.rala, agent=formulas.agent
        )
        return known[self.kind]

    def errors(self, computes: str, run: Callable[..., Tensor], inputs: Inputs, gradients: bool) -> dict[str, float]:
        """Check a candidate against float64.

        The budget is twice the error of the formula in float32, rounded to the dtype, plus twice one rounding of the
        largest value; for the formula in the dtype itself, its own error stands in. HiLo and dense attention are
        checked at sampled rows.
        """
        got = _results(run, inputs, gradients)
        if computes == COPY:
            whole = [inputs.tensors[0], *[inputs.cotangent] * 3]
            return {"o": 0.0 if all(map(torch.equal, got[:4], whole)) else 2.0}
        narrow = self.torch_dtype if computes == LOOSE else torch.float32
        if self.kind == "hilo" or computes == DENSE:
            rows = _sampled(self.side**2).to(got[0].device)
            true, near = (self._rows(computes, inputs, dtype, rows) for dtype in (torch.float64, narrow))
            return _shares([got[0][:, rows]], [true], [near.to(self.torch_dtype)])
        exact: list[list[Tensor]] = []
        plain: list[list[Tensor]] = []
        for h in range(self.heads):
            one = Inputs(tuple(t[:, :, h : h + 1] for t in inputs.tensors), inputs.cotangent[:, :, h : h + 1])
            for results, dtype in ((exact, torch.float64), (plain, narrow)):
                wide = Inputs(tuple(t.to(dtype) for t in one.tensors), one.cotangent.to(dtype))
                results.append(_results(self.formula(), wide, gradients))
        whole_exact, whole_plain = ([torch.cat(ts, 2) for ts in zip(*parts, strict=True)] for parts in (exact, plain))
        return _shares(got, whole_exact, [t.to(self.torch_dtype) for t in whole_plain])

    def _rows(self, computes: str, inputs: Inputs, dtype: torch.dtype, rows: Tensor) -> Tensor:
        q, k, v = (t.to(dtype) for t in inputs.tensors[:3])
        if computes == DENSE:
            return formulas.dense_rows(q, k, v, rows)
        return formulas.hilo_rows(q, k, v, self.grid, rows)

    def needed_flop(self, gradients: bool) -> int:
        """Count the operations of the products: 4 D^2 a token and head, or 4 D a pair, and twice that for gradients."""
        N = self.side**2
        if self.kind == "agent":
            pairs = 2 * N * self.agents * self.heads
        elif self.kind == "hilo":
            pairs = N * (4 * (self.heads - self.heads // 2) + N // 4 * (self.heads // 2))
        else:
            pairs = N * self.head_dim * self.heads
        return (8 if gradients else 4) * self.head_dim * pairs


def _results(run: Callable[..., Tensor], inputs: Inputs, gradients: bool) -> list[Tensor]:
    with torch.set_grad_enabled(gradients):
        leaves = inputs.leaves() if gradients else inputs.tensors
        o = run(*leaves)
    return [o.detach(), *(torch.autograd.grad(o, leaves, inputs.cotangent) if gradients else ())]


def _sampled(tokens: int) -> Tensor:
    drawn = torch.randint(tokens, (_ROWS,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor([0, tokens - 1]), drawn])


def _shares(got: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor]) -> dict[str, float]:
    shares = {}
    for name, a, e, p in zip(("o", "q", "k", "v", "agents"), got, exact, plain, strict=False):
        rounding = torch.finfo(p.dtype).eps * e.abs().max() + 1e-6
        shares[name] = ((a.double() - e).abs().max() / (2 * ((p.double() - e).abs().max() + rounding))).item()
    return shares
