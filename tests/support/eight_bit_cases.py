"""What the tests of attention in 8 bits share: the errors that are right, and how near 8 bits are on a teacher."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn import convert
from vision_attn.demo import load_teacher
from vision_attn.processors import AttnSpec, Layer, Processor

PRECISIONS = ("int8", "fp8")
# 1 - cosine for normal inputs, whose rounding errors are independent: 3.5 % of weights and values, and those of logits
WORST = dict(int8=1.1e-3, fp8=2.2e-3)


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two outputs."""
    return torch.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()


def check_gradients_are_refused(precision: str, tensors: Sequence[Tensor], attend: Callable[..., Tensor]) -> None:
    """Check that `attend(*tensors)` is refused by name where one of the tensors wants a gradient, and runs without."""
    import pytest  # not where a GPU's checks run

    for wants in tensors:
        wants.requires_grad_()
        match = rf"precision='{precision}' has no gradient, .* train with precision=None"
        with pytest.raises(ValueError, match=match):
            attend(*tensors)
        with torch.no_grad():
            attend(*tensors)
        wants.requires_grad_(False)


def rounding_errors(attend: Callable[[str | None, str], Tensor]) -> dict[str, dict[str, float]]:
    """Return the errors of both precisions on a GPU, on inputs in bfloat16.

    The mean error of the kernel beside PyTorch's rounding, as a share of twice a rounding of the output, must be 1 at
    most. Its cosine to the 16-bit kernel has no bound on normal inputs: errors do not cancel there.

    Args:
        attend: Takes a precision or None, and a backend.
    """
    found = {}
    with torch.no_grad():
        want = attend(None, "triton").double()
        for precision in PRECISIONS:
            ours, same = (attend(precision, backend).double() for backend in ("triton", "torch"))
            error = (ours - same).abs().mean() / (2 * torch.finfo(torch.bfloat16).eps * same.abs().mean())
            found[precision] = dict(error=round(error.item(), 3), cosine=round(cosine(ours, want), 5))
    return found


def teachers(plain: Any) -> dict[str, dict[str, float]]:
    """Return `nearness` of a spec in both precisions on both teachers, on a GPU, and whether it holds.

    It holds with cosines of 0.9995 at least, and 35 dB.
    """
    found = {}
    for name in ("base", "unet"):
        for precision in PRECISIONS:
            one = nearness(name, plain, replace(plain, precision=precision), device="cuda")
            found[f"{precision} {name}"] = one | dict(holds=one["least"] >= 0.9995 and one["psnr_db"] >= 35)
    return found


def nearness(
    name: str, plain: AttnSpec, rounded: AttnSpec, *, device: str = "cpu", steps: int = 10, side: int | None = None,
    prompts: tuple[str, ...] = ("octopus", "red apple"),
) -> dict[str, float]:  # fmt: skip
    """Compare 8 bits with the model's own bits on a teacher, in bfloat16 on a GPU.

    Args:
        name: The teacher.
        plain: The processor.
        rounded: The same with a precision.
        device: Where it runs.
        steps: Denoising steps.
        side: Pixels of a side; the teacher's if None.
        prompts: What is drawn.

    Returns:
        The cosines of the outputs on the same inputs over all layers and steps: the least, the mean, and how many calls
        there were; and the PSNR of the pictures in dB.
    """
    cosines: list[float] = []
    own: dict[nn.Module, Processor] = {}

    def compare(module: nn.Module, args: tuple, o: Tensor) -> None:
        heads, channels = args[0].shape[2:]
        if module not in own:
            own[module] = rounded.build(Layer("", heads, channels, dim=heads * channels)).to(o.device, o.dtype)
            own[module].load_state_dict(module.state_dict())
        cosines.append(cosine(own[module](*args), o))

    pictures = []
    for spec in (plain, rounded):
        pipe = load_teacher(name).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
        convert(pipe, spec)
        host = getattr(pipe, "transformer", None) or pipe.unet
        if spec is plain:
            for module in host.modules():
                if isinstance(module, Processor):
                    module.register_forward_hook(compare)
        draw = torch.Generator("cpu").manual_seed(0)
        size = {} if side is None else dict(height=side, width=side)
        with torch.no_grad():
            drawn = pipe([*prompts], num_inference_steps=steps, output_type="pt", generator=draw, **size)
        pictures.append(torch.as_tensor(drawn.images).double())
    error = (pictures[0] - pictures[1]).square().mean()
    mean = sum(cosines) / len(cosines)
    found = dict(least=round(min(cosines), 5), mean=round(mean, 5), calls=len(cosines))
    return found | dict(psnr_db=round(-10 * torch.log10(error).item(), 1))
