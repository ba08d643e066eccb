"""Each level begins at the noise asked for with every scheduler, or the scheduler is refused by name."""

import inspect
from contextlib import suppress
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from covering import covering
from tiny_pipelines import PIPELINE

from vision_attn import Options, generate_highres
from vision_attn.highres.redraw import image_to_image, schedule_for

BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
SPACINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "karras": dict(use_karras_sigmas=True),
    "exponential": dict(use_exponential_sigmas=True),
    "beta": dict(use_beta_sigmas=True),
    "flow": FLOW,
    "flow-shift": FLOW | dict(flow_shift=3.0),
    "lu": dict(use_lu_lambdas=True),
    "trailing": dict(timestep_spacing="trailing"),
    "leading": dict(timestep_spacing="leading", steps_offset=1),
    "zero-snr": dict(rescale_betas_zero_snr=True),
    "terminal": dict(shift_terminal=0.02),
    "inverted": dict(invert_sigmas=True),
}
FEW_STEPS = dict(num_train_timesteps=8)  # to find out whether a scheduler can be made: some take long for 1000
REFUSED = {  # they add noise to no latents, or at no step
    "AmusedScheduler", "BlockRefinementScheduler", "DDIMInverseScheduler", "DDPMWuerstchenScheduler",
    "DiscreteDDIMScheduler", "EntropyBoundScheduler", "HeliosDMDScheduler", "HeliosScheduler", "IPNDMScheduler",
    "KarrasVeScheduler", "LTXEulerAncestralRFScheduler", "MiniMaxH3Scheduler", "PiflowScheduler",
    "RFD4ProteinaScheduler", "RePaintScheduler", "SCMScheduler", "ScoreSdeVeScheduler", "UnCLIPScheduler",
    "VQDiffusionScheduler",
}  # fmt: skip


def schedulers() -> list[Any]:
    """Return a maker of each scheduler of diffusers that can be made here, for each spacing of its timesteps.

    Each scheduler is quick once, and each spacing twice.
    """
    found: dict[tuple[str, str], Any] = {}
    for name in sorted(name for name in dir(diffusers) if name.endswith("Scheduler")):
        kind = getattr(diffusers, name)
        known = inspect.signature(kind).parameters
        betas, few = ({key: some[key] for key in some if key in known} for some in (BETAS, FEW_STEPS))
        for spacing, config in SPACINGS.items():
            if config.keys() <= known.keys():
                make = partial(kind, **betas | config)
                # a package is missing, or an argument
                with suppress(ImportError, TypeError, ValueError, AttributeError):
                    make(**few)
                    found[name, spacing] = make
    chosen = covering(list(found), (lambda name, spacing: name, 1), (lambda name, spacing: spacing, 2))
    slow = {row: () if row in chosen else pytest.mark.slow for row in found}
    return [pytest.param(make, id="-".join(row), marks=slow[row]) for row, make in found.items()]


def begins_at(pipe: Any, call: dict[str, Any], steps: int) -> float:
    """Return the noise level at which a call of an image-to-image pipeline begins."""
    scheduler, total = pipe.scheduler, call["num_inference_steps"]
    scheduler.set_timesteps(**dict(sigmas=call["sigmas"]) if "sigmas" in call else dict(num_inference_steps=total))
    times, count = pipe.get_timesteps(total, call["strength"], "cpu")
    assert count == steps
    one, zero = torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    if hasattr(scheduler, "scale_noise"):
        noise, signal = (scheduler.scale_noise(x, times[:1], e).mean() for x, e in ((zero, one), (one, zero)))
    else:
        noise, signal = (scheduler.add_noise(x, e, times[:1]).mean() for x, e in ((zero, one), (one, zero)))
    return float(noise / (noise + signal))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return image_to_image(PIPELINE["sd"].build())


@pytest.mark.parametrize("make", schedulers())
def test_every_scheduler_begins_at_the_strength(pipe: Any, make: Any) -> None:
    scheduler, reached = make(), 0
    for level in (0.2, 0.35, 0.6, 0.9):
        for steps in (4, 14):
            pipe.scheduler = scheduler
            shift = 2.0 if hasattr(scheduler, "scale_noise") else None
            try:
                call = schedule_for(pipe, level, steps, shift)
            except ValueError as error:
                assert f"{type(scheduler).__name__} cannot begin at the noise level {level}" in str(error)
                assert pipe.scheduler is scheduler
                continue
            assert begins_at(pipe, call, steps) == pytest.approx(level, rel=0.02)
            assert type(pipe.scheduler) is type(scheduler)
            reached += 1
    inverted = getattr(scheduler.config, "invert_sigmas", False)
    assert (reached == 0) == (type(scheduler).__name__ in REFUSED or inverted)
    hard = ("DPMSolverMultistepInverseScheduler", "SASolverScheduler", "CogVideoX")
    assert reached in (0, 8) or type(scheduler).__name__.startswith(hard)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, config",
    [
        ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True)),
        ("EulerDiscreteScheduler", dict(use_exponential_sigmas=True)),
        ("HeunDiscreteScheduler", dict(use_karras_sigmas=True)),
        ("DPMSolverSinglestepScheduler", {}),
        ("UniPCMultistepScheduler", FLOW),
        ("PNDMScheduler", dict(skip_prk_steps=True)),
        ("DEISMultistepScheduler", {}),
        ("KDPM2DiscreteScheduler", {}),
        ("LCMScheduler", {}),
        ("DDPMScheduler", {}),
    ],
)
def test_a_picture_with_the_scheduler(name: str, config: dict[str, Any]) -> None:
    pipe: Any = PIPELINE["sd"].build()
    pipe.scheduler = getattr(diffusers, name)(**BETAS | config)
    own = pipe.scheduler
    call = PIPELINE["sd"].call(16, 16)
    for argument in ("height", "width", "num_inference_steps", "output_type", "generator"):
        call.pop(argument)
    options = Options(num_inference_steps=3, level_inference_steps=4, base=(64, 64), strength=(0.6, 0.4), quiet=True)
    generator = torch.Generator().manual_seed(0)
    result = generate_highres(pipe, None, 256, 256, options=options, generator=generator, **call)
    assert [level.height for level in result.levels] == [64, 128, 256] and pipe.scheduler is own
    assert np.isfinite(np.asarray(result.images[0], np.float32)).all()


def test_a_scheduler_that_cannot_is_refused_before_anything_is_redrawn() -> None:
    pipe: Any = image_to_image(PIPELINE["sd"].build())
    pipe.scheduler = diffusers.IPNDMScheduler()
    with pytest.raises(ValueError, match=r"IPNDMScheduler cannot begin at the noise level 0.4 .*DDIMScheduler"):
        schedule_for(pipe, 0.4, 10, None)
