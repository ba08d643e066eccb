"""The example settings can be read and name what exists; the results script runs at toy size."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from distill_case import write_truth

from vision_attn import Clear, convert
from vision_attn.demo import load_teacher
from vision_attn.distill.config import read_config

EXAMPLES = Path(__file__).parents[2] / "examples" / "distill"
FILES = sorted(EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_can_be_read_and_say_what_they_cost(path):
    config = read_config(["--config", str(path)], "test")
    assert config.student.spec() is not None
    comments = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "Hardware:" in comments and "Cost:" in comments and "stimated" in comments


def test_the_named_examples_are_there():
    names = {path.stem for path in FILES}
    assert names >= {
        "flux_clear",
        "flux_clear_pooled",
        "sdxl_linfusion",
        "sd15_linfusion",
        "pixart_hilo",
        "emoji_clear",
    }
    assert len((EXAMPLES / "emoji_prompts.txt").read_text().splitlines()) == 1593


@pytest.mark.parametrize(
    "students", ["clear", pytest.param("clear,agent,hilo,linfusion,linfusion_random,rala", marks=pytest.mark.slow)]
)
def test_the_results_script_runs_at_toy_size(students, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("octopus\nred apple\nrocket\n")
    given = [str(tmp_path / "out"), "--toy", "--steps", "2", "--teachers", "nano", "--students", students]
    monkeypatch.setattr(sys, "argv", ["emoji_results.py", *given, "--prompts", str(tmp_path / "prompts.txt")])
    runpy.run_path(str(EXAMPLES / "emoji_results.py"), run_name="__main__")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {f"nano-{student}" for student in students.split(",")}
    for name, result in results.items():
        assert result["steps"] == 2 and {"kd_error_mean", "psnr_db", "copies"} <= set(result["after"])
        assert result["megabytes"] <= 2 and (tmp_path / "out" / "adapters" / name / "config.json").exists()
    assert "| nano-clear | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prompts", "steps"), [("octopus", "1"), pytest.param("octopus,red apple", "2", marks=pytest.mark.slow)]
)
def test_the_script_of_large_pictures_runs_at_toy_size(prompts, steps, tmp_path, monkeypatch, capsys):
    write_truth(tmp_path / "icons.npz", ["octopus", "red-apple"])
    adapters = tmp_path / "adapters"
    convert(load_teacher("nano"), Clear(radius=3)).save(adapters / "nano-clear")
    given = [str(tmp_path / "out"), "--icons", str(tmp_path / "icons.npz"), "--teachers", "nano", "--sizes", "160"]
    given += ["--prompts", prompts, "--num-inference-steps", steps, "--level-inference-steps", "1"]
    given += ["--adapters", str(adapters)]
    monkeypatch.setattr(sys, "argv", ["highres_results.py", *given])
    for _ in range(2):  # the second run finds everything done
        runpy.run_path(str(EXAMPLES / "highres_results.py"), run_name="__main__")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["attention"], r["way"]) for r in rows] == [
        ("dense", "direct"), ("dense", "levels"), ("clear", "direct"), ("clear", "levels")
    ]  # fmt: skip
    assert all(r["copies"] >= 1 and r["truth_psnr_db"] > 0 and r["seconds"] > 0 for r in rows)
    assert all((tmp_path / "out" / f"nano-{r['attention']}-{r['way']}-160.png").exists() for r in rows)
    assert "| nano | clear | levels | 160 |" in capsys.readouterr().out
