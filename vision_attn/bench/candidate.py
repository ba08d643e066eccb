"""What is compared with what: a problem, the candidates that solve it, and why one of them may be absent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class AbsentError(Exception):
    """A candidate does not take part; the message is the reason that is reported."""


@dataclass(frozen=True)
class Prepared:
    """A candidate made ready for one problem.

    Args:
        run: From the problem's inputs to the output; differentiable where the problem times its backward.
        visited_flop: Floating-point operations of one forward as its tiles or blocks do them, masked pairs included;
            None if unknown.
    """

    run: Callable[..., Tensor]
    visited_flop: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to solve problems of a kind.

    Args:
        name: Short and stable: a key of the JSON and a column of the tables.
        computes: The function: one that the problem's `errors` knows. A baseline computes another one than the subject.
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

    def leaves(self) -> tuple[Tensor, ...]:
        """Return the tensors, on the same memory, as leaves of a new graph."""
        return tuple(t.detach().requires_grad_() for t in self.tensors)


class Problem(Protocol):
    """One case of a comparison of functions: frozen, hashable, and drawn anew from a seed."""

    @property
    def name(self) -> str:
        """A name without spaces, unique in the entry: what `--only` selects by."""

    @property
    def label(self) -> str:
        """The first cell of its line in a table."""

    @property
    def group(self) -> str:
        """The table it belongs to."""

    @property
    def backward(self) -> Sequence[str]:
        """Names of the candidates whose backward is timed too."""

    def shape(self) -> dict[str, Any]:
        """Return what defines the case, for the JSON."""

    def twin(self) -> "Problem":
        """Return the same problem at a size that the definition can check whole."""

    def inputs(self, device: torch.device) -> Inputs:
        """Draw the inputs."""

    def errors(self, computes: str, run: Callable[..., Tensor], inputs: Inputs, gradients: bool) -> dict[str, float]:
        """Return, by result, the error against float64 as a share of its budget: above 1, or NaN, is wrong."""

    def needed_flop(self, gradients: bool) -> int:
        """Return the operations that the forward, or its gradients, cannot do without."""
