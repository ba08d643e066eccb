"""Grouped queries: keys that heads share are not repeated, and each head sees those of its group."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_oracle import RADIUS_2, DenseOracle
from tiny_host_case import Layout, build, noise
from torch import Tensor, nn

from vision_attn import Clear, Grid, Host, Neighborhood, Softmax, convert
from vision_attn.processors import AttnSpec, make_spec
from vision_attn.processors.clear import ClearAttention


class Grouped(nn.Module):
    """Self-attention with 6 heads of queries and 2 of keys."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.masked = 6, 8, masked
        self.to_q, self.to_k, self.to_v = nn.Linear(48, 48), nn.Linear(48, 16), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        mask = None
        if self.masked:
            mask = torch.ones(len(x), 1, 1, x.shape[1], dtype=torch.bool)
            mask[1, :, :, 1] = False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Three tokens of text before 4 x 5 of the image."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.layer = Grouped(masked)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


HOST = Host(layers=("layer",), probe=lambda module, inputs: Grid(4, 5), others="prefix")
LAYOUTS = {Layout(3, (4, 5))}


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("spec", [Softmax(), Clear(radius=100), Neighborhood(kernel_size=(4, 5))], ids=str)
def test_attending_to_everything_changes_nothing(spec: AttnSpec, masked: bool) -> None:
    model, x = build(Model, masked), noise(2, 23, 48)
    with torch.no_grad():
        want = model(x)
        convert(model, spec, host=HOST)
        torch.testing.assert_close(model(x), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("spec", [Clear(radius=2), Clear(radius=2, pool=1)], ids=["clear", "clear-unpooled"])
def test_a_window_equals_the_host_with_a_dense_mask(spec: AttnSpec, masked: bool) -> None:
    converted, model, x = build(Model, masked), build(Model, masked), noise(2, 23, 48)
    convert(converted, spec, host=HOST)
    with DenseOracle(LAYOUTS, RADIUS_2):
        want = model(x)
    found = converted(x)
    torch.testing.assert_close(found, want, rtol=0, atol=2e-5)
    for output in (want, found):
        output.square().mean().backward()
    for (name, parameter), own in zip(model.named_parameters(), converted.parameters(), strict=True):
        torch.testing.assert_close(own.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_keys_are_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    forward = ClearAttention.forward
    monkeypatch.setattr(
        ClearAttention, "forward", lambda self, q, k, v, *rest: seen.append(k) or forward(self, q, k, v, *rest)
    )
    model = build(Model)
    convert(model, Clear(radius=2), host=HOST)
    with torch.no_grad():
        model(noise(2, 23, 48))
    (keys,) = seen
    assert tuple(keys.shape) == (4, 23, 3, 8) and keys.stride(2) == 0


def test_a_processor_with_parameters_of_heads_gets_repeated_keys() -> None:
    """Agent attention has biases for each of its 6 heads."""
    model = build(Model)
    conversion = convert(model, make_spec("agent", num_agents=4), host=HOST)
    with torch.no_grad():
        assert model(noise(2, 23, 48)).isfinite().all()
    assert set(conversion.status.values()) == {"rerouted"}
