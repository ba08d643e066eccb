"""The demo: an embedded teacher draws the same prompts with each attention at 128 px, and redraws them at 256 px."""

import json
import re
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
from vision_attn.demo.page import Row, contact_sheet, write_page
from vision_attn.highres.redraw import image_to_image
from vision_attn.processors import AgentSD, AttnSpec, Multipole, Schedule, Softmax, registrations

PROMPTS = ("red apple", "rocket", "octopus", "alarm clock")
FEW = PROMPTS[:2]  # a row of these takes seven seconds on two cores
# Dense attention comes first, then what draws well without training, then what needs training.
PROCESSORS: tuple[AttnSpec, ...] = tuple(
    spec
    for known in sorted(registrations(), key=lambda known: known.spec is not Softmax)
    for spec in (*known.demo, *((AgentSD.schedule(),) if known.spec is AgentSD else ()))
)
AT_LARGE = tuple(known.spec for known in registrations() if known.draws_untrained)  # the processors at 256 px
NATIVE, LARGE = 128, 256  # pixels a side; the teachers were trained at 128
MIN_TOKENS = 256  # the UNet's 8 x 8 grid stays dense: that costs nothing, and large windows do not fit it
STRENGTH = 0.2  # of image-to-image: enough to sharpen edges, too little to repeat the object


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
        """What the table says of training: 'none needed', 'untrained' or 'distilled'."""
        if self.adapter is not None:
            return "distilled"
        return "none needed" if isinstance(self.spec, Softmax | Multipole | Schedule) else "untrained"

    @property
    def draws_well(self) -> bool:
        """Whether its pictures are worth looking at: it is trained, or draws well untrained."""
        return self.training != "untrained" or isinstance(self.spec, AT_LARGE)

    @property
    def name(self) -> str:
        """The name in the table."""
        return "AgentSD.schedule()" if isinstance(self.spec, Schedule) else str(self.spec)

    @property
    def slug(self) -> str:
        """The name in file names."""
        words = re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")
        return words + "-distilled" * (self.adapter is not None)

    def put_into(self, pipe: Any) -> Conversion:
        """Convert a pipeline to it."""
        if self.adapter is not None:
            return load(pipe, self.adapter)
        return convert(pipe, self.spec, min_tokens=MIN_TOKENS)


def entries_of(teacher: str) -> list[Entry]:
    """Return each processor untrained, followed by its distilled twin; adapters of other fields come last."""
    shipped = {path: next(iter(read_adapter(path)[0].layers.values())) for path in shipped_adapters(teacher)}
    distilled = [Entry(spec, path) for path, spec in shipped.items()]
    entries = []
    for spec in PROCESSORS:
        entries += [Entry(spec), *(entry for entry in distilled if entry.spec == spec)]
    return entries + [entry for entry in distilled if entry.spec not in PROCESSORS]


def plan(teacher: str, *, everything: bool = False) -> list[tuple[int, Entry]]:
    """Return the size and the attention of each row, in the order of drawing.

    Args:
        teacher: A name that `load_teacher` takes.
        everything: Also draw with processors that need training and have had none.
    """
    entries = [entry for entry in entries_of(teacher) if everything or entry.draws_well]
    large = [entry for entry in entries if isinstance(entry.spec, AT_LARGE)]
    return [(NATIVE, entry) for entry in entries] + [(LARGE, entry) for entry in large]


def compare(
    out: Path,
    prompts: Sequence[str] = PROMPTS,
    *,
    teacher: str = "base",
    steps: int = 10,
    seed: int = 0,
    everything: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], Path]:
    """Draw, measure, and write pictures, a contact sheet, a table and a page.

    At 128 px each attention starts from the same noise. At 256 px each redraws the dense 128 px picture, enlarged, with
    image-to-image: the teacher was trained at one size, and from noise alone it repeats the object.

    The page is written before the first picture and again after each picture.

    Args:
        out: Folder for the files; it is made if it does not exist.
        prompts: What to draw, in words that the teacher knows.
        teacher: A name that `load_teacher` takes.
        steps: Denoising steps at 128 px. At 256 px the schedule has twice as many, of which the last fifth runs.
        seed: Seed of the noise.
        everything: Also draw with processors that need training and have had none.
        say: Receives a line when the page is there.

    Returns:
        The table's rows, and the page `out / index.html`.

    Raises:
        ValueError: If the teacher or a word of a prompt is unknown, or `steps` is below 2.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    pipe = load_teacher(teacher)
    pipe.text_encoder.tokenize(list(prompts))  # an unknown word stops here, before any work
    redraw = image_to_image(pipe)
    for each in (pipe, redraw):
        each.set_progress_bar_config(disable=True)
    todo = plan(teacher, everything=everything)
    large_steps = 2 * steps - int(2 * steps * (1 - STRENGTH))  # as diffusers counts them
    total = len(prompts) * sum(steps if pixels == NATIVE else large_steps for pixels, _ in todo)
    planned = len(prompts) * len(todo)
    out.mkdir(parents=True, exist_ok=True)
    page = write_page(out, prompts, [], teacher=teacher, planned=planned)
    say(f"Open {page.resolve()}; it shows each picture as soon as it is drawn.")
    rows: list[Row] = []
    dense: dict[int, list[Image.Image]] = {}  # the first row of each size, with which the others are compared
    with tqdm(total=total, unit="step", mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
        for pixels, entry in todo:
            bar.set_description(f"{pixels} px {entry.name}")
            images: list[Image.Image] = []
            files: tuple[str, ...] = ()
            seconds = 0.0
            conversion = entry.put_into(pipe)
            for i, prompt in enumerate(prompts):
                start = time.perf_counter()
                call: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed + i)}
                call["callback_on_step_end"] = _tick(bar)
                if pixels == NATIVE:
                    images += pipe(prompt, num_inference_steps=steps, **call).images
                else:
                    call["image"] = dense[NATIVE][i].resize((LARGE, LARGE), Image.Resampling.BICUBIC)
                    images += redraw(prompt, strength=STRENGTH, num_inference_steps=2 * steps, **call).images
                seconds += time.perf_counter() - start
                files += (f"{pixels}_{'-'.join(prompt.lower().split())}_{entry.slug}.png",)
                images[i].save(out / files[i])
                layer = conversion.layers[0]
                psnr = _mean_psnr(images, dense[pixels]) if pixels in dense else None
                measured = (layer.tokens or 0, layer.attended or 1.0, seconds, psnr, files)
                row = Row(pixels, entry.name, entry.training, *measured)
                write_page(out, prompts, [*rows, row], teacher=teacher, planned=planned)
            conversion.revert()
            rows.append(row)
            dense.setdefault(pixels, images)
            (out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    contact_sheet(out, list(prompts), rows)
    return rows, page


def _tick(bar: Any) -> Callable[..., dict[str, Any]]:
    def step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        bar.update()
        return tensors

    return step


def _mean_psnr(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Return the mean PSNR of `images` to the first ones of `others`."""
    return float(np.mean([_psnr(*pair) for pair in zip(images, others, strict=False)]))


def _psnr(image: Image.Image, other: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two pictures in dB: `10 log10(255^2 / mse)`; 99 if they are equal."""
    error = np.square(np.asarray(image, np.float64) - np.asarray(other, np.float64)).mean()
    return 10 * float(np.log10(255**2 / error)) if error else 99.0
