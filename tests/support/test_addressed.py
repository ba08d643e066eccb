"""The check of addresses finds what a kernel reads and writes outside its tensors, and names it."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
from addressed import OutsideError, checked_addresses  # noqa: E402

pytestmark = pytest.mark.interpreter


@triton.jit
def row_of(x, row, stride, D: tl.constexpr):
    return tl.load(x + row * stride + tl.arange(0, D))


@triton.jit
def copy_rows(x, out, rows, shift, stride, D: tl.constexpr):
    for row in range(rows):
        tl.store(out + row * D + tl.arange(0, D), row_of(x, row + shift, stride, D))


@triton.jit
def copy_masked(x, out, N, LEN: tl.constexpr):
    n = tl.arange(0, LEN)
    tl.store(out + n, tl.load(x + n, mask=n < N), mask=n < N)


@triton.jit
def count(x, places, LEN: tl.constexpr):
    tl.atomic_add(x + tl.load(places + tl.arange(0, LEN)), 1)


def launched(kernel, *args):
    with checked_addresses():
        kernel[(1,)](*args)


def test_what_is_inside_runs_as_ever():
    x, out = torch.randn(6, 8), torch.zeros(4, 8)
    launched(copy_rows, x, out, 4, 2, 8, 8)
    assert torch.equal(out, x[2:])
    launched(copy_masked, x, out, 5, 32)
    assert torch.equal(out[0, :5], x[0, :5])
    found = torch.zeros(4, dtype=torch.int32)
    launched(count, found, torch.tensor([1, 1, 3, 0]), 4)
    assert found.tolist() == [1, 2, 0, 1]


def test_a_row_too_many_is_found_and_named():
    x, out = torch.randn(6, 8), torch.zeros(4, 8)
    with pytest.raises(OutsideError, match=r"test_addressed.copy_rows, .* reads 8 elements beyond the last of x, "):
        launched(copy_rows, x, out, 4, 3, 8, 8)
    with pytest.raises(OutsideError, match="reads 8 elements before the first of x, "):
        launched(copy_rows, x, out, 1, -1, 8, 8)
    with pytest.raises(OutsideError, match="writes 8 elements beyond the last of out, "):
        launched(copy_rows, x, out, 5, 0, 8, 8)
    with pytest.raises(OutsideError, match="beyond the last of x, "):
        launched(copy_masked, x[0], torch.zeros(16), 9, 16)
    with pytest.raises(OutsideError, match="changes 1 elements beyond the last of x, "):
        launched(count, torch.zeros(4, dtype=torch.int32), torch.tensor([1, 1, 3, 4]), 4)


def test_memory_of_another_tensor_does_not_count():
    """Rows of one tensor beside each other, and channels between those of a view."""
    both = torch.randn(2, 4, 8)
    with pytest.raises(OutsideError, match="reads 8 elements beyond the last of x, "):
        launched(copy_rows, both[0], torch.zeros(4, 8), 4, 1, 8, 8)
    with pytest.raises(OutsideError, match=r"reads what lies between the elements of x, .*: element 4"):
        launched(copy_rows, both[0, :, :4], torch.zeros(4, 8), 4, 0, 8, 8)
    out = torch.zeros(3, 4)
    launched(copy_rows, both[0, :, :4], out, 3, 1, 8, 4)
    assert torch.equal(out, both[0, 1:, :4])


def test_boxes_are_checked_against_their_tensor():
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def load_box(box, out, LEN: tl.constexpr, D: tl.constexpr):
        rows = box.load([0, 0])
        tl.store(out + tl.arange(0, LEN)[:, None] * D + tl.arange(0, D)[None, :], rows)

    x, out = torch.randn(3, 4), torch.ones(4, 4)
    launched(load_box, TensorDescriptor(x, [3, 4], [4, 1], [4, 4]), out, 4, 4)
    assert torch.equal(out[:3], x) and not out[3].any()
    with pytest.raises(OutsideError, match="reads 4 elements beyond the last of box, "):
        launched(load_box, TensorDescriptor(x, [4, 4], [4, 1], [4, 4]), out, 4, 4)


def test_the_interpreter_is_left_as_it_was():
    from triton.runtime import interpreter

    before = interpreter._implicit_cvt, interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.create_load
    with pytest.raises(OutsideError):
        launched(copy_rows, torch.randn(1, 8), torch.zeros(4, 8), 4, 3, 8, 8)
    after = interpreter._implicit_cvt, interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.create_load
    assert after == before
