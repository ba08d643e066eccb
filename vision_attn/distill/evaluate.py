"""`distill eval`: how near the student comes to its teacher, in predictions and in pictures."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vision_attn.conversion.conversion import load
from vision_attn.distill.config import Config
from vision_attn.distill.curve import kd_error, predictions
from vision_attn.distill.data import CachedData
from vision_attn.distill.denoiser import denoiser_of, load_pipeline
from vision_attn.distill.images import read_prompts
from vision_attn.distill.measures import agreement, copies, kernel_distance, retrieval
from vision_attn.distill.student import load_lora
from vision_attn.highres.positions import stretched_positions
from vision_attn.highres.redraw import unit_of

REPORT = "eval.json"


def evaluate(config: Config, *, device: str = "cpu") -> dict[str, Any]:
    """Compare the trained adapter with its teacher, and write what was found into `run.out`/eval.json.

    Args:
        config: All settings but `loss`, `transfer` and `optimizer` are used.
        device: Where to draw.

    Raises:
        FileNotFoundError: If there is no adapter, no cache or no file of prompts.
    """
    adapter = adapter_of(config)
    if not adapter.exists():
        raise FileNotFoundError(f"eval.adapter: {adapter} does not exist: train first")
    pipe = load_pipeline(config.model).to(device)
    evaluation = Evaluation(config, pipe)
    teacher = evaluation.draw("teacher")
    load(pipe, adapter)
    load_lora(denoiser_of(pipe)[1], adapter)
    student = evaluation.draw("student")
    report = {
        "adapter": str(adapter),
        "prompts": len(evaluation.prompts),
        "size": list(evaluation.size),
        "eval": json.loads(json.dumps(asdict(config.eval), default=str)),
        "teacher": evaluation.describe(teacher),
        "student": evaluation.compare(student, teacher),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "torch": torch.__version__,
    }
    config.run.out.mkdir(parents=True, exist_ok=True)
    (config.run.out / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


def adapter_of(config: Config) -> Path:
    """Return the folder of the adapter that is measured."""
    return config.eval.adapter or config.run.out / "adapter"


@dataclass(frozen=True)
class Drawn:
    """What a model draws and predicts from the fixed prompts, noise and noise levels.

    Attributes:
        pictures: `[N, 3, height, width]` in [0, 1].
        predictions: Predictions by noise level.
    """

    pictures: Tensor
    predictions: dict[float, Tensor]


class Evaluation:
    """Draws with a pipeline and compares what two pipelines drew.

    Args:
        config: `model`, `data`, `run.seed` and `eval` are used.
        pipe: The pipeline, on its device.
    """

    def __init__(self, config: Config, pipe: Any) -> None:
        self.config, self.pipe = config, pipe
        self.name, model = denoiser_of(pipe)
        self.data = CachedData(config.data, config.model.base, type(model).__name__)
        known = list(dict.fromkeys(self.data.captions.values()))
        prompts = read_prompts(config.eval.prompts, "eval.prompts") if config.eval.prompts else known
        self.prompts = prompts[: config.eval.count]
        self.size = config.eval.size or config.data.sizes[0]
        self.truth = read_truth(config.eval.truth) if config.eval.truth else None

    def draw(self, label: str) -> Drawn:
        """Draw all prompts with the pipeline as it is, and predict from noisy samples of the cache."""
        pictures, count = [], self.config.eval.batch_size
        count_steps = self.config.eval.num_inference_steps
        steps = {"num_inference_steps": count_steps} if count_steps else {}
        with (
            self._positions(),
            tqdm(total=len(self.prompts), desc=label, unit="image", disable=self.config.run.quiet) as bar,
        ):
            for first in range(0, len(self.prompts), count):
                part = self.prompts[first : first + count]
                seeds = [torch.Generator().manual_seed(self.config.run.seed + first + i) for i in range(len(part))]
                height, width = self.size
                call = dict(height=height, width=width, generator=seeds, output_type="pt", **steps)
                pictures.append(self.pipe(part, **call).images.float().cpu())
                bar.update(len(part))
        model = denoiser_of(self.pipe)[1]
        return Drawn(torch.cat(pictures), predictions(model, self.pipe.scheduler, self.data, self.config))

    @contextmanager
    def _positions(self) -> Iterator[None]:
        """Draw with the positions of the cache, which follow from `data.native`."""
        (height, width), unit = self.size, unit_of(self.pipe)
        stretch = self.config.data.stretch(self.size)
        if stretch <= 1:
            yield
            return
        model = denoiser_of(self.pipe)[1]
        with stretched_positions(model, (height // unit, width // unit), stretch, "interpolate"):
            yield

    def compare(self, student: Drawn, teacher: Drawn) -> dict[str, Any]:
        """Return the measures of a student beside its teacher, by name."""
        features = self.config.eval.features
        measures = kd_error(student.predictions, teacher.predictions)
        measures |= agreement(student.pictures, teacher.pictures)
        if len(self.prompts) > 1:
            measures[f"kid_{features}_x1000"] = kernel_distance(student.pictures, teacher.pictures, features)
        return measures | self.describe(student)

    def describe(self, drawn: Drawn) -> dict[str, Any]:
        """Return the measures without a teacher: copies, and with `eval.truth` retrieval and PSNR to the icons."""
        measures: dict[str, Any] = {"copies": float(np.mean([copies(picture) for picture in drawn.pictures]))}
        if self.truth is None:
            return measures
        names, icons = self.truth
        slugs = ["-".join(prompt.lower().split()) for prompt in self.prompts]
        known = [i for i, slug in enumerate(slugs) if slug in names]
        if not known:
            raise ValueError(f"eval.truth: none of the prompts is an icon's name, such as {names[0]!r}")
        right = [names.index(slugs[i]) for i in known]
        pictures = drawn.pictures[known]
        at_size = F.interpolate(icons[right].float() / 255, pictures.shape[-2:], mode="area")
        small = torch.cat([F.interpolate(part.float() / 255, (64, 64), mode="area") for part in icons.split(64)])
        measures |= {f"retrieval_{key}": value for key, value in retrieval(pictures, small, right).items()}
        measures["truth_psnr_db"] = agreement(pictures, at_size)["psnr_db"]
        measures["truth_copies"] = float(np.mean([copies(picture) for picture in at_size]))
        return measures


def read_truth(path: Path) -> tuple[list[str], Tensor]:
    """Read the npz of `examples/emoji/rasterise.py`: the names and the icons `[icons, 3, side, side]` uint8.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    import io  # noqa: PLC0415

    from PIL import Image  # noqa: PLC0415, optional

    if not path.is_file():
        raise FileNotFoundError(f"eval.truth: {path} does not exist: examples/emoji/rasterise.py makes it")
    pack = np.load(path)
    files: Sequence[Any] = np.split(pack["data"], np.cumsum(pack["len"])[:-1])
    images = np.stack([np.array(Image.open(io.BytesIO(file.tobytes())).convert("RGB")) for file in files])
    return [str(name) for name in pack["names"]], torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
