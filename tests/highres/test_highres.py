"""`generate_highres`: levels, noise levels, positions and chunks are right, and the pipeline is left as it was."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from host_runs import run
from tiny_hosts import HOST
from tiny_pipelines import PIPELINE
from torch.utils._python_dispatch import TorchDispatchMode

from vision_attn import Clear, Conversion, LinFusion, MoH, Softmax, generate_highres
from vision_attn.demo import load_teacher
from vision_attn.grid import Grid
from vision_attn.highres.feed_forward import chunked_feed_forward
from vision_attn.highres.levels import Options, Proportional, cell_of, proportional
from vision_attn.highres.positions import position_ids, stretched_positions
from vision_attn.highres.redraw import Redraw, image_to_image, noise_level, schedule_for
from vision_attn.processors import AttnSpec, Schedule

KINDS = ["sd", "sdxl", "sd3", "flux"]


def arguments(pipeline_id: str) -> dict[str, Any]:
    call = PIPELINE[pipeline_id].call(16, 16)
    for name in ("height", "width", "num_inference_steps", "output_type", "generator"):
        call.pop(name)
    return call


def draw(pipe: Any, pipeline_id: str, side: int, **options: Any) -> Any:
    spec, callback = options.pop("spec", None), options.pop("callback", None)
    fields = dict(num_inference_steps=3, level_inference_steps=2, quiet=True) | options
    generator = torch.Generator().manual_seed(0)
    return generate_highres(
        pipe, None, side, side, options=Options(**fields), spec=spec, generator=generator, callback=callback,
        **arguments(pipeline_id),
    )  # fmt: skip


def base_of(pipe: Any) -> int:
    return 4 * pipe.vae_scale_factor * 2


@pytest.mark.parametrize("pipeline_id", KINDS)
def test_levels_of_every_kind_of_pipeline(pipeline_id: str) -> None:
    pipe: Any = PIPELINE[pipeline_id].build()
    base, seen = base_of(pipe), []
    scheduler, components = pipe.scheduler, dict(pipe.components)
    result = draw(pipe, pipeline_id, 4 * base, base=(base, base), callback=lambda n, level: seen.append((n, level)))
    sides = [level.height for level in result.levels]
    assert sides == [base, 2 * base, 4 * base] and [n for n, _ in seen] == [0, 1, 2]
    assert [image.size for level in result.levels for image in level.images] == [(side, side) for side in sides]
    assert [level.strength for level in result.levels] == [1.0, 0.6, 0.45]
    assert result.images[0].size == (4 * base, 4 * base)
    assert pipe.scheduler is scheduler and dict(pipe.components) == components


@pytest.mark.parametrize("pipeline_id", ["sd", "flux"])
def test_each_level_has_its_processor_and_none_is_left(pipeline_id: str) -> None:
    pipe: Any = PIPELINE[pipeline_id].build()
    base = base_of(pipe)
    options = dict(base=(base, base))
    dense, softmax, local, linear = (
        np.asarray(draw(pipe, pipeline_id, 2 * base, spec=attn, **options).images[0], np.float32)
        for attn in (None, Softmax(), Clear(radius=2), [None, LinFusion()])
    )
    assert np.abs(dense - softmax).max() <= 1
    assert np.abs(dense - local).max() > 1 and np.abs(dense - linear).max() > 1
    with pytest.raises(ValueError, match="not converted"):
        Conversion.of(pipe)


def test_the_first_level_is_the_pipelines_own_picture() -> None:
    pipe: Any = PIPELINE["flux"].build()
    base = base_of(pipe)
    ours = draw(pipe, "flux", base, base=(base, base), num_inference_steps=2).images[0]
    call = PIPELINE["flux"].call(base, base) | dict(output_type="pil")
    assert np.abs(np.asarray(ours, np.int32) - np.asarray(pipe(**call).images[0], np.int32)).max() <= 1


@pytest.mark.parametrize("level", [0.2, 0.45, 0.6, 0.9])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.3])
def test_strength_is_a_noise_level_whatever_the_shift(level: float, shift: float) -> None:
    class Pipe:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)

    call = schedule_for(Pipe, level, 5, shift)
    Pipe.scheduler.set_timesteps(sigmas=call["sigmas"])
    assert len(Pipe.scheduler.timesteps) == 5
    assert noise_level(Pipe.scheduler, Pipe.scheduler.timesteps[0]) == pytest.approx(level, abs=1e-3)


@pytest.mark.parametrize("level", [0.2, 0.45, 0.6])
def test_strength_of_a_diffusion_is_a_signal_to_noise_ratio(level: float) -> None:
    pipe: Any = image_to_image(PIPELINE["sd"].build())
    pipe.scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    call = schedule_for(pipe, level, 7, None)
    pipe.scheduler.set_timesteps(call["num_inference_steps"])
    times, count = pipe.get_timesteps(call["num_inference_steps"], call["strength"], "cpu")
    assert len(times) == count == 7
    assert noise_level(pipe.scheduler, times[0]) == pytest.approx(level, abs=0.03)
    clean, noise = torch.full((1, 4, 8, 8), 2.0), torch.full((1, 4, 8, 8), 2.0)
    mixed = pipe.scheduler.add_noise(clean, noise * 0, times[:1]), pipe.scheduler.add_noise(clean * 0, noise, times[:1])
    share = (mixed[1] / (mixed[0] + mixed[1])).mean().item()
    assert share == pytest.approx(noise_level(pipe.scheduler, times[0]), abs=1e-4)


def test_a_full_skip_residual_keeps_the_picture_until_the_last_step() -> None:
    pipe: Any = image_to_image(PIPELINE["flux"].build())
    clean = torch.randn(1, 4, 16, 16)
    results = []
    for residual in (None, 0.0):
        schedule = schedule_for(pipe, 0.6, 6, 3.0)
        side = 16 * pipe.vae_scale_factor
        call = arguments("flux") | schedule | dict(image=torch.rand(1, 3, side, side), height=side, width=side)
        pipe.set_progress_bar_config(disable=True)
        redraw = Redraw(pipe, clean, torch.randn(1, 4, 16, 16), residual)
        results.append(redraw(lambda: None, **call))
    free, kept = ((result - clean).norm() / clean.norm() for result in results)
    assert kept < 0.7 * free


def test_bfloat16_ids_merge_rows_and_ours_do_not() -> None:
    ids = position_ids((512, 4), 1.0)
    assert len(ids[:, 1].bfloat16().unique()) < 512 and len(ids[:, 1].unique()) == 512
    case = HOST["flux"]
    model: Any = case.build().to(torch.bfloat16)
    seen = []
    model.pos_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = case.inputs(300, 2, 1, 7)
    inputs = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    with torch.no_grad():
        model(**inputs)
        with stretched_positions(model, (300, 2), 1.0, "none"):
            model(**inputs)
        model(**inputs)
    rows = [len(ids[7:, 1].float().unique()) for ids in seen]
    assert rows[0] < 300 and rows[1] == 300 and rows[2] == rows[0]


def test_positions_are_stretched_about_their_centres() -> None:
    one, two = position_ids((4, 4), 1.0), position_ids((8, 8), 2.0)
    assert torch.equal(one[:, 1].unique(), torch.arange(4.0))
    pairs = two.view(4, 2, 4, 2, 3).mean((1, 3)).view(-1, 3)
    torch.testing.assert_close(pairs, one)
    model: Any = HOST["flux"].build()
    theta = model.pos_embed.theta
    with stretched_positions(model, (8, 8), 2.0, "ntk"):
        inner = min(model.pos_embed.axes_dim[1:])
        assert model.pos_embed.theta == pytest.approx(theta * 2 ** (inner / (inner - 2)))
    assert model.pos_embed.theta == theta


class _Hidden(TorchDispatchMode):
    """Notes the tokens of every hidden layer of a feed-forward layer: the input of its GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.gelu.default:
            self.tokens.append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 16, 50, 10**6])
def test_chunked_feed_forward_is_the_same(tokens: int) -> None:
    case = HOST["flux"]
    model = case.build()
    before = run(case, model, 6, 8)
    with _Hidden() as hidden:
        run(case, model, 6, 8)
    assert max(hidden.tokens) > 50  # 48 of the image and the text, in the single-stream blocks
    with chunked_feed_forward(model, tokens), _Hidden() as hidden:
        torch.testing.assert_close(run(case, model, 6, 8), before, atol=1e-5, rtol=1e-4)
    assert max(hidden.tokens) <= tokens
    assert torch.equal(run(case, model, 6, 8), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_sizes_follow_the_shape_and_the_factor() -> None:
    pipe: Any = PIPELINE["sd"].build()
    unit = 2 * pipe.vae_scale_factor
    sizes = Options(base=(4 * unit, 8 * unit)).sizes(pipe, 16 * unit, 32 * unit)
    assert sizes == [(4 * unit, 8 * unit), (8 * unit, 16 * unit), (16 * unit, 32 * unit)]
    sizes = Options(base=(4 * unit, 8 * unit), factor=3).sizes(pipe, 16 * unit, 32 * unit)
    assert sizes[0] == (4 * unit, 8 * unit) and sizes[-1] == (16 * unit, 32 * unit) and len(sizes) == 3
    native = pipe.unet.config.sample_size * pipe.vae_scale_factor
    first = Options().sizes(pipe, 8 * native, 16 * native)[0]
    assert first[0] * first[1] <= native**2 and first[1] == pytest.approx(2 * first[0], abs=unit)


def test_one_strength_is_a_tuple_of_it_and_a_base_may_be_a_list() -> None:
    assert Options(strength=0.3) == Options(strength=(0.3,)) and Options(strength=0.3).strengths(3) == [1.0, 0.3, 0.3]
    assert Options(base=[64, 32]).base == (64, 32)  # type: ignore[arg-type]
    assert Options(skip_residual=None).skip_residual is None and Options(shift=3).shift == 3


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(base=128), TypeError, r"base must be \(height, width\) in pixels, .*, got 128"),
        (dict(base=(128,)), ValueError, "base must be .* two ints of at least 1"),
        (dict(base=(0, 0)), ValueError, "base must be .* two ints of at least 1"),
        (dict(base=(-16, -16)), ValueError, "base must be .* two ints of at least 1"),
        (dict(base=(16.0, 16)), TypeError, "base must be .* two ints of at least 1"),
        (dict(shift=0), ValueError, "shift must be 'sqrt' or a number above 0, got 0"),
        (dict(shift=-1.0), ValueError, "shift must be 'sqrt' or a number above 0"),
        (dict(shift=None), TypeError, "shift must be 'sqrt' or a number above 0"),
        (dict(skip_residual=True), TypeError, "skip_residual must be a number above 0, or None"),
        (dict(skip_residual="3"), TypeError, "skip_residual must be a number above 0, or None"),
        (dict(skip_residual=0), ValueError, "skip_residual must be a number above 0, or None"),
        (dict(level_inference_steps=True), TypeError, "level_inference_steps must be an int, at least 1, got True"),
        (dict(num_inference_steps=2.0), TypeError, r"num_inference_steps must be an int, at least 1, got 2\.0"),
        (dict(level_inference_steps=0), ValueError, "level_inference_steps must be an int, at least 1, got 0"),
        (dict(factor="2"), TypeError, "factor must be a number above 1"),
        (dict(factor=float("nan")), ValueError, "factor must be a number above 1"),
        (dict(strength="0.3"), TypeError, "strength must hold noise levels"),
        (dict(strength=1.0), ValueError, "strength must hold noise levels"),
        (dict(strength=()), ValueError, "strength must hold noise levels"),
    ],
    ids=str,
)
def test_a_bad_option_is_named(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Options(**fields)


def test_sides_are_ints() -> None:
    with pytest.raises(TypeError, match=r"height and width must be ints, got 256\.0 and 256\.0"):
        generate_highres(PIPELINE["sd"].build(), "fox", 256.0, 256.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("pipe", [None, "emoji", [], torch.nn.Linear(2, 2)], ids=lambda pipe: type(pipe).__name__)
def test_what_is_no_pipeline_is_refused(pipe: Any) -> None:
    with pytest.raises(TypeError, match=f"draws with a diffusers pipeline, got a {type(pipe).__name__}"):
        generate_highres(pipe, "fox", 256, 256)


def test_options_of_another_type_are_refused() -> None:
    for options in (3, {"rope": "ntk"}, []):
        with pytest.raises(TypeError, match="options must be Options"):
            generate_highres(PIPELINE["sd"].build(), "fox", 256, 256, options=options)  # type: ignore[arg-type]


BAD = {
    "size": (dict(height=33), "multiples"),
    "factor": (dict(options=dict(factor=1.0)), "factor"),
    "strength": (dict(options=dict(strength=(1.2,))), "strength"),
    "rope": (dict(options=dict(rope="yarn")), "yarn"),
    "shift": (dict(options=dict(shift="linear")), "linear"),
    "steps": (dict(options=dict(num_inference_steps=0)), "steps"),
    "spec": (dict(spec=[None]), "levels|list"),
    "base": (dict(options=dict(base=(10**4, 10**4))), "base"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    given, message = BAD[name]
    pipe: Any = PIPELINE["sd"].build()
    side = 4 * base_of(pipe)
    with pytest.raises(ValueError, match=message):
        options = Options(**({"quiet": True, "base": (base_of(pipe),) * 2} | given.get("options", {})))
        generate_highres(
            pipe, None, given.get("height", side), side, options=options, spec=given.get("spec"), **arguments("sd")
        )


def test_a_converted_pipeline_is_not_converted_again() -> None:
    pipe: Any = PIPELINE["sd"].build()
    from vision_attn import convert

    conversion = convert(pipe, Clear(radius=2))
    base = base_of(pipe)
    with pytest.raises(ValueError, match="converted already"):
        draw(pipe, "sd", 2 * base, base=(base, base), spec=Clear(radius=3))
    draw(pipe, "sd", 2 * base, base=(base, base))
    assert set(conversion.status.values()) == {"rerouted"}


@pytest.mark.parametrize("teacher", ["nano", pytest.param("unet", marks=pytest.mark.slow)])
def test_the_embedded_teachers(teacher: str) -> None:
    from vision_attn.demo import load_teacher

    pipe = load_teacher(teacher)
    options = Options(num_inference_steps=2, level_inference_steps=1, strength=(0.3,), rope="interpolate", quiet=True)
    generator = torch.Generator().manual_seed(0)
    result = generate_highres(pipe, "red apple", 256, 256, options=options, generator=generator)
    assert [level.height for level in result.levels] == [128, 256]
    small, large = (level.images[0] for level in result.levels)
    shrunk = np.asarray(large.resize(small.size), np.float32)
    assert np.corrcoef(np.asarray(small, np.float32).ravel(), shrunk.ravel())[0, 1] > 0.95


def test_arguments_that_the_levels_decide_are_refused():
    pipe = load_teacher("nano")
    with pytest.raises(ValueError, match="output_type, strength: the levels decide that"):
        generate_highres(pipe, "octopus", 256, 256, strength=0.3, output_type="pt")


def test_levels_are_multiples_of_pooled_cells():
    pipe = load_teacher("nano")
    unit = pipe.vae_scale_factor * 2
    for side in range(8, 40, 4):
        sizes = Options().sizes(pipe, 40 * unit, side * unit, cell=4)
        assert all(length % (4 * unit) == 0 for size in sizes for length in size)
    assert any(height % (4 * unit) for height, _ in Options().sizes(pipe, 40 * unit, 36 * unit))
    with pytest.raises(ValueError, match=f"multiples of {4 * unit} pixels .4 tokens, a pooled cell"):
        generate_highres(pipe, "a cat", 40 * unit, 38 * unit, spec=Clear(radius=4, pool=4))


def test_a_pooled_clear_at_every_level():
    pipe = load_teacher("nano")
    unit = pipe.vae_scale_factor * 2
    options = Options(num_inference_steps=1, level_inference_steps=1, base=(8 * unit, 8 * unit), quiet=True)
    result = generate_highres(pipe, "a cat", 20 * unit, 20 * unit, options=options, spec=Clear(radius=4, pool=4))
    assert [level.height // unit for level in result.levels] == [8, 16, 20]


def test_the_scale_of_a_level_counts_the_text():
    grid, native = Grid(16, 16, prefix=5), Clear(radius=4, native_tokens=5 + 64)
    assert Proportional(4, first=64).scale(32, grid, None) == native.scale(32, grid, None) != 32**-0.5
    assert Proportional(4, first=64).scale(32, Grid(8, 8, prefix=5), None) == 32**-0.5


def test_every_clear_of_a_level_is_proportional_and_keeps_its_fields() -> None:
    plain, first = Clear(4, 2, counted=True), 64
    assert proportional(plain, first) == Proportional(4, 2, counted=True, first=first)
    assert proportional(Clear(4, precision="int8"), first) == Proportional(4, precision="int8", first=first)
    for spec in (Clear(4, native_tokens=99), Softmax(), LinFusion()):
        assert proportional(spec, first) is spec
    stages = Schedule(((0.5, plain), (1.0, LinFusion())))
    assert proportional(stages, first) == Schedule(((0.5, proportional(plain, first)), (1.0, LinFusion())))
    assert proportional(MoH(plain, share=0.5), first) == MoH(proportional(plain, first), share=0.5)


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        (Clear(radius=2), Schedule(((1.0, Clear(radius=2)),))),
        (Clear(radius=2), MoH(Clear(radius=2), share=1.0)),
        (Clear(radius=2, pool=2, counted=True), Schedule(((1.0, Clear(radius=2, pool=2, counted=True)),))),
    ],
    ids=["schedule", "mixture", "counted"],
)
def test_a_clear_inside_of_another_spec_draws_as_by_itself(spec: Clear, same: AttnSpec) -> None:
    pipe: Any = PIPELINE["flux"].build()
    base = base_of(pipe)
    given = Clear(**{field.name: getattr(spec, field.name) for field in fields(spec)} | dict(native_tokens=7 + 16))
    drawn = [
        np.asarray(draw(pipe, "flux", 2 * base, spec=each, base=(base, base)).images[0], np.float32)
        for each in (spec, same, given, Clear(radius=2))
    ]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1 and np.abs(drawn[0] - drawn[2]).max() <= 1
    assert spec == Clear(radius=2) or np.abs(drawn[0] - drawn[3]).max() > 1


def test_levels_divide_by_the_cells_of_inner_specs() -> None:
    pooled = Clear(radius=4, pool=4)
    for spec in (MoH(pooled), Schedule(((0.5, MoH(pooled)), (1.0, LinFusion()))), [None, MoH(pooled)]):
        assert cell_of(spec) == 4
    assert cell_of(None) == cell_of(LinFusion()) == 1 and cell_of([Clear(pool=2), Clear(pool=3)]) == 6


@pytest.mark.parametrize("spec", [3, "clear", Clear, {"*": Clear(2)}, [Clear(2), "clear"]], ids=str)
def test_what_is_no_spec_is_refused(spec: Any) -> None:
    with pytest.raises(TypeError, match="spec must be a spec, or a list of 1 specs or None, one for each level"):
        generate_highres(PIPELINE["sd"].build(), "fox", 64, 64, options=Options(base=(64, 64)), spec=spec)


def test_a_pipeline_keeps_its_dtype() -> None:
    pipe = load_teacher("nano").to(torch.bfloat16)
    unit = pipe.vae_scale_factor * 2
    options = Options(num_inference_steps=1, level_inference_steps=1, base=(8 * unit, 8 * unit), quiet=True)
    generate_highres(pipe, "a cat", 16 * unit, 16 * unit, options=options)
    assert pipe.transformer.dtype == torch.bfloat16
