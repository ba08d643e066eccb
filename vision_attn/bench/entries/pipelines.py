"""Denoisers of released pipelines, FLUX.1-dev to SD1.5, at 512 to 16384 px: seconds per step and memory."""

from typing import Any

import torch

from vision_attn.bench.measure import Measurement
from vision_attn.bench.overview import Must, steps_table
from vision_attn.bench.pipelines.architectures import ARCHITECTURES
from vision_attn.bench.pipelines.attention import DENSE, FLASH, STOCK, WAYS
from vision_attn.bench.pipelines.steps import PipelineCase, pipeline_row

TITLE = (
    "One denoising step at full size with random weights in bf16 (on a CPU small twins in float32): one forward of the "
    "denoiser, batch 1; guidance by a second forward, as in SD and SDXL, doubles all times alike. `stock` is diffusers "
    "as it is: with PyTorch's choice of a native attention, and with cuDNN's wherever that can run. `flex` is CLEAR as "
    "its authors run it"
)
TIMING = (
    "Candidates one after another in one run, on one model: a warm-up, then medians of 5 steps below 0.5 s, 3 below "
    "2 s, 2 below 6 s, else one. Eager steps at native sizes are medians of 15 in 3 turns of each candidate: there the "
    "host counts, and others use it too. A step above 15 s is extrapolated: one block of each kind is timed in its "
    "place, and counted as often as the model has it. Compiled is `torch.compile` of the repeated blocks. Speed-ups "
    "refer to the faster stock of the same table. In graphs are replays of `vision_attn.graphs`, with their speed-up "
    "over the same eager stock. Memory is the peak with all weights, and the part above what lay "
    "there before the step; blocks run one after another, so one of each kind shows the peak of an extrapolated step."
)
CANDIDATES = tuple(way for name, way in WAYS.items() if name != FLASH)  # which trainings alone run
table = steps_table

_FLEX = "flex r16"
_DIT_WINDOWS, _UNET_WINDOWS = ("clear r16", "clear r8", "neighborhood k33"), ("clear r8", "neighborhood k13")
_OTHERS = tuple(name for name in WAYS if name not in (*DENSE, _FLEX, *_DIT_WINDOWS, *_UNET_WINDOWS))
_DIT, _UNET = (*_DIT_WINDOWS, *_OTHERS), (*_UNET_WINDOWS, *_OTHERS)
_FAST = ("clear r16", "multipole", "linfusion")
_NEWER = ("clear r16", "multipole")

_EAGER = {1024: 1.0, 2048: 1.38, 4096: 2.8, 8192: 8.5}
_COMPILED = {2048: 1.6, 4096: 3.8, 8192: 11.0}
_MULTIPOLE = {
    "flux-2048": 1.35, "flux-4096": 2.8, "flux-8192": 9.0, "flux-2048-compiled": 1.5, "flux-4096-compiled": 3.4,
    "flux-8192-compiled": 12.0, "sdxl-4096": 2.1,
}  # fmt: skip
MUSTS: dict[str, tuple[Must, ...]] = {
    **{f"flux-{pixels}": (Must("clear r16", STOCK, factor),) for pixels, factor in _EAGER.items()},
    **{f"flux-{pixels}-compiled": (Must("clear r16", STOCK, factor),) for pixels, factor in _COMPILED.items()},
    "sdxl-4096": (Must("linfusion", STOCK, 2.0),),
    "sdxl-16384": (Must("linfusion"),),
}
MUSTS["flux-8192"] += (Must("clear r16", (_FLEX,), 1.5),)
_GRAPHS = {"sdxl-1024": 2.2, "sd15-512": 2.7, "pixart-1024": 1.7, "sd35-1024": 1.33, "flux-1024": 1.09}
for _name, _factor in _GRAPHS.items():
    _musts = tuple(Must(subject, STOCK, _factor, graphs=True) for subject in ("clear r8", "multipole"))
    MUSTS[_name] = (*MUSTS.get(_name, ()), *_musts)
for _name, _factor in _MULTIPOLE.items():
    MUSTS[_name] += (Must("multipole", STOCK, _factor),)


def _case(architecture: str, pixels: int, ways: tuple[str, ...], compiled: bool = False) -> PipelineCase:
    name = PipelineCase(architecture, pixels, (), compiled).name
    return PipelineCase(architecture, pixels, (*STOCK, *ways), compiled, MUSTS.get(name, ()))


def cases(device: torch.device, quick: bool = False) -> list[PipelineCase]:
    """Return the cases for a device, the most important first; a CPU gets small twins in float32."""
    if device.type == "cpu":
        return _on_cpu(quick)
    flux = [_case("flux", pixels, (_FLEX, *_DIT)) for pixels in (1024, 2048)]
    flux += [_case("flux", pixels, (_FLEX, *_DIT_WINDOWS, "multipole", "linfusion")) for pixels in (4096, 8192)]
    sdxl = [_case("sdxl", pixels, _UNET) for pixels in (1024, 4096)] + [_case("sdxl", 16384, ("linfusion",))]
    if quick:
        return [flux[0], sdxl[0]]
    compiled = [_case("flux", 1024, _DIT, True)]
    compiled += [_case("flux", pixels, _FAST, True) for pixels in (2048, 4096, 8192)]
    others = [_case("sdxl", 2048, _UNET), _case("sdxl", 8192, ("clear r8", "multipole", "linfusion"))]
    # compiled too where launching small layers may take longer than running them
    small = dict(sdxl=(1024, 2048), sd15=(512, 1024), pixart=(1024, 2048), sd35=(1024, 2048))
    for architecture, sizes in small.items():
        ways = ("clear r8" if architecture in ("sdxl", "sd15") else "clear r16", "multipole", "linfusion")
        others += [_case(architecture, pixels, ways, True) for pixels in sizes]
    others += [
        PipelineCase("flux", pixels, (*STOCK, *_FAST), compiled, float8=True)
        for compiled in (False, True)
        for pixels in (1024, 2048, 4096)
    ]
    others += [_case("sd15", pixels, _UNET) for pixels in (512, 1024, 2048)]
    others += [_case("sd15", 4096, ("multipole", "linfusion"))]
    others += [_case("pixart", pixels, _DIT) for pixels in (1024, 2048)]
    others += [_case("pixart", pixels, _FAST) for pixels in (4096, 8192)]
    # SD3.5's table of positions ends at 6144 px
    others += [_case("sd35", pixels, _DIT) for pixels in (1024, 2048)] + [_case("sd35", 4096, _FAST)]
    newer = [_case(name, pixels, _NEWER) for name in ("qwen", "flux2", "zimage") for pixels in (1024, 2048, 4096)]
    return [*flux, *compiled, *sdxl, *others, *newer]


def _on_cpu(quick: bool) -> list[PipelineCase]:
    """Return small twins: every architecture, and FLUX at two sizes and compiled."""
    ways = (*STOCK, *_FAST)
    every = [
        PipelineCase("flux", 64, (*ways, _FLEX), small=True),
        PipelineCase("flux", 128, ways, small=True),
        PipelineCase("flux", 64, ways, True, small=True),
        PipelineCase("flux", 64, ways, small=True, float8=True),
    ]
    every += [PipelineCase(name, 64, ways, small=True) for name in ARCHITECTURES if name != "flux"]
    return every[:2] if quick else every


def row(case: PipelineCase, measurement: Measurement) -> dict[str, Any]:
    """Measure one case; see `pipeline_row`."""
    return pipeline_row(case, measurement.device, chosen=measurement.chosen)
