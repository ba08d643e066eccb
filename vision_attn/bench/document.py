"""The stored result of an entry: where it was measured, one JSON file per entry and device, and how it is renewed.

    {schema, entry, title, device, versions, timing, rows: [
        {case, label, group, shape, date, command, subject, needed_flop: {forward, backward}, candidates: [
            {name, computes, reason, errors, ready_s, forward: PASS | null, backward: PASS | null}]}]}
    PASS = {median_ms, min_ms, iqr_ms, samples, launch, ratio, needed_tflops, visited_tflops, visited_flop,
            extra_memory: {bytes, share} | null}

`ratio` is a candidate's median over the subject's in the same run: how many times faster the subject is. `errors` are
shares of the budget; `reason` says why a candidate was left out; `ready_s` are the seconds that it took to compile and
check it. All candidates of a row were timed in one run.

A row of whole models has no subject (null), no `needed_flop` and no `errors`. It has `musts`, a list of {text, value,
needed, holds}, see `overview.py`; and its PASS has `batch`, `speedup` over the row's reference, and `memory`, which is
{bytes, above}: the peak, and the part of it above the weights.

A row of fidelity has no times: its candidates have `quality`, measures by name, in the place of the passes. They may be
of several runs of the same versions.
"""

import datetime
import importlib.metadata
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
_PACKAGES = ("vision_attn", "torch", "triton", "xformers", "natten", "diffusers", "timm")
_NUMBER = (int, float)
_DOCUMENT = dict(schema=int, entry=str, title=str, device=str, versions=dict, timing=str, rows=list)
_NAME = (str, type(None))
_ROW = dict(case=str, label=str, group=str, shape=dict, date=str, command=str, subject=_NAME, candidates=list)
_CANDIDATE = dict(name=str, computes=str)
_PASS = dict(median_ms=_NUMBER, min_ms=_NUMBER, iqr_ms=_NUMBER, samples=int, launch=str)


def pick_device(name: str | None) -> torch.device:
    """Return the device called `name`; for None a GPU if there is one, else the CPU.

    Raises:
        ValueError: If there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: no CUDA device is visible")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or, on a CPU, of the architecture and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def device_slug(device: torch.device) -> str:
    """Return the device's name for file names: 'cpu', or 'h200' for 'NVIDIA H200'."""
    if device.type == "cpu":
        return "cpu"
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return "_".join(word for word in words if word not in ("nvidia", "amd", "geforce"))


def versions() -> dict[str, str | None]:
    """Return the version of Python and of every package that takes part; None where it is not installed."""
    found: dict[str, str | None] = dict(python=platform.python_version(), cuda=torch.version.cuda)
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = str(torch.__version__)
    return found


def today() -> str:
    """Return the date in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def check_document(document: Any, source: object = "document") -> None:
    """Refuse a document that does not have the schema.

    Args:
        document: What was read.
        source: Where it came from, for the message.

    Raises:
        ValueError: If keys are missing or have the wrong type; the first eight problems are listed.
    """
    problems = _mismatches("", document, _DOCUMENT)
    if not problems and document["schema"] != SCHEMA:
        problems.append(f"schema is {document['schema']}, not {SCHEMA}")
    for i, row in enumerate([] if problems else document["rows"]):
        problems += (bad := _mismatches(f"rows[{i}].", row, _ROW))
        for candidate in [] if bad else row["candidates"]:
            problems += (bad := _mismatches(f"rows[{i}].candidates.", candidate, _CANDIDATE))
            problems += [] if bad else _passes(f"{row['case']}, {candidate['name']}: ", candidate)
    if problems:
        raise ValueError(f"{source} is not a result of vision-attn bench: {'; '.join(problems[:8])}")


def _passes(place: str, candidate: dict[str, Any]) -> list[str]:
    """Return what is wrong with the passes of a candidate: it needs a pass or measures, or a reason why it has none."""
    if candidate.get("quality") is not None:
        kinds = dict.fromkeys(candidate["quality"], _NUMBER)
        return _mismatches(f"{place}quality.", candidate["quality"], kinds)
    timed = [name for name in ("forward", "backward") if candidate.get(name) is not None]
    problems = [p for name in timed for p in _mismatches(f"{place}{name}.", candidate[name], _PASS)]
    if bool(timed) == bool(candidate.get("reason")):
        problems.append(f"{place}needs either times or a reason")
    return problems


def _mismatches(place: str, value: Any, types: dict[str, Any]) -> list[str]:
    if not isinstance(value, dict):
        return [f"{place or 'the file'} is {type(value).__name__}, not a mapping"]
    problems = [f"{place}{key} is missing" for key in types if key not in value]
    return problems + [
        f"{place}{key} is {type(value[key]).__name__}" for key, kind in types.items()
        if key in value and not isinstance(value[key], kind)
    ]  # fmt: skip


def read_document(path: Path) -> dict[str, Any]:
    """Read and check a stored result.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not of the schema.
    """
    try:
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    check_document(document, path)
    return document


def stored_rows(path: Path, fresh: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows stored at `path`, to which a run adds its own; none if there is no file.

    Args:
        path: Where the result will be written.
        fresh: The document of the run, without rows.

    Raises:
        ValueError: If the stored rows are of another device or other versions, which must not be mixed.
    """
    if not path.exists():
        return []
    stored = read_document(path)
    for key in ("entry", "device", "versions"):
        if stored[key] != fresh[key]:
            raise ValueError(f"{path} holds {key} {stored[key]}, this is {fresh[key]}: choose another --out")
    return stored["rows"]


def merged(stored: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], order: Sequence[str]) -> list:
    """Return the stored rows and the new ones, which replace them, in `order`; a case not in `order` is dropped.

    Of a row of fidelity the candidates stay that were not measured again: nothing is timed, so that they need not be of
    one run.
    """
    by_name = {row["case"]: row for row in stored}
    for row in rows:
        by_name[row["case"]] = _joined(by_name.get(row["case"]), row)
    return [by_name[name] for name in dict.fromkeys(order) if name in by_name]


def _joined(stored: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """Return a new row with the candidates and verdicts of a stored one that it lacks, if both are of fidelity."""
    measured = [c for each in (stored, row) if each for c in each.get("candidates", ())]
    alike = stored is not None and _problem(stored) == _problem(row)
    if stored is None or not alike or not measured or not all("quality" in c for c in measured):
        return row
    parts = {
        part: list({each[key]: each for each in (*stored[part], *row[part])}.values())
        for part, key in (("candidates", "name"), ("musts", "text"))
    }
    return row | parts


def _problem(row: dict[str, Any]) -> dict[str, Any]:
    """Return the shape without how near onnxruntime came, whose last digits differ between processors."""
    return {key: value for key, value in (row.get("shape") or {}).items() if key != "onnxruntime"}


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Check and write a result, making its folder; numbers have four significant digits."""
    document = _short(document)
    check_document(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, (list, tuple)) else value
