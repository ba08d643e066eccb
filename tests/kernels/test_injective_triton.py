"""The Triton backend of injective linear attention in Triton's interpreter (see `interpreted.py`)."""

import pytest
import torch
from interpreted import linear_tiles
from operator_cases import CASES, Case, call, check_case, draw, injective, inputs_of, one_head, run

from vision_attn.kernels.linear import injective_attention

interpreter = pytest.mark.interpreter
INJECTIVE = [one_head(case) for case in CASES if case.operator == "linear_injective" and case.id != "weights"]
WIDE = injective("wide", N=30, M=30, H=1, D=144, F=160)
ROWS = [*((case, torch.float32) for case in INJECTIVE), *((c, torch.float16) for c in INJECTIVE if c.id == "hidden")]
SLOW = [*((c, torch.float16) for c in (*INJECTIVE, WIDE) if c.id != "hidden"), (WIDE, torch.float32)]


@interpreter
@pytest.mark.parametrize(("case", "dtype"), [*ROWS, *(pytest.param(*r, marks=pytest.mark.slow) for r in SLOW)], ids=str)
def test_error_is_within_the_budget(case, dtype, monkeypatch):
    if case is WIDE:
        linear_tiles(monkeypatch, 32)
    check_case(case, dtype)


@interpreter
def test_parts_of_the_sequence_add_up(monkeypatch):
    linear_tiles(monkeypatch, 16, 4)
    for module in ("forward", "injective", "mean"):
        monkeypatch.setattr(
            f"vision_attn.kernels.linear.{module}.cut", lambda tokens, *rest, **options: (-(-tokens // 16), 16)
        )
    check_case(injective("long", N=50, M=150, H=1, weight=True, hidden=True, held=True), torch.float32)


LARGE = {"sums": (1 / 4096, 2000, 2000, 0.01), "gradients": (1000, 1 / 2048, 1 / 2048, 1000)}


@interpreter
@pytest.mark.parametrize("name", LARGE)
def test_fp16_holds_sums_and_gradients_of_any_size(name):
    """The sums of keys times values, or of queries times gradients, are above what float16 holds."""
    *sizes, size = LARGE[name]
    drawn = inputs_of(injective("large", H=1), torch.float16).values()
    leaves = [(t.detach() * s).requires_grad_() for t, s in zip(drawn, sizes, strict=True)]
    q, k, v = (t.detach().double() for t in leaves)
    do = size * torch.cos(torch.arange(v.numel(), dtype=torch.float64)).view_as(v)
    sums = [(a.mT @ b).abs().max() for a, b in ((k[:, :, 0], v[:, :, 0]), (q[:, :, 0], do[:, :, 0]))]
    assert max(sums) > 65504
    results = []
    for tensors, backend in ((leaves, "triton"), ([t.requires_grad_() for t in (q, k, v)], "reference")):
        o = injective_attention(*tensors, backend=backend)
        results.append([o, *torch.autograd.grad(o, tensors, do.to(o.dtype))])
    for ours, want in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert (ours - want).abs().max() <= 4e-3 * want.abs().max()


@interpreter
@pytest.mark.parametrize("hidden", ["no-keys", "all-hidden"])
def test_without_a_key_to_see_the_output_is_zero(hidden):
    q = draw(1, 5, 1, 16)
    k, v = (draw(1, 0 if hidden == "no-keys" else 7, 1, 16) for _ in range(2))
    for backend in ("triton", "torch", "reference"):
        o = injective_attention(q, k, v, key_weight=torch.zeros(1, k.shape[1], 1), backend=backend)
        grads = torch.autograd.grad(o.sum(), (q, k, v))
        assert not o.any() and not any(g.any() for g in grads)


@pytest.mark.slow
@interpreter
def test_batches_opcheck_and_compile():
    from vision_attn.kernels.linear.op import _injective

    q, k, v, weight = draw(1, 20, 2, 16), draw(1, 9, 2, 16), draw(1, 9, 2, 24), torch.rand(1, 9, 2)
    torch.library.opcheck(_injective.registered, (q, k, v, weight, 0.3))
    torch.library.opcheck(_injective.registered, (q, k, v, None, 0.3))
    function = torch.compile(injective_attention, fullgraph=True, backend="aot_eager")
    o = [f(q, k, v, key_weight=weight, backend="triton") for f in (function, injective_attention)]
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in o), strict=True):
        torch.testing.assert_close(a, b)
    assert injective_attention(q[:0], k[:0], v[:0], backend="triton").shape == (0, 20, 2, 24)


@interpreter
def test_weights_that_learn_are_refused_by_name():
    q = draw(1, 6, 1, 16)
    with pytest.raises(ValueError, match=r"injective_attention with backend='triton': key_weight needs a gradient"):
        injective_attention(q, q, q, key_weight=draw(1, 6, 1), backend="triton")


@interpreter
def test_a_wrong_normaliser_is_caught():
    case = next(case for case in INJECTIVE if case.id == "hidden")
    t = inputs_of(case, torch.float32)
    ours = call(Case(case.operator, case.id, case.options | dict(scale=0.8)), t, "triton")
    assert (ours - run(case, t, "reference")[0]).abs().max() > 1e-3
