"""One case of local attention: a grid, a window, heads and a dtype, and the definition that candidates are held to.

The definition is written from coordinates alone and shares no code with the operator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vision_attn.bench.candidate import SHORT_DTYPE, Inputs, budget_shares, results_of
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window

# What a candidate can compute.
LOCAL, DENSE, UNDILATED = "the same function", "dense attention", "the same window without dilation"
EIGHT_BITS = "the same function, rounded to 8 bits"
_E4M3 = 2.0**-4  # the largest relative error of a number of three bits behind the first
_WHOLE = 2000  # up to this many tokens everything is checked
_ROWS, _KEYS = 24, 2


@dataclass(frozen=True)
class LocalProblem:
    """Local attention of batch 1; see `Problem`.

    Args:
        group: The table it belongs to.
        grid: Where the image tokens lie.
        window: Disc or square, without a bias and without pooled keys.
        peers: Names of the candidates besides ours.
        backward: Names of the candidates whose backward is timed too.
        heads: H.
        head_dim: D.
        dtype: Name of a torch dtype.
    """

    group: str
    grid: Grid
    window: Window
    peers: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    heads: int = 24
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """As in 'disc-128-r16', 'dilated-128-k7', 'square-64-k13-d64-fp16'."""
        window, side = self.window, f"{self.grid.height}"
        if self.grid.height != self.grid.width:
            side += f"x{self.grid.width}"
        if window.radius is not None:
            words = ["disc", side, f"r{window.radius}"]
        else:
            words = ["square" if window.steps == (1, 1) else "dilated", side, f"k{window.kernel[0]}"]
        words += [f"d{self.head_dim}"] if self.head_dim != 128 else []
        return "-".join([*words, *([SHORT_DTYPE[self.dtype]] if self.dtype != "bfloat16" else [])])

    @property
    def label(self) -> str:
        """As in '128 x 128, radius 16, D 128, bf16'."""
        window = self.window
        size = f"radius {window.radius}" if window.radius is not None else f"K {window.kernel[0]}"
        size += "" if window.radius is not None or window.steps == (1, 1) else f", dilation {window.steps[0]}"
        return f"{self.grid.height} x {self.grid.width}, {size}, D {self.head_dim}, {SHORT_DTYPE[self.dtype]}"

    def shape(self) -> dict[str, Any]:
        """Return batch, heads, channels, dtype, grid and window."""
        window: dict[str, Any] = dict(radius=self.window.radius)
        if self.window.radius is None:
            window = dict(kernel_size=list(self.window.kernel), dilation=list(self.window.steps))
        grid = dict(height=self.grid.height, width=self.grid.width, prefix=self.grid.prefix, suffix=self.grid.suffix)
        return dict(batch=1, heads=self.heads, head_dim=self.head_dim, dtype=self.dtype, **grid, **window)

    def twin(self) -> "LocalProblem":
        """Return a small problem of the same kind: fewer heads, a smaller grid, a window of at most 8 or 13 tokens."""
        window = self.window
        if window.radius is not None:
            window = Window(radius=min(window.radius, 8))
        else:
            window = Window(kernel_size=min(13, *window.kernel), dilation=window.dilation)
        grid = Grid(32, 48, min(self.grid.prefix, 128), min(self.grid.suffix, 128))
        return replace(self, group="twin", grid=grid, window=window, heads=min(self.heads, 3), peers=(), backward=())

    def inputs(self, device: torch.device) -> Inputs:
        """Draw q, k, v and the cotangent of o."""
        return Inputs.drawn((1, self.grid.tokens, self.heads, self.head_dim), self.torch_dtype, device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names."""
        return getattr(torch, self.dtype)

    def errors(self, computes: str, run: Callable[..., Tensor], inputs: Inputs, gradients: bool) -> dict[str, float]:
        """Check a candidate that computes one of `LOCAL`, `DENSE`, `UNDILATED`, `EIGHT_BITS`."""
        if computes == EIGHT_BITS:
            return eight_bit_errors(run, inputs, self.grid, self.window)
        window: Window | None = {LOCAL: self.window, DENSE: None, UNDILATED: self.undilated()}[computes]
        return errors(run, inputs, self.grid, window, gradients)

    def undilated(self) -> Window:
        """The window without its dilation."""
        return self.window if self.window.radius is not None else Window(kernel_size=self.window.kernel)

    def needed_flop(self, gradients: bool) -> int:
        """Count 4 D operations per attended pair and head (two products), 10 D for the gradients (five)."""
        return (10 if gradients else 4) * self.head_dim * self.heads * needed_pairs(self.grid, self.window)


def needed_pairs(grid: Grid, window: Window) -> int:
    """Count the attended pairs of one head, with the dense rows and columns of the tokens outside the grid."""
    outside = grid.prefix + grid.suffix
    return window.pairs(grid) + outside * (grid.image_tokens + grid.tokens)


def errors(
    run: Callable[..., Tensor], inputs: Inputs, grid: Grid, window: Window | None, gradients: bool
) -> dict[str, float]:
    """Return the errors of output and gradients as shares of their budgets.

    The definition in float32 sets the budget, see `budget_shares`. A long sequence is checked at sampled query rows (o
    and the gradient of q) and at sampled keys of one head each (gradients of k and v); for such a key, all queries that
    see it are computed.

    Args:
        run: The candidate, from q, k, v to o.
        inputs: q, k, v and the cotangent.
        grid: Where the image tokens lie.
        window: What it should compute, None for dense attention.
        gradients: Whether to check them too.
    """
    got = results_of(run, inputs, gradients)
    every = torch.arange(grid.tokens, device=got[0].device)
    if grid.tokens <= _WHOLE:
        return budget_shares(got, *_exact_and_plain(inputs, gradients, seen(grid, window, every, every), every), "oqkv")
    rows = _sample(grid).to(every.device)
    exact, plain = _exact_and_plain(inputs, gradients, seen(grid, window, rows, every), rows)
    shares = budget_shares([t[:, rows] for t in got[:2]], exact[:2], plain[:2], "oq")
    for turn, key in enumerate(_sample(grid)[-_KEYS:].tolist() if gradients else []):
        head = slice(turn % got[0].shape[2], turn % got[0].shape[2] + 1)
        one = Inputs(tuple(t[:, :, head] for t in inputs.tensors), inputs.cotangent[:, :, head])
        queries = every[seen(grid, window, every, every[key : key + 1])[:, 0]]
        both = _exact_and_plain(one, True, seen(grid, window, queries, every), queries)
        mine = [t[:, key : key + 1, head] for t in got[2:]]
        exact, plain = ([t[:, key : key + 1] for t in ts[2:]] for ts in both)
        shares |= budget_shares(mine, exact, plain, (f"k[{key}]", f"v[{key}]"))
    return shares


def eight_bit_errors(run: Callable[..., Tensor], inputs: Inputs, grid: Grid, window: Window) -> dict[str, float]:
    """Return how far the output points from the definition's, as a share of `unlikeness`; at sampled queries."""
    (got,) = results_of(run, inputs, False)
    every = torch.arange(grid.tokens, device=got.device)
    rows = every if grid.tokens <= _WHOLE else _sample(grid).to(every.device)
    q, k, v = inputs.tensors
    coarse, sees = Coarse(got.device), seen(grid, window, rows, every)
    rounded = coarse(q), coarse(k.double() - k.double().mean(1, keepdim=True)), coarse(v)
    (exact,), (bound,) = (attend_rows(t, None, sees, rows, torch.float64) for t in (inputs.tensors, rounded))
    return unlikeness(got[:, rows], exact, bound, exact)


class Coarse:
    """Gives numbers the errors that e4m3 may have: up to 1 / 16 of each, any as likely as another.

    True ones are smaller: a number in the midst of two powers of two has fewer. Those of int8 are smaller for inputs
    without outliers, as drawn here.
    """

    def __init__(self, device: torch.device) -> None:
        self._draw = torch.Generator(device).manual_seed(0)

    def __call__(self, t: Tensor) -> Tensor:
        """Return numbers with errors, in float64."""
        error = torch.rand(t.shape, generator=self._draw, device=t.device, dtype=torch.float64) * 2 - 1
        return t.double() * (1 + _E4M3 * error)


def unlikeness(got: Tensor, exact: Tensor, bound: Tensor, exact_of_bound: Tensor) -> dict[str, float]:
    """Return how far an output points from the exact one, as a share of what 8 bits may.

    They may what `Coarse` queries, keys without their mean, and values make of an exact output, and as much as such
    weights: an independent error of each term turns a sum of independent terms by half of its mean square, in
    1 - cosine, which is 1 / 16^2 / 3.

    Args:
        got: The output.
        exact: What it should be.
        bound: Outputs of `Coarse` inputs.
        exact_of_bound: Their exact counterparts.
    """
    unlike, least = (
        1 - torch.cosine_similarity(a.double().flatten(), b.double().flatten(), 0)
        for a, b in ((got, exact), (bound, exact_of_bound))
    )
    return {"o": (unlike / (least + _E4M3**2 / 6)).item()}


def _sample(grid: Grid) -> Tensor:
    """Return query places: the first and last outside the grid, its corners and edges, then random ones inside it."""
    height, width, start = grid.height, grid.width, grid.prefix
    last = (height - 1) * width
    edges = [0, width - 1, last, last + width - 1, width // 2, last + width // 2, height // 2 * width]
    outside = [0, start - 1] if start else []
    draw = torch.randint(grid.image_tokens, (_ROWS,), generator=torch.Generator().manual_seed(0))
    return torch.tensor([*outside, *(start + e for e in edges), *(start + draw).tolist()])


def _exact_and_plain(inputs: Inputs, gradients: bool, sees: Tensor, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    dtype, cotangent = inputs.tensors[0].dtype, inputs.cotangent if gradients else None
    exact = attend_rows(inputs.tensors, cotangent, sees, rows, torch.float64)
    plain = attend_rows(inputs.tensors, cotangent, sees, rows, torch.float32)
    return exact, [t.to(dtype) for t in plain]


def seen(grid: Grid, window: Window | None, queries: Tensor, keys: Tensor) -> Tensor:
    """Return which keys each query sees.

    Args:
        grid: Where the image tokens lie in the sequence.
        window: Disc or square, or None for dense attention.
        queries: Places in the sequence, `[Q]`.
        keys: Places in the sequence, `[K]`.

    Returns:
        Bool `[Q, K]`; tokens outside the grid see everything and are seen by everything.
    """
    outside = _outside(grid, queries)[:, None] | _outside(grid, keys)[None]
    if window is None:
        return torch.ones_like(outside)
    i, j = queries[:, None] - grid.prefix, keys[None] - grid.prefix
    rows = i.div(grid.width, rounding_mode="floor"), j.div(grid.width, rounding_mode="floor")
    columns = i % grid.width, j % grid.width
    if window.radius is not None:
        near = (rows[0] - rows[1]) ** 2 + (columns[0] - columns[1]) ** 2 < window.radius**2
    else:
        near = _axis(*rows, grid.height, window.kernel[0], window.steps[0])
        near &= _axis(*columns, grid.width, window.kernel[1], window.steps[1])
    return outside | near


def _outside(grid: Grid, places: Tensor) -> Tensor:
    return (places < grid.image.start) | (places >= grid.image.stop)


def _axis(i: Tensor, j: Tensor, length: int, K: int, d: int) -> Tensor:
    group = i % d
    members = (length - group + d - 1).div(d, rounding_mode="floor")
    start = (i.div(d, rounding_mode="floor") - K // 2).clamp(min=0).minimum(members - K)
    place = j.div(d, rounding_mode="floor")
    return (j % d == group) & (place >= start) & (place < start + K)


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """Return softmax attention `[B, Q, H, D]` of `q [B, Q, H, D]` over `k, v [B, N, H, D]` where `sees [Q, N]`."""
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(~sees, -torch.inf).softmax(-1), v)


def attend_rows(
    tensors: Sequence[Tensor], cotangent: Tensor | None, sees: Tensor, rows: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Compute output rows by the definition, head by head, and the gradients that flow through just these rows.

    Args:
        tensors: q, k, v, `[B, N, H, D]`.
        cotangent: Of the output, like q; None for no gradients.
        sees: Bool `[Q, N]`.
        rows: Places of the queries, `[Q]`.
        dtype: Of the computation.

    Returns:
        o of the rows; with a cotangent also the gradient of q at the rows and those of k and v, whole. The gradient of
        a row of q is always exact, that of a key only if all queries that see it are among the rows.
    """
    parts = []
    for h in range(tensors[0].shape[2]):
        q, k, v = (t[:, :, h : h + 1].to(dtype) for t in tensors)
        leaves = [t.detach().requires_grad_(cotangent is not None) for t in (q[:, rows], k, v)]
        o = attend(leaves[0], leaves[1], leaves[2], sees)
        grads: Sequence[Tensor] = ()
        if cotangent is not None:
            grads = torch.autograd.grad(o, leaves, cotangent[:, rows, h : h + 1].to(dtype))
        parts.append([o.detach(), *grads])
    return [torch.cat(part, 2) for part in zip(*parts, strict=True)]
