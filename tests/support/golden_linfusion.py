"""The golden cases of LinFusion: tiny UNets with released-format weights, recorded from the authors' code."""

import json

from diffusers import UNet2DConditionModel
from golden_case import GOLDEN, tensors

CASES = sorted(path.parent.name for path in (GOLDEN / "linfusion").glob("*/meta.json"))


def read(name):
    """Return what a case says of itself, its tensors, a new stock UNet, and the released repository."""
    folder = GOLDEN / "linfusion" / name
    meta, io = json.loads((folder / "meta.json").read_text()), tensors(f"linfusion/{name}/io.safetensors")
    return meta, io, UNet2DConditionModel.from_pretrained(folder / "unet").eval(), folder / "linfusion"


def arguments(io, prefix, sample="sample", timestep="timestep"):
    """Return the arguments of a forward: those of a grid (`prefix` is 'g1.', say) or of the recorded loss ('loss.')."""
    extra = {key: io[f"g0.{key}"] for key in ("text_embeds", "time_ids") if f"g0.{key}" in io}
    g = prefix if prefix.startswith("g") else "g0."
    extra = {key: io[f"{g}{key}"] for key in extra}
    return dict(
        sample=io[prefix + sample],
        timestep=io[prefix + timestep],
        encoder_hidden_states=io[f"{g}encoder_hidden_states"],
        added_cond_kwargs=extra or None,
    )
