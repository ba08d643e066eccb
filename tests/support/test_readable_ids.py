"""Rows of tables are named after what is in them."""

import pytest
import torch
from readable_ids import NUMBERED, is_numbered, pytest_make_parametrize_id


def test_no_row_has_only_a_number(request):
    assert not request.config.stash[NUMBERED]


@pytest.mark.parametrize(
    ("row", "numbered"),
    [("x0-flux", True), ("flux-weight12", True), ("x", False), ("x64-flux", True), ("16x16-flux", False)],
)
def test_a_number_is_seen(row, numbered):
    assert is_numbered(row, ("x", "weight")) == numbered


@pytest.mark.parametrize(
    ("value", "name"),
    [((2, 3), "(2, 3)"), (dict(radius=2, pool=4), "radius=2,pool=4"), ({}, "nothing"), (torch.float16, "float16")],
)
def test_values_are_named(value, name, request):
    assert pytest_make_parametrize_id(value) == name
    assert name in request.node.name
