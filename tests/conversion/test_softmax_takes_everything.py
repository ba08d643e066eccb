"""`Softmax()` leaves a call as it is, so it takes every mask and every dropout that the host takes."""

from typing import Any

import pytest
import torch
from converted_hosts import call
from tiny_hosts import HOST
from torch import Tensor

from vision_attn import Conversion, Softmax, convert

SIZE = (12, 10)
HIDES = torch.ones(2, 120).index_fill(1, torch.tensor([3]), 0)
BIAS = torch.linspace(-1, 1, 240).view(2, 1, 120)


@pytest.mark.parametrize(
    "host_id, inputs",
    [
        ("pixart", dict(attention_mask=HIDES)),
        ("pixart", dict(attention_mask=BIAS)),
        ("vit", dict(attn_mask=torch.ones(121, 121).tril().bool())),
        ("vit", dict(attn_mask=torch.linspace(-1, 1, 2 * 3 * 121 * 121).view(2, 3, 121, 121))),
    ],
    ids=["pixart-hides-the-grid", "pixart-bias", "vit-causal", "vit-bias-of-each-head"],
)
def test_masks(host_id: str, inputs: Any) -> None:
    models = [HOST[host_id].build() for _ in range(2)]
    conversion = convert(models[1], Softmax())
    with torch.no_grad():
        want, output = (call(host_id, model, SIZE, **inputs) for model in models)
    assert torch.equal(output, want) and set(conversion.status.values()) == {"rerouted"}


def test_dropout() -> None:
    def trained() -> Tensor:
        torch.manual_seed(0)
        return call("vit", model, SIZE)

    model: Any = HOST["vit"].build().train()
    for block in model.blocks:
        block.attn.attn_drop.p = 0.5
    want = trained()
    convert(model, Softmax())
    assert torch.equal(trained(), want)
    Conversion.of(model).revert()
    assert torch.equal(trained(), want)
