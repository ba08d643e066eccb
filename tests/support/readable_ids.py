"""Ids of tests say what is in a row: tuples, dicts and dtypes, which pytest numbers, are named after their values."""

import re
from collections.abc import Iterable
from typing import Any

import pytest

NUMBERED = pytest.StashKey[list[str]]()


def pytest_make_parametrize_id(val: Any) -> str | None:
    """Return the name of a value that pytest would number, None for all others."""
    if isinstance(val, dict):
        return ",".join(f"{name}={value}" for name, value in val.items()) or "nothing"
    if isinstance(val, tuple | list) or str(val).startswith("torch."):
        return str(val).removeprefix("torch.")
    return None


def is_numbered(row: str, arguments: Iterable[str]) -> bool:
    """Return whether the id of a row has the number of a value, such as `x0`, in the place of its name."""
    return any(re.search(rf"(^|-){name}\d+(-|$)", row) for name in arguments)


@pytest.hookimpl(tryfirst=True)  # before rows are deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the names of numbered rows for the test that refuses them."""
    rows = [(item.nodeid, item.callspec) for item in items if hasattr(item, "callspec")]
    config.stash[NUMBERED] = [name for name, row in rows if is_numbered(row.id, row.params)]
