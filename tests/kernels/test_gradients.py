"""The gradients of every operator against finite differences in float64, for each backend that has gradients."""

import pytest
import torch
from derivative_cases import CASES, inputs_of


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_finite_differences(case, backend):
    leaves = inputs_of(case)
    assert torch.autograd.gradcheck(lambda *t: case.call(t, backend), leaves)
