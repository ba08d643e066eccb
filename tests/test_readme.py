"""README and pages run, with tiny models standing in for hub names; their figures are the stored ones."""

import copy
import functools
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from layers import LEVELS, ORDER

from vision_attn.bench.run import find_entries
from vision_attn.cli import main
from vision_attn.demo import load_teacher
from vision_attn.distill.reading import read_config
from vision_attn.distill.student import make_student
from vision_attn.processors import REGISTRY, Schedule

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in
         (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))}  # fmt: skip
GUIDES = PAGES | {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.glob("examples/*/README.md")}
README = PAGES["README.md"]
TEXT = " ".join(" ".join(PAGES.values()).split())
TINY = '__import__("tiny_pipelines")'
STAND_INS = {
    'FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")': (
        '__import__("vision_attn.demo").demo.load_teacher("nano")'
    ),
    '"a lighthouse in a storm", height=2048, width=2048': '"red apple", num_inference_steps=2',
    '"a lighthouse in a storm", height=1024, width=1024': '"red apple", num_inference_steps=2, height=64, width=64',
    "compile_repeated_blocks(fullgraph=True)": 'compile_repeated_blocks(fullgraph=True, backend="eager")',
    '"vit_base_patch14_reg4_dinov2.lvd142m", pretrained=True': '"vit_tiny_patch16_224", img_size=64, patch_size=4',
    "torch.randn(1, 3, 224, 448)": "torch.randn(1, 3, 64, 128)",
    "load_teacher()": 'load_teacher("nano")',
    "StableDiffusionXLPipeline.from_pretrained(sdxl, torch_dtype=torch.float16)": f"{TINY}.build_sdxl()",
    'pipe.load_lora_weights("nerijs/pixel-art-xl")': f"{TINY}.add_lora(pipe.unet)",
    'pipe.load_ip_adapter("h94/IP-Adapter", subfolder="sdxl_models", weight_name="ip-adapter_sdxl.bin")': (
        f"{TINY}.load_ip_adapter(pipe)"
    ),
    'ChromaPipeline.from_pretrained("lodestones/Chroma1-HD", torch_dtype=torch.bfloat16)': (f"{TINY}.build_chroma()"),
    "prompt_embeds=embeds, prompt": "height=64, width=64, num_inference_steps=1, prompt_embeds=embeds, prompt",
    'conversion = vision_attn.load(pipe, "out/adapter")': (
        "import vision_attn, quantised_hosts\n"
        'pipe = quantised_hosts.beside_its_lora(load_teacher("nano"), "out/adapter")\n'
        'conversion = vision_attn.load(pipe, "out/adapter")'
    ),
    "pipe.enable_model_cpu_offload()": (
        '__import__("accelerate").cpu_offload_with_hook(pipe.unet, execution_device=torch.device("cpu"))\n'
        f'pipe(**{TINY}.PIPELINE["sdxl"].call(64, 64), **{TINY}.ip_adapter_inputs(pipe))\n'
        'assert set(conversion.status.values()) == {"rerouted"}'
    ),
}


IN_PROCESSES = "docs/parallel.md"  # tests/parallel runs its programs


def blocks(page, language):
    """Return the blocks of a page with the lines that they begin at."""
    found = re.finditer(rf"```{language}\n(.*?)```", GUIDES[page], flags=re.DOTALL)
    return [(GUIDES[page][: match.start()].count("\n") + 1, match[1]) for match in found]


SETTINGS = {page: [text for _, text in blocks(page, "yaml")] for page in PAGES if blocks(page, "yaml")}


@pytest.fixture
def _registry(monkeypatch):
    """Forget the processors that a page registers, and what it compiles."""
    known = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(known)
    torch._dynamo.reset()


def is_compiled(block):
    return "compile_" in block


CODE = [pytest.param(page, False, id=page) for page in PAGES if blocks(page, "python") and page != IN_PROCESSES]
CODE += [pytest.param(page, True, id=f"{page}, compiled", marks=pytest.mark.slow) for page in PAGES
         if any(is_compiled(block) for _, block in blocks(page, "python"))]  # fmt: skip


def test_every_block_has_a_language_that_is_tested():
    """Text is no program: the order of imports."""
    found = [
        (page, fence, text.splitlines()[0])
        for page in PAGES for fence, text in re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    ]  # fmt: skip
    left = [(page, text) for page, fence, text in found if fence not in ("python", "bash", "yaml")]
    assert sorted(left) == [(page, "_compat, _checks < grid < kernels < processors < hosts, backbones < adapters, "
                                   "estimation, graphs, parallel < conversion") for page in
                            ("CONTRIBUTING.md", "docs/architecture.md")]  # fmt: skip
    assert len(found) > 40


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("page, compiled", CODE)
def test_code_runs(page, compiled, tmp_path, monkeypatch):
    """The blocks of a page run in their order; those that compile are slow."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for line, block in blocks(page, "python"):
        if is_compiled(block) and not compiled:
            continue
        code = functools.reduce(lambda code, pair: code.replace(*pair), STAND_INS.items(), block)
        exec(compile("\n" * line + code, page, "exec"), names)


def test_every_stand_in_is_used():
    assert not [name for name in STAND_INS if name not in "".join(PAGES.values())]


def test_the_readme_is_one_screen_long():
    assert README.count("\n") <= 150 and len(README.encode()) <= 9000


def test_the_readmes_table_has_every_processor():
    rows = re.findall(r"^\| \[`(\w+)[(.].*?\| (\S+) \| [^|]* \|$", README, flags=re.MULTILINE)
    known = {registration.spec.__name__ for registration in REGISTRY.values() if registration.spec is not Schedule}
    assert {name for name, _ in rows} == known
    assert all((ROOT / "vision_attn" / "kernels" / kernel.strip("`")).is_dir() for _, kernel in rows if "`" in kernel)


def test_the_layers_are_those_of_the_imports():
    order = " < ".join(", ".join(row) for row in ORDER)
    for page in ("docs/architecture.md", "CONTRIBUTING.md"):
        (said,) = [block for _, block in blocks(page, "text") if "<" in block]
        assert " ".join(said.split()) == order
    table = re.findall(r"^\| (`.*?) \|", PAGES["docs/architecture.md"], flags=re.MULTILINE)
    named = {name.strip("/").removesuffix(".py") for row in table for name in re.findall(r"`(.+?)`", row)}
    assert named == set(LEVELS) - {"_compat", "_checks", "grid"}


def stored(name):
    return json.loads((ROOT / name).read_text())


def said(pattern):
    """Return what a pattern captures, of every place in the pages where it occurs."""
    return set(re.findall(pattern, TEXT))


def test_the_teachers_figures_are_the_measured_ones():
    figures = stored("docs/teacher.json")
    base = figures["base"]
    best = base["28_steps_h200"]
    assert said(r"([\d.]+ M) parameters, ([\d.]+) minutes on") == {
        (f"{base['parameters'] / 1e6:.1f} M", f"{base['training_minutes']}")
    }
    assert said(r"reach ([\d.]+) dB to the icon") == {f"{best['psnr_db']}"}
    assert said(r"the right one for (\d+ of \d+)") == {f"{round(best['top1'] * figures['prompts'])} of 48"}


def test_the_unet_teachers_figures_are_the_measured_ones():
    figures = stored("docs/teacher_unet.json")
    unet, training = figures["unet"], figures["training"]
    best = unet["28_steps_guidance_3"]
    minutes = sum(training[run]["minutes"] for run in ("first", "finish", "last"))
    right = round(best["top1"] * figures["prompts"])
    assert said(r"`vision-attn demo --teacher unet`\): (.*?) \(\[sheet") == {
        f"{unet['parameters'] / 1e6:.1f} M parameters, {minutes:.1f} minutes, {best['psnr_db']} dB, {right} of 48"
    }


def test_figures_in_the_text_are_the_stored_ones():
    two = stored("docs/distill_two_gpus.json")["throughput_per_gpu"]
    assert said(r"each GPU does (\d+) % and (\d+) %") == {(f"{two['ddp']:.0%}"[:-1], f"{two['fsdp']:.0%}"[:-1])}
    seconds = [row["seconds"] for row in stored("docs/distill.json")["rows"]]
    assert said(r"distilled for (\d+) to (\d+) seconds") == {(f"{min(seconds):.0f}", f"{max(seconds):.0f}")}
    rows = {row["case"]: row for row in stored("bench/results/pipelines_h200.json")["rows"]}
    (large,) = [c["forward"] for c in rows["sdxl-16384"]["candidates"] if c["forward"]]
    assert said(r"SDXL at 16384 px takes (\d+) GiB") == {f"{large['memory']['bytes'] / 2**30:.0f}"}
    native = {c["name"]: c["forward"] for c in rows["flux-1024"]["candidates"]}
    assert said(r"FLUX at 1024 px gains (\d+) %") == {f"{native['clear r16']['speedup'] - 1:.0%}"[:-1]}
    assert all(c["forward"]["speedup"] <= 1 for c in rows["sdxl-1024"]["candidates"])  # "SDXL is slower there"


def test_the_checks_in_the_text_are_the_stored_ones():
    linear, local = (stored(f"bench/results/check_{kind}_h200.json")["check"] for kind in ("linear", "local"))
    assert said(r"All (\d+) checks against float64") == {f"{len(linear)}"}
    assert said(r"All (\d+) calls of local attention are within the budget") == {f"{len(local)}"}
    assert max(max(row.values()) for row in (*linear.values(), *local.values())) <= 1


@pytest.fixture(scope="module")
def fill():
    spec = importlib.util.spec_from_file_location("fill", ROOT / "docs" / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_the_stored_results(fill):
    """`python docs/fill.py` would change nothing, and each table stands in one page."""
    pages = {path.relative_to(ROOT).as_posix(): path.read_text() for path in fill.pages()}
    assert [name for name, text in pages.items() if fill.filled(text) != text] == []
    assert sorted(fill.PLACE.findall("\n".join(pages.values()))) == sorted(fill.TABLES)
    assert all(text.count("<!-- end -->") == len(fill.PLACE.findall(text)) for text in pages.values())


@pytest.mark.parametrize("page, was, wrong", [("README.md", "1.42x", "1.43x"), ("docs/benchmarks.md", "ms |", "s |")])
def test_a_wrong_figure_is_found(fill, page, was, wrong):
    text = PAGES[page]
    assert text.count(was) and fill.filled(text.replace(was, wrong, 1)) == text


def test_the_first_picture_is_cut_from_the_sheet(fill):
    from PIL import Image, ImageChops, ImageStat

    cut, kept = fill.first_picture().convert("RGB"), Image.open(ROOT / "docs" / "readme.jpg")
    assert kept.size == cut.size
    assert max(ImageStat.Stat(ImageChops.difference(cut, kept)).mean) < 2  # out of 255: JPEG's rounding


def anchors(text):
    """Return the anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", GUIDES)
def test_the_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)]+)\)", GUIDES[page])
    for link in links:
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
    for path in re.findall(r"`((?:vision_attn|tests|examples|docs|bench|\.ci)/[\w./]+)`", GUIDES[page]):
        assert (ROOT / path).exists(), path


def test_every_page_is_linked_from_the_readme():
    assert not [page for page in PAGES if page != "README.md" and f"]({page})" not in README]


@pytest.mark.parametrize("one_in", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_the_registrys_table_is_that_of_the_models(one_in):
    import timm

    import vision_attn.backbones  # noqa: F401

    rows = stored("docs/backbones.json")["rows"]
    ours = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("vision_")]
    alphas = {name for name in ours if "_alpha" in name} | {"dinat_large_11x11", "dinat_large_21k"}
    assert {row["name"] for row in rows} >= set(ours) - alphas
    for row in rows[::one_in]:
        with torch.device("meta"):
            model = timm.create_model(row["name"])
        assert sum(p.numel() for p in model.parameters()) == row["params"]


@pytest.mark.slow
def test_the_first_block_imports_in_a_fresh_process():
    """The suite has mended torchvision by now; a user has not."""
    imports = [line for line in blocks("README.md", "python")[0][1].splitlines() if "import " in line]
    done = subprocess.run([sys.executable, "-c", "\n".join(imports)], capture_output=True, text=True, check=False)
    assert imports and done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", SETTINGS)
def test_the_settings_can_be_read(page, tmp_path):
    """Those of recipes go into a file that has the rest. Each stage is that of a teacher which is here."""
    (text,) = SETTINGS[page]
    rest = {"model": {"base": "emoji:nano"}, "data": {"cache": "cache", "batch_size": 2}, "run": {"out": "out"}}
    given = yaml.safe_load(text)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(rest | given))
    config = read_config(["--config", str(tmp_path / "settings.yaml")], "test")
    assert given and len(config.each_stage()) == len(given.get("stages", [1]))
    pipe = load_teacher("nano")
    for stage in config.each_stage():
        fresh = replace(stage.student, adapter=None)
        assert make_student(replace(stage, stages=[], student=fresh), copy.deepcopy(pipe)).parameters


def test_the_targets_that_pages_and_ci_name_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    in_ci = set(re.findall(r"^ *step make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE))
    assert {"lint", "test"} <= in_ci <= targets
    assert {"lint", "test", "docs"} <= said(r"`?\bmake ([\w-]+)(?=`| #)") <= targets


SHELL = dict.fromkeys(re.split(r"\s\s+#", line.strip())[0] for page in GUIDES for _, block in blocks(page, "bash")
                      for line in block.strip().splitlines())  # fmt: skip
SMALL = {  # what stands for what takes long
    "generate emoji ": "generate emoji-nano ",
    "--processor clear:radius=8 --out clock.png": "--processor clear:radius=8 --num-inference-steps 2 --out clock.png",
    "--highres --height 512 --width 512": "--highres --height 64 --width 64 --level-inference-steps 1",
    "vit_base_patch16_224 --height 1024 --width 1024": "vit_tiny_patch16_224 --height 256 --width 256",
    "accelerate launch -m vision_attn.distill": "vision-attn distill",
    " --config ": " --print-config --config ",  # all of them are of distillations
    "torchrun --nproc-per-node 2 -m vision_attn.cli": "vision-attn",
}


LINES = [pytest.param(line, marks=[pytest.mark.slow] * ("bench plot" in line)) for line in SHELL]


@pytest.mark.parametrize("line", LINES, ids=[" ".join(line.split()[:4]) for line in SHELL])
def test_every_command_runs(line, tmp_path, monkeypatch, capsys):
    for text, small in SMALL.items():
        line = line.replace(text, small)
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program, *arguments = words
    if "my_flux.yaml" in words:
        (tmp_path / "my_flux.yaml").write_text(SETTINGS["docs/flux-in-an-evening.md"][0])
    if program == "make":
        assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
    elif program == "pip":
        for extra in re.findall(r"\[(.*?)\]", line):
            assert re.search(rf"^{extra} =", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
        assert "--constraint" not in line or (ROOT / "constraints.txt").is_file()
    elif arguments[:2] == ["-m", "pytest"]:
        markers = re.findall(r'^ {4}"(\w+):', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        (marker,) = re.findall(r"-m ['\"]?(?:not )?(\w+)['\"]?(?: |$)", line.partition("pytest")[2])
        assert marker in markers and all((ROOT / word).exists() for word in arguments if word.startswith("tests"))
    elif program == "npm":
        assert arguments[0] == "pack"
    elif program == "torchrun":
        assert arguments[-1] == "draw.py"  # the program below it
    elif program == "python":
        script = (ROOT / arguments[0]).read_text()
        assert all(f'"{word}"' in script for word in arguments if word.startswith("--"))
    elif words[:2] == ["vision-attn", "gallery"] or (words[1] == "bench" and words[2] not in ("table", "plot")):
        assert words[1] == "gallery" or find_entries(words[2])
    elif words[:2] == ["vision-attn", "tune"]:  # ten minutes of a GPU; without one it says that it needs one
        found = main([*arguments, "--minutes", "0", "--out", str(tmp_path / "launches.json")])
        assert found == (0 if torch.cuda.is_available() else 2)
        assert torch.cuda.is_available() or "GPU" in capsys.readouterr().err
    else:
        assert program == "vision-attn"
        monkeypatch.chdir(tmp_path)
        assert main([str(ROOT / word) if (ROOT / word).is_file() else word for word in arguments]) == 0
