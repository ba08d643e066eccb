"""Compile every launch that a GPU would make, without that GPU, and compare its shared memory with what the GPU has.

    PYTHONPATH=. python tests/gpu/compile_matrix.py sm_89 [--only TEXT] [--dtypes bfloat16] [--dims 64,128] [--jobs 2]
    PYTHONPATH=. python tests/gpu/compile_matrix.py sm_89 --out docs/compiles.json    # keeps what it finds

Nothing runs: each launch stops after compiling, for a driver that says it is another GPU. A row is one kernel of one
call. It is bad if it does not compile or asks for more shared memory than a block has; the exit status is 1 if any is.
It says that launches compile, not that they are right or fast there.

Triton keeps what is compiled, in $TRITON_CACHE_DIR, so a run that was stopped goes on where it was. `--out` adds to a
file: of each architecture, dtype and number of channels, and each operator, how many kernels a call launches, the most
shared memory that one takes, and what was refused or bad.
"""

import argparse
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

LIMITS = {  # bytes of shared memory of a block
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
    "gfx1100": 65536,
}
DTYPES, DIMS = ("bfloat16", "float16", "float32"), (40, 64, 72, 128, 160, 256)
OPERATORS = (
    "local-disc", "local-square", "local-dilated", "local-bias", "local-pooled", "local-int8", "local-fp8",
    "local-square-int8", "multipole", "multipole-far", "multipole-pool2", "multipole-cell4", "multipole-narrow",
    "multipole-small", "multipole-int8", "multipole-fp8", "multipole-cell12-int8",
    "linear", "linear-features", "linear-options", "injective", "rala", "agent", "agent-options", "window",
    "window-options", "window-halo", "linear_local", "linear_local-options", "hedgehog",
    "means", "depthwise", "residual", "residual-narrow",
)  # fmt: skip


class Driver:
    """A driver of Triton for a GPU that is not there: any question but these has itself for an answer."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def __getattr__(self, name: str) -> "Driver":
        return self

    def __call__(self, *args: object, **kwargs: object) -> "Driver":
        return self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self.architecture.startswith("gfx"):
            return GPUTarget("hip", self.architecture, 64 if self.architecture == "gfx942" else 32)
        return GPUTarget("cuda", int(self.architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


SIZE = 32, 40  # of the grid
ROWS: list[tuple[str, Any, int, int]] = []  # of the job that this process is at


def prepare(architecture: str, limit: int | None = None) -> None:
    """Make this process one that compiles for a GPU, and launches nothing."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Driver(architecture))
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **named)
        if not warmup:  # a launch, not one that is tried
            about = kernel.metadata
            ROWS.append((self.fn.__name__, about.shared, about.num_warps, about.num_stages))
        return kernel if warmup else None

    JITFunction.run = compile_only
    import torch

    torch.version.hip = "6" if architecture.startswith("gfx") else None
    import vision_attn.kernels
    from vision_attn.kernels import launches

    for module in pkgutil.walk_packages(vision_attn.kernels.__path__, "vision_attn.kernels."):
        importlib.import_module(module.name)  # before the interpreter is asked for
    os.environ["VISION_ATTN_LAUNCHES"] = os.devnull  # the tables of the package alone
    launches.target_of = lambda device: launches.Target(architecture, limit or LIMITS[architecture], 84)
    os.environ["TRITON_INTERPRET"] = "1"  # lets tensors of the CPU through; Triton itself has read it already


def compiled(job: tuple[str, str, int]) -> tuple[tuple[str, str, int], list[tuple[str, Any, int, int]]]:
    """Return the job, and of each kernel it would launch: name, bytes of shared memory or error, warps, stages."""
    operator, dtype, D = job
    import torch

    from vision_attn.kernels.backend import LaunchError

    ROWS.clear()
    call = _call_row if operator in OPTIONS else _call
    try:
        try:
            call(operator, getattr(torch, dtype), D).sum().backward()
        except ValueError as error:  # reasons: a kernel without a backward, or for narrower heads
            ROWS.append(("refused", str(error), 0, 0))
            with torch.no_grad():
                call(operator, getattr(torch, dtype), D)
    except ValueError as error:
        ROWS.append(("refused", str(error), 0, 0))
    except LaunchError as error:
        ROWS.append(("host" if "not compile" in str(error) else "refused", str(error), 0, 0))
    except Exception as error:  # a compiler may fail in any way: that is a result
        ROWS.append(("host", f"{type(error).__name__}: {str(error).strip()[:200]}", 0, 0))
    return job, list(ROWS)


OPTIONS = {  # rows of the tests with most of what an operator takes
    "linear-options": "linear-rala-hidden",
    "agent-options": "agent-direct-hidden",
    "window-options": "window-text-hidden",
    "linear_local-options": "linear_local-hidden",
}


def _call_row(operator: str, dtype: Any, D: int) -> Any:
    """Call an operator with the options of a row of the tests."""
    from operator_cases import CASES, Case, call, inputs_of

    case = next(case for case in CASES if str(case) == OPTIONS[operator])
    case = Case(case.operator, case.id, case.options | dict(D=D) | ({"F": D} if "F" in case.options else {}))
    return call(case, inputs_of(case, dtype), "triton")


def _call(operator: str, dtype: Any, D: int) -> Any:
    """Call an operator by its Triton backend, with gradients."""
    import torch

    from vision_attn import RALA, Agent, Halo, HiLo, InLine, LinFusion
    from vision_attn.grid import Grid
    from vision_attn.kernels.image import Windows, add_depthwise, means
    from vision_attn.kernels.linear import Features, linear_attention
    from vision_attn.kernels.linear_local import linear_local_attention
    from vision_attn.kernels.local import Window, local_attention
    from vision_attn.kernels.multipole import Cells, multipole_attention
    from vision_attn.kernels.residual import Network, add_networks
    from vision_attn.processors.base import Layer

    height, width = (16, 16) if operator == "multipole-small" else SIZE  # small: no means are met
    grid = Grid(height, 8 if operator == "multipole-narrow" else width, prefix=64)

    def draw(*shape: int) -> Any:
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    q, k, v = (draw(1, grid.tokens, 2, D) for _ in range(3))
    windows: dict[str, Callable[[], Window]] = {
        "local-disc": lambda: Window(radius=16),
        "local-square": lambda: Window(kernel_size=7),
        "local-dilated": lambda: Window(kernel_size=13, dilation=2),
        "local-bias": lambda: Window(kernel_size=7, bias=torch.zeros(2, 13, 13, requires_grad=True)),
        "local-int8": lambda: Window(radius=16, precision="int8"),
        "local-fp8": lambda: Window(radius=16, precision="fp8"),
        "local-square-int8": lambda: Window(kernel_size=7, dilation=2, precision="int8"),
        "local-pooled": lambda: Window(radius=8, pooled=(draw(1, 80, 2, D), draw(1, 80, 2, D))),
    }
    cells = {
        "multipole": Cells(),
        "multipole-far": Cells(exact=0),
        "multipole-pool2": Cells(pool=2, spread=0.5),
        "multipole-narrow": Cells(near=0),
        "multipole-small": Cells(),
        "multipole-cell4": Cells(cell=4, exact=8),
        "multipole-int8": Cells(spread=0.5, precision="int8"),
        "multipole-fp8": Cells(spread=0.5, precision="fp8"),
        "multipole-cell12-int8": Cells(cell=12, near=0, precision="int8"),
    }
    specs = {
        "rala": RALA(),
        "agent": Agent(num_agents=49),
        "window": HiLo(alpha=0.5, window_size=8),
        "window-halo": Halo(),
        "injective": InLine(),
        "hedgehog": LinFusion(feature_map="hedgehog"),
    }
    if operator in windows:
        return local_attention(q, k, v, grid, windows[operator](), backend="triton")
    if operator in cells:
        return multipole_attention(q, k, v, grid, cells[operator], backend="triton")
    weight, bias, gate = draw(2 * D, 1, 5, 5), draw(2 * D), draw(2, D, D)

    def network(mid: int) -> Any:  # of a layer of ten heads
        return Network(*[draw(*shape) for shape in ((mid, 10 * D), (mid,), (mid,), (mid,), (10 * D, mid), (10 * D,))])

    x = draw(1, grid.tokens, 10 * D)
    calls: dict[str, Callable[[], Any]] = {
        "residual": lambda: add_networks(x, (network(10 * D), network(10 * D)), backend="triton")[0],
        "residual-narrow": lambda: add_networks(x, (network(40),), backend="triton")[0],
        "linear": lambda: linear_attention(q, k, v, backend="triton"),
        "means": lambda: means(k, grid, Windows(count=(7, 7)), and_of=v, backend="triton")[0],
        "depthwise": lambda: add_depthwise(q, v, grid, weight, bias, gate=gate, backend="triton"),
    }
    if operator in calls:
        return calls[operator]()
    if operator == "linear-features":  # as the Hedgehog's
        a, b = (draw(1, grid.tokens, 2, 2 * D) for _ in range(2))
        return linear_attention(a, b, v, features=Features("none"), backend="triton")
    if operator == "linear_local":
        a, b = (draw(1, grid.tokens, 2, 2 * D) for _ in range(2))
        gate = torch.ones(2, requires_grad=True)
        return linear_local_attention((q, a), (k, b), v, grid, 8, gate, backend="triton")
    return specs[operator].build(Layer("", 2, D, "triton", 2 * D)).to(dtype)(q, k, v, grid)


def jobs(given: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Return what to compile."""
    for dtype in given.dtypes.split(","):
        for D in map(int, given.dims.split(",")):
            for operator in given.operators.split(","):
                if given.only in f"{operator} {dtype} {D}":
                    yield operator, dtype, D


def sign_of(name: str, shared: Any, limit: int) -> str:
    """Return 'ok ', 'no ' for what is refused before a launch, 'BAD' for what does not compile or fit."""
    if name == "refused":
        return "no "
    return "BAD" if isinstance(shared, str) or shared > limit else "ok "


def outcome(rows: list[tuple[str, Any, int, int]], limit: int) -> dict[str, Any]:
    """Return what a call made of its kernels: their number, the most bytes of shared memory, what is refused or bad."""
    signs = [(sign_of(name, shared, limit), name, shared) for name, shared, _, _ in rows]
    fit = [shared for sign, _, shared in signs if sign == "ok "]
    found: dict[str, Any] = dict(kernels=len(fit), shared=max(fit, default=0))
    for key, sign in (("refused", "no "), ("bad", "BAD")):
        texts = [f"{shared}" if sign == "no " else f"{name}: {shared}" for s, name, shared in signs if s == sign]
        found |= {key: "; ".join(dict.fromkeys(texts))} if texts else {}
    return found


def keep(path: Path, architecture: str, limit: int, found: dict[tuple[str, str, int], dict[str, Any]]) -> None:
    """Add what calls made of their kernels to a file."""
    import triton

    whole = json.loads(path.read_text()) if path.exists() else {}
    about = whole.setdefault(architecture, dict(limit=limit, rows={}))
    about |= dict(limit=limit, triton=triton.__version__)
    for (operator, dtype, D), one in found.items():
        about["rows"].setdefault(f"{dtype} {D}", {})[operator] = one
    gpus = []
    for name, gpu in sorted(whole.items()):
        kinds = [f"   {json.dumps(kind)}: {json.dumps(rows)}" for kind, rows in gpu["rows"].items()]
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in gpu.items() if key != "rows")
        gpus.append(f'  {json.dumps(name)}: {{{head}, "rows": {{\n' + ",\n".join(kinds) + "\n  }}")
    path.write_text("{\n" + ",\n".join(gpus) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=LIMITS)
    parser.add_argument("--only", default="", help="operators, dtypes or channels whose row has this text")
    parser.add_argument("--operators", default=",".join(OPERATORS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--dims", default=",".join(map(str, DIMS)), help="channels of a head")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--shared", type=int, help="bytes of shared memory of a block, if other than the GPU's")
    parser.add_argument("--out", type=Path, help="a JSON file to add the outcome to")
    given = parser.parse_args()
    limit, count, bad, refused, found = given.shared or LIMITS[given.architecture], 0, 0, 0, {}
    with ProcessPoolExecutor(given.jobs, initializer=prepare, initargs=(given.architecture, limit)) as pool:
        for job, rows in pool.map(compiled, jobs(given)):
            launched = rows or [("host", "launched nothing", 0, 0)]
            found[job] = outcome(launched, limit)
            if given.out:  # a run that is stopped keeps what it found
                keep(given.out, given.architecture, limit, found)
            for name, shared, warps, stages in launched:
                sign = sign_of(name, shared, limit)
                wrong = sign == "BAD"
                bad += wrong
                refused += name == "refused"
                count += 1
                if wrong or given.only or name == "refused":
                    about = f"warps {warps} stages {stages}"
                    print(sign, given.architecture, *job, name, shared, about, flush=True)
    print(
        f"{given.architecture}: {bad} of {count} kernels do not compile or fit in {limit} bytes; {refused} calls "
        f"are refused before a launch"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
