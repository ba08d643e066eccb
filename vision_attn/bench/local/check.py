"""Checks a candidate against float64: whole where the problem is small, else on sampled rows and keys."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vision_attn.bench.candidate import AbsentError, Inputs
from vision_attn.bench.local.exact import attend_rows, seen
from vision_attn.grid import Grid
from vision_attn.kernels.local.window import Window

_WHOLE = 2000  # tokens up to which everything is checked
_ROWS, _KEYS = 24, 2


def errors(
    run: Callable[..., Tensor], inputs: Inputs, grid: Grid, window: Window | None, gradients: bool
) -> dict[str, float]:
    """Return the errors of output and gradients as shares of their budgets.

    The budget is twice the error of the same formula in float32, rounded to the dtype, plus twice one rounding of the
    largest value. A long sequence is checked at sampled query rows (o and the gradient of q) and at sampled keys of one
    head each (gradients of k and v), for which all queries that see them are computed.

    Args:
        run: The candidate, from q, k, v to o.
        inputs: q, k, v and the cotangent.
        grid: Where the image tokens lie.
        window: What it should compute, None for dense attention.
        gradients: Whether to check them too.
    """
    got = _results(run, inputs, gradients)
    every = torch.arange(grid.tokens, device=got[0].device)
    if grid.tokens <= _WHOLE:
        return _shares(got, *_exact_and_plain(inputs, gradients, seen(grid, window, every, every), every))
    rows = _sample(grid).to(every.device)
    exact, plain = _exact_and_plain(inputs, gradients, seen(grid, window, rows, every), rows)
    shares = _shares([t[:, rows] for t in got[:2]], exact[:2], plain[:2])
    for turn, key in enumerate(_sample(grid)[-_KEYS:].tolist() if gradients else []):
        head = slice(turn % got[0].shape[2], turn % got[0].shape[2] + 1)
        one = Inputs(tuple(t[:, :, head] for t in inputs.tensors), inputs.cotangent[:, :, head])
        queries = every[seen(grid, window, every, every[key : key + 1])[:, 0]]
        both = _exact_and_plain(one, True, seen(grid, window, queries, every), queries)
        mine = [t[:, key : key + 1, head] for t in got[2:]]
        exact, plain = ([t[:, key : key + 1] for t in ts[2:]] for ts in both)
        shares |= _shares(mine, exact, plain, (f"k[{key}]", f"v[{key}]"))
    return shares


def _results(run: Callable[..., Tensor], inputs: Inputs, gradients: bool) -> list[Tensor]:
    """The output and the gradients; memory is NaN before, so that what is never written cannot be right."""
    q = inputs.tensors[0]
    poison = [torch.full_like(q, torch.nan) for _ in range(4)]
    poison.clear()
    with torch.set_grad_enabled(gradients):
        leaves = inputs.leaves() if gradients else inputs.tensors
        o = run(*leaves)
    if o.shape != q.shape or o.dtype != q.dtype:
        raise AbsentError(f"wrong: the output is {tuple(o.shape)} {o.dtype}, not {tuple(q.shape)} {q.dtype}")
    return [o.detach(), *(torch.autograd.grad(o, leaves, inputs.cotangent) if gradients else ())]


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


def _shares(
    got: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor], names: Sequence[str] = "oqkv"
) -> dict[str, float]:
    shares = {}
    for name, a, e, p in zip(names, got, exact, plain, strict=False):
        rounding = torch.finfo(p.dtype).eps * e.abs().max() + 1e-6
        budget = 2 * ((p.double() - e).abs().max() + rounding)
        shares[name] = ((a.double() - e).abs().max() / budget).item()
    return shares
