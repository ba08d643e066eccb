"""Gradient checkpointing runs layers again in backward, over the same grid and rerouted as before."""

from functools import partial
from typing import Any

import pytest
import torch
from converted_hosts import POOLED, SIZE, call, converted, hosts
from host_runs import TEXT, run
from tiny_hosts import HOST
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def save_memory_of(model: Any) -> None:
    getattr(model, "enable_gradient_checkpointing", getattr(model, "set_grad_checkpointing", None))()


def gradients(host_id: str, save_memory: bool, sizes: Any) -> dict[str, Tensor]:
    model = converted(host_id, POOLED).train()
    if save_memory:
        save_memory_of(model)
    sum(call(host_id, model, size).square().mean() for size in sizes).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@hosts("flux", "sd35", "sd15-unet", "pixart", "vit")
@pytest.mark.parametrize("sizes", [[SIZE], [SIZE, (8, 8)]], ids=["one", "two"])
def test_gradient_checkpointing(host_id: str, sizes: Any) -> None:
    want = gradients(host_id, False, sizes)
    got = gradients(host_id, True, sizes)
    assert got.keys() == want.keys() and any(".vision_attn." in name for name in want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)


@hosts("flux", "sd15-unet", "vit")
def test_checkpointing_with_grids_of_equal_length_in_turn(host_id: str) -> None:
    totals = []
    for save_memory in (False, True):
        model = converted(host_id, POOLED).train()
        if save_memory:
            save_memory_of(model)
        for size in (SIZE, (8, 16), SIZE):
            loss = call(host_id, model, size).square().mean()
            run(HOST[host_id], model, 8, 8)
            loss.backward()
        totals.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in totals[0].items():
        torch.testing.assert_close(totals[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
def test_kinds_of_checkpointing(reentrant: bool, train: bool) -> None:
    gradients = []
    for kind in (None, partial(checkpoint, use_reentrant=reentrant)):
        model = converted("flux", POOLED).train(train)
        if kind is not None:
            model.enable_gradient_checkpointing(kind)
        inputs = HOST["flux"].inputs(*SIZE, 2, TEXT)
        inputs["hidden_states"].requires_grad_()
        model(**inputs).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@hosts("flux", "sd35", "sd15-unet", "pixart", "vit")
def test_two_grids_of_equal_length_before_one_backward_are_refused(host_id: str) -> None:
    """A layer that runs again cannot know to which forward it belongs: it raises, and never takes the wrong window."""
    with pytest.raises(RuntimeError, match="run backward after each forward"):
        gradients(host_id, True, [SIZE, (8, 16)])
