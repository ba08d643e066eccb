"""Models, and modules in them, of classes that others made of a host's: those of users and of FSDP."""

import inspect
from typing import Any

import pytest
import torch
from converted_hosts import CLEAR
from covering import quick
from host_runs import TEXT, run, size_of
from tiny_hosts import HOST, KIND

from vision_attn import advise, convert

HOST_IDS = quick(
    [(host_id,) for host_id in KIND], (lambda host_id: KIND[host_id], 2), (lambda host_id: host_id[:3] in ("hf-",), 2)
)


def wanted(host_id: str) -> tuple[Any, torch.Tensor]:
    model = HOST[host_id].build()
    return convert(model, CLEAR), run(HOST[host_id], model, *size_of(HOST[host_id]))


@pytest.mark.parametrize("host_id", [*HOST_IDS])
def test_a_forward_that_hands_its_arguments_on(host_id: str) -> None:
    case = HOST[host_id]
    model = case.build()

    class Own(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    given = case.inputs(*size_of(case), 2, TEXT)
    positional = []
    for name in list(inspect.signature(type(model).forward).parameters)[1:]:
        if name not in given:
            break
        positional.append(given.pop(name))
    model.__class__ = Own
    conversion, want = wanted(host_id)
    assert convert(model, CLEAR).specs == conversion.specs
    with torch.no_grad():
        assert torch.equal(case.output(model(*positional, **given)), want)


@pytest.mark.parametrize("host_id", [host_id for host_id in HOST_IDS if "depth" not in str(host_id)])
def test_modules_of_other_names(host_id: str) -> None:
    """FSDP puts a class of its own on each module that it shards."""
    case = HOST[host_id]
    model = case.build()
    for module in model.modules():
        module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
    conversion, want = wanted(host_id)
    own = convert(model, CLEAR)
    assert own.specs == conversion.specs
    assert torch.equal(run(case, model, *size_of(case)), want)
    own.revert()
    assert type(model).__name__.startswith("FSDP")
    if host_id.startswith("stable-cascade"):
        with pytest.raises(ValueError, match="how many pixels a latent of Stable Cascade has differs by stage"):
            advise(model, 256, 256)
    else:
        assert "FSDP" in str(advise(model, 256, 256))


def test_a_forward_with_some_names() -> None:
    class Scaled(HOST["vit"].build().__class__):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(2 * x, *args, **kwargs)

    model, plain = HOST["vit"].build(), HOST["vit"].build()
    model.__class__ = Scaled
    for each in (model, plain):
        convert(each, CLEAR)
    x = HOST["vit"].inputs(12, 10, 2, TEXT)["x"]
    with torch.no_grad():
        assert torch.equal(model(x), plain(2 * x))
