"""Finds launches for this GPU: `vision-attn tune` times neighbours of those of the tables, and keeps what is faster.

A launch that is tried must first give the results of the definition, and at the sizes that are timed those of the
launch before it. It replaces that only if it is faster by 1.5 %, and is so again when both are timed once more in
turns: noise makes no table. Other processes compile ahead, so that the GPU waits for little. The table is written after
each row: a launch may end this process's work on the GPU, and is then left out by the next run, see `faults.py`.
"""

import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from vision_attn._checks import check_number
from vision_attn.bench.faults import Faults, GpuLostError, alive, short
from vision_attn.bench.timing import Launch as Timed
from vision_attn.bench.timing import own_stream
from vision_attn.bench.tuned import KERNELS, OPERATORS, Budget, Case, problem
from vision_attn.kernels import launches
from vision_attn.kernels.backend import warn
from vision_attn.kernels.launches import Launch, Row, Table
from vision_attn.kernels.triton import launching

GAIN = 1.015  # how much faster a launch must be, twice
_LOSS = 0.99  # and never slower than this at one of the sizes
_SIDES = 64, 160  # of the grids that are timed, in tokens
_TURNS = 4, 12  # of a first timing, and of the one that decides
_TURN_MS = 6.0
_logger = logging.getLogger(__name__)


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
        return f"{self.case}: {self.ratio:.3f}x, {short(self.launch)} instead of {short(self.case.row.launch)}"


@dataclass(frozen=True)
class Setup:
    """Where and how launches are tried.

    Args:
        device: The GPU; the CPU under Triton's interpreter.
        sides: Sides of the grids that are timed.
        heads: Heads that are timed; as many as a model of that width has if None.
        timer: Takes launches, a call with each of them, and how many turns they take; returns milliseconds of each.
        alive: Whether the device still takes work, after an error.
        compiler: Compiles ahead; None compiles when a launch is tried.
    """

    device: torch.device
    sides: Sequence[int] = _SIDES
    heads: int | None = None
    timer: "Timer" = field(default=lambda tried, calls, turns: _milliseconds(calls, turns))
    alive: Callable[[torch.device], bool] = field(default=alive)
    compiler: Executor | None = None


Timer = Callable[[Sequence[Launch], Sequence[Any], int], list[float]]


def tune(
    operator: str | None = None, out: Path | None = None, *, minutes: float = 10, wide: bool = False,
    setup: Setup | None = None, say: Callable[[str], None] = print,
) -> list[Found]:  # fmt: skip
    """Time launches on this GPU and write a table of the fastest, after each row.

    Args:
        operator: Some of `OPERATORS`, with commas between them; all if None.
        out: The file of the table; the user's folder if None, where the lookup reads it.
        minutes: When to stop. What was not reached keeps the launch that the file has, or else that of the package.
        wide: Whether float32 and heads above 128 channels are tuned too.
        setup: Where; the current GPU if None.
        say: Takes lines for the user.

    Returns:
        What was found for each row that was reached.

    Raises:
        ValueError: If an operator is unknown, `minutes` is no number, or there is no GPU.
        GpuLostError: If a launch ended this process's work on the GPU. The user's folder keeps it in a file, and it is
            not tried again.
    """
    asked = OPERATORS if operator is None else tuple(name.strip() for name in operator.split(","))
    for name in asked:
        if name not in OPERATORS:
            raise ValueError(f"--operator must be one of {', '.join(OPERATORS)}, got {name!r}")
    check_number("--minutes", minutes, least=0)
    if setup is None:
        if not torch.cuda.is_available():
            raise ValueError("launches are tuned on a GPU, and none can be used here")
        setup = Setup(torch.device("cuda", torch.cuda.current_device()), compiler=_workers())
    target = launches.target_of(setup.device)
    architecture = target.architecture
    out = launches.user_folder() / f"{architecture}.json" if out is None else out
    faults = Faults(launches.user_folder() / f"{architecture}.faults")
    with only_committed():
        committed = {kernel: rows_of(kernel, architecture) for kernel in KERNELS}
        cases = [
            Case(kernel, row)
            for kernel, rows in committed.items() for row in rows
            if kernel.split(".")[0] in (*asked, "pairs" if "agent" in asked else "")
            and (wide or (row.size == 2 and row.channels <= 128))
            and not (Case(kernel, row).rounded and target.without_eight_bits)
        ]  # fmt: skip
        table = _Written({case.kernel: committed[case.kernel] for case in cases}, _about(setup.device), out)
        begin = next((n for n, case in enumerate(cases) if str(case) == faults.last), 0)  # where a run ended early
        cases = cases[begin:] + cases[:begin]
        found: list[Found] = []
        try:
            for one in _tune_all(cases, setup, time.monotonic() + 60 * minutes, faults, say):
                found.append(one)
                table.add(one)
        except GpuLostError as error:
            faults.add(error.row, error.launch, error.error)
            raise GpuLostError(
                error.row, error.launch, f"{error.error}; the {len(found)} rows before it are in {out}; the same "
                f"command now leaves this launch out, as {faults.path} says"
            ) from error  # fmt: skip
    table.write()
    launching.forget()
    mean = math.exp(statistics.fmean(math.log(one.ratio) for one in found)) if found else 1.0
    say(f"{len(found)} of {len(cases)} rows were reached; geometric mean {mean:.3f}x of the tables of the package")
    say(f"Table: {out}")
    return found


class _Written:
    """A table that is written anew after each row, with what its file has of other rows.

    Args:
        rows: The rows of the package, by kernel.
        about: Where they come from.
        out: The file.
    """

    def __init__(self, rows: dict[str, Sequence[Row]], about: str, out: Path) -> None:
        self._others: dict[str, Sequence[Row]] = dict(Table.read(out).rows) if out.is_file() else {}
        self._rows, self._about, self._out = rows, about, out
        self._launches = {(kernel, _place(row)): row.launch for kernel in rows for row in self._others.get(kernel, ())}

    def add(self, one: Found) -> None:
        """Take what was found for a row, and write the table."""
        self._launches[one.case.kernel, _place(one.case.row)] = one.launch
        self.write()

    def write(self) -> None:
        """Write the table."""
        rows = {
            kernel: [replace(row, launch=self._launches.get((kernel, _place(row)), row.launch)) for row in of_kernel]
            for kernel, of_kernel in self._rows.items()
        }
        Table(self._others | rows, self._about).write(self._out)


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
    if launch.registers:
        found.append(replace(launch, registers=0))
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


def _tune_all(
    cases: Sequence[Case], setup: Setup, deadline: float, faults: Faults, say: Callable[[str], None]
) -> Iterator[Found]:
    """Yield what is found for each row that is reached before the deadline."""
    from tqdm import tqdm  # noqa: PLC0415, tqdm is optional

    ahead: dict[tuple[str, Launch], Future[str]] = {}
    if setup.compiler is not None:
        for case in cases:
            for launch in neighbours(case.row.launch):
                ahead[str(case), launch] = setup.compiler.submit(compile_ahead, case, launch, str(setup.device))
    try:
        with tqdm(cases, unit="row") as bar:
            for case in bar:
                if time.monotonic() > deadline:
                    break
                bar.set_description(str(case))
                if (str(case), case.row.launch) in faults:
                    with bar.external_write_mode():
                        say(f"{case}: left out, as its own launch is in {faults.path}")
                    continue
                search = _Search(
                    case, setup, deadline, ahead, faults, lambda launch: bar.set_postfix_str(short(launch))
                )
                with own_stream(setup.device):  # a backward runs on the stream of its forward
                    found = search.run()
                with bar.external_write_mode():
                    say(str(found))
                yield found
    finally:
        if setup.compiler is not None:
            setup.compiler.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class _Search:
    """The search for the launch of a row.

    Args:
        case: The row.
        setup: Where and how launches are tried.
        deadline: When to stop.
        ahead: What is compiled ahead, by row and launch.
        faults: Launches that are never tried.
        show: Shows which launch is tried: whoever reads what a lost run left has to know.
    """

    case: Case
    setup: Setup
    deadline: float
    ahead: dict[tuple[str, Launch], Future[str]]
    faults: Faults
    show: Callable[[Launch], None]

    def run(self) -> Found:
        """Return the best launch."""
        case, row = self.case, str(self.case)
        found, seen = Found(case, case.row.launch), {case.row.launch}
        budget = Budget(case, self.setup.device)
        queue = neighbours(case.row.launch)
        while queue:
            best, gain = None, GAIN
            for launch in queue:
                seen.add(launch)
                job = self.ahead.get((row, launch))
                if time.monotonic() > self.deadline or (row, launch) in self.faults:
                    continue
                if job is not None and (why := _result(job, self.deadline)):
                    _logger.info("%s: %s is left out: %s", row, short(launch), why)
                    continue
                found.tried += 1
                ratio = self._compared(found.launch, launch, budget)
                if ratio >= gain:
                    best, gain = launch, ratio
            # timed anew against the first: a row that is written was faster twice
            if best is None:
                return found
            ratio = self._compared(case.row.launch, best, budget, _TURNS[1])
            if ratio < max(GAIN, found.ratio):
                return found
            found.launch, found.ratio = best, ratio
            queue = [launch for launch in neighbours(best) if launch not in seen]
        return found

    def _compared(self, old: Launch, new: Launch, budget: "Budget", turns: int = _TURNS[0]) -> float:
        """Return how many times faster a launch is; 0 if it is wrong, slower at one size, or does not run.

        Raises:
            GpuLostError: If a launch ended this process's work on the GPU.
        """
        case, setup = self.case, self.setup
        architecture, ratios = launches.target_of(setup.device).architecture, []
        self.show(new)
        _logger.debug("%s: trying %s", case, short(new))
        running = new
        try:
            with trying(case, new, architecture):
                if not budget.holds():
                    return 0.0
            for side in setup.sides:
                calls, made = list[Any](), list[Any]()
                for running in (old, new):
                    with trying(case, running, architecture, exact=running != case.row.launch):
                        call = problem(case, side, setup.device, setup.heads)
                        made.append(call())
                        # a graph keeps the launch that was planned
                        calls.append(Timed(call, setup.device) if setup.device.type == "cuda" else call)
                        if setup.device.type == "cuda" and calls[-1].kind != "graph":
                            return 0.0
                if not _alike(made[0], made[1], case.dtype):
                    return 0.0
                before, after = setup.timer((old, new), calls, turns)
                ratios.append(before / after)
        except RuntimeError as error:  # it does not fit, or compile
            if not setup.alive(setup.device):
                raise GpuLostError(str(case), running, str(error).strip().split("\n")[0]) from error
            return 0.0
        return 0.0 if min(ratios) < _LOSS else math.exp(statistics.fmean(map(math.log, ratios)))


def _alike(one: Any, other: Any, dtype: torch.dtype) -> bool:
    """Whether two launches computed the same but for rounding: what is wrong may be so at large sizes alone."""
    most = max(8 * torch.finfo(dtype).eps, 1e-4)
    for a, b in ((one, other),) if isinstance(one, torch.Tensor) else zip(one, other, strict=True):
        if not float((a.double() - b.double()).abs().max()) <= most * float(a.abs().max()):  # NaN is like nothing
            return False
    return True


def _result(job: "Future[str]", deadline: float) -> str:
    """Return why a launch does not compile, if so."""
    try:
        return job.result(max(0.0, deadline - time.monotonic()))
    except BrokenExecutor as error:
        warn("a process that compiled ahead has died; launches that were not compiled by then are left out")
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # whatever a compiler raises
        return f"{type(error).__name__}: {error}"


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
