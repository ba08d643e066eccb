"""The demo: the embedded teacher draws the same prompts with each attention, at 128 px and from there at 256 px."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vision_attn.adapters.adapter import read_adapter
from vision_attn.conversion.conversion import Conversion, convert, load
from vision_attn.demo import load_teacher, shipped_adapters
from vision_attn.demo.page import contact_sheet, write_page
from vision_attn.highres.redraw import image_to_image
from vision_attn.processors import AgentSD, AttnSpec, Schedule, Softmax, registrations

PROMPTS = ("red apple", "rocket", "octopus", "alarm clock")
# Dense attention first, then what is worth drawing at 256 px without training, then what needs it.
PROCESSORS: tuple[AttnSpec, ...] = tuple(
    spec
    for known in sorted(registrations(), key=lambda known: known.spec is not Softmax)
    for spec in (*known.demo, *((AgentSD.schedule(),) if known.spec is AgentSD else ()))
)
AT_LARGE = tuple(known.spec for known in registrations() if known.draws_untrained)
NATIVE, LARGE = 128, 256  # pixels a side; the teacher was trained at 128
MIN_TOKENS = 256  # the UNet's 8 x 8 grid stays dense: it costs nothing, and large windows do not fit
STRENGTH = 0.2  # of image-to-image: sharp edges, and still one object


@dataclass(frozen=True)
class Entry:
    """One way to attend: an untrained conversion, or a distilled one of the same processor.

    Args:
        spec: The processor.
        adapter: Its trained weights.
    """

    spec: AttnSpec
    adapter: Path | None = None

    @property
    def training(self) -> str:
        """How it was trained."""
        if self.adapter is not None:
            return "distilled"
        return "none needed" if isinstance(self.spec, Softmax | Schedule) else "untrained"

    @property
    def slug(self) -> str:
        """For names of files."""
        return type(self.spec).__name__.lower() + "-distilled" * (self.adapter is not None)

    def put_into(self, pipe: Any) -> Conversion:
        """Convert a pipeline."""
        if self.adapter is not None:
            return load(pipe, self.adapter)
        return convert(pipe, self.spec, min_tokens=MIN_TOKENS)


def entries_of(teacher: str) -> list[Entry]:
    """Return all processors untrained, each before its distilled twin; distilled ones of other fields come last."""
    shipped = {path: next(iter(read_adapter(path)[0].layers.values())) for path in shipped_adapters(teacher)}
    distilled = [Entry(spec, path) for path, spec in shipped.items()]
    entries = []
    for spec in PROCESSORS:
        entries += [Entry(spec), *(entry for entry in distilled if entry.spec == spec)]
    return entries + [entry for entry in distilled if entry.spec not in PROCESSORS]


@dataclass(frozen=True)
class Result:
    """One row of the demo's table.

    Attributes:
        pixels: Side of the images.
        processor: The spec.
        training: 'none needed', 'untrained' or 'distilled'.
        tokens: Image and text tokens of the first attention layer.
        attended: Mean share of those tokens that one token sees.
        seconds: For all prompts.
        psnr: To the images of dense attention from the same noise, in dB; None for dense attention itself.
    """

    pixels: int
    processor: str
    training: str
    tokens: int
    attended: float
    seconds: float
    psnr: float | None
    files: tuple[str, ...]


def compare(
    out: Path, prompts: Sequence[str] = PROMPTS, *, teacher: str = "base", steps: int = 10, seed: int = 0
) -> tuple[list[Result], Path]:
    """Draw, measure, and write pictures, a contact sheet, a table and a page.

    At 128 px each processor starts from the same noise. At 256 px each redraws the dense 128 px picture, enlarged, with
    image-to-image: the teacher knows one size, and from noise alone it repeats the object.

    Args:
        out: Folder for the files; is made if it does not exist.
        prompts: What to draw, in words that the teacher knows.
        teacher: A name that `load_teacher` takes: 'base', 'nano' or 'unet'.
        steps: Denoising steps at 128 px. At 256 px a fifth of twice as many is run.
        seed: Of the noise.

    Returns:
        The table's rows, and the page `out / index.html`.

    Raises:
        ValueError: If a prompt has unknown words, or `steps` is below 2.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    pipe = load_teacher(teacher)
    pipe.text_encoder.tokenize(list(prompts))  # an unknown word stops here, before any work
    redraw = image_to_image(pipe)
    for each in (pipe, redraw):
        each.set_progress_bar_config(disable=True)
    out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    large_steps = 2 * steps - int(2 * steps * (1 - STRENGTH))  # as diffusers counts them
    entries = entries_of(teacher)
    large = [entry for entry in entries if isinstance(entry.spec, AT_LARGE)]
    total = len(prompts) * (len(entries) * steps + len(large) * large_steps)
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(total=total, unit="step", desc="128 px Softmax", mininterval=interval) as bar:
        native: list[Image.Image] = []
        for pixels in (NATIVE, LARGE):
            dense: list[Image.Image] = []
            for entry in entries if pixels == NATIVE else large:
                spec = entry.spec
                bar.set_description(f"{pixels} px {type(spec).__name__}")
                conversion = entry.put_into(pipe)
                start, images = time.perf_counter(), []
                for i, prompt in enumerate(prompts):
                    call: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed + i)}
                    call["callback_on_step_end"] = _tick(bar)
                    if pixels == NATIVE:
                        images += pipe(prompt, num_inference_steps=steps, **call).images
                    else:
                        call["image"] = native[i].resize((LARGE, LARGE), Image.Resampling.BICUBIC)
                        images += redraw(prompt, strength=STRENGTH, num_inference_steps=2 * steps, **call).images
                seconds = time.perf_counter() - start
                dense = dense or images
                row = conversion.layers[0]
                files = tuple(f"{pixels}_{_slug(prompt)}_{entry.slug}.png" for prompt in prompts)
                for image, file in zip(images, files, strict=True):
                    image.save(out / file)
                psnr = (
                    None
                    if images is dense
                    else float(np.mean([_psnr(*pair) for pair in zip(images, dense, strict=True)]))
                )
                name = "AgentSD.schedule()" if isinstance(spec, Schedule) else str(spec)
                measured = (row.tokens or 0, row.attended or 1.0, seconds, psnr)
                results.append(Result(pixels, name, entry.training, *measured, files))
                conversion.revert()
            native = native or dense
    contact_sheet(out, list(prompts), results)
    (out / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return results, write_page(out, list(prompts), results, teacher)


def _tick(bar: Any) -> Callable[..., dict[str, Any]]:
    def step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        bar.update()
        return tensors

    return step


def _slug(prompt: str) -> str:
    return "-".join(prompt.lower().split())


def _psnr(image: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures in dB: `10 log10(255^2 / mse)`; 99 if they are equal."""
    error = np.square(np.asarray(image, np.float64) - np.asarray(other, np.float64)).mean()
    return 10 * float(np.log10(255**2 / error)) if error else 99.0
