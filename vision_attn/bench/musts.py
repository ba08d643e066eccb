"""What a measurement must show, as data: evaluated against a row's candidates and stored with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Must:
    """One candidate is faster than others, or runs at all.

    Args:
        subject: Name of the candidate that it is about.
        against: Candidates to compare with, of which the fastest counts; none if it is enough that the subject runs.
        factor: How many times faster the subject is at least.
    """

    subject: str
    against: tuple[str, ...] = ()
    factor: float = 1.0

    def judge(self, candidates: Sequence[Row]) -> Row | None:
        """Return the verdict `{text, value, needed, holds}`, None if a candidate took no part in the run.

        A subject that was left out with a reason fails; `value` is None where there is nothing to compare.
        """
        by_name = {candidate["name"]: candidate for candidate in candidates}
        others = [by_name[name] for name in self.against if name in by_name]
        if self.subject not in by_name or bool(self.against) != bool(others):
            return None
        own = per_item(by_name[self.subject])
        if not self.against:
            return dict(text=f"{self.subject} runs", value=None, needed=None, holds=own is not None)
        times = {other["name"]: t for other in others if (t := per_item(other)) is not None}
        fastest = min(times, key=lambda name: times[name], default=" or ".join(self.against))
        value = times[fastest] / own if times and own is not None else None
        text = f"{self.subject} at least {self.factor:g}x as fast as {fastest}"
        return dict(text=text, value=value, needed=self.factor, holds=value is not None and value >= self.factor)


def per_item(candidate: Row) -> float | None:
    """Return the milliseconds per image of a measured candidate, None for one that was left out."""
    timed = candidate.get("forward")
    return timed["median_ms"] / timed.get("batch", 1) if timed else None


def judge(musts: Sequence[Must], candidates: Sequence[Row]) -> list[Row]:
    """Return the verdicts on the musts whose candidates took part."""
    verdicts = [must.judge(candidates) for must in musts]
    return [verdict for verdict in verdicts if verdict is not None]


def add_speedups(candidates: Sequence[Row], reference: Sequence[str]) -> None:
    """Give each measured candidate `speedup`: how many times faster it is than the fastest of `reference`."""
    times = [per_item(candidate) for candidate in candidates if candidate["name"] in reference]
    fastest = min((t for t in times if t is not None), default=None)
    for candidate in candidates:
        own = per_item(candidate)
        if own is not None:
            candidate["forward"]["speedup"] = None if fastest is None else fastest / own
