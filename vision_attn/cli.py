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
    demo = commands.add_parser("demo", help="draw emoji offline with dense and local attention, and compare")
    demo.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for pictures, table and page")
    demo.add_argument("--prompt", action="append", help="what to draw; may be given several times")
    demo.add_argument("--teacher", choices=("base", "nano"), default="base", help="size of the embedded teacher")
    demo.add_argument("--steps", type=int, default=10, help="denoising steps at 128 px")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)
    options = parser.parse_args(arguments)
    # Threads that spin while they wait make a shared CPU ten times slower. It must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
    print("Drawing at 128 px and redrawing at 256 px with each attention; two cores need about three minutes.")
    results, page = compare(
        options.out, options.prompt or PROMPTS, size=options.teacher, steps=options.steps, seed=options.seed
    )
    print(f"\n{text_table(results)}\n\nPictures, contact sheet and page: {page.resolve()}")


if __name__ == "__main__":
    sys.exit(main())
