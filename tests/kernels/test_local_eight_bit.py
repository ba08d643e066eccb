"""Local attention in 8 bits: how far it is from the same in float32, and that all backends round alike.

Triton's interpreter computes int8 products rightly. Its conversions to e4m3 and its products of e4m3 are wrong, so
there the kernels round in float32 (`quantising.rounded`) and multiply float32: what the tests below compare is all but
these two instructions. `tests/gpu/compile_matrix.py` compiles them for sm_89, sm_90 and sm_120, and
`tests/gpu/check_local.py` runs them.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from eight_bit_cases import PRECISIONS, WORST, check_gradients_are_refused
from interpreted import INTERPRETED
from local_cases import Case, draw

from vision_attn.grid import Grid
from vision_attn.kernels.eight_bits import Blocks, Rounded, eight_bit_reasons, sampled
from vision_attn.kernels.launches import Target
from vision_attn.kernels.local import Window, local_attention

if INTERPRETED:
    import triton
    import triton.language as tl

    from vision_attn.kernels.triton.quantising import rounded

    @triton.jit
    def _round(x, y, N: tl.constexpr):
        n = tl.arange(0, N)
        tl.store(y + n, rounded(tl.load(x + n)))


CASES = [
    Case(Grid(9, 10, prefix=2, suffix=3), dict(radius=4), mask=True, head_dim=40, strided=True),
    Case(Grid(5, 9, prefix=66), dict(kernel_size=(3, 2), dilation=(1, 2)), head_dim=16),
    Case(Grid(9, 13, prefix=5, suffix=9), dict(radius=4), mask=True, head_dim=32),
    Case(Grid(24, 40), dict(radius=9), head_dim=64),
    Case(Grid(17, 9, suffix=3), dict(radius=math.inf), head_dim=128, scale=0.1),
    Case(Grid(16, 24, prefix=1), dict(kernel_size=13), head_dim=32),
    Case(Grid(10, 9, prefix=70), dict(kernel_size=(4, 2), dilation=(2, 3)), head_dim=256, mask=True),
]
slow = pytest.mark.slow


def inputs(case, dtype=torch.float32, batch=2, heads=2):
    q, k, v, _, mask, _ = draw(case, dtype, batch, heads)
    return q.detach(), k.detach() + 2, v.detach(), mask


def run(case, given, precision, backend):
    q, k, v, mask = given
    window = Window(**case.window, precision=precision)
    return local_attention(q, k, v, case.grid, window, mask=mask, scale=case.scale, backend=backend)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_error_is_that_of_eight_bits(case, precision):
    given = inputs(case)
    plain = run(case, given, None, "reference")
    reference, portable = (run(case, given, precision, backend) for backend in ("reference", "torch"))
    alike = F.cosine_similarity(reference.flatten(), plain.flatten(), 0).item()
    assert 1e-5 < 1 - alike < WORST[precision]  # rounded at all, and by no more than 8 bits round
    assert (reference - portable).abs().mean() < 1e-5 * plain.abs().mean()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("case", "precision"),
    [
        pytest.param(case, one, id=f"{one}-{case}", marks=() if (n, one) in ((0, "fp8"), (1, "int8")) else slow)
        for n, case in enumerate(CASES) for one in PRECISIONS
    ],
)  # fmt: skip
def test_kernels_round_as_the_definition_does(case, precision):
    """A mean that float32 rounds otherwise may move a key by a step: few elements, so the mean error is compared."""
    batch, heads = (1, 1) if case in CASES[:2] else (2, 2)  # a program takes half a second
    given = inputs(case, batch=batch, heads=heads)
    ours, want = (run(case, given, precision, backend) for backend in ("triton", "reference"))
    assert (ours - want).abs().mean() < 1e-4 * want.abs().mean()


@pytest.mark.interpreter
def test_kernels_take_the_mean_of_the_sampled_keys(monkeypatch):
    """As with more than 8191 tokens; another mean would round all keys otherwise."""
    case = CASES[1]
    q, k, v, mask = inputs(case, batch=1, heads=1)
    k = k + torch.linspace(-1, 1, k.shape[1])[None, :, None, None]
    whole = run(case, (q, k, v, mask), "int8", "reference")
    monkeypatch.setattr("vision_attn.kernels.eight_bits._SAMPLED", 16)
    assert 16 <= sampled(k).shape[1] < k.shape[1] / 5
    ours, want = (run(case, (q, k, v, mask), "int8", backend) for backend in ("triton", "reference"))
    assert (ours - want).abs().mean() < 1e-4 * want.abs().mean() < (whole - want).abs().mean()


@slow
@pytest.mark.interpreter
def test_kernels_take_half_precision():
    case = CASES[0]
    given = inputs(case, torch.float16)
    ours, want = (run(case, given, "int8", backend) for backend in ("triton", "reference"))
    assert ours.dtype == torch.float16
    assert (ours - want).abs().float().mean() < 1e-3 * want.abs().float().mean()


@pytest.mark.interpreter
def test_rounding_to_e4m3():
    """All numbers of e4m3, what lies halfway between two, and what lies beside that."""
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    half = (every[1:] + every[:-1]) / 2
    x = torch.cat([every, half, half * (1 + 1e-6), half * (1 - 1e-6), torch.zeros(512 - 127 - 3 * 126)])
    x, y = torch.cat([x, -x]), torch.empty(1024)
    _round[(1,)](x, y, 1024)
    assert torch.equal(y, x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_mean_of_the_keys_costs_nothing(precision):
    """Softmax does not see what all keys share; without smoothing, a scale would be wide enough to hold it."""
    case = Case(Grid(16, 24, prefix=3), dict(radius=5))
    q, k, v, _ = inputs(case)
    plain, near, far = (
        run(case, (q, k + shift, v, None), one, "torch") for one, shift in ((None, 0), (precision, 0), (precision, 50))
    )
    errors = [(o - plain).norm() / plain.norm() for o in (near, far)]
    assert errors[1] < 1.05 * errors[0] < 0.1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounded_tensors_are_near_and_scales_are_those_of_blocks(precision):
    grid = Grid(11, 20, prefix=3, suffix=80)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 16)
    cut = Blocks.of(grid, [1, 2])
    blocks = cut.places(q.device)
    assert blocks[blocks >= 0].sort()[0].tolist() == list(range(grid.tokens))
    q[:, blocks[3][blocks[3] >= 0], 1] *= 1000  # one head of one block
    x = Rounded.of(q, k, v, cut, precision)
    wide = torch.zeros(grid.tokens, 2, dtype=torch.bool)
    wide[blocks[3][blocks[3] >= 0], 1] = True
    error = (x.q - q).abs().amax((0, 3))
    most = 0.03 if precision == "int8" else 0.3  # half a step of 5 / 127; a sixteenth of 5
    assert error[~wide].max() < most < error[wide].max() < 1000 * most
    assert (x.v - v).abs().max() < 0.3
    assert ((x.k + k.mean(1, keepdim=True)) - k).abs().max() < most


def test_a_gradient_is_refused():
    grid, window = Grid(4, 5), Window(radius=2, precision="int8")
    tensors = torch.randn(3, 1, 20, 1, 16).unbind()
    check_gradients_are_refused("int8", tensors, lambda q, k, v: local_attention(q, k, v, grid, window))


def test_what_a_window_of_eight_bits_cannot_have():
    for wrong in ("int4", 8, "bf16"):
        with pytest.raises(ValueError, match="precision must be None"):
            Window(radius=2, precision=wrong)
    keys = torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16)
    with pytest.raises(ValueError, match="neither a bias nor pooled keys"):
        Window(radius=2, pooled=keys, precision="fp8")
    with pytest.raises(ValueError, match="neither a bias nor pooled keys"):
        Window(kernel_size=3, bias=torch.zeros(1, 5, 5), precision="fp8")


def test_architectures_without_e4m3_are_refused(monkeypatch):
    from vision_attn.kernels import launches

    for name, able in (("sm_80", False), ("sm_86", False), ("gfx942", False), ("sm_89", True), ("sm_120", True)):
        monkeypatch.setattr(launches, "target_of", lambda device, name=name: Target(name, 2**16, 80))
        reasons = " ".join(eight_bit_reasons(torch.zeros(1, 4, 1, 16), auto=False))
        assert ("no products of e4m3" in reasons) != able


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_opcheck_and_compile(backend):
    case = Case(Grid(4, 5, prefix=2), dict(radius=2), head_dim=16)
    q, k, v, _ = inputs(case)
    if backend == "triton":
        from vision_attn.kernels.local.op import _eight_bit

        numbers = [4, 5, 2, 0], 2.0, [0, 0], [1, 1], 0.25, "int8"
        torch.library.opcheck(_eight_bit.registered, (q, k, v, None, *numbers), test_utils="test_faketensor")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours, want = (function(case, (q, k, v, None), "int8", backend) for function in (compiled, run))
    torch.testing.assert_close(ours, want)
