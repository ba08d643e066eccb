"""Check that two source trees compute the same bits with every fused operator, and that neither is slower.

    python tests/gpu/same_bits.py --before DIR --after DIR [--only TEXT] [--dtypes bf16,fp16,fp32] [--out FILE.json]
    TRITON_INTERPRET=1 python tests/gpu/same_bits.py --before DIR --after DIR      # without a GPU: tiny sizes, no times

Every row runs forward and backward in processes of both trees, with equal inputs; outputs and gradients are compared
byte by byte. Then one process of each tree times the rows in turn: the GPU's time of a captured graph, and the time
that Python takes to launch. Exit status 1 if a row differs, fails, or has no counterpart. Needs torch and triton alone.
"""

import argparse
import importlib
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
ROUNDS = 7  # of timing both trees in turn


@dataclass(frozen=True)
class Row:
    """An operator and the options that its `problem` reads; `D` channels, `H` heads."""

    operator: str
    id: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.operator}-{self.id}"


def rows_of(operator, **rows):
    return [Row(operator, id.replace("_", "-"), options) for id, options in rows.items()]


HALF = ("bf16", "fp16")  # dtypes of rows that would take long to compile in all


ROWS = [
    *rows_of(
        "local",
        disc=dict(window=dict(radius=8), prefix=77),
        disc_d128=dict(window=dict(radius=16), prefix=64, D=128, H=8),
        disc_mask=dict(window=dict(radius=5.5), prefix=13, suffix=9, mask=True, pooled=30),
        disc_d40_strided=dict(window=dict(radius=6), D=40, strided=True),
        square=dict(window=dict(kernel_size=7), D=32),
        square_d128=dict(window=dict(kernel_size=13), prefix=5, D=128),
        square_even_d72=dict(dtypes=HALF, window=dict(kernel_size=(4, 6)), prefix=3, D=72, scale=0.3),
        dilated=dict(window=dict(kernel_size=3, dilation=(2, 3)), suffix=6),
        bias=dict(window=dict(kernel_size=5), bias=True, prefix=4, mask=True),
        bias_dilated=dict(dtypes=HALF, window=dict(kernel_size=3, dilation=2), bias=True, pooled=5, D=128),
        bias_far=dict(dtypes=HALF, window=dict(kernel_size=(5, 7)), bias=True, far=True),
        whole=dict(window=dict(radius=float("inf")), prefix=20, pooled=9),
        negative=dict(dtypes=HALF, window=dict(radius=4), prefix=2, scale=-0.2),
        lse=dict(window=dict(kernel_size=5), prefix=7, lse=True),
        d256=dict(dtypes=HALF, window=dict(radius=6), prefix=17, D=256, H=2),
    ),
    *rows_of(
        "linear",
        elu=dict(),
        elu_d128=dict(D=128, F=128, H=8),
        relu=dict(map="relu", D=40, F=40),
        none=dict(map="none", F=96),
        weights=dict(weight=True),
        rotary=dict(rotary=True),
        rala=dict(rotary=True, query=True),
        rala_mask=dict(query=True, weight=True, D=128, F=128),
        more_keys=dict(dtypes=HALF, M=1.7, D=24, F=24),
        strided=dict(dtypes=HALF, strided=True),
        wide=dict(dtypes=HALF, D=144, F=160, H=2),
    ),
    *rows_of("feature_mean", plain=dict(), weighted=dict(dtypes=HALF, weight=True, F=40)),
    *rows_of(
        "agent",
        plain=dict(A=49, D=128),
        biases=dict(A=9, biases=True),
        direct=dict(A=16, biases=True, direct=21, mask=True, query_scale=0.2),
        mask_strided=dict(dtypes=HALF, A=25, mask=True, strided=True, D=40),
        one=dict(dtypes=HALF, A=1, direct=5),
    ),
    *rows_of(
        "window",
        even=dict(size=8),
        small=dict(size=2, D=128),
        text_mask=dict(size=(7, 5), prefix=33, suffix=5, mask=True),
        stripe=dict(dtypes=HALF, size=(40, 3), D=40, scale=0.4),
        d256=dict(dtypes=HALF, size=4, prefix=9, D=256, H=2),
    ),
    *rows_of(
        "linear_local",
        even=dict(size=8, F=96),
        text_mask=dict(size=(7, 5), prefix=33, suffix=5, mask=True, F=128, D=128),
        one_cell=dict(size=64, prefix=4, F=40, D=40),
    ),
    *rows_of("hedgehog", d64=dict(), d128=dict(D=128), d40=dict(D=40)),
]


def problem(row, dtype, device, tiny):
    """Return an operator as a function of tensors, and these; the same for every tree up to names of arguments."""
    o = dict(H=4, D=64) | row.options
    H, D = (1 if tiny else o["H"]), o["D"]
    generator = torch.Generator().manual_seed(zlib.crc32(str(row).encode()))

    def draw(*shape, positive=False):
        t = torch.randn(shape, generator=generator)
        return (t.abs() if positive else t).to(dtype).to(device)

    def tokens(n, channels=D, **options):
        if o.get("strided"):
            return draw(2, H, n, channels, **options).transpose(1, 2)
        return draw(2, n, H, channels, **options)

    def keep(n):
        return (torch.rand(2, n, generator=generator) > 0.3).to(device)

    make = globals()[f"_{row.operator}"]
    return make(o, H, D, tiny, draw, tokens, keep)


def _grid(o, tiny):
    from vision_attn.grid import Grid

    height, width = (7, 10) if tiny else (43, 50)
    prefix, suffix = (min(o.get(name, 0), 3) if tiny else o.get(name, 0) for name in ("prefix", "suffix"))
    return Grid(height, width, prefix=prefix, suffix=suffix)


def _local(o, H, D, tiny, draw, tokens, keep):
    from vision_attn.kernels.local import Window, local_attention

    grid = _grid(o, tiny)
    leaves = {name: tokens(grid.tokens) for name in "qkv"}
    window = Window(**o["window"])
    if tiny and window.kernel_size == 13:
        window = Window(kernel_size=7)
    if o.get("far") and not tiny:  # a table of relative biases that does not fit beside a tile
        window = Window(kernel_size=(33, 35))
    if o.get("bias"):
        leaves["bias"] = draw(H, *(2 * K - 1 for K in window.kernel))
    if o.get("pooled"):
        leaves |= {name: tokens(o["pooled"]) for name in ("pooled_k", "pooled_v")}
    mask = keep(grid.prefix + grid.suffix) if o.get("mask") else None
    scale = o.get("scale")

    def function(t):
        parts = dict(bias=t.get("bias"), pooled=(t["pooled_k"], t["pooled_v"]) if "pooled_k" in t else None)
        full = Window(window.radius, window.kernel_size, window.dilation, **parts)
        if o.get("lse"):
            return _lse_function()(t["q"], t["k"], t["v"], grid, full, mask, scale or D**-0.5)
        return local_attention(t["q"], t["k"], t["v"], grid, full, mask=mask, scale=scale, backend="triton")

    return function, leaves


def _lse_function():
    """Return the operator that also gives its log-sum-exp, wherever a tree has it."""
    for name in ("local", "local.op", "_local_triton"):
        try:
            return importlib.import_module(f"vision_attn.kernels.{name}").local_attention_lse
        except (ModuleNotFoundError, AttributeError):
            continue
    raise AttributeError("no local_attention_lse")


def _linear(o, H, D, tiny, draw, tokens, keep):
    from vision_attn.kernels.linear import Features, feature_mean, linear_attention

    N, F = (50 if tiny else 2100), o.get("F", D)
    M = int(N * o.get("M", 1))
    map_ = o.get("map", "elu")
    positive = map_ == "none"
    leaves = dict(q=tokens(N, F, positive=positive), k=tokens(M, F, positive=positive), v=tokens(M))
    if o.get("weight"):
        leaves["key_weight"] = draw(2, M, H, positive=True) * keep(M)[..., None]
    rotary = None
    if o.get("rotary"):
        angles = torch.arange(N)[:, None] * torch.linspace(0.1, 1, F // 2).repeat_interleave(2)
        rotary = tuple(t.to(leaves["q"].device) for t in (angles.cos(), angles.sin()))

    def function(t):
        query = feature_mean(t["q"], backend="triton") * F**-0.5 if o.get("query") else None
        return linear_attention(
            t["q"], t["k"], t["v"], features=Features(map_, rotary), key_weight=t.get("key_weight"),
            global_query=query, backend="triton",
        )  # fmt: skip

    return function, leaves


def _feature_mean(o, H, D, tiny, draw, tokens, keep):
    from vision_attn.kernels.linear import feature_mean

    N = 50 if tiny else 2100
    leaves = dict(q=tokens(N, o.get("F", D)))
    if o.get("weight"):
        leaves["weight"] = draw(2, N, H, positive=True)
    return lambda t: feature_mean(t["q"], weight=t.get("weight"), backend="triton"), leaves


def _agent(o, H, D, tiny, draw, tokens, keep):
    from vision_attn.kernels.agent import Agents, Direct, agent_attention

    N, M, A = (40, 50, min(o["A"], 9)) if tiny else (2100, 2200, o["A"])
    leaves = dict(q=tokens(N), k=tokens(M), v=tokens(M), agents=tokens(A))
    if o.get("biases"):
        leaves |= dict(key_bias=draw(H, A, M), query_bias=draw(H, N, A))
    if o.get("direct"):
        leaves |= {name: tokens(o["direct"]) for name in ("direct_k", "direct_v")}
    masks = (keep(M), keep(o["direct"]) if o.get("direct") else None) if o.get("mask") else (None, None)
    name = "mask" if "mask" in inspect.signature(agent_attention).parameters else "seen"

    def function(t):
        agents = Agents(t["agents"], t.get("key_bias"), t.get("query_bias"), o.get("query_scale"))
        direct = Direct(t["direct_k"], t["direct_v"], masks[1]) if "direct_k" in t else None
        return agent_attention(t["q"], t["k"], t["v"], agents, direct=direct, backend="triton", **{name: masks[0]})

    return function, leaves


def _window(o, H, D, tiny, draw, tokens, keep):
    from vision_attn.kernels.window import window_attention

    grid = _grid(o, tiny)
    mask = keep(grid.prefix + grid.suffix) if o.get("mask") else None
    options = dict(mask=mask, scale=o.get("scale"), backend="triton")
    leaves = {name: tokens(grid.tokens) for name in "qkv"}
    return lambda t: window_attention(t["q"], t["k"], t["v"], grid, o["size"], **options), leaves


def _linear_local(o, H, D, tiny, draw, tokens, keep):
    from vision_attn.kernels.linear_local import linear_local_attention

    grid = _grid(o, tiny)
    mask = keep(grid.prefix + grid.suffix) if o.get("mask") else None
    leaves = {name: tokens(grid.tokens) for name in "qkv"}
    leaves |= {name: tokens(grid.tokens, o["F"], positive=True) for name in "ab"}
    gate = torch.linspace(0.5, 2, H).to(leaves["q"].device)

    def function(t):
        with torch.no_grad():
            return linear_local_attention(
                (t["q"], t["a"]), (t["k"], t["b"]), t["v"], grid, o["size"], gate, mask=mask, backend="triton"
            )

    return function, leaves


def _hedgehog(o, H, D, tiny, draw, tokens, keep):
    from vision_attn.kernels.hedgehog import hedgehog

    leaves = dict(x=tokens(50 if tiny else 2100), weight=draw(H, D, D) / D**0.5)

    def function(t):
        with torch.no_grad():
            return hedgehog(t["x"], t["weight"], backend="triton")

    return function, leaves


def gradients_of(outputs, leaves):
    """Return the gradients for a cosine cotangent of every output, if there are any."""
    if not outputs[0].requires_grad:
        return []
    cotangents = [torch.cos(0.7 * torch.arange(o.numel(), device=o.device)).view_as(o).to(o.dtype) for o in outputs]
    return list(torch.autograd.grad(outputs, leaves, cotangents))


def outputs_of(function, leaves):
    o = function(leaves)
    return list(o) if isinstance(o, tuple) else [o]


def computed(row, dtype, device):
    """Return the outputs and gradients on the CPU, and whether a second run gives the same bits."""
    function, leaves = problem(row, dtype, device, device == "cpu")
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    runs = []
    for _ in range(1 if device == "cpu" else 2):
        with sdpa_kernel(SDPBackend.MATH):  # what is dense beside an operator repeats, too
            outputs = outputs_of(function, leaves)
            runs.append([t.detach().cpu() for t in (*outputs, *gradients_of(outputs, list(leaves.values())))])
    return dict(tensors=runs[0], repeats=all(map(same, runs[0], runs[-1])))


def same(a, b):
    """Whether two tensors have the same shape, dtype and bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def timer(row, dtype):
    """Return what measures a row: ms of the GPU for a captured forward and backward, and us of Python for a forward."""
    function, leaves = problem(row, dtype, "cuda", False)
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    plain = {name: t.detach() for name, t in leaves.items()}

    def both():
        outputs = outputs_of(function, leaves)
        return gradients_of(outputs, list(leaves.values()))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            both()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = both()
    del kept

    def measure():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        samples = []
        for _ in range(10):
            begin.record()
            for _ in range(5):
                graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / 5)
        launches = []
        with torch.no_grad():
            for _ in range(20):
                torch.cuda.synchronize()
                start = time.perf_counter()
                function(plain)
                launches.append((time.perf_counter() - start) * 1e6)
        torch.cuda.synchronize()
        return statistics.median(samples), statistics.median(launches)

    return measure


def jobs_of(only, dtypes):
    every = [f"{name} {row}" for name in dtypes for row in ROWS if name in row.options.get("dtypes", DTYPES)]
    return [job for job in every if only in job]


def split(job):
    name, id = job.split(" ")
    return next(row for row in ROWS if str(row) == id), DTYPES[name]


def compute_worker(jobs, file):
    """Compute rows in this process's tree and save each as it is done."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for i, job in enumerate(jobs):
        try:
            found = computed(*split(job), device)
        except Exception as error:  # a row of its own in the report
            found = f"{type(error).__name__}: {str(error)[:300]} @ {traceback.format_exc().splitlines()[-4:-1]}"
        torch.save({job: found}, f"{file}.{i}.part")
        Path(f"{file}.{i}.part").rename(f"{file}.{i}.pt")


def timing_worker():
    """Answer lines on stdin: a job is timed once, an empty line forgets the last one."""
    measures = {}
    for line in sys.stdin:
        job = line.strip()
        answer = None
        try:
            if job not in measures:
                measures.clear()
                measures[job] = timer(*split(job))
            answer = measures[job]()
        except Exception as error:
            answer = f"{type(error).__name__}: {str(error)[:200]}"
        print("timed " + json.dumps(answer), flush=True)


def process(tree, *arguments, **options):
    """Start this script as a process that imports a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--tree", str(tree), *arguments]
    return subprocess.Popen(command, env=environment, cwd=tree, text=True, **options)


def compare_bits(trees, jobs, folder, workers, report, deadline):
    """Run all rows in processes of both trees until the deadline, and note which differ."""
    running = []
    for side, tree in trees.items():
        for i in range(workers):
            (folder / f"{side}-{i}").write_text(json.dumps(jobs[i::workers]))
            running.append(process(tree, "--jobs", str(folder / f"{side}-{i}")))
    for one in running:
        try:
            one.wait(max(0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            one.kill()
    found = {}
    for side in trees:
        parts = [torch.load(file) for file in folder.glob(f"{side}-*.pt")]
        found[side] = {job: value for part in parts for job, value in part.items()}
    for job in jobs:
        report[job] = verdict(
            *(found[side].get(job, "not computed: out of time, or its process died") for side in trees)
        )


def verdict(before, after):
    """Return the row of the report for the results of both trees."""
    broken = {side: r for side, r in (("before", before), ("after", after)) if isinstance(r, str)}
    if broken:
        return dict(same=False, errors=broken)
    pairs = list(zip(before["tensors"], after["tensors"], strict=False))
    differ = [i for i, (a, b) in enumerate(pairs) if not same(a, b)]
    row = dict(
        same=not differ and len(before["tensors"]) == len(after["tensors"]),
        tensors=[len(before["tensors"]), len(after["tensors"])],
        repeats=[before["repeats"], after["repeats"]],
        finite=all(bool(t.isfinite().all()) for t in before["tensors"]),
    )
    if differ:
        row["differ"] = {
            i: (pairs[i][0].double() - pairs[i][1].double()).abs().max().item()
            if pairs[i][0].shape == pairs[i][1].shape
            else "shape"
            for i in differ
        }
    return row


def compare_times(trees, jobs, report, deadline):
    """Time rows in one process of each tree, in turn, until the deadline; ratios are after / before."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    workers = {side: process(tree, "--times", **pipes) for side, tree in trees.items()}

    def ask(side, job):
        try:
            workers[side].stdin.write(job + "\n")
            workers[side].stdin.flush()
            for line in workers[side].stdout:
                if line.startswith("timed "):
                    return json.loads(line[6:])
        except BrokenPipeError:
            pass
        return "its process died"

    try:
        for job in jobs:
            if time.time() > deadline:
                break
            if not report[job]["same"]:
                continue
            rounds = []
            for i in range(ROUNDS):
                order = list(trees) if i % 2 else list(trees)[::-1]
                rounds.append({side: ask(side, job) for side in order})
                if any(isinstance(value, str) for value in rounds[-1].values()):
                    break
            report[job]["times"] = summary(rounds)
    finally:
        for one in workers.values():
            one.kill()


def summary(rounds):
    """Return medians over the rounds: ms and us of both trees, and the ratios."""
    if any(isinstance(value, str) for value in rounds[-1].values()):
        return rounds[-1]
    found = {}
    for i, name in enumerate(("gpu", "host")):
        pairs = [(r["before"][i], r["after"][i]) for r in rounds]
        found[f"{name}_before"], found[f"{name}_after"] = (statistics.median(side) for side in zip(*pairs, strict=True))
        found[f"{name}_ratio"] = statistics.median(after / before for before, after in pairs)
    return {name: round(value, 4) for name, value in found.items()}


def shown(job, row):
    mark = "same  " if row["same"] else "DIFFER"
    times = row.get("times", {})
    ratios = " ".join(f"{name} x{times[f'{name}_ratio']:.3f}" for name in ("gpu", "host") if f"{name}_ratio" in times)
    rest = {key: row[key] for key in ("errors", "differ") if key in row}
    if "repeats" in row and not all(row["repeats"]):
        rest["repeats"] = row["repeats"]
    return " ".join([mark, job, ratios, str(rest) if rest else ""]).rstrip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--after", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--dtypes", default="bf16,fp16,fp32" if torch.cuda.is_available() else "fp16,fp32")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "same_bits.json")
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2)) // 2), help="of each tree")
    parser.add_argument("--seconds", type=float, default=210, help="on a GPU, no row is computed or timed after that")
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--times", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tree:
        import vision_attn

        assert Path(vision_attn.__file__).is_relative_to(args.tree), f"{vision_attn.__file__} is not of {args.tree}"
        timing_worker() if args.times else compute_worker(json.loads(args.jobs.read_text()), args.jobs)
        return 0
    if args.before is None or args.after is None:
        parser.error("give --before and --after")
    gpu = torch.cuda.is_available()
    if not gpu and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("no GPU is here: set TRITON_INTERPRET=1")
    import triton

    start, trees = time.time(), dict(before=args.before.resolve(), after=args.after.resolve())
    jobs, report = jobs_of(args.only, args.dtypes.split(",")), {}
    with tempfile.TemporaryDirectory() as folder:
        deadline = start + (args.seconds - 20 if gpu else 10**6)
        compare_bits(trees, jobs, Path(folder), args.workers, report, deadline)
    print(f"{len(jobs)} rows computed in {time.time() - start:.0f} s", flush=True)
    if gpu:
        compare_times(trees, jobs, report, start + args.seconds)
    for job in jobs:
        print(shown(job, report[job]), flush=True)
    bad = [job for job in jobs if not report[job]["same"]]
    ratios = {
        name: [row["times"][f"{name}_ratio"] for row in report.values() if f"{name}_ratio" in row.get("times", {})]
        for name in ("gpu", "host")
    }
    about = dict(
        device=torch.cuda.get_device_name() if gpu else "interpreter",
        torch=torch.__version__,
        triton=triton.__version__,
    )
    median = {name: round(statistics.median(values), 4) for name, values in ratios.items() if values}
    result = dict(**about, seconds=round(time.time() - start), same=len(jobs) - len(bad), differ=bad,
                  timed=len(ratios["gpu"]), median_ratio=median, rows=report)  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1))
    print(f"{result['same']} of {len(jobs)} rows have the same bits; {result['timed']} timed, median ratios {median}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
