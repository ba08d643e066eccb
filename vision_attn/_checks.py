"""Checks of arguments. Each error names the argument, and says what was given and what is allowed."""

import math
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


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
        ValueError: If it is NaN, or below `least`.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be {what}, got {value!r}")
    if not value <= math.inf:  # NaN; Dynamo takes no math.isnan of a symbolic number
        raise ValueError(f"{name} must be {what}, got {value}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_bool(name: str, value: Any) -> None:
    """Refuse a value that is neither True nor False.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_one_of(name: str, value: Any, known: Iterable[Any]) -> None:
    """Refuse a value that is not one of `known`.

    Raises:
        ValueError: If it is not; the known values are listed.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def fitting(name: str, value: Any, kind: Any) -> Any:
    """Refuse a value from a file that does not fit an annotation.

    Args:
        name: Name of the value, for the error.
        value: As YAML or JSON has it.
        kind: The annotation: a class, `Literal`, or lists, tuples, dictionaries and alternatives of these.

    Returns:
        The value as the annotation has it: tuples for lists, and paths for texts.

    Raises:
        TypeError: If its type is another one.
        ValueError: If it is none of the values of a `Literal`.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (kind,) = (one for one in inner if one is not type(None))
        return fitting(name, value, kind)
    if origin is Literal:
        check_one_of(name, value, inner)
    elif origin is dict and isinstance(value, dict):
        value = {key: fitting(f"{name}.{key}", item, inner[1]) for key, item in value.items()}
    elif origin is list and isinstance(value, (list, tuple)):
        value = [fitting(name, item, inner[0]) for item in value]
    elif origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(inner):
        value = tuple(fitting(name, item, one) for item, one in zip(value, inner, strict=True))
    elif kind is Path and isinstance(value, str):
        value = Path(value)
    elif origin is not None or not _is_a(value, kind):
        raise TypeError(f"{name} must be {kind if origin else kind.__name__}, got {value!r}")
    return value


def _is_a(value: Any, kind: Any) -> bool:
    if kind is int:
        return is_int(value)
    return is_number(value) if kind is float else kind is Any or isinstance(value, kind)
