"""Every host: `Softmax()` changes nothing, a window equals the host with a dense mask, `revert()` is bit-equal."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from covering import quick
from dense_oracle import KERNEL_3, RADIUS_2, DenseOracle, grid_of, mask_of
from host_runs import BATCH, TEXT, distance, run, size_of, stock
from tiny_hosts import HOST, HOSTS, KIND, VIDEO_HOSTS, HostCase, Layout
from torch import Tensor, nn

from vision_attn import Clear, Neighborhood, Softmax, convert
from vision_attn.conversion.state import is_rerouted, state_of
from vision_attn.grid import Grid
from vision_attn.hosts.host import Host
from vision_attn.kernels.local import Window

LOCAL = {Clear(radius=2): RADIUS_2, Neighborhood(kernel_size=3): KERNEL_3}
MASKED_DENSE = {"lumina2-ragged", "fibo-2-ragged"}  # where a mask says that the grid lies elsewhere
TRAINED = ["flux", "sd3", "sd15-unet", "vit"]
OFTEN = {  # one host of each way to have a grid
    "sd15-unet", "sdxl-unet", "unet2d", "dit", "sd35", "lumina2-ragged", "hidream", "ernie-image", "prx", "flux",
    "flux-kontext", "flux3-reference", "chroma-masked", "krea2", "qwen-image-masked", "qwen-image-2.1-edit",
    "z-image-ragged", "vit", "eva02", "hf-siglip2", "hf-dinov3", "hf-depth-anything",
}  # fmt: skip
all_hosts = pytest.mark.parametrize("case", HOSTS, ids=lambda case: case.id)
most_hosts = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.id in OFTEN else pytest.mark.slow, id=case.id) for case in HOSTS],
)


def oracle_of(case: HostCase, window: Window) -> Tensor:
    size = size_of(case)
    masked_dense = case.id in MASKED_DENSE
    with DenseOracle(case.layouts(*size, TEXT), window, masked_dense, more_keys=case.more_keys) as oracle:
        output = run(case, case.build(), *size)
    assert oracle.calls
    return output


EVERYTHING = {"softmax": Softmax(), "infinite-disc": Clear(radius=math.inf)}
UNCHANGED = quick(
    list(product(KIND, EVERYTHING)),
    (lambda host_id, name: host_id if name == "softmax" else "any", 1),
    (lambda host_id, name: (KIND[host_id], name), 1),
)


@pytest.mark.parametrize("host_id, name", UNCHANGED)
def test_attending_to_everything_changes_nothing(host_id: str, name: str) -> None:
    case, model = HOST[host_id], HOST[host_id].build()
    conversion = convert(model, EVERYTHING[name])
    torch.testing.assert_close(run(case, model, *size_of(case)), stock(case.id), rtol=0, atol=1e-5)
    assert "rerouted" in conversion.status.values()


@all_hosts
def test_a_window_equals_the_host_with_a_dense_mask(case: HostCase) -> None:
    outputs = [stock(case.id)]
    for spec, window in LOCAL.items():
        model = case.build()
        convert(model, spec)
        output = run(case, model, *size_of(case))
        assert output.isfinite().all()
        torch.testing.assert_close(output, oracle_of(case, window), rtol=0, atol=2e-5)
        assert min(distance(output, other) for other in outputs) > 1e-3
        outputs.append(output)


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param({Layout(TEXT, (10, 12))}, id="sides-swapped"),
        pytest.param({Layout(0, (12, 10), suffix=TEXT)}, id="text-last"),
        pytest.param({Layout(TEXT, (12, 10))}, id="another-radius"),
    ],
)
def test_a_wrong_window_is_caught(layouts: set[Layout]) -> None:
    case, model = HOST["flux"], HOST["flux"].build()
    window = Window(radius=2 if Layout(TEXT, (12, 10)) not in layouts else 2.3)
    convert(model, Clear(radius=2))
    with DenseOracle(layouts, window):
        wrong = run(case, case.build(), 12, 10)
    assert (run(case, model, 12, 10) - wrong).abs().max() > 1e-2


@most_hosts
def test_it_finds_the_grids(case: HostCase) -> None:
    model, size = case.build(), size_of(case)
    conversion = convert(model, Clear(radius=2))
    run(case, model, *size)
    layouts = case.layouts(*size, TEXT)
    rows = [row for row in conversion.layers if row.status == "rerouted"]
    states = [state_of(module) for module in model.modules() if is_rerouted(module)]
    if case.id in MASKED_DENSE:
        dense = [status for name, status in conversion.status.items() if name.startswith("layers.")]
        assert len(dense) == 2 and all(status.startswith("dense: ") for status in dense)
        layouts = {layout for layout in layouts if not layout.prefix and not layout.suffix}
        states = [state for state in states if state.status == "rerouted"]
    assert rows and len(rows) == len(states)
    assert {state.grid for state in states} == {grid_of(layout) for layout in layouts}
    assert {(g.height, g.width) for g in (state.grid for state in states)} == case.grids(*size)
    assert {row.tokens for row in rows} == {layout.tokens for layout in layouts}
    for row, state in zip(rows, states, strict=True):
        mask = mask_of(state.grid, RADIUS_2)
        assert row.attended == pytest.approx(mask.double().mean().item())


@most_hosts
def test_revert_is_bit_equal(case: HostCase) -> None:
    model = case.build()
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    conversion = convert(model, Clear(radius=2))
    assert list(model.state_dict()) == keys  # nothing to learn
    assert not torch.equal(run(case, model, *size_of(case)), stock(case.id))
    conversion.revert()
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(case, model, *size_of(case)), stock(case.id))


@most_hosts
def test_sizes_may_change_between_calls(case: HostCase) -> None:
    model = case.build()
    convert(model, Clear(radius=2))
    calls = [(12, 10, 2, 7), (8, 14, 3, 11), (10, 12, 1, 7)]  # height, width, batch, text
    if case.fixed_size:
        calls = [(4, 4, 2, 7), (6, 6, 3, 11), (4, 4, 1, 7)]
    first = run(case, model, *calls[0])
    for call in calls[1:]:
        fresh = case.build()
        convert(fresh, Clear(radius=2))
        assert torch.equal(run(case, model, *call), run(case, fresh, *call)), call
    assert torch.equal(run(case, model, *calls[0]), first)


@most_hosts
def test_it_runs_at_any_grid_that_the_window_fits(case: HostCase) -> None:
    model, size = case.build(), (4, 4) if case.fixed_size else (9, 8)  # a UNet pads odd sizes level by level
    convert(model, Clear(radius=1.5))
    masked_dense = case.id in MASKED_DENSE
    with DenseOracle(case.layouts(*size, 1), Window(radius=1.5), masked_dense, more_keys=case.more_keys):
        want = run(case, case.build(), *size, text=1)
    torch.testing.assert_close(run(case, model, *size, text=1), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("host_id", [*TRAINED, "pixart", "lumina2", "z-image", "eva02"])
def test_only_the_processor_learns_when_the_host_is_frozen(host_id: str) -> None:
    case, model = HOST[host_id], HOST[host_id].build().requires_grad_(False)
    keys = set(model.state_dict())
    conversion = convert(model, Clear(radius=2, pool=2))
    case.output(model(**case.inputs(16, 8, BATCH, TEXT))).square().mean().backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in conversion.named_parameters()}
    assert learned == set(model.state_dict()) - keys
    assert all(".substitute." in name for name in learned)
    assert len(learned) == len(conversion.layers) == len(list(conversion.parameters()))
    unmoved = {name for name, parameter in conversion.named_parameters() if not parameter.grad.any()}
    # The head of a ViT reads the class token alone, and class tokens do not see pooled keys.
    assert unmoved == ({"blocks.1.attn.substitute.spatial_weight"} if host_id == "vit" else set())
    conversion.revert()
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize(
    "host_id",
    [pytest.param(n, marks=() if n in (*TRAINED, "prx", "flux3-reference") else pytest.mark.slow) for n in KIND],
)
def test_gradients_equal_those_of_a_dense_mask(host_id: str) -> None:
    case, size = HOST[host_id], size_of(HOST[host_id])
    converted, masked = case.build(), case.build()
    convert(converted, Clear(radius=2))
    case.output(converted(**case.inputs(*size, BATCH, TEXT))).square().mean().backward()
    masked_dense = case.id in MASKED_DENSE
    with DenseOracle(case.layouts(*size, TEXT), RADIUS_2, masked_dense, more_keys=case.more_keys):
        case.output(masked(**case.inputs(*size, BATCH, TEXT))).square().mean().backward()
    want = dict(masked.named_parameters())
    for name, parameter in converted.named_parameters():
        assert (parameter.grad is None) == (want[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, want[name].grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("host_id", ["flux", "sd15-unet", "vit"])
def test_two_converted_models_do_not_see_each_other(host_id: str) -> None:
    case, alone = HOST[host_id], {}
    for size, spec in (((12, 10), Clear(radius=2)), ((8, 14), Neighborhood(kernel_size=2))):
        model = case.build()
        convert(model, spec)
        alone[size] = run(case, model, *size)
    one, two, plain = case.build(), case.build(), case.build()
    first = convert(one, Clear(radius=2))
    convert(two, Neighborhood(kernel_size=2))
    for _ in range(2):
        assert torch.equal(run(case, one, 12, 10), alone[12, 10])
        assert torch.equal(run(case, two, 8, 14), alone[8, 14])
        assert torch.equal(run(case, plain, *size_of(case)), stock(host_id))
    with first.bypassed():
        assert torch.equal(run(case, two, 8, 14), alone[8, 14])
    first.revert()
    assert torch.equal(run(case, one, 12, 10), stock(host_id))
    assert torch.equal(run(case, two, 8, 14), alone[8, 14])


@pytest.mark.parametrize("case", VIDEO_HOSTS, ids=lambda case: case.id)
def test_video_models_are_refused_by_name(case: HostCase) -> None:
    model = case.build()
    output = run(case, model, 4, 4)
    with pytest.raises(ValueError, match=rf"{type(model).__name__} is not a known host\. It looks like a video model"):
        convert(model, Softmax())
    assert not any(is_rerouted(module) for module in model.modules())
    assert torch.equal(run(case, model, 4, 4), output)


def test_threads_do_not_see_each_others_grid() -> None:
    """Grids of equal length, so that a mix-up would be silent."""
    case = HOST["vit"]
    model = case.build()
    convert(model, Clear(radius=2))
    inputs = {size: case.inputs(*size, 2, 0) for size in ((8, 8), (4, 16), (16, 4))}
    with torch.no_grad():
        want = {size: case.output(model(**kwargs)) for size, kwargs in inputs.items()}

    def run_often(size: tuple[int, int]) -> bool:
        with torch.no_grad():
            return all(torch.equal(case.output(model(**inputs[size])), want[size]) for _ in range(20))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run_often, inputs))


def test_of_two_modules_one_around_the_other_the_inner_one_is_the_layer():
    """As in transformers before 5.1: `ViTAttention` has its projections in `ViTSelfAttention`."""
    inner = nn.Module()
    block = nn.ModuleDict(dict(attention=nn.ModuleDict(dict(attention=inner))))
    model = nn.ModuleDict(dict(layer=nn.ModuleList([block])))
    host = Host(layers=("layer.*.attention",), probe=lambda module, inputs: Grid(2, 2), others="prefix")
    assert host.layer_names(model) == ["layer.0.attention.attention"]
