"""Multipole attention beside a disc and beside dense attention: one case, its check, and who takes part."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vision_attn.bench.candidate import SHORT_DTYPE, Candidate, Inputs, Prepared, budget_shares, results_of
from vision_attn.bench.local.candidates import OPERATORS
from vision_attn.bench.local.problem import EIGHT_BITS, Coarse, LocalProblem, unlikeness
from vision_attn.bench.local.problem import errors as local_errors
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window
from vision_attn.kernels.multipole import Cells, choose_cells, multipole_attention
from vision_attn.kernels.multipole.cells import counts_of, means_of
from vision_attn.processors.multipole import Multipole

# What a candidate can compute.
SAME, DISC, DENSE = "the same function", "a disc of radius 16", "dense attention"
RADIUS = 16
_WHOLE, _ROWS, _HEADS = 2000, 16, 2
_COARSE_ROWS = 48
_OUTSTANDING = 16


@dataclass(frozen=True)
class MultipoleProblem:
    """Multipole attention of batch 1; see `Problem`.

    Args:
        group: The table it belongs to.
        grid: Where the image tokens lie.
        spec: Sizes of cells and means, and how many cells are exact.
        peers: Names of the candidates besides ours.
        backward: Names of the candidates whose backward is timed too.
        heads: H.
        head_dim: D.
        dtype: Name of a torch dtype.
    """

    group: str
    grid: Grid
    spec: Multipole
    peers: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    heads: int = 24
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """As in 'multipole-128-c8-n1-p4-e4'."""
        spec = self.spec
        words = [
            "multipole",
            str(self.grid.height),
            f"c{spec.cell}",
            f"n{spec.near}",
            f"p{spec.pool}",
            f"e{spec.exact}",
        ]
        words += [f"s{spec.spread:g}"] if spec.spread != Multipole().spread else []
        return "-".join([*words, *([SHORT_DTYPE[self.dtype]] if self.dtype != "bfloat16" else [])])

    @property
    def label(self) -> str:
        """As in '128 x 128, cell 8, near 1, pool 4, exact 4, D 128, bf16'."""
        spec = self.spec
        sizes = f"cell {spec.cell}, near {spec.near}, pool {spec.pool}, exact {spec.exact}"
        sizes += f", spread {spec.spread:g}" if spec.spread != Multipole().spread else ""
        return f"{self.grid.height} x {self.grid.width}, {sizes}, D {self.head_dim}, {SHORT_DTYPE[self.dtype]}"

    def shape(self) -> dict[str, Any]:
        """Return batch, heads, channels, dtype, grid and cells."""
        grid = dict(height=self.grid.height, width=self.grid.width, prefix=self.grid.prefix, suffix=self.grid.suffix)
        cells = dict(
            cell=self.spec.cell,
            near=self.spec.near,
            pool=self.spec.pool,
            exact=self.spec.exact,
            spread=self.spec.spread,
        )
        return dict(batch=1, heads=self.heads, head_dim=self.head_dim, dtype=self.dtype, **grid, **cells)

    def twin(self) -> "MultipoleProblem":
        """Return a small problem of the same cells: fewer heads and a smaller grid."""
        grid = Grid(32, 44, min(self.grid.prefix, 128), min(self.grid.suffix, 128))
        return replace(self, group="twin", grid=grid, heads=min(self.heads, 3), peers=(), backward=())

    def inputs(self, device: torch.device) -> Inputs:
        """Draw q, k, v and the cotangent of o; some cells stand out, so that no rounding decides which are exact."""
        shape = 1, self.grid.tokens, self.heads, self.head_dim
        inputs = Inputs.drawn(shape, getattr(torch, self.dtype), device)
        if self.spec.exact:
            self._make_some_stand_out(inputs)
        return inputs

    def _make_some_stand_out(self, inputs: Inputs) -> None:
        """Move all queries, and the keys of up to 16 cells, each by its own share of that."""
        (q, k, _), grid = inputs.tensors, self.grid
        boxes = self.spec.cells().layout(grid, q.device).tokens[:-1].tolist()
        places = torch.randperm(len(boxes), generator=torch.Generator().manual_seed(0))[:_OUTSTANDING].tolist()
        q[:, grid.image] += 0.5
        image = k[:, grid.image].unflatten(1, (grid.height, grid.width))
        for place, share in zip(places, torch.linspace(0.2, 1.6, len(places)).tolist(), strict=True):
            top, bottom, left, right = boxes[place]
            image[:, top:bottom, left:right] += share

    def errors(self, computes: str, run: Callable[..., Tensor], inputs: Inputs, gradients: bool) -> dict[str, float]:
        """Check a candidate of `SAME`, `EIGHT_BITS`, `DISC` or `DENSE`; a long sequence at sampled rows."""
        if computes not in (SAME, EIGHT_BITS):
            window = Window(radius=RADIUS) if computes == DISC else None
            return local_errors(run, inputs, self.grid, window, gradients)
        cells, gradients = self.spec.cells(), gradients and computes == SAME
        if self.grid.tokens <= _WHOLE:
            got, dtype = results_of(run, inputs, gradients), inputs.tensors[0].dtype
            both = []
            for wide in (torch.float64, torch.float32):
                twin = Inputs(tuple(t.to(wide) for t in inputs.tensors), inputs.cotangent.to(wide))
                definition = partial(multipole_attention, grid=self.grid, cells=cells, backend="reference")
                both.append(results_of(definition, twin, gradients))
            if computes == EIGHT_BITS:
                return unlikeness(got[0], both[0][0], *self._coarse(inputs, cells))
            return budget_shares(got, both[0], [t.to(dtype) for t in both[1]], "oqkv")
        got = results_of(run, inputs, False)
        draw = torch.Generator().manual_seed(0)
        rows = torch.randint(self.grid.image_tokens, (_ROWS,), generator=draw).tolist()
        exact, plain = (sampled_rows(inputs, self.grid, cells, rows, wide) for wide in (torch.float64, torch.float32))
        own = got[0][0, [self.grid.prefix + row for row in rows], :_HEADS]
        if computes == EIGHT_BITS:
            return unlikeness(own, exact, *self._coarse(inputs, cells))
        return budget_shares([own], [exact], [plain.to(own.dtype)], "o")

    def _coarse(self, inputs: Inputs, cells: Cells) -> tuple[Tensor, Tensor]:
        """Return rows of the definition of `Coarse` tokens and means, and of exact ones."""
        draw = torch.Generator().manual_seed(1)
        rows = torch.randint(self.grid.image_tokens, (_COARSE_ROWS,), generator=draw).tolist()
        with_errors = sampled_rows(inputs, self.grid, cells, rows, torch.float64, Coarse(inputs.tensors[0].device))
        return with_errors, sampled_rows(inputs, self.grid, cells, rows, torch.float64)

    def needed_flop(self, gradients: bool) -> int:
        """Count 4 D operations per key met and head (two products), 10 D for the gradients (five)."""
        pairs = round(self.grid.tokens**2 * self.spec.attended(self.grid))
        return (10 if gradients else 4) * self.head_dim * self.heads * pairs


def sampled_rows(
    inputs: Inputs, grid: Grid, cells: Cells, rows: list[int], dtype: torch.dtype, coarse: Coarse | None = None
) -> Tensor:
    """Return some grid rows of the definition for the first heads, `[rows, heads, D]`.

    Args:
        inputs: Of all heads.
        grid: Where the image tokens lie.
        cells: Sides of cells and means, and how many are exact.
        rows: Which of the grid's tokens.
        dtype: Of the computation.
        coarse: Gives errors to tokens and means; the exact cells are those of tokens without errors.
    """
    q, k, v = (t[:, :, :_HEADS] for t in inputs.tensors)
    layout, C = cells.layout(grid, q.device), cells.count(grid)
    chosen = choose_cells(q, k, grid, cells)  # [1, heads, C, exact]
    means_k, means_v = (means_of(t[:, grid.image].to(dtype), grid, cells, layout.sides) for t in (k, v))
    outside = [*range(grid.prefix), *range(grid.image.stop, grid.tokens)]
    if coarse is not None:
        mean = k.to(dtype).mean(1, keepdim=True)
        q, k, v = coarse(q), coarse(k.to(dtype) - mean), coarse(v)
        means_k, means_v = coarse(means_k - mean), coarse(means_v)
    found = []
    for row in rows:
        y, x = divmod(row, grid.width)
        own = y // cells.cell * layout.size[1] + x // cells.cell
        slots = layout.slots[own : own + 1]
        for h in range(q.shape[2]):
            counts = counts_of(layout, slots, chosen[0, h, own : own + 1])[0].clamp(min=0)
            keys = list(outside)
            for cell in {*layout.near[own].tolist(), *chosen[0, h, own].tolist()} - {C}:
                top, bottom, left, right = layout.tokens[cell].tolist()
                keys += [grid.prefix + j * grid.width + i for j in range(top, bottom) for i in range(left, right)]
            pooled = slots[0][counts > 0]
            all_k, all_v = (
                torch.cat([t[0, keys, h].to(dtype), means[0, pooled, h]]) for t, means in ((k, means_k), (v, means_v))
            )
            logits = all_k @ q[0, grid.prefix + row, h].to(dtype) * q.shape[-1] ** -0.5
            logits[len(keys) :] += counts[counts > 0].to(dtype).log()
            found.append(logits.softmax(0) @ all_v)
    return torch.stack(found).unflatten(0, (len(rows), -1))


def _ours(precision: str | None, problem: MultipoleProblem, device: torch.device) -> Prepared:
    """The whole operator: what quantises is inside the timing."""
    backend, cells = "triton" if device.type == "cuda" else "torch", replace(problem.spec, precision=precision).cells()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return multipole_attention(q, k, v, problem.grid, cells, backend=backend)

    return Prepared(run)


def _as_local(name: str, problem: MultipoleProblem, device: torch.device) -> Prepared:
    """A candidate of local attention on the same grid."""
    (candidate,) = (candidate for candidate in OPERATORS if candidate.name == name)
    window, size = Window(radius=RADIUS), dict(heads=problem.heads, head_dim=problem.head_dim, dtype=problem.dtype)
    return candidate.prepare(LocalProblem(problem.group, problem.grid, window, **size), device)  # type: ignore[arg-type]


CANDIDATES = (
    Candidate("ours", SAME, partial(_ours, None)),
    Candidate("int8", EIGHT_BITS, partial(_ours, "int8")),
    Candidate("fp8", EIGHT_BITS, partial(_ours, "fp8")),
    Candidate("clear r16", DISC, partial(_as_local, "ours")),
    Candidate("cuDNN", DENSE, partial(_as_local, "cuDNN")),
    Candidate("SDPA", DENSE, partial(_as_local, "SDPA")),
)
