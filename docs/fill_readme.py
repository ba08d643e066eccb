"""Write the README's measured tables from the stored results; a test fails when they disagree.

python docs/fill_readme.py
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vision_attn.bench.pipelines.attention import STOCK, WAYS

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
        rows.append([f"{side} x {side}", radius, f"{forward:.3f} ms", *ratios, f"{backward:.3f} ms"])
    return table(["grid", "radius", "forward", "against cuDNN dense", "against FlexAttention", "backward"], rows)


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
            f"{row['seconds']:.1f}",
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


def pipelines() -> str:
    """Whole denoising steps: seconds of the fastest stock attention, and by what factor each other is faster."""
    stored_rows, rows = stored("bench/results/pipelines_h200.json")["rows"], []
    names = {c["name"] for row in stored_rows for c in row["candidates"]}
    others = [name for name in WAYS if name in names and name not in STOCK]
    groups = [row["group"] for row in stored_rows]

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return groups.index(row["group"]), row["shape"]["mode"] == "compiled", row["shape"]["pixels"]

    for row in sorted(stored_rows, key=place):
        timed = {c["name"]: c["forward"] for c in row["candidates"] if c["forward"]}
        stock = [timed[name] for name in STOCK if name in timed]
        fastest = min(stock, key=lambda forward: forward["median_ms"], default=None)
        label = row["label"].partition(",")[0] + ", compiled" * (row["shape"]["mode"] == "compiled")
        cells = [row["group"], label, "-" if fastest is None else f"{fastest['median_ms'] / 1e3:.3f} s"]
        if fastest and fastest["extrapolated"]:
            cells[-1] = f"({cells[-1]})"
        for name in others:
            forward = timed.get(name)
            if forward is None:
                cells.append("-")
            else:
                speedup, seconds = forward["speedup"], forward["median_ms"] / 1e3
                cells.append(f"{speedup:.2f}x" if speedup else f"{seconds:.2f} s")
        rows.append(cells)
    return table(["denoiser", "size", "stock", *others], rows)


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


def highres() -> str:
    """Pictures far above the training size."""
    names = {"base": "FLUX type", "unet": "UNet"}
    rows = []
    for r in stored("docs/highres.json")["rows"]:
        memory = f"{r['peak_bytes'] / 2**30:.2f} GiB" if r["peak_bytes"] else "-"
        where = "" if r["peak_bytes"] else " on a CPU"
        cells = [names[r["teacher"]], r["attention"], f"{r['pixels']} px", r["way"], f"{r['copies']:.1f}"]
        rows.append([*cells, f"{r['truth_psnr_db']:.1f} dB", f"{r['seconds']:.1f} s{where}", memory])
    head = ["teacher", "attention", "size", "drawn", "copies counted", "PSNR to the icon", "a picture", "peak memory"]
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "discs": discs,
    "squares": squares,
    "linear": linear,
    "pipelines": pipelines,
    "models": models,
    "distilled": distilled,
    "highres": highres,
    "demo": demo,
    "backbones": backbones,
}


def filled(text: str) -> str:
    """Return the README with every table between its markers made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->", "<!-- end -->"
        pattern = re.compile(f"{begin}\n.*?{end}", re.DOTALL)
        assert len(pattern.findall(text)) == 1, f"the README needs one table between {begin} and {end}"
        content = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda match, content=content: content, text)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
