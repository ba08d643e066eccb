"""Layers that leave their attention to the host run unwatched, until a call looks different."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from converted_hosts import SIZE, hosts
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from host_runs import TEXT
from tiny_hosts import HOST
from torch import Tensor

from vision_attn import Clear, LinFusion, Softmax, convert
from vision_attn.conversion.doors import ATTENTION
from vision_attn.conversion.state import LAYER
from vision_attn.processors import Schedule

LARGE = (16, 16)
DENSE = {"softmax": (Softmax(), 0), "clear": (Clear(radius=2), 200), "linfusion": (LinFusion(mid_dim=4), 200)}
every_way = pytest.mark.parametrize("way", DENSE)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The answers of the layers that were watched."""
    found: list[Any] = []
    own = ATTENTION.open

    def listening(answer: Any) -> Any:
        found.append(answer)
        return own(answer)

    monkeypatch.setattr(ATTENTION, "open", listening)
    return found


def left_alone(host_id: str, way: str) -> tuple[Any, Any, Callable[..., Tensor]]:
    """Return a model whose layers stay dense on grids of `SIZE`, its conversion, and how to run it."""
    spec, least = DENSE[way]
    model = HOST[host_id].build()
    conversion = convert(model, spec, min_tokens=least)

    def run(size: tuple[int, int] = SIZE, **changes: Any) -> Tensor:
        with torch.no_grad():
            return HOST[host_id].output(model(**HOST[host_id].inputs(*size, 2, TEXT) | changes))

    return model, conversion, run


@every_way
@hosts("sd15-unet", "flux", "vit", "sd35")
def test_the_second_forward_is_unwatched_and_equal(host_id: str, way: str, opened: list[Any]) -> None:
    _, conversion, run = left_alone(host_id, way)
    first, watched = run(), len(opened)
    before = conversion.status
    assert watched
    opened.clear()
    assert torch.equal(run(), first) and not opened
    assert conversion.status == before
    conversion.revert()
    assert torch.equal(run(), first)


@hosts("sd15-unet", "flux", "vit")
def test_a_larger_grid_is_rerouted(host_id: str, opened: list[Any]) -> None:
    _, conversion, run = left_alone(host_id, "clear")
    run(), run()
    opened.clear()
    got = run(LARGE)
    assert opened and "rerouted" in str(conversion.status)
    fresh = HOST[host_id].build()
    convert(fresh, Clear(radius=2), min_tokens=200)
    with torch.no_grad():
        want = HOST[host_id].output(fresh(**HOST[host_id].inputs(*LARGE, 2, TEXT)))
    assert torch.equal(got, want)
    opened.clear()
    run(LARGE)
    assert opened  # rerouted layers are watched each time


def test_what_decides_beside_shapes_is_looked_at(opened: list[Any]) -> None:
    model, conversion, run = left_alone("sd15-unet", "clear")
    dense = run()

    def watched(**changes: Any) -> int:
        opened.clear()
        run(**changes)
        return len(opened)

    layers = watched() or len(conversion.status)
    with torch.enable_grad():
        opened.clear()
        model(**HOST["sd15-unet"].inputs(*SIZE, 2, TEXT))
        assert opened  # checkpointing may run the layers again
    run()
    assert watched() == 0
    with conversion.bypassed():
        assert watched() == 0
    assert watched() == 0
    model.set_attn_processor(AttnProcessor2_0())  # another one may call its attention elsewhere
    assert watched() >= layers > 0
    assert watched() == 0
    twin = copy.deepcopy(model)
    opened.clear()
    with torch.no_grad():
        assert torch.equal(HOST["sd15-unet"].output(twin(**HOST["sd15-unet"].inputs(*SIZE, 2, TEXT))), dense)
    assert opened


def test_a_processor_without_fused_attention_is_refused_as_before() -> None:
    model, _, run = left_alone("sd15-unet", "clear")
    run(), run()
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(RuntimeError, match="never called scaled_dot_product_attention"):
        run()


def test_what_became_of_a_call_is_recorded_each_time() -> None:
    model, _, run = left_alone("sd15-unet", "clear")
    states = [vars(m)[LAYER] for m in model.modules() if LAYER in vars(m)]
    counts = []
    for _ in range(3):
        run()
        counts.append((states[0].shared.here.ran, states[0].shared.here.rerouted))
    assert counts == [(len(states), len(states))] * 3


def test_another_grid_of_as_many_tokens_is_watched(opened: list[Any]) -> None:
    model, _, run = left_alone("flux", "clear")
    run(SIZE), run(SIZE)
    opened.clear()
    run(SIZE[::-1])
    grids = [vars(m)[LAYER].grid for m in model.modules() if LAYER in vars(m)]
    assert opened and all((grid.height, grid.width) == SIZE[::-1] for grid in grids)


def test_another_length_of_the_text_is_watched(opened: list[Any]) -> None:
    model, _, run = left_alone("flux", "clear")
    run(), run()
    opened.clear()
    with torch.no_grad():
        model(**HOST["flux"].inputs(*SIZE, 2, TEXT + 2))
    assert opened


def test_another_attention_backend_is_watched(opened: list[Any]) -> None:
    model, _, run = left_alone("flux", "clear")
    run(), run()
    opened.clear()
    model.set_attention_backend("native")
    run()
    assert opened


def test_a_schedule_that_begins_dense_is_asked_at_each_step() -> None:
    """The stage of `Softmax` leaves everything to the host; the next one comes with tensors of the same shapes."""
    schedule = Schedule(((0.5, Softmax()), (1.0, Clear(radius=2))))
    model = HOST["sd15-unet"].build()
    convert(model, schedule)
    dense, local = HOST["sd15-unet"].build(), HOST["sd15-unet"].build()
    convert(local, Clear(radius=2))
    for time, like in ((900, dense), (900, dense), (100, local)):
        inputs = HOST["sd15-unet"].inputs(*SIZE, 2, TEXT) | {"timestep": torch.tensor(time)}
        with torch.no_grad():
            assert torch.equal(*(HOST["sd15-unet"].output(m(**inputs)) for m in (model, like)))
