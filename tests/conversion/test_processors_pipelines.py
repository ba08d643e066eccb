"""Every processor in pipelines, with ControlNet, image to image, IP-Adapter and LoRA."""

from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from covering import quick
from processor_table import KIND_OF_SPEC, PROCESSORS
from tiny_pipelines import PIPELINE, add_lora, ip_adapter_inputs, load_ip_adapter

import vision_attn.pipelines  # noqa: F401, pipelines get set_attn_processor
from vision_attn.processors import AgentSD, Softmax

SIZE = (16, 16)  # tokens; the levels of a UNet below still divide by the pool
WITH_ADDITIONS = list(
    product(("sd", "sd-img2img", "sd-controlnet", "flux", "flux-img2img"), ("nothing", "ip-adapter", "lora"))
)
PAIRWISE = quick(
    [(*case, name) for case in WITH_ADDITIONS for name in PROCESSORS],
    (lambda pipeline_id, addition, name: (pipeline_id, addition), 1),
    (lambda pipeline_id, addition, name: (pipeline_id.partition("-")[0], name), 1),  # of each denoiser
    (lambda pipeline_id, addition, name: (addition, KIND_OF_SPEC[name]), 1),
)


def draw(pipeline_id: str, addition: str, spec: Any) -> np.ndarray:
    case = PIPELINE[pipeline_id]
    pipe: Any = case.build()
    if spec is not None:
        conversion = pipe.set_attn_processor(spec)
        with torch.no_grad():
            for i, parameter in enumerate(conversion.parameters()):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    extra = {}
    if addition == "ip-adapter":
        load_ip_adapter(pipe)
        extra = ip_adapter_inputs(pipe)
    elif addition == "lora":
        add_lora(pipe.components.get("unet") or pipe.components["transformer"])
    torch.manual_seed(0)
    return pipe(**case.call(*(tokens * case.patch for tokens in SIZE)), **extra).images


@cache
def stock(pipeline_id: str, addition: str) -> np.ndarray:
    return draw(pipeline_id, addition, None)


@pytest.mark.parametrize(("pipeline_id", "addition"), WITH_ADDITIONS)
def test_softmax_gives_the_stock_images(pipeline_id: str, addition: str) -> None:
    assert np.abs(draw(pipeline_id, addition, Softmax()) - stock(pipeline_id, addition)).max() <= 1e-5
    if addition != "nothing":
        assert np.abs(stock(pipeline_id, addition) - stock(pipeline_id, "nothing")).max() > 1e-4


@pytest.mark.parametrize(("pipeline_id", "addition", "name"), PAIRWISE)
def test_processors_change_the_images(pipeline_id: str, addition: str, name: str) -> None:
    image = draw(pipeline_id, addition, PROCESSORS[name])
    assert np.isfinite(image).all()
    assert np.abs(image - stock(pipeline_id, addition)).max() > 1e-5


def test_the_training_free_schedule_runs_in_a_pipeline() -> None:
    case = PIPELINE["sd"]
    images = []
    for spec in (None, AgentSD(), AgentSD.schedule()):
        pipe: Any = case.build()
        if spec is not None:
            pipe.set_attn_processor(spec)
        call = case.call(*(tokens * case.patch for tokens in SIZE)) | dict(num_inference_steps=10)
        torch.manual_seed(0)
        images.append(pipe(**call).images)
    stock_image, agents, scheduled = images
    differences = [np.abs(a - b).max() for a, b in ((stock_image, agents), (agents, scheduled))]
    assert min(differences) > 1e-5 and np.isfinite(scheduled).all()
