"""Mixture of heads against its definition in float64: which heads a token takes, gradients, the loss of the load."""

from typing import Any

import pytest
import torch
from operator_cases import shares
from torch import Tensor

from vision_attn import Clear, Grid, LinFusion, MoH, Multipole, Neighborhood, Softmax
from vision_attn.distill.config import StudentConfig
from vision_attn.kernels.dense import dense_attention
from vision_attn.processors import AgentSD, Layer, Moment, from_config, spec_of_text, to_config

H, D = 6, 4
GRID = Grid(3, 5, prefix=2, suffix=1)


def tensors(dtype: torch.dtype = torch.float64, heads: int = H, grid: Grid = GRID) -> Tensor:
    return torch.randn(3, 2, grid.tokens, heads, D, generator=torch.Generator().manual_seed(0), dtype=dtype)


def built(spec: MoH, heads: int = H) -> Any:
    return spec.build(Layer("", heads, D, dim=heads * D))


def gates(q: Tensor, shared: int, taken: int) -> Tensor:
    """Return the gates `[B, N, H]` by the definition: token by token, and straight through to the softmax."""
    length = q[:, :, shared:].square().sum(-1).sqrt()
    p = (length / length.std(-1, correction=0, keepdim=True)).softmax(-1)
    hard = torch.zeros_like(p)
    for b, n in [(b, n) for b in range(q.shape[0]) for n in range(q.shape[1])]:
        best = sorted(range(p.shape[2]), key=lambda h: -length[b, n, h].item())[:taken]
        hard[b, n, best] = 1
    return torch.cat([torch.ones_like(q[:, :, :shared, 0]), hard + p - p.detach()], 2)


@pytest.mark.parametrize(
    ("share", "shared", "counts"), [(0.5, 0.0, (0, 3)), (0.75, 0.5, (3, 2)), (2 / 3, 1 / 3, (2, 2))]
)
def test_output_and_gradients_are_those_of_the_definition(share: float, shared: float, counts: tuple[int, int]) -> None:
    spec = MoH(share=share, shared=shared)
    assert spec.heads(H) == counts
    leaves = tensors().requires_grad_()
    o = built(spec)(*leaves, GRID)
    expected = dense_attention(*leaves) * gates(leaves[0], *counts)[..., None]
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    assert (o.abs().sum(-1) > 0).sum(-1).unique().tolist() == [sum(counts)]
    do = torch.randn_like(o)
    (ours,), (theirs,) = (torch.autograd.grad(t, leaves, do) for t in (o, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_within_the_budget(dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype)
    exact, plain = (
        dense_attention(*t) * gates(t[0].double(), 3, 2)[..., None] for t in (tensors(dtype).double(), (q, k, v))
    )
    assert max(shares([built(MoH())(q, k, v, GRID)], [plain.to(dtype)], [exact], dtype)) <= 1


@pytest.mark.parametrize("spec", [Clear(radius=2), Multipole(cell=2, pool=1, exact=1), LinFusion(), Softmax()], ids=str)
def test_heads_that_are_taken_are_those_of_the_other_processor(spec: Any) -> None:
    q, k, v = tensors()
    mixture = built(MoH(spec, share=0.5, shared=1 / 6)).double()
    o, whole = mixture(q, k, v, GRID), mixture.inner(q, k, v, GRID)
    taken = o.abs().sum(-1) > 0
    assert taken.sum(-1).unique().tolist() == [3] and taken[:, :, 0].all()
    torch.testing.assert_close(o, whole * taken[..., None], rtol=0, atol=0)


def test_all_heads_are_the_other_processor() -> None:
    q, k, v = tensors()
    assert torch.equal(built(MoH(share=1.0))(q, k, v, GRID), dense_attention(q, k, v))
    one = q[:, :, :1], k[:, :, :1], v[:, :, :1]
    assert torch.equal(built(MoH(share=0.1, shared=0), 1)(*one, GRID), dense_attention(*one))


def test_the_load_is_least_where_heads_are_taken_equally() -> None:
    mixture = built(MoH(share=0.5, shared=0))
    q = torch.eye(H)[torch.arange(60) % H][None, :, :, None] + 1  # each head is the longest for one token in six
    even = mixture.balance(q.expand(1, 60, H, D))
    uneven = mixture.balance(q[:, :1].expand(1, 60, H, D))
    assert even < uneven
    leaf = tensors()[0].requires_grad_()
    hard, p = gates(leaf, 0, 3).detach(), None
    length = leaf.norm(dim=-1)
    p = (length / length.std(-1, correction=0, keepdim=True)).softmax(-1)
    loss = mixture.balance(leaf)
    expected = sum(hard[..., h].mean() * p[..., h].mean() for h in range(H))
    torch.testing.assert_close(loss, expected)
    (ours,), (theirs,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().max() > 0


def test_equal_lengths_are_no_nan() -> None:
    q = torch.ones(1, GRID.tokens, H, D).requires_grad_()
    o = built(MoH())(q, q, q, GRID)
    o.sum().backward()
    assert o.isfinite().all() and q.grad is not None and q.grad.isfinite().all()


def test_lengths_that_are_nearly_equal_have_their_gradient_in_float32() -> None:
    """As those of a host that normalises its queries: of two heads both logits are 1 from their mean, whatever q is."""
    q = 8 * torch.nn.functional.normalize(torch.randn(1, 512, 2, D), dim=-1)
    leaf = (q * torch.tensor([1.05, 1.0])[:, None]).requires_grad_()
    (gradient,) = torch.autograd.grad(built(MoH(share=0.5, shared=0), 2).balance(leaf), leaf)
    assert gradient.abs().max() < 1e-9


def test_a_processor_that_wants_the_moment_gets_it() -> None:
    spec, grid = MoH(AgentSD(cell=2, random=False)), Grid(4, 4)
    q, k, v = tensors(torch.float32, grid=grid)
    moment = Moment(0.0, grid.image_tokens, torch.randn(2, grid.image_tokens, H * D))
    mixture = built(spec)
    assert mixture.wants and mixture.at(moment) is mixture
    taken = mixture(q, k, v, grid, None, None, moment)
    whole = mixture.inner(q, k, v, grid, None, None, moment)
    torch.testing.assert_close(taken, whole * (taken.abs().sum(-1, keepdim=True) > 0))


def test_the_other_processors_residual_networks_are_its_own() -> None:
    mixture = built(MoH(LinFusion(mid_dim=4)))
    assert set(mixture.residuals()) == {"q", "k"} and mixture.residuals() == mixture.inner.residuals()


def test_a_bias_reaches_the_other_processor() -> None:
    q, k, v = tensors()
    bias = torch.randn(H, GRID.tokens, GRID.tokens, dtype=torch.float64)
    mixture = built(MoH(Clear(radius=2)))
    taken, whole = mixture.biased(q, k, v, GRID, bias), mixture.inner.biased(q, k, v, GRID, bias)
    torch.testing.assert_close(taken, whole * (taken.abs().sum(-1, keepdim=True) > 0))
    with pytest.raises(ValueError, match="Multipole"):
        built(MoH(Multipole())).biased(q, k, v, GRID, bias)


def test_it_is_written_in_configurations_and_on_command_lines() -> None:
    spec = MoH(Clear(radius=8, pool=2), share=0.5, shared=0.25)
    assert from_config(to_config(spec)) == spec
    assert str(spec) == "MoH(spec=Clear(radius=8, pool=2), share=0.5, shared=0.25)"
    assert spec_of_text("moh:spec=(clear:radius=8,pool=2),share=0.5,shared=0.25") == spec
    assert spec_of_text("moh:spec=clear,share=0.5") == MoH(Clear(), share=0.5)
    assert spec_of_text("moh:spec=neighborhood:kernel_size=(3,5)") == MoH(Neighborhood((3, 5)))
    fields = {"spec": {"class": "Clear", "radius": 8, "pool": 2}, "share": 0.5, "shared": 0.25}
    assert StudentConfig("MoH", fields).spec() == spec
    with pytest.raises(ValueError, match="with its class"):
        StudentConfig("MoH", {"spec": {"radius": 8}})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MoH("clear"), TypeError, "spec must be the spec"),  # type: ignore[arg-type]
        (lambda: MoH(AgentSD.schedule()), TypeError, "neither a Schedule"),
        (lambda: MoH(MoH()), TypeError, "nor MoH"),
        (lambda: MoH(share=0.5, shared=0.75), ValueError, "shared <= share"),
        (lambda: MoH(share=1.5), ValueError, "share <= 1"),
        (lambda: MoH(share=0.0, shared=0.0), ValueError, "share 0.0"),
        (lambda: MoH(share="1"), TypeError, "share"),  # type: ignore[arg-type]
    ],
    ids=["text", "schedule", "twice", "more-shared", "above-one", "none", "type"],
)
def test_bad_fields_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
