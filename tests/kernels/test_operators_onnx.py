"""Operators in ONNX, where no operator of ours is known: they are written in plain PyTorch and equal themselves."""

from functools import cache

import pytest
import torch
from derivative_cases import CASES, inputs_of
from onnx_case import exported, needs_onnx
from torch import nn

QUICK = ("local-dilated-text-bias-pooled", "multipole-cut-text-mask")
ROWS = [pytest.param(case, marks=() if case.id == QUICK[0] else pytest.mark.slow) for case in CASES]


class Call(nn.Module):
    """A row as a module."""

    def __init__(self, case, backend="torch"):
        super().__init__()
        self.case, self.backend = case, backend

    def forward(self, *t):
        return self.case.call(t, self.backend)


@needs_onnx
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_onnxruntime_equals_pytorch_where_it_is_installed(case):
    inputs = tuple(t.detach() for t in inputs_of(case, torch.float32))
    run = exported(Call(case), inputs, dynamic=False)
    torch.testing.assert_close(run(*inputs), Call(case)(*inputs), atol=1e-5, rtol=1e-4)


BY_NAME = {case.id: case for case in CASES}


@cache
def program_of(name):
    """Export a row, which finds no table that was kept from an earlier call."""
    from vision_attn.kernels.multipole import cells

    cells._kept_layout.cache_clear()
    inputs = tuple(t.detach() for t in inputs_of(BY_NAME[name], torch.float32))
    return torch.export.export(Call(BY_NAME[name]), inputs)


@pytest.mark.parametrize("case", [case for case in CASES if case.id in QUICK], ids=str)
def test_an_exported_program_has_no_operator_of_ours(case):
    inputs = tuple(t.detach() for t in inputs_of(case, torch.float32))
    program = program_of(case.id)
    assert "vision_attn" not in program.graph_module.code
    torch.testing.assert_close(program.module()(*inputs), Call(case)(*inputs))


def test_what_export_made_is_not_kept():
    """Tables of multipole attention are kept for the next call, but not those of an export, which hold no numbers."""
    case = BY_NAME["multipole-cut-text-mask"]
    inputs = tuple(t.detach() for t in inputs_of(case, torch.float32))
    program_of(case.id)
    torch.testing.assert_close(Call(case)(*inputs), Call(case, "reference")(*inputs))
