"""Write the measured tables of the README and of the pages in docs/ from the stored results.

python docs/fill.py

A table stands between `<!-- its name -->` and `<!-- end -->`. A test fails when a table is not what this script writes.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vision_attn.bench.entries.parallel import predictions
from vision_attn.bench.entries.quality_tokens import CANDIDATES as TOKENS
from vision_attn.bench.entries.training import fitting
from vision_attn.bench.pipelines.attention import STOCK, WAYS
from vision_attn.bench.quality.contenders import (
    DEFAULT,
    DISCS,
    DISTILLED,
    EVERY,
    MULTIPOLES,
    POOLED,
    SPREAD,
    Contender,
)
from vision_attn.bench.quality.fidelity import fidelity_lines
from vision_attn.bench.run import find_entries

ROOT = Path(__file__).parent.parent


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def stored(name: str) -> dict[str, Any]:
    """Read a result."""
    return json.loads((ROOT / name).read_text())


def discs() -> str:
    """Local attention with text beside its peers."""
    rows = []
    for row in stored("bench/results/kernels_local_h200.json")["rows"]:
        if row["group"] != "Discs":
            continue
        by_name = {candidate["name"]: candidate for candidate in row["candidates"]}
        ours = by_name["ours"]
        side, radius = re.match(r"(\d+) x \d+, radius (\d+)", row["label"]).groups()  # type: ignore[union-attr]
        ratios = [f"{by_name[peer]['forward']['ratio']:.1f}x" for peer in ("cuDNN", "Flex raster")]
        forward, backward = (ours[key]["median_ms"] for key in ("forward", "backward"))
        peer = by_name.get("FA4 tiles", {})
        sparse = [f"{peer[key]['ratio']:.2f}x" if peer.get(key) else "" for key in ("forward", "backward")]
        forward_cells = f"{forward:.3f} ms", *ratios, sparse[0]
        rows.append([f"{side} x {side}", radius, *forward_cells, f"{backward:.3f} ms", sparse[1]])
    head = ["grid", "radius", "forward", "against cuDNN dense", "against FlexAttention", "against FlashAttention-4"]
    head += ["backward", "backward against FlashAttention-4"]
    kept = [n for n in range(len(head)) if any(row[n] for row in rows)]  # a peer may have been absent
    return table([head[n] for n in kept], [[row[n] for n in kept] for row in rows])


def fa4() -> str:
    """Local attention beside FlashAttention-4 over 2-D tiles, forward and backward."""
    rows = []
    for row in stored("bench/results/kernels_local_fa4_h200.json")["rows"]:
        by_name = {candidate["name"]: candidate for candidate in row["candidates"]}
        side, radius = re.match(r"(\d+) x \d+, radius (\d+)", row["label"]).groups()  # type: ignore[union-attr]
        cells = []
        for which in ("forward", "backward"):
            own, peer = (by_name[name][which]["median_ms"] for name in ("ours", "FA4 tiles"))
            cells += [f"{own:.3f} ms", f"{peer:.3f} ms", f"{peer / own:.2f}x"]
        rows.append([f"{side} x {side}", radius, *cells])
    head = [f"{which}, {name}" for which in ("forward", "backward") for name in ("ours", "FlashAttention-4", "faster")]
    return table(["grid", "radius", *head], rows)


def eight_bits() -> str:
    """Whole operators in 8 bits beside those in 16."""
    rows = []
    for name in ("local", "multipole"):
        for row in stored(f"bench/results/kernels_{name}_eight_bits_h200.json")["rows"]:
            by_name = {candidate["name"]: candidate["forward"] for candidate in row["candidates"]}
            own, cells = by_name["ours"]["median_ms"], []
            for kind in ("int8", "fp8"):
                found = by_name[kind]
                cells.append(f"{found['median_ms']:.2f} ms ({own / found['median_ms']:.2f}x)" if found else "-")
            rows.append([row["label"].removesuffix(", D 128, bf16"), f"{own:.2f} ms", *cells])
    return table(["operator", "bf16", "`int8`", "`fp8`"], rows)


def squares() -> str:
    """Neighborhood attention beside dense attention."""
    rows = []
    for row in stored("bench/results/kernels_local_h200.json")["rows"]:
        if row["group"] not in ("Squares, D 128", "Dilation"):
            continue
        by_name = {candidate["name"]: candidate for candidate in row["candidates"]}
        side, window = re.match(r"(\d+) x \d+, (.*), D 128", row["label"]).groups()  # type: ignore[union-attr]
        forward = by_name["ours"]["forward"]["median_ms"]
        rows.append([f"{side} x {side}", window, f"{forward:.3f} ms", f"{by_name['cuDNN']['forward']['ratio']:.1f}x"])
    return table(["grid", "window", "forward", "against cuDNN dense"], rows)


def backbones() -> str:
    """The registry: parameters, multiply-accumulates, published accuracy."""
    rows = [
        [
            f"`{row['name']}`",
            row["size"],
            f"{row['params'] / 1e6:.1f} M",
            f"{row['macs'] / 1e9:.1f} G",
            "-" if row["top1"] is None else f"{row['top1']:.1f} %",
        ]
        for row in stored("docs/backbones.json")["rows"]
    ]
    return table(["name", "pixels", "parameters", "MACs", "published top-1"], rows)


def demo() -> str:
    """What the demo drew and how long it took."""
    rows = [
        [
            f"{row['pixels']} px",
            f"`{row['processor']}`",
            row["training"],
            row["tokens"],
            f"{row['attended']:.1%}",
            "-" if row["seconds"] is None else f"{row['seconds']:.1f}",
            "-" if row["psnr"] is None else f"{row['psnr']:.1f} dB",
        ]
        for row in stored("docs/demo.json")["rows"]
    ]
    return table(["size", "attention", "training", "tokens", "attended", "seconds", "PSNR to dense"], rows)


def linear() -> str:
    """The linear family beside copies of the same tensors and the papers' formulas."""
    rows = []
    for row in stored("bench/results/kernels_linear_h200.json")["rows"]:
        by_name = {c["name"]: c for c in row["candidates"] if not c["reason"]}
        what = re.sub(r", floor .*", "", row["label"])
        cells = [row["group"], what]
        for which in ("forward", "backward"):
            timed = {name: c[which]["median_ms"] for name, c in by_name.items() if c.get(which)}
            mine = timed.get("ours")
            cells.append(f"{mine:.3f} ms" if mine else "-")
            cells.append(f"{timed['copy'] / mine:.0%}" if mine and "copy" in timed else "-")
            if which == "forward":
                peers = [f"{name} {timed[name] / mine:.1f}x" for name in ("compiled", "eager", "SDPA") if name in timed]
                cells.append(", ".join(peers) or "-")
        rows.append(cells)
    head = ["attention", "shape", "forward", "of copying", "faster than", "backward", "of copying"]
    return table(head, rows)


def steps() -> list[dict[str, Any]]:
    """Return the measured denoising steps, those of one denoiser together: first eager, then compiled, by size."""
    rows = stored("bench/results/pipelines_h200.json")["rows"]
    groups = [row["group"] for row in rows]
    return sorted(rows, key=lambda row: (groups.index(row["group"]), is_compiled(row), row["shape"]["pixels"]))


def is_compiled(row: dict[str, Any]) -> bool:
    """Whether all candidates of a row were compiled."""
    return row["shape"]["mode"] == "compiled"


def timed(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what was measured of each candidate that ran."""
    return {c["name"]: c["forward"] for c in row["candidates"] if c["forward"]}


def stock_step(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the step with the fastest stock attention, None if none ran."""
    known = [forward for name, forward in timed(row).items() if name in STOCK]
    return min(known, key=lambda forward: forward["median_ms"], default=None)


def bracketed(text: str, step: dict[str, Any]) -> str:
    """Put the time of a step in brackets if it is extrapolated."""
    return f"({text})" if step["extrapolated"] else text


def factor(forward: dict[str, Any] | None) -> str:
    """Return how many times faster a candidate is than stock; its seconds where stock did not run."""
    if forward is None:
        return "-"
    return f"{forward['speedup']:.2f}x" if forward["speedup"] else f"{forward['median_ms'] / 1e3:.2f} s"


def size_of(row: dict[str, Any]) -> str:
    """Return the size of a row, and whether it is the native one."""
    return row["label"].partition(",")[0]


def speed() -> str:
    """The README's table: whole denoising steps with CLEAR and LinFusion, not compiled and compiled."""
    compiled = {(row["group"], row["shape"]["pixels"]): timed(row) for row in steps() if is_compiled(row)}
    rows = []
    for row in steps():
        stock = stock_step(row)
        if is_compiled(row) or row["group"] not in SHOWN or stock is None:
            continue
        own, twin = timed(row), compiled.get((row["group"], row["shape"]["pixels"]), {})
        clear = SHOWN[row["group"]]
        cells = [factor(found.get(name)) for found in (own, twin) for name in (clear, "linfusion")]
        ms = stock["median_ms"]
        seconds = bracketed(f"{ms:.0f} ms" if ms < 1e3 else f"{ms / 1e3:.1f} s", stock)
        rows.append([row["group"], size_of(row), seconds, *cells])
    head = ["denoiser", "size", "stock step", "CLEAR", "LinFusion", "CLEAR, compiled", "LinFusion, compiled"]
    return table(head, rows)


SHOWN = {  # the denoisers of the README's table, and which CLEAR was run on all their sizes
    "FLUX.1-dev": "clear r16",
    "Stable Diffusion XL": "clear r8",
    "Stable Diffusion 3.5 medium": "clear r16",
    "PixArt-Sigma": "clear r16",
}


def pipelines() -> str:
    """Whole denoising steps: seconds of the fastest stock attention, and by what factor each other is faster."""
    names = {name for row in steps() for name in timed(row)}
    others = [name for name in WAYS if name in names and name not in STOCK]
    rows = []
    for row in steps():
        stock, factors = stock_step(row), [factor(timed(row).get(name)) for name in others]
        seconds = "-" if stock is None else bracketed(f"{stock['median_ms'] / 1e3:.3f} s", stock)
        rows.append([row["group"], size_of(row) + ", compiled" * is_compiled(row), seconds, *factors])
    return table(["denoiser", "size", "stock", *others], rows)


def multipole_steps() -> str:
    """Denoising steps with multipole attention beside a disc, and by what factor each is faster than stock."""
    rows = []
    for row in stored("bench/results/pipelines_multipole_h200.json")["rows"]:
        stock, own = stock_step(row), timed(row)
        assert stock is not None
        cells = [factor(own.get(name)) for name in ("clear r16", "multipole", "multipole e0")]
        if any(c["name"] == "multipole" and "spread=0.0" in c["computes"] for c in row["candidates"]):
            cells[1] += " (`spread=0`)"
        seconds = bracketed(f"{stock['median_ms'] / 1e3:.3f} s", stock)
        rows.append([row["group"], size_of(row) + ", compiled" * is_compiled(row), seconds, *cells])
    return table(["denoiser", "size", "stock", "`Clear(16)`", "`Multipole()`", "`Multipole(exact=0)`"], rows)


def newer() -> str:
    """Denoising steps of newer models, and with weights in float8, beside stock."""
    rows = []
    for name in ("newer", "float8"):
        for row in stored(f"bench/results/pipelines_{name}_h200.json")["rows"]:
            stock, own = stock_step(row), timed(row)
            assert stock is not None
            cells = [factor(own.get(way)) for way in ("clear r16", "multipole")]
            rows.append([row["group"], size_of(row), bracketed(f"{stock['median_ms'] / 1e3:.3f} s", stock), *cells])
    return table(["denoiser", "size", "stock", "`Clear(16)`", "`Multipole()`"], rows)


def multipole_kernels() -> str:
    """The operator of multipole attention beside local attention in a disc, forward and backward."""
    rows = []
    for row in stored("bench/results/kernels_multipole_h200.json")["rows"]:
        own, disc = row["candidates"][:2]
        cells = []
        for which in ("forward", "backward"):
            mine, other = own[which], disc[which]
            cells += (
                [f"{mine['median_ms']:.2f} ms", f"{mine['median_ms'] / other['median_ms']:.2f}x"] if mine else ["-"] * 2
            )
        both = own["forward"] and own["backward"]
        cells.append(f"{own['backward']['median_ms'] / own['forward']['median_ms']:.2f}x" if both else "-")
        rows.append([row["label"].removesuffix(", D 128, bf16"), *cells])
    return table(["grid and setting", "forward", "of a disc's", "backward", "of a disc's", "of the forward"], rows)


def graphs() -> str:
    """Steps at native sizes: eager, and from CUDA graphs, as factors of stock as users run it."""
    rows = []
    for row in stored("bench/results/pipelines_native_h200.json")["rows"]:
        own, stock = timed(row), stock_step(row)
        assert stock is not None
        cells = []
        for name in ("stock sdpa", "clear r8", "multipole"):
            graph = own[name]["graphs"]["median_ms"]
            cells += [f"{own[name]['median_ms']:.0f} ms", f"{graph:.1f} ms ({stock['median_ms'] / graph:.2f}x)"]
        rows.append([row["group"], size_of(row), *cells])
    names = [f"{name}, {way}" for name in ("stock", "`Clear(8)`", "`Multipole()`") for way in ("eager", "graph")]
    return table(["denoiser", "size", *names], rows)


def host() -> str:
    """What a step takes the host, beside stock."""
    rows = []
    for row in stored("bench/results/host_h200.json")["rows"]:
        stock = next(c["forward"] for c in row["candidates"] if c["name"] == "stock")
        for one in row["candidates"]:
            times = [
                f"{one['forward'][key]:.0f} ms ({one['forward'][key] / stock[key]:.2f}x)"
                for key in ("median_ms", "min_ms")
            ]
            what = one["name"] if one["name"] in ("stock", "left alone") else f"`{one['computes']}`"
            rows.append([f"{row['group']}, {size_of(row)}", what, *times])
    return table(["denoiser", "attention", "host time of a step", "least"], rows)


TRAINING = tuple(f"bench/results/{name}_h200.json" for name in ("training", "training_flash"))


def training() -> str:
    """Training steps of FLUX.1-dev: seconds, peak memory and the smallest GPU that holds it; two runs."""
    rows = []
    for row in (row for path in TRAINING for row in stored(path)["rows"]):
        weights = row["group"].partition("frozen weights in ")[2]
        for name, step in timed(row).items():
            seconds = bracketed(f"{step['median_ms'] / 1e3:.2f} s", step)
            memory = bracketed(f"{step['memory']['bytes'] / 2**30:.0f} GiB", step)
            faster = f"{step['speedup']:.1f}x" if step["speedup"] else "-"
            rows.append([weights, size_of(row), name, seconds, faster, memory, fitting(step)])
    return table(["frozen weights", "size", "attention", "a step", "of dense", "peak", "smallest GPU"], rows)


def missed() -> str:
    """What was aimed at, measured, and not reached, of all stored results."""
    rows = [
        [f"{row['group']}, {row['label']}", must["text"], measured(must), row.get("date", "-")]
        for path in sorted((ROOT / "bench" / "results").glob("[!c]*.json"))
        for row in json.loads(path.read_text())["rows"]
        for must in row.get("musts") or ()
        if not must["holds"]
    ]
    return table(["case", "aim", "measured", "date"], rows)


def measured(must: dict[str, Any]) -> str:
    """Return the cell of what was measured; a candidate that failed has nothing."""
    return "-" if must["value"] is None else f"{must['value']:.3g}"


def models() -> str:
    """Whole classifiers beside the published ones that they compete with, and beside their dense twins."""
    rows = []
    for row in stored("bench/results/models_h200.json")["rows"]:
        by_name = {c["name"]: c["forward"] for c in row["candidates"] if c["forward"]}
        for name in dict.fromkeys(candidate["computes"] for candidate in row["candidates"]):
            modes = [by_name.get(f"{name} {mode}") for mode in ("eager", "compiled", "eager graph")]
            rate = f"{modes[0]['images_per_s']:.0f}" if modes[0] else "-"
            speedups = [f"{mode['speedup']:.2f}x" if mode else "-" for mode in modes]
            rows.append([f"{row['shape']['size']} px", f"`{name}`", rate, *speedups])
    return table(["images", "model", "images/s, eager", "eager", "compiled", "CUDA graph"], rows)


def distilled() -> str:
    """What a distillation changes."""
    rows = []
    for row in stored("docs/distill.json")["rows"]:
        before, after = row["before"], row["after"]
        keys = (("kd_error_mean", ".4f"), ("psnr_db", ".1f"), ("retrieval_top1", ".0%"), ("kid_pixels_x1000", ".3f"))
        cells = [f"{before[key]:{form}} → {after[key]:{form}}" for key, form in keys]
        start = ", all projections" * row["name"].endswith("_all")
        start += ", from random projections" * (row["init"] == "random")
        pixels = row.get("pixels", 128)
        start += f", {pixels} px" * (pixels != 128)
        steps = f"{row['steps']} of {row['batch']}"
        rows.append([row["teacher_name"], f"`{row['spec']}`{start}", steps, *cells])
    head = ["teacher", "student", "steps of batch", "KD error", "PSNR to the teacher", "retrieval", "KID x 1000"]
    return table(head, rows)


def recipes() -> str:
    """What each recipe for linear attention reaches, as `emoji_results.py --recipes` stored it."""
    if not (ROOT / "docs" / "recipes.json").exists():
        return "Not run on a GPU yet."
    rows = []
    for name, row in stored("docs/recipes.json").items():
        step, middle = min(row["curve"], key=lambda point: abs(point[0] - row["steps"] / 2))
        course = [f"{middle:.3f} at {step}"]
        after = row["after"]
        figures = [f"{after['kd_error_mean']:.3f}", f"{after['psnr_db']:.1f}", f"{after['retrieval_top1']:.0%}"]
        cells = [f"{row['steps']} of {row['batch']}", f"{row['seconds']:.0f} s", *course, *figures]
        rows.append([f"`{name.partition('-')[2]}`", f"`{row['spec']}`", row["recipe"]["about"], *cells])
    head = ["recipe", "student", "why", "steps of batch", "time", "KD error on the way", "the end"]
    return table([*head, "PSNR to the teacher", "retrieval"], rows)


def highres() -> str:
    """Pictures far above the training size."""
    names = {"base": "FLUX type", "unet": "UNet"}
    rows = []
    for r in stored("docs/highres.json")["rows"]:
        memory = f"{r['peak_bytes'] / 2**30:.2f} GiB" if r["peak_bytes"] else "-"
        where = "" if r["peak_bytes"] else " on a CPU"
        cells = [names[r["teacher"]], r["attention"], f"{r['pixels']} px", r["way"], f"{r['copies']:.1f}"]
        dense = "-" if r.get("dense_psnr_db") is None else f"{r['dense_psnr_db']:.1f} dB"
        rows.append([*cells, f"{r['truth_psnr_db']:.1f} dB", dense, f"{r['seconds']:.1f} s{where}", memory])
    head = ["teacher", "attention", "size", "drawn", "copies counted", "PSNR to the icon", "to dense", "a picture"]
    return table([*head, "peak memory"], rows)


def fidelity(entry: str) -> list[dict[str, Any]]:
    """Read the rows of a result of `bench quality`: of the H200 and of a CPU; none if neither was stored."""
    names = [f"bench/results/{entry}_{device}.json" for device in ("h200", "cpu")]
    documents = [stored(name) for name in names if (ROOT / name).exists()]
    return [row | dict(device=document["device"]) for document in documents for row in document["rows"]]


def fidelity_tables(entry: str, names: Sequence[str]) -> str:
    """A table for each model of a result of `bench quality`: of a GPU where there is one.

    The default of multipole attention is bold.

    Args:
        entry: The entry.
        names: The contenders to show, with those of them that were distilled.
    """
    found, module = {row["case"]: row for row in reversed(fidelity(entry))}, find_entries(entry)[0]
    parts, order = [], [name + mark for name in names for mark in ("", DISTILLED)]
    every = sorted(found.values(), key=lambda row: row["shape"]["pixels"])
    for group in dict.fromkeys(row["group"] for row in every):
        rows = [
            row | dict(candidates=sorted(known, key=lambda c: order.index(c["name"])))
            for row in every if row["group"] == group
            for known in [[c for c in row["candidates"] if c["name"] in order]]
        ]  # fmt: skip
        devices = dict.fromkeys(row["device"] for row in rows)
        where = ", ".join(
            f"{' and '.join(row['label'] for row in rows if row['device'] == device)} on {device}" for device in devices
        )
        lines = fidelity_lines(rows, module.MEASURES).replace(f"| {DEFAULT.name} |", f"| **{DEFAULT.name}** |")
        parts += [f"**{group}**, {where}", lines]
    return "\n\n".join(parts) or f"No result is stored yet: `vision-attn bench {entry}` measures it."


def names_of(contenders: Sequence[Contender]) -> list[str]:
    """Return the names of contenders, each once."""
    return list(dict.fromkeys(contender.name for contender in contenders))


def untrained() -> str:
    """The README's table: how near the default of multipole attention stays, and CLEAR."""
    rows = []
    for entry, case, measure, title, form in UNTRAINED:
        for row in (row for row in fidelity(entry) if row["case"] == case):
            found = {c["name"]: c["quality"] for c in row["candidates"] if c["quality"]}
            if DEFAULT.name not in found:
                continue
            cells = [f"{found[name][measure]:{form}}" for name in ("clear r8", "clear r16", DEFAULT.name)]
            rows.append([f"{row['group']}, {row['label']}", title, *cells])
    return table(["model", "measure", "`Clear(radius=8)`", "`Clear(radius=16)`", "`Multipole()`"], rows)


def data_free() -> str:
    """What a distillation without data changes: a line for each student, from the results of `bench quality`.

    docs/distill_real.json is what examples/distill/real_weights.py wrote.
    """
    path = "docs/distill_real.json"
    runs = {(r["model"], r["student"]): r for r in stored(path)["rows"]} if (ROOT / path).exists() else {}
    rows = []
    for entry, measures in DATA_FREE.items():
        for row in fidelity(entry):
            found = {c["name"]: c["quality"] for c in row["candidates"] if c["quality"]}
            for name in found:
                plain = name.removesuffix(DISTILLED)
                if plain != name and plain in found:
                    cells = [f"{found[plain][key]:{form}} → {found[name][key]:{form}}" for key, form in measures]
                    run = runs.get((entry.removeprefix("quality_"), plain))
                    trained = f"{run['steps']} of {run['batch']} in {run['seconds']:.0f} s" if run else "-"
                    rows.append([f"{row['group']}, {row['label']}", plain, trained, *cells])
    if not rows:
        return "Not measured yet: `examples/distill/real_weights.py` and `vision-attn bench quality --adapters` do it."
    return table(["model", "attention", "steps", "cosine, or error at sigma 80", "error, or PSNR of the map"], rows)


DATA_FREE = {
    "quality_dinov2": (("cosine", ".3f"), ("error", ".2g")),
    "quality_terrain": (("sigma_80", ".2g"), ("psnr_db", ".1f")),
}


def choice() -> str:
    """Rules for the choice of exact cells: a line for each, a column for each model."""
    rows = stored("docs/multipole_choice.json")["rows"]
    errors = {(row["rule"], row["source"]): f"{row['error']:.2g}" for row in rows}
    sources = list(dict.fromkeys(row["source"] for row in rows))
    rules = dict.fromkeys(row["rule"] for row in rows)
    return table(
        ["a cell's weight", *sources], [[rule, *(errors[rule, source] for source in sources)] for rule in rules]
    )


def parallel() -> str:
    """What was measured on two GPUs, what is predicted for 4 and 8 from it, and what was measured there."""
    if not (ROOT / PARALLEL).exists():
        return "No result is stored yet: `vision-attn bench parallel` on two GPUs measures it."
    rows = []
    for row in stored(PARALLEL)["rows"]:
        for name, step in timed(row).items():
            seconds = bracketed(f"{step['median_ms'] / 1e3:.3f} s", step)
            of_one = [f"{step['speedup']:.2f}x", f"{step['efficiency']:.0%}"] if "efficiency" in step else ["-", "-"]
            moved = f"{step['moved']['bytes'] / 1e9:.2f} GB" if "moved" in step else "-"
            rows.append([row["case"], name, seconds, *of_one, moved, f"{step['memory']['bytes'] / 2**30:.1f} GiB"])
    measured = table(["case", "candidate", "a step", "of 1 GPU", "efficiency", "received", "peak memory"], rows)
    return measured + "\n\nPredicted, not measured:\n\n" + predictions(stored(PARALLEL)).strip()


PARALLEL = "bench/results/parallel_h200.json"
UNTRAINED = (
    ("quality_teachers", "flux-128", "psnr_db", "PSNR of the pictures, dB", ".1f"),
    ("quality_teachers", "unet-256", "psnr_db", "PSNR of the pictures, dB", ".1f"),
    ("quality_terrain", "terrain", "sigma_80", "error of the prediction at the highest noise", ".2g"),
    ("quality_dinov2", "dinov2-518", "cosine", "cosine of the features", ".3f"),
)
SETTINGS = names_of((*DISCS, *POOLED, *MULTIPOLES, *SPREAD))


GPUS = {
    "sm_80": "A100",
    "sm_86": "RTX 30xx, A10, A40",
    "sm_89": "RTX 40xx, L4, L40",
    "sm_90": "H100, H200",
    "sm_100": "B200",
    "sm_120": "RTX 50xx",
    "gfx942": "MI300",
    "gfx1100": "RX 7900",
}


def compiles() -> str:
    """What compiles for GPUs that are not there, by `tests/gpu/compile_matrix.py`."""
    short, rows, every = dict(bfloat16="bf16", float16="fp16", float32="fp32"), [], stored("docs/compiles.json")
    for name, about in GPUS.items():
        if name not in every:
            continue
        calls = [call for kind in every[name]["rows"].values() for call in kind.values()]
        channels: dict[str, list[str]] = {}
        for kind in every[name]["rows"]:
            dtype, D = kind.split()
            channels.setdefault(short[dtype], []).append(D)
        reached = "; ".join(f"{dtype}, D {', '.join(sorted(D, key=int))}" for dtype, D in channels.items())
        bad, refused = (sum(key in call for call in calls) for key in ("bad", "refused"))
        kernels, most = sum(call["kernels"] for call in calls), max(call["shared"] for call in calls)
        memory = f"{most / 1024:.0f} of {every[name]['limit'] / 1024:.0f} KiB"
        rows.append([f"`{name}`", about, reached, len(calls), kernels, bad, memory, refused])
    head = [
        "architecture",
        "GPUs",
        "compiled for",
        "calls",
        "kernels that compile and fit",
        "calls with one that does not",
    ]
    return table([*head, "most shared memory", "calls refused in part or whole, with a reason"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "compiles": compiles,
    "untrained": untrained,
    "quality_teachers": partial(fidelity_tables, "quality_teachers", SETTINGS),
    "settings_dinov2": partial(fidelity_tables, "quality_dinov2", SETTINGS),
    "settings_terrain": partial(fidelity_tables, "quality_terrain", SETTINGS),
    "quality_dinov2": partial(fidelity_tables, "quality_dinov2", names_of(EVERY)),
    "quality_terrain": partial(fidelity_tables, "quality_terrain", names_of(EVERY)),
    "quality_tokens": partial(fidelity_tables, "quality_tokens", names_of(TOKENS)),
    "data_free": data_free,
    "choice": choice,
    "speed": speed,
    "discs": discs,
    "fa4": fa4,
    "eight_bits": eight_bits,
    "squares": squares,
    "linear": linear,
    "pipelines": pipelines,
    "multipole_steps": multipole_steps,
    "multipole_kernels": multipole_kernels,
    "newer": newer,
    "graphs": graphs,
    "host": host,
    "missed": missed,
    "training": training,
    "models": models,
    "distilled": distilled,
    "recipes": recipes,
    "highres": highres,
    "demo": demo,
    "backbones": backbones,
    "parallel": parallel,
}
PLACE = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def pages() -> list[Path]:
    """Return the README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """Return a page with each table between its markers made anew.

    Raises:
        KeyError: If there is no table of that name.
    """
    return PLACE.sub(lambda match: f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->", text)


def first_picture() -> Image.Image:
    """Return the README's picture: the rows of the FLUX-type teacher, from the sheet of large pictures."""
    sheet = Image.open(ROOT / "docs" / "highres_sheet.jpg")
    return sheet.crop((0, 0, sheet.width, sheet.height * 2 // 5))


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text()))
    first_picture().save(ROOT / "docs" / "readme.jpg", quality=90)
