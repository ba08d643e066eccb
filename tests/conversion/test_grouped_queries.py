"""Grouped queries: keys that heads share are not repeated, and each head sees those of its group."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_oracle import RADIUS_2, DenseOracle
from tiny_host_case import Layout, build, noise
from torch import Tensor, nn

from vision_attn import Clear, Grid, Host, Neighborhood, Softmax, convert
from vision_attn.processors import Agent, AttnSpec, Halo, HiLo, InLine, LinFusion, Multipole, make_spec


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


ALIKE = {
    "clear": Clear(radius=2),
    "multipole": Multipole(cell=2, near=0, pool=1, exact=1),
    "linfusion": LinFusion(mid_dim=-1),
    "agent": Agent(num_agents=4),
    "hilo-low": HiLo(alpha=1.0),
    "halo": Halo(block=2, halo=1),
    "inline": InLine(kernel_size=0),
}


@pytest.mark.parametrize("spec", ALIKE.values(), ids=ALIKE)
def test_keys_are_a_view_and_give_what_repeated_ones_give(spec: AttnSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and the gradients of all parameters, those that a processor has for each head too."""
    seen: list[Any] = []

    def run(repeated: bool) -> tuple[Tensor, dict[str, Tensor | None]]:
        model, x = build(Model, True), noise(2, 23, 48)
        convert(model, spec, host=HOST)
        processor: Any = model.layer.vision_attn  # type: ignore[union-attr]
        for n, parameter in enumerate(processor.parameters()):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))
        assert processor.heads_alike
        if repeated:
            processor.heads_alike = False
        forward = type(processor).forward
        with monkeypatch.context() as patched:
            patched.setattr(
                type(processor), "forward", lambda self, q, k, *rest: seen.append(k) or forward(self, q, k, *rest)
            )
            o = model(x)
        (o * noise(*o.shape, seed=3)).sum().backward()
        return o, {name: parameter.grad for name, parameter in model.named_parameters()}

    (o, grads), (want, expected) = run(False), run(True)
    view, whole = seen
    assert tuple(view.shape) == (4, 23, 3, 8) and view.stride(2) == 0 and tuple(whole.shape) == (2, 23, 6, 8)
    torch.testing.assert_close(o, want, rtol=0, atol=2e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=2e-5, msg=name)


def test_a_processor_with_parameters_of_heads_gets_repeated_keys() -> None:
    """Agent attention has biases for each of its 6 heads."""
    model = build(Model)
    conversion = convert(model, make_spec("agent", num_agents=4, biases=True), host=HOST)
    with torch.no_grad():
        assert model(noise(2, 23, 48)).isfinite().all()
    assert set(conversion.status.values()) == {"rerouted"}
