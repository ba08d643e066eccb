"""`vision-attn demo`, small: one prompt, few steps; the nano teacher, and the UNet slowly."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import vision_attn.demo.compare
from vision_attn import cli
from vision_attn.cli import main
from vision_attn.demo import TEACHERS, load_teacher
from vision_attn.demo.compare import AT_LARGE, PROCESSORS, entries_of, plan
from vision_attn.processors import AgentSD, Clear, Neighborhood, Softmax


def run(out, *arguments, teacher="nano", steps=2):
    """Run the command with one prompt."""
    common = ["--teacher", teacher, "--num-inference-steps", str(steps), "--prompt", "red apple", "--out", str(out)]
    assert main(["demo", *common, *arguments]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def pages():
    """The page as it was each time that it was written."""
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pages):
    out, write_page = tmp_path_factory.mktemp("demo"), vision_attn.demo.compare.write_page

    def noted(*args, **kwargs):
        page = write_page(*args, **kwargs)
        pages.append(page.read_text())
        return page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision_attn.demo.compare, "write_page", noted)
        run(out)
    return out


def test_it_writes_pictures_of_both_sizes(folder):
    results = json.loads((folder / "results.json").read_text())
    assert [(r["pixels"], r["processor"]) for r in results] == [(pixels, entry.name) for pixels, entry in plan("nano")]
    assert {r["training"] for r in results} == {"none needed", "untrained"}
    for result in results:
        assert [Image.open(folder / file).size for file in result["files"]] == [(result["pixels"],) * 2]


def test_the_table_is_what_was_measured(folder):
    large = [row for row in json.loads((folder / "results.json").read_text()) if row["pixels"] == 256]
    dense, clear, neighborhood = (
        next(row for row in large if row["processor"].startswith(name)) for name in ("Softmax", "Clear", "Neighborhood")
    )
    assert dense["tokens"] == clear["tokens"] == 64 * 64 + 8
    assert dense["psnr"] is None and dense["attended"] == 1
    for result in (clear, neighborhood):
        assert 0 < result["attended"] < 0.1 and result["seconds"] > 0
        ours, theirs = (np.asarray(Image.open(folder / r["files"][0]), float) for r in (result, dense))
        assert result["psnr"] == pytest.approx(10 * np.log10(255**2 / np.square(ours - theirs).mean()))


def pictures(page):
    return re.findall(r'<img src="([^"]+)"', page)


def test_the_page_opens_from_disk(folder):
    page, count = (folder / "index.html").read_text(), len(plan("nano"))
    assert len(set(pictures(page))) == count and all((folder / picture).exists() for picture in pictures(page))
    assert "http" not in page and "reload" not in page
    assert (folder / "sheet.png").exists()


def test_the_page_is_there_from_the_start_and_grows_with_each_picture(folder, pages):
    count = len(plan("nano"))
    assert [len(pictures(page)) for page in pages] == list(range(count + 1))
    assert f"0 of {count} pictures are drawn" in pages[0] and f"{count - 1} of {count} pictures" in pages[-2]
    assert "location.reload()" in pages[-2] and pages[-1] == (folder / "index.html").read_text()


def test_by_default_it_draws_what_is_worth_looking_at():
    rows = plan("base")
    kinds = [(pixels, type(entry.spec), entry.training) for pixels, entry in rows]
    assert rows[0][0] == 128 and rows[0][1].spec == Softmax()  # the others are compared with it
    for row in ((128, Clear, "untrained"), (128, Clear, "distilled"), (128, Neighborhood, "untrained")):
        assert row in kinds and (256, *row[1:]) in kinds
    assert (128, type(AgentSD.schedule()), "none needed") in kinds
    assert all(entry.draws_well for _, entry in rows)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_all_of_it_is_every_registered_processor(teacher):
    rows = plan(teacher, everything=True)
    assert {entry.spec for pixels, entry in rows if pixels == 128} >= set(PROCESSORS)
    large = [entry for pixels, entry in rows if pixels == 256]
    assert {type(entry.spec) for entry in large} == {spec for spec in AT_LARGE if spec in map(type, PROCESSORS)}
    assert plan(teacher) == [(pixels, entry) for pixels, entry in rows if entry.draws_well]


@pytest.mark.slow  # every row with the smallest teacher; the default rows have the small twin
def test_all_rows_of_flux(tmp_path):
    results = run(tmp_path, "--all")
    assert {row["processor"].split("(")[0] for row in results} >= {"Agent", "HiLo", "LinFusion", "RALA"}
    assert [row["pixels"] for row in results] == [128] * len(PROCESSORS) + [256] * len(AT_LARGE)


@pytest.mark.slow  # every row with the UNet, which is slower; test_demo_teacher.py has the small twins
def test_the_unet_teacher_runs_the_same_demo(tmp_path):
    results = run(tmp_path, "--all", teacher="unet", steps=3)
    assert {(result["pixels"], result["tokens"]) for result in results} == {(128, 1024), (256, 4096)}
    assert "Stable Diffusion UNet" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "red aple"], "words the teacher does not know: 'aple' (close to 'maple', 'apple'"),
        (["--num-inference-steps", "1"], "steps must be at least 2"),
        (["--teacher", "huge"], "the teacher must be one of 'base', 'nano', 'unet', got 'huge'"),
    ],
    ids=["unknown-word", "steps", "teacher"],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["demo", "--teacher", "nano", "--out", str(tmp_path / "new"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("vision-attn: ") and error.count("\n") == 1
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


HELP = """
import sys
from vision_attn.cli import main
try:
    main(sys.argv[1:])
finally:
    print(sorted(name for name in ("torch", "diffusers", "timm") if name in sys.modules))
"""


@pytest.mark.parametrize("command", [[], ["demo"], ["generate"]], ids=["vision-attn", "demo", "generate"])
def test_help_is_quick(command):
    done = subprocess.run([sys.executable, "-c", HELP, *command, "--help"], capture_output=True, text=True, check=True)
    assert "usage: vision-attn" in done.stdout and done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command", [["generate", "emoji", "octopus"], ["distill", "train"]], ids=["generate", "distill"]
)
def test_ctrl_c_ends_in_one_line(command, monkeypatch, capsys):
    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_generate", stopped)
    monkeypatch.setattr(cli, "_distill", stopped)
    assert main(command) == 130 and capsys.readouterr().err == "vision-attn: stopped\n"
