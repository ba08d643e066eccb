"""Residual networks on tokens against their definition, and in the interpreter; what no kernel takes is refused."""

import pytest
import torch
from interpreted import take
from operator_cases import shares
from torch import nn

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.residual import MOST, Network, add_networks, network_reasons

interpreter = pytest.mark.interpreter
ROWS = {  # channels, channels between the layers, batch, tokens
    "wider": (48, 200, 2, 37),
    "narrower": (136, 24, 1, 150),
    "same": (64, 64, 1, 129),
    "one-token": (32, 40, 1, 1),
}


def network(C, mid, dtype=torch.float64, seed=0, **numbers):
    """Draw a network; equal values for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0, mean=0.0):
        return (mean + scale * torch.randn(shape, generator=generator)).half().to(dtype)

    return Network(
        draw(mid, C, scale=C**-0.5), draw(mid), draw(mid, scale=0.3, mean=1), draw(mid, scale=0.3),
        draw(C, mid, scale=mid**-0.5), draw(C), **numbers,
    )  # fmt: skip


def tokens(B, N, C, dtype=torch.float64):
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(7)).half().to(dtype)


def calls(row, count, backend, dtype=torch.float64, **numbers):
    C, mid, B, N = ROWS[row]
    networks = tuple(network(C, mid, dtype, seed, **numbers) for seed in range(count))
    return add_networks(tokens(B, N, C, dtype), networks, backend=backend)


@pytest.mark.parametrize("row", ROWS)
def test_pytorch_computes_the_modules_of_the_definition(row):
    C, mid, B, N = ROWS[row]
    x = tokens(B, N, C)
    for seed, o in enumerate(calls(row, 2, "torch", eps=0.1, slope=0.3)):
        parts = nn.Linear(C, mid), nn.LayerNorm(mid, eps=0.1), nn.LeakyReLU(0.3), nn.Linear(mid, C)
        modules = nn.Sequential(*parts).double()
        for parameter, t in zip(modules.parameters(), network(C, mid, seed=seed), strict=False):
            parameter.data = t
        torch.testing.assert_close(o, x + modules(x))


@interpreter
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("row", ROWS)
def test_networks_in_triton(row, count):
    numbers = dict(eps=0.1, slope=0.3)
    ours, plain = (calls(row, count, backend, torch.float16, **numbers) for backend in ("triton", "torch"))
    exact = calls(row, count, "torch", **numbers)
    assert len(ours) == count and max(shares(ours, plain, exact, torch.float16)) <= 1
    # both ways round at the same places: few elements differ, by one rounding
    for a, b in zip(ours, plain, strict=True):
        assert (a != b).float().mean() < 0.02
        torch.testing.assert_close(a, b, atol=8e-3, rtol=1e-3)


@interpreter
@pytest.mark.parametrize("row", ["narrower", pytest.param("wider", marks=pytest.mark.slow)])
def test_tiles_of_groups_and_of_both_networks(row, monkeypatch):
    """More tiles than a group has, of both axes, of which none divides what there is."""
    take(monkeypatch, residual__hidden=Launch((32, 16), (16,)), residual__added=Launch((16, 32), (16,)))
    ours, plain = (calls(row, 2, backend, torch.float16) for backend in ("triton", "torch"))
    assert max(shares(ours, plain, calls(row, 2, "torch"), torch.float16)) <= 1
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=8e-3, rtol=1e-3)


@interpreter
def test_a_norm_far_from_zero(monkeypatch):
    """Its parts know squares about their own means, so nothing is lost to a large one."""
    take(monkeypatch, residual__hidden=Launch((64, 16), (64,)), residual__added=Launch((64, 64), (64,)))
    C, mid, B, N = ROWS["wider"]
    results = []
    for dtype, backend in ((torch.float16, "triton"), (torch.float16, "torch"), (torch.float64, "torch")):
        own = network(C, mid, dtype)
        own = own._replace(bias=own.bias + 200 * (torch.arange(mid) % 2 + 10).to(dtype), weight=32 * own.weight)
        results.append(add_networks(tokens(B, N, C, dtype), (own,), backend=backend))
    assert max(shares(*results, torch.float16)) <= 1
    torch.testing.assert_close(*(result[0] for result in results[:2]), atol=2e-2, rtol=2e-3)


@interpreter
def test_another_network_is_caught():
    exact, plain = (calls("same", 2, "torch", dtype) for dtype in (torch.float64, torch.float16))
    for wrong in (
        calls("same", 2, "triton", torch.float16)[::-1],
        calls("same", 2, "triton", torch.float16, slope=0.5),
    ):
        assert min(shares(wrong, plain, exact, torch.float16)) > 1


@interpreter
def test_tokens_may_have_any_strides():
    x, networks = tokens(2, 48, 37, torch.float16).transpose(1, 2), (network(48, 24, torch.float16),)
    assert torch.equal(*(add_networks(t, networks, backend="triton")[0] for t in (x, x.contiguous())))


@interpreter
def test_no_tokens():
    networks = (network(48, 24, torch.float16),) * 2
    assert [o.shape for o in add_networks(torch.ones(2, 0, 48).half(), networks, backend="triton")] == [(2, 0, 48)] * 2


@interpreter
def test_opcheck():
    from vision_attn.kernels.residual.op import _add_networks

    x, (first, second) = tokens(2, 5, 16, torch.float16), (network(16, 24, torch.float16, seed) for seed in (0, 1))
    checks = ("test_schema", "test_faketensor")
    for other in (second[:6], (None,) * 6):
        torch.library.opcheck(_add_networks.registered, (x, *first[:6], *other, 1e-5, 0.01), test_utils=checks)


def with_(changed, **fields):
    return changed._replace(**fields)


HALF = network(32, 16, torch.float16)
REASONS = {
    "precision": ([network(32, 16, torch.float32)], torch.float32, "products are of 16 bits, and x is torch.float32"),
    "mixed": ([with_(HALF, bias=HALF.bias.float())], torch.float16, "weights have another dtype than x"),
    "transposed": ([with_(HALF, weight=HALF.last_weight.mT)], torch.float16, "a weight is not contiguous"),
    "eps": ([HALF, with_(HALF, eps=0.1)], torch.float16, "the networks differ in width, eps or slope"),
    "slope": ([HALF, with_(HALF, slope=0.1)], torch.float16, "the networks differ in width, eps or slope"),
    "width": ([HALF, network(32, 8, torch.float16)], torch.float16, "the networks differ in width, eps or slope"),
    "channels": ([network(32, 20, torch.float16)], torch.float16, "8 does not divide 20 channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_no_kernel_takes_runs_in_pytorch_and_is_refused_by_name(name):
    networks, dtype, message = REASONS[name]
    x = tokens(1, 3, 32, dtype)
    assert network_reasons(x, tuple(networks), auto=False)[-1] == message
    with pytest.raises(ValueError, match=message):
        add_networks(x, tuple(networks), backend="triton")
    if name != "mixed":  # PyTorch refuses a product of two dtypes
        assert add_networks(x, tuple(networks))[0].dtype == dtype


def test_large_pictures_and_training_are_left_to_pytorch():
    learned = with_(HALF, weight=HALF.weight.clone().requires_grad_())
    few, many = (torch.ones(1, 1, 32).half().expand(2, n, 32) for n in (MOST // 1024, MOST // 1024 + 1))  # 32 * 16 each
    known = network_reasons(few, (HALF,), auto=True)
    large = "PyTorch is faster at 6.7e+09 multiplications a layer, above 6.7e+09"
    assert network_reasons(many, (HALF,), auto=True) == [*known, large]
    assert network_reasons(many, (HALF,), auto=False) == network_reasons(few, (HALF,), auto=False)
    assert "it has no gradient" in network_reasons(few, (learned,), auto=True)
    with torch.no_grad():
        assert network_reasons(few, (learned,), auto=True) == known


X = torch.ones(1, 6, 32)
FULL = network(32, 16, torch.float32)
REFUSED = {
    "axes": (ValueError, r"x must be \[B, N, C\], got shape \(6, 32\)", lambda: add_networks(X[0], (FULL,))),
    "none": (ValueError, "networks must be one or two, got 0", lambda: add_networks(X, ())),
    "three": (ValueError, "networks must be one or two, got 3", lambda: add_networks(X, (FULL,) * 3)),
    "width": (
        ValueError, r"weight must be \[16, 24\] for x of 24 channels, got \[16, 32\]",
        lambda: add_networks(X[..., :24], (FULL,)),
    ),
    "bias": (ValueError, r"norm_bias must be \[16\]", lambda: add_networks(X, (with_(FULL, norm_bias=X[0, 0]),))),
    "integers": (TypeError, "must be floating point, got x torch.int64", lambda: add_networks(X.long(), (FULL,))),
    "device": (
        ValueError, "x and last_bias must be on one device",
        lambda: add_networks(X, (with_(FULL, last_bias=FULL.last_bias.to("meta")),)),
    ),
    "backend": (ValueError, "backend must be one of", lambda: add_networks(X, (FULL,), backend="reference")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(name):
    error, message, call = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
