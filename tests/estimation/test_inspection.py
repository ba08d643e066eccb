"""`vision-attn inspect`: models by folder and by name, what a token attends to, and bad names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processor_table import PROCESSORS
from tiny_hosts import HOST

from vision_attn import Clear, Multipole, Neighborhood
from vision_attn.cli import main
from vision_attn.estimation.inspection import attended, shades
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window
from vision_attn.processors import spec_of_text


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_a_token_attends_to(name: str) -> None:
    grid = Grid(8, 12, prefix=3)
    weights = attended(PROCESSORS[name], grid, 3, 5)
    assert weights.shape == (8, 12) and weights.isfinite().all()
    assert 0 < weights.sum() <= 1.2  # the rest goes to the text; AgentSD adds a share of the own value


@pytest.mark.parametrize("window", [dict(radius=2.5), dict(kernel_size=5)], ids=["disc", "square"])
def test_a_window_is_seen_exactly(window: dict[str, Any]) -> None:
    grid, spec = Grid(9, 7), Clear(**window) if "radius" in window else Neighborhood(**window)
    for row, column in ((0, 0), (4, 3), (8, 6)):
        seen = attended(spec, grid, row, column) > 0
        assert torch.equal(seen.flatten(), Window(**window).allowed(grid)[row * 7 + column])


def test_multipole_attention_is_drawn_in_three_tones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = Grid(18, 20, prefix=3)
    found = shades(Multipole(cell=4, near=1, pool=2, exact=2), grid, 17, 9)  # the lowest row of cells has two rows
    near, chosen, pooled = (found == tone for tone in (1.0, torch.tensor(0.4), torch.tensor(0.1)))
    assert near.nonzero().amin(0).tolist() == [12, 4] and near.sum() == 6 * 12
    assert 2 * 8 <= chosen.sum() <= 2 * 16 and near.sum() + chosen.sum() + pooled.sum() == 18 * 20
    alike = attended(Multipole(cell=4, near=1, pool=2, exact=2), grid, 17, 9)  # equal keys do not tell them apart
    torch.testing.assert_close(alike, torch.full_like(alike, 1 / grid.tokens))
    with pytest.raises(ValueError, match=r"token \(18, 0\) is not in a grid of 18 x 20"):
        shades(Multipole(), grid, 18, 0)
    out = tmp_path / "picture.png"
    size = ["--height", "512", "--width", "512", "--processor", "multipole", "--picture", str(out)]
    assert main(["inspect", "vit_tiny_patch16_224", *size]) == 0
    assert "Multipole()" in capsys.readouterr().out
    drawn = Image.open(out)
    colours = {drawn.getpixel((x, y)) for x in range(3, drawn.width, 6) for y in range(3, drawn.height, 6)}
    assert len(colours) == 4 and (220, 30, 30) in colours


def test_a_pipeline_a_model_and_a_timm_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    HOST["sd15-unet"].build().save_pretrained(tmp_path / "unet")  # type: ignore[operator]
    size = ["--height", "256", "--width", "128"]
    out = tmp_path / "picture.png"
    assert main(["inspect", str(tmp_path / "unet"), *size, "--processor", "clear:radius=3", "--picture", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Clear(radius=3)" in text and "down_blocks.0.attentions.0" in text and "faster" in text
    assert Image.open(out).size == (16 * 6, 32 * 6)
    corner = ["--picture", str(out), "--token", "0", "15"]
    assert main(["inspect", str(tmp_path / "unet"), *size, "--processor", "clear:radius=3", *corner]) == 0
    assert "token (0, 15)" in capsys.readouterr().out
    drawn = Image.open(out)
    assert drawn.getpixel((15 * 6, 0)) == (220, 30, 30) and drawn.getpixel((0, 0)) == (255, 255, 255)
    assert main(["inspect", "vit_tiny_patch16_224", *size, "--processor", "hilo:alpha=0.5"]) == 0
    assert "blocks.11.attn" in capsys.readouterr().out
    demo = Path(__file__).parents[2] / "vision_attn" / "demo" / "weights" / "flux_nano"
    assert main(["inspect", str(demo), *size]) == 0
    assert "single_transformer_blocks" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sd15-unet", "flux"])
def test_a_pipeline_needs_no_weights(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = HOST[name].build()
    component = "unet" if name == "sd15-unet" else "transformer"
    model.save_config(tmp_path / component)  # type: ignore[operator]
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"block_out_channels": [8, 8, 8]}')
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert main(["inspect", str(tmp_path), "--height", "128", "--width", "256", "--processor", "hilo"]) == 0
    text = capsys.readouterr().out
    size = "32 x 64" if component == "unet" else "16 x 32"  # 4 pixels a latent, and FLUX packs 2 x 2 of them
    assert f"HiLo()     {size}" in text and "processors that fit every grid with their defaults: agent," in text


def test_processors_that_do_not_fit_are_listed_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "vit_tiny_patch16_224", "--height", "96", "--width", "96", "--processor", "clear"]) == 0
    text = capsys.readouterr().out
    fit = next(line for line in text.splitlines() if line.startswith("processors that fit"))
    assert "clear" in fit and "neighborhood" not in fit and "neighborhood does not fit blocks.0.attn (" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_of_dreams"], "neither a folder"),
        (["vit_tiny_patch16_224", "--processor", "cleer"], "cleer"),
        (["resnet18"], "not a known host"),
        (["dinat_mini"], "NAT is not a known host"),
        (["vit_tiny_patch16_224", "--processor", "clear:radius"], "name=value"),
        (["vit_tiny_patch16_224", "--processor", "clear:diameter=3"], "diameter"),
        (["nobody/nothing"], "could not be loaded"),
        (["vit_tiny_patch16_224", "--picture", "x.foo"], "does not name a picture format"),
        (["vit_tiny_patch16_224", "--picture", "no/folder/x.png"], "there is no folder no/folder"),
        (["vit_tiny_patch16_224", "--token", "1", "2"], "--token is for the --picture"),
        (["vit_tiny_patch16_224", "--token", "1", "99", "--picture", "x.png"], "(1, 99) is not in a grid"),
    ],
    ids=[
        "model",
        "processor",
        "host",
        "own-backbone",
        "value",
        "field",
        "hub",
        "format",
        "folder",
        "token",
        "token-outside",
    ],
)
def test_bad_names_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments, "--height", "256", "--width", "256"]) == 2
    assert message in capsys.readouterr().err


DAMAGED = {
    "pipeline-is-a-list": ({"model_index.json": "[1]"}, "model_index.json is damaged: it holds a list"),
    "pipeline-is-no-json": ({"model_index.json": "{"}, "model_index.json is damaged"),
    "pipeline-of-no-class": ({"model_index.json": "{}"}, "could not be loaded: KeyError: '_class_name'"),
    "pipeline-of-unknown-class": ({"model_index.json": '{"_class_name": "Nope"}'}, "could not be loaded"),
    "model-is-a-list": ({"config.json": "[1]"}, "config.json is damaged: it holds a list"),
    "model-is-no-json": ({"config.json": "nope"}, "config.json is damaged"),
    "model-of-no-class": ({"config.json": "{}"}, "config.json is not a diffusers model: its class is None"),
    "model-is-a-scheduler": ({"config.json": '{"_class_name": "DDIMScheduler"}'}, "its class is 'DDIMScheduler'"),
    "model-is-a-module": ({"config.json": '{"_class_name": "logging"}'}, "its class is 'logging'"),
    "model-of-wrong-values": (
        {"config.json": '{"_class_name": "UNet2DConditionModel", "norm_num_groups": "x"}'},
        "could not be loaded: TypeError",
    ),
    "denoiser-is-a-list": (
        {"model_index.json": "{}", "unet/config.json": "[1]", "vae/config.json": "{}"},
        "unet/config.json is damaged: it holds a list",
    ),
}


@pytest.mark.parametrize("files, message", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("command", ["inspect", "advise"])
def test_damaged_folders_are_one_line(
    command: str, files: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert main([command, str(tmp_path), "--height", "256", "--width", "256"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vision-attn: ")]
    assert message in line and str(tmp_path) in line


def test_an_error_of_many_lines_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "vit_tiny_patch16_224", "--height", "9" * 20, "--width", "224"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_fields_on_the_command_line() -> None:
    assert spec_of_text("clear") == Clear() and spec_of_text("Clear:radius=4.5,pool=2") == Clear(radius=4.5, pool=2)
    assert spec_of_text("neighborhood:kernel_size=5") == Neighborhood(5)
    assert spec_of_text("neighborhood:kernel_size=(3,5),dilation=2") == Neighborhood((3, 5), 2)
    assert spec_of_text("neighborhood:dilation=[2,1],kernel_size=3") == Neighborhood(3, (2, 1))
    with pytest.raises(TypeError, match="kernel_size must be an int or a pair"):
        spec_of_text("neighborhood:kernel_size=(3,5")
    with pytest.raises(ValueError, match=r"unknown processor 'schedule': known are agent, .*softmax, supertoken$"):
        spec_of_text("schedule:stages=3")
