"""What is compared with what: a problem, the candidates that solve it, and what makes one of them wrong or absent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

SHORT_DTYPE = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class AbsentError(Exception):
    """A candidate does not take part; the message is the reason that is reported."""


def reason_of(error: Exception) -> str:
    """Return in one line why a candidate is absent: the message of an `AbsentError`, or what failed."""
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, AbsentError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {first}"
    return f"cannot run: {type(error).__name__}: {first}"


@dataclass(frozen=True)
class Arranged:
    """A candidate for tensors in an order of its own, in which a model could keep them: the way there is not timed.

    Args:
        arrange: Puts an input, or the cotangent of the output, in that order.
        run: As that of `Prepared`, from such inputs to such an output.
    """

    arrange: Callable[[Tensor], Tensor]
    run: Callable[..., Tensor]


@dataclass(frozen=True)
class Prepared:
    """A candidate made ready for one problem.

    Args:
        run: From the problem's inputs to the output; differentiable where the problem times its backward.
        visited_flop: Floating-point operations of one forward as its tiles or blocks do them, masked pairs included;
            None if unknown.
        timed: What is timed in the place of `run`, if that is not `run` itself; `run` is checked.
    """

    run: Callable[..., Tensor]
    visited_flop: int | None = None
    timed: Arranged | None = None

    def to_time(self, inputs: "Inputs") -> tuple[Callable[..., Tensor], "Inputs"]:
        """Return what is timed, and what it is called with."""
        if self.timed is None:
            return self.run, inputs
        arrange = self.timed.arrange
        return self.timed.run, Inputs(tuple(map(arrange, inputs.tensors)), arrange(inputs.cotangent))


@dataclass(frozen=True)
class Candidate:
    """One way to solve problems of a kind.

    Args:
        name: Short and stable: a key of the JSON and a column of the tables.
        computes: The function: one that the problem's `errors` knows. A baseline may compute another one than ours.
        prepare: Makes it ready, outside of the timing; raises `AbsentError` if it cannot run.
    """

    name: str
    computes: str
    prepare: Callable[[Any, torch.device], Prepared]


@dataclass(frozen=True)
class Inputs:
    """Tensors of one problem: what a candidate is called with, and the cotangent of its output."""

    tensors: tuple[Tensor, ...]
    cotangent: Tensor

    @classmethod
    def drawn(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> "Inputs":
        """Draw q, k, v and the cotangent of o from a normal distribution, the same each time."""
        draw = torch.Generator(device).manual_seed(0)
        q, k, v, do = (torch.randn(shape, generator=draw, device=device, dtype=dtype) for _ in range(4))
        return cls((q, k, v), do)

    def leaves(self) -> tuple[Tensor, ...]:
        """Return the tensors, on the same memory, as leaves of a new graph."""
        return tuple(t.detach().requires_grad_() for t in self.tensors)


class Problem(Protocol):
    """One case of a comparison of functions: frozen, hashable, and drawn anew from a seed."""

    @property
    def name(self) -> str:
        """A name without spaces, unique in the entry: `--only` selects by it."""

    @property
    def label(self) -> str:
        """The first cell of its line in a table."""

    @property
    def group(self) -> str:
        """The table it belongs to."""

    @property
    def peers(self) -> Sequence[str]:
        """Names of the candidates besides ours."""

    @property
    def backward(self) -> Sequence[str]:
        """Names of the candidates whose backward is timed too."""

    def shape(self) -> dict[str, Any]:
        """Return what defines the case, for the JSON."""

    def twin(self) -> "Problem":
        """Return the same problem, small enough to be checked whole against the definition."""

    def inputs(self, device: torch.device) -> Inputs:
        """Draw the inputs."""

    def errors(self, computes: str, run: Callable[..., Tensor], inputs: Inputs, gradients: bool) -> dict[str, float]:
        """Return, by result, the error against float64 as a share of its budget: above 1, or NaN, is wrong."""

    def needed_flop(self, gradients: bool) -> int:
        """Return the operations that the forward, or its gradients, cannot do without."""


def results_of(run: Callable[..., Tensor], inputs: Inputs, gradients: bool) -> list[Tensor]:
    """Return the output and, if asked for, the gradients of all inputs.

    Free memory is filled with NaN first, so that what a candidate never writes cannot be right.

    Raises:
        AbsentError: If the output does not have the shape and dtype of the first input.
    """
    q = inputs.tensors[0]
    poison = [torch.full_like(q, torch.nan) for _ in range(4)]
    poison.clear()
    with torch.set_grad_enabled(gradients):
        leaves = inputs.leaves() if gradients else inputs.tensors
        o = run(*leaves)
    if o.shape != q.shape or o.dtype != q.dtype:
        raise AbsentError(f"wrong: the output is {tuple(o.shape)} {o.dtype}, not {tuple(q.shape)} {q.dtype}")
    return [o.detach(), *(torch.autograd.grad(o, leaves, inputs.cotangent) if gradients else ())]


def budget_shares(
    got: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor], names: Sequence[str]
) -> dict[str, float]:
    """Return the largest error of each result as a share of its budget.

    The budget is twice the error of a plain implementation plus twice one rounding of the largest value.

    Args:
        got: Results of a candidate.
        exact: The same in float64.
        plain: The same by the plain implementation, rounded to the dtype of `got`.
        names: Of the results; the shortest of the four sequences counts.
    """
    shares = {}
    for name, a, e, p in zip(names, got, exact, plain, strict=False):
        rounding = torch.finfo(p.dtype).eps * e.abs().max() + 1e-6
        budget = 2 * ((p.double() - e).abs().max() + rounding)
        shares[name] = ((a.double() - e).abs().max() / budget).item()
    return shares
