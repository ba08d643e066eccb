"""The programs of `examples/gallery`: what they say, the hub's on tiny random pipelines, and how they stop.

`test_gallery.py` runs the offline ones and looks at their page.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gallery_case import EXAMPLES, ROOT, SMALL, program
from PIL import Image
from tiny_pipelines import PIPELINE

from vision_attn import Clear, Grid, LinFusion, Neighborhood, convert, load
from vision_attn.conversion.state import is_converted
from vision_attn.gallery.build import run_example
from vision_attn.highres.levels import Options
from vision_attn.kernels.dense import dense_attention
from vision_attn.processors import Layer

HUB = [name for name, example in EXAMPLES.items() if example.weights]


def test_all_are_there_offline_ones_first() -> None:
    names = list(EXAMPLES)
    assert names[:5] == list(SMALL)
    assert names[5:] == HUB == ["controlnet_neighborhood", "flux_clear_4k", "sd15_agent", "sdxl_linfusion"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_they_are_short(name: str) -> None:
    lines = EXAMPLES[name].path.read_text().splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 120
    assert len(EXAMPLES[name].title) <= 75 and EXAMPLES[name].text


def tiny(pipeline_id: str, side: int) -> tuple[Any, dict[str, Any]]:
    case = PIPELINE[pipeline_id]
    call = case.call(side, side)
    call["prompt"] = None
    for name in ("height", "width", "generator", "output_type", "image"):
        call.pop(name, None)
    return case.build(), call


def files(folder: Path, captions: dict[str, str]) -> dict[str, Any]:
    assert set(captions) == {file.name for file in folder.iterdir()}
    return {file: np.asarray(Image.open(folder / file), np.float32) for file in captions}


def test_stable_diffusion_with_agents(tmp_path: Path) -> None:
    pipe, call = tiny("sd", 128)
    drawn = files(tmp_path, program("sd15_agent").main(pipe=pipe, out=tmp_path, side=128, **call))
    assert set(drawn) == {"dense.png", "agent.png"} and drawn["dense.png"].shape == (128, 128, 3)
    assert np.abs(drawn["dense.png"] - drawn["agent.png"]).max() > 0 and not is_converted(pipe.unet)


def test_a_controlnet_and_its_unet(tmp_path: Path) -> None:
    pipe, call = tiny("sd-controlnet", 128)
    module = program("controlnet_neighborhood")
    captions = module.main(pipe=pipe, out=tmp_path, side=128, spec=Neighborhood(5), **call)
    rerouted, total = (int(word) for word in captions["house.png"].split() if word.isdigit())
    assert 2 < rerouted < total, "both models, but not their small levels"
    assert files(tmp_path, captions)["house.png"].shape == (128, 128, 3)
    assert not is_converted(pipe.unet) and not is_converted(pipe.controlnet)


def levels(pipe: Any) -> dict[str, Any]:
    base = 8 * pipe.vae_scale_factor
    return dict(
        side=2 * base, options=Options(num_inference_steps=2, level_inference_steps=1, base=(base, base), quiet=True)
    )


def test_sdxl_beside_linfusion(tmp_path: Path) -> None:
    pipe, call = tiny("sdxl", 128)
    call.pop("num_inference_steps")
    conversion = convert(pipe, LinFusion())
    conversion.save(tmp_path / "adapter")
    conversion.revert()
    out, module = tmp_path / "out", program("sdxl_linfusion")
    drawn = files(out, module.main(pipe=pipe, out=out, adapter=str(tmp_path / "adapter"), **levels(pipe), **call))
    assert set(drawn) == {"dense.png", "linfusion-64.png", "linfusion-128.png"}
    assert np.abs(drawn["dense.png"] - drawn["linfusion-64.png"]).max() > 0 and not is_converted(pipe.unet)


def test_flux_with_clear(tmp_path: Path) -> None:
    pipe, call = tiny("flux", 128)
    call.pop("num_inference_steps")
    conversion = convert(pipe, Clear(radius=2, pool=2))
    conversion.save(tmp_path / "adapter")
    conversion.revert()
    load(pipe, tmp_path / "adapter", spec=Clear(radius=2, pool=2, native_tokens=71))
    out, module = tmp_path / "out", program("flux_clear_4k")
    assert (module.SPEC.radius, module.SPEC.pool) == (16, 4) and module.FILE == "clear_local_16_down_4.safetensors"
    drawn = files(out, module.main(pipe=pipe, out=out, **levels(pipe), **call))
    assert {image.shape for image in drawn.values()} == {(64, 64, 3), (128, 128, 3)}


@pytest.mark.parametrize("name", HUB)
def test_without_weights_they_say_so(name: str, tmp_path: Path) -> None:
    shown = run_example(EXAMPLES[name], tmp_path / name)
    assert not shown.captions and "\n" not in shown.reason and not (tmp_path / name).exists()
    assert all(weights in shown.reason for weights in EXAMPLES[name].weights)


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_is_a_program(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES[name].path), run_name="__main__")
    assert stop.value.code == 0 and "--out" in capsys.readouterr().out


def test_a_program_stops_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sd15_agent.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES["sd15_agent"].path), run_name="__main__")
    assert str(stop.value.code).startswith("this example needs the weights of stable-diffusion-v1-5/")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_line_and_a_status_as_a_process(tmp_path: Path) -> None:
    """The process imports this tree, wherever another one is installed, and finds no weights anywhere."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    surroundings = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, str(EXAMPLES["sd15_agent"].path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("this example needs the weights of stable-diffusion-v1-5/")


def test_the_own_processor_is_what_it_says() -> None:
    """Against its definition: a mask and a softmax in float64, with text before and after a grid."""
    module, grid, size = program("own_processor"), Grid(6, 10, prefix=3, suffix=2), 4
    q, k, v = (torch.randn(2, grid.tokens, 4, 8, dtype=torch.float64) for _ in range(3))
    rows = torch.arange(grid.height).repeat_interleave(grid.width)
    columns = torch.arange(grid.width).repeat(grid.height)
    outputs, shares = [], []
    for axis, heads in ((rows, slice(0, 2)), (columns, slice(2, 4))):
        seen = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
        seen[grid.image, grid.image] = (axis[:, None] // size) == (axis[None] // size)
        outputs.append(dense_attention(q[:, :, heads], k[:, :, heads], v[:, :, heads], mask=seen))
        shares.append(seen.double().mean())
    spec = module.Stripes(size=size)
    result = spec.build(Layer("", 4, 8))(q, k, v, grid)
    torch.testing.assert_close(result, torch.cat(outputs, 2), rtol=0, atol=1e-12)
    assert not torch.allclose(result, module.Stripes(size=3).build(Layer("", 4, 8))(q, k, v, grid))
    whole = Grid(8, 8)
    assert spec.attended(whole) == pytest.approx(0.5) and 0.3 < float(sum(shares) / 2) < 1
