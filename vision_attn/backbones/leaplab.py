"""What Agent-* and InLine-* share: parameters without weight decay, reading checkpoints, configurations of weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.backbones.backbone import Backbone
from vision_attn.backbones.checkpoints import Rule, refuse_mismatch, rename, unwrap
from vision_attn.backbones.position import position_names, resize_for
from vision_attn.backbones.registry import cfg

BUFFERS = ("relative_position_index", "attn_mask")


class PositionedBackbone(Backbone):
    """A `Backbone` whose position biases and embeddings have no weight decay."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay."""
        return position_names(self)


def checkpoint_filter(
    rules: Sequence[Rule], wrappers: Sequence[str] = ("model", "state_dict")
) -> Callable[[Mapping[str, Any], nn.Module], dict[str, Tensor]]:
    """Return a function that turns a checkpoint, of the authors or of this package, into one in a model's layout.

    The function resizes position embeddings and biases to the model's size. It raises a ValueError that names the
    differences if the checkpoint is of another variant.

    Args:
        rules: Rules that turn the authors' names into ours.
        wrappers: Keys under which the tensors may lie, those of the best weights first.
    """
    head = (r"^head\.(weight|bias)$", r"head.fc.\1")

    def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
        state_dict = rename(unwrap(checkpoint, wrappers), (*rules, head))
        state_dict = {name: t for name, t in state_dict.items() if not name.endswith(BUFFERS)}
        state_dict = resize_for(state_dict, model)
        refuse_mismatch(state_dict, model)
        return state_dict

    return checkpoint_filter_fn


def leaplab_cfg(paper: str, share: str, size: int = 224, crop_pct: float = 0.875, **fields: Any) -> dict[str, Any]:
    """Return the configuration of weights of a paper; images are squashed to a square.

    Args:
        paper: The paper's number at arXiv.
        share: The key under which the authors share the weights; empty if they share none.
        size: As for `cfg`.
        crop_pct: Which part of an image's side is left after it is cut.
        fields: As for `cfg`.
    """
    url = f"https://cloud.tsinghua.edu.cn/f/{share}/?dl=1" if share else ""
    fields = dict(first_conv="patch_embed.proj", license="unknown", paper_ids=f"arXiv:{paper}") | fields
    return cfg(url, size, crop_pct=crop_pct, crop_mode="squash", **fields)
