"""The command `vision-attn`: a thin layer of arguments over the package."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 2 for bad input, with one line that says why."""
    parser = argparse.ArgumentParser(prog="vision-attn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="draw emoji offline with every attention, and compare")
    demo.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for pictures, table and page")
    demo.add_argument("--prompt", action="append", help="what to draw; may be given several times")
    demo.add_argument("--teacher", choices=("base", "nano", "unet"), default="base", help="the embedded teacher")
    demo.add_argument("--steps", type=int, default=10, help="denoising steps at 128 px")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)
    inspect = commands.add_parser("inspect", help="what a conversion needs of a model at a size, and where it pays")
    inspect.add_argument("model", help="folder or hub name of a diffusers pipeline or model, or a timm model's name")
    inspect.add_argument("--height", type=int, required=True, help="of the image in pixels")
    inspect.add_argument("--width", type=int, required=True)
    inspect.add_argument(
        "--processor", default="clear", help="name of a processor, fields after a colon: clear:radius=8"
    )
    inspect.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="whose rates decide where it pays")
    inspect.add_argument("--picture", type=Path, help="also draw which tokens the middle token of the first layer sees")
    inspect.set_defaults(run=_inspect)
    bench = commands.add_parser("bench", help="check and time operators beside their peers, or show stored results")
    bench.add_argument("what", help="an entry (kernels_local), a group of entries (kernels), or 'table'")
    bench.add_argument("file", type=Path, nargs="?", help="with 'table': a stored result to show as Markdown")
    bench.add_argument("--out", type=Path, default=Path("bench", "results"), help="folder for <entry>_<device>.json")
    bench.add_argument("--device", help="cpu or cuda; a GPU where there is one")
    bench.add_argument("--only", action="append", default=[], help="case such as 'disc-128-*'; may be given repeatedly")
    bench.add_argument("--candidates", help="comma-separated names, as in the table; all by default")
    bench.add_argument("--quick", action="store_true", help="fewer cases and samples")
    bench.set_defaults(run=_bench)
    distill = commands.add_parser("distill", add_help=False, help="train a converted model: its own --help says more")
    distill.add_argument("arguments", nargs=argparse.REMAINDER)
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Threads that spin while they wait make a shared CPU ten times slower. It must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if given[:1] == ["distill"]:  # its settings are no arguments of argparse
        return _distill(given[1:])
    options = parser.parse_args(given)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"vision-attn: {error}", file=sys.stderr)
        return 2
    return 0


def _demo(options: argparse.Namespace) -> None:
    from vision_attn.demo.compare import PROMPTS, compare  # noqa: PLC0415, I001, it comes before diffusers
    import diffusers  # noqa: PLC0415
    from vision_attn.demo.page import text_table  # noqa: PLC0415

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    print("Drawing at 128 px and redrawing at 256 px with each attention; two cores need about five minutes.")
    results, page = compare(
        options.out, options.prompt or PROMPTS, teacher=options.teacher, steps=options.steps, seed=options.seed
    )
    print(f"\n{text_table(results)}\n\nPictures, contact sheet and page: {page.resolve()}")


def _bench(options: argparse.Namespace) -> None:
    from vision_attn.bench.run import run_benchmarks, table_of  # noqa: PLC0415

    if (options.what == "table") != (options.file is not None):
        raise ValueError("'bench table' needs a FILE, and only it does")
    if options.what == "table":
        print(table_of(options.file), end="")
        return
    candidates = options.candidates.split(",") if options.candidates else ()
    for path in run_benchmarks(
        options.what, options.out, device=options.device, only=options.only, candidates=candidates,
        quick=options.quick, say=lambda line: print(line, flush=True),
    ):  # fmt: skip
        print(f"\n{table_of(path)}\nStored in {path}")


def _distill(arguments: Sequence[str]) -> int:
    from vision_attn.distill.command import main as distill  # noqa: PLC0415

    return distill(arguments)


def _inspect(options: argparse.Namespace) -> None:
    from vision_attn.estimate import estimate  # noqa: PLC0415
    from vision_attn.inspection import attended, load_target, picture  # noqa: PLC0415
    from vision_attn.processors import spec_of_text  # noqa: PLC0415

    spec = spec_of_text(options.processor)
    found = estimate(load_target(options.model), options.height, options.width, spec, device=options.device)
    print(found)
    if options.picture is not None:
        grid = found.layers[0].grid
        middle = (grid.height // 2, grid.width // 2)
        picture(attended(spec, grid, *middle), *middle).save(options.picture)
        print(f"{found.layers[0].name}, token {middle}: {options.picture}")


if __name__ == "__main__":
    sys.exit(main())
