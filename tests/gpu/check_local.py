"""Check `local_attention`'s Triton backend on a GPU against float64; `vision-attn bench kernels` times it.

    PYTHONPATH=. python tests/gpu/check_local.py [--dtypes bf16,fp16,fp32] [--only NAME] [--out FILE.json]

Every row of the CPU test's table and one call per tuned configuration: output and all gradients, in three dtypes, as
shares of the error budget; then more than 2^31 elements, peak memory, `opcheck`, repeats, CUDA graphs and `compile`.
"""

import argparse
import json
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from eight_bit_cases import rounding_errors, teachers
from local_cases import CASES, Case, draw, exact_and_plain, run

from vision_attn import Clear
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention
from vision_attn.kernels.local import op as local_op

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
TUNED = [
    Case(Grid(40, 50, prefix=512), dict(radius=8), head_dim=128),
    Case(Grid(40, 50, prefix=100, suffix=30), dict(radius=16), head_dim=128, mask=True),
    Case(Grid(50, 70), dict(radius=32), head_dim=128),
    Case(Grid(48, 64, prefix=64), dict(kernel_size=7), head_dim=64),
    Case(Grid(48, 50), dict(kernel_size=33), head_dim=64),
    Case(Grid(48, 64), dict(kernel_size=33), head_dim=128),
    Case(Grid(40, 33, prefix=7), dict(radius=11), head_dim=256),
    Case(Grid(33, 40, prefix=77), dict(kernel_size=9, dilation=2), head_dim=96, pooled=50),
    Case(Grid(33, 40, suffix=5), dict(kernel_size=13), head_dim=160, bias=True),
    Case(Grid(40, 45, prefix=20), dict(kernel_size=13), head_dim=128),
    Case(Grid(64, 70), dict(kernel_size=7, dilation=3), head_dim=128),
    Case(Grid(50, 64, prefix=9), dict(kernel_size=9, dilation=(3, 4)), head_dim=64, strided=True),
    Case(Grid(40, 33, prefix=7), dict(radius=6), head_dim=16),
    Case(Grid(40, 33, prefix=7), dict(radius=6), head_dim=40),
    Case(Grid(33, 40, suffix=7), dict(kernel_size=11), head_dim=72),
    Case(Grid(33, 40, prefix=77), dict(kernel_size=9, dilation=2), head_dim=80, mask=True),
    Case(Grid(20, 24, prefix=5), dict(radius=4), head_dim=64, scale=40.0),
    Case(Grid(20, 24, prefix=5), dict(kernel_size=6), head_dim=128, scale=40.0),
]


def leaves_of(case):
    return ["o", "q", "k", "v", *(["bias"] if case.bias else []), *(["pooled_k", "pooled_v"] if case.pooled else [])]


def check(case, name):
    """Return each result's error as a share of its budget."""
    torch.set_default_device("cuda")
    dtype = DTYPES[name]
    low, exact = exact_and_plain(case, dtype)
    shares = {}
    plain = run(case, low, "reference")
    q, k, v, window, mask, leaves = low
    scale = case.scale if case.scale is not None else q.shape[-1] ** -0.5
    o = local_op.local_attention_triton(q, k, v, case.grid, window, mask, scale)
    cotangent = torch.cos(0.7 * torch.arange(o.numel(), dtype=torch.float64)).view_as(o).to(o.dtype)
    ours = [o, *torch.autograd.grad(o, leaves, cotangent)]
    for leaf, a, p, e in zip(leaves_of(case), ours, plain, exact, strict=True):
        rounding = torch.finfo(dtype).eps * e.abs().max() + 1e-6
        shares[leaf] = round(((a - e).abs().max() / (2 * ((p - e).abs().max() + rounding))).item(), 2)
    return shares


def attempt(function, *args):
    try:
        start = time.time()
        return function(*args), round(time.time() - start, 1)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]} @ {traceback.format_exc().splitlines()[-4:-1]}", 0


def inputs(side, window, prefix, D, heads=24):
    grid = Grid(side, side, prefix)
    q, k, v, do = (torch.randn(1, grid.tokens, heads, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    return grid, Window(**window), q, k, v, do


def large():
    """Return the errors against one batch entry alone where B * N * H * D is above 2^31: offsets need 64 bits."""
    grid, window, *_ = inputs(512, dict(radius=8), 64, 128, heads=1)
    q, k, v, do = (torch.randn(3, grid.tokens, 24, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    shares = {}
    whole = [t.requires_grad_() for t in (q, k, v)]
    last = [t.detach()[2:].requires_grad_() for t in (q, k, v)]
    results = []
    for tensors, cotangent in ((whole, do), (last, do[2:])):
        o = local_op.local_attention_triton(*tensors, grid, window, None, 128**-0.5)
        results.append([o, *torch.autograd.grad(o, tensors, cotangent)])
    for leaf, a, b in zip("oqkv", *results, strict=True):
        shares[leaf] = round(((a[2:] - b).abs().max() / (0.01 * b.abs().max())).item(), 3)
    return shares


def memory():
    """Return the peak of forward and backward above inputs, outputs and the log-sum-exp, as a share of them."""
    grid, window, q, k, v, do = inputs(128, dict(radius=16), 512, 128)
    for t in (q, k, v):
        t.requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o = local_op.local_attention_triton(q, k, v, grid, window, None, 128**-0.5)
    forward = torch.cuda.max_memory_allocated() - before - o.nbytes - o.numel() // 128 * 4
    torch.autograd.grad(o, (q, k, v), do)
    both = torch.cuda.max_memory_allocated() - before - 4 * o.nbytes - o.numel() // 128 * 4
    return dict(forward=round(forward / (4 * q.nbytes), 4), backward=round(both / (8 * q.nbytes), 4))


def modes():
    """Return whether results repeat bit for bit, and are the same compiled (fullgraph) and in a replayed CUDA graph.

    A graph holds the forward and the backward, on inputs that change between capture and replay.
    """
    grid, window, q, k, v, do = inputs(40, dict(radius=8), 77, 64)
    for t in (q, k, v):
        t.requires_grad_()

    def both(function):
        o = function(q, k, v, grid, window, backend="triton")
        return [o, *torch.autograd.grad(o, (q, k, v), do)]

    def equal(results):
        return all(torch.equal(a, b) for a, b in zip(both(local_attention), results, strict=True))

    both(local_attention)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(local_attention)
    with torch.no_grad():
        for t in (q, k, v, do):
            t.normal_()
    graph.replay()
    torch.cuda.synchronize()
    compiled = torch.compile(local_attention, fullgraph=True)
    numbers = [40, 40, 77, 0], 0.0, [5, 5], [2, 2], 0.125
    torch.library.opcheck(local_op._local.registered, (q, k, v, None, None, None, None, *numbers))
    same = dict(repeats=both(local_attention), graph=captured, compiled=both(compiled))
    return dict(opcheck=True, **{name: equal(results) for name, results in same.items()})


def eight_bits():
    """Return how far 8 bits are from what they should be, on normal inputs and on real activations.

    Of each call what `rounding_errors` says; of a teacher what `nearness` does, and whether it is what was asked for.
    """
    torch.set_default_device("cuda")
    found = {}
    for case in CASES + TUNED:
        if case.bias or case.pooled:
            continue
        torch.manual_seed(0)
        *tensors, _, mask, _ = draw(case, torch.bfloat16)
        q, k, v = (t.detach() for t in tensors)

        def attend(precision, backend, inputs=(q, k, v), case=case, mask=mask):
            window = Window(**case.window, precision=precision)
            return local_attention(*inputs, case.grid, window, mask=mask, scale=case.scale, backend=backend)

        found |= {f"{precision} {case}": errors for precision, errors in rounding_errors(attend).items()}
    torch.set_default_device(None)
    return found | teachers(Clear(radius=16))


def elsewhere():
    """Return whether a GPU that is not the current one computes the same, bit for bit; None where there is one GPU."""
    if torch.cuda.device_count() < 2:
        return None
    grid, window, *tensors = inputs(40, dict(radius=8), 600, 64)
    results = []
    for device in ("cuda:0", "cuda:1"):
        q, k, v, do = (t.to(device).requires_grad_() for t in tensors)
        with torch.no_grad():
            results.append([local_attention(q, k, v, grid, window, backend="triton")])
        o = local_attention(q, k, v, grid, window, backend="triton")
        results[-1] += [o, *torch.autograd.grad(o, (q, k, v), do)]
    return all(torch.equal(a, b.to(a.device)) for a, b in zip(*results, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", default="bf16,fp16,fp32")
    parser.add_argument("--only", default="", help="part of the names of the rows")
    parser.add_argument("--parts", default="check,large,memory,modes,eight_bits,elsewhere", help="what to check")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "check_local.json")
    args = parser.parse_args()
    import triton

    result = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__, check={})
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    parts = args.parts.split(",")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {}
        for name in args.dtypes.split(",") if "check" in parts else ():
            for case in (case for case in CASES + TUNED if args.only in str(case)):
                jobs[pool.submit(attempt, check, case, name)] = f"{name} {case}"
        for job in as_completed(jobs):
            shares, seconds = job.result()
            result["check"][jobs[job]] = shares
            bad = isinstance(shares, str) or not all(share <= 1 for share in (shares or {}).values())
            print("FAIL" if bad else "ok  ", jobs[job], shares or "", f"{seconds}s", flush=True)
    for function in (large, memory, modes, eight_bits, elsewhere):
        if function.__name__ in parts:
            result[function.__name__] = attempt(function)[0]
            print(function.__name__, json.dumps(result[function.__name__], indent=1), flush=True)
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
