"""Reads the weights that the authors of a paper released, as they are.

CLEAR (https://huggingface.co/Huage001/CLEAR): flat files `clear_local_{radius}[_down_{pool}].safetensors` with the
query, key, value and output projections of FLUX.1's attention under FLUX's own names, and with pooling
`*.attn.processor.spatial_weight` `[1, 1, 1, pool, 1, pool, 1]`. The radius is in the file's name only.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from vision_attn.intercept import CHILD
from vision_attn.processors.base import AttnSpec
from vision_attn.processors.clear import Clear

_CLEAR = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?\.safetensors$")
_PUBLISHED_CHILD = ".attn.processor."


def published_adapter(
    name: str, tensors: Mapping[str, Tensor], spec: AttnSpec | None = None
) -> tuple[dict[str | None, AttnSpec], dict[str, Tensor]]:
    """Return the spec of all layers and the tensors under our names, for a released file.

    Args:
        name: The file's name, which tells the hyperparameters.
        tensors: Its content.
        spec: Instead of what the name says.

    Raises:
        ValueError: If the name is not that of a released file, or the content is not what name or spec say.
    """
    match = _CLEAR.search(name)
    if spec is None and match is None:
        raise ValueError(
            f"{name} is no released file that is known, clear_local_RADIUS[_down_POOL].safetensors: give its spec="
        )
    if spec is None and match is not None:
        spec = Clear(radius=int(match[1]), pool=int(match[2] or 1))
    if not isinstance(spec, Clear):
        raise ValueError(f"{name} holds weights of CLEAR, but the spec is {spec}")
    shapes = {tuple(tensor.shape) for key, tensor in tensors.items() if key.endswith("spatial_weight")}
    want = {(1, 1, 1, spec.pool, 1, spec.pool, 1)} if spec.pool > 1 else set()
    if shapes != want:
        raise ValueError(f"{name}: spatial_weight should be {want or 'absent'} for {spec}, but is {shapes or 'absent'}")
    renamed = {key.replace(_PUBLISHED_CHILD, f".attn.{CHILD}."): tensor for key, tensor in tensors.items()}
    return {None: spec}, renamed
