"""Picks the implementation of an operator: `reference`, `torch` or `triton`.

`auto` takes the first of `triton`, `torch` that can run. An implementation asked for by name runs or raises: it never
falls back to another one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator: `run` computes it, `reasons` lists why it cannot for the inputs at hand."""

    run: Callable[..., Any]
    reasons: Sequence[str] = ()


def check_backend(backend: str, known: Sequence[str] = ("triton", "torch", "reference")) -> None:
    """Refuse a backend name that no operator has.

    Raises:
        ValueError: If `backend` is neither 'auto' nor in `known`.
    """
    if backend != "auto" and backend not in known:
        names = ", ".join(repr(name) for name in ("auto", *known))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")


def pick(operator: str, backend: str, implementations: Mapping[str, Implementation]) -> Callable[..., Any]:
    """Return the function that runs `operator` with the chosen backend.

    Args:
        operator: Name of the operator, for the message.
        backend: 'auto' or a key of `implementations`.
        implementations: By name, the fastest first; 'reference' is never chosen by 'auto'.

    Raises:
        ValueError: If the named backend is unknown or cannot run; every reason is listed.
    """
    check_backend(backend, tuple(implementations))
    if backend != "auto":
        chosen = implementations[backend]
        if chosen.reasons:
            raise ValueError(f"{operator} with backend={backend!r}: {'; '.join(chosen.reasons)}")
        return chosen.run
    for name, implementation in implementations.items():
        if name != "reference" and not implementation.reasons:
            return implementation.run
    refusals = "; ".join(f"{name}: {', '.join(i.reasons)}" for name, i in implementations.items() if i.reasons)
    raise ValueError(f"no backend of {operator} can run: {refusals}")
