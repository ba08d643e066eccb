"""Every processor on every host: forward and backward on a non-square grid, precision, saving, loading, reverting."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import quick
from host_runs import FROM_A_FILE, distance, run, size_of, stock
from processor_table import KIND_OF_SPEC, PROCESSORS
from tiny_hosts import HOST, KIND, HostCase
from torch import nn
from untouched import assert_untouched, state

from vision_attn import (
    RALA,
    Agent,
    Clear,
    Grid,
    Halo,
    HiLo,
    Host,
    InLine,
    LinearLocal,
    LinFusion,
    Softmax,
    convert,
    load,
)
from vision_attn.conversion.state import is_rerouted, state_of
from vision_attn.kernels.image import averages
from vision_attn.processors import REGISTRY, AgentSD, Schedule
from vision_attn.processors.linfusion import Residual

UNLIKE = {
    name: (16, 8) for name in ("clear-pool", "clear-counted")
}  # lower levels of a UNet must still divide by the pool
PAIRS = quick(
    list(product(KIND, PROCESSORS)),
    (lambda host_id, name: host_id, 1),
    (lambda host_id, name: name, 2),
    (lambda host_id, name: (KIND[host_id], KIND_OF_SPEC[name]), 1),
)


def size(case: HostCase, name: str) -> tuple[int, int]:
    return (8, 8) if case.fixed_size else UNLIKE.get(name, size_of(case))


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the layers that the last forward rerouted."""
    done = [m for m in model.modules() if is_rerouted(m) and state_of(m).status == "rerouted"]
    assert done
    return {f"{state_of(m).name}.{n}": p for m in done for n, p in m.substitute.named_parameters()}  # type: ignore


def test_the_table_has_every_processor() -> None:
    assert {type(spec) for spec in PROCESSORS.values()} | {Softmax, Schedule} == {
        known.spec for known in REGISTRY.values()
    }


@pytest.mark.parametrize(("host_id", "name"), PAIRS)
def test_learns_saves_loads_and_reverts(host_id: str, name: str, tmp_path: Path) -> None:
    case = HOST[host_id]
    model, at = case.build(), size(case, name)
    before = state(model)
    model.requires_grad_(False)
    conversion = convert(model, PROCESSORS[name])
    output = case.output(model(**case.inputs(*at, 2, 7)))
    assert output.shape == case.shape(*at, 2) and output.dtype == torch.float32 and output.isfinite().all()
    own = own_parameters(model)
    if own:
        output.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in own.values())
        with torch.no_grad():
            for parameter in conversion.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    torch.manual_seed(0)
    trained = run(case, model, *at)
    assert distance(trained, run(case, case.build(), *at)) > 1e-4
    if case.autocast:
        with torch.autocast("cpu", torch.bfloat16):
            assert run(case, model, *at).isfinite().all()
    conversion.save(tmp_path)
    learned = {key: parameter.detach().clone() for key, parameter in conversion.named_parameters()}
    conversion.revert()
    assert_untouched(model, before)
    other = case.build()
    loaded = dict(load(other, tmp_path).named_parameters())
    assert loaded.keys() == learned.keys() and all(torch.equal(loaded[key], learned[key]) for key in learned)
    torch.manual_seed(0)
    torch.testing.assert_close(run(case, other, *at), trained, **FROM_A_FILE)


LOW_PRECISION = quick(
    list(product(PROCESSORS, ("flux", "sd15-unet", "vit"), ("float16", "bfloat16"))),
    (lambda name, host_id, dtype: (name, dtype), 1),
    (lambda name, host_id, dtype: (host_id, dtype), 1),
)


@pytest.mark.parametrize("name, host_id, dtype", LOW_PRECISION)
def test_low_precision_stays_finite_and_keeps_its_dtype(name: str, host_id: str, dtype: Any) -> None:
    case, dtype = HOST[host_id], getattr(torch, dtype)
    model = case.build().to(dtype)
    convert(model, PROCESSORS[name])
    inputs = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value
        for key, value in case.inputs(*size(case, name), 2, 7).items()
    }
    output = case.output(model(**inputs))
    assert output.dtype == dtype and output.isfinite().all()
    loss = output.float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in own_parameters(model).values())  # type: ignore[union-attr]
    assert {p.dtype for p in own_parameters(model).values()} <= {dtype}


@pytest.mark.parametrize("host_id", ["flux", "sd15-unet", "vit", "sd3", "flux2", "eva02", "lumina2"])
def test_a_residual_network_changes_queries_and_keys_where_the_host_projects_them(host_id: str) -> None:
    """The output follows f once f is not zero; the bypassed host does not."""
    case = HOST[host_id]
    model = case.build()
    conversion = convert(model, LinFusion())
    before = run(case, model, *size_of(case))
    own = own_parameters(model)
    with torch.no_grad():
        for key, parameter in own.items():
            if ".3." in key:
                parameter.add_(torch.randn_like(parameter))
    assert distance(run(case, model, *size_of(case)), before) > 1e-3
    with conversion.bypassed():
        torch.testing.assert_close(run(case, model, *size_of(case)), stock(case.id), rtol=0, atol=1e-6)


def test_fusing_projections_changes_nothing() -> None:
    for host_id in ("sd15-unet", "flux"):
        case = HOST[host_id]
        model = case.build()
        conversion = convert(model, LinFusion())
        with torch.no_grad():
            for parameter in conversion.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        before = run(case, model, *size_of(case))
        model.fuse_qkv_projections()  # type: ignore[operator]
        torch.testing.assert_close(run(case, model, *size_of(case)), before, rtol=0, atol=1e-5)
        model.unfuse_qkv_projections()  # type: ignore[operator]
        torch.testing.assert_close(run(case, model, *size_of(case)), before, rtol=0, atol=1e-5)


def test_a_schedule_is_refused_where_there_is_no_timestep() -> None:
    with pytest.raises(ValueError, match="timestep"):
        convert(HOST["vit"].build(), AgentSD.schedule())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LinFusion(mid_dim=0), ValueError, "mid_dim"),
        (lambda: LinFusion(mid_dim=2.0), TypeError, "mid_dim"),
        (lambda: LinFusion(feature_map="relu"), ValueError, "relu"),
        (lambda: LinearLocal(window_size=0), ValueError, "window_size"),
        (lambda: LinearLocal(gate=1.0), ValueError, "gate"),
        (lambda: Agent(num_agents=0), ValueError, "num_agents"),
        (lambda: Agent(num_agents="9"), TypeError, "num_agents"),
        (lambda: Agent(biases=1), TypeError, "biases"),
        (lambda: AgentSD(random="no"), TypeError, "random must be True or False, got 'no'"),
        (lambda: AgentSD(k_scale="1"), TypeError, "k_scale must be a number"),
        (lambda: Clear(pool=2, counted=1), TypeError, "counted must be True or False, got 1"),
        (lambda: LinFusion(rotate="no"), TypeError, "rotate must be True or False, got 'no'"),
        (lambda: RALA(rotate="no"), TypeError, "rotate must be True or False, got 'no'"),
        (lambda: AgentSD(shortcut=math.nan), ValueError, "shortcut must be a number, got nan"),
        (lambda: AgentSD(cell=0), ValueError, "cell"),
        (lambda: AgentSD(cell=(2,)), ValueError, "cell must be a side or"),
        (lambda: AgentSD(cell=(2, 2.0)), TypeError, "cell must be an int"),
        (lambda: AgentSD(ratio=1.0), ValueError, "ratio"),
        (lambda: HiLo(alpha=1.5), ValueError, "alpha"),
        (lambda: HiLo(window_size=2.5), TypeError, "window_size"),
        (lambda: RALA(kernel_size=4), ValueError, "odd"),
        (lambda: InLine(kernel_size=2), ValueError, "kernel_size must be odd, or 0 for no convolution, got 2"),
        (lambda: InLine(kernel_size=3.0), TypeError, "kernel_size must be an int"),
        (lambda: InLine(feature_map="elu"), ValueError, "feature_map"),
        (lambda: Halo(block=0), ValueError, "block must be at least 1"),
        (lambda: Halo(halo=-1), ValueError, "halo must be at least 0"),
        (lambda: Halo(block=2.5), TypeError, "block must be an int or a pair"),
        (lambda: Schedule(((0.5, Softmax()),)), ValueError, "1.0"),
        (lambda: Schedule(((1.0, "clear"),)), TypeError, "clear"),
    ],
    ids=lambda v: None if callable(v) else getattr(v, "__name__", v),
)
def test_bad_fields_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_softmax_accepts_a_layer_that_never_calls_attention() -> None:
    """Sliced attention computes what Softmax() asks for: a status. Other processors raise there (test_refusals)."""
    case = HOST["sd15-unet"]
    model = case.build()
    conversion = convert(model, Softmax())
    model.set_attention_slice("max")  # type: ignore[operator]
    torch.testing.assert_close(run(case, model, *size_of(case)), stock(case.id), rtol=0, atol=1e-5)
    assert set(conversion.status.values()) == {"dense: the host's own code computed it"}


def test_a_bypassed_layer_does_not_keep_its_blocks_input() -> None:
    case = HOST["sd15-unet"]
    model = case.build()
    with convert(model, AgentSD()).bypassed():
        run(case, model, *size_of(case))
    assert all(state_of(m).take_over() is None for m in model.modules() if is_rerouted(m))


def test_a_residual_network_needs_only_heads_and_head_dim_of_a_module() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.head_dim = 2, 4
            self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    model = nn.Sequential(Attention())
    host = Host(layers=("0",), probe=lambda module, inputs: Grid(3, 4))
    conversion = convert(model, LinFusion(), host=host)
    assert model(torch.randn(2, 12, 8)).shape == (2, 12, 8)
    assert set(conversion.status.values()) == {"rerouted"}


def test_residual_networks_run_with_weights_stored_in_8_bits() -> None:
    model = HOST["flux"].build()
    convert(model, LinFusion(mid_dim=4))
    want = run(HOST["flux"], model, 6, 6)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    got = run(HOST["flux"], model, 6, 6)
    assert (got - want).abs().max() < 0.2 * want.abs().max()


def test_residual_networks_call_their_layers_where_hooks_listen() -> None:
    """Without hooks their layers are not called, and compute the same."""
    residual, x, ran = Residual(6, 4), torch.randn(2, 3, 6), []
    torch.nn.init.normal_(residual[3].weight)
    want = residual(x)
    for layer in residual:
        layer.register_forward_hook(lambda *args: ran.append(args[0]))
    assert torch.equal(residual(x), want) and ran == list(residual)
    residual[0] = torch.nn.Linear(6, 4, bias=False)
    assert not torch.equal(residual(x), want)


@pytest.mark.parametrize(("size", "agents"), [((12, 20), (3, 5)), ((7, 10), (3, 4)), ((3, 2), (5, 2))], ids=str)
def test_agents_are_pooled_by_matrices_as_by_pytorch(size: tuple[int, int], agents: tuple[int, int]) -> None:
    """Deterministic training on a GPU takes the matrices."""
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    rows, columns = (averages(old, new) for old, new in zip(size, agents, strict=True))
    torch.testing.assert_close(rows @ image @ columns.mT, torch.nn.functional.adaptive_avg_pool2d(image, agents))
