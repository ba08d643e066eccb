"""Means over windows and the depth-wise convolution with a gate, against their definitions, and in the interpreter."""

import pytest
import torch
from operator_cases import shares

from vision_attn.grid import Grid
from vision_attn.kernels.image import Windows, add_depthwise, means
from vision_attn.processors import RALA
from vision_attn.processors.base import Layer

interpreter = pytest.mark.interpreter
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
slow = pytest.mark.slow
CUTS = {
    "even": (Grid(6, 8), Windows(size=2)),
    "ragged": (Grid(7, 5, prefix=3, suffix=1), Windows(size=3)),
    "one": (Grid(3, 4, prefix=2), Windows(size=9)),
    "count": (Grid(6, 8), Windows(count=(3, 2))),
    "overlapping": (Grid(7, 10, prefix=3), Windows(count=(3, 4))),
    "more-windows": (Grid(3, 2), Windows(count=(5, 2))),
}


def drawn(grid, *shape, dtype=torch.float64, strided=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(2, grid.tokens, *shape, dtype=torch.float64, generator=generator).half().to(dtype)
    return t.transpose(1, 2).contiguous().transpose(1, 2) if strided else t


def defined_means(t, grid, windows):
    """Each window's tokens, one after the other."""
    sides = grid.height, grid.width
    numbers = windows.count or [-(-side // windows.size) for side in sides]

    def span(i, side, number):
        if windows.size:
            return range(i * windows.size, min((i + 1) * windows.size, side))
        return range(i * side // number, -(-(i + 1) * side // number))

    found = []
    for row in range(numbers[0]):
        for column in range(numbers[1]):
            rows, columns = span(row, sides[0], numbers[0]), span(column, sides[1], numbers[1])
            found.append(t[:, [grid.prefix + y * grid.width + x for y in rows for x in columns]].mean(1))
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", CUTS)
def test_means_equal_their_definition(name):
    grid, windows = CUTS[name]
    t, other = drawn(grid, 2, 5), drawn(grid, 2, 5, seed=1)
    for ours, tokens in zip(means(t, grid, windows, and_of=other), (t, other), strict=True):
        torch.testing.assert_close(ours, defined_means(tokens, grid, windows))
    assert (means(t, grid, Windows(size=1))[0] != t[:, grid.image]).sum() == 0


@interpreter
@DTYPES
@pytest.mark.parametrize("name", [*list(CUTS)[1:2], "overlapping", *(pytest.param(c, marks=slow) for c in CUTS)])
def test_means_in_triton(name, dtype):
    grid, windows = CUTS[name]
    tensors = [drawn(grid, 2, 40, dtype=dtype, strided=True), drawn(grid, 2, 40, dtype=dtype, seed=1)]
    ours = means(tensors[0], grid, windows, and_of=tensors[1], backend="triton")
    plain = means(tensors[0], grid, windows, and_of=tensors[1], backend="torch")
    exact = [defined_means(t.double(), grid, windows) for t in tensors]
    assert max(shares(ours, plain, exact, dtype)) <= 1
    assert torch.equal(means(tensors[1], grid, windows, backend="triton")[0], ours[1])


FILTERS = {"five-gate": (5, True), "three": (3, False), "gate": (0, True)}


def filters(size, gate, H, D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).half().to(dtype)

    weight, bias = (draw(H * D, 1, size, size), draw(H * D)) if size else (None, None)
    return weight, bias, draw(H, D, D) / 4 if gate else None


def defined_depthwise(o, v, grid, weight, bias, gate):
    """Each token and each neighbour, one after the other."""
    y = o.clone()
    if weight is not None:
        reach, taps = weight.shape[-1] // 2, weight[:, 0].unflatten(0, v.shape[2:])  # [H, D, size, size]
        for i in range(grid.image_tokens):
            row, column = divmod(i, grid.width)
            y[:, grid.prefix + i] += bias.view(v.shape[2:])
            for a in range(max(row - reach, 0), min(row + reach + 1, grid.height)):
                for b in range(max(column - reach, 0), min(column + reach + 1, grid.width)):
                    near = v[:, grid.prefix + a * grid.width + b]
                    y[:, grid.prefix + i] += near * taps[..., a - row + reach, b - column + reach]
    return y if gate is None else y + y * torch.stack([v[:, :, h] @ m for h, m in enumerate(gate)], 2)


@pytest.mark.parametrize("name", FILTERS)
def test_depthwise_equals_its_definition(name):
    grid = Grid(5, 7, prefix=3, suffix=2)
    o, v, own = drawn(grid, 2, 6), drawn(grid, 2, 6, seed=1), filters(*FILTERS[name], 2, 6)
    torch.testing.assert_close(add_depthwise(o, v, grid, *own[:2], gate=own[2]), defined_depthwise(o, v, grid, *own))


@interpreter
@DTYPES
@pytest.mark.parametrize("name", ["five-gate", *(pytest.param(c, marks=slow) for c in ("three", "gate"))])
def test_depthwise_in_triton(name, dtype):
    grid = Grid(9, 11, prefix=3, suffix=2)
    o, v = drawn(grid, 2, 40, dtype=dtype), drawn(grid, 2, 40, dtype=dtype, strided=True, seed=1)
    own = filters(*FILTERS[name], 2, 40, dtype)
    ours, plain = (add_depthwise(o, v, grid, *own[:2], gate=own[2], backend=backend) for backend in ("triton", "torch"))
    exact = defined_depthwise(o.double(), v.double(), grid, *(None if t is None else t.double() for t in own))
    assert max(shares([ours], [plain], [exact], dtype)) <= 1


@interpreter
def test_opcheck():
    from vision_attn.kernels.image.op import _depthwise, _means

    grid = Grid(4, 6, prefix=1)
    o, v, own = drawn(grid, 2, 16).float(), drawn(grid, 2, 16).float(), filters(3, True, 2, 16, torch.float32)
    torch.library.opcheck(_means.registered, (o, v, [4, 6, 1], [2, 3], [2, 1, 2, 1]))
    torch.library.opcheck(_means.registered, (o, None, [4, 6, 1], [2, 3], [4, 2, 6, 3]))
    torch.library.opcheck(_depthwise.registered, (o, v, *own, [4, 6, 1]))


@interpreter
def test_a_processor_learns_where_the_kernel_has_no_gradient():
    grid, draw = Grid(4, 4), torch.randn(3, 1, 16, 2, 16)
    processors = [RALA().build(Layer("layer", 2, 16, backend=backend)) for backend in ("triton", "torch")]
    grads = []
    for processor in processors:
        loss = processor(*draw, grid).square().sum()
        grads.append(torch.autograd.grad(loss, list(processor.parameters())))
    for ours, other in zip(*grads, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match="it has no gradient"):
        add_depthwise(draw[0], draw[1], grid, None, None, gate=processors[0].gate, backend="triton")


X = torch.ones(1, 6, 2, 4)
REFUSED = {
    "both": ("either a size or a count", lambda: Windows(size=2, count=(1, 1))),
    "zero": ("at least 1", lambda: Windows(size=0)),
    "tokens": (r"must be \[B, 8, H, D\]", lambda: means(X, Grid(2, 4), Windows(size=2))),
    "other": (r"must be \[B, 6, H, D\]", lambda: means(X, Grid(2, 3), Windows(size=2), and_of=X[..., :2])),
    "outputs": ("o and v must be", lambda: add_depthwise(X.half(), X, Grid(2, 3), None, None)),
    "gate": (r"gate must be \[H, D, D\]", lambda: add_depthwise(X, X, Grid(2, 3), None, None, gate=torch.ones(2, 3))),
    "side": ("an odd side", lambda: add_depthwise(X, X, Grid(2, 3), torch.ones(8, 1, 2, 2), torch.ones(8))),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(name):
    message, call = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
