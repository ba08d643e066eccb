"""Converted UNets over processes, beside the same in one process."""

import torch
import torch.distributed as dist
from sliced_models import built, results
from tiny_hosts import HOST

import vision_attn
from vision_attn.parallel import enable


def residuals(size, levels=3):
    """Return what a ControlNet would add to the skips of the tiny UNets, and to the middle."""
    height, width, batch, _ = size
    draw = torch.Generator().manual_seed(5)
    sides = [(-(-height // 2**n), -(-width // 2**n)) for n in range(levels)]
    skips = [(16, 0), (16, 0), (16, 1), (32, 1), (32, 2), (32, 2)]
    down = tuple(torch.randn(batch, channels, *sides[n], generator=draw) for channels, n in skips)
    return dict(
        down_block_additional_residuals=down,
        mid_block_additional_residual=torch.randn(batch, 32, *sides[-1], generator=draw),
    )


def prepared(name, size, spec, options):
    """Return a converted tiny UNet and its inputs."""
    case = HOST[name]
    model, inputs = built(case, size)
    dtype = options.get("dtype", torch.float32)
    model.to(dtype=dtype, memory_format=options.get("layout", torch.contiguous_format))
    inputs = {n: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    if options.get("checkpointing"):
        model.enable_gradient_checkpointing()
        model.train()
    if options.get("residuals"):
        inputs |= residuals(size)
    conversion = vision_attn.convert(model, spec)
    return case, model, inputs, conversion


def alone(name, size, spec, options):
    """Return output, gradient of the input and gradients of the parameters in one process."""
    case, model, inputs, _ = prepared(name, size, spec, options)
    return results(case, model, inputs, True)


def over(rank, name, size, spec, options):
    """Return the same over all processes, what became of the layers, and the bytes received."""
    case, model, inputs, conversion = prepared(name, size, spec, options)
    enabled = enable(model)
    output, grad, grads = results(case, model, inputs, True)
    for g in (grad, *grads.values()):
        dist.all_reduce(g)
    received = dict(vars(model)["_vision_attn_rows"].cut.traffic.received)
    status = conversion.status
    enabled.disable()
    before = [type(module) for module in HOST[name].build().modules()]
    after = [type(module) for module in conversion_reverted(conversion, model).modules()]
    return output, grad, grads, status, received, before == after


def conversion_reverted(conversion, model):
    """Revert, and return the model."""
    conversion.revert()
    return model


def in_turn(rank, name, sizes, spec):
    """Return the outputs of pictures of several sizes one after the other, with and without gradients."""
    found = []
    case, model, _, _ = prepared(name, sizes[0], spec, {})
    enable(model)
    for size in sizes:
        inputs = case.inputs(*size)
        found.append(results(case, model, inputs, True)[0])
        with torch.no_grad():
            found.append(model(**inputs).sample)
    return found


def compiled(rank, name, size, spec):
    """Return outputs before and after the blocks are compiled, with gradients off and on."""
    case, model, inputs, _ = prepared(name, size, spec, {})
    enable(model)
    with torch.no_grad():
        found = [model(**inputs).sample]
    for module in model.modules():
        if type(module).__name__ in ("BasicTransformerBlock", "ResnetBlock2D"):
            module.compile(backend="eager")
    with torch.no_grad():
        found += [model(**inputs).sample, model(**inputs).sample]
    return [*found, results(case, model, inputs, True)[0]]


def adapted(rank, name, size, spec):
    """Return the output with LoRA layers on convolutions that come after the cut, and the same in one process."""
    from peft import LoraConfig, inject_adapter_in_model

    found = []
    for cut in (True, False):
        _, model, inputs, _ = prepared(name, size, spec, {})
        enabled = enable(model) if cut else None
        with torch.no_grad():
            model(**inputs)
            torch.manual_seed(4)
            lora = LoraConfig(r=2, target_modules=["conv1", "conv_in", "proj_in"], init_lora_weights=False)
            inject_adapter_in_model(lora, model)
            found.append(model(**inputs).sample)
        if enabled is not None:
            enabled.disable()
    return found


def paired(rank, name, sizes, spec):
    """Return the output of two processes of four, which draw the picture of this size together."""
    case, model, inputs, _ = prepared(name, sizes[rank // 2], spec, {})
    enable(model, share=2)
    return results(case, model, inputs, True)[0]


def refused(rank, name, size, spec):
    """Return what is said of what a cut UNet cannot do."""
    case, model, inputs, conversion = prepared(name, size, spec, {})
    enable(model)
    said = []
    masks = dict(cross_attention_kwargs={"ip_adapter_masks": torch.ones(1)})
    small = case.inputs(1, 6, 1, 8)
    calls = [
        conversion.revert,
        conversion.bypassed().__enter__,
        lambda: model(**inputs | masks),
        lambda: model(**small),
        lambda: enable(model),
    ]
    for call in calls:
        try:
            said.append(str(call()))
        except ValueError as error:
            said.append(str(error))
    model.enable_freeu(0.9, 0.2, 1.2, 1.4)
    late = [lambda: model(**inputs), lambda: model.disable_freeu() or bared(model)(**inputs)]
    for call in late:
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def bared(model):
    """Return the model with a self-attention that no processor answers, as if it had been replaced."""
    from vision_attn.conversion.plan import restore

    restore(next(module for module in model.modules() if "_vision_attn" in vars(module)))
    return model


def over_wrong(rank, part, *args):
    """Return the same as `over` with a part that does not look at the other processes."""
    from unittest.mock import patch

    from vision_attn.parallel import rows

    def alone(own, cut):
        return own[None].expand(cut.size, *own.shape)

    def zeros(self, x, above, below, end):
        return torch.nn.functional.pad(x, (0, 0, above, below if rank + 1 < self.cut.size else end))

    wrong = patch.object(rows, "_from_all", alone) if part == "norm" else patch.object(rows.Rows, "around", zeros)
    with wrong:
        return over(rank, *args)
