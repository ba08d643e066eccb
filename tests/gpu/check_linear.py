"""Check the Triton backends of linear attention and its relatives on a GPU against float64.

    PYTHONPATH=. python tests/gpu/check_linear.py [--dtypes bf16,fp16,fp32] [--only TEXT] [--skip-large] [--out FILE]

Every row of the CPU test's table and rows for every tuned configuration: output and all gradients, in three dtypes, as
shares of the error budget; without `--only`, then 1M tokens, more than 2^31 elements, peak memory, `opcheck`, repeats,
CUDA graphs and `compile`. `vision-attn tune` finds launches.
"""

import argparse
import itertools
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
from operator_cases import CASES, Case, call, inputs_of

from vision_attn.grid import Grid
from vision_attn.kernels.agent import Agents, agent_attention
from vision_attn.kernels.hedgehog import hedgehog
from vision_attn.kernels.image import Windows, add_depthwise, means
from vision_attn.kernels.linear import Features, feature_mean, linear_attention
from vision_attn.kernels.residual import Network, add_networks
from vision_attn.kernels.window import Haloed, window_attention

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
OPERATORS = ("linear", "linear_injective", "agent", "window", "linear_local")


def row(operator, id, **options):
    return Case(operator, id, options)


TUNED = [
    *(row("linear", f"d{D}", N=2111, M=2111, H=3, D=D, F=D) for D in (16, 32, 40, 64, 72, 80, 128, 144, 256)),
    *(row("linear", f"hedgehog-d{D}", N=1500, M=1500, H=2, D=D, F=2 * D, map="none") for D in (40, 64, 128, 256)),
    row("linear", "many-features", N=1500, M=1900, H=2, D=72, F=300, weight=True, hidden=True),
    *(row("linear", f"weights-d{D}", N=1500, M=1900, H=2, D=D, F=D, weight=True, hidden=True) for D in (64, 128)),
    *(row("linear", f"rala-d{D}", N=1501, M=1501, H=2, D=D, F=D, globals=True, weight=True) for D in (32, 64, 128)),
    *(row("linear", f"rotary-d{D}", N=1501, M=1501, H=2, D=D, F=D, rotary=True) for D in (32, 64, 128, 256)),
    *(row("linear", f"strided-d{D}", N=1501, M=1501, H=2, D=D, F=D, strided=True) for D in (64, 128)),
    *(row("linear_injective", f"d{D}", N=1501, M=2111, H=3, D=D, F=D) for D in (32, 40, 64, 72, 128, 256)),
    row("linear_injective", "hidden-d64", N=1501, M=2111, H=3, D=64, F=64, weight=True, hidden=True, held=True),
    *(row("agent", f"a{A}-d{D}", N=1500, M=2100, A=A, H=2, D=D) for A in (1, 49, 256) for D in (40, 64, 128, 256)),
    *(row("agent", f"biases-a{A}", N=1500, M=1501, A=A, H=2, D=64, biases=True, direct=77) for A in (9, 49, 144)),
    row("agent", "hidden", N=1500, M=2100, A=49, H=2, D=64, direct=77, mask=True, biases=True, query_scale=0.2),
    *(row("window", f"w{w}-d{D}", grid=Grid(37, 50), size=w, H=2, D=D) for w in (2, 4, 7, 8, 16) for D in (64, 128)),
    *(row("window", f"text-d{D}", grid=Grid(37, 50, prefix=77), size=8, H=2, D=D) for D in (40, 64, 256)),
    *(
        row("window", f"halo-b{b}-h{h}-d{D}", grid=Grid(37, 50), size=Haloed(b, h), H=2, D=D)
        for b, h in ((8, 3), (8, 1), (4, 5), (2, 1), (16, 7)) for D in (64, 128)
    ),
    row("window", "halo-text", grid=Grid(37, 50, prefix=77, suffix=5), size=Haloed(8, 3), H=2, D=64, mask=True),
    row("window", "text-w2", grid=Grid(37, 50, prefix=77), size=2, H=2, D=64),
    *(row("linear_local", f"d{D}", grid=Grid(37, 50), size=8, H=2, D=D, F=2 * D) for D in (40, 64, 128)),
    *(row("linear_local", f"w{w}", grid=Grid(37, 50), size=w, H=2, D=64, F=96) for w in (2, 7, 16)),
    row("linear_local", "text", grid=Grid(32, 48, prefix=77, suffix=5), size=8, H=3, D=128, F=256, mask=True),
    row("linear_local", "d256", grid=Grid(32, 48, prefix=5), size=8, H=2, D=256, F=512),
    row("window", "stripe", grid=Grid(32, 48, prefix=3, suffix=5), size=(32, 2), H=2, D=64, mask=True),
]  # fmt: skip


def operators(N, H, D, dtype=torch.bfloat16, B=1):
    """Return each operator as a function of q, k, v, with 49 agents, windows of 2 and a prefix for windows."""
    side = int(N**0.5)
    agents = torch.randn(B, 49, H, D, device="cuda", dtype=dtype)
    grid = Grid(side, N // side, suffix=N - side * (N // side))
    features = Features("elu")
    return {
        "linear": lambda q, k, v, backend="triton": linear_attention(q, k, v, features=features, backend=backend),
        "rala": lambda q, k, v, backend="triton": linear_attention(
            q, k, v, global_query=feature_mean(q, backend=backend) * D**-0.5, backend=backend
        ),
        "agent": lambda q, k, v, backend="triton": agent_attention(q, k, v, Agents(agents), backend=backend),
        "window": lambda q, k, v, backend="triton": window_attention(q, k, v, grid, 2, backend=backend),
    }


def drawn(N, H, D, dtype=torch.bfloat16, B=1):
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(B, N, H, D, generator=generator, device="cuda", dtype=dtype) for _ in range(4)]


def pool():
    """Return processes that compile side by side."""
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def names_of(case):
    return ["o", *(name for name, t in inputs_of(case).items() if t is not None and t.requires_grad)]


def results(case, t, backend):
    t = {name: x if x is None else x.cuda().detach().requires_grad_(x.requires_grad) for name, x in t.items()}
    with torch.device("cuda"):
        o = call(case, t, backend)
    leaves = [x for x in t.values() if x is not None and x.requires_grad]
    cotangent = torch.cos(0.7 * torch.arange(o.numel(), dtype=torch.float64, device="cuda")).view_as(o).to(o.dtype)
    return [o, *torch.autograd.grad(o, leaves, cotangent)]


def shares(names, ours, plain, exact, dtype):
    """Errors as shares of twice the error of plain PyTorch and one rounding of the largest value."""
    found = {}
    for name, a, p, e in zip(names, ours, plain, exact, strict=True):
        budget = 2 * ((p - e).abs().max() + torch.finfo(dtype).eps * e.abs().max() + 1e-6)
        found[name] = round(((a - e).abs().max() / budget).item(), 2)
    return found


def check(case, dtype):
    exact = results(case, inputs_of(case), "reference")
    plain, ours = (results(case, inputs_of(case, dtype), backend) for backend in ("reference", "triton"))
    return shares(names_of(case), ours, plain, exact, dtype)


def check_features(D, dtype):
    """Check the Hedgehog's features of heads of D channels."""
    x, weight = 3 * torch.randn(2, 1111, 3, D).half().cuda(), (torch.randn(3, D, D) / D**0.5).cuda()
    o = []
    for kind, backend in ((dtype, "triton"), (dtype, "torch"), (torch.float64, "torch")):
        wide = torch.float64 if kind == torch.float64 else torch.float32
        o.append(hedgehog(x.to(kind), weight.to(wide), backend=backend))
    return shares("o", *([x] for x in o), dtype)


def check_image(D, dtype):
    """Check means over windows, and the convolution with a gate, on heads of D channels."""
    grid, H = Grid(37, 50, prefix=77, suffix=5), 3
    o, v = torch.randn(2, 2, grid.tokens, H, D).half().cuda()
    tensors = o, v.transpose(1, 2).contiguous().transpose(1, 2)
    filters = [t.half().cuda() for t in (torch.randn(H * D, 1, 5, 5) / 5, torch.randn(H * D), torch.randn(H, D, D) / D)]
    found = []
    for kind, backend in ((dtype, "triton"), (dtype, "torch"), (torch.float64, "torch")):
        o, v = (t.to(kind) for t in tensors)
        weight, bias, gate = (t.to(kind) for t in filters)
        cells, agents = (
            means(o, grid, windows, and_of=v, backend=backend) for windows in (Windows(size=3), Windows(count=(7, 8)))
        )
        gated, plain = (add_depthwise(o, v, grid, weight, bias, gate=own, backend=backend) for own in (gate, None))
        found.append([*cells, *agents, gated, plain])
    return shares(("cell k", "cell v", "agent k", "agent v", "gated", "convolved"), *found, dtype)


def check_networks(sizes, dtype):
    """Check residual networks of C channels and `mid` between their layers, alone and two at once."""
    C, mid = sizes
    shapes = (mid, C), (mid,), (mid,), (mid,), (C, mid), (C,)
    x = torch.randn(2, 1111, C).half().cuda()
    drawn = [[(torch.randn(s) / (s[-1] ** 0.5 if len(s) > 1 else 2)).half().cuda() for s in shapes] for _ in range(2)]
    found = []
    for kind, backend in ((dtype, "triton"), (dtype, "torch"), (torch.float64, "torch")):
        networks = tuple(Network(*[t.to(kind) for t in one]) for one in drawn)
        found.append([*add_networks(x.to(kind), networks, backend=backend)])
        found[-1] += add_networks(x.to(kind), networks[1:], backend=backend)
    return shares(("q", "k", "alone"), *found, dtype)


def gradients(function, leaves, do):
    leaves = [t.detach().requires_grad_() for t in leaves]
    o = function(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def million(dtype=torch.bfloat16):
    """Return the shares of 1M tokens against float64, two heads."""
    q, k, v, do = drawn(1 << 20, 2, 64, dtype)
    found = {}
    for name in ("linear", "rala"):
        f = operators(1 << 20, 2, 64)[name]
        ours = gradients(f, (q, k, v), do)
        exact = gradients(lambda *t: f(*t, backend="torch"), [t.double() for t in (q, k, v)], do.double())  # noqa: B023
        plain = gradients(lambda *t: f(*t, backend="torch"), (q, k, v), do)  # noqa: B023
        found[name] = shares("oqkv", ours, plain, exact, dtype)
    return found


def million_fp32():
    return million(torch.float32)


def large():
    """Return the errors against one batch entry alone where B * N * H * D is above 2^31: offsets need 64 bits."""
    N, H, D = 512 * 512, 24, 128
    found = {}
    for name, f in operators(N, H, D, B=1).items():
        if name == "agent":
            continue  # its agents have batch 1
        q, k, v, do = drawn(N, H, D, B=3)
        whole, last = gradients(f, (q, k, v), do), gradients(f, (q[2:], k[2:], v[2:]), do[2:])
        pairs = zip(whole, last, strict=True)
        found[name] = [round(((a[2:] - b).abs().max() / b.abs().max()).item(), 4) for a, b in pairs]
    return found


def memory():
    """Return the peaks above inputs and outputs as shares of them, forward and with the backward."""
    found = {}
    for name, f in operators(256 * 256, 10, 64).items():
        q, k, v, do = drawn(256 * 256, 10, 64)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        o = f(*leaves)
        forward = torch.cuda.max_memory_allocated() - before - o.nbytes
        torch.autograd.grad(o, leaves, do)
        both = torch.cuda.max_memory_allocated() - before - 4 * o.nbytes
        found[name] = [round(forward / (4 * q.nbytes), 4), round(both / (8 * q.nbytes), 4)]
    return found


def modes():
    """Return whether results repeat bit for bit, and are the same compiled and in a replayed CUDA graph."""
    found = {}
    for name, f in operators(41 * 40, 4, 64).items():
        q, k, v, do = drawn(41 * 40, 4, 64)
        leaves = [t.requires_grad_() for t in (q, k, v)]

        def both(function, leaves=leaves, do=do):
            o = function(*leaves)
            return [o, *torch.autograd.grad(o, leaves, do)]

        both(f)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both(f)
        with torch.no_grad():
            for t in (*leaves, do):
                t.normal_()
        graph.replay()
        torch.cuda.synchronize()
        torch._dynamo.reset()
        same = dict(repeats=both(f), graph=captured, compiled=both(torch.compile(f, fullgraph=True)))
        found[name] = {key: all(map(torch.equal, both(f), value)) for key, value in same.items()}
    from vision_attn.kernels.linear.op import _linear

    torch.library.opcheck(_linear.registered, (*leaves, None, None, None, None, "elu", 1e-6))
    return found


def elsewhere():
    """Return whether a GPU that is not the current one computes the same, bit for bit; None where there is one GPU."""
    if torch.cuda.device_count() < 2:
        return None
    found = {}
    for name in ("linear", "rala"):  # the others hold tensors of their own
        f, results = operators(41 * 40, 4, 64)[name], []
        for device in ("cuda:0", "cuda:1"):
            q, k, v, do = (t.to(device) for t in drawn(41 * 40, 4, 64))
            results.append([f(q, k, v)])
            leaves = [t.requires_grad_() for t in (q, k, v)]
            o = f(*leaves)
            results[-1] += [o, *torch.autograd.grad(o, leaves, do)]
        found[name] = all(torch.equal(a, b.to(a.device)) for a, b in zip(*results, strict=True))
    return found


def attempt(function, *args):
    start = time.time()
    try:
        return function(*args), round(time.time() - start, 1)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]} @ {traceback.format_exc().splitlines()[-4:-1]}", 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", default="bf16,fp16,fp32")
    parser.add_argument("--only", default="")
    parser.add_argument("--skip-large", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "check_linear.json")
    args = parser.parse_args()
    import triton

    result = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__, check={})
    portable = "linear_injective-weights"  # its key weights take a gradient
    rows = [(check, case, case) for case in CASES + TUNED if case.operator in OPERATORS and str(case) != portable]
    rows += [(check_features, D, f"hedgehog-d{D}") for D in (16, 40, 64, 72, 80, 128)]
    rows += [(check_image, D, f"image-d{D}") for D in (32, 40, 64, 80, 128)]
    rows += [
        (check_networks, (C, mid), f"residual-c{C}-m{mid}")
        for C, mid in (
            (320, 320),
            (640, 640),
            (1280, 1280),
            (640, 40),
            (1280, 80),
            (72, 200),
            (1536, 1536),
            (3072, 192),
        )
    ]
    rows = [row for row in rows if args.only in str(row[2])]
    with pool() as workers:
        every = itertools.product(args.dtypes.split(","), rows)
        every = [job for job in every if job[1][0] is not check_networks or job[0] != "fp32"]  # 16 bits alone
        jobs = {workers.submit(attempt, f, x, DTYPES[name]): f"{name} {case}" for name, (f, x, case) in every}
        for job in as_completed(jobs):
            found, seconds = job.result()
            result["check"][jobs[job]] = found
            bad = isinstance(found, str) or not all(share <= 1 for share in found.values())
            print("FAIL" if bad else "ok  ", jobs[job], found, f"{seconds}s", flush=True)
    args.out.write_text(json.dumps(result, indent=1))
    whole = () if args.only else (million, million_fp32, memory, modes, elsewhere)
    for function in (*whole, *(() if args.only or args.skip_large else (large,))):
        result[function.__name__] = attempt(function)[0]
        print(function.__name__, result[function.__name__], flush=True)
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
