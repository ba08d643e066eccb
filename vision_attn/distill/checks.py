"""Checks of settings: each error says which one, what was given and what would do."""

from collections.abc import Iterable
from typing import Any


def at_least(section: str, values: Any, least: float, *names: str) -> None:
    """Refuse numbers of a section that are too small.

    Raises:
        ValueError: If one is below `least`.
    """
    for name in names:
        value = getattr(values, name)
        if value < least:
            raise ValueError(f"{section}.{name} must be at least {least}, got {value}")


def one_of(name: str, value: Any, known: Iterable[Any]) -> None:
    """Refuse a value that is not known.

    Raises:
        ValueError: If `value` is none of `known`.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
