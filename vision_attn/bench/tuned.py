"""What `vision-attn tune` times and checks: a call of an operator for each row of the tables of launches."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.agent import Agents, agent_attention
from vision_attn.kernels.hedgehog import hedgehog
from vision_attn.kernels.launches import Row
from vision_attn.kernels.linear import Features, feature_mean, linear_attention
from vision_attn.kernels.linear_local import linear_local_attention
from vision_attn.kernels.local import Window, local_attention
from vision_attn.kernels.multipole import Cells, multipole_attention
from vision_attn.kernels.multipole.cells import choose_cells
from vision_attn.kernels.residual import Network, add_networks
from vision_attn.kernels.residual.op import WIDEST
from vision_attn.kernels.window import window_attention

_CHECKED = 20  # side of the grid that is checked
_PREFIX = 64  # tokens outside the grid, of operators that know one

# Timed by a call of which operator, and whether by its backward.
KERNELS: dict[str, tuple[str, bool]] = {
    "local.forward": ("local", False),
    "local.queries": ("local", True),
    "local.keys": ("local", True),
    "local.eight_bit": ("local_eight_bit", False),
    "linear.state": ("linear", False),
    "linear.heavy_state": ("rala", False),
    "linear.output": ("linear", False),
    "linear.scaled_output": ("linear", False),
    "linear.queries": ("linear", True),
    "linear.keys": ("linear", True),
    "linear.mean": ("rala", False),
    "linear.wide_output": ("features", False),
    "linear.wide_queries": ("features", True),
    "linear.wide_keys": ("features", True),
    "agent.forward": ("agent", False),
    "agent.queries": ("agent", True),
    "pairs.keys": ("agent", True),
    "window.forward": ("window", False),
    "window.queries": ("window", True),
    "window.keys": ("window", True),
    "linear_local.forward": ("linear_local", False),
    "linear_local.queries": ("linear_local", True),
    "linear_local.keys": ("linear_local", True),
    "hedgehog.features": ("hedgehog", False),
    "residual.hidden": ("residual", False),
    "residual.added": ("residual", False),
    "multipole.forward": ("multipole", False),
    "multipole.gradients": ("multipole", True),
    "multipole.eight_bit": ("multipole_eight_bit", False),
}
_FOR_INFERENCE = ("hedgehog", "residual")  # operators whose kernels have no gradient, and that have no `reference`
OPERATORS = tuple(dict.fromkeys(kernel.split(".")[0] for kernel in KERNELS if not kernel.startswith("pairs")))


@dataclass(frozen=True)
class Case:
    """A row of a table and what times it."""

    kernel: str
    row: Row

    @property
    def operator(self) -> str:
        """The operator that is called."""
        return KERNELS[self.kernel][0]

    @property
    def backward(self) -> bool:
        """Whether the backward is timed."""
        return KERNELS[self.kernel][1]

    @property
    def rounded(self) -> bool:
        """Whether the operator rounds to 8 bits."""
        return self.operator.endswith("eight_bit")

    @property
    def trained(self) -> bool:
        """Whether the operator has a gradient."""
        return not self.rounded and self.operator not in _FOR_INFERENCE

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the call."""
        if self.row.size == 2 and "scaled" in self.kernel:
            return torch.float16
        return torch.bfloat16 if self.row.size == 2 else torch.float32

    @property
    def window(self) -> Window:
        """The widest odd window that the row is for; a disc of radius 16 if it is for any."""
        columns = self.row.columns
        return Window(radius=16) if columns == math.inf else Window(kernel_size=int(columns) - 1 + int(columns) % 2)

    def __str__(self) -> str:
        columns = "" if self.row.columns == math.inf else f" window {self.row.columns:g}"
        return f"{self.kernel} {8 * self.row.size} bits D {self.row.channels}{columns}"


class Budget:
    """Whether a launch computes what the definition does: errors within twice those of plain PyTorch and rounding.

    What is rounded to 8 bits has no definition in float64. There a launch must compute what that of the tables does,
    but for rounding.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        if case.rounded:
            self.exact = self._results(case.dtype, "triton")
            self.most = [2 * torch.finfo(case.dtype).eps * float(e.abs().max()) for e in self.exact]
            return
        self.exact = self._results(torch.float64, "reference")
        plain = self._results(case.dtype, "reference")
        eps = torch.finfo(case.dtype).eps
        self.most = [
            2 * float((p - e).abs().max() + eps * e.abs().max() + 1e-6) for p, e in zip(plain, self.exact, strict=True)
        ]

    def holds(self) -> bool:
        """Return whether the launch that is tried now is right."""
        found = self._results(self.case.dtype, "triton")
        pairs = zip(found, self.exact, self.most, strict=True)
        return all(bool(torch.isfinite(a).all()) and float((a - e).abs().max()) <= most for a, e, most in pairs)

    def _results(self, dtype: torch.dtype, backend: str) -> list[Tensor]:
        case = self.case
        function, tensors, do = operator_call(case, _CHECKED, self.device, dtype, heads=2)
        if not case.trained:
            with torch.no_grad():
                return [function(*tensors, backend=_named(case, backend)).double()]
        leaves = [t.requires_grad_() for t in tensors]
        o = function(*leaves, backend=_named(case, backend))
        return [t.detach().double() for t in (o, *torch.autograd.grad(o, leaves, do))]


def _named(case: Case, backend: str) -> str:
    return "torch" if case.operator in _FOR_INFERENCE and backend == "reference" else backend


def problem(case: Case, side: int, device: torch.device, heads: int | None = None) -> Callable[[], object]:
    """Return a call to time, of a grid of `side` x `side` tokens."""
    heads = max(4, 1280 // case.row.channels) if heads is None else heads
    function, tensors, do = operator_call(case, side, device, case.dtype, heads=heads)
    if not case.backward:

        def forward() -> object:
            with torch.no_grad():
                return function(*tensors, backend="triton")

        return forward
    leaves = [t.requires_grad_() for t in tensors]
    o = function(*leaves, backend="triton")
    return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)


def operator_call(
    case: Case, side: int, device: torch.device, dtype: torch.dtype, *, heads: int
) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """Return the operator of a case as a function of tensors, these, and a gradient of its output."""
    D, generator = case.row.channels, torch.Generator(device).manual_seed(0)
    whole = case.operator in ("linear", "features", "rala", "agent", *_FOR_INFERENCE)
    grid = Grid(side, side, prefix=0 if whole else _PREFIX)

    def draw(*shape: int) -> Tensor:
        # drawn in bfloat16, so that all dtypes get the same numbers
        return torch.randn(shape, generator=generator, device=device).bfloat16().to(dtype)

    q, k, v, do = (draw(1, grid.tokens, heads, D) for _ in range(4))
    if case.operator == "agent":
        a = draw(1, 49, heads, D)
        return lambda q, k, v, backend: agent_attention(q, k, v, Agents(a), backend=backend), [q, k, v], do
    if case.operator == "features":
        a, b = (draw(1, grid.tokens, heads, 512).abs() for _ in range(2))
        none = Features("none")
        return lambda a, b, v, backend: linear_attention(a, b, v, features=none, backend=backend), [a, b, v], do
    if case.operator == "hedgehog":
        weight = draw(heads, D, D).float() / D**0.5
        return lambda x, backend: hedgehog(x, weight.to(x.dtype), backend=backend), [q], do
    if case.operator == "residual":
        C, mid = heads * D, D if D < WIDEST else heads * D
        shapes = (mid, C), (mid,), (mid,), (mid,), (C, mid), (C,)
        networks = [Network(*[draw(*shape) / shape[-1] ** 0.5 for shape in shapes]) for _ in range(2)]
        return (
            lambda x, backend: add_networks(x.flatten(2), tuple(networks), backend=backend)[1].view_as(x), [q], do
        )  # fmt: skip
    if case.operator == "linear_local":
        a, b = (draw(1, grid.tokens, heads, min(2 * D, 256)).abs() for _ in range(2))
        gate = torch.ones(heads, device=device)
        return (
            lambda q, k, v, a, b, backend: linear_local_attention((q, a), (k, b), v, grid, 8, gate, backend=backend),
            [q, k, v, a, b], do[:, grid.image],
        )  # fmt: skip
    cells = Cells()
    if case.operator.startswith("multipole") and side == _CHECKED:  # rounding chooses other cells in each dtype
        chosen = choose_cells(q.double(), k.double(), grid, cells, scale=D**-0.5)
        cells = replace(cells, chosen=chosen)
    functions: dict[str, Callable[..., Tensor]] = {
        "local_eight_bit": lambda q, k, v, backend: local_attention(
            q, k, v, grid, replace(case.window, precision="int8"), backend=backend
        ),
        "multipole_eight_bit": lambda q, k, v, backend: multipole_attention(
            q, k, v, grid, replace(cells, precision="int8"), backend=backend
        ),
        "local": lambda q, k, v, backend: local_attention(q, k, v, grid, case.window, backend=backend),
        "multipole": lambda q, k, v, backend: multipole_attention(q, k, v, grid, cells, backend=backend),
        "window": lambda q, k, v, backend: window_attention(q, k, v, grid, 8, backend=backend),
        "linear": lambda q, k, v, backend: linear_attention(q, k, v, backend=backend),
        "rala": lambda q, k, v, backend: linear_attention(
            q, k, v, global_query=feature_mean(q, backend=backend).to(torch.promote_types(q.dtype, torch.float32))
            * D**-0.5, backend=backend,
        ),
    }  # fmt: skip
    return functions[case.operator], [q, k, v], do
