"""Programs of the documentation and of the examples for several processes, on tiny pipelines in processes of a test."""

import re
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from sliced_models import HOST  # noqa: F401, diffusers' stand-ins come first
from tiny_pipelines import PIPELINE

ROOT = Path(__file__).parents[2]
STAND_INS = {
    r"FluxPipeline\.from_pretrained\(.*\)": "tiny()",
    r"torch\.cuda\.set_device\(.*\)\n": "None\n",
    r"torch\.distributed\.init_process_group\(.*\)": "None",
    r"torch\.distributed\.destroy_process_group\(\)": "None",
    r'Generator\("cuda"\)': "Generator()",
    r"height=8192, width=8192": "height=64, width=64, num_inference_steps=1",
    r'"a harbour at dawn"(, height=64)': r'"red apple"\1',
}
SMALL = ["--prompt", "red apple", "--side", "64", "--steps", "1", "--processor", "clear:radius=3"]


def tiny():
    """Return a FLUX pipeline with an encoder of prompts that knows one; gloo gathers equal slices only."""
    pipe, call = PIPELINE["flux"].build(), PIPELINE["flux"].call(64, 64)
    embeds = torch.cat([call["prompt_embeds"], call["prompt_embeds"][:, :1]], 1)
    pipe.encode_prompt = lambda **given: (embeds, call["pooled_prompt_embeds"], torch.zeros(embeds.shape[1], 3))
    return pipe


def stood_in(code):
    """Return a program that runs here; each of the patterns that it has is replaced."""
    for pattern, small in STAND_INS.items():
        code = re.sub(pattern, small, code)
    return code


def of_the_page(rank):
    """Run the two programs of docs/parallel.md and return the bytes of their pictures."""
    flux, sdxl = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "parallel.md").read_text(), re.DOTALL)
    names = {"tiny": tiny}
    call = PIPELINE["sdxl"].call(64, 64) | dict(num_inference_steps=1, output_type="pil")
    del call["generator"]
    sdxl = sdxl.replace('"a harbour at dawn", height=8192, width=8192', "**call")
    with patch("torch.accelerator.device_count", lambda: 1):  # diffusers divides by it, and a CPU has none
        exec(stood_in(flux), names)
        first = names["image"].tobytes()
        names |= dict(pipe=PIPELINE["sdxl"].build(), call=call)
        exec(stood_in(sdxl), names)
    return first, names["image"].tobytes()


def of_the_example(rank, out):
    """Run examples/flux_over_gpus.py."""
    code = stood_in((ROOT / "examples" / "flux_over_gpus.py").read_text())
    with patch("torch.accelerator.device_count", lambda: 1), patch.object(sys, "argv", ["", *SMALL, "--out", out]):
        exec(compile(code, "flux_over_gpus.py", "exec"), {"__name__": "__main__", "tiny": tiny})
    return dist.get_world_size()
