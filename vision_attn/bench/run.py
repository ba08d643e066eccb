"""Finds entries and cases by name, runs them, and stores what they measure."""

import fnmatch
import importlib
import os
import pkgutil
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vision_attn.bench import entries
from vision_attn.bench.candidate import AbsentError
from vision_attn.bench.document import (
    SCHEMA,
    device_name,
    device_slug,
    merged,
    pick_device,
    read_document,
    stored_rows,
    today,
    versions,
    write_document,
)
from vision_attn.bench.measure import CUT_OFF, Measurement
from vision_attn.bench.quality.weights import Sources
from vision_attn.bench.table import markdown
from vision_attn.bench.workers import Workers

_TIMING = (
    "Medians, candidates in turns in one run: replays of CUDA graphs at the clock that each sustains (on a CPU, "
    "wall-clock time); the cache is not emptied between calls."
)


def entry_names() -> list[str]:
    """Return the names of all entries: those of their files."""
    return sorted(module.name for module in pkgutil.iter_modules(entries.__path__))


def find_entries(name: str) -> list[ModuleType]:
    """Return the entry called `name`, or those of the group `name`.

    Raises:
        ValueError: If there is none; the known ones are listed.
    """
    known = entry_names()
    found = [entry for entry in known if entry == name or entry.partition("_")[0] == name]
    if not found:
        names = dict.fromkeys((*(entry.partition("_")[0] for entry in known), *known))
        raise ValueError(f"unknown benchmark {name!r}: known are {', '.join(map(repr, names))}")
    return [importlib.import_module(f"{entries.__name__}.{entry}") for entry in found]


def choose(cases: Sequence[Any], patterns: Sequence[str]) -> list[Any]:
    """Return the cases whose names match a pattern, all if there are no patterns.

    Raises:
        ValueError: If a pattern matches none; all names are listed.
    """
    names = [case.name for case in cases]
    if unknown := [p for p in patterns if not fnmatch.filter(names, p)]:
        raise ValueError(f"unknown case {', '.join(map(repr, unknown))}: known are {', '.join(names)}")
    return [case for case in cases if not patterns or any(fnmatch.fnmatchcase(case.name, p) for p in patterns)]


def download(name: str, sources: Sources) -> None:
    """Fetch the pretrained weights that an entry or a group needs, by pip."""
    for entry in find_entries(name):
        getattr(entry, "download", lambda sources: None)(sources)


def _cases(entry: Any, device: torch.device, quick: bool, sources: Sources) -> list[Any]:
    return entry.cases(device, quick, *[sources] * hasattr(entry, "download"))


def check_candidates(chosen: Sequence[ModuleType], cases: Iterable[Sequence[Any]], names: Sequence[str]) -> None:
    """Refuse names that no candidate of the chosen entries has, nor any contender of their cases.

    Raises:
        ValueError: If there are some; the known ones are listed.
    """
    known = dict.fromkeys(candidate.name for entry in chosen for candidate in entry.CANDIDATES)
    known |= dict.fromkeys(c.name for own in cases for case in own for c in getattr(case, "contenders", ()))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown candidate {', '.join(map(repr, unknown))}: known are {', '.join(map(repr, known))}")


def run_benchmarks(
    name: str,
    out: Path,
    *,
    device: str | None = None,
    only: Sequence[str] = (),
    candidates: Sequence[str] = (),
    quick: bool = False,
    workers: int = 1,
    sources: Sources | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Run an entry or a group of entries; every finished case is stored at once.

    Args:
        name: An entry or a group, see `find_entries`.
        out: Folder of the results, `<entry>_<device>.json`. Cases stored there by the same versions are kept.
        device: 'cpu' or 'cuda'; None for a GPU if there is one.
        only: Case names, `*` and `?` allowed; all if empty.
        candidates: Names of the candidates to compare with, all if empty.
        quick: Run fewer cases and take fewer samples.
        workers: Processes that measure side by side what is not timed.
        sources: Where pretrained weights, photos and distilled adapters lie, if not in the usual places.
        say: Receives a line as each case ends, and of some entries lines about the progress.

    Returns:
        The files written.

    Raises:
        ValueError: If a name or the device is unknown, or stored cases are of other versions. Also if the subject of a
            comparison is wrong or cannot run, or a whole case cannot; then everything else has been stored.
    """
    where, sources = pick_device(device), sources or Sources()
    found = find_entries(name)
    every = {entry: _cases(entry, where, quick, sources) for entry in found}
    check_candidates(found, every.values(), candidates)
    wanted = {case.name for case in choose([case for cases in every.values() for case in cases], only)}
    chosen = {entry: mine for entry, cases in every.items() if (mine := [c for c in cases if c.name in wanted])}
    options = [f"--only={pattern}" for pattern in only] + ["--quick"] * quick
    options += [f"--candidates={','.join(candidates)}"] * bool(candidates)
    options += [f"--{name}=FOLDER" for name in ("photos", "adapters") if getattr(sources, name)]
    command = shlex.join(["vision-attn", "bench", name, f"--device={where.type}", *options])
    written, failed, absent = [], list[str](), dict[str, list[str]]()
    out.mkdir(parents=True, exist_ok=True)  # before any work
    with Workers(workers) as processes:
        measurement = Measurement(where, rounds=2 if quick else 4, chosen=candidates, workers=processes, say=say)
        for entry, cases in chosen.items():
            path, rows = _run_entry(entry, cases, measurement, out, dict(date=today(), command=command), say, absent)
            failed += [f"{row['case']}: {reason}" for row in rows if (reason := subject_reason(row))]
            written += [path] * (leads() and bool(rows))
    wrong = [f"{', '.join(cases)} left out: {reason}" for reason, cases in absent.items()]
    if failed:
        wrong.append(f"stored in {out}, but the subject itself was left out: {'; '.join(failed)}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return written


def _run_entry(
    entry: Any, cases: Sequence[Any], measurement: Measurement, out: Path, run: dict[str, str], say: Callable,
    absent: dict[str, list[str]],
) -> tuple[Path, list[dict[str, Any]]]:  # fmt: skip
    """Measure some cases of an entry; return the file and the rows that were measured, with `run` in each of them.

    A row is stored when its case ends. An entry that hands its row to `Measurement.keep` has it stored before, unless
    a whole one is stored: a run that is cut off does not replace that. A case that cannot be measured goes into
    `absent`, by the reason; what is stored of it stays.
    """
    where = measurement.device
    short = entry.__name__.rpartition(".")[2]
    path = out / f"{short}_{device_slug(where)}.json"
    place = dict(schema=SCHEMA, entry=short, title=entry.TITLE, device=device_name(where), versions=versions())
    stored, rows = stored_rows(path, place), list[dict[str, Any]]()
    order = [*getattr(entry, "NAMES", ())]  # cases of other numbers of processes, which stay stored
    order += [case.name for case in (*entry.cases(where, False), *entry.cases(where, True))]
    timing = getattr(entry, "TIMING", _TIMING)

    def store(row: dict[str, Any]) -> None:
        if leads():
            write_document(path, dict(**place, timing=timing, rows=merged(stored, [*rows, row | run], order)))

    whole = {row["case"] for row in stored if CUT_OFF not in row["label"]}
    measurement.keep = lambda row: None if row["case"] in whole else store(row)
    for case in cases:
        try:
            row = entry.row(case, measurement)
        except AbsentError as error:
            absent.setdefault(str(error), []).append(case.name)
            continue
        store(row)
        rows.append(row | run)
        if leads():
            say(describe(rows[-1]))
    return path, rows


def leads() -> bool:
    """Whether this process stores results: a launcher that starts several tells each its rank."""
    return int(os.environ.get("RANK", "0")) == 0


def subject_reason(row: dict[str, Any]) -> str | None:
    """Return why the subject of a row was left out, None if it was not."""
    return next((c["reason"] for c in row["candidates"] if c["name"] == row["subject"]), None)


def describe(row: dict[str, Any]) -> str:
    """Return one line about a finished case."""
    parts = []
    for candidate in row["candidates"]:
        times = [f"{candidate[w]['median_ms']:.3f} ms" for w in ("forward", "backward") if candidate.get(w)]
        times += [f"{key} {value:.3g}" for key, value in (candidate.get("quality") or {}).items()]
        parts.append(f"{candidate['name']} {' / '.join(times) or candidate['reason']}")
    return f"{row['case']}: {'; '.join(parts)}"


def table_of(path: Path, groups: Sequence[str] = ()) -> str:
    """Return a stored result as Markdown, by its entry's own `table` or else by `markdown`.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a result, or has no such group.
    """
    document = read_document(path)
    entry = find_entries(document["entry"])[0] if document["entry"] in entry_names() else None
    return getattr(entry, "table", markdown)(document, groups)
