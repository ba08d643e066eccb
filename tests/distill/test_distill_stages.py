"""Stages, mixtures of processors, whole models, guided predictions and the curve of the KD error."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from distill_case import settings, write_images

import vision_attn
from vision_attn.demo import load_teacher
from vision_attn.distill.cache import write_cache
from vision_attn.distill.config import LossConfig
from vision_attn.distill.data import CachedData
from vision_attn.distill.denoiser import load_pipeline
from vision_attn.distill.loop import train
from vision_attn.distill.losses import Outputs, Step, distillation_losses
from vision_attn.distill.output import is_finished
from vision_attn.distill.student import make_student

STAGES = [
    {"student": {"trainable": "new"}, "loss": {"prediction": 0.0, "relative": True}, "run": {"steps": 2}},
    {"student": {"trainable": "model"}, "loss": {"guided": 0.5}, "run": {"steps": 3}},
]


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    root = tmp_path_factory.mktemp("stages")
    write_images(root / "images")
    write_cache(settings(root))
    return root


@pytest.fixture
def root(cached, tmp_path):
    shutil.copytree(cached / "cache", tmp_path / "cache")
    return tmp_path


def tensors(folder):
    return safetensors.torch.load_file(folder / "adapter" / "vision_attn.safetensors")


def points(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def test_stages_go_on_from_each_other(root):
    config = settings(root, stages=STAGES, transfer__steps=1, run__measure_every=2, run__save_every=0)
    first, last = config.each_stage()
    assert (first.transfer.steps, last.transfer.steps) == (1, 0) and last.run.out == config.run.out
    assert not is_finished(config)
    folder = train(config)
    assert folder == root / "out" / "adapter" and is_finished(config)
    features, everything = tensors(root / "out" / "stage-1"), tensors(root / "out")
    assert all(".vision_attn." in name for name in features) and len(everything) > 3 * len(features)
    lines = {part: points(root / "out" / part) for part in ("stage-1", ".")}
    assert [line["step"] for line in lines["stage-1"]] == [0, 2] and [line["step"] for line in lines["."]] == [0, 2, 3]
    assert lines["."][0]["kd_error"] == pytest.approx(lines["stage-1"][-1]["kd_error"], rel=1e-4)  # where it ended
    pipe = load_teacher("nano")
    assert isinstance(vision_attn.load(pipe, folder).spec, vision_attn.LinFusion)


@pytest.mark.slow
def test_a_given_pipeline_teaches_every_stage_as_it_was(root):
    train(settings(root, stages=STAGES, run__out=root / "given" / "out"), pipe=load_teacher("nano"))
    train(settings(root, stages=STAGES))
    given, loaded = tensors(root / "given" / "out"), tensors(root / "out")
    assert given.keys() == loaded.keys() and all(torch.equal(given[name], loaded[name]) for name in given)


@pytest.mark.parametrize(("stages", "match"), [
    ([{"losses": {}}], "stages: 1 must be one of 'student'"),
    ([{}, {"loss": {"tusk": 0}}], "stages: 2: loss must be one of"),
    ([{"student": {"trainable": "everything"}}], "stages: 1: student.trainable must be one of"),
    ([{"run": {"steps": 0}}], "stages: 1: run.steps must be at least 1"),
    ([{"run": {"steps": 2.5}}], "stages: 1: run.steps must be int, got 2.5"),
    ([{"loss": {"relative": "perhaps"}}], "stages: 1: loss.relative must be bool, got 'perhaps'"),
    ([{"student": {"projections": "q"}}], r"stages: 1: student.projections must be list\[str\], got 'q'"),
    ([{"run": {"out": "other"}}], "stages: 1: run.out cannot be set here: each stage has a folder in run.out"),
    ([{}, {"student": {"min_tokens": 64}}], "stages: 2: student.min_tokens cannot be set here: the first stage"),
], ids=["section", "key", "choice", "number", "int", "bool", "list", "folder", "layers"])  # fmt: skip
def test_a_stage_that_does_not_fit_is_refused(root, stages, match):
    with pytest.raises((TypeError, ValueError), match=match):
        settings(root, stages=stages)


def test_the_values_of_a_stage_have_the_types_of_the_settings(root):
    changes = {"data": {"cache": "other", "sizes": [[32, 32]], "native": [32, 32]}, "optimizer": {"betas": [0.9, 1e-4]}}
    (stage,) = settings(root, stages=[changes]).each_stage()
    assert stage.data.cache == Path("other") and stage.data.sizes == [(32, 32)] and stage.data.native == (32, 32)
    assert stage.optimizer.betas == (0.9, 1e-4)


def test_no_stage_starts_from_layers_that_cannot_be_merged(root):
    lora = dict(student__trainable="lora", model__quantisation="int8")
    with pytest.raises(ValueError, match="stages: 2: nothing can start from the LoRA layers of the stage before"):
        settings(root, stages=[{}, {}], **lora)
    assert settings(root, stages=[{"student": {"trainable": "new"}}, {}], **lora).each_stage()


def test_a_stage_that_the_clock_ended_is_not_gone_on_with(root):
    stages = [{"student": {"trainable": "new"}, "run": {"steps": 99, "minutes": 1e-6}}, {"run": {"steps": 1}}]
    config = settings(root, stages=stages, run__save_every=0)
    for _ in range(2):
        train(config)
        assert len((root / "out" / "stage-1" / "metrics.jsonl").read_text().splitlines()) == 1


def test_some_layers_have_other_processors(root):
    layers = {"transformer_blocks.*": {"class": "Softmax"}, "single_*.1.attn": {"class": "Multipole"}}
    config = settings(root, student__layers=layers, run__steps=1)
    train(config)
    specs = vision_attn.load(load_teacher("nano"), root / "out" / "adapter").specs
    kinds = {name: type(spec).__name__ for name, spec in specs.items()}
    assert kinds["transformer_blocks.0.attn"] == "Softmax" and kinds["single_transformer_blocks.1.attn"] == "Multipole"
    assert list(kinds.values()).count("LinFusion") == len(kinds) - 2
    with pytest.raises(ValueError, match=r"student\.layers: \*: "):
        settings(root, student__layers={"*": {"class": "Clear", "radius": -1}})


@pytest.mark.parametrize("trainable", ["new", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_teacher_has_none_of_the_weights_of_an_adapter(root, trainable):
    trained = train(settings(root, run__steps=3, optimizer__learning_rate=1e-2))
    config = settings(root, student__trainable=trainable, student__adapter=trained)
    pipe, dense = load_teacher("nano"), load_teacher("nano").transformer
    student = make_student(config, pipe)
    data = CachedData(config.data, config.model.base, "FluxTransformer2DModel")
    noisy = Step(config, student, data.interface).noisy(data[data.buckets[32, 32][:2]], 0)
    with student.teaching(student.model) as teacher:
        taught = teacher(**noisy.call)[0]
    with torch.no_grad():
        torch.testing.assert_close(taught, dense(**noisy.call)[0], rtol=0, atol=1e-5)


def test_half_of_a_guided_batch_has_no_prompts(root):
    config = settings(root, loss__guided=1.0, loss__guidance=2.0, data__batch_size=4)
    student = make_student(config, load_pipeline(config.model, prompts=False))
    data = CachedData(config.data, config.model.base, "FluxTransformer2DModel")
    batch = data[data.buckets[32, 32][:4]]
    noisy = Step(config, student, data.interface).noisy(batch, 0)
    assert torch.equal(*noisy.latents.chunk(2)) and torch.equal(*noisy.call["timestep"].chunk(2))
    prompted, unprompted = noisy.call["pooled_projections"].chunk(2)
    assert torch.equal(prompted, batch.tensors["pooled_projections"][:2])
    assert torch.equal(unprompted, batch.null["pooled_projections"].expand(2, -1))
    with pytest.raises(ValueError, match=r"data\.batch_size must be even, got 3"):
        settings(root, loss__guided=1.0, data__batch_size=3)


def test_guided_and_relative_losses_are_what_they_say():
    ours, theirs = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3)
    student, teacher = (Outputs(p, None, {"a": 3 * p, "b": q}) for p, q in zip(ours, theirs, strict=True))
    weights = LossConfig(task=0, prediction=0, attention=2.0, guided=0.5, guidance=3.0, relative=True)
    losses = distillation_losses(student, teacher, torch.zeros(()), weights)
    errors = ours[0] - ours[1]
    guided = (3 * errors[:2] - 2 * errors[2:]).square().mean()
    a = errors.square().mean() / ours[1].square().mean()
    b = (theirs[0] - theirs[1]).square().mean() / theirs[1].square().mean()
    assert losses["guided"].item() == pytest.approx(guided.item(), rel=1e-5)
    assert losses["attention"].item() == pytest.approx(((a + b) / 2).item(), rel=1e-5)
    assert losses["total"].item() == pytest.approx((0.5 * guided + a + b).item(), rel=1e-5)
    absolute = distillation_losses(student, teacher, torch.zeros(()), replace(weights, relative=False))
    assert absolute["attention"].item() != pytest.approx(losses["attention"].item(), rel=1e-2)


@pytest.mark.parametrize(("prediction", "forwards"), [(0.0, 1), (0.5, 2)])
def test_the_teacher_runs_if_a_loss_asks_for_it(root, prediction, forwards):
    """FLUX learns no variances, so that their loss, which has a weight by default, asks for nothing."""
    config = settings(root, loss__task=1.0, loss__attention=0.0, loss__prediction=prediction, student__trainable="new")
    student = make_student(config, load_pipeline(config.model, prompts=False))
    data = CachedData(config.data, config.model.base, "FluxTransformer2DModel")
    step, ran = Step(config, student, data.interface), []
    student.model.register_forward_pre_hook(lambda model, args: ran.append(model))
    step.losses(student.model, step.noisy(data[data.buckets[32, 32][:2]], 0))
    assert len(ran) == forwards
