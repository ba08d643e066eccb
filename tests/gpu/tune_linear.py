"""Times launches of the linear, agent, window and linear-local kernels on a GPU: `check_linear.py --tune`."""

import importlib
import itertools
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch

from vision_attn.grid import Grid
from vision_attn.kernels.agent import Agents, agent_attention
from vision_attn.kernels.hedgehog import hedgehog
from vision_attn.kernels.linear import Features, feature_mean, linear_attention
from vision_attn.kernels.linear_local import linear_local_attention
from vision_attn.kernels.triton.launching import Launch
from vision_attn.kernels.window import window_attention

# Module, table, operator, whether the backward is timed.
TABLES = {
    "linear_state": ("linear.forward", "_STATE", "linear", False),
    "linear_output": ("linear.forward", "_OUTPUT", "linear", False),
    "linear_queries": ("linear.backward", "_QUERIES", "linear", True),
    "linear_keys": ("linear.backward", "_KEYS", "linear", True),
    "agent_forward": ("agent.forward", "_FORWARD", "agent", False),
    "agent_queries": ("agent.backward", "_QUERIES", "agent", True),
    "agent_keys": ("triton.pairs", "_KEYS", "agent", True),
    "window_forward": ("window.forward", "_FORWARD", "window", False),
    "window_queries": ("window.backward", "_QUERIES", "window", True),
    "window_keys": ("window.backward", "_KEYS", "window", True),
    "linear_local": ("linear_local.forward", "_FORWARD", "linear_local", False),
    "hedgehog": ("hedgehog.forward", "_LAUNCHES", "hedgehog", False),
}
SIZES = {64: ((64 * 64, 10), (256 * 256, 10)), 128: ((256 * 256, 24),), 256: ((128 * 128, 8),)}


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


def inference_operators(N, H, D, dtype=torch.bfloat16, B=1):
    """Return the operators without gradients as functions of q, k, v, with cells of 8 and 2 D features, 256 at most."""
    side = int(N**0.5)
    grid = Grid(side, N // side, suffix=N - side * (N // side))
    a, b = (torch.rand(B, N, H, min(2 * D, 256), device="cuda", dtype=dtype) for _ in range(2))
    weight, gate = torch.randn(H, D, D, device="cuda") / D**0.5, torch.ones(H, device="cuda")
    return {
        "linear_local": lambda q, k, v: linear_local_attention((q, a), (k, b), v, grid, 8, gate, backend="triton"),
        "hedgehog": lambda q, k, v: hedgehog(q, weight, backend="triton"),
    }


def drawn(N, H, D, dtype=torch.bfloat16, B=1):
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(B, N, H, D, generator=generator, device="cuda", dtype=dtype) for _ in range(4)]


def timed(make, repeats=20):
    """Return the median milliseconds of a CUDA graph's replays of what `make` returns."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # a backward runs on the stream of its forward
        function = make()
        for _ in range(2):
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            function()
        for _ in range(5):
            graph.replay()
        samples = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end))
    return statistics.median(samples)


def timed_launch(name, key, size, launch):
    return timed(lambda: one_launch(name, key, size, launch))


def module_of(name):
    """Return the module that a table is in."""
    return f"vision_attn.kernels.{TABLES[name][0]}"


def launches(start, many):
    """Return the launches to try for an entry, the table's own first."""
    if isinstance(start, tuple) and len(start) == 2:  # slots and warps
        return [start, *itertools.product((16, 32, 64, 128), (2, 4, 8))]
    if isinstance(start, tuple):
        return [start, *itertools.product((16, 32, 64, 128), (4, 8), (1, 2, 3), (32, 64, 128))]
    programs = (4, 8, 16) if many else (1, 2, 4)
    every = list(itertools.product((16, 32, 64, 128), (4, 8, 16), (1, 2, 3, 4), programs))
    if isinstance(start, Launch):
        return [start, *(Launch(*n, boxes=boxes) for n in every for boxes in (None, Launch(*n)))]
    found = [(rows, numbers) for rows in (32, 64, 128) for numbers in every if numbers[0] >= 32 and numbers[1] <= 8]
    return [start, *(replace(start, rows=rows, launch=Launch(*numbers)) for rows, numbers in found)]


def one_launch(name, key, size, launch):
    """Return a call with a launch in the place of the table's entry; the first call compiles."""
    _, table, operator, backward = TABLES[name]
    module = importlib.import_module(module_of(name))
    setattr(module, table, getattr(module, table) | {key: launch})  # the caller puts it back
    dtype = torch.bfloat16 if key[0] == 2 else torch.float32
    q, k, v, do = drawn(*size, key[1], dtype)
    family = inference_operators if operator in ("linear_local", "hedgehog") else operators
    return passes(family(*size, key[1], dtype)[operator], (q, k, v), do, backward)()


def warm(name, key, launch):
    """Compile a launch, and return why it does not run, if so."""
    module, table = importlib.import_module(module_of(name)), TABLES[name][1]
    original = getattr(module, table)
    try:
        one_launch(name, key, (2048, 2), launch)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        setattr(module, table, original)
    return ""


def without_programs(launch):
    """Return what of a launch is compiled for."""
    if isinstance(launch, tuple):
        return launch
    if isinstance(launch, Launch):
        return replace(launch, programs=0, boxes=launch.boxes and replace(launch.boxes, programs=0))
    return replace(launch, launch=replace(launch.launch, programs=0))


def tune(only, wide):
    """Compile every launch in parallel, then time them one by one; one that does not run is left out."""
    with pool() as workers:
        for name, (_, table, _, backward) in TABLES.items():
            module = importlib.import_module(module_of(name))
            original = getattr(module, table)
            keys = [key for key in original if wide or (key[0] == 2 and key[1] <= 128)]
            for key in keys if only in name else ():
                tried = launches(original[key], name.endswith(("output", "keys")))
                distinct = {without_programs(launch): launch for launch in tried}
                jobs = {one: workers.submit(warm, name, key, launch) for one, launch in distinct.items()}
                if all(reasons := [job.result() for job in jobs.values()]):
                    print(f"{name} {key}: nothing runs: {reasons[0]}", flush=True)
                tried = [launch for launch in tried if not jobs[without_programs(launch)].result()]
                for size in SIZES[key[1]]:
                    found = []
                    for launch in tried:
                        try:
                            found.append((timed_launch(name, key, size, launch), launch))
                        except RuntimeError:
                            torch.cuda.synchronize()
                    setattr(module, table, original)
                    moved = (7 if backward else 4) * size[0] * size[1] * key[1] * key[0] / 1e9
                    best = sorted(found, key=lambda pair: pair[0])[:5]
                    lines = "; ".join(f"{ms * 1e3:.1f} us {moved / ms:.2f} TB/s {launch}" for ms, launch in best)
                    first = f"{found[0][0] * 1e3:.1f} us {found[0][1]}" if found else "nothing runs"
                    print(f"{name} {key} N, H {size}: first {first}; best {lines}", flush=True)


def pool():
    """Return processes that compile side by side."""
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def passes(function, tensors, do, backward):
    """Return what makes a call to time: the forward, or the backward of a forward that was just run."""

    def forward():
        with torch.no_grad():
            function(*tensors)

    def make():
        if not backward:
            return forward
        leaves = [t.detach().requires_grad_() for t in tensors]
        o = function(*leaves)
        return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)

    return make
