"""One recorded forward: a CUDA graph with the memory of its inputs and outputs."""

from collections.abc import Callable
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
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            output = forward(self._inputs)
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
