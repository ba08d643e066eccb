"""LinFusion's residual networks, both of a layer, and who computes them. Outputs are `[B, N, C]`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
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
from vision_attn.kernels.residual import Network, add_networks, run

SAME = "the same function"
_WEIGHTS = 6  # tensors of a network


@dataclass(frozen=True)
class ResidualProblem:
    """x + f(x) of two networks and one batch; see `Problem`. A call computes both, and returns the second.

    Args:
        layer: What has such layers, and at which side of a grid: 'sdxl-64'.
        tokens: N.
        channels: C.
        mid: Channels between the layers of a network.
        peers: Names of the candidates besides ours.
        dtype: Name of a torch dtype.
    """

    layer: str
    tokens: int
    channels: int
    mid: int
    peers: tuple[str, ...] = ("eager", "compiled")
    dtype: str = "bfloat16"
    group: str = "Residual networks"
    backward: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As in 'residual-sdxl-64', 'residual-sdxl-64-m40'."""
        words = ["residual", self.layer, *([f"m{self.mid}"] if self.mid != self.channels else [])]
        return "-".join([*words, *([SHORT_DTYPE[self.dtype]] if self.dtype != "bfloat16" else [])])

    @property
    def label(self) -> str:
        """As in '4096 tokens, 640 channels, 40 between the layers, bf16'."""
        return (
            f"{self.tokens} tokens, {self.channels} channels, {self.mid} between the layers, {SHORT_DTYPE[self.dtype]}"
        )

    def shape(self) -> dict[str, Any]:
        """Return batch, tokens, channels and dtype."""
        return dict(
            kind="residual", batch=1, tokens=self.tokens, channels=self.channels, mid=self.mid, dtype=self.dtype
        )

    def twin(self) -> "ResidualProblem":
        """Return a small problem, of a number of tokens that no tile divides."""
        return replace(self, layer="twin", tokens=201, channels=136, mid=min(self.mid, 72), peers=())

    def inputs(self, device: torch.device) -> Inputs:
        """Draw x and the weights of both networks."""
        draw, dtype = torch.Generator(device).manual_seed(0), getattr(torch, self.dtype)
        C, mid = self.channels, self.mid

        def normal(*shape: int) -> Tensor:
            t = torch.randn(shape, generator=draw, device=device)
            return (t * shape[1] ** -0.5 if len(shape) == 2 else t).to(dtype)

        shapes = (mid, C), (mid,), (mid,), (mid,), (C, mid), (C,)
        x, *weights = normal(1, self.tokens, C), *(normal(*shape) for _ in range(2) for shape in shapes)
        return Inputs((x, *weights), x)

    def errors(self, computes: str, run: Callable[..., Tensor], inputs: Inputs, gradients: bool) -> dict[str, float]:
        """Check a candidate against float64; the networks change places, so that each is once what is returned."""
        del computes, gradients
        x, *weights = inputs.tensors
        first, second = weights[:_WEIGHTS], weights[_WEIGHTS:]
        found: dict[str, float] = {}
        for name, pair in (("k", (*first, *second)), ("q", (*second, *first))):
            got = results_of(run, Inputs((x, *pair), x), False)
            with torch.no_grad():
                exact, plain = (_networks(*(t.to(kind) for t in (x, *pair)))[1] for kind in (torch.float64, x.dtype))
            found |= budget_shares(got, [exact], [plain], [name])
        return found

    def needed_flop(self, gradients: bool) -> int:
        """Count the operations of four products."""
        del gradients
        return 8 * self.tokens * self.channels * self.mid


def _pair(weights: Sequence[Any]) -> tuple[Network, Network]:
    return Network(*weights[:_WEIGHTS]), Network(*weights[_WEIGHTS:])


def _networks(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """Return both sums by PyTorch's operators."""
    return [x + run(x, network) for network in _pair(weights)]


def _ours(problem: ResidualProblem, device: torch.device) -> Prepared:
    del problem
    backend = "triton" if device.type == "cuda" else "torch"
    return Prepared(lambda x, *weights: add_networks(x, _pair(weights), backend=backend)[1])


def _eager(problem: ResidualProblem, device: torch.device) -> Prepared:
    del problem, device
    return Prepared(lambda *tensors: _networks(*tensors)[1])


def _compiled(problem: ResidualProblem, device: torch.device) -> Prepared:
    del problem
    if device.type == "cpu":
        raise AbsentError("compiled for CUDA only")
    torch._dynamo.reset()
    both = torch.compile(_networks, fullgraph=True, dynamic=False)
    return Prepared(lambda *tensors: both(*tensors)[1])


CANDIDATES = (Candidate("ours", SAME, _ours), Candidate("eager", SAME, _eager), Candidate("compiled", SAME, _compiled))
