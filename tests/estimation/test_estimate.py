"""`estimate` against real forwards: grids, operations, and from which size on a conversion pays."""

import math
from dataclasses import replace

import pytest
import timm
import torch
from host_runs import run
from tiny_hosts import HOST, HOSTS, HostCase
from tiny_pipelines import PIPELINE
from torch.utils.flop_counter import FlopCounterMode

from vision_attn import Clear, HiLo, LinFusion, MoH, Neighborhood, Softmax, advise, convert, estimate
from vision_attn.conversion.state import is_converted, is_rerouted, state_of
from vision_attn.estimation.cost import CPU, H200, Machine, seconds
from vision_attn.estimation.step import PARTS, Attending, Denoiser, Step
from vision_attn.graphs import enable, replayed_of
from vision_attn.grid import Grid
from vision_attn.hosts import Host, find_host
from vision_attn.kernels.local import Window
from vision_attn.processors import AttnSpec, Layer, Schedule


@pytest.mark.parametrize("case", HOSTS, ids=lambda case: case.id)
def test_the_grids_are_those_of_a_real_forward(case: HostCase) -> None:
    height, width = (8, 8) if case.fixed_size else (12, 10)
    model = case.build()
    conversion = convert(model, Softmax())
    run(case, model, height, width)
    real = {row.name: row for row in conversion.layers}
    size = height * case.patch, width * case.patch
    if case.id.startswith("stable-cascade"):  # whose latents have no whole number of pixels
        found = {name: find_host(model).size(model, name, *size) for name in conversion.specs}
    else:
        rows = estimate(model, Clear(2), height=size[0], width=size[1], vae_scale_factor=1).layers
        found = {row.name: (row.grid.height, row.grid.width) for row in rows}
    assert found.keys() == real.keys()
    for m in filter(is_rerouted, model.modules()):
        grid = state_of(m).grid
        assert grid is not None and found[state_of(m).name] == (grid.height, grid.width)


def test_operations_of_a_window_are_counted_exactly() -> None:
    rows = estimate(HOST["sd15-unet"].build(), Clear(2), height=96, width=80).layers
    grid = rows[0].grid
    pairs = Window(radius=2).allowed(grid).sum().item()
    heads_times_channels = rows[0].dense_flops / 4 / grid.tokens**2
    assert rows[0].flops == pytest.approx(4 * pairs * heads_times_channels)
    assert rows[0].bytes == 4 * grid.tokens * heads_times_channels * 4


@pytest.mark.parametrize(("host_id", "scale"), [("sd15-unet", 1), ("flux", 2), ("vit", 8), ("pixart", 2)])
def test_the_models_operations_are_near_those_that_run(host_id: str, scale: int) -> None:
    case, (height, width) = HOST[host_id], (24, 32)
    model = case.build()
    short = replace(find_host(model), text=7) if host_id == "flux" else None  # it reckons with 512 tokens of text
    found = estimate(model, Softmax(), height=height * scale, width=width * scale, host=short, vae_scale_factor=1)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run(case, model, height, width, batch=1, text=7)
    estimated = sum(row.dense_flops for row in found.layers) + found.other_flops
    assert 0.7 < estimated / counter.get_total_flops() < 1.3


@pytest.mark.parametrize(
    ("name", "options", "pixels"),
    [("vit_tiny_patch16_224", {"dynamic_img_pad": True}, 104), ("vit_tiny_r_s16_p8_224", {}, 64)],
    ids=["padded", "patches of a convolutional map"],
)
def test_the_grid_is_that_of_the_patch_embedding(name: str, options: dict[str, bool], pixels: int) -> None:
    model = timm.create_model(name, dynamic_img_size=True, depth=1, **options).eval()
    row = estimate(model, Clear(2), height=pixels, width=pixels).layers[0]
    conversion = convert(model, Clear(2))
    model(torch.randn(1, 3, pixels, pixels))
    assert [layer.tokens for layer in conversion.layers] == [row.grid.tokens]


def test_shares_and_break_even_have_the_right_order() -> None:
    model = HOST["flux"].build()
    small, large = (estimate(model, Clear(8), height=side, width=side, device="cuda") for side in (512, 4096))
    assert small.attention_share < large.attention_share < 1
    assert large.converted_share < small.converted_share < 1.2
    assert small.pays_from == large.pays_from is not None
    assert estimate(model, Clear(math.inf), height=512, width=512).pays_from is None
    at = small.pays_from[0]
    for side, faster in ((at, True), (at // 2, False)):
        step = estimate(model, Clear(8), height=side, width=side, device="cuda").step
        assert (step.seconds(step.names) < step.seconds()) == faster
    assert "faster from" in str(small) and "transformer_blocks.0.attn" in str(small)


class Gridless(torch.nn.Module):
    """A model of one wide layer over a grid that only its forward tells."""

    def __init__(self, heads: int = 24, head_dim: int = 128, blocks: int = 1) -> None:
        super().__init__()
        with torch.device("meta"):
            for block in range(blocks):
                attn = torch.nn.Module()
                attn.num_heads, attn.head_dim = heads, head_dim
                attn.qkv = torch.nn.Linear(heads * head_dim, heads * head_dim)
                self.add_module(f"block{block}", torch.nn.ModuleDict(dict(attn=attn)))


def break_even(spec: AttnSpec, machine: Machine, text: int = 0, **sizes: int) -> float:
    """Return the tokens from which on a processor pays in a layer alone: the host does nothing else."""
    model = Gridless(**sizes)
    others = "prefix" if text else "none"
    host = Host(layers=("block*.attn",), probe=lambda module, inputs: "", others=others, text=text)
    return Denoiser(model, host).break_even({"block0.attn": spec}, machine, 2)["block0.attn"]


def test_break_even_of_processors() -> None:
    disc, larger = (break_even(Clear(radius), H200, 512) for radius in (8, 32))
    assert disc < larger < math.inf
    assert break_even(LinFusion(mid_dim=-1), H200, 512) < math.inf
    assert break_even(Neighborhood(7), CPU, head_dim=64) < math.inf
    assert break_even(Clear(radius=math.inf), H200) == math.inf
    assert break_even(HiLo(), H200, 512) < math.inf


def test_a_slow_host_or_a_fast_device_makes_a_conversion_pay_later() -> None:
    usual = break_even(Clear(8), H200, 512)
    slow, fast = (
        break_even(Clear(8), replace(H200, **changes), 512)
        for changes in (dict(host=1e-3), dict(dense=6e15, narrow=6e15))
    )
    assert usual < slow < math.inf and usual < fast < math.inf


def test_a_step_that_waits_for_the_host_gains_nothing_but_in_a_graph() -> None:
    layers = tuple(Attending(f"{n}", Grid(64, 64), dense=4e-4, converted=1e-4, host=5e-5) for n in range(10))
    step = Step(layers, projections=1e-3, linear=4e-3, convolutions=0.0, other=1e-3, host=2e-2)
    assert step.device == pytest.approx(1e-2) and step.seconds() == pytest.approx(2e-2)
    assert step.faster() == frozenset() and step.faster(graphs=True) == step.names
    assert step.seconds(step.names) == pytest.approx(2.05e-2)
    assert step.seconds(step.names, graphs=True) == pytest.approx(7e-3)
    large = step.times(4)  # the device has four times as much to do, the host has not
    assert large.faster() == large.names and large.seconds(large.names) == pytest.approx(2.8e-2)


def test_layers_are_converted_as_long_as_the_step_becomes_shorter() -> None:
    """The host has 3 ms to spare: those layers are converted that save most for its time."""
    good = [Attending(f"good{n}", Grid(64, 64), dense=1e-3, converted=2e-4, host=5e-4) for n in range(6)]
    poor = [Attending(f"poor{n}", Grid(32, 32), dense=1e-4, converted=5e-5, host=5e-4) for n in range(6)]
    worse = [Attending("worse", Grid(8, 8), dense=1e-5, converted=5e-5)]
    step = Step((*poor, *worse, *good), projections=0.0, linear=1e-3, convolutions=0.0, other=0.0, host=4e-3)
    chosen = step.faster()
    assert chosen == {layer.name for layer in good}
    every = [frozenset(names) for names in ((), step.names, [layer.name for layer in poor])]
    assert all(step.seconds(chosen) < step.seconds(names) for names in every)
    assert step.faster(graphs=True) == {layer.name for layer in (*good, *poor)}


def test_a_schedule_costs_what_its_stages_do() -> None:
    layer, grid, linear = Layer("", 24, 128, dim=3072), Grid(256, 256, prefix=512), LinFusion(mid_dim=-1)
    whole, half = Schedule(((1.0, linear),)), Schedule(((0.25, Softmax()), (1.0, linear)))
    for of in (
        lambda spec: spec.flops(grid, layer),
        lambda spec: spec.passes,
        lambda spec: spec.attended(grid),
        lambda spec: spec.products(grid, layer),
        lambda spec: spec.calls,
        lambda spec: seconds(spec, grid, layer, H200, 2),
    ):
        assert of(whole) == pytest.approx(of(linear))
        assert of(half) == pytest.approx(0.25 * of(Softmax()) + 0.75 * of(linear))
    assert break_even(whole, H200, 512) == break_even(linear, H200, 512) < math.inf
    assert break_even(half, H200, 512) < math.inf
    assert break_even(Schedule(((1.0, Softmax()),)), H200, 512) == math.inf
    model = HOST["flux"].build()
    found, exact = (estimate(model, spec, height=4096, width=4096, device="cuda") for spec in (whole, linear))
    assert found.converted_share == pytest.approx(exact.converted_share) and found.pays_from == exact.pays_from


def test_a_mixture_of_heads_costs_its_processor_and_gates() -> None:
    """It never pays by itself, and its gates take as long whatever attends."""
    grid, layer = Grid(64, 64, prefix=512), Layer("", 24, 128)
    dense, disc = (
        seconds(MoH(s), grid, layer, H200, 2) - seconds(s, grid, layer, H200, 2) for s in (Softmax(), Clear(8))
    )
    assert dense == pytest.approx(disc) and 0 < dense < 0.2 * seconds(Softmax(), grid, layer, H200, 2)
    assert break_even(MoH(), H200) == math.inf


def test_layers_below_the_break_even_are_left_alone() -> None:
    case = HOST["sd15-unet"]
    model = case.build()
    before = run(case, model, 48, 48)
    conversion = convert(model, Clear(3), only_if_faster=True)
    output = run(case, model, 48, 48)
    status = conversion.status
    low = [name for name in status if "mid_block" in name or "down_blocks.1" in name]
    assert low and all("faster" in status[name] and "dense" in status[name] for name in low)
    assert status["down_blocks.0.attentions.0.transformer_blocks.0.attn1"] == "rerouted"
    assert (output - before).abs().max() > 1e-6
    conversion.revert()
    convert(model, Clear(math.inf), only_if_faster=True)
    assert torch.equal(run(case, model, 48, 48), before)


def test_graphs_that_are_enabled_first_leave_the_host_out() -> None:
    """On the meta device the rates are those of an H200, whose host limits so small a model."""
    found = []
    for graphs in (False, True):
        model = HOST["sd15-unet"].build().to("meta")
        if graphs:
            enable(model)
        convert(model, Clear(3), only_if_faster=True)
        found.append({state_of(m).name: state_of(m).break_even for m in model.modules() if is_rerouted(m)})
    eager, replayed = found
    assert eager.keys() == replayed.keys() and all(replayed[name] < eager[name] for name in eager)


def test_a_refused_processor_leaves_graphs_as_they_were() -> None:
    import vision_attn.pipelines  # noqa: F401

    for before in (False, True):
        pipe = PIPELINE["sd"].build()
        if before:
            enable(pipe)
        with pytest.raises(TypeError, match="has no field diameter"):
            pipe.set_attn_processor("clear", diameter=3, graphs=True)
        assert (replayed_of(pipe.unet) is not None) == before
    pipe.set_attn_processor("clear", radius=3, graphs=True, only_if_faster=True)
    assert replayed_of(pipe.unet) is not None and is_converted(pipe.unet)
    pipe.set_attn_processor("clear", radius=3, graphs=False)
    assert replayed_of(pipe.unet) is None


def test_sizes_of_a_pipeline_are_in_pixels() -> None:
    pipe = PIPELINE["sd"].build()
    rows = estimate(pipe, Clear(2), height=64, width=128).layers
    factor = pipe.vae_scale_factor
    assert (rows[0].grid.height, rows[0].grid.width) == (64 // factor, 128 // factor)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Clear(2), 0, 64), ValueError, "height must be at least 1, got 0"),
        ((Clear(2), 64.0, 64), TypeError, "height must be a number of pixels, got 64.0"),
        ((Clear(2), 64, "64"), TypeError, "width must be a number of pixels, got '64'"),
        (("clear", 64, 64), TypeError, "clear"),
        (({"nothing.*": Clear(2)}, 64, 64), ValueError, "nothing"),
        (([], 64, 64), ValueError, "no spec"),
        ((Clear(2), 64, 7), ValueError, "an image of 64 x 7 pixels is smaller than a token of down_blocks.0"),
    ],
    ids=["size", "float", "text", "spec", "pattern", "empty", "token"],
)
def test_bad_input_is_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        spec, height, width = arguments
        estimate(HOST["sd15-unet"].build(), spec, height=height, width=width)


@pytest.mark.parametrize("host_id", ["vit", "flux", "sd15-unet"])
def test_other_arguments_are_refused_by_name(host_id: str) -> None:
    model = HOST[host_id].build()
    sized = dict(height=64, width=64)
    for scale, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError), ("8", TypeError), (True, TypeError)):
        with pytest.raises(error, match="vae_scale_factor must be"):
            estimate(model, Clear(2), **sized, vae_scale_factor=scale)
        with pytest.raises(error, match="vae_scale_factor must be"):
            advise(model, **sized, vae_scale_factor=scale)
    with pytest.raises(TypeError, match="host must be a Host, got 3"):
        estimate(model, Clear(2), **sized, host=3)
    with pytest.raises(TypeError, match="step must be a function that runs the model once, got 3"):
        advise(model, **sized, step=3)


def test_two_models_are_one_step_whose_layers_tell_them_apart() -> None:
    models = [HOST["vit"].build(), HOST["vit-rope"].build()]
    both = estimate(models, Clear(2), height=64, width=64, device="cuda")
    each = [estimate(model, Clear(2), height=64, width=64, device="cuda") for model in models]
    assert [row.name for row in both.layers] == [f"{n}.{row.name}" for n in (0, 1) for row in each[n].layers]
    assert both.step.names == {row.name for row in both.layers}
    for part in (*PARTS, "host", "attention"):
        assert getattr(both.step, part) == pytest.approx(sum(getattr(one.step, part) for one in each)) != 0
    some = frozenset(row.name for row in both.layers if row.name.startswith("1."))
    alone = sum(layer.dense - layer.converted for layer in each[1].step.layers)
    assert both.step.device - both.step.device_with(some) == pytest.approx(alone)
    assert both.other_flops == pytest.approx(sum(one.other_flops for one in each))
    advice = advise(models, 64, 64, device="cuda")
    assert advice.stock.seconds() == pytest.approx(both.step.seconds())
    assert "VisionTransformer, Eva, 64 x 64 pixels" in str(advice)


def test_where_and_device_are_checked_as_by_convert() -> None:
    model = HOST["flux"].build()
    for refuse in (
        lambda: convert(model, Clear(2), where="nope"),
        lambda: estimate(model, Clear(2), height=64, width=64, where="nope"),
    ):
        with pytest.raises(ValueError, match=r"where selects no layer of FluxTransformer2DModel; it has .* layers\)"):
            refuse()
    with pytest.raises(ValueError, match="device must be 'cuda' or 'cpu', whose rates are known, got 'nope'"):
        estimate(model, Clear(2), height=64, width=64, device="nope")
    numbered, plain = (estimate(model, Clear(2), height=64, width=64, device=device) for device in ("cpu:0", "cpu"))
    assert numbered == plain != estimate(model, Clear(2), height=64, width=64, device="cuda")
