"""Processes that measure side by side, for what is not timed."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType
from typing import Any, TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Workers:
    """Runs a function on items, in this process or in several that live until `with` ends.

    Args:
        count: How many processes; 1 for this one.

    Raises:
        ValueError: If `count` is below 1.
    """

    def __init__(self, count: int = 1) -> None:
        if count < 1:
            raise ValueError(f"workers must be at least 1, got {count}")
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def map(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """Return the results in the order of the items; function and items must be picklable if `count` > 1."""
        if self.count == 1:
            return [function(item) for item in items]
        if self._pool is None:
            threads = max(1, torch.get_num_threads() // self.count)
            options: dict[str, Any] = dict(initializer=torch.set_num_threads, initargs=(threads,))
            self._pool = ProcessPoolExecutor(self.count, get_context("spawn"), **options)
        return list(self._pool.map(function, items))
