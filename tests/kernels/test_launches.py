"""What launches of Triton kernels share: what is remembered, and when PyTorch's dispatcher is passed by."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from vision_attn.kernels import launches
from vision_attn.kernels.backend import custom_op
from vision_attn.kernels.triton import launching as triton_launching
from vision_attn.kernels.triton.launching import Bound, Kernel, hopper, layout, planned


class Jit:
    """Stands for a function of `triton.jit` with two tensors, a box, two numbers and two constants."""

    arg_names = ("a", "b", "box", "n", "m", "LEN", "WIDE")

    def __init__(self):
        self.bound, self.straight = [], []

    def __getitem__(self, grid):
        return lambda *args, **named: self.bound.append((grid, args, named)) or self.compiled

    @property
    def compiled(self):
        return Compiled(self.straight)


class Compiled:
    """Stands for compiled code."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


def test_a_bound_launch_goes_straight_to_what_was_compiled_for_the_alignment():
    jit, named = Jit(), dict(WIDE=True, num_warps=4, m=7, LEN=64)
    launch = Bound(Kernel(jit), (5,), (3,), named)
    a, b, other = torch.zeros(8), torch.zeros(8), torch.zeros(9)[1:]
    launch(a, b, boxes=("box",))
    assert jit.bound == [((5, 1, 1), (a, b, "box", 3), named)]
    assert not jit.straight
    launch(b, a, boxes=("next",))
    assert len(jit.bound) == 1
    grid, args = jit.straight.pop()
    assert grid == (5, 1, 1)
    assert args[0] is b
    assert args[1] is a
    assert args[2:] == ("next", 3, 7, 64, True)
    launch(a, other, boxes=("box",))  # code compiled for 16-byte loads would fault here
    assert len(jit.bound) == 2
    assert not jit.straight


def test_nothing_is_remembered_of_an_interpreter():
    jit = SimpleNamespace(calls=[])
    launch = Bound(Kernel({(2, 1, 1): lambda *args: jit.calls.append(args)}), (2,), (), {})
    for _ in range(2):
        launch(torch.zeros(1))
    assert len(jit.calls) == 2


@pytest.mark.parametrize("bound", [True, False])
def test_a_launch_takes_place_on_the_device_of_its_tensors(bound, monkeypatch):
    entered, current = [], [0]

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)
            current.append(self.index)

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    device = torch.device("cpu")
    where, seen = SimpleNamespace(get_device=lambda: 1, data_ptr=lambda: 0, device=device), []

    class Function:
        arg_names = ("a",)

        def __getitem__(self, grid):
            return lambda *args, **named: seen.append(current[-1]) or Jit().compiled

    kernel = Kernel(Function())
    launch = Bound(kernel, (1,), (), {}) if bound else kernel[(1,)]
    launch(where)
    assert (seen, entered, current) == ([1], [1], [0])
    launch(SimpleNamespace(get_device=lambda: 0, data_ptr=lambda: 0))
    assert entered == [1]


def test_plans_are_remembered_by_layout_and_not_without_bound(monkeypatch):
    made = []

    @planned
    def plan(call, t, number):
        made.append((call.key, tuple(t.shape), number))
        return len(made)

    call = SimpleNamespace(key=1)
    base = torch.zeros(64)
    assert plan(call, base[:8], 2) == plan(call, base[8:16], 2) == 1
    others = [(SimpleNamespace(key=2), base[:8], 2), (call, base[:9], 2), (call, base[:16:2], 2), (call, base[:8], 3)]
    others += [(call, base[1:9], 2), (call, base[:8].to(torch.int32), 2)]
    assert [plan(*other) for other in others] == [2, 3, 4, 5, 6, 7]
    monkeypatch.setattr(triton_launching, "_MOST", 7)
    assert plan(call, base[:10], 2) == 8
    assert plan(call, base[:8], 2) == 9
    plan.forget()
    assert plan(call, base[:8], 2) == 10


def test_a_layout_keeps_no_tensor():
    t = torch.zeros(4, 6)[:, 1:]
    assert layout(t) == (torch.float32, (4, 5), (6, 1), t.data_ptr() % 16)
    assert layout(None) is None


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("sm_90", True), ("sm_100", True), ("sm_120", True), ("sm_89", False), ("gfx942", False), ("interpreter", False)],
)
def test_which_gpus_have_tma(architecture, expected, monkeypatch):
    monkeypatch.setattr(launches, "target_of", lambda device: launches.Target(architecture, 2**16, 80))
    assert hopper(torch.zeros(1)) == expected


def test_without_a_gpu_there_is_no_tma():
    assert not hopper(torch.zeros(1))


def test_which_tensors_tma_can_load(monkeypatch):
    rows = pytest.importorskip("vision_attn.kernels.triton.rows", reason="Triton is not installed")
    whole, one = torch.zeros(2, 6, 3, 8), torch.zeros(1, 6, 1, 8)
    assert not rows.uses_boxes([whole])  # not on a GPU
    monkeypatch.setattr(rows, "hopper", lambda t: True)
    assert rows.uses_boxes([whole, whole.transpose(1, 2), whole[:, 1:], one.expand(1, 6, 1, 8)])
    shifted = torch.zeros(2 * 6 * 3 * 8 + 1)[1:].view(2, 6, 3, 8)
    odd = torch.zeros(2, 6, 3, 9)[..., :8]
    for refused in (shifted, odd, one.expand(2, 6, 1, 8)):
        assert not rows.uses_boxes([whole, refused])


@pytest.fixture
def doubled():
    """An operator, and how often it was called past the dispatcher and in all."""
    name = f"vision_attn_test::doubled_{len(made)}"
    made.append(name)
    calls = SimpleNamespace(direct=0, all=0)

    @custom_op(name)
    def double(x: Tensor, factor: float) -> Tensor:
        calls.all += 1
        return x * factor

    @double.register_fake
    def _(x, factor):
        return torch.empty_like(x)

    double.register_autograd(
        lambda ctx, do: (do * ctx.factor, None),
        setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
    )
    function = double._function

    def direct(*args):
        calls.direct += 1
        return function(*args)

    double._function = direct
    return double, calls


made: list[str] = []


def test_inference_passes_the_dispatcher_by(doubled):
    double, calls = doubled
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        double(x, 2.0)
        double(nn.Parameter(x), 2.0)
    double(x.detach(), 2.0)
    with torch.inference_mode():
        double(x, 2.0)
    assert (calls.direct, calls.all) == (4, 4)


def test_what_watches_sees_the_operator(doubled):
    double, calls = doubled
    x = torch.ones(3)
    leaf = x.clone().requires_grad_()
    double(leaf, 3.0).sum().backward()
    assert leaf.grad.tolist() == [3.0] * 3
    with FlopCounterMode(display=False):
        double(x, 2.0)
    with torch._subclasses.FakeTensorMode() as mode:
        assert double(mode.from_tensor(x), 2.0).shape == (3,)
    compiled = torch.compile(lambda t: double(t, 2.0), backend="aot_eager", fullgraph=True)
    assert compiled(x).tolist() == [2.0] * 3

    class Own(Tensor):
        pass

    double(x.as_subclass(Own), 2.0)
    rows = torch.autograd.grad(double(leaf, 3.0), leaf, torch.eye(3), is_grads_batched=True)[0]  # by an older vmap
    assert rows.tolist() == (3 * torch.eye(3)).tolist()
    assert calls.direct == 0


@pytest.mark.parametrize("plain", [False, True], ids=["refuses", "has-a-plain-form"])
def test_transforms_need_a_plain_form(plain):
    made.append(f"vision_attn_test::doubled_{len(made)}")
    double = custom_op(made[-1], (lambda x: x * 2) if plain else None)(double_up)
    x, t = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])

    def by_level():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(double(forward_ad.make_dual(x, t))).tangent

    transforms = {
        "jvp": lambda: torch.func.jvp(double, (x,), (t,))[1],
        "level": by_level,
        "vmap": lambda: torch.func.vmap(double)(t[None])[0],
        "grad": lambda: torch.func.grad(lambda x: (double(x) * t).sum())(x),
        "compiled": lambda: torch.compile(lambda x: torch.func.jvp(double, (x,), (t,))[1], backend="eager")(x),
    }
    for transform in transforms.values():
        if plain:
            assert transform().tolist() == [2.0, 4.0, 6.0]
        else:
            with pytest.raises(NotImplementedError, match=rf"{made[-1]} has no forward-mode .* use backend='torch'"):
                transform()


def test_the_derivative_of_a_derivative_without_one_names_the_backends(doubled):
    double, _ = doubled
    x = torch.ones(3, requires_grad=True)
    double.register_autograd(lambda ctx, do: (double_again(do), None), setup_context=lambda ctx, inputs, output: None)
    (first,) = torch.autograd.grad(double(x, 2.0).sin().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"doubled_again has no derivative: .* backend='torch'"):
        first.sum().backward()


def double_up(x: Tensor) -> Tensor:
    return x * 2


double_again = custom_op("vision_attn_test::doubled_again")(double_up)
