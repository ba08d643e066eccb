"""PAG and SAG pipelines put attention of their own on some layers: it works, or the error names `where=`."""

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
from tiny_hosts import HOST
from tiny_pipelines import PIPELINE

from vision_attn import Clear, Conversion, Softmax, convert


def pipeline(kind: Any, pipeline_id: str = "sd", **more: Any) -> Any:
    known = inspect.signature(kind.__init__).parameters
    components = {name: part for name, part in PIPELINE[pipeline_id].build().components.items() if name in known}
    if pipeline_id == "sd3":
        components["transformer"] = HOST["sd3"].build()  # PAG does not know the second attention of SD3.5
    else:
        more["requires_safety_checker"] = False
    pipe = kind(**components, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, pipeline_id: str = "sd", **more: Any) -> np.ndarray:
    return pipe(**PIPELINE[pipeline_id].call(128, 128) | more).images


def outside_the_middle(name: str) -> bool:
    return not name.startswith("mid_block")


def test_sag_names_the_layer_and_where() -> None:
    pipe = pipeline(diffusers.StableDiffusionSAGPipeline)
    want = draw(pipe, sag_scale=0.7)
    convert(pipe, Clear(radius=2))
    with pytest.raises(RuntimeError, match=r"mid_block.*attn1 never called .*CrossAttnStoreProcessor.*\(where=\)"):
        draw(pipe, sag_scale=0.7)
    Conversion.of(pipe).revert()
    pipe = pipeline(diffusers.StableDiffusionSAGPipeline)
    convert(pipe, Softmax(), where=outside_the_middle)
    assert np.abs(draw(pipe, sag_scale=0.7) - want).max() < 1e-5
    Conversion.of(pipe).revert()
    convert(pipe, Clear(radius=2), where=outside_the_middle)
    assert np.abs(draw(pipe, sag_scale=0.7) - want).max() > 1e-4


def test_pag_acts_as_on_the_stock_model() -> None:
    results = []
    for spec in (None, Softmax(), Clear(radius=2)):
        for scale in (0.0, 3.0):
            pipe = pipeline(diffusers.StableDiffusionPAGPipeline, pag_applied_layers=["mid"])
            if spec is not None:
                convert(pipe, spec)
            results.append(draw(pipe, pag_scale=scale))
    stock, stock_pag, same, same_pag, local, local_pag = results
    assert np.abs(stock_pag - stock).max() > 1e-4
    assert np.abs(same - stock).max() < 1e-5 and np.abs(same_pag - stock_pag).max() < 1e-5
    assert np.abs(local_pag - local).max() > 1e-4 < np.abs(local_pag - stock_pag).max()


def test_pag_of_sd3_names_the_layer_and_where() -> None:
    pipe = pipeline(diffusers.StableDiffusion3PAGPipeline, "sd3", pag_applied_layers=["blocks.0"])
    want = draw(pipe, "sd3", pag_scale=3.0)
    convert(pipe, Clear(radius=2))
    with pytest.raises(ValueError, match=r"blocks.0.attn: cannot honour an attention mask .*\(where=\)"):
        draw(pipe, "sd3", pag_scale=3.0)
    Conversion.of(pipe).revert()
    convert(pipe, Clear(radius=2), where=lambda name: not name.startswith("transformer_blocks.0."))
    assert np.abs(draw(pipe, "sd3", pag_scale=3.0) - want).max() > 1e-4
    Conversion.of(pipe).revert()
    convert(pipe, Softmax())
    assert np.abs(draw(pipe, "sd3", pag_scale=3.0) - want).max() < 1e-5
