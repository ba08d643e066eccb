"""`distill run`: what is missing is made, what is there stays, and a change makes again what depends on it."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from distill_case import WORDS, arguments, metrics, settings, write_images
from PIL import Image

from vision_attn.cli import main
from vision_attn.distill import output
from vision_attn.distill.cache import is_current, write_cache
from vision_attn.distill.command import _this_process
from vision_attn.distill.evaluate import evaluate
from vision_attn.distill.images import undrawn
from vision_attn.distill.loop import train
from vision_attn.distill.output import is_finished
from vision_attn.distill.run import DONE, needs_cache, needs_images, needs_report, run_all

QUICK = dict(
    model__base="emoji:unet", student__processor="Clear", student__fields={"radius": 3}, run__steps=2,
    run__save_every=0, data__num_inference_steps=1, eval__count=2, eval__num_inference_steps=1, eval__sigmas=[0.5],
)  # fmt: skip


def needs(config):
    return [needs_images(config), needs_cache(config), not is_finished(config), needs_report(config)]


@pytest.mark.slow
def test_one_command_from_prompts_to_the_report(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(WORDS[:2]))
    config = settings(tmp_path, data__prompts=prompts, **QUICK)
    assert undrawn(config) == [0, 1]
    report = run_all(config, _this_process())
    assert report["generate"] == dict(drawn=2, before=0) and report["cache"]["samples"] == 2
    assert report["train"]["adapter"] == str(tmp_path / "out" / "adapter")
    assert report["eval"]["student"]["kd_error_mean"] > 0
    assert needs(config) == [False] * 4

    assert needs(settings(tmp_path, data__prompts=prompts, **{**QUICK, "eval__count": 1})) == [
        False,
        False,
        False,
        True,
    ]
    longer = settings(tmp_path, data__prompts=prompts, **{**QUICK, "run__steps": 3})
    assert needs(longer) == [False, False, True, False]
    # a run that the clock ended is not gone on with, whatever its steps
    assert is_finished(settings(tmp_path, data__prompts=prompts, run__minutes=1, **{**QUICK, "run__steps": 9}))
    # other settings than the checkpoint's are a matter for the training, which says what changed
    other = settings(tmp_path, data__prompts=prompts, optimizer__learning_rate=0.5, **QUICK)
    assert not is_finished(other)
    with pytest.raises(ValueError, match=r"optimizer.learning_rate was 0.001, is 0.5"):
        run_all(other, _this_process())
    prompts.write_text("\n".join(WORDS[:3]))
    assert undrawn(config) == [2] and needs_images(config)


def test_the_rate_falls_until_the_clock_ends_the_run(tmp_path, monkeypatch):
    write_images(tmp_path / "images", count=2)
    config = settings(
        tmp_path, run__minutes=1, optimizer__schedule="cosine", optimizer__warmup=0, **{**QUICK, "run__steps": 9999}
    )
    write_cache(config)
    quarters = itertools.count(step=15)  # seconds
    monkeypatch.setattr(output, "time", SimpleNamespace(perf_counter=lambda: next(quarters)))
    train(config)
    rates = [line["learning_rate"] for line in metrics(tmp_path)]
    most = config.optimizer.learning_rate
    assert rates == pytest.approx([most * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(5)], abs=1e-4 * most)


def test_a_cache_is_current_until_what_it_was_made_of_changes(tmp_path):
    config = settings(tmp_path)
    with pytest.raises(FileNotFoundError, match="images does not exist"):
        needs_cache(config)
    write_images(tmp_path / "images", count=2)
    assert needs_cache(config)
    write_cache(config)
    assert is_current(config) and not needs_cache(config)
    assert needs_cache(settings(tmp_path, data__sizes=[[32, 48]]))
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "0.png")
    assert needs_cache(config)
    given = settings(tmp_path, data__images="null")
    assert not needs_cache(given)  # somebody else's cache
    with pytest.raises(ValueError, match=r"data.images is missing"):
        needs_cache(settings(tmp_path, data__images="null", data__cache=tmp_path / "none"))


def test_the_command_does_nothing_twice(tmp_path, capsys):
    write_images(tmp_path / "images", count=2)
    given = arguments(tmp_path, **QUICK)
    assert main(["distill", "run", *given]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["generate"] == DONE and first["cache"]["samples"] == 2 and "kd_error_mean" in first["eval"]["student"]
    assert main(["distill", "run", *given]) == 0
    assert json.loads(capsys.readouterr().out) == dict.fromkeys(("generate", "cache", "train", "eval"), DONE)


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS[:4]))
    given = arguments(tmp_path, data__prompts=tmp_path / "prompts.txt", **QUICK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vision_attn.distill"]
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "run", *given], env=os.environ | on_cpu, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"drawn": 2') == 2 and done.stdout.count('"kd_error_mean"') == 1
    assert (tmp_path / "out" / "eval.json").exists() and len(list((tmp_path / "images").glob("*.png"))) == 4


TENSORBOARD = pytest.param(
    id="tensorboard" + ("" if importlib.util.find_spec("tensorboard") else ", which is not installed"),
    marks=pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed"),
)


@pytest.mark.parametrize((), [TENSORBOARD])
def test_a_tracker_gets_every_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_images(tmp_path / "images", count=2)
    write_cache(settings(tmp_path))
    train(settings(tmp_path, run__trackers=["tensorboard"], run__steps=2, run__save_every=0))
    (events,) = (tmp_path / "out" / "logs").rglob("events.*.0")
    found = EventAccumulator(str(events.parent))
    found.Reload()
    assert [event.step for event in found.Scalars("total")] == [1, 2]
    assert torch.isfinite(torch.tensor([event.value for event in found.Scalars("norm")])).all()


def test_an_adapter_that_is_not_there_is_named(tmp_path):
    config = settings(tmp_path, eval__adapter=tmp_path / "none")
    config.run.out.mkdir()
    (config.run.out / "eval.json").write_text("{}")
    assert needs_report(config)
    with pytest.raises(FileNotFoundError, match=r"eval\.adapter: .*none does not exist"):
        evaluate(config)
