"""Finds launches for this GPU: `vision-attn tune` times neighbours of those of the tables, and keeps what is faster.

A launch that is tried must first give the results of the definition. It replaces the old one only if it is faster by
1.5 %, and is so again when both are timed once more in turns: noise makes no table. Other processes compile ahead, so
that the GPU waits for little.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from vision_attn.bench.timing import Launch as Timed
from vision_attn.bench.timing import own_stream
from vision_attn.bench.tuned import KERNELS, OPERATORS, Budget, Case, problem
from vision_attn.kernels import launches
from vision_attn.kernels.launches import Launch, Row, Table
from vision_attn.kernels.triton import launching

GAIN = 1.015  # how much faster a launch must be, twice
_LOSS = 0.99  # and never slower than this at one of the sizes
_SIDES = 64, 160  # of the grids that are timed, in tokens
_TURNS = 4, 12  # of a first timing, and of the one that decides
_TURN_MS = 6.0


@dataclass
class Found:
    """What was found for a case: the new launch, how many times faster it is, and how many were tried."""

    case: Case
    launch: Launch
    ratio: float = 1.0
    tried: int = 0

    def __str__(self) -> str:
        if self.launch == self.case.row.launch:
            return f"{self.case}: kept, the best of {self.tried}"
        return f"{self.case}: {self.ratio:.3f}x, {_short(self.launch)} instead of {_short(self.case.row.launch)}"


@dataclass(frozen=True)
class Setup:
    """Where and how launches are tried.

    Args:
        device: The GPU; the CPU under Triton's interpreter.
        sides: Sides of the grids that are timed.
        heads: Heads that are timed; as many as a model of that width has if None.
        timer: Takes launches, a call with each of them, and how many turns they take; returns milliseconds of each.
        compiler: Compiles ahead; None compiles when a launch is tried.
    """

    device: torch.device
    sides: Sequence[int] = _SIDES
    heads: int | None = None
    timer: "Timer" = field(default=lambda tried, calls, turns: _milliseconds(calls, turns))
    compiler: Executor | None = None


Timer = Callable[[Sequence[Launch], Sequence[Any], int], list[float]]


def tune(
    operator: str | None = None, out: Path | None = None, *, minutes: float = 10, wide: bool = False,
    setup: Setup | None = None, say: Callable[[str], None] = print,
) -> list[Found]:  # fmt: skip
    """Time launches on this GPU and write a table of the fastest.

    Args:
        operator: One of `OPERATORS`; all if None.
        out: The file of the table; the user's folder if None, where the lookup reads it.
        minutes: When to stop; what was not reached keeps its launch.
        wide: Whether float32 and heads above 128 channels are tuned too.
        setup: Where; the current GPU if None.
        say: Takes lines for the user.

    Returns:
        What was found for each row that was reached.

    Raises:
        ValueError: If the operator is unknown, or there is no GPU.
    """
    if operator is not None and operator not in OPERATORS:
        raise ValueError(f"--operator must be one of {', '.join(OPERATORS)}, got {operator!r}")
    if setup is None:
        if not torch.cuda.is_available():
            raise ValueError("launches are tuned on a GPU, and none can be used here")
        setup = Setup(torch.device("cuda", torch.cuda.current_device()), compiler=_workers())
    target = launches.target_of(setup.device)
    out = launches.user_folder() / f"{target.architecture}.json" if out is None else out
    with only_committed():
        committed = {kernel: rows_of(kernel, target.architecture) for kernel in KERNELS}
        cases = [
            Case(kernel, row)
            for kernel, rows in committed.items() for row in rows
            if (operator is None or kernel.split(".")[0] in (operator, "pairs" if operator == "agent" else ""))
            and (wide or (row.size == 2 and row.channels <= 128))
        ]  # fmt: skip
        found = _tune_all(cases, setup, time.monotonic() + 60 * minutes, say)
    new = {(one.case.kernel, *_place(one.case.row)): one.launch for one in found}
    rows = {
        kernel: [replace(row, launch=new.get((kernel, *_place(row)), row.launch)) for row in committed[kernel]]
        for kernel in dict.fromkeys(case.kernel for case in cases)
    }
    _merged(rows, _about(setup.device), out).write(out)
    launching.forget()
    mean = math.exp(statistics.fmean(math.log(one.ratio) for one in found)) if found else 1.0
    say(f"{len(found)} of {len(cases)} rows were reached; geometric mean {mean:.3f}x of the tables of the package")
    say(f"Table: {out}")
    return found


def _merged(rows: dict[str, list[Row]], about: str, out: Path) -> Table:
    """Add to the rows those of other kernels that the file has already."""
    old: dict[str, Sequence[Row]] = dict(Table.read(out).rows) if out.is_file() else {}
    return Table(old | rows, about)


def _place(row: Row) -> tuple[int, int, float]:
    return row.size, row.channels, row.columns


def _about(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    import triton  # noqa: PLC0415

    return f"{name}, torch {torch.__version__}, triton {triton.__version__}: vision-attn tune"


def rows_of(kernel: str, architecture: str) -> Sequence[Row]:
    """Return the rows of a kernel in the first table that has any."""
    return next((rows for table in launches.tables(architecture) if (rows := table.rows.get(kernel))), ())


@contextmanager
def only_committed() -> Iterator[None]:
    """Look launches up in the tables of the package alone."""
    with _users_folder(os.devnull):
        yield


@contextmanager
def trying(case: Case, launch: Launch, architecture: str, *, exact: bool = True) -> Iterator[None]:
    """Take a launch for the row of a case; `exact` if as it is or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        row = replace(case.row, launch=replace(launch, exact=exact))
        Table({case.kernel: [row]}).write(Path(folder) / f"{architecture}.json")
        with _users_folder(folder):
            yield


@contextmanager
def _users_folder(folder: str) -> Iterator[None]:
    """Read the user's tables from another folder; a variable, as a backward runs in a thread of its own."""
    name = "VISION_ATTN_LAUNCHES"
    before = os.environ.get(name)
    os.environ[name] = folder
    launching.forget()
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
        launching.forget()


def neighbours(launch: Launch) -> list[Launch]:
    """Return launches that differ in one setting."""
    found = [replace(launch, stages=n) for n in (launch.stages - 1, launch.stages + 1) if 1 <= n <= 4]
    found += [replace(launch, warps=n) for n in (launch.warps // 2, launch.warps * 2) if 1 <= n <= 8]
    if launch.programs > 1 or not launch.own:  # loops are cut by programs
        found += [replace(launch, programs=n) for n in (launch.programs // 2, launch.programs * 2) if 1 <= n <= 16]
    found += [replace(launch, own=tile) for tile in _tiles(launch.own)]
    found += [replace(launch, walk=tile) for tile in _tiles(launch.walk)]
    if launch.features:
        found += [replace(launch, features=n) for n in (launch.features // 2, launch.features * 2) if 16 <= n <= 128]
    boxes = launch.boxes
    if not launch.own and boxes is None:
        found.append(replace(launch, boxes=replace(launch, boxes=None)))
    elif boxes is not None:
        found = [*found, replace(launch, boxes=None), *(replace(launch, boxes=one) for one in neighbours(boxes))]
        found = [one for one in found if one.boxes is None or one.boxes.boxes is None]
    return list(dict.fromkeys(found))


def _tiles(tile: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return tiles of half and twice the tokens, 16 to 128."""
    found = []
    for i in range(len(tile)):
        found += [(*tile[:i], n, *tile[i + 1 :]) for n in (tile[i] // 2, tile[i] * 2) if n >= 4 or len(tile) == 1]
    if len(set(tile)) == 1 and len(tile) == 2:  # 4 x 8 and 8 x 4 of a square are alike
        found = [one for one in found if one[0] <= one[1]]
    return [one for one in found if 16 <= math.prod(one) <= 128]


def _tune_all(cases: Sequence[Case], setup: Setup, deadline: float, say: Callable[[str], None]) -> list[Found]:
    from tqdm import tqdm  # noqa: PLC0415, tqdm is optional

    ahead: dict[tuple[str, Launch], Future[str]] = {}
    if setup.compiler is not None:
        for case in cases:
            for launch in neighbours(case.row.launch):
                ahead[str(case), launch] = setup.compiler.submit(compile_ahead, case, launch, str(setup.device))
    found = []
    with tqdm(cases, unit="row") as bar:
        for case in bar:
            if time.monotonic() > deadline:
                break
            bar.set_description(str(case))
            with own_stream(setup.device):  # a backward runs on the stream of its forward
                found.append(_tune_one(case, setup, deadline, ahead))
            with bar.external_write_mode():
                say(str(found[-1]))
    if setup.compiler is not None:
        setup.compiler.shutdown(wait=False, cancel_futures=True)
    return found


def _tune_one(case: Case, setup: Setup, deadline: float, ahead: dict[tuple[str, Launch], Future[str]]) -> Found:
    found, seen = Found(case, case.row.launch), {case.row.launch}
    budget = Budget(case, setup.device)
    queue = neighbours(case.row.launch)
    while queue:
        best, gain = None, GAIN
        for launch in queue:
            seen.add(launch)
            job = ahead.get((str(case), launch))
            if time.monotonic() > deadline or (job is not None and _result(job, deadline)):
                continue
            found.tried += 1
            ratio = _compared(case, found.launch, launch, setup, budget)
            if ratio >= gain:
                best, gain = launch, ratio
        # timed anew against the first: a row that is written was faster twice
        if best is None:
            return found
        ratio = _compared(case, case.row.launch, best, setup, budget, _TURNS[1])
        if ratio < max(GAIN, found.ratio):
            return found
        found.launch, found.ratio = best, ratio
        queue = [launch for launch in neighbours(best) if launch not in seen]
    return found


def _result(job: "Future[str]", deadline: float) -> str:
    """Return why a launch does not compile, if so."""
    try:
        return job.result(max(0.0, deadline - time.monotonic()))
    except Exception as error:  # a worker may die of what it compiles
        return f"{type(error).__name__}: {error}"


def _compared(case: Case, old: Launch, new: Launch, setup: Setup, budget: "Budget", turns: int = _TURNS[0]) -> float:
    """Return how many times faster a launch is; 0 if it is wrong, slower at one size, or does not run."""
    architecture, ratios = launches.target_of(setup.device).architecture, []
    try:
        with trying(case, new, architecture):
            if not budget.holds():
                return 0.0
        for side in setup.sides:
            calls: list[Any] = []
            for launch in (old, new):
                with trying(case, launch, architecture, exact=launch != case.row.launch):
                    call = problem(case, side, setup.device, setup.heads)
                    call()
                    # a graph keeps the launch that was planned
                    calls.append(Timed(call, setup.device) if setup.device.type == "cuda" else call)
                    if setup.device.type == "cuda" and calls[-1].kind != "graph":
                        return 0.0
            before, after = setup.timer((old, new), calls, turns)
            ratios.append(before / after)
    except RuntimeError:  # it does not fit, or compile
        if setup.device.type == "cuda":
            torch.cuda.synchronize()
        return 0.0
    return 0.0 if min(ratios) < _LOSS else math.exp(statistics.fmean(map(math.log, ratios)))


def _milliseconds(calls: Sequence[Timed], turns: int) -> list[float]:
    """Return the median milliseconds of calls that take turns."""
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(turns):
        for i in range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls))):
            count = max(3, min(40, int(_TURN_MS / max(calls[i].estimate_ms, 1e-3))))
            samples[i] += calls[i].burst(count, count // 2)
    return [statistics.median(one) for one in samples]


def compile_ahead(case: Case, launch: Launch, device: str) -> str:
    """Compile what a launch needs to be timed, in a process of its own; return why it does not run, if so."""
    where = torch.device(device)
    torch.cuda.set_device(where)
    try:
        with launching.compile_only(), trying(case, launch, launches.target_of(where).architecture):
            problem(case, min(_SIDES), where)()
    except Exception as error:  # whatever a compiler raises
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def _workers() -> ProcessPoolExecutor:
    """Return processes that compile side by side."""
    count = max(1, min(14, (os.cpu_count() or 2) - 2))
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"))


def _short(launch: Launch) -> str:
    tiles = " by ".join("x".join(map(str, tile)) for tile in (launch.own, launch.walk) if tile)
    more = f" {launch.programs} programs" if launch.programs > 1 else ""
    more += f" {launch.features} features" if launch.features else ""
    more += f" {launch.registers} registers" if launch.registers else ""
    boxes = f", TMA {_short(launch.boxes)}" if launch.boxes else ""
    return f"{tiles} {launch.warps} warps {launch.stages} stages{more}{boxes}"
