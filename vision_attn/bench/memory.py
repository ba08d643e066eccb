"""What a call allocates above its inputs and outputs, or above all that lay there before."""

from collections.abc import Callable

import torch
from torch import Tensor

from vision_attn.bench.candidate import Inputs


def extra_memory(
    run: Callable[..., Tensor], inputs: Inputs, device: torch.device, backward: bool
) -> dict[str, float] | None:
    """Return the peak above inputs and outputs of one forward, or of forward and backward together.

    Saved statistics such as a log-sum-exp count as extra; a cotangent is an input, gradients are outputs.

    Args:
        run: From the inputs to the output; has run before, so that no compilation is in the figure.
        inputs: What to call it with.
        device: Where it runs.
        backward: Whether the gradients of all inputs are computed too.

    Returns:
        `bytes`, and `share` of the bytes of inputs and outputs. None on a CPU, where nothing is counted.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    if backward:
        leaves = inputs.leaves()
        output = run(*leaves)
        outputs = (output, *torch.autograd.grad(output, leaves, inputs.cotangent))
        given = sum(t.nbytes for t in (*inputs.tensors, inputs.cotangent))
    else:
        with torch.no_grad():
            outputs = (run(*inputs.tensors),)
        given = sum(t.nbytes for t in inputs.tensors)
    torch.cuda.synchronize()
    made = sum(t.nbytes for t in outputs)
    extra = max(torch.cuda.max_memory_allocated(device) - before - made, 0)
    return dict(bytes=extra, share=extra / (given + made))


def peak_memory(call: Callable[[], object], device: torch.device) -> dict[str, int] | None:
    """Return what one call needs.

    Args:
        call: Has run before, so that no compilation is in the figure.
        device: Where it runs.

    Returns:
        `bytes`, the peak of the whole process, and `above`, the part of it that was allocated during the call. None on
        a CPU, where nothing is counted.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(device)
    return dict(bytes=peak, above=peak - before)
