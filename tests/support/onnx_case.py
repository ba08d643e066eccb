"""Exports modules to ONNX with a batch of any size, and runs them in onnxruntime."""

import importlib.util

import pytest
import torch

_MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(_MISSING), reason=f"not installed, see the extra 'onnx': {', '.join(_MISSING)}")


def exported(module, inputs, *, dynamic=True):
    """Return a function that runs the exported module on a tuple of tensors; with `dynamic`, of any batch size."""
    import onnxruntime

    sizes = tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs) if dynamic else None
    program = torch.onnx.export(module, inputs, dynamo=True, dynamic_shapes=sizes, verbose=False)
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def run(*tensors):
        names = [node.name for node in session.get_inputs()]
        return torch.from_numpy(session.run(None, dict(zip(names, [t.numpy() for t in tensors], strict=True)))[0])

    return run


def check_exported(module, *inputs):
    """Compare the exported module with itself in PyTorch, for the batch it was exported with and for others."""
    run = exported(module, inputs)
    with torch.no_grad():
        for batch in (len(inputs[0]), 1, 5):
            given = [torch.randn(batch, *t.shape[1:]) for t in inputs]
            torch.testing.assert_close(run(*given), module(*given), atol=2e-5, rtol=1e-4)
