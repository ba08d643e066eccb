"""Backbones in ONNX, with a batch of any size, equal themselves in PyTorch."""

import pytest
from backbone_families import FAMILIES, images
from onnx_case import check_exported, needs_onnx

QUICK = "nat_isotropic"
ROWS = [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in FAMILIES]


@needs_onnx
@pytest.mark.parametrize("name", ROWS)
def test_onnxruntime_equals_pytorch_where_it_is_installed(name):
    fewer = dict(depth=1) if name == QUICK else {}
    check_exported(FAMILIES[name].build(**fewer), images(64, 64))
