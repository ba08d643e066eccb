"""Graphs stand in the way of nothing, say why a call is eager, and on a GPU replay what an eager call computes."""

import copy
import inspect
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_hosts import HOST
from tiny_pipelines import PIPELINE, add_lora, build_flux, build_sd, build_sd_controlnet

import vision_attn.pipelines  # noqa: F401, pipelines get their set_attn_processor
from vision_attn import Clear, LinFusion, Multipole, Schedule, Softmax, convert, graphs

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def eager(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("name", ["sd15-unet", "flux", "sd3"])
def test_a_model_that_cannot_be_recorded_runs_as_ever(name):
    model, inputs = HOST[name].build(), HOST[name].inputs(4, 4, 1, 5)
    want = eager(model, inputs)
    signature = inspect.signature(model.forward)
    found = graphs.enable(model)
    for _ in range(3):
        assert torch.equal(eager(model, inputs), want)
    assert inspect.signature(model.forward) == signature
    assert found.status == {"": "eager: the model is on cpu, not on a CUDA device"} and found.memory == 0
    graphs.disable(model)
    assert "forward" not in vars(model)
    assert torch.equal(eager(model, inputs), want)
    graphs.disable(model)  # once more does nothing


def test_gradients_run_eagerly_and_say_so():
    model = HOST["sd15-unet"].build()
    found = graphs.enable(model)
    model(**HOST["sd15-unet"].inputs(4, 4, 1, 5))[0].sum().backward()
    assert next(model.parameters()).grad is not None
    assert "gradients are on" in found.status[""]


def test_enabling_twice_is_the_same_as_once():
    model = HOST["sd15-unet"].build()
    first, again = graphs.enable(model), graphs.enable(model, most=2)
    assert first.forwards[""] is again.forwards[""] and again.forwards[""].most == 2
    again.disable()
    assert "forward" not in vars(model)


def test_copies_and_pickles_are_without_graphs():
    model, inputs = HOST["sd15-unet"].build(), HOST["sd15-unet"].inputs(4, 4, 1, 5)
    want = eager(model, inputs)
    graphs.enable(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.forward.__self__ is other
        with torch.no_grad():
            other.conv_out.weight.zero_()
        assert not torch.equal(eager(other, inputs), want)
    assert torch.equal(eager(model, inputs), want)


def test_hooks_of_accelerate_go_on_and_off_around_it():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, inputs = HOST["sd15-unet"].build(), HOST["sd15-unet"].inputs(4, 4, 1, 5)
    want = eager(model, inputs)
    found = graphs.enable(model)
    add_hook_to_module(model, ModelHook())
    assert torch.equal(eager(model, inputs), want)
    assert "hook of accelerate" in found.status[""]
    graphs.disable(model)
    remove_hook_from_module(model)
    assert torch.equal(eager(model, inputs), want)
    assert not isinstance(model.forward, type(found.forwards[""]))


def test_a_pipeline_has_its_denoiser_and_controlnet_recorded():
    assert list(graphs.enable(build_flux()).status) == ["transformer"]
    assert list(graphs.enable(build_sd_controlnet()).status) == ["unet", "controlnet"]


def test_a_processor_is_set_with_graphs():
    pipe = build_sd()
    pipe.set_attn_processor("clear", radius=1, graphs=True)
    assert "forward" in vars(pipe.unet)
    pipe.set_attn_processor(None, graphs=False)
    assert "forward" not in vars(pipe.unet)
    with pytest.raises(TypeError, match="graphs must be True or False, got 1"):
        pipe.set_attn_processor("clear", radius=1, graphs=1)


def test_a_conversion_has_graphs_in_a_block():
    model, inputs = HOST["sd15-unet"].build(), HOST["sd15-unet"].inputs(4, 4, 1, 5)
    conversion = convert(model, Clear(radius=1))
    want = eager(model, inputs)
    with conversion.graphs() as found:
        assert torch.equal(eager(model, inputs), want) and "not on a CUDA device" in found.status[""]
        assert set(conversion.status.values()) == {"rerouted"}
    assert "forward" not in vars(model)


def test_a_block_leaves_what_was_enabled_before():
    model = HOST["sd15-unet"].build()
    conversion, outer = convert(model, Clear(radius=1)), graphs.enable(model)
    with conversion.graphs():
        pass
    assert vars(model)["forward"] is outer.forwards[""] and outer.forwards[""].enabled


def test_threads_run_an_eager_model_at_the_same_time():
    """Each of two calls waits inside the forward until the other has come there too."""
    model, inputs = HOST["sd15-unet"].build(), HOST["sd15-unet"].inputs(4, 4, 1, 5)
    together = threading.Barrier(2, timeout=20)
    model.conv_in.register_forward_pre_hook(lambda *args: (together.wait(), None)[1])
    graphs.enable(model)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: eager(model, inputs), range(2))
    assert torch.equal(one, other)


@pytest.mark.slow
def test_it_compiles_through():
    model, inputs = HOST["sd15-unet"].build(), HOST["sd15-unet"].inputs(4, 4, 1, 5)
    want = eager(model, inputs)
    graphs.enable(model)
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs)[0]
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: graphs.enable(3), TypeError, "give a diffusers pipeline or model"),
        (lambda: graphs.enable(HOST["sd15-unet"].build(), most=0), ValueError, "most must be at least 1, got 0"),
    ],
    ids=["no-model", "most-0"],
)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


SPECS = {
    "stock": None,
    "softmax": Softmax(),
    "clear": Clear(radius=1),
    "multipole": Multipole(cell=4, pool=2, near=0, exact=1),
    "linfusion": LinFusion(),
    "schedule": Schedule(((0.5, Clear(radius=1)), (1.0, Clear(radius=2)))),
}


DEVICE = "cuda"
AS_THEY_ARE = ("timestep", "img_ids", "txt_ids", "guidance", "time_ids")


def on_gpu(name, spec, dtype=torch.bfloat16):
    model = HOST[name].build().to(DEVICE, dtype)
    if spec is not None:
        convert(model, spec)
    return model


def on_cuda(inputs):
    return {name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def inputs_of(name, *sizes, seed=0):
    torch.manual_seed(seed)
    return drawn(HOST[name].inputs(*sizes), "")


def drawn(value, name):
    """Other values of the same shapes, on the GPU; times, places and sizes as they are."""
    if isinstance(value, dict):
        return {key: drawn(item, key) for key, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(DEVICE)
    if name in AS_THEY_ARE or not value.is_floating_point():
        return value
    return torch.randn_like(value).to(torch.bfloat16)


@GPU
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["sd15-unet", "sdxl-unet", "flux", "sd3", "pixart"])
def test_replays_are_bit_equal_to_eager_calls_needs_a_gpu(name, spec):
    """Two sizes and two batches in turn, different inputs each time; earlier outputs stay as they are."""
    model = on_gpu(name, SPECS[spec])
    calls = [inputs_of(name, *size, 5, seed=n) for n, size in enumerate([(8, 8, 1), (12, 12, 1), (8, 8, 2)] * 4)]
    want = [eager(model, inputs).clone() for inputs in calls]
    found = graphs.enable(model)
    got = [eager(model, inputs) for inputs in calls]
    assert "3 recorded" in found.status[""], found.status
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert found.memory > 0


@GPU
def test_the_moment_and_the_grid_choose_the_recording_needs_a_gpu():
    model = on_gpu("flux", SPECS["schedule"])
    calls = []
    for grid in ((4, 6), (6, 4)):
        for step in (0.9, 0.1):
            calls.append({**inputs_of("flux", *grid, 1, 5), "timestep": torch.tensor([step], device="cuda")})
    want = [eager(model, inputs) for inputs in calls]
    assert not torch.equal(want[0], want[1]) and not torch.equal(want[0], want[2])
    graphs.enable(model)
    for _ in range(4):
        for inputs, expected in zip(calls, want, strict=True):
            assert torch.equal(eager(model, inputs), expected)


@GPU
def test_adapters_switched_between_replays_are_seen_needs_a_gpu():
    model = add_lora(HOST["sd15-unet"].build()).to("cuda", torch.bfloat16)
    convert(model, Clear(radius=1))
    inputs, found = inputs_of("sd15-unet", 4, 4, 1, 5), graphs.enable(model)

    def in_place():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-1.5)

    outputs = []
    for change in (
        lambda: None,
        lambda: model.set_adapters(["default"], weights=[0.3]),
        in_place,
        model.disable_adapters,
        model.enable_adapters,
        model.fuse_lora,
        model.unfuse_lora,
    ):
        change()
        for _ in range(4):
            got = eager(model, inputs)
        found.forwards[""].enabled = False
        want = eager(model, inputs)
        found.forwards[""].enabled = True
        assert torch.equal(got, want)
        outputs.append(want)
    assert len({float(o.double().sum()) for o in outputs}) >= 4
    assert "1 recorded" in found.status[""]


@GPU
def test_numbers_as_timesteps_are_no_kinds_of_their_own_needs_a_gpu():
    model = on_gpu("sd15-unet", Clear(radius=1))
    found = graphs.enable(model)
    inputs = inputs_of("sd15-unet", 4, 4, 1, 5)
    for step in (999, 700, 400, 1):
        got = eager(model, {**inputs, "timestep": step})
        assert torch.equal(got, eager(model, {**inputs, "timestep": torch.tensor(step)}))
    assert "1 recorded" in found.status[""]


@GPU
def test_what_cannot_be_recorded_runs_eagerly_and_leaves_all_usable_needs_a_gpu():
    model = on_gpu("sd15-unet", None)
    inputs = inputs_of("sd15-unet", 4, 4, 1, 5)
    want = eager(model, inputs)
    own = model.conv_out.forward

    class Reads(torch.nn.Module):
        def forward(self, x):
            float(x.sum())  # a value that is read on the host
            return own(x)

    model.conv_out = Reads()
    found = graphs.enable(model)
    for _ in range(4):
        assert torch.equal(eager(model, inputs), want)
    assert "cannot be recorded" in found.status[""]
    with pytest.raises(Exception):  # noqa: B017, whatever the model says to a wrong input
        eager(model, {**inputs, "sample": inputs["sample"][:, :2]})
    assert torch.equal(eager(model, inputs), want)
    assert torch.randn(3, device="cuda").isfinite().all()  # the generator is not left in the capture that failed
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


class Noisy(torch.nn.Module):
    """Draws random numbers, after a while if `slow`."""

    def __init__(self, inner, slow):
        super().__init__()
        self.inner, self.slow = inner, slow

    def forward(self, x):
        if self.slow and torch.cuda.is_current_stream_capturing():
            time.sleep(0.5)
        o = self.inner(x)
        return o if self.slow else o + 1e-3 * torch.randn_like(o)


@GPU
def test_a_model_that_draws_random_numbers_runs_eagerly_needs_a_gpu():
    model = on_gpu("sd15-unet", None)
    inputs = inputs_of("sd15-unet", 4, 4, 1, 5)
    model.conv_out = Noisy(model.conv_out, False)
    torch.manual_seed(5)
    want = [eager(model, inputs) for _ in range(4)]
    assert not torch.equal(want[2], want[3])
    found = graphs.enable(model)
    torch.manual_seed(5)
    got = [eager(model, inputs) for _ in range(4)]
    assert "draws random numbers" in found.status[""]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@GPU
def test_other_threads_draw_random_numbers_while_one_records_needs_a_gpu():
    model = on_gpu("sd15-unet", None)
    inputs = inputs_of("sd15-unet", 4, 4, 1, 5)
    model.conv_out = Noisy(model.conv_out, True)
    found = graphs.enable(model)
    with ThreadPoolExecutor(1) as threads:
        work = threads.submit(lambda: [eager(model, inputs) for _ in range(3)])
        torch.manual_seed(5)
        drawn = []
        while not work.done():
            drawn.append(torch.randn(2, device="cuda"))
            time.sleep(0.001)
        work.result()
    assert "1 recorded" in found.status[""]
    torch.manual_seed(5)
    want = [tuple(torch.randn(2, device="cuda").tolist()) for _ in drawn]
    # while a recording begins, numbers may be drawn that are drawn again after it
    distinct = list(dict.fromkeys(tuple(each.tolist()) for each in drawn))
    assert distinct == want[: len(distinct)] and len(distinct) > len(drawn) / 2


@GPU
@pytest.mark.parametrize("streams", ["one-stream", "own-streams"])
def test_threads_and_two_models_do_not_disturb_each_other_needs_a_gpu(streams):
    models = [on_gpu("sd15-unet", Clear(radius=1)), on_gpu("flux", SPECS["multipole"])]
    calls = [[inputs_of(name, 8, 8, 1, 5, seed=n) for n in range(6)] for name in ("sd15-unet", "flux")]
    want = [[eager(m, i) for i in inputs] for m, inputs in zip(models, calls, strict=True)]
    for model in models:
        graphs.enable(model)
    torch.cuda.synchronize()

    def work(row):
        model, inputs, expected = row
        with torch.cuda.stream(torch.cuda.Stream() if streams == "own-streams" else None):
            for _ in range(3):
                got = [eager(model, one) for one in inputs]  # nothing waits for the GPU in between
                for one, right in zip(got, expected, strict=True):
                    assert torch.equal(one, right)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, [*zip(models, calls, want, strict=True)] * 2))


@GPU
@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "sd-controlnet"])
def test_a_pipeline_draws_the_same_needs_a_gpu(name):
    pipe, call = PIPELINE[name].build().to("cuda"), PIPELINE[name].call
    want = pipe(**on_cuda(call(64, 64))).images
    graphs.enable(pipe)
    for _ in range(3):
        assert (pipe(**on_cuda(call(64, 64))).images == want).all()
