"""Turns a problem and its candidates into a row: each is checked, measured for memory, then timed beside the others."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vision_attn.bench.candidate import AbsentError, Candidate, Inputs, Prepared, Problem, reason_of
from vision_attn.bench.timing import Launch, Timing, extra_memory, interleave, own_stream
from vision_attn.bench.workers import Workers

SUBJECT = "ours"
CUT_OFF = ", cut off after"  # in the label of a row that `Measurement.keep` got


class Measurement:
    """One run of the benchmarks.

    Args:
        device: Where everything runs.
        rounds: Turns of each candidate, see `interleave`.
        chosen: Names of the candidates that take part, all if empty. The subject always does.
        workers: Processes for what is not timed; this one if None.
        say: Receives lines about the progress of a case.

    Attributes:
        keep: Receives the row of a case that goes on, of what is measured so far.
    """

    def __init__(
        self, device: torch.device, *, rounds: int = 4, chosen: Sequence[str] = (), workers: Workers | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.device, self.rounds, self.chosen, self.say = device, rounds, tuple(chosen), say
        self.keep: Callable[[dict[str, Any]], None] = lambda row: None
        self.workers = workers or Workers()
        self._twins: dict[tuple[str, Problem, bool], dict[str, float]] = {}

    def row(self, problem: Problem, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """Measure one case.

        Args:
            problem: The case.
            candidates: Those of the entry. The problem's peers take part, and 'ours': all ratios refer to it.

        Returns:
            A row of `document.py`'s schema. A candidate that is wrong or cannot run is in it with the reason.
        """
        with own_stream(self.device):
            row = self._row(problem, candidates)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return row

    def _row(self, problem: Problem, candidates: Sequence[Candidate]) -> dict[str, Any]:
        inputs = problem.inputs(self.device)
        results, launches = [], {}
        wanted = [SUBJECT, *(peer for peer in problem.peers if not self.chosen or peer in self.chosen)]
        for candidate in (candidate for candidate in candidates if candidate.name in wanted):
            result: dict[str, Any] = dict(name=candidate.name, computes=candidate.computes, reason=None)
            start = time.perf_counter()
            try:
                ready = self._ready(candidate, problem, inputs, result)
            except Exception as error:  # a peer may fail in any way: that is a result, and the others go on
                result["reason"] = reason_of(error)
            else:
                launches.update({(candidate.name, name): launch for name, launch in ready.items()})
            results.append(result | dict(ready_s=time.perf_counter() - start))
        for name in ("forward", "backward"):
            mine = {candidate: launch for (candidate, which), launch in launches.items() if which == name}
            self._fill(name, results, interleave(mine, rounds=self.rounds), problem.needed_flop(name == "backward"))
        for result in results:
            result.pop("visited_flop", None)
        needed = {name: problem.needed_flop(name == "backward") for name in ("forward", "backward")}
        head = dict(case=problem.name, label=problem.label, group=problem.group, shape=problem.shape())
        return dict(**head, subject=SUBJECT, needed_flop=needed, candidates=results)

    def _ready(
        self, candidate: Candidate, problem: Problem, inputs: Inputs, result: dict[str, Any]
    ) -> dict[str, Launch]:
        """Check a candidate and return its launches by pass; write errors and memory into `result`."""
        gradients = candidate.name in problem.backward
        prepared = candidate.prepare(problem, self.device)
        result["errors"] = dict(
            twin=self._twin_errors(candidate, problem, gradients),
            sampled=problem.errors(candidate.computes, prepared.run, inputs, gradients),
        )
        for place, shares in result["errors"].items():
            wrong = [f"{name} {share:.3g}" for name, share in shares.items() if not share <= 1]
            if wrong:
                raise AbsentError(f"wrong: error above its budget ({place}): {', '.join(wrong)} times the budget")
        result["visited_flop"] = prepared.visited_flop
        passes = ("forward", "backward") if gradients else ("forward",)
        for name in passes:
            result[name] = dict(extra_memory=extra_memory(prepared.run, inputs, self.device, name == "backward"))
        return {name: _launch(prepared, inputs, self.device, name == "backward") for name in passes}

    def _twin_errors(self, candidate: Candidate, problem: Problem, gradients: bool) -> dict[str, float]:
        twin = problem.twin()
        key = candidate.name, twin, gradients
        if key not in self._twins:
            run = candidate.prepare(twin, self.device).run
            self._twins[key] = twin.errors(candidate.computes, run, twin.inputs(self.device), gradients)
        return self._twins[key]

    @staticmethod
    def _fill(name: str, results: Sequence[dict[str, Any]], timings: Mapping[str, Timing], needed_flop: int) -> None:
        """Add the timings of one pass to the results, with the ratios and rates that follow from them."""
        for result in results:
            timing = timings.get(result["name"])
            if timing is None:
                result[name] = None
                continue
            visited = result["visited_flop"] if name == "forward" else None
            rates = {"needed_tflops": needed_flop, "visited_tflops": visited}
            result[name] |= asdict(timing)
            result[name] |= {key: flop and flop / timing.median_ms / 1e9 for key, flop in rates.items()}
            result[name]["visited_flop"] = visited
            subject = timings.get(SUBJECT)
            result[name]["ratio"] = subject and timing.median_ms / subject.median_ms


class _Forward:
    """A forward without arguments and without a graph."""

    def __init__(self, prepared: Prepared, inputs: Inputs) -> None:
        self._run, timed = prepared.to_time(inputs)
        self._tensors = timed.tensors

    def __call__(self) -> None:
        with torch.no_grad():
            self._run(*self._tensors)


class _Backward:
    """A backward without arguments; `forward` makes the graph that one call consumes."""

    def __init__(self, prepared: Prepared, inputs: Inputs) -> None:
        self._run, timed = prepared.to_time(inputs)
        self._leaves, self._cotangent = timed.leaves(), timed.cotangent
        self._output: Tensor | None = None

    def forward(self) -> None:
        self._output = self._run(*self._leaves)

    def __call__(self) -> None:
        assert self._output is not None
        torch.autograd.grad(self._output, self._leaves, self._cotangent)
        self._output = None


def _launch(prepared: Prepared, inputs: Inputs, device: torch.device, backward: bool) -> Launch:
    if not backward:
        return Launch(_Forward(prepared, inputs), device)
    call = _Backward(prepared, inputs)
    return Launch(call, device, call.forward)
