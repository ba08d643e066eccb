"""One recorded forward: a CUDA graph with the memory of its inputs and outputs."""

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Recording:
    """A forward of fixed shapes that replays from a CUDA graph.

    Recording runs the forward once without computing anything: everything that it does in Python happens then, and
    never again. It must have run eagerly before, so that kernels are compiled and tables are made.

    Args:
        forward: What is recorded; it takes the leaves of the inputs.
        leaves: The inputs of the call; tensors are copied to memory of the graph, other values are kept as they are.
        pool: The memory that all recordings of a model share.

    Attributes:
        device: The GPU that it runs on.
        bytes: The memory that it holds, inputs included.
    """

    def __init__(self, forward: Callable[[list[Any]], Any], leaves: list[Any], pool: Any) -> None:
        device = self.device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda)
        before = torch.cuda.memory_reserved(device)
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
            self._graph, output = _captured(lambda: forward(self._inputs), pool, device.index)
        self._outputs, self._tree = pytree.tree_flatten(output)
        static = sum(t.numel() * t.element_size() for t in self._inputs if isinstance(t, Tensor))
        self.bytes = static + max(0, torch.cuda.memory_reserved(device) - before)

    def replay(self, leaves: list[Any]) -> Any:
        """Run on other inputs of the same shapes; the outputs are the caller's to keep."""
        with torch.no_grad():
            for static, leaf in zip(self._inputs, leaves, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(leaf)
            self._graph.replay()
            outputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._outputs]
        return pytree.tree_unflatten(outputs, self._tree)


def _captured(call: Callable[[], Any], pool: Any, device: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a call; return its graph and output.

    While a graph is captured PyTorch refuses random numbers to all other threads, because the generator of the GPU
    takes part. So a copy of it takes part; a call that draws random numbers itself fails, and leaves the generator as
    it was. The copy stands in its place while the capture begins: a thread that draws just then may draw that again.
    """
    graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[device]
    with torch.cuda.stream(torch.cuda.Stream()):
        own = generator.graphsafe_get_state()
        generator.graphsafe_set_state(generator.clone_state())
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        finally:
            generator.graphsafe_set_state(own)
        try:
            output = call()
        except BaseException as error:
            with suppress(RuntimeError):
                graph.capture_end()
            _clean_up(pool, device)
            if "generator" in str(error):
                raise RuntimeError("it draws random numbers itself") from error
            raise
        try:
            graph.capture_end()
        except RuntimeError:
            _clean_up(pool, device)
            raise
    return graph, output


def _clean_up(pool: Any, device: int) -> None:
    """Undo what a capture that failed leaves behind: memory goes to its pool."""
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)
