"""Gradient checkpointing runs layers again in backward, over the same grid and rerouted as before."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from converted_hosts import CLEAR, POOLED, SIZE, call, converted, hosts
from host_runs import TEXT, run
from tiny_hosts import HOST
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_attn import Clear, LinFusion, convert
from vision_attn.processors import AgentSD, Schedule


def save_memory_of(model: Any) -> None:
    getattr(model, "enable_gradient_checkpointing", getattr(model, "set_grad_checkpointing", None))()


def gradients(host_id: str, save_memory: bool, sizes: Any) -> dict[str, Tensor]:
    model = converted(host_id, POOLED).train()
    if save_memory:
        save_memory_of(model)
    sum(call(host_id, model, size).square().mean() for size in sizes).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@hosts("flux", "sd35", "sd15-unet", "pixart", "vit")
@pytest.mark.parametrize(
    "sizes", [pytest.param([SIZE], id="one", marks=pytest.mark.slow), pytest.param([SIZE, (8, 8)], id="two")]
)
def test_gradient_checkpointing(host_id: str, sizes: Any) -> None:
    want = gradients(host_id, False, sizes)
    got = gradients(host_id, True, sizes)
    assert got.keys() == want.keys() and any(".substitute." in name for name in want)
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


def whole(host_id: str, sizes: Any, reentrant: bool | None, blocks: bool = False) -> list[Tensor | None]:
    """Return gradients of one backward through forwards of several sizes, each checkpointed as a whole."""
    model = converted(host_id, POOLED).train()
    if blocks:
        save_memory_of(model)
    losses, images = [], []
    for size in sizes:
        inputs = HOST[host_id].inputs(*size, 2, TEXT)
        name = next(name for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() > 2)
        images.append(inputs.pop(name).requires_grad_())
        run_whole = partial(_with, host_id, model, inputs, name)
        output = (
            run_whole(images[-1]) if reentrant is None else checkpoint(run_whole, images[-1], use_reentrant=reentrant)
        )
        losses.append(output.square().mean())
    sum(losses).backward()
    return [image.grad for image in images] + [p.grad for p in model.parameters()]


def _with(host_id: str, model: nn.Module, inputs: dict[str, Any], name: str, image: Tensor) -> Tensor:
    return HOST[host_id].output(model(**inputs, **{name: image}))


def whole_models(*names: str) -> Any:
    """Run a test for each host with both kinds of checkpointing, the UNet quickly with one."""
    kinds = {"saved-tensors": False, "reentrant": True}
    slow = [("sd15-unet", "saved-tensors")]
    rows = [
        pytest.param(host_id, kinds[kind], id=f"{kind}-{host_id}", marks=[pytest.mark.slow] * ((host_id, kind) in slow))
        for kind, host_id in product(kinds, names)
    ]
    return pytest.mark.parametrize("host_id, reentrant", rows)


def assert_alike(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@whole_models("flux", "sd35", "sd15-unet", "vit")
def test_whole_models_run_again_over_their_own_grids(host_id: str, reentrant: bool) -> None:
    """Two forwards over grids with as many tokens come before one backward, and others came before them."""
    sizes = [SIZE, (8, 16)]
    assert_alike(whole(host_id, sizes, reentrant), whole(host_id, sizes, None))


@whole_models("flux", "sd15-unet", "vit")
def test_whole_models_whose_blocks_run_again_too(host_id: str, reentrant: bool) -> None:
    assert_alike(whole(host_id, [SIZE], reentrant, blocks=True), whole(host_id, [SIZE], None))
    try:
        got = whole(host_id, [SIZE, (8, 16)], reentrant, blocks=True)
    except RuntimeError as error:
        assert "run backward after each forward" in str(error)
    else:
        assert_alike(got, whole(host_id, [SIZE, (8, 16)], None))


def test_features_of_a_vit_that_run_again_are_right_or_refused() -> None:
    """`forward_features` is no forward of the whole model, so only the patch embedding tells the grid."""
    model: Any = converted("vit", CLEAR)
    images = [HOST["vit"].inputs(*size, 2, TEXT)["x"].requires_grad_() for size in (SIZE, (8, 16))]

    def gradient(run_features: Any, x: Tensor) -> Tensor:
        x.grad = None
        run_features(x).square().mean().backward()
        assert x.grad is not None
        return x.grad

    again = partial(checkpoint, model.forward_features, use_reentrant=True)
    want = gradient(model.forward_features, images[1])
    torch.testing.assert_close(gradient(again, images[1]), want, rtol=1e-4, atol=1e-6)
    gradient(model.forward_features, images[0])
    with pytest.raises(RuntimeError, match="run backward after each forward"):
        gradient(again, images[1])
    gradient(model.forward_features, images[1])
    torch.testing.assert_close(gradient(again, images[1]), want, rtol=1e-4, atol=1e-6)


def blocks_again(spec: Any, calls: Any, save_memory: bool, **options: Any) -> list[Tensor | None]:
    """Return gradients of one backward through several calls, by size and by timestep."""
    torch.manual_seed(0)
    model: Any = HOST["sd15-unet"].build().train()
    conversion = convert(model, spec, **options)
    with torch.no_grad():
        for parameter in conversion.parameters():
            parameter.add_(0.1)
    if save_memory:
        save_memory_of(model)
    losses = []
    for size, timestep in calls:
        inputs = HOST["sd15-unet"].inputs(*size, 2, TEXT) | dict(timestep=torch.tensor(timestep))
        losses.append(model(**inputs).sample.square().mean())
    sum(losses).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("order", [1, -1], ids=["dense-first", "dense-last"])
def test_residual_networks_are_added_again_or_refused(order: int) -> None:
    """With `min_tokens` one of two sizes has none. A layer must never add them to its own dense attention."""
    spec, calls = LinFusion(mid_dim=4), [((4, 4), 500), (SIZE, 500)][::order]
    with pytest.raises(RuntimeError, match="with and without residual networks"):
        blocks_again(spec, calls, True, min_tokens=100)
    for call_ in calls:
        assert_alike(
            blocks_again(spec, [call_], True, min_tokens=16), blocks_again(spec, [call_], False, min_tokens=16)
        )


STAGES = Schedule(((0.5, Clear(radius=2)), (1.0, Clear(radius=4))))


def test_a_stage_of_a_schedule_runs_again_or_is_refused() -> None:
    early, late = (SIZE, 900), (SIZE, 100)
    for calls in ([early], [late], [early, early]):
        assert_alike(blocks_again(STAGES, calls, True), blocks_again(STAGES, calls, False))
    with pytest.raises(RuntimeError, match="different moments of the denoising"):
        blocks_again(STAGES, [early, late], True)


def test_random_tokens_are_not_drawn_again() -> None:
    spec = dict(cell=2, max_downsample=4)
    assert_alike(
        blocks_again(AgentSD(**spec, random=False), [(SIZE, 500)], True),
        blocks_again(AgentSD(**spec, random=False), [(SIZE, 500)], False),
    )
    with pytest.raises(RuntimeError, match="AgentSD\\(random=False\\)"):
        blocks_again(AgentSD(**spec), [(SIZE, 500)], True)
