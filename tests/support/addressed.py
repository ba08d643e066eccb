"""Checks the addresses of kernels in Triton's interpreter: what they read and write lies in the tensors of the launch.

A compiled kernel that reads beyond a tensor mostly finds other memory there and runs on; now and then it ends the
process. Here each tensor of a launch gets an address far from those of all others, so that an address tells which
tensor a kernel means, however far it strays, and the interpreter gets the true address behind it.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

_BITS = 41  # of the room of a tensor, which begins in its middle


class OutsideError(AssertionError):
    """A kernel reads or writes outside the tensor that it means."""


class _Argument:
    """A tensor of a launch, by the elements that it has.

    Args:
        name: Of the kernel's argument.
        tensor: The tensor.
        number: Of the room that its address lies in.
    """

    def __init__(self, name: str, tensor: Tensor, number: int) -> None:
        self.name, self.start, self.size = name, tensor.data_ptr(), tensor.element_size()
        self.address = (number << _BITS) + (1 << _BITS - 1) + self.start % 16
        axes = sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s)
        self.count = 1 + sum(s * (n - 1) for s, n in axes) if tensor.numel() else 0
        self.about = f"{name}, {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
        # which elements between the first and the last are its own can be told where no axis overlaps the next
        inner = np.cumsum([0] + [s * (n - 1) for s, n in axes])
        nested = all(s > reach for (s, _), reach in zip(axes, inner, strict=False))
        self.axes = axes[::-1] if nested and self.count > tensor.numel() else []

    def outside(self, places: np.ndarray) -> np.ndarray:
        """Return which places, counted in elements from the first, are none of the tensor's."""
        bad = (places < 0) | (places >= self.count)
        rest = places
        for stride, n in self.axes:
            bad |= rest // stride >= n
            rest = rest % stride
        return bad | (rest != 0) if self.axes else bad


class _Launch:
    """The tensors of the launch that is being interpreted."""

    def __init__(self) -> None:
        self.kernel, self.names, self.arguments = "", [], []
        self.fault: OutsideError | None = None

    def begin(self, kernel: str, names: list[str]) -> None:
        self.kernel, self.names, self.arguments = kernel, names, []

    def address_of(self, t: Any) -> int:
        """Return the address that the kernel sees; `t` may be `Shifted`."""
        tensor = t if isinstance(t, Tensor) else t.tensor
        argument = _Argument(self.names[len(self.arguments)], tensor, len(self.arguments) + 1)
        self.arguments.append(argument)
        return argument.address + t.data_ptr() - tensor.data_ptr()

    def true(self, pointers: np.ndarray, mask: np.ndarray, size: int, verb: str) -> np.ndarray:
        """Return the true addresses of elements of `size` bytes.

        Raises:
            OutsideError: If one that is not masked is outside its tensor.
        """
        numbers = (pointers >> np.uint64(_BITS)).astype(np.int64)
        seen, found = numbers[mask], pointers.copy()
        for number in set(seen.ravel().tolist()):
            if not 0 < number <= len(self.arguments):
                raise self._fault(f"{verb} an address that comes from no tensor")
            argument = self.arguments[number - 1]
            away = (pointers - np.uint64(argument.address)).astype(np.int64)
            places, own = away // argument.size, mask & (numbers == number)
            if size != argument.size:
                raise self._fault(f"{verb} elements of {size} bytes of {argument.about}")
            bad = own & (argument.outside(places) | (away % size != 0))
            if bad.any():
                first, last = int(places[bad].min()), int(places[bad].max())
                if first < 0 or last >= argument.count:
                    where = f"{-first} elements before the first" if first < 0 else ""
                    beyond = f"{last - argument.count + 1} elements beyond the last" if last >= argument.count else ""
                    raise self._fault(f"{verb} {' and '.join(filter(None, (where, beyond)))} of {argument.about}")
                raise self._fault(f"{verb} what lies between the elements of {argument.about}: element {first}")
            found = np.where(own, away.astype(np.uint64) + np.uint64(argument.start), found)
        return found

    def _fault(self, text: str) -> OutsideError:
        from triton.runtime.interpreter import interpreter_builder

        self.fault = OutsideError(f"{self.kernel}, program {interpreter_builder.grid_idx}, {text}")
        return self.fault


@contextmanager
def checked_addresses() -> Iterator[None]:
    """Raise `OutsideError` at the first element outside its tensor that a kernel reads or writes in this block."""
    from triton.runtime import interpreter

    builder, executor, launch = interpreter.InterpreterBuilder, interpreter.GridExecutor, _Launch()
    convert, call = interpreter._implicit_cvt, executor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    swap, change = builder.create_atomic_cas, builder.create_atomic_rmw
    handle = interpreter.TensorHandle

    def converted(arg):
        if not hasattr(arg, "data_ptr"):
            return convert(arg)
        found = convert(arg)
        found.handle.data = np.array([launch.address_of(arg)], dtype=np.uint64)
        return found

    def called(self, *args, **named):
        known = inspect.getfullargspec(self.fn).args
        values = inspect.getcallargs(self.fn, *args, **{name: v for name, v in named.items() if name in known})
        tensors = [name for name, v in values.items() if hasattr(getattr(v, "base", v), "data_ptr")]
        names = [name for name in tensors if name not in self.constexprs]
        launch.begin(f"{self.fn.__module__.removeprefix('vision_attn.kernels.')}.{self.fn.__name__}", names)
        try:
            return call(self, *args, **named)
        except interpreter.InterpreterError:
            if launch.fault is None:
                raise
            fault, launch.fault = launch.fault, None
            raise fault from None

    def at(pointers, mask, verb):
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        keep = np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)
        return handle(launch.true(pointers.data, keep, size, verb), pointers.dtype)

    def whole(pointers):
        return handle(np.ones_like(pointers.data, dtype=bool), interpreter.tl.int1)

    def loaded(self, pointers, mask, *rest, **named):
        return load(self, at(pointers, mask, "reads"), mask, *rest, **named)

    def stored(self, pointers, value, mask, *rest):
        return store(self, at(pointers, mask, "writes"), value, mask, *rest)

    def swapped(self, pointers, *rest):
        return swap(self, at(pointers, whole(pointers), "swaps"), *rest)

    def changed(self, operation, pointers, value, mask, *rest):
        return change(self, operation, at(pointers, mask, "changes"), value, mask, *rest)

    new = {
        (interpreter, "_implicit_cvt"): converted,
        (executor, "__call__"): called,
        # tensors of the CPU need no copies, and what is no tensor, such as a shifted one, has none
        (executor, "_init_args_hst"): lambda self, args, named: (list(args), dict(named)),
        (executor, "_restore_args_dev"): lambda self, *args: None,
        (builder, "create_masked_load"): loaded,
        (builder, "create_masked_store"): stored,
        (builder, "create_atomic_cas"): swapped,
        (builder, "create_atomic_rmw"): changed,
    }
    old = {(where, name): getattr(where, name) for where, name in new}
    for (where, name), function in new.items():
        setattr(where, name, function)
    try:
        yield
    finally:
        for (where, name), function in old.items():
            setattr(where, name, function)
