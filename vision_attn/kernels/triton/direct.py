"""Launches a compiled Triton kernel again and again, by what Triton's own launcher calls in the end.

For each launch Triton builds the same arguments anew: a descriptor for every box that TMA fetches, and lists around
them. Here one launch is taken apart, and later ones put only addresses in its place. Where Triton's launcher is not
built as in triton 3.4 to 3.7, `launcher_of` returns its public one.
"""

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

_STREAM = 3  # after the three numbers of the grid
_MOST = 64  # descriptors kept of a box: memory comes back at the same addresses


class _Address:
    """Stands for the tensor of a box."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.value = dtype, 0

    def data_ptr(self) -> int:
        """Return the address."""
        return self.value


class Box:
    """A box of a kernel's arguments, at any address.

    Args:
        descriptor: Triton's description of it.
        encode: Makes what the GPU reads of a descriptor; None leaves that to Triton.
    """

    def __init__(self, descriptor: Any, encode: Callable[[Any], Any] | None = None) -> None:
        self._address = _Address(descriptor.base.dtype)
        self._address.value = descriptor.base.data_ptr()
        self.descriptor = type(descriptor)(
            self._address, descriptor.shape, descriptor.strides, descriptor.block_shape
        )  # fmt: skip
        self.encode = encode
        self._found: dict[int, Any] = {}

    def at(self, address: int) -> Any:
        """Return the argument for an address. It is used before the next call, or made for good."""
        if self.encode is None:
            self._address.value = address
            return self.descriptor
        found = self._found.get(address)
        if found is None:
            if len(self._found) >= _MOST:
                self._found.clear()
            self._address.value = address
            found = self._found[address] = self.encode(self.descriptor)
        return found


class Launcher:
    """A launch of a compiled kernel, without addresses.

    Attributes:
        values: The arguments; those that are addresses or boxes are replaced in a copy.
        position: Where each argument of the kernel lies among `values`.
        launch: Launches on a stream with such values.
    """

    def __init__(self, values: list[Any], position: Sequence[int], launch: Callable[[int, list[Any]], None]) -> None:
        self.values, self.position, self.launch = values, position, launch


def launcher_of(kernel: Any, grid: tuple[int, ...], args: Sequence[Any]) -> Launcher:
    """Return the launcher of a compiled kernel.

    Args:
        kernel: From `triton.jit`.
        grid: Its three numbers of programs.
        args: All its arguments; addresses stand for tensors, `Box` for boxes. The boxes that can be encoded once for an
            address get the means.
    """
    try:
        found = _taken_apart(kernel, grid, args)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        found = None
    return found or _public(kernel, grid, args)


def _plain(args: Sequence[Any]) -> list[Any]:
    return [a.descriptor if isinstance(a, Box) else a for a in args]


def _public(kernel: Any, grid: tuple[int, ...], args: Sequence[Any]) -> Launcher:
    def launch(stream: int, values: list[Any]) -> None:
        kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *values)

    return Launcher(_plain(args), range(len(args)), launch)


def _taken_apart(kernel: Any, grid: tuple[int, ...], args: Sequence[Any]) -> Launcher | None:
    """Return a launcher that calls Triton's innermost function; None if something about it is unknown."""
    run, heard = copy.copy(kernel.run), []
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    innermost, cells = run.launch, {}
    if isinstance(innermost, types.FunctionType):  # it encodes boxes
        unpack = innermost
        cells = dict(zip(unpack.__code__.co_freevars, unpack.__closure__ or (), strict=True))
        innermost = cells["launcher"].cell_contents
        swapped = {**cells, "launcher": types.CellType(lambda *final: heard.append(final))}
        run.launch = types.FunctionType(
            unpack.__code__, unpack.__globals__, unpack.__name__, unpack.__defaults__, tuple(swapped.values())
        )
    else:
        run.launch = lambda *final: heard.append(final)
    run(*grid, 0, kernel.function, kernel.packed_metadata, None, None, None, *_plain(args))
    (final,) = heard
    nested = isinstance(final[-1], (list, tuple)) and final[-1] is not args[-1]
    boxes = [a for a in args if isinstance(a, Box)]
    widths = [1 + 2 * len(a.descriptor.shape) if isinstance(a, Box) else 1 for a in args]
    values = list(final[-1]) if nested else list(final[len(final) - sum(widths) :])
    before = final[: -1 if nested else len(final) - sum(widths)]
    position = [sum(widths[:i]) for i in range(len(args))]
    alike = all(values[p] is a for p, a in zip(position, args, strict=True) if not isinstance(a, Box))
    if len(values) != sum(widths) or not alike or before[:_STREAM] != tuple(grid):
        return None
    if boxes:
        encode, metas = innermost_encoder(run.launch, cells)
        if len(metas) != len(boxes) or None in metas:
            return None
        for box, meta in zip(boxes, metas, strict=True):
            box.encode = lambda descriptor, meta=meta: encode(descriptor, meta)[0]
    first, rest = before[:_STREAM], before[_STREAM + 1 :]
    if nested:
        return Launcher(values, position, lambda stream, own: innermost(*first, stream, *rest, own))
    return Launcher(values, position, lambda stream, own: innermost(*first, stream, *rest, *own))


def innermost_encoder(unpack: Any, cells: dict[str, Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
    """Return Triton's function that encodes a descriptor, and what it is told of each box."""
    return unpack.__globals__["make_tensordesc_arg"], cells["tensordesc_meta"].cell_contents
