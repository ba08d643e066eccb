"""Check on a GPU that its rates are timed in 3 seconds, and that what they choose is what is faster there.

    PYTHONPATH=. python tests/gpu/check_choices.py [--only flux,sdxl] [--out FILE.json]

1. The GPU is timed with an empty store and an empty Triton cache: at most 3 seconds.
2. Every kind of layer of the benchmark's denoisers, at its native size and twice that, with every processor: is the one
   that should be faster faster? Replays of CUDA graphs, so the host is left out.
3. Whole eager steps, stock and converted: is the choice right, and does `only_if_faster` lose nothing?
4. `advise` with a measured step.

Choices of layers count as often as the model has the layer; at least 95 % must be right. Where both take the same time
within 5 %, none is wrong. Every row is printed and stored as it is found. `--device cpu` runs small twins, to try the
script.
"""

import argparse
import dataclasses
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["VISION_ATTN_RATES"] = tempfile.mkdtemp()
os.environ["USUAL_TRITON_CACHE"] = os.environ.get("TRITON_CACHE_DIR", "")
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # Triton is imported after this

import torch
import torch.nn.functional as F

from vision_attn import Clear, LinFusion, Multipole, advise, convert
from vision_attn.bench.pipelines.architectures import ARCHITECTURES
from vision_attn.bench.timing import Launch, own_stream
from vision_attn.estimation.cost import Machine, host_seconds, seconds
from vision_attn.estimation.profile import wait
from vision_attn.estimation.rates import MOST_S, machine_of
from vision_attn.estimation.step import Denoiser
from vision_attn.grid import Grid
from vision_attn.hosts import find_host
from vision_attn.processors import AttnSpec, Layer, Softmax, registrations

LEAST, SAME = 0.95, 0.05
TURNS, STEPS, STEPS_S = 3, 5, 0.5  # so many steps a turn, or fewer if they take longer together
CALLS, CALLS_MS = 20, 100.0  # the same of calls that tell the host's time


class Result:
    """What is found: printed and stored row by row.

    Args:
        out: The file.
        about: What the file says beside the rows.
    """

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self._out = out
        self.document: dict[str, Any] = about | dict(layers=[], steps=[])

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Print and store a row of 'layers' or 'steps'."""
        self.document[kind].append(row)
        print(line_of(row), flush=True)
        self._out.write_text(json.dumps(self.document, indent=1))


def rates(device: torch.device, dtype: torch.dtype) -> tuple[Machine, float]:
    """Return the rates of the device, and the seconds that it took to find them with an empty cache of kernels."""
    torch.zeros(1, device=device).item()  # a program has its model on the GPU by then
    begin = time.perf_counter()
    found = machine_of(str(device), dtype)
    taken = time.perf_counter() - begin
    del os.environ["TRITON_CACHE_DIR"]
    if usual := os.environ.pop("USUAL_TRITON_CACHE"):
        os.environ["TRITON_CACHE_DIR"] = usual  # all else may have been compiled before
    return found, taken


def layers_of(denoiser: Denoiser, size: tuple[int, int]) -> Counter[tuple[Grid, Layer]]:
    """Return the kinds of layers, and how often the model has each."""
    return Counter((grid, denoiser.layers[name]) for name, grid in denoiser.grids(size).items())


def device_ms(call: Callable[[], object], device: torch.device) -> float:
    return statistics.median(Launch(call, device).turn())


def host_us(call: Callable[[], object], device: torch.device, device_ms: float) -> float:
    """Return the microseconds until a call returns; the GPU's queue must not be full."""
    if device.type != "cuda":
        return 0.0
    count, found = max(1, min(CALLS, int(CALLS_MS / device_ms))), []
    for _ in range(3):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(count):
            call()
        found.append((time.perf_counter() - begin) / count)
    torch.cuda.synchronize(device)
    return 1e6 * min(found)


def layer_rows(
    name: str, side: int, denoiser: Denoiser, machine: Machine, about: dict[str, Any], result: Result
) -> None:
    """Measure every kind of layer at one size with every processor."""
    device, dtype = about["device"], about["dtype"]
    for (grid, layer), count in layers_of(denoiser, (side // 8, side // 8)).items():
        q, k, v = torch.randn(3, 1, grid.tokens, layer.num_heads, layer.head_dim, device=device, dtype=dtype)
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]

        def dense(tensors: list[torch.Tensor] = heads_first) -> object:
            return F.scaled_dot_product_attention(*tensors)

        stock_ms = device_ms(dense, device)
        stock_us = host_us(dense, device, stock_ms)
        estimated = seconds(Softmax(), grid, layer, machine, dtype.itemsize) * 1e3
        for known in registrations():
            for given in known.bench.values():
                # the networks of LinFusion act on projections, not in the processor
                spec = LinFusion(mid_dim=-1) if isinstance(given, LinFusion) else given
                try:
                    ours = seconds(spec, grid, layer, machine, dtype.itemsize) * 1e3
                except ValueError:  # the processor does not fit the grid
                    continue
                processor = spec.build(layer).to(device, dtype)
                call = attend(processor, q, k, v, grid)
                ms = device_ms(call, device)
                row = dict(
                    case=f"{name}-{side}", grid=f"{grid.height}x{grid.width}+{grid.prefix + grid.suffix}",
                    heads=layer.num_heads, head_dim=layer.head_dim, layers=count, spec=str(spec),
                    dense_ms=stock_ms, ms=ms, estimated_dense_ms=estimated, estimated_ms=ours,
                    host_us=host_us(call, device, ms) - stock_us, estimated_host_us=host_seconds(spec, machine) * 1e6,
                )  # fmt: skip
                result.add("layers", judged(row, ms, stock_ms, ours < estimated))


def attend(processor: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: Grid) -> Callable[[], object]:
    """Return a call of a processor."""

    def call() -> object:
        with torch.no_grad():
            return processor(q, k, v, grid)

    return call


def judged(row: dict[str, Any], ours: float, stock: float, chosen: bool) -> dict[str, Any]:
    """Say in a row whether the choice was right."""
    same = abs(ours / stock - 1) < SAME
    return row | dict(chosen=chosen, right=chosen == (ours < stock) or same, same=same)


def step_rows(
    name: str, side: int, model: Any, denoiser: Denoiser, machine: Machine, about: dict[str, Any], result: Result
) -> None:
    """Measure whole steps: stock, converted, and as `only_if_faster` has it."""
    device, dtype = about["device"], about["dtype"]
    arguments = about["architecture"].arguments(side, device, dtype)

    def step() -> float:
        found: list[float] = []
        with torch.no_grad():
            model(**arguments)  # compiles
            while not found or (len(found) < STEPS and sum(found) < 1e3 * STEPS_S):
                wait(device)
                begin = time.perf_counter()
                model(**arguments)
                wait(device)
                found.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(found)

    def ways(spec: AttnSpec) -> Iterator[float]:
        yield step()
        for only_if_faster in (False, True):
            conversion = convert(model, spec, only_if_faster=only_if_faster)
            yield step()
            conversion.revert()

    specs: tuple[AttnSpec, ...] = (Clear(radius=8), Multipole(), LinFusion())
    for spec in specs:
        every = dict.fromkeys(denoiser.names, spec)
        expected = denoiser.step((side // 8, side // 8), every, machine, dtype.itemsize)
        # in turns, of which the best counts: the host's speed drifts
        stock, ms, fewer = (min(found) for found in zip(*(list(ways(spec)) for _ in range(TURNS)), strict=True))
        names = expected.names
        row = dict(
            case=f"{name}-{side}", spec=str(spec), stock_ms=stock, ms=ms, only_if_faster_ms=fewer,
            estimated_stock_ms=expected.seconds() * 1e3, estimated_ms=expected.seconds(names) * 1e3,
            estimated_host_ms=expected.host * 1e3, loses=fewer > 1.05 * min(stock, ms),
        )  # fmt: skip
        result.add("steps", judged(row, ms, stock, expected.seconds(names) < expected.seconds()))
    advised = advise(model, side, side, step=lambda: model(**arguments))
    print(advised, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ARCHITECTURES), help="denoisers")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "check_choices.json")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device, small = torch.device(given.device), given.device == "cpu"
    dtype = torch.float32 if small else torch.bfloat16
    machine, taken = rates(device, dtype)
    print(f"timed in {taken:.2f} s: {machine}", flush=True)
    result = Result(given.out, dict(seconds=taken, machine=dataclasses.asdict(machine)))
    for name in given.only.split(","):
        begin = time.perf_counter()
        architecture = ARCHITECTURES[name].twin() if small else ARCHITECTURES[name]
        model = architecture.build(device, dtype).eval()
        print(f"{name}: built in {time.perf_counter() - begin:.1f} s", flush=True)
        denoiser = Denoiser(model, find_host(model))
        about = dict(device=device, dtype=dtype, architecture=architecture)
        for side in (64,) if small else (architecture.native, 2 * architecture.native):
            with own_stream(device):
                step_rows(name, side, model, denoiser, machine, about, result)
                layer_rows(name, side, denoiser, machine, about, result)
        del model, denoiser
        if not small:
            torch.cuda.empty_cache()
    return report(result.document, machine)


def line_of(row: dict[str, Any]) -> str:
    """Return a line about a row."""
    if "stock_ms" in row:
        verdict = "WRONG" if not row["right"] else "LOSES" if row["loses"] else "ok"
        return (
            f"{verdict:5} step {row['case']} {row['spec']}: {row['stock_ms']:.1f} -> {row['ms']:.1f} ms, only if "
            f"faster {row['only_if_faster_ms']:.1f}, estimated {row['estimated_stock_ms']:.1f} -> "
            f"{row['estimated_ms']:.1f}"
        )
    return (
        f"{'ok' if row['right'] else 'WRONG':5} layer {row['case']} {row['grid']} h{row['heads']} d{row['head_dim']} "
        f"{row['spec']}: {row['dense_ms']:.3f} -> {row['ms']:.3f} ms, estimated {row['estimated_dense_ms']:.3f} -> "
        f"{row['estimated_ms']:.3f}"
    )


def report(result: dict[str, Any], machine: Machine) -> int:
    """Print once more what went wrong; return 1 if a must is missed."""
    layers, steps = result["layers"], result["steps"]
    for row in (*layers, *steps):
        if not row["right"] or row.get("loses"):
            print(line_of(row))
    share = sum(row["layers"] for row in layers if row["right"]) / sum(row["layers"] for row in layers)
    strict = sum(r["layers"] for r in layers if r["right"] and not r["same"]) / max(
        1, sum(r["layers"] for r in layers if not r["same"])
    )
    of_steps = sum(row["right"] for row in steps) / len(steps)
    host = {}
    for row in layers:
        host.setdefault(row["spec"], []).append(row["host_us"])
    print("host us beyond dense attention:", {spec: round(statistics.median(us), 1) for spec, us in host.items()})
    ok = (
        share >= LEAST
        and result["seconds"] <= MOST_S
        and machine.source == ("measured" if machine.host else machine.source)
    )
    print(
        f"{'ok' if ok else 'FAIL'}: timed in {result['seconds']:.2f} s; right in {share:.1%} of the layers "
        f"({strict:.1%} of those that differ by 5 %) and {of_steps:.1%} of the steps; "
        f"only_if_faster loses in {sum(row['loses'] for row in steps)} of {len(steps)}"
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
