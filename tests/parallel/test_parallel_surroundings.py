"""What stands around a model over processes: models without a plan, compiled blocks, FSDP, the decoder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sliced_highres
import sliced_models
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig
from tiny_hosts import HOST
from tiny_pipelines import PIPELINE

import vision_attn
from vision_attn.parallel import enable, shared_decoding
from vision_attn.processors import Clear, LinFusion, Multipole

SPECS = {"clear": Clear(radius=2), "multipole": Multipole(cell=2, near=0, pool=1, exact=1), "linfusion": LinFusion()}


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_models_without_a_plan(pair, name, spec):
    size = (6, 5, 2, 8)
    expected = sliced_models.forward(HOST[name], size, SPECS[spec], {}, True)
    for output, _, grads, status, refused in pair.run("sliced_models:enabled", name, size, SPECS[spec], True):
        assert set(status.values()) == {"rerouted"}
        assert "disable() that before the revert" in refused[0] and "slice alone" in refused[1]
        torch.testing.assert_close(output, expected[0], atol=2e-5, rtol=2e-5)
        for key, value in expected[2].items():
            if "transformer_blocks" in key:  # what lies outside of them is computed by each process
                torch.testing.assert_close(
                    grads[key], value, atol=2e-4, rtol=2e-4, msg=lambda m, key=key: f"{key}: {m}"
                )


def test_layers_of_a_cut_model_must_not_stay_dense(pair):
    for refused in pair.run("sliced_models:dense", "pixart", (6, 5, 2, 8)):
        assert "would attend to this process's slice alone" in refused


def test_a_cache_must_skip_by_the_step(pair):
    """By its slice one process may skip what the other one waits for."""
    size, spec = (6, 8, 1, 8), SPECS["clear"]
    (want, *_), by_step = (
        sliced_models.forward(HOST["flux"], size, spec, {}, False),
        MagCacheConfig(num_inference_steps=2, calibrate=True),
    )
    for outputs in pair.run("sliced_models:cached", "flux", size, spec, by_step):
        assert len(outputs) == 2
        torch.testing.assert_close(outputs, [want, want], atol=2e-5, rtol=2e-5)
    for said in pair.run("sliced_models:cached", "flux", size, spec, FirstBlockCacheConfig(threshold=0.1)):
        assert "FirstBlockCache" in said and "take MagCache" in said


def test_what_needs_processes_says_so():
    with pytest.raises(ValueError, match="process group has not been initialized"):
        enable(HOST["flux"].build())
    with (
        pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group\(\) first"),
        shared_decoding(PIPELINE["flux"].build().vae),
    ):
        pass


def test_enable_says_what_it_cannot_cut():
    with pytest.raises(TypeError, match="give a model or a pipeline of diffusers to cut, got 'flux'"):
        enable("flux")
    model = HOST["pixart"].build()
    with pytest.raises(ValueError, match="convert every self-attention"):
        enable(model)
    vision_attn.convert(model, Clear(radius=2), where="*.0.*")
    with pytest.raises(ValueError, match="convert every self-attention"):
        enable(model)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [5, 16, 37, 64])
def test_processes_decode_together(pair, rows):
    for together, alone in pair.run("sliced_models:decoded", rows):
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_compiled_blocks(pair, spec):
    for before, first, second in pair.run("sliced_models:compiled", "flux", (6, 8, 1, 8), SPECS[spec], seconds=280):
        torch.testing.assert_close(first, before, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(second, before, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_sharded_weights(pair):
    """FSDP takes the mean over the processes, where one process has the sum."""
    size, spec = (6, 8, 2, 8), Clear(radius=2)
    expected = sliced_models.forward(HOST["flux"], size, spec, {}, True)
    for output, grads in pair.run("sliced_models:sharded", "flux", size, spec):
        torch.testing.assert_close(output, expected[0], atol=2e-5, rtol=2e-5)
        assert grads
        for key, value in grads.items():
            torch.testing.assert_close(2 * value, expected[2][key], atol=2e-4, rtol=2e-4)


@pytest.mark.slow
def test_the_programs_of_the_page_run(pair):
    one, other = pair.run("sliced_page:of_the_page")
    assert one == other and all(torch.tensor(list(pixels)).float().std() > 5 for pixels in one)


@pytest.mark.slow
def test_the_example_runs(pair, tmp_path):
    assert pair.run("sliced_page:of_the_example", str(tmp_path / "picture.png")) == [2, 2]
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux", "sdxl", "sd3"])
def test_generate_highres(pair, kind):
    expected = sliced_highres.drawn(kind, False)
    assert len(expected) == 2 and all(pixels.float().std() > 5 for pixels in expected)
    for pictures in pair.run("sliced_highres:over", kind, seconds=280):
        for found, pixels in zip(pictures, expected, strict=True):
            assert (found - pixels).abs().max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "sd15-unet"])
def test_torchrun_ends_all_when_one_is_killed(name, tmp_path):
    program, died = Path(__file__).parents[1] / "support" / "dying.py", tmp_path / "died"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    running = subprocess.Popen(
        [*command, name, str(died)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = running.communicate(timeout=200)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode and died.exists(), output[-3000:]
    assert time.time() - float(died.read_text()) < 60


@pytest.mark.slow
def test_different_sizes_in_turn(pair):
    sizes = [(6, 8, 2, 8), (5, 10, 1, 12), (6, 8, 2, 8)]
    for outputs in pair.run("sliced_models:in_turn", "flux", sizes, SPECS["multipole"]):
        for size, output in zip(sizes, outputs, strict=True):
            expected = sliced_models.forward(HOST["flux"], size, SPECS["multipole"], {}, False)[0]
            torch.testing.assert_close(output, expected, atol=2e-5, rtol=2e-5)
