"""The README runs, with the nano teacher and a tiny ViT standing in for hub names; its figures are the stored ones."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vision_attn.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
STAND_INS = {
    'FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")': (
        '__import__("vision_attn.demo").demo.load_teacher("nano")'
    ),
    '"a lighthouse in a storm", height=2048, width=2048': '"red apple", num_inference_steps=2',
    '"vit_base_patch14_reg4_dinov2.lvd142m", pretrained=True': '"vit_tiny_patch16_224", img_size=64, patch_size=4',
    "load_teacher()": 'load_teacher("nano")',
}


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_code_runs(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = BLOCKS[index]
    for name, stand_in in STAND_INS.items():
        code = code.replace(name, stand_in)
    exec(compile(code, f"README block {index}", "exec"), {})


def test_every_stand_in_is_used():
    assert all(name in README for name in STAND_INS)


def test_the_teachers_figures_are_the_measured_ones():
    figures = json.loads((ROOT / "docs" / "teacher.json").read_text())
    base = figures["base"]
    best = base["28_steps_h200"]
    assert f"{best['psnr_db']} dB" in README and f"{base['training_minutes']} minutes" in README
    assert f"{base['parameters'] / 1e6:.1f} M parameters" in README
    assert f"{round(best['top1'] * figures['prompts'])} of {figures['prompts']}" in README


def test_the_unet_teachers_figures_are_the_measured_ones():
    figures = json.loads((ROOT / "docs" / "teacher_unet.json").read_text())
    unet, training = figures["unet"], figures["training"]
    best = unet["28_steps_guidance_3"]
    minutes = sum(training[run]["minutes"] for run in ("first", "finish", "last"))
    right = round(best["top1"] * figures["prompts"])
    text = f"{unet['parameters'] / 1e6:.1f} M parameters, {minutes:.1f} minutes, {best['psnr_db']} dB, {right} of 48"
    assert text in README.replace("\n", " ")


def stored(name):
    return json.loads((ROOT / name).read_text())


def test_figures_in_the_text_are_the_stored_ones():
    text = " ".join(README.split())
    two = stored("docs/distill_two_gpus.json")["throughput_per_gpu"]
    assert f"each GPU does {two['ddp']:.0%} and {two['fsdp']:.0%}".replace("%", " %") in text
    seconds = [row["seconds"] for row in stored("docs/distill.json")["rows"]]
    assert f"distilled for {min(seconds):.0f} to {max(seconds):.0f} seconds each" in text
    rows = {row["case"]: row for row in stored("bench/results/pipelines_h200.json")["rows"]}
    (large,) = [c["forward"] for c in rows["sdxl-16384"]["candidates"] if c["forward"]]
    assert f"SDXL at 16384 px takes {large['memory']['bytes'] / 2**30:.0f} GiB" in text
    for row in rows.values():
        for must in (must for must in row["musts"] if not must["holds"]):
            missed = f"{row['shape']['mode']} FLUX at {row['shape']['pixels']} px {must['needed']}x"
            assert f"missed: {missed}" in text and row["case"].startswith("flux")
    native = {c["name"]: c["forward"] for c in rows["flux-1024"]["candidates"]}
    assert f"FLUX at 1024 px gains {native['clear r16']['speedup'] - 1:.0%}".replace("%", " %") in text
    assert all(c["forward"]["speedup"] <= 1 for c in rows["sdxl-1024"]["candidates"])  # "SDXL's UNet is slower there"


def test_the_checks_in_the_text_are_the_stored_ones():
    text = " ".join(README.split())
    linear, local = (stored(f"bench/results/check_{kind}_h200.json")["check"] for kind in ("linear", "local"))
    assert f"All {len(linear)} checks against float64" in text and f"checks {len(local)} calls" in text
    assert max(max(row.values()) for row in linear.values()) <= 1
    over = {name: max(row.values()) for name, row in local.items() if max(row.values()) > 1}
    assert len(over) == 1 and f"dv is {next(iter(over.values())) - 1:.0%} above".replace("%", " %") in text


def test_its_tables_are_the_stored_results():
    """`python docs/fill_readme.py` would change nothing."""
    spec = importlib.util.spec_from_file_location("fill_readme", ROOT / "docs" / "fill_readme.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    assert fill.filled(README) == README
    assert fill.filled(README.replace("ms |", "s |", 1)) == README


def test_the_files_it_names_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


def test_the_registrys_table_is_that_of_the_models():
    import timm
    import torch

    import vision_attn.backbones  # noqa: F401

    rows = json.loads((ROOT / "docs" / "backbones.json").read_text())["rows"]
    ours = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("vision_")]
    alphas = {name for name in ours if "_alpha" in name} | {"dinat_large_11x11", "dinat_large_21k"}
    assert {row["name"] for row in rows} >= set(ours) - alphas
    for row in rows[::6]:
        with torch.device("meta"):
            model = timm.create_model(row["name"])
        assert sum(p.numel() for p in model.parameters()) == row["params"]


def test_the_first_block_imports_in_a_fresh_process():
    """The suite has mended torchvision by now; a user has not."""
    imports = [line for line in BLOCKS[0].splitlines() if "import " in line]
    done = subprocess.run([sys.executable, "-c", "\n".join(imports)], capture_output=True, text=True, check=False)
    assert imports and done.returncode == 0, done.stderr[-2000:]


SHELL = [line.partition("  #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
         for line in block.strip().splitlines()]  # fmt: skip
SMALL = {  # what stands for what takes long
    "vision-attn gallery": "vision-attn gallery --help",
    "generate emoji ": "generate emoji-nano ",
    "--height 512 --width 512": "--height 64 --width 64 --num-inference-steps 2 --level-inference-steps 1",
    "vit_base_patch16_224 --height 1024 --width 1024": "vit_tiny_patch16_224 --height 256 --width 256",
    "accelerate launch -m vision_attn.distill": "vision-attn distill train --print-config",
}


@pytest.mark.parametrize("line", SHELL, ids=lambda line: " ".join(line.split()[:3]))
def test_every_command_runs(line, tmp_path, monkeypatch):
    targets = (ROOT / "Makefile").read_text()
    if line.startswith("make "):
        assert f"\n{line.split()[1]}:" in targets
        return
    if line.startswith("pip install"):
        assert re.search(rf"^{re.search(r'[[](.*)[]]', line)[1]} =", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
        return
    for text, small in SMALL.items():
        line = line.replace(text, small)
    arguments = [str(ROOT / word) if (ROOT / word).is_file() else word for word in shlex.split(line)]
    assert arguments.pop(0) == "vision-attn"
    monkeypatch.chdir(tmp_path)
    try:
        assert main(arguments) == 0
    except SystemExit as stop:  # --help
        assert stop.code == 0
