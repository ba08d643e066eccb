"""FLUX's position ids decode to the right grid, also where bfloat16 merges rows and columns."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_hosts import HOST

from vision_attn import Clear, convert
from vision_attn.conversion.state import state_of
from vision_attn.grid import Grid
from vision_attn.hosts.image_ids import grid_of_ids


def ids(height, width, segment=0, dtype=torch.float32, columns=3, start=0, step=1.0):
    """Build ids as diffusers' pipelines do: segment, row, column."""
    out = torch.zeros(height, width, columns)
    out[..., 0] = segment
    out[..., 1] += (start + step * torch.arange(height))[:, None]
    out[..., 2] += step * torch.arange(width)
    return out.reshape(-1, columns).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("size", [(64, 64), (6, 11), (1, 9), (9, 1), (300, 20), (20, 300), (512, 512)], ids=str)
def test_grid_is_read_in_every_dtype(size, dtype):
    assert grid_of_ids(ids(*size, dtype=dtype)) == Grid(*size)


def test_the_largest_id_in_bfloat16_is_not_the_side():
    rounded = ids(300, 20, dtype=torch.bfloat16)
    assert int(rounded[:, 1].max()) + 1 != 300
    assert grid_of_ids(rounded) == Grid(300, 20)


@pytest.mark.parametrize(
    ("tensor", "grid"),
    [
        (torch.cat([ids(6, 10), ids(4, 8, segment=1)]), Grid(6, 10, suffix=32)),
        (
            torch.cat([ids(6, 10, columns=4), ids(4, 8, 10, columns=4), ids(2, 2, 20, columns=4)])[None],
            Grid(6, 10, suffix=36),
        ),
        (ids(12, 16, start=-0.5, step=0.5), Grid(12, 16)),
        (ids(8, 8).expand(2, -1, -1), Grid(8, 8)),
    ],
    ids=["kontext", "flux2-references", "interpolated", "batched"],
)
def test_ids_with_references_steps_or_a_batch(tensor, grid):
    assert grid_of_ids(tensor) == grid


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(60, 3), ids(6, 10)[:-1], ids(6, 10)[torch.randperm(60)], ids(6, 10).flip(0)],
    ids=["random", "one-missing", "shuffled", "backwards"],
)
def test_ids_that_are_no_grid_give_the_reason(tensor):
    assert "are not those of a grid" in grid_of_ids(tensor)


def test_a_buffer_that_is_refilled_behind_torch_is_read_again() -> None:
    case = HOST["flux"]
    model: Any = case.build()
    plain = case.build()
    for one in (model, plain):
        convert(one, Clear(radius=2))
    layer = model.transformer_blocks[0].attn
    buffer = case.inputs(6, 8, 1, 7)["img_ids"].clone()
    fill = (buffer.data.copy_, lambda new: np.copyto(buffer.numpy(), new.numpy()))
    for number, (height, width) in enumerate(((6, 8), (8, 6), (4, 12), (12, 4))):
        inputs = case.inputs(height, width, 1, 7)
        version = buffer._version
        fill[number % 2](inputs["img_ids"])
        assert buffer._version == version  # PyTorch has counted no write
        for _ in range(2):
            with torch.no_grad():
                output = model(**inputs | dict(img_ids=buffer)).sample
            grid = state_of(layer).grid
            assert grid is not None and (grid.height, grid.width) == (height, width)
        with torch.no_grad():
            assert torch.equal(output, plain(**inputs).sample)
