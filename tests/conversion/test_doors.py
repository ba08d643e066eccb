"""A layer answers `scaled_dot_product_attention` at the price of one call, and others find PyTorch as it is."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from converted_hosts import CLEAR, SIZE, call, converted, expected, hosts
from host_runs import TEXT, run, stock
from tiny_hosts import HOST
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention  # a name of our own, as hosts may have one
from torch.overrides import TorchFunctionMode

import vision_attn
from vision_attn import Conversion, LinFusion, Softmax, convert
from vision_attn.conversion.doors import ATTENTION

BUILTIN, LINEAR = F.scaled_dot_product_attention, F.linear


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """After each test PyTorch's own functions stand where they stood."""
    yield
    assert F.scaled_dot_product_attention is BUILTIN is scaled_dot_product_attention and F.linear is LINEAR


class Processor:
    """Attention with a query of each kind of name: the attribute of torch.nn.functional, or an imported name."""

    def __init__(self, function: Callable[[], Callable[..., Tensor]]) -> None:
        self.function = function

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Tensor:
        other = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (p(x) for p, x in ((attn.to_q, hidden_states), (attn.to_k, other), (attn.to_v, other)))
        q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return attn.to_out[0](self.function()(q, k, v).transpose(1, 2).flatten(2))


NAMES: dict[str, Callable[[], Any]] = {
    "looked-up": lambda: torch.nn.functional.scaled_dot_product_attention,
    "imported": lambda: scaled_dot_product_attention,
}
names = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


@names
def test_a_processor_that_looks_the_function_up_or_imported_it(name: Any) -> None:
    model: Any = converted("sd15-unet", CLEAR)
    model.set_attn_processor(Processor(name))
    for _ in range(2):
        torch.testing.assert_close(run(HOST["sd15-unet"], model, *SIZE), expected("sd15-unet", CLEAR))
    assert set(Conversion.of(model).status.values()) == {"rerouted"}


def test_nothing_is_left_after_an_error() -> None:
    model: Any = converted("sd15-unet", CLEAR)

    class Fails(Processor):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            assert F.scaled_dot_product_attention is ATTENTION.front
            raise KeyboardInterrupt

    model.set_attn_processor(Fails(lambda: BUILTIN))
    with pytest.raises(KeyboardInterrupt):
        call("sd15-unet", model)
    assert F.scaled_dot_product_attention is BUILTIN


@pytest.mark.parametrize("original", [BUILTIN, ATTENTION.front], ids=["pytorch", "ours"])
def test_a_function_that_somebody_put_there_answers_what_layers_leave_to_the_host(
    monkeypatch: Any, original: Any
) -> None:
    """As `F.scaled_dot_product_attention = sageattn` does; it may have got ours for the original, inside a layer."""
    calls = []

    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", replaced)
        output = run(HOST["sd15-unet"], converted("sd15-unet", CLEAR), *SIZE)
        assert F.scaled_dot_product_attention is replaced
    assert torch.equal(output, expected("sd15-unet", CLEAR))
    assert sum(key.shape[-2] == TEXT for _, key, *_ in calls) == len(stock_calls("sd15-unet")) // 2
    assert not any(query.shape[-2] == key.shape[-2] for query, key, *_ in calls)


class Counts(TorchFunctionMode):
    """Counts the calls that it recognises by a name, and lets them through, or answers them with their values."""

    def __init__(self, name: Callable[[], Any], answer: bool = False) -> None:
        super().__init__()
        self.name, self.answer, self.calls = name, answer, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.name():
            self.calls.append(args)
            query, value = args[0], args[2]
            if self.answer and query.shape[-2] == value.shape[-2]:
                return value
        return func(*args, **kwargs or {})


def stock_calls(host_id: str) -> list[Any]:
    with Counts(lambda: BUILTIN) as mode:
        run(HOST[host_id], HOST[host_id].build(), *SIZE)
    return mode.calls


@names
@hosts("sd15-unet", "vit")
def test_a_mode_around_the_model_sees_and_answers_attention_as_without_us(host_id: str, name: Any) -> None:
    model = converted(host_id, CLEAR)
    with Counts(name) as outer, Counts(name) as inner:
        output = run(HOST[host_id], model, *SIZE)
    assert torch.equal(output, expected(host_id, CLEAR))
    assert len(outer.calls) == len(inner.calls) == len(stock_calls(host_id))
    with Counts(name), Counts(name, answer=True):
        got = run(HOST[host_id], model, *SIZE)
        want = run(HOST[host_id], HOST[host_id].build(), *SIZE)
    assert torch.equal(got, want) and not torch.equal(want, stock(host_id, SIZE))
    assert set(Conversion.of(model).status.values()) == {"dense: a mode around the layer answered its attention"}


@pytest.mark.slow
@names
def test_a_mode_around_a_compiled_model_answers_first(name: Any) -> None:
    model = converted("vit", CLEAR)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for answer in (True, False):
        with Counts(name, answer=answer), torch.no_grad():
            got = compiled(**HOST["vit"].inputs(*SIZE, 2, TEXT))
            want = run(HOST["vit"], model, *SIZE)
        assert torch.equal(got, want)
        assert torch.equal(got, expected("vit", CLEAR)) != answer


@names
def test_a_mode_inside_a_layer_answers_first(name: Any) -> None:
    """A hook that replaces `forward` runs inside our layer, and may enter a mode there (diffusers' layer skipping)."""

    class Perturbed(Processor):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            with Counts(name, answer=True):
                return super().__call__(*args, **kwargs)

    outputs = []
    for model in (HOST["sd15-unet"].build(), converted("sd15-unet", CLEAR)):
        model.set_attn_processor(Perturbed(lambda: F.scaled_dot_product_attention))  # type: ignore[operator]
        outputs.append(run(HOST["sd15-unet"], model, *SIZE))
    assert torch.equal(*outputs)


@hosts("sd15-unet", "vit")
def test_a_default_device_is_a_mode_too(host_id: str) -> None:
    model = converted(host_id, CLEAR)
    torch.set_default_device("cpu")
    try:
        output = run(HOST[host_id], model, *SIZE)
    finally:
        torch.set_default_device(None)
    assert torch.equal(output, expected(host_id, CLEAR))


def test_threads_do_not_disturb_each_other() -> None:
    """One thread runs a converted model, one another, one a stock model; for modes in threads see docs/limits.md."""
    models = [HOST["sd15-unet"].build(), converted("sd15-unet", CLEAR), converted("sd15-unet", LinFusion(mid_dim=4))]
    wanted = [run(HOST["sd15-unet"], model, *SIZE) for model in models]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(8):
            got = run(HOST["sd15-unet"], models[number], *SIZE)
            if not torch.equal(got, wanted[number]):
                wrong.append(number)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


@contextmanager
def counted() -> Iterator[list[str]]:
    """Yield the names of the Python functions of this package that are called in the `with` block."""
    here, found = str(Path(vision_attn.__file__).parent), []

    def note(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(here):
            found.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize(
    ("spec", "options", "most"),
    [
        pytest.param(Softmax(), {}, 30, id="softmax"),
        pytest.param(CLEAR, dict(min_tokens=10**6), 20, id="left-alone"),
    ],
)
@hosts("sd15-unet", "flux", "vit")
def test_a_layer_costs_few_python_calls(host_id: str, spec: Any, options: Any, most: int) -> None:
    """The host's time is the limit at usual sizes. A mode around each layer made a hundred calls of it."""
    model = HOST[host_id].build()
    conversion = convert(model, spec, **options)
    run(HOST[host_id], model, *SIZE)
    with counted() as calls:
        run(HOST[host_id], model, *SIZE)
    grids = calls.count("_see_grid")
    assert len(conversion.layers) <= len(calls) <= most * len(conversion.layers) + 40 * grids, calls[:80]


def test_diffusers_reads_signatures_of_converted_layers_faster() -> None:
    """It asks for the signature of a layer's processor at each forward; a layer leaves nothing on the processor."""
    model: Any = converted("sd15-unet", CLEAR)
    seen = []

    class Looks(Processor):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            seen.append("__call__" in vars(self))
            if len(seen) == 1:
                return self.__call__(*args, **kwargs)  # finds what stands there for its signature
            return super().__call__(*args, **kwargs)

    processor = Looks(lambda: F.scaled_dot_product_attention)
    model.set_attn_processor(processor)
    output = run(HOST["sd15-unet"], model, *SIZE)
    torch.testing.assert_close(output, expected("sd15-unet", CLEAR))
    assert seen[0] and not all(seen) and "__call__" not in vars(processor)


def test_a_processor_that_computes_attention_itself_runs_once():
    """As diffusers' own test of processors has it: a second run would count twice."""

    class Counting:
        calls = 0

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            self.calls += 1
            return attn.to_out[0](hidden_states)

    model, inputs = HOST["sd15-unet"].build(), HOST["sd15-unet"].inputs(4, 4, 1, 5)
    processor = Counting()
    model.set_attn_processor(processor)
    want = model(**inputs)[0]
    once, processor.calls = processor.calls, 0
    conversion = convert(model, Softmax())
    assert torch.equal(model(**inputs)[0], want)
    assert processor.calls == once
    assert set(conversion.status.values()) == {"dense: the host's own code computed it"}
