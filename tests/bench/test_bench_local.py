"""The benchmarks' own definition of local attention, its operation counts, and FlexAttention as a peer."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from vision_attn.bench.entries import kernels_local
from vision_attn.bench.local.candidates import outside_pairs, tile_pairs, triton_pairs
from vision_attn.bench.local.flex import TILE, block_mask, disc_mask, flex_operator, kept_pairs, to_tiles
from vision_attn.bench.local.problem import LocalProblem, needed_pairs, seen
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window

CPU = torch.device("cpu")
WINDOWS = [
    (Grid(16, 16), Window(radius=5)),
    (Grid(19, 13, prefix=7, suffix=3), Window(radius=3.5)),
    (Grid(9, 30, prefix=4), Window(radius=40)),
    (Grid(16, 16), Window(kernel_size=7)),
    (Grid(21, 17, prefix=5), Window(kernel_size=(4, 9))),
    (Grid(23, 18, suffix=2), Window(kernel_size=(5, 3), dilation=(2, 3))),
]
IDS = [f"{grid.height}x{grid.width}-{window.radius or window.kernel}" for grid, window in WINDOWS]
UNDILATED = [row for row in WINDOWS if row[1].radius is not None or row[1].steps == (1, 1)]
TILES = [((8, 8), (8, 8)), ((8, 16), (4, 8)), ((4, 8), (8, 16))]


def mask_of(grid, window):
    """Return the operator's own definition over the whole sequence."""
    mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    mask[grid.image, grid.image] = window.allowed(grid)
    return mask


@pytest.mark.parametrize(("grid", "window"), WINDOWS, ids=IDS)
def test_the_definition_is_the_operators(grid, window):
    every = torch.arange(grid.tokens)
    assert torch.equal(seen(grid, window, every, every), mask_of(grid, window))
    some = torch.randperm(grid.tokens)[:20]
    assert torch.equal(seen(grid, window, some, every), mask_of(grid, window)[some])
    assert seen(grid, None, every, every).all()


@pytest.mark.parametrize(("grid", "window"), WINDOWS, ids=IDS)
def test_needed_pairs_are_the_masks(grid, window):
    assert needed_pairs(grid, window) == mask_of(grid, window).sum()


def tiles_by_hand(grid, window, queries, keys):
    """Count key tiles from the mask: bands from a query tile's first row, tiles from a band's first column."""
    steps = (1, 1) if window.radius is not None else window.steps
    allowed = window.allowed(grid).view(grid.height, grid.width, grid.height, grid.width)
    count = 0
    for gy in range(steps[0]):
        for gx in range(steps[1]):
            sub = allowed[gy :: steps[0], gx :: steps[1], gy :: steps[0], gx :: steps[1]]
            for y in range(0, sub.shape[0], queries[0]):
                for x in range(0, sub.shape[1], queries[1]):
                    met = sub[y : y + queries[0], x : x + queries[1]].flatten(0, 1).any(0)
                    rows = met.any(1).nonzero()[:, 0]
                    for band in range(int(rows.min()), int(rows.max()) + 1, keys[0]):
                        columns = met[band : band + keys[0]].any(0).nonzero()[:, 0]
                        count += -(-int(columns.max() - columns.min() + 1) // keys[1])
    return count


@pytest.mark.parametrize(("queries", "keys"), TILES)
@pytest.mark.parametrize(("grid", "window"), WINDOWS, ids=IDS)
def test_visited_pairs_are_those_of_the_tiles(grid, window, queries, keys):
    tile = queries[0] * queries[1] * keys[0] * keys[1]
    assert tile_pairs(grid, window, queries, keys) == tile * tiles_by_hand(grid, window, queries, keys)


def test_pairs_outside_the_grid_are_whole_tiles():
    # 3 query tiles of 64 meet 2 and 1 key tiles of 8; 13 rows fill one tile and meet parts of 16, 16, 16 and 5 keys
    assert outside_pairs(Grid(4, 10, prefix=9, suffix=4), 3, 64, 8, 16) == 3 * 64 * (16 + 8) + 64 * (16 * 3 + 8)
    assert outside_pairs(Grid(4, 10), 3, 64, 8, 40) == 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("side", "radius"), [(64, 8), (64, 16), (128, 16)])
def test_our_tiles_visit_little_more_than_needed(side, radius):
    grid, window = Grid(side, side, prefix=512), Window(radius=radius)
    visited = triton_pairs(grid, window, (1, grid.tokens, 24, 128), torch.bfloat16, CPU)
    assert 1.0 < visited / (24 * needed_pairs(grid, window)) < 1.8


@pytest.mark.interpreter
@pytest.mark.parametrize(("queries", "keys"), TILES)
@pytest.mark.parametrize(("grid", "window"), UNDILATED, ids=[IDS[WINDOWS.index(row)] for row in UNDILATED])
def test_the_kernels_own_count_agrees(grid, window, queries, keys):
    from counted_tiles import kernel_tiles

    tile = queries[0] * queries[1] * keys[0] * keys[1]
    assert kernel_tiles(grid, window, queries, keys) * tile == tile_pairs(grid, window, queries, keys)


FLEX = [
    LocalProblem("t", Grid(16, 32, prefix=128), Window(radius=6), (), (), 2, 16, "float32"),
    LocalProblem("t", Grid(24, 48, prefix=40), Window(radius=9), (), (), 1, 16, "float32"),
]


@pytest.mark.parametrize(
    ("problem", "tile"),
    [
        pytest.param(FLEX[0], TILE, id="16x32-tiles"),
        pytest.param(FLEX[1], None, id="24x48-raster"),
        pytest.param(FLEX[0], None, id="16x32-raster", marks=pytest.mark.slow),
        pytest.param(FLEX[1], TILE, id="24x48-tiles", marks=pytest.mark.slow),
    ],
)
def test_flex_attention_computes_the_disc(problem, tile):
    tile = tile or (1, problem.grid.width)
    prepared, blocks = flex_operator(problem, CPU, tile)
    errors = problem.errors("the same function", prepared.run, problem.inputs(CPU), False)
    assert errors["o"] <= 1
    tokens, mask = problem.grid.tokens, disc_mask(problem, tile)
    published = create_block_mask(mask, None, None, tokens, tokens, device="cpu")
    assert torch.equal(blocks.to_dense(), published.to_dense())
    assert torch.equal(blocks.full_kv_num_blocks, published.full_kv_num_blocks)
    assert kept_pairs(blocks) == published.to_dense().sum() * 128**2


@pytest.mark.parametrize(
    ("radius", "figures"),
    [pytest.param(8, (0.063, 0.109, 0.099), marks=pytest.mark.slow), (16, (0.087, 0.150, 0.123))],
)
def test_counts_are_those_of_the_floor(radius, figures):
    """TFLOP of 24 heads of 128 channels at a 64 x 64 grid: needed, in raster blocks, in blocks of tiles."""
    problem = LocalProblem("t", Grid(64, 64, prefix=512), Window(radius=radius))
    blocks = [block_mask(disc_mask(problem, tile), problem.grid.tokens, CPU) for tile in ((1, 64), TILE)]
    visited = [4 * 128 * 24 * kept_pairs(mask) for mask in blocks]
    assert tuple(round(flop / 1e12, 3) for flop in (problem.needed_flop(False), *visited)) == figures


def test_a_wrong_flex_mask_is_caught():
    problem = FLEX[0]
    wrong, _ = flex_operator(replace(problem, window=Window(radius=7)), CPU, TILE)
    assert problem.errors("the same function", wrong.run, problem.inputs(CPU), False)["o"] > 1


def test_tiles_are_a_permutation():
    grid = Grid(16, 32, prefix=5)
    t = torch.randn(1, grid.tokens, 2, 3)
    tiles = to_tiles(t, grid, TILE)
    assert torch.equal(tiles[:, 5 + 16 : 5 + 32], t[:, 5 + 32 : 5 + 48])  # the first tile's second row
    assert torch.equal(to_tiles(tiles, grid, TILE, inverse=True), t)


def test_the_cases_are_the_issues():
    found = {case.name: case for case in kernels_local.cases(torch.device("cuda"))}
    assert len(found) == len(kernels_local.cases(torch.device("cuda")))
    discs = [f"disc-{side}-r{r}" for side in (64, 128, 256) for r in (8, 16, 32)] + ["disc-512-r16"]
    squares = [
        f"square-{side}-k{K}{d}" for d in ("", "-d64") for side in (64, 128, 256) for K in (7, 13, 33, 65) if side > K
    ]
    assert set(discs + squares + ["dilated-128-k7", "dilated-128-k13"]) <= set(found)
    assert all("ours" in found[name].backward for name in discs)
    assert "Flex raster" in found["disc-128-r16"].backward
    quick = kernels_local.cases(torch.device("cuda"), quick=True)
    assert {case.name for case in quick} < set(found) and len(quick) == 4


def test_eight_bits_are_held_to_a_cosine():
    problem = LocalProblem("", Grid(16, 24, prefix=9), Window(radius=5), heads=2, head_dim=32, dtype="float32")
    inputs = problem.inputs(torch.device("cpu"))
    (int8,) = (c for c in kernels_local.CANDIDATES if c.name == "int8")
    run = int8.prepare(problem, torch.device("cpu")).run
    assert 0.05 < problem.errors(int8.computes, run, inputs, False)["o"] < 0.6
    wrong = replace(problem, window=Window(radius=4))
    assert problem.errors(int8.computes, int8.prepare(wrong, torch.device("cpu")).run, inputs, False)["o"] > 2
    (fp8,) = (c for c in kernels_local.CANDIDATES if c.name == "fp8")
    run = fp8.prepare(problem, torch.device("cpu")).run
    assert 0.4 < problem.errors(fp8.computes, run, inputs, False)["o"] < 0.7

    def two_bits(*tensors):
        return run(*(t.to(torch.float8_e5m2).to(t.dtype) for t in tensors))

    assert problem.errors(fp8.computes, two_bits, inputs, False)["o"] > 1.5  # e4m3 has three
