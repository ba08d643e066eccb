"""Where a run happened: the device, a name for files, and versions."""

import datetime
import importlib.metadata
import platform
import re

import torch

_PACKAGES = ("vision_attn", "torch", "triton", "xformers", "natten", "diffusers", "timm")


def pick_device(name: str | None) -> torch.device:
    """Return the device called `name`, or if None a GPU where there is one.

    Raises:
        ValueError: If there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: no CUDA device is visible")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or, on a CPU, of the architecture and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def device_slug(device: torch.device) -> str:
    """Return the device's name for file names: 'cpu', or 'h200' for 'NVIDIA H200'."""
    if device.type == "cpu":
        return "cpu"
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return "_".join(word for word in words if word not in ("nvidia", "amd", "geforce"))


def versions() -> dict[str, str | None]:
    """Return the version of Python and of every package that takes part; None where it is not installed."""
    found: dict[str, str | None] = dict(python=platform.python_version(), cuda=torch.version.cuda)
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = str(torch.__version__)
    return found


def today() -> str:
    """Return the date in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
