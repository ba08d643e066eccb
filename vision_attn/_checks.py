"""Checks of arguments. Each error names the argument, and says what was given and what is allowed."""

from collections.abc import Iterable
from typing import Any


def is_int(value: object) -> bool:
    """Whether `value` is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether `value` is an int or a float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_int(name: str, value: Any, least: int, what: str = "an int") -> None:
    """Refuse a value that is not an int, or is below `least`.

    Args:
        name: Name of the argument, for the error.
        value: What was given.
        least: The smallest value allowed.
        what: What is allowed, for the error.

    Raises:
        TypeError: If the value is not an int, or is a bool.
        ValueError: If it is below `least`.
    """
    if not is_int(value):
        raise TypeError(f"{name} must be {what}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: Any, what: str = "a number", *, least: float | None = None) -> None:
    """Refuse a value that is not a number, or is too small.

    Args:
        name: Name of the argument, for the error.
        value: What was given.
        what: What is allowed, for the error.
        least: The smallest value allowed, if there is one.

    Raises:
        TypeError: If the value is neither an int nor a float, or is a bool.
        ValueError: If it is below `least`.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be {what}, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_one_of(name: str, value: Any, known: Iterable[Any]) -> None:
    """Refuse a value that is not one of `known`.

    Raises:
        ValueError: If it is not; the known values are listed.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
