"""Derivatives of every operator against finite differences in float64: of any order, in any mode, of many samples."""

from itertools import product

import pytest
import torch
from derivative_cases import CASES, TRITON, inputs_of
from torch.autograd import gradcheck, gradgradcheck

every = pytest.mark.parametrize("case", CASES, ids=str)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])
# The operators of these have a form for each kind of derivative; what is plain PyTorch has no other.
OWN = [case for case in CASES if str(case) in ("local-dilated-text-bias-pooled", "multipole-pooled")]

# Numbers one by one take long. Of the reference, and of three large rows, the direction at random is quick: see below.
LARGE = ("multipole-cut-text-mask", "multipole-group-unlearned", "linear-local-cut-text-mask")
EACH = [
    pytest.param(case, backend, id=f"{case}-{backend}",
                 marks=[pytest.mark.slow] * (backend == "reference" or str(case) in LARGE))
    for case, backend in product(CASES, ("torch", "reference"))
]  # fmt: skip


@pytest.mark.parametrize("case, backend", EACH)
def test_gradients_are_those_of_finite_differences(case, backend):
    assert gradcheck(lambda *t: case.call(t, backend), inputs_of(case))


@BACKENDS
@every
def test_tangents_are_those_of_finite_differences(case, backend):
    """Forward mode, one direction at a time and several at once."""
    checks = dict(check_forward_ad=True, check_backward_ad=False, check_undefined_grad=False)
    checks |= dict(check_batched_forward_grad=True)
    assert gradcheck(lambda *t: case.call(t, backend), inputs_of(case), fast_mode=True, **checks)


@BACKENDS
@every
def test_second_derivatives_are_those_of_finite_differences(case, backend):
    """Reverse over reverse, forward over reverse, and many gradients at once."""
    assert gradgradcheck(lambda *t: case.call(t, backend), inputs_of(case), fast_mode=True, check_fwd_over_rev=True)
    assert gradcheck(lambda *t: case.call(t, backend), inputs_of(case), fast_mode=True, check_batched_grad=True)


@BACKENDS
@every
def test_gradients_of_each_sample_at_once_are_those_of_one_after_another(case, backend):
    """The sample varies, and all else is shared: `vmap(grad)` gives the gradients of all of them for each sample."""
    first, *rest = (t.detach() for t in inputs_of(case))
    samples = torch.stack([first, first.flip(1), 0.5 * first])

    def loss(*t):
        return case.call(t, backend).sin().sum()

    every = tuple(range(1 + len(rest)))
    ours = torch.func.vmap(torch.func.grad(loss, every), (0, *[None] * len(rest)))(samples, *rest)
    for i, sample in enumerate(samples):
        leaves = [t.clone().requires_grad_() for t in (sample, *rest)]
        alone = torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True)
        torch.testing.assert_close(tuple(t[i] for t in ours), alone)


@pytest.mark.slow
@pytest.mark.parametrize("case", OWN, ids=str)
def test_transforms_compile(case):
    """They once lost the tangent without an error."""
    t = tuple(t.detach() for t in inputs_of(case))

    def tangent(*t):
        return torch.func.jvp(lambda q: case.call((q, *t[1:]), "torch"), (t[0],), (t[0].cos(),))[1]

    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*t), tangent(*t))


TRANSFORMS = {
    "jvp": lambda f, t: torch.func.jvp(f, (t,), (t,)),
    "vmap": lambda f, t: torch.func.vmap(f)(t[None]),
    "grad": lambda f, t: torch.func.grad(lambda t: f(t).sum())(t),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_refuses_transforms_and_names_who_does_not(case, transform):
    first, *rest = (t.detach().float() for t in inputs_of(case))
    with pytest.raises(ValueError, match=r"no transform of torch.func and has no forward-mode derivative, as 'torch'"):
        TRANSFORMS[transform](lambda t: case.call((t, *rest), "triton"), first)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", TRITON, ids=str)
def test_triton_refuses_second_derivatives_and_names_who_does_not(case):
    leaves = inputs_of(case, torch.float32)
    first = torch.autograd.grad(case.call(leaves, "triton").sin().sum(), leaves, create_graph=True)
    assert all(g.isfinite().all() for g in first)  # a graph that nobody uses is no error
    with pytest.raises(NotImplementedError, match=r"has no derivative: .* backend='torch' or backend='reference'"):
        torch.autograd.grad(sum(g.sum() for g in first), leaves)
