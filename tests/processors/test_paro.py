"""PARO: orders, the choice of a calibration against a dense definition, what is stored, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from host_runs import run, size_of
from tiny_hosts import HOST
from torch import Tensor

from vision_attn import Clear, Grid, MoH, Paro, convert, load
from vision_attn.kernels.block_sparse import Blocks, block_sparse_attention, inverse
from vision_attn.kernels.dense import dense_attention
from vision_attn.processors import Layer, paro
from vision_attn.processors.paro import ORDERS, ParoAttention, block_sums, calibrating, hilbert, nearest, orders_of

H, D = 2, 4
CPU = torch.device("cpu")


def tensors(grid: Grid, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 2, grid.tokens, H, D, generator=torch.Generator().manual_seed(0), dtype=dtype)


def built(spec: Paro) -> Any:
    return spec.build(Layer("", H, D))


def layers(model: Any) -> list[ParoAttention]:
    return [module for module in model.modules() if isinstance(module, ParoAttention)]


def spans(order: Tensor, grid: Grid, count: int) -> set[tuple[int, int]]:
    """Return the height and width of the blocks of an order."""
    sides = set()
    for block in order.view(count, -1):
        y, x = block // grid.width, block % grid.width
        sides.add((int(y.max() - y.min()) + 1, int(x.max() - x.min()) + 1))
    return sides


def test_blocks_of_the_orders_have_six_shapes() -> None:
    grid = Grid(16, 16)
    orders = orders_of(grid, 16, CPU)
    assert all(order.sort().values.equal(torch.arange(256)) for order in orders)
    shapes = {name: spans(order, grid, 16) for name, order in zip(ORDERS, orders, strict=True)}
    assert shapes["rows"] == {(1, 16)} and shapes["columns"] == {(16, 1)}
    assert shapes["squares"] == {(4, 4)} and shapes["hilbert"] == {(4, 4)}
    assert all(height < width for height, width in shapes["wide"])
    assert {(width, height) for height, width in shapes["wide"]} == shapes["tall"]
    for grid in (Grid(5, 7), Grid(1, 9), Grid(3, 2), Grid(1, 1)):
        found = orders_of(grid, 64, CPU)
        assert all(order.sort().values.equal(torch.arange(grid.image_tokens)) for order in found)


def test_hilberts_curve_goes_from_neighbour_to_neighbour() -> None:
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    order = hilbert(y, x, 16).flatten().argsort()
    steps = (order[1:] // 16 - order[:-1] // 16).abs() + (order[1:] % 16 - order[:-1] % 16).abs()
    assert steps.unique().tolist() == [1]


def test_before_a_calibration_near_blocks_are_kept() -> None:
    kept = nearest(64, 9)
    place = orders_of(Grid(8, 8), 64, CPU)[ORDERS.index("hilbert")]
    middle = [i for i in range(64) if 0 < place[i] // 8 < 7 and 0 < place[i] % 8 < 7]
    for block in middle:
        near = place[kept[block]]
        assert max((near // 8 - place[block] // 8).abs().max(), (near % 8 - place[block] % 8).abs().max()) == 1
    assert all(block in row for block, row in enumerate(kept.tolist()))


@pytest.mark.parametrize("grid", [Grid(4, 6), Grid(5, 7, prefix=3, suffix=1)], ids=str)
def test_sums_of_blocks_are_those_of_the_weights(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paro, "_MOST", 3 * 2 * H * grid.tokens)  # three queries at a time
    q, k, _ = tensors(grid)
    outside = grid.prefix + grid.suffix
    mask = torch.rand(2, outside, generator=torch.Generator().manual_seed(1)) < 0.5 if outside else None
    sums = block_sums(q, k, grid, 4, mask, None)
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * D**-0.5
    if mask is not None:
        whole = torch.ones(2, grid.tokens, dtype=torch.bool)
        whole[:, [*range(grid.prefix), *range(grid.image.stop, grid.tokens)]] = mask
        logits = logits.masked_fill(~whole[:, None, None], -torch.inf)
    weights = logits.softmax(-1)[:, :, grid.image, grid.image].sum(0)
    for number, order in enumerate(orders_of(grid, 4, CPU)):
        block = inverse(order[None])[0] * 4 // grid.image_tokens
        for h in range(H):
            for a in range(4):
                for b in range(4):
                    held = weights[h][block == a][:, block == b].sum()
                    assert sums[number, h, a, b].item() == pytest.approx(held.item(), rel=1e-4)


def striped(grid: Grid, by_column: bool) -> Tensor:
    """Return queries that are keys too, of one sample and head, equal along rows or along columns."""
    line = torch.arange(grid.image_tokens)
    line = line % grid.width if by_column else line // grid.width
    return 6.0 * torch.nn.functional.one_hot(line, max(grid.height, grid.width)).float()[None, :, None]


def test_heads_choose_the_order_that_makes_blocks_of_their_attention() -> None:
    """One head attends along its row, the other along its column: strips hold all of it, others do not."""
    grid, spec = Grid(8, 8), Paro(density=1 / 8, blocks=8)
    x = torch.cat([striped(grid, False), striped(grid, True)], 2)
    v, processor = torch.randn_like(x), spec.build(Layer("", 2, 8))
    before, dense = processor(x, x, v, grid), dense_attention(x, x, v)
    with calibrating(processor):
        torch.testing.assert_close(processor(x, x, v, grid), dense)
    assert [ORDERS[i] for i in processor.order.tolist()] == ["rows", "columns"]
    assert processor.mass.min() > 0.99
    assert processor.kept[0].tolist() == [[i] for i in range(8)]
    assert (processor(x, x, v, grid) - dense).abs().max() < 1e-3
    assert (before - dense).abs().max() > 0.1


def test_what_is_kept_holds_most() -> None:
    """No choice of as many blocks holds more, but that a block's own is always kept."""
    grid, spec = Grid(6, 6, prefix=2), Paro(density=0.4, blocks=6)
    q, k, v = tensors(grid, torch.float32)
    processor = built(spec)
    with calibrating(processor):
        processor(q, k, v, grid)
        processor(k, q, v, grid)
    sums = block_sums(q, k, grid, 6, None, None) + block_sums(k, q, grid, 6, None, None)
    own = 1e6 * torch.eye(6)
    best = (sums + own).sort(-1, descending=True).indices[..., : spec.kept].sort(-1).values  # [6, H, blocks, K]
    held = sums.gather(-1, best).sum((2, 3)) / sums.sum((2, 3))
    for h in range(H):
        assert processor.order[h] == held[:, h].argmax()
        assert processor.kept[h].tolist() == best[processor.order[h], h].tolist()
        assert processor.mass[h].item() == pytest.approx(held[:, h].max().item(), rel=1e-5)


@pytest.mark.parametrize("grid", [Grid(4, 6), Grid(5, 7, prefix=3, suffix=1), Grid(2, 2, prefix=1)], ids=str)
def test_the_processor_is_the_operator_on_what_was_chosen(grid: Grid) -> None:
    leaves = tensors(grid).requires_grad_()
    processor = built(Paro(density=0.5, blocks=6))
    with calibrating(processor):
        processor(*leaves.detach(), grid)
    blocks = Blocks(orders_of(grid, 6, CPU)[processor.order], processor.kept)
    o, expected = (
        f(*leaves, grid) for f in (processor, lambda *t: block_sparse_attention(*t, blocks, backend="reference"))
    )
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    (ours,), (theirs,) = (torch.autograd.grad(t.square().sum(), leaves) for t in (o, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.slow  # tracing takes seconds
def test_compiled_code_is_one_graph() -> None:
    grid = Grid(4, 6, prefix=2)
    q, k, v = tensors(grid, torch.float32)
    processor = built(Paro(density=0.5, blocks=6))
    compiled = torch.compile(processor, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, grid), processor(q, k, v, grid))


@pytest.mark.parametrize("host_id", ["flux", pytest.param("sd15-unet", marks=pytest.mark.slow)])
def test_an_adapter_stores_order_and_blocks(host_id: str, tmp_path: Path) -> None:
    case = HOST[host_id]
    model = case.build()
    conversion = convert(model, Paro(density=0.3, blocks=8))
    before = run(case, model, *size_of(case))
    with calibrating(model):
        dense = run(case, model, *size_of(case))
    after = run(case, model, *size_of(case))
    torch.testing.assert_close(dense, run(case, case.build(), *size_of(case)), rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-5
    conversion.save(tmp_path)
    other = case.build()
    load(other, tmp_path)
    for ours, theirs in zip(layers(model), layers(other), strict=True):
        assert torch.equal(ours.order, theirs.order) and torch.equal(ours.kept, theirs.kept)
        assert not ours.mass.isnan().any()
    torch.testing.assert_close(run(case, other, *size_of(case)), after, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="kept is"):
        load(case.build(), tmp_path, spec=Paro(density=0.3, blocks=16))


def test_a_mixture_of_heads_is_calibrated_too() -> None:
    case = HOST["vit"]
    model = case.build()
    convert(model, MoH(Paro(blocks=8), share=1.0))
    with calibrating(model):
        run(case, model, *size_of(case))
    assert not any(layer.mass.isnan().any() for layer in layers(model))


def test_a_calibration_of_nothing_is_refused() -> None:
    case = HOST["vit"]
    model = case.build()
    with pytest.raises(ValueError, match="has PARO attention"), calibrating(model):
        pass
    conversion = convert(model, Clear(radius=2))
    with pytest.raises(ValueError, match="has PARO attention"), calibrating(model):
        pass
    conversion.revert()
    conversion = convert(model, Paro(blocks=8))
    with pytest.raises(ValueError, match="not bypassed"), calibrating(model), conversion.bypassed():
        run(case, model, *size_of(case))
    before = [layer.kept.clone() for layer in layers(model)]
    with pytest.raises(ValueError, match="block already"), calibrating(model), calibrating(model):
        pass
    with pytest.raises(KeyError, match="stop"), calibrating(model):
        run(case, model, *size_of(case))
        raise KeyError("stop")
    assert all(layer.sums is None for layer in layers(model))
    assert all(torch.equal(layer.kept, kept) for layer, kept in zip(layers(model), before, strict=True))


def test_the_share_of_tokens_is_that_of_the_kept_blocks() -> None:
    assert Paro(density=0.25, blocks=64).attended(Grid(64, 64)) == pytest.approx(0.25)
    assert Paro(density=1.0).attended(Grid(8, 8, prefix=3)) == pytest.approx(1.0)
    assert Paro(density=0.01, blocks=8).kept == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Paro(density=0.0), ValueError, "density must be above 0"),
        (lambda: Paro(density=1.5), ValueError, "at most 1"),
        (lambda: Paro(density="1"), TypeError, "density"),  # type: ignore[arg-type]
        (lambda: Paro(blocks=0), ValueError, "blocks"),
    ],
    ids=["zero", "above-one", "type", "blocks"],
)
def test_bad_fields_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
