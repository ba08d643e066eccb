"""LoRA, IP-Adapter, offloading hooks and fused projections on a converted model."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from converted_hosts import CLEAR, POOLED, SIZE, call, converted, expected, hosts
from covering import quick
from host_runs import distance, run, stock
from offloads import OFFLOADS
from peft import LoraConfig, get_peft_model
from tiny_hosts import HOST, noise
from tiny_pipelines import add_lora, ip_adapter_inputs, load_ip_adapter
from torch import nn

from vision_attn import Conversion, Softmax, convert

when = pytest.mark.parametrize("before", [True, False], ids=["before", "after"])


@hosts("flux", "sd15-unet", "sd35")
@when
def test_lora(host_id: str, before: bool) -> None:
    def adapted(spec: Any) -> nn.Module:
        model = HOST[host_id].build()
        steps = [lambda: add_lora(model), lambda: convert(model, spec)]
        for step in steps if before else steps[::-1]:
            step()
        return model

    want = run(HOST[host_id], add_lora(HOST[host_id].build()), *SIZE)
    torch.testing.assert_close(run(HOST[host_id], adapted(Softmax()), *SIZE), want, rtol=0, atol=1e-5)
    model = adapted(CLEAR)
    output = run(HOST[host_id], model, *SIZE)
    assert output.isfinite().all() and distance(output, want) > 1e-3
    model.disable_adapters()
    assert torch.equal(run(HOST[host_id], model, *SIZE), expected(host_id, CLEAR))
    model.enable_adapters()
    assert torch.equal(run(HOST[host_id], model, *SIZE), output)
    call(host_id, model).square().mean().backward()
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert adapters and all(p.grad is not None and p.grad.any() for p in adapters.values())
    Conversion.of(model).revert()
    assert torch.equal(run(HOST[host_id], model, *SIZE), want)


def test_peft_around_a_vit() -> None:
    config = LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    plain = get_peft_model(HOST["vit"].build(), config)
    model = get_peft_model(converted("vit", Softmax()), config)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(run(HOST["vit"], model, *SIZE), run(HOST["vit"], plain, *SIZE))
    local = get_peft_model(converted("vit", CLEAR), config)
    run(HOST["vit"], local, *SIZE).isfinite().all()
    assert torch.equal(run(HOST["vit"], local.unload(), *SIZE), expected("vit", CLEAR))


@hosts("sd15-unet", "sd15-inpaint-unet", "flux")
def test_ip_adapter_loaded_after_conversion(host_id: str) -> None:
    outputs = []
    for spec in (None, Softmax(), CLEAR):
        model = HOST[host_id].build() if spec is None else converted(host_id, spec)
        load_ip_adapter(model)
        with torch.no_grad():
            outputs.append(call(host_id, model, **ip_adapter_inputs(model, 2)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    assert outputs[2].isfinite().all() and distance(outputs[2], outputs[0]) > 1e-3
    assert set(Conversion.of(model).status.values()) == {"rerouted"}
    Conversion.of(model).revert()
    with torch.no_grad():
        assert torch.equal(call(host_id, model, **ip_adapter_inputs(model, 2)), outputs[0])


OFFLOADED = quick(
    list(product(("flux", "sd15-unet", "sd35"), ("clear", "pooled"), OFFLOADS, ("before", "after"))),
    (lambda host_id, spec, offload, when: (host_id, offload), 1),
    (lambda host_id, spec, offload, when: (offload, when), 1),
    (lambda host_id, spec, offload, when: (host_id, when), 1),
    (lambda host_id, spec, offload, when: (spec, when), 1),
    (lambda host_id, spec, offload, when: (spec, offload), 1),
)


@pytest.mark.parametrize("host_id, spec, offload, when", OFFLOADED)
def test_offload_hooks(host_id: str, spec: Any, offload: str, when: str) -> None:
    model, spec = HOST[host_id].build(), dict(clear=CLEAR, pooled=POOLED)[spec]
    if when == "before":
        OFFLOADS[offload](model)
    conversion = convert(model, spec)
    for i, (_, parameter) in enumerate(conversion.named_parameters()):
        parameter.data += 0.1 * noise(*parameter.shape, seed=i)
    if when == "after":
        OFFLOADS[offload](model)
    for _ in range(2):
        assert torch.equal(run(HOST[host_id], model, *SIZE), expected(host_id, spec))
    conversion.revert()
    assert torch.equal(run(HOST[host_id], model, *SIZE), stock(host_id, SIZE))


@hosts("flux", "sd15-unet", "sd3", "pixart", "hunyuandit", "auraflow", "qwen-image")
@when
def test_fused_projections(host_id: str, before: bool) -> None:
    for spec, want in ((Softmax(), stock(host_id, SIZE)), (CLEAR, expected(host_id, CLEAR))):
        model = HOST[host_id].build()
        steps = [model.fuse_qkv_projections, partial(convert, model, spec)]
        for step in steps if before else steps[::-1]:
            step()
        torch.testing.assert_close(run(HOST[host_id], model, *SIZE), want, rtol=0, atol=1e-5)
    Conversion.of(model).revert()
    torch.testing.assert_close(run(HOST[host_id], model, *SIZE), stock(host_id, SIZE), rtol=0, atol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(run(HOST[host_id], model, *SIZE), stock(host_id, SIZE))
