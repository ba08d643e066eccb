"""Every tiny host and pipeline runs, has the sequences that it states, and shows a wrong attention in its output."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tiny_host_case import TEXT
from tiny_hosts import HOST, HOSTS, VIDEO_HOSTS, HostCase
from tiny_pipelines import (
    PIPELINE,
    PIPELINES,
    PipelineCase,
    add_lora,
    images_of,
    ip_adapter_inputs,
    load_ip_adapter,
)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

BATCH = 2
CASES = [*HOSTS, *VIDEO_HOSTS]
GRIDS = [
    pytest.param(case, *grid, id=f"{case.id}-{grid[0]}x{grid[1]}", marks=pytest.mark.slow if number else ())
    for case in CASES
    for number, grid in enumerate([(4, 4), (6, 6)] if case.fixed_size else [(9, 8), (7, 12)])
]


class AttentionSpy(TorchFunctionMode):
    """Records the lengths of self-attention calls; those in `uniform` return the mean of v for every query.

    With `more_keys`, calls that have more keys than queries are self-attention too.
    """

    def __init__(self, uniform: frozenset[int] = frozenset(), *, more_keys: bool | str = False) -> None:
        super().__init__()
        self.uniform, self.more_keys = uniform, more_keys
        self.lengths: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
        tokens = k.shape[-2]
        if q.shape[-2] == tokens or (self.more_keys and q.shape[-2] < tokens):
            self.lengths.add(tokens)
            if tokens in self.uniform:
                return v.mean(dim=-2, keepdim=True).expand(*q.shape[:-1], v.shape[-1])
        return func(*args, **kwargs)


@cache
def model_of(host_id: str) -> nn.Module:
    return HOST[host_id].build()


def run(case: HostCase, height: int, width: int) -> Tensor:
    with torch.no_grad():
        return case.output(model_of(case.id)(**case.inputs(height, width, BATCH, TEXT)))


def relative_change(changed: Tensor, output: Tensor) -> float:
    return ((changed - output).norm() / output.norm()).item()


@pytest.mark.parametrize("case, height, width", GRIDS)
def test_host_runs_and_has_the_stated_sequences(case: HostCase, height: int, width: int) -> None:
    with AttentionSpy(more_keys=case.more_keys) as spy:
        output = run(case, height, width)
    assert tuple(output.shape) == case.shape(height, width, BATCH)
    assert output.isfinite().all()
    assert torch.equal(output, run(case, height, width))
    layouts = case.layouts(height, width, TEXT)
    assert spy.lengths == {layout.tokens for layout in layouts} | case.text_only(TEXT)


@pytest.mark.parametrize("case, height, width", GRIDS)
def test_wrong_attention_over_the_grid_is_visible(case: HostCase, height: int, width: int) -> None:
    uniform = frozenset(layout.tokens for layout in case.layouts(height, width, TEXT))
    assert not uniform & case.text_only(TEXT)
    with AttentionSpy(uniform, more_keys=case.more_keys):
        changed = run(case, height, width)
    assert relative_change(changed, run(case, height, width)) > 1e-3


def test_uniform_attention_elsewhere_changes_nothing() -> None:
    case = HOST["flux"]
    with AttentionSpy(frozenset({72})):
        assert torch.equal(run(case, 9, 8), run(case, 9, 8))
    with AttentionSpy(frozenset({72 + TEXT})):
        changed = run(case, 9, 8)
    assert not torch.equal(changed, run(case, 9, 8))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_build_repeats_and_leaves_no_parameter_at_zero(case: HostCase) -> None:
    again = case.build().state_dict()
    for name, tensor in model_of(case.id).state_dict().items():
        assert torch.equal(tensor, again[name]), name
    assert not [name for name, parameter in model_of(case.id).named_parameters() if not parameter.any()]


def test_grid_is_row_major_in_the_joint_sequence() -> None:
    case = HOST["flux-kontext"]
    layout = case.joint(6, 4, TEXT)
    assert (layout.prefix, layout.grid, layout.reference) == (case.prefix(TEXT), (6, 4), ((3, 5),))
    ids = case.inputs(6, 4, BATCH, TEXT)["img_ids"]
    assert ids[:5].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 1, 0]]
    assert ids[24].tolist() == [1, 0, 0]


def test_dit_mixes_the_batch_on_a_non_square_grid() -> None:
    assert run(HOST["dit"], 6, 4).shape[0] == 3  # 2 samples of 24 tokens, unpatchified as 3 of 4 x 4


@pytest.mark.parametrize("case", PIPELINES, ids=lambda case: case.id)
def test_pipeline_runs_and_attends_over_the_stated_grid(case: PipelineCase) -> None:
    pipe = case.build()
    height, width = 6 * case.patch, 5 * case.patch
    with AttentionSpy() as spy:
        images = images_of(case, pipe, height, width)
    assert images.shape == (1, height, width, 3)
    assert np.isfinite(images).all() and images.std() > 0.01
    assert {30, 30 + 7} & spy.lengths
    assert np.array_equal(images, images_of(case, case.build(), height, width))


@pytest.mark.parametrize("case", PIPELINES, ids=lambda case: case.id)
def test_pipeline_takes_lora(case: PipelineCase) -> None:
    pipe = case.build()
    size = (4 * case.patch, 6 * case.patch)
    images = images_of(case, pipe, *size)
    add_lora(getattr(pipe, case.denoiser))
    changed = images_of(case, pipe, *size)
    assert np.abs(changed - images).max() > 1e-3


@pytest.mark.parametrize("host_id", ["sd15-unet", "sd15-inpaint-unet", "flux"])
def test_model_takes_an_ip_adapter(host_id: str) -> None:
    case, model = HOST[host_id], load_ip_adapter(HOST[host_id].build())
    inputs = case.inputs(6, 4, BATCH, TEXT)
    with torch.no_grad():
        changed = case.output(model(**inputs, **ip_adapter_inputs(model, BATCH)))
    assert changed.isfinite().all()
    assert relative_change(changed, run(case, 6, 4)) > 1e-3


@pytest.mark.parametrize("pipeline_id", ["sd", "sd-controlnet", "flux"])
def test_pipeline_takes_an_ip_adapter(pipeline_id: str) -> None:
    case = PIPELINE[pipeline_id]
    size = (4 * case.patch, 6 * case.patch)
    images = images_of(case, case.build(), *size)
    pipe = load_ip_adapter(case.build())
    changed = pipe(**case.call(*size), **ip_adapter_inputs(pipe)).images
    assert np.abs(changed - images).max() > 1e-3


@pytest.mark.parametrize("case", [case for case in CASES if not case.autocast], ids=lambda case: case.id)
def test_a_host_without_autocast_fails_by_itself(case: HostCase) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="dtypes match"):
        run(case, 9, 8)
