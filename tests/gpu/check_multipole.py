"""Check `multipole_attention`'s Triton backend on a GPU against float64; `vision-attn bench kernels` times it.

    PYTHONPATH=. python tests/gpu/check_multipole.py [--dtypes bf16,fp16,fp32] [--only NAME] [--out FILE.json]
    PYTHONPATH=. python tests/gpu/check_multipole.py --parts eight_bits

Output and all gradients, in three dtypes, as shares of the error budget; how much worse than the best the chosen cells
are; then a call compiled whole and one in a CUDA graph; then 8 bits, on normal inputs and on the teachers.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from eight_bit_cases import rounding_errors, teachers

from vision_attn import Multipole
from vision_attn.grid import Grid
from vision_attn.kernels.multipole import Cells, choose_cells, multipole_attention, op
from vision_attn.kernels.multipole.cells import _cell_bounds, _finest_sums, cell_means

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
CASES = {  # grid, cells, D
    "ragged-text": (Grid(37, 50, prefix=77, suffix=3), dict(exact=4, spread=0.5), 128),
    "levels": (Grid(70, 90, prefix=512), dict(exact=4, spread=0.5), 128),
    "pool-2": (Grid(40, 33, prefix=7), dict(pool=2, exact=2, spread=0.5), 64),
    "no-text": (Grid(48, 64), dict(exact=0), 64),
    "cell-4": (Grid(40, 30, prefix=20), dict(cell=4, pool=2, exact=3, spread=1.0), 40),
    "cell-12": (Grid(50, 40, prefix=9), dict(cell=12, pool=4, exact=2, near=0), 72),
    "cell-16-pool-8": (Grid(64, 50), dict(cell=16, pool=8, exact=1, spread=0.5), 96),
    "pool-1": (Grid(24, 40, suffix=5), dict(cell=8, pool=1, exact=2, spread=0.5), 128),
    "wide": (Grid(33, 40, prefix=7), dict(exact=2, spread=0.5), 256),
    "many-exact": (Grid(64, 64, prefix=77), dict(exact=16, spread=0.5), 64),
}


def tensors(case, dtype, count=4, batch=2, heads=2):
    grid, _, D = CASES[case]
    torch.manual_seed(0)
    return [torch.randn(batch, grid.tokens, heads, D).to(dtype) for _ in range(count)]


def results(case, low, backend, dtype, chosen):
    """Output and gradients of q, k, v, masses and weights."""
    grid, fields, _ = CASES[case]
    q, k, v, cotangent = (t.to(dtype) for t in low)
    wide = torch.promote_types(dtype, torch.float32)
    pool = Cells(**fields).pool
    mass = torch.linspace(-0.3, 0.3, 2 * q.shape[2]).view(q.shape[2], 2).to(wide)
    weights = torch.linspace(0.5, 1.5, pool * pool).view(pool, pool).to(wide)
    leaves = [t.requires_grad_() for t in (q, k, v, mass, weights)]
    outside = grid.prefix + grid.suffix
    mask = torch.arange(outside).expand(q.shape[0], -1) % 3 > 0 if outside > 1 else None
    cells = Cells(**fields, mass=mass, weights=weights, chosen=chosen)
    o = multipole_attention(q, k, v, grid, cells, mask=mask, backend=backend)
    return [o, *torch.autograd.grad(o, leaves, cotangent, allow_unused=True)]


def check(case, name):
    """Return each result's error as a share of its budget, and by how many logits a chosen cell misses the best."""
    torch.set_default_device("cuda")
    dtype, (grid, fields, _) = DTYPES[name], CASES[case]
    low = tensors(case, dtype)
    q, k = low[0].double(), low[1].double()
    chosen = choose_cells(q, k, grid, Cells(**fields))
    exact = results(case, low, "reference", torch.float64, chosen)
    plain = results(case, low, "torch", dtype, chosen)
    ours = results(case, low, "triton", dtype, chosen)
    shares = {}
    for leaf, a, p, e in zip(("o", "q", "k", "v", "mass", "weights"), ours, plain, exact, strict=True):
        least = 1e-5 if leaf == "weights" else 1e-6  # a sum over all tokens, whose terms cancel where means have one
        rounding = 4 * torch.finfo(dtype).eps * e.abs().max() + least
        shares[leaf] = round(((a - e).abs().max() / (2 * (p - e).abs().max() + rounding)).item(), 2)
    if fields["exact"]:
        shares["choice"] = round(regret(low, grid, Cells(**fields), chosen), 3)
    return shares


def regret(low, grid, cells, best):
    """The largest gap between the weights of the cells that are best and of those that are chosen, over its budget."""
    q, k, v = low[:3]
    found, run = [], torch.ops.vision_attn.multipole_triton_choice

    def watched(*args):
        found.append(run(*args))
        return found[-1]

    own, op._choice = op._choice, watched
    try:
        multipole_attention(q, k, v, grid, cells, backend="triton")
    finally:
        op._choice = own
    (ours,) = found
    wide_q, wide_k = (t.double()[:, grid.image] for t in (q, k))
    means, keys = (cell_means(*_finest_sums(t, grid, cells.pool, None), cells) for t in (wide_q, wide_k))
    means = means * q.shape[-1] ** -0.5
    positive, negative = keys, keys
    if cells.spread:
        below, above = _cell_bounds(wide_k, grid, cells.cell)
        positive, negative = torch.lerp(keys, above, cells.spread), torch.lerp(keys, below, cells.spread)
    weight = means.clamp(min=0) @ positive.mT + means.clamp(max=0) @ negative.mT
    boxes = cells.layout(grid, q.device).tokens[: weight.shape[-1]]
    weight = weight + ((boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])).double().log()
    weight = torch.cat([weight, weight.new_full((*weight.shape[:3], 1), -1e4)], -1)
    assert (
        (ours.long().sort(-1).values.diff(dim=-1) != 0).logical_or(ours.long()[..., 1:] == weight.shape[-1] - 1).all()
    )
    reached = [weight.gather(-1, each.long()).sort(-1).values for each in (best, ours)]
    eps = torch.finfo(q.dtype).eps
    budget = (
        8 * eps * means.abs().amax() * keys.abs().amax() * q.shape[-1] ** 0.5 + weight[..., :-1].abs().amax() * 2**-16
    )
    return float((reached[0] - reached[1]).amax() / budget)


def modes():
    """Return whether calls repeat bit for bit, and are the same compiled (fullgraph) and in a replayed CUDA graph."""
    grid, cells = Grid(40, 44, 77), Cells(exact=4, spread=0.5)
    q, k, v, do = (torch.randn(1, grid.tokens, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    for t in (q, k, v):
        t.requires_grad_()

    def both(function):
        o = function(q, k, v, grid, cells, backend="triton")
        return [o, *torch.autograd.grad(o, (q, k, v), do)]

    both(multipole_attention)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(multipole_attention)
    with torch.no_grad():
        for t in (q, k, v, do):
            t.normal_()
    graph.replay()
    torch.cuda.synchronize()
    compiled = torch.compile(multipole_attention, fullgraph=True)
    same = dict(repeats=both(multipole_attention), graph=captured, compiled=both(compiled))
    want = both(multipole_attention)
    return {name: all(torch.equal(a, b) for a, b in zip(want, got, strict=True)) for name, got in same.items()}


def eight_bits():
    """Return how far 8 bits are from what they should be: see `rounding_errors` and `teachers`."""
    torch.set_default_device("cuda")
    found = {}
    for name, (grid, fields, _) in CASES.items():
        q, k, v = tensors(name, torch.bfloat16, count=3)
        outside = grid.prefix + grid.suffix
        mask = torch.arange(outside).expand(q.shape[0], -1) % 3 > 0 if outside > 1 else None
        # the kernel and PyTorch may choose otherwise
        cells = Cells(**fields, chosen=choose_cells(q, k, grid, Cells(**fields)))

        def attend(precision, backend, inputs=(q, k, v), grid=grid, mask=mask, cells=cells):
            return multipole_attention(*inputs, grid, replace(cells, precision=precision), mask=mask, backend=backend)

        found |= {f"{precision} {name}": errors for precision, errors in rounding_errors(attend).items()}
    torch.set_default_device(None)
    return found | teachers(Multipole())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", default="bf16,fp16,fp32")
    parser.add_argument("--only", default="", help="part of the names of the rows")
    parser.add_argument("--parts", default="check,modes,eight_bits", help="what to check")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "check_multipole.json")
    args = parser.parse_args()
    import triton

    result = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__, check={})
    workers, parts = max(1, min(14, (os.cpu_count() or 2) - 2)), args.parts.split(",")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {
            pool.submit(check, case, name): f"{name} {case}"
            for name in (args.dtypes.split(",") if "check" in parts else ())
            for case in CASES
            if args.only in case
        }
        for job in as_completed(jobs):
            try:
                shares = job.result()
            except Exception as error:
                shares = f"{type(error).__name__}: {str(error)[:300]}"
            result["check"][jobs[job]] = shares
            bad = isinstance(shares, str) or not all(share <= 1 for share in shares.values())
            print("FAIL" if bad else "ok  ", jobs[job], shares, flush=True)
    for function in (modes, eight_bits):
        if function.__name__ in parts:
            result[function.__name__] = function()
            print(function.__name__, json.dumps(result[function.__name__], indent=1), flush=True)
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
