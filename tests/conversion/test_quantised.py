"""Quantised hosts: every processor computes what it does on plain weights of the same values, and nothing is lost."""

import copy
import pickle
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_hosts import CLEAR, POOLED, SIZE, call
from covering import covering
from host_runs import FROM_A_FILE, TEXT, distance, run, run_on_gpu
from processor_table import PROCESSORS
from quantised_hosts import QUANTISATIONS, from_gguf, plain_twin, quantised, row
from safetensors.torch import load_file
from tiny_hosts import HOST, noise
from torch import Tensor, nn

from vision_attn import Clear, Conversion, LinFusion, Softmax, convert, load
from vision_attn.processors.base import stored_name

HOSTS = ("flux", "sd15-unet", "sd35", "vit")
OWN = {name: spec for name, spec in PROCESSORS.items() if name != "softmax"}


def fits(host_id: str, name: str) -> bool:
    return host_id != "vit" or not name.startswith("layerwise")  # which is a method of diffusers' models


def rows(*tables: Any, only: Any = fits) -> list[Any]:
    """Return each host with each way to quantise it, and with each row of other tables."""
    every = [one for one in product(HOSTS, QUANTISATIONS, *tables) if fits(*one[:2]) and only(*one[:2])]
    needed = [
        (lambda *one: one[1], 1),
        (lambda *one: (one[0], QUANTISATIONS[one[1]].package), 1),
        *((lambda *one, at=i: one[2 + at], 1) for i in range(len(tables))),
    ]
    quick = covering(every, *needed)
    return [row(*one, package=QUANTISATIONS[one[1]].package, slow=one not in quick) for one in every]


def train(conversion: Conversion) -> None:
    """Give added parameters values that are not zero."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(conversion.named_parameters()):
            parameter.add_(0.1 * noise(*parameter.shape, seed=i) * (".1.weight" not in name))


def assert_like(output: Tensor, want: Tensor, name: str) -> None:
    rounding = QUANTISATIONS[name].rounding
    if rounding:
        assert distance(output, want) < rounding
    else:
        torch.testing.assert_close(output, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("host_id, name, spec", rows(OWN))
def test_every_processor(host_id: str, name: str, spec: str) -> None:
    model = quantised(host_id, name)
    before = run(HOST[host_id], model, *SIZE)
    twin = plain_twin(host_id, model)
    conversions = [convert(each, OWN[spec], min_tokens=9) for each in (model, twin)]  # the lowest grid is 4 x 2
    for conversion in conversions:
        train(conversion)
    added = dict(conversions[0].named_parameters())
    for inner, parameter in conversions[1].named_parameters():
        parameter.data.copy_(added[inner])
    output = run(HOST[host_id], model, *SIZE)
    if spec in ("agent-sd", "moh", "moh-clear"):  # which tokens are merged, or heads taken, may change by rounding
        assert distance(output, run(HOST[host_id], twin, *SIZE)) < 0.2
    else:
        assert_like(output, run(HOST[host_id], twin, *SIZE), name)
    assert "rerouted" in conversions[0].status.values() and distance(output, before) > 1e-3
    assert {parameter.dtype for parameter in added.values()} <= {torch.float32}
    conversions[0].revert()
    assert torch.equal(run(HOST[host_id], model, *SIZE), before)


EACH = rows()


@pytest.mark.parametrize("host_id, name", EACH)
def test_the_same_as_stock_with_softmax_and_with_a_window_over_everything(host_id: str, name: str) -> None:
    model = quantised(host_id, name)
    before = run(HOST[host_id], model, *SIZE)
    conversion = convert(model, Softmax())
    assert torch.equal(run(HOST[host_id], model, *SIZE), before)
    conversion.revert()
    conversion = convert(model, Clear(radius=99))
    output = run(HOST[host_id], model, *SIZE)
    if QUANTISATIONS[name].rounding:  # a difference of rounding may move an activation to the next code
        assert distance(output, before) < QUANTISATIONS[name].rounding
    else:
        torch.testing.assert_close(output, before, rtol=0, atol=2e-5)
    conversion.revert()
    assert torch.equal(run(HOST[host_id], model, *SIZE), before)


@pytest.mark.parametrize("host_id, name", EACH)
def test_quantised_after_the_conversion(host_id: str, name: str) -> None:
    """What a processor added is no linear layer, and stays as it is."""
    model, later = quantised(host_id, name), HOST[host_id].build()
    conversions = [convert(each, LinFusion(mid_dim=4)) for each in (model, later)]
    added = dict(conversions[0].named_parameters())
    train(conversions[0])
    for inner, parameter in conversions[1].named_parameters():
        parameter.data.copy_(added[inner])
    QUANTISATIONS[name].quantise(later)
    assert_like(run(HOST[host_id], later, *SIZE), run(HOST[host_id], model, *SIZE), name)


@pytest.mark.parametrize("host_id, name", EACH)
def test_an_adapter_holds_what_was_added_alone(host_id: str, name: str, tmp_path: Path) -> None:
    model, again = (quantised(host_id, name) for _ in range(2))
    conversion = convert(model, LinFusion(mid_dim=4))
    train(conversion)
    want = run(HOST[host_id], model, *SIZE)
    conversion.save(tmp_path)
    assert set(load_file(tmp_path / "vision_attn.safetensors")) == {
        stored_name(inner) for inner, _ in conversion.named_parameters()
    }
    before = run(HOST[host_id], again, *SIZE)
    loaded = load(again, tmp_path)
    assert_like(run(HOST[host_id], again, *SIZE), want, name)
    loaded.revert()
    assert torch.equal(run(HOST[host_id], again, *SIZE), before)


def differentiable(host_id: str, name: str) -> bool:
    return name != "torchao-int8-dynamic" and (host_id, name.partition("-")[0]) != ("sd15-unet", "layerwise")


@pytest.mark.parametrize("host_id, name", rows(only=differentiable))
def test_only_what_was_added_learns(host_id: str, name: str) -> None:
    """As with QLoRA: the gradient goes through the quantised layers, and is that of their values."""
    model = quantised(host_id, name)
    grads = []
    for each in (model, plain_twin(host_id, model)):
        conversion = convert(each, POOLED if host_id != "vit" else LinFusion(mid_dim=4))
        with torch.no_grad():
            for i, parameter in enumerate(conversion.parameters()):
                parameter.copy_(0.1 * noise(*parameter.shape, seed=i))
        call(host_id, each).square().mean().backward()
        learned = {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
        assert set(learned) == {n for n, _ in conversion.named_parameters()}
        grads.append(torch.cat([grad.flatten() for grad in learned.values()]))
    assert distance(*grads) < max(1e-3, 3 * QUANTISATIONS[name].rounding)


@pytest.mark.parametrize("host_id, name", rows(only=lambda *one: not differentiable(*one)))
def test_what_has_no_gradients_has_none_on_stock(host_id: str, name: str) -> None:
    """torchao's codes of activations, and convolutions whose weights layerwise casting takes away before backward."""
    model = quantised(host_id, name)
    if name.startswith("torchao"):
        layer: Any = next(module for module in model.modules() if isinstance(module, nn.Linear))
        assert not layer(torch.ones(2, layer.in_features, requires_grad=True)).requires_grad
        return
    inputs: Any = HOST[host_id].inputs(*SIZE, 2, TEXT)
    inputs["sample"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"expected scalar type|should be the same"):
        HOST[host_id].output(model(**inputs)).sum().backward()


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
COPIED = [
    row(name, how, package=QUANTISATIONS[name].package)
    for name, how in product(QUANTISATIONS, COPIES)
    if name.startswith("bitsandbytes") or (name.startswith("torchao") and how == "deepcopy")  # what stock can
]


@pytest.mark.parametrize("name, how", COPIED)
def test_a_copy(name: str, how: str) -> None:
    model = quantised("flux", name)
    before = run(HOST["flux"], model, *SIZE)
    convert(model, CLEAR)
    want = run(HOST["flux"], model, *SIZE)
    other = COPIES[how](model)
    assert_like(run(HOST["flux"], other, *SIZE), want, name)
    Conversion.of(other).revert()
    assert_like(run(HOST["flux"], other, *SIZE), before, name)


REFUSING = [row(name, package=QUANTISATIONS[name].package) for name in QUANTISATIONS if "layerwise" not in name]


@pytest.mark.parametrize("name", REFUSING)
def test_what_cannot_be_is_refused_by_name(name: str, tmp_path: Path) -> None:
    plain = HOST["flux"].build()
    conversion = convert(plain, CLEAR)
    with torch.no_grad():
        plain.get_parameter("transformer_blocks.0.attn.to_q.weight").mul_(1.5)
    conversion.save(tmp_path)
    model = quantised("flux", name)
    before = run(HOST["flux"], model, *SIZE)
    with pytest.raises(
        ValueError, match=r"has transformer_blocks\.0\.attn\.to_q\.weight, which is quantised in this Flux"
    ):
        load(model, tmp_path)
    assert torch.equal(run(HOST["flux"], model, *SIZE), before)
    late = HOST["flux"].build()
    loaded = load(late, tmp_path)
    QUANTISATIONS[name].quantise(late)
    with pytest.raises(ValueError, match="was quantised since the conversion, so whether it was trained is not known"):
        loaded.save(tmp_path / "again")
    with pytest.raises(ValueError, match="came with the adapter and was quantised since"):
        loaded.revert()


GGUF = [row(*one, package="gguf") for one in product(("flux", "sd35", "qwen-image"), ("clear", "linfusion"))]


@pytest.mark.parametrize("host_id, spec", GGUF)
def test_gguf_by_the_loader_of_diffusers(host_id: str, spec: str, tmp_path: Path) -> None:
    model = from_gguf(host_id, tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}
    before, twin = run(HOST[host_id], model, *SIZE), plain_twin(host_id, model)
    conversions = [convert(each, OWN[spec]) for each in (model, twin)]
    for conversion in conversions:
        train(conversion)
    conversions[0].save(tmp_path / "adapter")
    conversions[1].revert()
    load(twin, tmp_path / "adapter")
    torch.testing.assert_close(run(HOST[host_id], model, *SIZE), run(HOST[host_id], twin, *SIZE), rtol=0, atol=2e-5)
    conversions[0].revert()
    assert torch.equal(run(HOST[host_id], model, *SIZE), before)


KINDS = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")
TORCHAO = [row(*one, package="torchao") for one in product(("flux", "sd15-unet"), KINDS)]


@pytest.mark.parametrize("host_id, config", TORCHAO)
def test_torchao_by_the_loader_of_diffusers(host_id: str, config: str, tmp_path: Path) -> None:
    import diffusers
    from torchao import quantization

    plain: Any = HOST[host_id].build()
    plain.save_pretrained(tmp_path / "plain")
    how = diffusers.TorchAoConfig(getattr(quantization, config)())
    options: dict[str, Any] = dict(quantization_config=how, torch_dtype=torch.float32)
    model = type(plain).from_pretrained(tmp_path / "plain", **options).eval()
    before = run(HOST[host_id], model, *SIZE)
    convert(model, CLEAR)
    want = run(HOST[host_id], model, *SIZE)
    model.save_pretrained(tmp_path / "converted")  # codes and scales, as diffusers stores them
    again = type(plain).from_pretrained(tmp_path / "converted", torch_dtype=torch.float32).eval()
    torch.testing.assert_close(run(HOST[host_id], again, *SIZE), before, **FROM_A_FILE)
    convert(again, CLEAR)
    torch.testing.assert_close(run(HOST[host_id], again, *SIZE), want, **FROM_A_FILE)


ON_GPU = {"float8-dynamic": "torchao", "nf4": "bitsandbytes", "int8": "bitsandbytes"}
GPU_ROWS = [
    pytest.param(name, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
                 id=f"{name}, on a GPU with {package}")
    for name, package in ON_GPU.items()
]  # fmt: skip


@pytest.mark.parametrize("name", GPU_ROWS)
def test_what_needs_a_gpu(name: str, tmp_path: Path) -> None:
    """Codes of activations in float8, and bitsandbytes by diffusers' loader."""
    pytest.importorskip(ON_GPU[name])
    import diffusers

    if name == "float8-dynamic":
        from torchao import quantization

        how: Any = diffusers.TorchAoConfig(quantization.Float8DynamicActivationFloat8WeightConfig())
    elif name == "nf4":
        half = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        how = diffusers.BitsAndBytesConfig(load_in_4bit=True, **half)
    else:
        how = diffusers.BitsAndBytesConfig(load_in_8bit=True)
    plain: Any = HOST["flux"].build()
    plain.save_pretrained(tmp_path)
    options: dict[str, Any] = dict(quantization_config=how, torch_dtype=torch.bfloat16, device_map="cuda")
    model = type(plain).from_pretrained(tmp_path, **options).eval()
    before = run_on_gpu(HOST["flux"], model, *SIZE)
    conversion = convert(model, Softmax())
    assert torch.equal(run_on_gpu(HOST["flux"], model, *SIZE), before)
    conversion.revert()
    for spec in (Clear(radius=99), CLEAR, LinFusion(mid_dim=4)):
        conversion = convert(model, spec)
        assert {p.dtype for p in conversion.parameters()} <= {torch.bfloat16}
        output = run_on_gpu(HOST["flux"], model, *SIZE)
        assert set(conversion.status.values()) == {"rerouted"} and output.isfinite().all()
        assert (distance(output, before) < 0.05) == (spec == Clear(radius=99))
        conversion.save(tmp_path / str(type(spec).__name__))
        conversion.revert()
    assert torch.equal(run_on_gpu(HOST["flux"], model, *SIZE), before)
