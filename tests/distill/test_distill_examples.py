"""The example settings can be read and name what exists; the results script runs at toy size."""

import copy
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from distill_case import write_truth
from PIL import Image
from safetensors.torch import save_file

from vision_attn import Clear, convert
from vision_attn.bench.quality import dinov2, terrain
from vision_attn.bench.quality.contenders import DEFAULT, distilled
from vision_attn.bench.quality.weights import DINOV2, TERRAIN
from vision_attn.demo import load_teacher
from vision_attn.distill.reading import read_config

EXAMPLES = Path(__file__).parents[2] / "examples" / "distill"
FILES = sorted(set(EXAMPLES.glob("*.yaml")) - {EXAMPLES / "recipes.yaml"})


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


@pytest.mark.slow
@pytest.mark.parametrize("recipes", ["hedgehog_staged", "hedgehog_lolcats,rala_rotated,hedgehog_multipole"])
def test_recipes_run_side_by_side_at_toy_size(recipes, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("octopus\nred apple\nrocket\n")
    given = [str(tmp_path / "out"), "--toy", "--scale", "0.001", "--teachers", "nano", "--students", recipes]
    given += ["--recipes", str(EXAMPLES / "recipes.yaml"), "--jobs", "2", "--prompts", str(tmp_path / "prompts.txt")]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / "emoji_results.py"), *given])
    runpy.run_path(str(EXAMPLES / "emoji_results.py"), run_name="__main__")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {f"nano-{name}" for name in recipes.split(",")}, capsys.readouterr().err
    for name, result in results.items():
        assert result["curve"][0][0] == 0 and result["curve"][-1] == [
            result["steps"],
            pytest.approx(result["curve"][-1][1]),
        ]
        assert result["recipe"]["about"] and result["rate"] == 1e-3, name
    assert "| nano-" in capsys.readouterr().out


def test_every_recipe_fits_the_settings():
    script = runpy.run_path(str(EXAMPLES / "emoji_results.py"))
    recipes = yaml.safe_load((EXAMPLES / "recipes.yaml").read_text())
    known = {name: recipe for name, recipe in recipes.items() if not name.startswith("_")}
    for name, recipe in known.items():
        assert recipe["about"], name
        config = script["settings"](
            script["arguments"](["out", "--recipes", str(EXAMPLES / "recipes.yaml")]), "base", name, 1, None
        )
        assert sum(stage.run.steps for stage in config.each_stage()) == 1000 and config.student.spec() is not None


@pytest.mark.parametrize(
    ("prompts", "steps"), [("octopus", "1"), pytest.param("octopus,red apple", "2", marks=pytest.mark.slow)]
)
def test_the_script_of_large_pictures_runs_at_toy_size(prompts, steps, tmp_path, monkeypatch, capsys):
    write_truth(tmp_path / "icons.npz", ["octopus", "red-apple"])
    adapters = tmp_path / "adapters"
    convert(load_teacher("nano"), Clear(radius=3)).save(adapters / "nano-clear")
    given = [str(tmp_path / "out"), "--icons", str(tmp_path / "icons.npz"), "--teachers", "nano", "--sizes", "160"]
    given += ["--prompts", prompts, "--num-inference-steps", steps, "--level-inference-steps", "1"]
    given += ["--adapters", str(adapters), "--attention", "dense,clear,hedgehog,multipole:exact=0"]
    monkeypatch.setattr(sys, "argv", ["highres_results.py", *given])
    for _ in range(2):  # the second run finds everything done
        runpy.run_path(str(EXAMPLES / "highres_results.py"), run_name="__main__")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["attention"], r["way"]) for r in rows] == [
        ("dense", "direct"), ("dense", "levels"), ("clear", "direct"), ("clear", "levels"),
        ("multipole:exact=0", "direct"), ("multipole:exact=0", "levels"),
    ]  # fmt: skip
    near = [r["dense_psnr_db"] for r in rows]
    assert near[:2] == [None, None] and near[5] > near[3] > 0  # the one is distilled in no way, and sees far
    assert all(r["copies"] >= 1 and r["truth_psnr_db"] > 0 and r["seconds"] > 0 for r in rows)
    names = [f"nano-{r['attention'].replace(':', '_')}-{r['way']}-160.png" for r in rows]
    assert all((tmp_path / "out" / name).exists() for name in names)
    assert "| nano | clear | levels | 160 |" in capsys.readouterr().out


def test_the_parts_of_a_distillation_without_data(tmp_path, monkeypatch):
    script = runpy.run_path(str(EXAMPLES / "real_weights.py"))
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert script["relative"](a, torch.tensor([[3.0, 0.0], [1.0, 0.0]])) == pytest.approx((16 / 9 + 0) / 2)
    rng = np.random.default_rng(0)
    one, two = (np.asarray(script["shapes"](64, rng)) for _ in range(2))
    assert one.shape == (64, 64, 3) and one.std() > 20 and not np.array_equal(one, two)
    photo = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3))
    assert script["crop"](photo, 28, rng).size == (28, 28)
    assert [c.name for c in script["chosen"](",".join(script["STUDENTS"]))] == list(script["STUDENTS"])
    with pytest.raises(SystemExit, match="unknown student rala: known are multipole"):
        script["chosen"]("rala")


def test_the_last_photo_is_kept_out_of_a_training(tmp_path):
    script = runpy.run_path(str(EXAMPLES / "real_weights.py"))
    colours = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    for i, colour in enumerate(colours):
        Image.fromarray(np.broadcast_to(colour, (50, 50, 3)).copy()).save(tmp_path / f"{i}.png")
    script["make_pictures"].__globals__["drawn_emoji"] = lambda args, count: [Image.new("RGB", (8, 8), "white")]
    script["make_pictures"](SimpleNamespace(pictures=16, side=28, photos=tmp_path, out=tmp_path))
    task = object.__new__(script["Vision"])
    task.pictures, task.scale, task.batch = np.load(tmp_path / "pictures.npy"), (torch.zeros(1), torch.ones(1)), 64
    seen = [task.inputs(torch.Generator().manual_seed(0), "cpu", held_out=out)[0] for out in (False, True)]
    flat = [x[x.flatten(2).std(2).sum(1) < 1e-3][:, :, 0, 0].mul(255).round().unique(dim=0) for x in seen]
    assert sorted(flat[0].tolist()) == sorted(colours[:2].tolist()) and flat[1].tolist() == colours[2:].tolist()
    assert [len(x.unique(dim=0)) for x in seen] == [7 + 2, 1 + 1]  # an eighth is kept out: half are photos


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "students"),
    [
        ("dinov2", "linfusion"),
        ("dinov2", f"clear r4,linear local,{DEFAULT.name}"),
        ("terrain", "linfusion,clear r8"),
    ],
    ids=["dinov2-linfusion", "dinov2-others", "terrain"],
)
def test_real_weights_are_distilled_without_their_data(model, students, tmp_path, monkeypatch, capsys):
    """The teacher has random weights: the error of LinFusion falls, and the adapter is what the bench measures."""
    torch.manual_seed(0)
    if model == "dinov2":
        state = dinov2.build_backbone(None).state_dict()
        # an untrained LayerScale hides the attention, which needs far larger weights to be no mean
        weights = {f"backbone.{n}": t * (1e5 if "gamma" in n else 10 if "qkv" in n else 1) for n, t in state.items()}
        save_file(weights, tmp_path / DINOV2.name)
    else:
        save_file(terrain.Terrain(None).state_dict(), tmp_path / TERRAIN.name)
    out = tmp_path / "out"
    given = [str(out), "--files", str(tmp_path), "--models", model, "--students", students, "--device", "cpu"]
    small = ["--steps", "8", "--batch", "1", "--pictures", "4", "--side", "84", "--teacher", "nano", "--draw", "1"]
    monkeypatch.setattr(sys, "argv", ["real_weights.py", *given, *small, "--every", "2"])
    script = runpy.run_path(str(EXAMPLES / "real_weights.py"), run_name="__main__")
    names = students.split(",")
    rows = {row["student"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert sorted(rows) == sorted(names) and all(row["steps"] == 8 and len(row["losses"]) == 4 for row in rows.values())
    for name, row in rows.items():  # the others begin next to their teacher, on so small a grid
        assert row["after"]["attention"] < row["before"]["attention"] or name != "linfusion"
    assert f"{model}, {names[0]}: 8 steps" in capsys.readouterr().out
    found = distilled(out, model)
    assert sorted(c.name for c in found) == sorted(f"{name} distilled" for name in names)
    task = script["MODELS"][model](SimpleNamespace(files=tmp_path, out=out), torch.device("cpu"))
    inputs = task.inputs(torch.Generator().manual_seed(0), torch.device("cpu")) if model == "dinov2" else None
    dense = copy.deepcopy(task.model)
    conversion = found[0].put_into(task.model, host=task.host)
    changed = [n for n, p in dense.named_parameters() if not torch.equal(p, task.model.get_parameter(n))]
    assert changed and all("attn" in name or "attentions" in name for name in changed)
    if inputs is not None:
        assert not torch.equal(task.run(task.model, inputs), task.run(dense, inputs))
    conversion.revert()
    assert all(torch.equal(p, task.model.get_parameter(n)) for n, p in dense.named_parameters())
