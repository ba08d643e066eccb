"""In inference LinFusion's networks run together, before the first projection; whatever does not suit runs as ever."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from diffusers.models.attention_processor import Attention
from host_runs import distance
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrize

from vision_attn import Grid, Host, LinFusion, MoH, convert
from vision_attn.conversion.projections import Projections
from vision_attn.kernels import tapes
from vision_attn.processors import linfusion
from vision_attn.processors.linfusion import LinFusionAttention

pytestmark = pytest.mark.interpreter
slow = pytest.mark.slow
GRID = Grid(5, 7)
BITS = dict(atol=4e-3, rtol=4e-3)


def probe(module, inputs):
    return GRID


class Model(nn.Module):
    """A layer of diffusers, `[B, N, C]` to `[B, N, C]`."""

    def __init__(self):
        super().__init__()
        self.layer = Attention(query_dim=32, heads=2, dim_head=16)

    def forward(self, tokens):
        return self.layer(tokens)


class Between:
    """Attention as diffusers writes it, with a change of the tokens between the projections."""

    def __init__(self, change):
        self.change = change

    def __call__(self, attn, hidden_states, **kwargs):
        q = attn.to_q(hidden_states)
        hidden_states = self.change(hidden_states)
        return self.attended(attn, q, attn.to_k(hidden_states), attn.to_v(hidden_states))

    def attended(self, attn, *tensors):
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in tensors)
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


CHANGES = {
    "nothing": lambda x: x,
    "writes": lambda x: x.mul_(2),
    "copies": lambda x: x.clone(),
    "other": lambda x: 2 * x,
    "fails": lambda x: x / (1 // 0),
}


def made(spec=None, change=None, dtype=torch.float16, backend="triton"):
    torch.manual_seed(0)
    model = Model().to(dtype).eval()
    if change is not None:
        model.layer.set_processor(Between(CHANGES[change]))
    convert(model, spec or LinFusion(mid_dim=24), host=Host(layers=("layer",), probe=probe), backend=backend)
    with torch.no_grad():
        for seed, parameter in enumerate(processor_of(model).parameters()):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return model


def processor_of(model):
    return model.layer.vision_attn


def tokens(seed=0, batch=2, dtype=torch.float16):
    return torch.randn(batch, GRID.tokens, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def ran(monkeypatch):
    """Let the CPU stand for a GPU; return how many networks each call of the kernels had."""
    monkeypatch.setattr(tapes, "DEVICES", ("cpu",))
    found, add = [], LinFusionAttention.add_residuals

    def seen(self, x, roles):
        sums = add(self, x, roles)
        if sums is not None:
            found.append(len(sums))
        return sums

    monkeypatch.setattr(LinFusionAttention, "add_residuals", seen)
    with torch.no_grad():
        yield found


def entered(model, x):
    """Return what the projections to queries and keys are given, and the output."""
    found = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        for layer in (model.layer.to_q, model.layer.to_k)
    ]
    found.append(model(x.clone()))
    for handle in handles:
        handle.remove()
    return found


def check(model, x):
    """Compare with the networks by themselves, in PyTorch; return what the projections are given, and the output."""
    known, tapes.DEVICES = tapes.DEVICES, ()
    try:
        want = entered(model, x)
    finally:
        tapes.DEVICES = known
    for a, b in zip(entered(model, x), want, strict=True):
        torch.testing.assert_close(a, b, **BITS)
    return want


@pytest.mark.parametrize(
    ("batch", "mid_dim"),
    [(2, 24), *(pytest.param(*row, marks=slow) for row in ((1, None), (1, 24), (2, None), (2, 40)))],
)
def test_both_networks_run_at_once_and_as_they_do_apart(batch, mid_dim, ran):
    model, without = made(LinFusion(mid_dim=mid_dim)), made(LinFusion(mid_dim=-1))
    for seed in range(4):
        x = tokens(seed, batch)
        q, k, _ = check(model, x)
        plain, *_ = entered(without, x)
        assert torch.equal(plain, x) and min(distance(q, x), distance(k, x), distance(q, k)) > 0.1
    assert ran == [2] * 4
    (tape,) = processor_of(model)._tapes.values()
    assert len(tape.steps) == 2 and len(tape.kept) == 12


@pytest.mark.parametrize("change", ["nothing", "writes", "copies", "other"])
def test_a_projection_of_other_tokens_adds_what_belongs_to_them(change, ran):
    model = made(change=change)
    for seed in range(4):
        check(model, tokens(seed))
    # what was computed ahead in vain once is not computed ahead again
    assert ran == ([2] * 4 if change == "nothing" else [2, 1, *[1, 1] * 3])


def test_tensors_that_do_not_count_who_writes_to_them_are_not_trusted(ran):
    model = made(change="writes")
    for seed in range(4):
        with torch.inference_mode():
            check(model, tokens(seed))
    assert ran == [1] * 8


def test_tokens_that_are_not_as_kernels_take_them_run_as_ever(ran):
    model = made()
    model(tokens().transpose(1, 2).contiguous().transpose(1, 2))
    assert not ran


@pytest.mark.parametrize("role", ["q", "k"])
def test_one_network_alone(role, ran, monkeypatch):
    residuals = LinFusionAttention.residuals
    monkeypatch.setattr(LinFusionAttention, "residuals", lambda self: {role: residuals(self)[role]})
    model = made()
    for seed in range(3):
        check(model, tokens(seed))
    assert ran == [1] * 3


def test_a_processor_around_another_passes_its_networks_on(ran):
    check(made(MoH(LinFusion(mid_dim=24))), tokens())
    assert ran == [2]


FALLS_BACK = {
    "full precision": dict(dtype=torch.float32),
    "backend": dict(backend="torch"),
    "auto on a CPU": dict(backend="auto"),
    "channels": dict(spec=LinFusion(mid_dim=20)),
}


@pytest.mark.parametrize("name", FALLS_BACK)
def test_what_no_kernel_takes_runs_as_ever(name, ran):
    model = made(**FALLS_BACK[name])
    for seed in range(3):
        check(model, tokens(seed, dtype=FALLS_BACK[name].get("dtype", torch.float16)))
    assert not ran


def test_large_pictures_run_as_ever(ran, monkeypatch):
    for mid_dim, mid in ((24, 24), (None, 32)):
        model = made(LinFusion(mid_dim=mid_dim))
        for most, rows in ((2 * GRID.tokens * 32 * mid, [2]), (2 * GRID.tokens * 32 * mid - 1, [])):
            monkeypatch.setattr(linfusion, "MOST", most)
            check(model, tokens())
            assert ran == rows
            ran.clear()


def doubled(module, args, output):
    return 2 * output


HOOKS = {
    "network": lambda p: p.to_k_.register_forward_hook(doubled),
    "layer": lambda p: p.to_k_[3].register_forward_hook(doubled),
    "forward": lambda p: setattr(p.to_k_[3], "forward", lambda x: x.repeat(1, 1, 2)[..., :32]),
    "casting": lambda p: apply_layerwise_casting_hook(p.to_k_[0], torch.float8_e4m3fn, torch.float16, False),
    "wrapped": lambda p: setattr(p, "to_k_", nn.Sequential(p.to_k_, nn.Tanh())),
    "another layer": lambda p: p.to_k_._modules.update({"2": nn.ReLU()}),
    "parametrized": lambda p: parametrize.register_parametrization(p.to_k_[0], "weight", nn.Tanh()),
}


@pytest.mark.parametrize("name", [pytest.param(c, marks=[] if c in ("layer", "casting") else slow) for c in HOOKS])
@pytest.mark.parametrize("calls", [pytest.param(0, marks=slow), 3])
def test_networks_with_hooks_run_as_ever(name, calls, ran):
    model = made()
    _, before, _ = check(model, tokens())
    for _ in range(calls):
        model(tokens())
    ran.clear()
    HOOKS[name](processor_of(model))
    for _ in range(3):
        assert distance(check(model, tokens())[1], before) > 1e-3
    assert not ran


def test_autocast_and_gradients_run_as_ever(ran):
    model, x = made(), tokens()
    (_, _, want), processor = check(model, x), processor_of(model)
    assert processor.add_residuals(x, ["q", "k"]) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert processor.add_residuals(x, ["q", "k"]) is None
    ran.clear()
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        o = model(leaf)
        grads = torch.autograd.grad(o.float().square().sum(), [leaf, *processor.parameters()])
    torch.testing.assert_close(o, want, **BITS)
    assert all(g.abs().max() > 0 for g in grads) and not ran


CHANGED = {
    "loaded": lambda p: p.load_state_dict({name: t + 0.2 for name, t in p.state_dict().items()}),
    "other memory": lambda p: setattr(p.to_k_[0].weight, "data", p.to_k_[0].weight.data * -3),
    "another parameter": lambda p: setattr(p.to_k_[0], "weight", nn.Parameter(p.to_k_[0].weight * -2)),
    "another network": lambda p: setattr(p, "to_k_", copy.deepcopy(p.to_q_)),
    "behind the module's back": lambda p: p._modules.update(to_k_=copy.deepcopy(p.to_q_)),
    "eps": lambda p: [setattr(f[1], "eps", 3.0) for f in (p.to_q_, p.to_k_)],
    "slope": lambda p: [setattr(f[2], "negative_slope", 0.7) for f in (p.to_q_, p.to_k_)],
    "one slope": lambda p: setattr(p.to_k_[2], "negative_slope", 0.7),
}


@pytest.mark.parametrize(
    "name", [pytest.param(c, marks=[] if c in ("loaded", "other memory", "one slope") else slow) for c in CHANGED]
)
def test_networks_that_change_between_calls_are_seen(name, ran):
    model = made()
    for _ in range(3):
        _, before, _ = check(model, tokens())
    CHANGED[name](processor_of(model))
    for _ in range(3):
        assert distance(check(model, tokens())[1], before) > 0.02
    assert ran == [2] * 3 + [1 if name == "one slope" else 2] * 3


def test_weights_in_another_dtype_than_the_tokens_run_as_ever(ran):
    model = made()
    for _ in range(3):
        model(tokens())
    ran.clear()
    processor_of(model).float()
    check(model, tokens())
    assert not ran
    processor_of(model).half()
    check(model, tokens())
    assert ran == [2]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_adapters_on_the_projections_get_the_sums(before, ran):
    model = made()
    want = model(tokens())
    if before:
        for _ in range(3):
            model(tokens())
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), model)
    model.half().eval()
    for seed in range(3):
        check(model, tokens(seed))
    assert distance(model(tokens()), want) > 1e-2 and set(ran) == {2}


def test_threads_have_sums_of_their_own(ran):
    """Both have projected to queries before one of them projects to keys. The interpreter runs one kernel at a time."""
    lock, barrier, model, failed = threading.Lock(), threading.Barrier(2, timeout=60), made(), []
    want = [model(tokens(seed)) for seed in range(2)]
    assert distance(*want) > 0.1
    ran.clear()

    class Meeting(Between):
        def __call__(self, attn, hidden_states, **kwargs):
            with lock:
                q = attn.to_q(hidden_states)
            barrier.wait()
            with lock:
                return self.attended(attn, q, attn.to_k(hidden_states), attn.to_v(hidden_states))

    model.layer.set_processor(Meeting(None))

    def work(seed):
        with torch.no_grad():
            failed.extend(seed for _ in range(4) if not torch.equal(model(tokens(seed)), want[seed]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and ran == [2] * 8


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
def test_copies_begin_anew(again, ran):
    model = made()
    for _ in range(3):
        want = entered(model, tokens())
    other = again(model)
    assert processor_of(model)._tapes and not processor_of(other)._tapes
    assert list(other.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for parameter in processor_of(other).parameters():
            parameter.mul_(-1)
    for _ in range(3):
        assert distance(check(other, tokens())[1], want[1]) > 0.02
        assert all(map(torch.equal, entered(model, tokens()), want))


def test_nothing_outlives_the_forward(ran, monkeypatch):
    """Neither the sums nor the tokens, not even where the second projection never ran, or was given others."""
    found, add = [], LinFusionAttention.add_residuals

    def seen(self, x, roles):
        sums = add(self, x, roles)
        found.extend(map(weakref.ref, (x, *sums)))
        return sums

    monkeypatch.setattr(LinFusionAttention, "add_residuals", seen)
    monkeypatch.setattr(tapes.Tapes, "call", lambda self, function, args, *owners: function(*args))
    models = [made(change=change) for change in ("nothing", "copies", "fails")]
    for model in models[:2]:
        model(tokens())
    with pytest.raises(ZeroDivisionError) as error:  # which keeps the host's variables
        models[2](tokens())
    gc.collect()
    x, _, ahead = found[-3:]
    assert x() is not None and ahead() is None
    del error
    gc.collect()
    assert len(found) == 3 + 5 + 3 and not [place for place in found if place() is not None]


def test_the_second_sum_is_freed_when_it_is_used(ran, monkeypatch):
    held, add = [], Projections._sum

    def seen(self, role, x):
        found = add(self, role, x)
        held.append(self.ahead is not None)
        return found

    monkeypatch.setattr(Projections, "_sum", seen)
    made()(tokens())
    assert held == [True, False]


def test_a_compiled_model_traces_the_networks(ran):
    model = made(backend="auto")
    *_, want = check(model, tokens())
    torch.testing.assert_close(torch.compile(model, backend="eager")(tokens()), want, **BITS)
    assert not ran
