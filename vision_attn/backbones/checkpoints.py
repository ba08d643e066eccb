"""What checkpoint filters share: they unwrap and rename tensors, and refuse the weights of another model."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""A pattern in names, and its replacement."""


def unwrap(checkpoint: Mapping[str, Any], wrappers: Sequence[str] = ("model", "state_dict")) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, without wrappers and DistributedDataParallel's prefix 'module.'.

    Args:
        checkpoint: Tensors by name, or a dictionary that holds them under a key of `wrappers`.
        wrappers: Keys to look under, those of the best weights first.

    Raises:
        ValueError: If there are no tensors.
    """
    for wrapper in wrappers:
        if isinstance(checkpoint.get(wrapper), Mapping):
            return unwrap(checkpoint[wrapper], wrappers)
    tensors = {name.removeprefix("module."): t for name, t in checkpoint.items() if isinstance(t, Tensor)}
    if not tensors:
        raise ValueError(
            f"the checkpoint has no tensors, only {', '.join(map(repr, list(checkpoint)[:5])) or 'nothing'}"
        )
    return tensors


def rename(state_dict: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Return the tensors under new names. Each rule is applied to each name, in order."""
    renamed = {}
    for old, tensor in state_dict.items():
        name = old
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def refuse_mismatch(state_dict: Mapping[str, Tensor], model: nn.Module, shown: int = 3) -> None:
    """Refuse weights of another variant.

    Other classes and other channels of the image pass, because timm adapts the head and the first layer to them.

    Raises:
        ValueError: If names or shapes differ; the error names the first few.
    """
    own = {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.startswith("head.")}
    given = {name: tuple(t.shape) for name, t in state_dict.items() if not name.startswith("head.")}
    channels = (getattr(model, "in_chans", None),)
    wrong = [f"{name} is missing" for name in own if name not in given]
    wrong += [f"{name} {list(shape)} is unknown" for name, shape in given.items() if name not in own]
    for name in own.keys() & given.keys():
        mine, its = own[name], given[name]
        other_images = name.startswith(("patch_embed.", "stem.")) and mine[1:2] == channels and mine[2:] == its[2:]
        if mine != its and not (other_images and mine[0] == its[0]):
            wrong.append(f"{name} is {list(its)} instead of {list(mine)}")
    if wrong:
        which = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
        more = f" and {len(wrong) - shown} more" if len(wrong) > shown else ""
        raise ValueError(f"the checkpoint is of another model than {which}: {'; '.join(sorted(wrong)[:shown])}{more}")
