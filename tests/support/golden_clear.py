"""The golden cases of CLEAR: tiny FLUX transformers with released-format weights, recorded from the authors' code."""

import json

from diffusers import FluxTransformer2DModel
from golden_case import GOLDEN, tensors

CASES = sorted(path.parent.name for path in (GOLDEN / "clear").glob("*/meta.json"))
INPUTS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance", "img_ids", "txt_ids")


def teacher_of(name):
    """Return the FLUX that a case was recorded from, before any conversion."""
    return FluxTransformer2DModel.from_pretrained(GOLDEN / "clear" / name / "transformer").eval()


def read(name):
    """Return what a case says of itself, its tensors, the inputs of a forward for each grid, and the released file."""
    folder = GOLDEN / "clear" / name
    meta = json.loads((folder / "meta.json").read_text())
    io = tensors(f"clear/{name}/io.safetensors")
    inputs = [{key: io[f"g{i}.{key}"] for key in INPUTS if f"g{i}.{key}" in io} for i in range(len(meta["grids"]))]
    return meta, io, inputs, folder / meta["ckpt"]


def pack(x):
    """Pack latents `[B, C, 2 h, 2 w]` as FLUX does, to `[B, h w, 4 C]`."""
    B, C, height, width = x.shape
    return x.view(B, C, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 4 * C)
