"""FlashAttention-4 as a peer of local attention, as far as a machine without a GPU can tell."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from vision_attn.bench.candidate import AbsentError, Arranged, Candidate, Prepared
from vision_attn.bench.entries import kernels_local
from vision_attn.bench.local.fa4 import FA4, lists
from vision_attn.bench.local.flex import TILE, block_mask, disc_mask, to_tiles
from vision_attn.bench.local.problem import LOCAL, LocalProblem
from vision_attn.bench.measure import Measurement
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention

CPU = torch.device("cpu")
PROBLEM = LocalProblem("t", Grid(16, 32, prefix=128), Window(radius=6), (), (), 2, 16)


@pytest.mark.parametrize("candidate", FA4, ids=lambda candidate: candidate.name)
@pytest.mark.parametrize(
    ("change", "device", "reason"),
    [
        (dict(), "cpu", "FlashAttention-4 runs on CUDA only"),
        (dict(dtype="float32"), "cuda", "takes 16 bits only"),
        (dict(grid=Grid(16, 32, prefix=77)), "cuda", "77 tokens before the grid are no whole blocks of 128"),
        (dict(), "cuda", "flash_attn.cute.interface cannot be imported"),
    ],
    ids=["cpu", "float32", "prefix", "packages"],
)
def test_it_is_absent_with_a_reason(candidate, change, device, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(AbsentError, match=reason):
        candidate.prepare(replace(PROBLEM, **change), torch.device(device))


def test_its_lists_are_the_blocks_of_the_mask():
    mask = disc_mask(PROBLEM, TILE)
    blocks, every = block_mask(mask, PROBLEM.grid.tokens, CPU), torch.arange(PROBLEM.grid.tokens)
    seen = mask(every[:1], every[:1], every[:, None], every[None]).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    share = seen.double().mean((1, 3))
    for side, want in zip(lists(blocks, 3), (share, share.T), strict=True):
        for number, places, kept in ((*side[:2], (want > 0) & (want < 1)), (*side[2:], want == 1)):
            assert number.shape == (1, 3, 5) and places.shape == (1, 3, 5, 5) and places.is_contiguous()
            for head in range(3):
                for row in range(5):
                    found = places[0, head, row, : number[0, head, row]].tolist()
                    assert sorted(found) == kept[row].nonzero()[:, 0].tolist()


def test_its_operator_gets_tiles_and_its_mask_is_the_disc(monkeypatch):
    """A stand-in for the package computes from the lists and the mask alone what it is given."""

    def attend(q, k, v, *, mask_mod, block_sparse_tensors, block_sparse_tensors_bwd):
        _, places, _, whole = block_sparse_tensors.lists
        n = torch.arange(q.shape[1])
        seen = mask_mod(0, 0, n[:, None], n[None], None, None)
        for row in range(places.shape[2]):
            kept = whole[0, 0, row, : block_sparse_tensors.lists[2][0, 0, row]]
            cut = places[0, 0, row, : block_sparse_tensors.lists[0][0, 0, row]]
            rows = seen[row * 128 : (row + 1) * 128].unflatten(1, (-1, 128))
            none = [i for i in range(places.shape[3]) if i not in kept and i not in cut]
            rows[:, none] = False
            rows[:, kept.long()] = True
        s = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhnm,bmhd->bnhd", s.masked_fill(~seen, -torch.inf).softmax(-1), v), None

    class Lists:
        def __init__(self, *tensors, block_size):
            assert block_size == (128, 128)
            self.lists = tensors

    modules = {
        "cutlass": dict(cute=type("cute", (), dict(jit=staticmethod(lambda f: f)))), "flash_attn": {},
        "flash_attn.cute": {}, "flash_attn.cute.interface": dict(flash_attn_func=attend),
        "flash_attn.cute.block_sparsity": dict(BlockSparseTensorsTorch=Lists),
    }  # fmt: skip
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].__dict__.update(content)
    monkeypatch.setattr("vision_attn.bench.local.fa4._refuse", lambda problem, device: None)
    problem = replace(PROBLEM, dtype="float32")
    prepared = FA4[1].prepare(problem, CPU)
    inputs = problem.inputs(CPU)
    assert problem.errors(LOCAL, prepared.run, inputs, True)["o"] <= 1
    core, arranged = prepared.to_time(inputs)
    want = to_tiles(prepared.run(*inputs.tensors), problem.grid, TILE)
    torch.testing.assert_close(core(*arranged.tensors), want)
    wrong = FA4[1].prepare(replace(problem, window=Window(radius=7)), CPU)
    assert problem.errors(LOCAL, wrong.run, inputs, False)["o"] > 1


def test_what_is_arranged_before_is_not_timed():
    called = []

    def prepare(problem, device):
        def core(q, k, v):
            called.append((problem, q.detach()))
            return q + k + v

        def run(q, k, v):
            return local_attention(q, k, v, problem.grid, problem.window, backend="torch")

        return Prepared(run, None, Arranged(lambda t: to_tiles(t, problem.grid, TILE), core))

    ours = Candidate("ours", LOCAL, lambda problem, device: Prepared(prepare(problem, device).run))
    problem = replace(PROBLEM, peers=("tiled",), backward=("ours", "tiled"), dtype="float32")
    row = Measurement(CPU, rounds=1).row(problem, (ours, Candidate("tiled", LOCAL, prepare)))
    tiled = row["candidates"][1]
    assert tiled["reason"] is None and tiled["forward"]["ratio"] < 0.5 and tiled["backward"]["ratio"] < 0.5
    want = to_tiles(problem.inputs(CPU).tensors[0], problem.grid, TILE)
    assert called and all(of == problem and torch.equal(q, want) for of, q in called)


def test_the_bench_has_both():
    found = {case.name: case for case in kernels_local.cases(torch.device("cuda"))}
    names = {candidate.name for candidate in FA4}
    assert names <= {candidate.name for candidate in kernels_local.CANDIDATES}
    assert names <= set(found["disc-128-r16"].peers)
    assert all("FA4 tiles" in found[f"disc-128-r{r}"].backward for r in (8, 16, 32))
