"""Families of hosts: one file, one kind of model. Adding a model is one `Host` here, or one given to `convert`."""

from torch import nn

from vision_attn.hosts.dit import DITS
from vision_attn.hosts.host import Host
from vision_attn.hosts.unet import UNETS
from vision_attn.hosts.vit import VITS

HOSTS: tuple[Host, ...] = (*UNETS, *DITS, *VITS)

__all__ = ["HOSTS", "Host", "find_host", "is_known"]


def _classes(model: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(model).__mro__]


def is_known(model: object) -> bool:
    """Whether `model` is of a family that `convert` knows."""
    return isinstance(model, nn.Module) and any(set(host.models) & set(_classes(model)) for host in HOSTS)


def find_host(model: nn.Module) -> Host:
    """Return the host of `model` by the name of its class or of one it derives from.

    Raises:
        ValueError: If no family has it, or a model of this family cannot be converted.
    """
    classes = _classes(model)
    for host in HOSTS:
        if set(host.models) & set(classes):
            problem = host.problem(model)
            if problem:
                raise ValueError(f"{classes[0]} cannot be converted: {problem}")
            return host
    hint = ""
    if any(word in classes[0] for word in ("3D", "Video")):
        hint = " It looks like a video model, and a grid is one image."
    elif is_known(getattr(model, "model", None)):
        hint = " It holds one as its attribute `model`: convert that."
    known = ", ".join(name for host in HOSTS for name in host.models)
    raise ValueError(
        f"{classes[0]} is no known host.{hint} Known are {known}. For another image model say which modules attend "
        "over the grid and where the grid is: convert(model, spec, host=Host(layers=('blocks.*.attn',), "
        "probe=lambda module, inputs: Grid(height, width)))"
    )
