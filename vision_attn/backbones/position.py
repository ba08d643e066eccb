"""Position embeddings and biases for maps of another size: resized on the fly, or once when a checkpoint is loaded."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn


def resized_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize position embeddings.

    Args:
        positions: `[1, N, C]` of a map in row-major order.
        old: Height and width of that map.
        new: Height and width of the map at hand.
        mode: 'bilinear' or 'bicubic'.

    Returns:
        `[1, height, width, C]`.
    """
    image = positions.unflatten(1, [old[0], old[1]])
    if old[0] == new[0] and old[1] == new[1]:
        return image
    size = [new[0], new[1]]
    return F.interpolate(image.permute(0, 3, 1, 2), size, mode=mode, align_corners=False).permute(0, 2, 3, 1)


def position_names(model: nn.Module) -> set[str]:
    """Return the parameters that say where tokens are, and class tokens: they are not decayed."""
    kinds = ("an", "na", "ah", "aw", "ha", "wa", "ac", "ca")
    ends = (*(f".{kind}_bias" for kind in kinds), ".relative_position_bias_table", ".pos_embed", ".cls_token")
    return {name for name, _ in model.named_parameters() if name.endswith(ends)}


def resize_for(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resize what a checkpoint says of positions to the sizes that a model was made for.

    Agents' rows and columns linearly, tables of relative positions and position embeddings bicubically, as the authors
    do for fine-tuning. All maps are taken for square.

    Args:
        state_dict: Tensors under the model's names.
        model: The model that is to hold them.
    """
    own = {name: p.shape for name, p in model.named_parameters()}
    resized = {}
    for name, tensor in state_dict.items():
        want, t = own.get(name), tensor
        if want is not None and tensor.shape != want and tensor.dim() == len(want):
            kind = name.rsplit(".", 1)[-1]
            if kind in ("ah_bias", "aw_bias") and tensor.shape[:3] == want[:3]:
                t = F.interpolate(tensor[0].float(), tuple(want[3:]), mode="bilinear")[None]
            elif kind in ("ha_bias", "wa_bias") and (tensor.shape[1], tensor.shape[4]) == (want[1], want[4]):
                rows = tensor[0].float().permute(0, 3, 1, 2)
                t = F.interpolate(rows, tuple(want[2:4]), mode="bilinear").permute(0, 2, 3, 1)[None]
            elif kind == "relative_position_bias_table" and tensor.shape[1] == want[1]:
                old, new = int(tensor.shape[0] ** 0.5), int(want[0] ** 0.5)
                t = resized_positions(tensor[None].float(), (old, old), (new, new), "bicubic")[0].flatten(0, 1)
            elif kind == "pos_embed" and tensor.shape[2] == want[2]:
                t = _resize_embedding(tensor, want[1])
        resized[name] = t.to(tensor.dtype)
    return resized


def _resize_embedding(tensor: Tensor, tokens: int) -> Tensor:
    """Resize `[1, N, C]` to another number of tokens; what a square leaves over is a class token, which stays."""
    old, new = int(tensor.shape[1] ** 0.5), int(tokens**0.5)
    prefix = tokens - new**2
    if tensor.shape[1] - old**2 != prefix:
        return tensor
    image = resized_positions(tensor[:, prefix:].float(), (old, old), (new, new), "bicubic")
    return F.pad(image.flatten(1, 2), (0, 0, prefix, 0)) + F.pad(tensor[:, :prefix], (0, 0, 0, new**2))
