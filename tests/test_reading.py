"""How many files one opens to read the three paths that matter; CONTRIBUTING.md lists them."""

import re
from pathlib import Path

import pytest
import torch
from distill_case import settings, write_images
from opened_files import opened_files
from tiny_hosts import HOST

import vision_attn
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def listed(heading: str) -> set[str]:
    """The files that a section of CONTRIBUTING.md names."""
    section = CONTRIBUTING.split(f"### {heading}\n")[1].split("\n#")[0]
    return set(re.findall(r"`([\w/]+\.py)`", section))


def test_convert_and_one_forward() -> None:
    case = HOST["flux"]
    model, inputs = case.build(), case.inputs(6, 8, 2, 7)
    convert, spec = vision_attn.convert, vision_attn.Clear  # importing them is not reading them
    with opened_files() as files:
        convert(model, spec(radius=2))
        model(**inputs)
    files.add("__init__.py")  # it looks a name up once in a process
    assert files == listed("For `convert` and one forward")
    assert len(files) <= 18


@pytest.mark.interpreter
def test_a_local_kernel_forward_and_backward() -> None:
    grid, window = Grid(5, 6, prefix=2), Window(kernel_size=3)
    q, k, v = (torch.randn(1, grid.tokens, 1, 16, requires_grad=True) for _ in range(3))
    with opened_files() as files:
        local_attention(q, k, v, grid, window, backend="triton").sum().backward()
    assert files == listed("For a local kernel, forward and backward")
    assert len(files) <= 10


def test_a_training(tmp_path: Path) -> None:
    """Hosts, processors, operators and the teacher are those of the model at hand, and not counted."""
    from vision_attn.distill.cache import write_cache
    from vision_attn.distill.loop import train

    write_images(tmp_path / "images", count=2)
    write_cache(settings(tmp_path))
    config = settings(tmp_path, run__steps=1, run__save_every=0)  # reading a file of settings is no training
    with opened_files() as files:
        train(config)
    own = {name for name in files if name.split("/")[0] in ("distill", "conversion", "adapters", "highres")}
    own.discard("conversion/repeats.py")  # which a GPU opens too
    assert own == listed("For a training")
    assert len(own) <= 16
