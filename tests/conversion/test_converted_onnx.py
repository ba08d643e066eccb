"""Converted models in ONNX, with a batch of any size, equal themselves in PyTorch."""

import pytest
import timm
import torch
from onnx_case import check_exported, exported, needs_onnx
from tiny_hosts import HOST
from torch import nn

from vision_attn import AgentSD, Clear, convert
from vision_attn.processors.base import registrations

SPECS = {name: spec for known in registrations() for name, spec in known.tests.items()}
QUICK = "clear"
ROWS = [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in SPECS]


def converted(spec, depth=2):
    size = dict(img_size=32, patch_size=4, embed_dim=48, depth=depth, num_heads=3, num_classes=10)
    model = timm.create_model("vit_tiny_patch16_224", **size).eval()
    convert(model, spec)
    return model


@needs_onnx
@pytest.mark.parametrize("name", ROWS)
def test_a_vit_in_onnxruntime_where_it_is_installed(name):
    check_exported(converted(SPECS[name], depth=1 if name == QUICK else 2), torch.randn(2, 3, 32, 32))


@needs_onnx
@pytest.mark.slow
def test_a_diffusion_transformer_in_onnxruntime_where_it_is_installed():
    case = HOST["sd3"]
    model, inputs = case.build(), case.inputs(4, 6, 2, 5)
    convert(model, Clear(radius=2))

    class Positional(nn.Module):
        def forward(self, *tensors):
            return case.output(model(**dict(zip(inputs, tensors, strict=True))))

    run, tensors = exported(Positional(), tuple(inputs.values()), dynamic=False), tuple(inputs.values())
    with torch.no_grad():
        torch.testing.assert_close(run(*tensors), Positional()(*tensors), atol=2e-5, rtol=1e-4)


def test_random_merging_is_not_exported():
    model = converted(AgentSD(cell=(1, 2), ratio=0.5, max_downsample=2))
    with pytest.raises(NotImplementedError, match=r"export AgentSD\(random=False\)"):
        torch.export.export(model, (torch.randn(2, 3, 32, 32),))
