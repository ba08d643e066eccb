"""Every cache of diffusers acts on a converted host as on stock: with each processor, put on before or after."""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import diffusers
import pytest
import torch
from converted_hosts import SIZE, expected
from covering import quick
from diffusers import hooks
from host_runs import TEXT, distance
from processor_table import PROCESSORS
from tiny_hosts import HOST
from torch import Tensor

from vision_attn import Clear, Conversion, Softmax, convert
from vision_attn.processors.base import AttnSpec

TIMES = (0.9, 0.75, 0.6, 0.45, 0.3, 0.15)  # what caches ask for is 1000 times these
BLOCKS = {"spatial_attention_block_skip_range": 2}


class Run:
    """A denoising of six steps, with a cache or without."""

    def __init__(self, host_id: str, spec: AttnSpec | None, name: str = "", when: str = "after") -> None:
        self.host_id, self.model, self.time = host_id, HOST[host_id].build(), 0.0
        steps = [lambda: spec and convert(self.model, spec, min_tokens=9), lambda: name and CACHES[name](self)]
        for step in steps if when == "after" else steps[::-1]:
            step()

    def now(self) -> float:
        return 1000 * self.time

    def steps(self) -> list[Tensor]:
        """Return what the model answers at each step; the next input depends on it."""
        case, outputs = HOST[self.host_id], []
        inputs = case.inputs(*SIZE, 2, TEXT)
        latents = next(name for name in ("hidden_states", "sample") if name in inputs)
        whole = inputs["timestep"].dtype == torch.int64 or inputs["timestep"].max() > 1
        for index, self.time in enumerate(TIMES):
            place = dict(step_index=index, sigma=self.time, num_inference_steps=len(TIMES))
            time = 1000 * self.time if whole else self.time
            with torch.no_grad(), self.context(**place):
                outputs.append(case.output(self.model(**inputs | dict(timestep=torch.full((2,), time)))))
            channels = inputs[latents].shape[1]  # a second half of a UNet's or a DiT's channels are variances
            inputs[latents] = inputs[latents] - 0.15 * outputs[-1][:, :channels]
        return outputs

    def context(self, **place: Any) -> Any:
        model: Any = self.model
        if hasattr(model, "cache_context"):
            return model.cache_context("test", **place)
        return diffusers.models.cache_utils.CacheMixin.cache_context(model, "test", **place)


def _enable(config: Callable[[Run], Any], apply: Any) -> Callable[[Run], None]:
    """Put a cache on: by the model's method, or by the function where the model has none (UNets)."""

    def on(run: Run) -> None:
        model: Any = run.model
        if hasattr(model, "enable_cache"):
            model.enable_cache(config(run))
        else:
            apply(model, config(run))

    return on


CACHES: dict[str, Callable[[Run], None]] = {
    "pyramid": _enable(
        lambda run: diffusers.PyramidAttentionBroadcastConfig(
            **BLOCKS, spatial_attention_timestep_skip_range=(100, 800), current_timestep_callback=run.now
        ),
        hooks.apply_pyramid_attention_broadcast,
    ),
    "faster": _enable(
        lambda run: diffusers.FasterCacheConfig(
            **BLOCKS, spatial_attention_timestep_skip_range=(-1, 800), current_timestep_callback=run.now,
            is_guidance_distilled=True, attention_weight_callback=lambda _: 0.3, tensor_format="BCHW",
        ),
        hooks.apply_faster_cache,
    ),
    "taylor": _enable(
        lambda run: diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
        hooks.apply_taylorseer_cache,
    ),
    "first-block": _enable(lambda run: diffusers.FirstBlockCacheConfig(threshold=9.0), hooks.apply_first_block_cache),
    "mag": _enable(
        lambda run: diffusers.MagCacheConfig(
            mag_ratios=torch.full((len(TIMES),), 0.99), num_inference_steps=len(TIMES), retention_ratio=0.2
        ),
        hooks.apply_mag_cache,
    ),
    "sea": _enable(
        lambda run: diffusers.SeaCacheConfig(threshold=2.0, raw_vision_callback=_pictures), hooks.apply_sea_cache
    ),
}  # fmt: skip


def _pictures(model: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the latents `[C, T, height, width]` of each sample, of which SeaCache looks at the spectrum."""
    return [tokens.T.unflatten(1, (1, *SIZE)) for tokens in kwargs["hidden_states"]]


HOSTS = {  # without those pairs in which a cache of diffusers 0.42 stops with an error on stock, or does nothing there
    "flux": tuple(CACHES),
    "flux2": ("pyramid", "faster", "taylor", "mag"),
    "qwen-image": tuple(CACHES),
    "cogview4": ("pyramid", "faster", "first-block", "mag"),
    "sd15-unet": ("pyramid",),
    "pixart": ("pyramid", "faster"),
}
PAIRS = [(host_id, name) for host_id, names in HOSTS.items() for name in names]


@cache
def stock(host_id: str, name: str) -> list[Tensor]:
    return Run(host_id, None, name).steps()


@cache
def uncached(host_id: str, spec: AttnSpec) -> list[Tensor]:
    torch.manual_seed(0)
    return Run(host_id, spec).steps()


WHEN = quick(
    [(*pair, when) for pair in PAIRS for when in ("before", "after")],
    (lambda host_id, name, when: (host_id, name), 1),
    (lambda host_id, name, when: (name, when), 1),
)


@pytest.mark.parametrize("host_id, name, when", WHEN)
def test_the_same_as_stock(host_id: str, name: str, when: str) -> None:
    """Softmax changes no bit. A window over everything rounds otherwise, where a threshold may decide otherwise."""
    want = stock(host_id, name)
    assert torch.equal(want[0], stock(host_id, "")[0]) and distance(want[-1], stock(host_id, "")[-1]) > 1e-3
    run = Run(host_id, Softmax(), name, when)
    assert all(map(torch.equal, run.steps(), want))
    Conversion.of(run.model).revert()
    if hasattr(run.model, "enable_cache"):
        run.model.disable_cache()
        assert all(map(torch.equal, run.steps(), stock(host_id, "")))
    for got, wanted in zip(Run(host_id, Clear(radius=99), name, when).steps(), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


OWN = {name: spec for name, spec in PROCESSORS.items() if name != "softmax"}
ROWS = [(host_id, name, spec) for (host_id, name), spec in product(PAIRS, OWN)]


@pytest.mark.parametrize(
    "host_id, name, spec",
    quick(
        ROWS,
        (lambda host_id, name, spec: (host_id, name), 1),
        (lambda host_id, name, spec: spec, 1),
    ),
)
def test_every_processor(host_id: str, name: str, spec: str) -> None:
    plain = uncached(host_id, OWN[spec])
    found = {}
    for when in ("before", "after"):
        torch.manual_seed(0)
        run = Run(host_id, OWN[spec], name, when)
        found[when] = run.steps()
        assert "rerouted" in Conversion.of(run.model).status.values()
    assert all(map(torch.equal, *found.values()))
    torch.testing.assert_close(found["after"][0], plain[0], rtol=0, atol=1e-5)  # the first step fills the cache
    assert distance(found["after"][-1], plain[-1]) > 1e-3 < distance(found["after"][-1], stock(host_id, name)[-1])


def test_every_cache_of_diffusers_has_a_row() -> None:
    """The one of text keys hooks blocks of NucleusMoE alone, whose image attends to more keys than its own."""
    known = {name for name in dir(diffusers) if name.endswith(("CacheConfig", "BroadcastConfig"))}
    rows = {type(config).__name__ for config in configs()}
    assert known - rows == {"TextKVCacheConfig"} and len(rows) == len(CACHES)


def configs() -> list[Any]:
    found = []
    for name in CACHES:
        run: Any = Run("flux", None, name)
        found.append(run.model._cache_config)
    return found


def test_the_cache_of_text_keys_leaves_other_hosts_alone() -> None:
    model: Any = HOST["flux"].build()
    conversion = convert(model, Clear(radius=2))
    model.enable_cache(diffusers.TextKVCacheConfig())
    with torch.no_grad(), model.cache_context("test"):
        output = model(**HOST["flux"].inputs(*SIZE, 2, TEXT)).sample
    assert torch.equal(output, expected("flux", Clear(radius=2))) and set(conversion.status.values()) == {"rerouted"}
