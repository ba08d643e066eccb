"""`vision-attn demo`, small: one prompt, few steps; the nano teacher, and the UNet slowly."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from vision_attn.cli import main
from vision_attn.demo import load_teacher, shipped_adapters
from vision_attn.demo.compare import AT_LARGE, PROCESSORS, entries_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert (
        main(["demo", "--teacher", "nano", "--num-inference-steps", "3", "--prompt", "red apple", "--out", str(out)])
        == 0
    )
    return out


def test_it_writes_pictures_of_both_sizes(folder):
    results = json.loads((folder / "results.json").read_text())
    assert [result["pixels"] for result in results] == [128] * len(PROCESSORS) + [256] * len(AT_LARGE)
    assert {r["processor"].split("(")[0] for r in results} >= {"Softmax", "Clear", "LinFusion", "AgentSD.schedule"}
    assert {r["training"] for r in results} == {"none needed", "untrained"}
    for result in results:
        assert [Image.open(folder / file).size for file in result["files"]] == [(result["pixels"],) * 2]


def test_the_table_is_what_was_measured(folder):
    large = json.loads((folder / "results.json").read_text())[len(PROCESSORS) :]
    dense, clear, neighborhood = (
        next(row for row in large if row["processor"].startswith(name)) for name in ("Softmax", "Clear", "Neighborhood")
    )
    assert dense["tokens"] == clear["tokens"] == 64 * 64 + 8
    assert dense["psnr"] is None and dense["attended"] == 1
    for result in (clear, neighborhood):
        assert 0 < result["attended"] < 0.1 and result["seconds"] > 0
        ours, theirs = (np.asarray(Image.open(folder / r["files"][0]), float) for r in (result, dense))
        assert result["psnr"] == pytest.approx(10 * np.log10(255**2 / np.square(ours - theirs).mean()))


def test_the_page_opens_from_disk(folder):
    page = (folder / "index.html").read_text()
    pictures = re.findall(r'<img src="([^"]+)"', page)
    assert len(pictures) == len(PROCESSORS) + len(AT_LARGE) and all((folder / picture).exists() for picture in pictures)
    assert "http" not in page
    assert (folder / "sheet.png").exists()


@pytest.mark.slow  # the UNet at both sizes with every processor; test_demo_unet.py has the small twins
def test_the_unet_teacher_runs_the_same_demo(tmp_path):
    arguments = ["--teacher", "unet", "--num-inference-steps", "3", "--prompt", "red apple", "--out", str(tmp_path)]
    assert main(["demo", *arguments]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {(result["pixels"], result["tokens"]) for result in results} == {(128, 1024), (256, 4096)}
    assert "Stable Diffusion UNet" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "red aple"], "words the teacher does not know: 'aple' (close to 'maple', 'apple'"),
        (["--num-inference-steps", "1"], "steps must be at least 2"),
    ],
    ids=["unknown-word", "steps"],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["demo", "--teacher", "nano", "--out", str(tmp_path / "new"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("vision-attn: ") and "Traceback" not in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("teacher", ["base", "unet"])
def test_shipped_adapters_are_small_and_are_shown_as_distilled(teacher):
    distilled = [entry for entry in entries_of(teacher) if entry.adapter]
    assert distilled and {entry.training for entry in distilled} == {"distilled"}
    assert len({entry.slug for entry in entries_of(teacher)}) == len(entries_of(teacher))
    pipe = load_teacher(teacher)
    for entry in distilled:
        assert sum(file.stat().st_size for file in entry.adapter.iterdir()) <= 2e6
        conversion = entry.put_into(pipe)
        assert set(conversion.specs.values()) == {entry.spec}
        conversion.revert()


def test_adapters_of_no_teacher_are_refused():
    with pytest.raises(ValueError, match="must be one of 'base', 'nano', 'unet', got 'flux'"):
        shipped_adapters("flux")
