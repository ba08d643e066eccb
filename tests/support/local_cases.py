"""Rows of local attention: their inputs, how they are called, and error budgets."""

import math
from dataclasses import dataclass, field

import torch

from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention


@dataclass(frozen=True)
class Case:
    """One row: a grid, a window, and what else the call has."""

    grid: Grid
    window: dict
    mask: bool = False
    bias: bool = False
    pooled: int = 0
    head_dim: int = 32
    strided: bool = False
    scale: float | None = None
    extra: dict = field(default_factory=dict)

    def __str__(self):
        g, window = self.grid, "-".join(f"{k}{v}" for k, v in self.window.items())
        flags = [k for k in ("mask", "bias", "pooled", "strided", "scale") if getattr(self, k)]
        return "-".join(
            [f"{g.prefix}+{g.height}x{g.width}+{g.suffix}", window.replace(" ", ""), f"D{self.head_dim}", *flags]
        )


CASES = [
    Case(Grid(16, 24), dict(radius=4)),
    Case(Grid(16, 24, prefix=1), dict(radius=1)),
    Case(Grid(13, 19, prefix=77), dict(radius=2.5), mask=True),
    Case(Grid(13, 19, prefix=5, suffix=9), dict(radius=6), mask=True, pooled=7),
    Case(Grid(16, 16, prefix=512), dict(radius=8), pooled=16, head_dim=64),
    Case(Grid(40, 9, suffix=3), dict(radius=9), head_dim=40),
    Case(Grid(9, 40), dict(radius=17), strided=True),
    Case(Grid(7, 11, prefix=2), dict(radius=math.inf), pooled=3, mask=True),
    Case(Grid(1, 17, prefix=1), dict(radius=3)),
    Case(Grid(17, 1), dict(radius=3)),
    Case(Grid(3, 2), dict(radius=50.5)),
    Case(Grid(12, 20), dict(kernel_size=7), bias=True),
    Case(Grid(12, 20, prefix=4), dict(kernel_size=3), bias=True, mask=True, strided=True),
    Case(Grid(11, 14), dict(kernel_size=4), scale=0.3),
    Case(Grid(11, 14, suffix=6), dict(kernel_size=(3, 6), dilation=(3, 2)), bias=True, pooled=5),
    Case(Grid(15, 21, prefix=1), dict(kernel_size=5, dilation=3), bias=True, head_dim=128),
    Case(Grid(9, 13), dict(kernel_size=3, dilation=2)),
    Case(Grid(40, 36), dict(kernel_size=(19, 33))),
    Case(Grid(9, 30), dict(kernel_size=(9, 30)), bias=True),
    Case(Grid(8, 9), dict(kernel_size=1)),
]

COUNTED = [  # Triton's kernels do not count the tokens of pooled keys
    Case(Grid(16, 24, prefix=3), dict(radius=4, cell=4), pooled=24),
    Case(Grid(12, 18, prefix=5, suffix=9), dict(radius=6.5, cell=3), mask=True, pooled=24),
    Case(Grid(40, 8, suffix=3), dict(radius=9, cell=2), pooled=80, strided=True),
    Case(Grid(4, 36), dict(radius=17, cell=4), pooled=9, head_dim=40, scale=0.3),
    Case(Grid(6, 4, prefix=2), dict(radius=math.inf, cell=2), pooled=6),
]


def draw(case, dtype=torch.float64, batch=2, heads=3):
    """Return q, k, v, the window, the mask, and all tensors that take gradients."""
    shape = (batch, case.grid.tokens, heads, case.head_dim)

    def tensor(*size):
        return torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_()

    if case.strided:
        q, k, v = (tensor(batch, heads, shape[1], case.head_dim).transpose(1, 2) for _ in range(3))
    else:
        q, k, v = (tensor(*shape) for _ in range(3))
    leaves, parts = [q, k, v], {}
    if case.bias:
        sides = [2 * K - 1 for K in Window(**case.window).kernel]
        parts["bias"] = tensor(heads, *sides)
        leaves.append(parts["bias"])
    if case.pooled:
        parts["pooled"] = tuple(tensor(batch, case.pooled, heads, case.head_dim) for _ in range(2))
        leaves += parts["pooled"]
    mask = torch.rand(batch, case.grid.prefix + case.grid.suffix) > 0.4 if case.mask else None
    return q, k, v, Window(**case.window, **parts), mask, leaves


def run(case, inputs, backend):
    """Return the output and the gradients of all leaves for a cosine cotangent."""
    q, k, v, window, mask, leaves = inputs
    o = local_attention(q, k, v, case.grid, window, mask=mask, scale=case.scale, backend=backend)
    cotangent = torch.cos(0.7 * torch.arange(o.numel(), dtype=torch.float64)).view_as(o).to(o.dtype)
    return [o, *torch.autograd.grad(o, leaves, cotangent)]


def exact_and_plain(case, dtype, batch=2, heads=3, *, eighths=False):
    """Return inputs of `dtype`, and the definition's results in float64 on the same values.

    With `eighths`, queries and keys are multiples of 1/8: their products are exact in float32, in any order.
    """
    torch.manual_seed(0)
    low = draw(case, dtype, batch, heads)
    if eighths:
        with torch.no_grad():
            for t in low[:2]:
                t.copy_((8 * t).round() / 8)
    torch.manual_seed(0)
    high = draw(case, batch=batch, heads=heads)
    with torch.no_grad():
        for a, b in zip(high[5], low[5], strict=True):
            a.copy_(b.double())
    return low, run(case, high, "reference")


def within_budget(ours, plain, exact, dtype):
    """At most twice the error of plain PyTorch and one rounding; zero gradients are sums in float32."""
    rounding = torch.finfo(dtype).eps * exact.abs().max() + 1e-6
    return ours.dtype == dtype and (ours - exact).abs().max() <= 2 * ((plain - exact).abs().max() + rounding)
