"""The training loop on the nano teacher: it learns, saves, goes on exactly, and says what is wrong."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from distill_case import metrics, with_run, write_images
from distill_case import settings as settings_of
from PIL import Image

import vision_attn
from vision_attn.demo import load_teacher
from vision_attn.distill import loop, output
from vision_attn.distill.cache import write_cache
from vision_attn.distill.loop import train
from vision_attn.distill.losses import NonFiniteError
from vision_attn.distill.student import Student


def settings(root, **changes):
    """Return settings with the sizes of the cache that all tests share."""
    return settings_of(root, **{"data__sizes": [[32, 32], [32, 48]], **changes})


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Images and a cache of two sizes, for all tests."""
    root = tmp_path_factory.mktemp("distill")
    write_images(root / "images", sizes=((32, 32), (32, 48)), count=8)
    write_cache(settings(root))
    return root


@pytest.fixture
def root(cached, tmp_path):
    shutil.copytree(cached / "cache", tmp_path / "cache")
    return tmp_path


def numbers(root):
    return {line["step"]: line["total"] for line in metrics(root)}


def adapter(root):
    return safetensors.torch.load_file(root / "out" / "adapter" / "vision_attn.safetensors")


def test_the_loss_falls_and_the_adapter_loads(root):
    same = dict(run__steps=10, run__save_every=0)
    folder = train(settings(root, **same, optimizer__ema=0.9, optimizer__learning_rate=3e-3))
    train(settings(root, **same, run__out=root / "frozen" / "out", optimizer__learning_rate=0))  # learns nothing
    learned, frozen = (np.mean([line["prediction"] for line in metrics(p)[-4:]]) for p in (root, root / "frozen"))
    assert learned < 0.7 * frozen
    assert {"step", "prediction", "attention", "total", "norm", "learning_rate"} == set(metrics(root)[0])
    pipe = load_teacher("nano")
    conversion = vision_attn.load(pipe, folder)
    assert isinstance(conversion.spec, vision_attn.LinFusion)
    assert [path.name for path in (root / "out").glob("checkpoint-*")] == ["checkpoint-00000010"]
    sheet = Image.open(root / "out" / "sheets" / "step-00000010.png")
    assert sheet.size[1] in (64, 64) and sheet.size[0] % 16 == 0


@pytest.mark.parametrize("extra", [
    dict(optimizer__ema=0.9, optimizer__schedule="cosine", optimizer__warmup=2),
    dict(run__accumulate=2, transfer__steps=1, run__checkpointing="true", data__workers=1),
    dict(student__processor="AgentSD", student__fields={"cell": 2, "ratio": 0.5}),
], ids=["ema", "accumulate", "random"])  # fmt: skip
def test_a_run_that_was_stopped_goes_on_exactly(root, extra, monkeypatch):
    config = settings(root, run__steps=4, run__save_every=2, **extra)
    train(config)
    whole, tensors = metrics(root), adapter(root)
    shutil.rmtree(root / "out")

    real, calls = loop.Metrics.log, []

    def stop(self, step, rate):
        calls.append(step)
        real(self, step, rate)
        if step == 3 and len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Metrics, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert [line["step"] for line in metrics(root)] == [1, 2, 3]
    train(config)
    assert calls == [1, 2, 3, 3, 4]
    assert metrics(root) == whole
    again = adapter(root)
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_checkpoints_are_rotated_and_a_half_written_one_is_passed_over(root):
    config = settings(root, run__steps=3, run__save_every=1, run__keep=2)
    train(config)
    names = sorted(path.name for path in (root / "out").glob("checkpoint-*"))
    assert names == ["checkpoint-00000002", "checkpoint-00000003"]
    before = numbers(root)
    shutil.rmtree(root / "out" / "checkpoint-00000003")
    (root / "out" / "checkpoint-00000003.part").mkdir()
    with (root / "out" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tot')
    train(config)
    assert numbers(root) == before


@pytest.mark.parametrize("where", ["parameters", pytest.param("optimizer", marks=pytest.mark.slow)])
def test_a_full_disk_leaves_the_last_checkpoint(root, where, monkeypatch):
    config = settings(root, run__steps=4, run__save_every=2)
    real = output.save_file, torch.save

    def full(*args, **kwargs):
        if len(list((root / "out").glob("checkpoint-*[0-9]"))) == 1:
            raise OSError(28, "No space left on device") if where == "parameters" else RuntimeError("write failed")
        return real[where == "optimizer"](*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(*((output, "save_file", full) if where == "parameters" else (torch, "save", full)))
        with pytest.raises(OSError, match=r"step 4 could not be written.*complete one: checkpoint-00000002"):
            train(config)
    assert [path.name for path in (root / "out").glob("checkpoint-*")] == ["checkpoint-00000002"]
    assert train(config).exists()
    assert [line["step"] for line in metrics(root)] == [1, 2, 3, 4]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_with_step_and_layer(root, broken):
    pipe = load_teacher("nano")
    layer = pipe.transformer.single_transformer_blocks[1]
    calls = []

    def poison(module, args, output):
        calls.append(output)
        if len(calls) < 4:  # the second step
            return None
        if broken == "loss":
            return output * float("nan")
        output.register_hook(lambda gradient: gradient * float("nan"))
        return None

    layer.norm.linear.requires_grad_(False)
    pipe.transformer.single_transformer_blocks[1].proj_out.register_forward_hook(
        lambda module, args, output: poison(module, args, output) if output.requires_grad else None
    ) if broken == "gradient" else layer.proj_mlp.register_forward_hook(poison)
    named = "single_transformer_blocks.1.proj_mlp" if broken == "loss" else "gradients are those of .*to_q"
    with pytest.raises(NonFiniteError, match=rf"step [2-4]: the {broken} is not finite.*{named}"):
        train(settings(root, run__steps=6), pipe=pipe)


def test_other_settings_in_the_same_folder_are_refused(root):
    config = settings(root, run__steps=1)
    train(config)
    with pytest.raises(ValueError, match=r"other settings: optimizer.learning_rate was 0.001, is 0.1"):
        train(settings(root, run__steps=1, optimizer__learning_rate=0.1))
    train(with_run(config, steps=2, keep=1))  # but it may go on for longer
    assert [line["step"] for line in metrics(root)] == [1, 2]


def test_an_adapter_with_lora_is_the_student(root):
    pipe = load_teacher("nano")
    config = settings(root, student__trainable="lora", student__rank=2, run__steps=2, optimizer__learning_rate=1e-2)
    train(config, pipe=pipe)
    assert not any("lora" in name or "base_layer" in name for name in adapter(root))
    assert any(name.endswith("to_q.weight") for name in adapter(root))
    other = load_teacher("nano")
    vision_attn.load(other, root / "out" / "adapter")
    call = dict(height=32, width=32, num_inference_steps=2, output_type="np")
    pictures = [p("octopus", generator=torch.Generator().manual_seed(0), **call).images for p in (pipe, other)]
    np.testing.assert_allclose(*pictures, atol=1e-4)  # weights that are read again lie at other addresses
    plain = load_teacher("nano")("octopus", generator=torch.Generator().manual_seed(0), **call).images
    assert np.abs(plain - pictures[0]).max() > 0.01


def test_random_start_is_worse_and_half_precision_halves(root):
    first = {}
    for init in ("inherited", "random"):
        config = settings(root, run__steps=1, student__init=init, run__out=root / init, run__save_dtype="float16")
        first[init] = json.loads((train(config).parent / "metrics.jsonl").read_text())["prediction"]
    assert first["random"] > first["inherited"]
    tensors = safetensors.torch.load_file(root / "random" / "adapter" / "vision_attn.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


CLEAR = dict(student__processor="Clear", student__fields={"radius": 4})
ELU = dict(student__fields={"mid_dim": -1, "feature_map": "elu"}, student__trainable="lora")


@pytest.mark.parametrize(
    ("changes", "file"),
    [
        (CLEAR | dict(run__export="clear"), "clear_local_4.safetensors"),
        (ELU | dict(run__export="linfusion", model__base="emoji:unet"), "diffusion_pytorch_model.safetensors"),
    ],
    ids=["clear", "linfusion-lora"],
)
def test_what_can_be_exported_is(root, changes, file):
    config = settings(root, **changes, run__steps=1, data__cache=root / "own")
    write_images(root / "images", count=2)
    write_cache(config)
    train(config)
    assert (root / "out" / "export" / file).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(student__processor="Clear", student__fields={"radius": 4}, student__trainable="new"), "no parameters of"),
        (dict(student__processor="Clear", student__fields={"radius": 4}, transfer__steps=1), "no parameters of"),
        (dict(optimizer__name="prodigy"), "pip install prodigyopt"),
        (dict(run__trackers=["wandb"]), "wandb"),
        (dict(loss__layers="blocks.*"), "none of the converted layers"),
        (dict(data__sizes=[[64, 64]]), "run 'vision-attn distill cache' with these sizes, or give data.sizes"),
        (dict(run__export="clear"), "run.export: CLEAR's format is for a FluxTransformer2DModel with one Clear"),
        (dict(run__export="linfusion"), "run.export: LinFusion's format has no place for LinFusion.*hedgehog"),
        (CLEAR | dict(run__export="clear", student__fields={"radius": 2.5}), "whole radii, and this is 2.5"),
        (CLEAR | dict(run__export="clear", model__base="emoji:unet"), "this is a UNet2DConditionModel with Clear"),
        (dict(model__base="emoji:base"), "made for the base 'emoji:nano', not for 'emoji:base'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(root, changes, message):
    with pytest.raises(ValueError, match=message):
        train(settings(root, **changes))
    assert not (root / "out" / "metrics.jsonl").exists()  # before the first step


def test_bf16_keeps_what_is_trained_in_fp32(root):
    config = settings(root, model__dtype="bfloat16", run__precision="bf16", run__steps=2)
    train(config)
    state = safetensors.torch.load_file(root / "out" / "checkpoint-00000002" / "trained.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(np.isfinite(line["total"]) for line in metrics(root))


@pytest.mark.parametrize("trainable", ["new", pytest.param("attention", marks=pytest.mark.slow)])
def test_a_student_starts_from_an_adapter(root, trainable):
    first = settings(root, student__trainable=trainable, run__steps=1)
    folder = train(first)
    trained = safetensors.torch.load_file(folder / "vision_attn.safetensors")
    again = settings(
        root, student__trainable=trainable, student__adapter=folder, run__out=root / "more" / "out", run__steps=1,
        optimizer__learning_rate=0,
    )  # fmt: skip
    same = safetensors.torch.load_file(train(again) / "vision_attn.safetensors")
    assert set(same) == set(trained) and all(torch.equal(same[name], tensor) for name, tensor in trained.items())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(settings(root, student__adapter=root / "nowhere", run__out=root / "none" / "out"))


@pytest.mark.parametrize(
    ("kind", "message"), [("FSDP", "set fsdp_version: 2"), ("DEEPSPEED", "stage 3 shards the weights")]
)
def test_sharding_that_is_not_known_is_refused(kind, message, root, monkeypatch):
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={})
    fake = SimpleNamespace(distributed_type=kind, is_fsdp2=False, state=SimpleNamespace(deepspeed_plugin=plugin))
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: fake)
    with pytest.raises(ValueError, match=message):
        train(settings(root))


def test_one_layer_in_several_is_compared():
    pipe = load_teacher("nano")
    names = list(vision_attn.convert(pipe, vision_attn.Clear(radius=4)).specs)
    student = Student(pipe, pipe.transformer, vision_attn.Conversion.of(pipe), {}, None, torch.float32)
    assert student.compared("single_*", 2) == [name for name in names[::2] if name.startswith("single_")]
    with pytest.raises(ValueError, match="none of one in 99 of the converted layers"):
        student.compared("single_*", 99)


def test_a_mixture_of_heads_learns_with_the_loss_of_its_load(root):
    fields = {"spec": {"class": "Clear", "radius": 3}, "share": 0.5, "shared": 0}
    mixed = dict(student__processor="MoH", student__fields=fields, run__checkpointing="true", run__steps=1)
    folder = train(settings(root, **mixed))
    assert all(line["balance"] > 0 for line in metrics(root))
    pipe = load_teacher("nano")
    assert vision_attn.load(pipe, folder).spec == vision_attn.MoH(vision_attn.Clear(radius=3), share=0.5, shared=0)
    train(settings(root, **mixed, run__out=root / "other" / "out", loss__balance=0))
    (with_load, *_), (without, *_) = metrics(root), metrics(root / "other")
    assert "balance" not in without
    assert with_load["total"] == pytest.approx(without["total"] + 0.01 * with_load["balance"], rel=1e-3)
