"""The rates of a GPU: timed once, in about 3 seconds, and kept in the user's cache folder.

They are kept for each GPU, driver, torch, triton, version of this package and dtype. Where there is no GPU, and where
none can be timed at the moment, they are those of an H200. Rates of a GPU that others use meanwhile hold for this
process alone. `$VISION_ATTN_RATES` names another folder.
"""

import dataclasses
import functools
import importlib.util
import json
import logging
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vision_attn
from vision_attn._checks import is_number
from vision_attn.estimation.cost import CPU, H200, Machine
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention

_LOG = logging.getLogger(__name__)
MOST_S = 3.0  # nothing that may take longer is begun; a slow compilation can exceed it
_SLOW_S = 0.1  # a call that takes longer is not repeated
_STEADY = 1.25  # between two measurements on a GPU that does nothing else
_AT_WORK = 0.9  # of the rate of an idle H200 that begins: at work it clocks lower
BUSY = "rates of this GPU, measured while it or its host was busy"  # a source
_KINDS = ("cuda", "cpu")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TIMED = ("dense", "narrow", "other", "products", "bandwidth", "host")  # the rates of a machine that are timed


def check_device(device: str | None) -> None:
    """Refuse the name of a device whose rates are not known.

    Raises:
        ValueError: If it is neither 'cuda' nor 'cpu', with or without a number.
    """
    if device is not None and (not isinstance(device, str) or device.partition(":")[0] not in _KINDS):
        raise ValueError(f"device must be {' or '.join(map(repr, _KINDS))}, whose rates are known, got {device!r}")


def machine_of(device: str, dtype: torch.dtype = torch.bfloat16) -> Machine:
    """Return the rates of a device, which are measured the first time that a GPU is asked for.

    Args:
        device: Such as 'cuda', 'cuda:1' or 'cpu'; others have those of an H200.
        dtype: What models compute in; a weight of fewer bits is computed with in bfloat16.
    """
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return CPU
    if kind != "cuda" or torch.compiler.is_compiling() or not INSTALLED.any():
        return H200
    try:
        gpu = INSTALLED.gpu(int(number) if number else None)
        key = Key.of(INSTALLED.name(gpu), dtype if dtype in _DTYPES else torch.bfloat16)
    except (RuntimeError, AssertionError) as error:  # there is no such GPU, or this process may not use it
        _LOG.warning("the stored rates of an H200 decide: %s", str(error).partition("\n")[0])
        return H200
    return _slot(key).machine(gpu)


class Installed:
    """The GPUs of this machine."""

    def any(self) -> bool:
        """Whether there is one."""
        return torch.cuda.is_available()

    def gpu(self, number: int | None) -> torch.device:
        """Return the GPU with a number, the current one if it is None."""
        return torch.device("cuda", torch.cuda.current_device() if number is None else number)

    def name(self, gpu: torch.device) -> str:
        """Return the name of a GPU."""
        return torch.cuda.get_device_name(gpu)

    def records(self) -> bool:
        """Whether a CUDA graph is being recorded."""
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def eight_bits(self, device: torch.device) -> bool:
        """Whether a device computes with 8-bit floats; an H200, which stands for a GPU that is not here, does."""
        if device.type != "cuda" or not self.any() or torch.version.hip is not None:
            return device.type == "cuda"
        return torch.cuda.get_device_capability(device) >= (8, 9)

    def measured(self, gpu: torch.device, dtype: torch.dtype) -> Machine:
        """Time a GPU."""
        return dataclasses.replace(measure(self.name(gpu), probes(gpu, dtype), GpuClock(gpu)), units=units_of(gpu))


INSTALLED = Installed()


def units_of(device: torch.device) -> int:
    """Return the multiprocessors of a GPU, 0 of a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


@dataclass(frozen=True)
class Key:
    """What rates are valid for."""

    gpu: str
    driver: str
    torch_version: str
    triton_version: str
    version: str
    dtype: str

    @classmethod
    def of(cls, gpu: str, dtype: torch.dtype) -> "Key":
        """Return the key of a GPU, given its name, as it is installed here."""
        triton = "none"
        if importlib.util.find_spec("triton") is not None:
            import triton as module  # noqa: PLC0415, triton is optional

            triton = module.__version__
        driver = str(getattr(torch._C, "_cuda_getDriverVersion", lambda: torch.version.hip)())
        name = str(dtype).removeprefix("torch.")
        return cls(gpu, driver, torch.__version__, triton, vision_attn.__version__, name)

    @property
    def path(self) -> Path:
        """The file of the rates."""
        name = "-".join(re.sub(r"[^\w.+]+", "_", str(value)) for value in dataclasses.asdict(self).values())
        return folder() / f"{name}.json"


def folder() -> Path:
    """Return the folder of measured rates: $VISION_ATTN_RATES, or `vision_attn/rates` of the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VISION_ATTN_RATES") or Path(cache) / "vision_attn" / "rates")


def read_rates(key: Key) -> Machine | None:
    """Return stored rates; None if there are none. A file that cannot be read counts as none, with a warning."""
    try:
        stored = json.loads(key.path.read_text())
        if stored["key"] != dataclasses.asdict(key):
            raise ValueError(f"it is of {stored['key']}")
        return _checked(Machine(**stored["machine"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        _LOG.warning("%s cannot be used, so this GPU is timed anew: %s: %s", key.path, type(error).__name__, error)
        return None


def write_rates(key: Key, machine: Machine) -> None:
    """Store rates. A reader, of any thread or process, finds the old file or the new one and never half of one."""
    text = json.dumps(dict(key=dataclasses.asdict(key), machine=dataclasses.asdict(machine)), indent=1)
    written = ""
    try:
        key.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=key.path.parent, suffix=".part", delete=False) as file:
            written = file.name
            file.write(text)
        os.replace(written, key.path)
    except OSError as error:
        _LOG.warning("the rates of this GPU could not be stored in %s: %s", key.path, error)
        if written:
            with suppress(OSError):
                os.unlink(written)


class _Slot:
    """The rates of one key in this process."""

    def __init__(self, key: Key) -> None:
        self._key, self._lock = key, threading.Lock()
        self._machine: Machine | None = None

    def machine(self, gpu: torch.device) -> Machine:
        """Return the rates: those of this process, those stored, or measured now."""
        with self._lock:
            self._machine = self._machine or read_rates(self._key)
            if self._machine is None:
                if why := busy():
                    _LOG.info("%s is not timed now, because %s", self._key.gpu, why)
                    return H200
                self._machine = self._measured(gpu)
            return self._machine

    def _measured(self, gpu: torch.device) -> Machine:
        _LOG.info("timing %s once, in about %.0f s", self._key.gpu, MOST_S)
        try:
            machine = INSTALLED.measured(gpu, getattr(torch, self._key.dtype))
        except Exception as error:  # whatever it is: the model that is to be converted still can be
            _LOG.warning(
                "%s could not be timed, so the stored rates of an H200 decide: %s: %s",
                self._key.gpu, type(error).__name__, str(error).strip().partition("\n")[0],
            )  # fmt: skip
            return H200
        if machine.source == BUSY:
            _LOG.warning("%s or its host is busy: rates are not stored, the next process times it again", self._key.gpu)
        else:
            write_rates(self._key, machine)
        return machine


@functools.cache
def _slot(key: Key) -> _Slot:
    return _Slot(key)


def busy() -> str | None:
    """Say why nothing may be timed at the moment; None if it may."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "a model is traced"
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return "a mode or a transform of PyTorch is active"
    return "a CUDA graph is recorded" if INSTALLED.records() else None


@dataclass(frozen=True)
class Probe:
    """One thing to time.

    Attributes:
        rate: The rate of a machine that it tells; for 'host', of which less is better, the seconds of one operation.
        work: Operations or bytes of one call.
        build: Makes the inputs and returns the call.
        needs: Seconds that the first call may take, as code is compiled or a library is loaded.
    """

    rate: str
    work: float
    build: Callable[[], Callable[[], object]]
    needs: float = 0.3


class Clock(Protocol):
    """Times the calls of probes."""

    def now(self) -> float:
        """Return the seconds since some moment."""

    def device(self, probe: Probe) -> float:
        """Return the seconds that the device needs for one call."""

    def host(self, probe: Probe) -> float:
        """Return the seconds until one call returns, as the device works on."""


class GpuClock:
    """Times on a GPU: several calls at a time, after two that are not counted; the best of three."""

    def __init__(self, gpu: torch.device) -> None:
        self._gpu = gpu

    def now(self) -> float:
        """Return the seconds since some moment."""
        return time.perf_counter()

    def device(self, probe: Probe) -> float:
        """Return the seconds that the GPU needs for one call."""
        call = probe.build()
        first = self._burst(call, 2)
        if first > _SLOW_S:
            return first
        count = max(1, min(50, int(5e-3 / max(first, 1e-5))))
        return min(self._burst(call, count) for _ in range(3))

    def _burst(self, call: Callable[[], object], count: int) -> float:
        with torch.cuda.device(self._gpu):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            call()
            begin.record()
            for _ in range(count):
                call()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    def host(self, probe: Probe) -> float:
        """Return the seconds until one call returns, as the GPU works on."""
        call, found = probe.build(), []
        for _ in range(5):
            torch.cuda.synchronize(self._gpu)
            begin = time.perf_counter()
            for _ in range(50):
                call()
            found.append((time.perf_counter() - begin) / 50)
        torch.cuda.synchronize(self._gpu)
        return min(found)


def measure(name: str, found: list[Probe], clock: Clock, most_s: float = MOST_S) -> Machine:
    """Time probes in their order, and leave out those for which no time is left.

    A rate that was left out, or whose probe failed, is that of an H200 times what this device reaches of an H200's
    dense attention; the host's is then an H200's own. Dense attention is timed again at the end. Where it takes another
    time than before, or no time is left, others use the device or the host, and the source of the rates is `BUSY`.

    Args:
        name: Name of the device.
        found: The probes, the most important first.
        clock: Times them.
        most_s: Seconds that all may take.

    Raises:
        RuntimeError: If no rate of dense attention was found: then nothing is known of the device.
    """
    begin = clock.now()
    rates: dict[str, float] = {}
    failed: dict[str, Exception] = {}
    source = "measured"
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        for probe in found:
            slow = max(1.0, rates.get("host", H200.host) / H200.host)  # such a host compiles slowly too
            if clock.now() - begin + slow * probe.needs > most_s:
                _LOG.info("%s: no time is left to time %r", name, probe.rate)
                continue
            try:
                taken = (clock.host if probe.rate == "host" else clock.device)(probe)
                rates[probe.rate] = _positive(taken / probe.work if probe.rate == "host" else probe.work / taken)
            except Exception as error:  # the other rates still say much
                failed[probe.rate] = error
        if clock.now() - begin + 0.1 > most_s:
            source = BUSY
        elif "dense" in rates:
            again = next(probe for probe in found if probe.rate == "dense")
            more = again.work / clock.device(again)
            if not 1 / _STEADY < more / rates["dense"] < _STEADY:
                source = BUSY
            rates["dense"] = max(more, rates["dense"])
    if not rates.keys() & {"dense", "narrow"}:
        raise RuntimeError("dense attention could not be timed") from failed.get("dense")
    for rate, why in failed.items():
        _LOG.warning("%s: %r could not be timed: %s: %s", name, rate, type(why).__name__, why)
    factor = rates["dense"] / H200.dense if "dense" in rates else rates["narrow"] / H200.narrow
    known = {rate: getattr(H200, rate) * (1.0 if rate == "host" else factor) for rate in _TIMED} | rates
    _LOG.info("%s is timed, in %.1f s", name, clock.now() - begin)
    return dataclasses.replace(H200, name=name, source=source, **known)


def _positive(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value} is no rate")
    return value


def _checked(machine: Machine) -> Machine:
    """Refuse a machine that was not written by `write_rates`."""
    for field in dataclasses.fields(machine):
        value = getattr(machine, field.name)
        if not (isinstance(value, str) if field.type is str else is_number(value) and math.isfinite(value)):
            raise TypeError(f"{field.name} is {value!r}")
    for rate in _TIMED:
        _positive(getattr(machine, rate))
    return machine


def probes(device: torch.device, dtype: torch.dtype, side: int = 64, heads: int = 16) -> list[Probe]:
    """Return what is timed on a device, the most important first.

    Args:
        device: Where.
        dtype: Of the tensors.
        side: Side of the grid in tokens; a CPU wants a smaller one than a GPU.
        heads: Heads of 128 channels; twice as many of 64.
    """
    draw = torch.Generator(device).manual_seed(0)  # the program's own numbers stay as they would be
    tokens, dim = side * side, 128 * heads
    # our kernels on four times as many tokens: with those of dense attention most windows would end at the border
    grid, window, few = Grid(2 * side, 2 * side), Window(radius=side / 4), heads // 4

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=dtype)

    def dense(number: int, channels: int) -> Callable[[], Any]:
        q, k, v = (tensor(1, number, tokens, channels) for _ in range(3))
        return lambda: F.scaled_dot_product_attention(q, k, v)

    def local() -> Callable[[], Any]:
        q, k, v = (tensor(1, grid.tokens, few, 128) for _ in range(3))
        return lambda: local_attention(q, k, v, grid, window)

    def products() -> Callable[[], Any]:
        x, weight = tensor(tokens, dim), tensor(2 * dim, dim)
        return lambda: F.linear(x, weight)

    def copy() -> Callable[[], Any]:
        x = tensor(16, tokens, dim)
        y = torch.empty_like(x)
        return lambda: y.copy_(x)

    def modules() -> Callable[[], Any]:
        with torch.device("meta"):  # where no random numbers are drawn for the weights
            block = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        block.to(dtype).to_empty(device=device).requires_grad_(False)
        for parameter in block.parameters():
            parameter.zero_()
        x = tensor(1, 64, 64)
        return lambda: block(x)

    machine = dataclasses.replace(H200, units=units_of(device))
    wide, narrow = (
        _AT_WORK * 4.0 * tokens**2 * dim * machine.waves(tokens, count) for count in (heads, 2 * heads)
    )  # fmt: skip
    near = 4.0 * grid.tokens**2 * (window.share(grid) + H200.spare / grid.tokens) * few * 128
    return [
        Probe("dense", wide, functools.partial(dense, heads, 128)),  # first: nothing is known of a device without it
        Probe("host", 5.2, modules, needs=0.1),  # what four modules cost, in operations of whole denoisers
        Probe("other", near, local, needs=1.5),  # a kernel is compiled, if it never was
        Probe("narrow", narrow, functools.partial(dense, 2 * heads, 64)),
        Probe("products", _AT_WORK * 4.0 * tokens * dim**2, products),
        Probe("bandwidth", 32.0 * tokens * dim * dtype.itemsize, copy, needs=0.1),
    ]
