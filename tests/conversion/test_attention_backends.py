"""A host on another attention backend of diffusers is rerouted, and keeps the backend for what stays dense."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from converted_hosts import CLEAR, POOLED, SIZE, call, converted, expected, hosts
from covering import quick
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from host_runs import TEXT, distance, run, run_on_gpu, stock
from tiny_hosts import HOST
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode

from vision_attn import Agent, Clear, Conversion, HiLo, LinFusion, Multipole, Schedule, Softmax, convert

REGISTRY = attention_dispatch._AttentionBackendRegistry
DISPATCHED = ("flux", "flux2", "qwen-image", "z-image")
AS_STOCK = dict(rtol=0, atol=2e-5)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Check that every backend stands where it stood, and take back what `set_attention_backend` sets for all."""
    before = dict(REGISTRY._backends)
    yield
    assert REGISTRY._backends == before
    REGISTRY.set_active_backend(AttentionBackendName.NATIVE)


class Backend:
    """Attention as a package has it, in plain PyTorch: registered under the name of FlashAttention 3, and counted."""

    name = AttentionBackendName._FLASH_3

    def __init__(self, attend: Callable[..., Tensor] | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.attend = attend or self.plain

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        self.calls.append((query.shape[1], key.shape[1]))
        return self.attend(*(t.transpose(1, 2) for t in (query, key, value)), attn_mask, scale).transpose(1, 2)

    @staticmethod
    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


@contextmanager
def registered(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Put a backend in diffusers' own registry inside the `with` block."""
    with monkeypatch.context() as patch:
        patch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", True)
        for place in (REGISTRY._backends, REGISTRY._constraints, REGISTRY._supported_arg_names):
            patch.setitem(place, backend.name, place[backend.name])  # put back at the end
        REGISTRY.register(backend.name)(backend.__call__)
        function = REGISTRY._backends[backend.name]
        yield backend
        assert REGISTRY._backends[backend.name] is function


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    with registered(Backend(), monkeypatch) as backend:
        yield backend


SPECS = {
    "clear": CLEAR, "pooled": POOLED, "multipole": Multipole(), "agent": Agent(num_agents=4), "hilo": HiLo(),
    "linfusion": LinFusion(mid_dim=4), "schedule": Schedule(((0.5, CLEAR), (1.0, LinFusion(mid_dim=-1)))),
}  # fmt: skip


def wanted(host_id: str, spec: Any) -> Tensor:
    """Return what a host computes on PyTorch's attention; None for no conversion. It is kept for all tests."""
    with attention_backend("native"):
        return stock(host_id, SIZE) if spec is None else expected(host_id, spec)


def set_backend(model: Any, name: str) -> None:
    model.set_attention_backend(name)


def whole(host_id: str) -> tuple[int, int]:
    """Return queries and keys of a call over the host's whole sequence."""
    tokens = HOST[host_id].joint(*SIZE, TEXT).tokens
    return tokens, tokens


ROWS = list(product(DISPATCHED, SPECS, ("before", "after")))


@pytest.mark.parametrize(
    "host_id, name, when",
    quick(
        ROWS,
        (lambda host_id, name, when: (host_id, when), 1),
        (lambda host_id, name, when: name, 1),
    ),
)
def test_a_backend_is_rerouted(host_id: str, name: str, when: str, flash: Backend) -> None:
    reference, model = converted(host_id, SPECS[name]), HOST[host_id].build()
    want = run(HOST[host_id], reference, *SIZE)
    steps = [lambda: set_backend(model, "_flash_3"), lambda: convert(model, SPECS[name])]
    for step in steps if when == "before" else steps[::-1]:
        step()
    model.load_state_dict(reference.state_dict())
    torch.testing.assert_close(run(HOST[host_id], model, *SIZE), want, **AS_STOCK)
    assert set(Conversion.of(model).status.values()) == {"rerouted"}
    assert whole(host_id) not in flash.calls
    Conversion.of(model).revert()
    torch.testing.assert_close(run(HOST[host_id], model, *SIZE), wanted(host_id, None), **AS_STOCK)
    assert whole(host_id) in flash.calls


@hosts(*DISPATCHED)
def test_softmax_runs_the_backend_as_stock_does(host_id: str, flash: Backend) -> None:
    models = [HOST[host_id].build() for _ in range(2)]
    conversion = convert(models[1], Softmax())
    for model in models:
        set_backend(model, "_flash_3")
    outputs, calls = [], []
    for model in models:
        flash.calls.clear()
        outputs.append(run(HOST[host_id], model, *SIZE))
        calls.append(list(flash.calls))
    assert torch.equal(*outputs) and calls[0] == calls[1] and whole(host_id) in calls[0]
    assert set(conversion.status.values()) == {"rerouted"}


@hosts("flux", "z-image")
def test_what_stays_dense_keeps_the_backend(host_id: str, flash: Backend) -> None:
    """Layers that are left out, small grids, text refiners, and the rows of the text in a call that is rerouted."""
    model: Any = HOST[host_id].build()
    set_backend(model, "_flash_3")
    conversion = convert(model, CLEAR)
    layers = list(conversion.status)
    torch.testing.assert_close(run(HOST[host_id], model, *SIZE), wanted(host_id, CLEAR), **AS_STOCK)
    tokens = whole(host_id)[0]
    others, refiners = tokens - SIZE[0] * SIZE[1], HOST[host_id].text_only(TEXT)
    assert (others, tokens) in flash.calls and {(n, n) for n in refiners} <= set(flash.calls)
    conversion.revert()
    stayed = []
    for options in (dict(min_tokens=10**6), dict(where=layers[-1])):
        flash.calls.clear()
        conversion = convert(model, CLEAR, **options)
        output = run(HOST[host_id], model, *SIZE)
        stayed.append(flash.calls.count(whole(host_id)))
        if "min_tokens" in options:
            torch.testing.assert_close(output, wanted(host_id, None), **AS_STOCK)
        conversion.revert()
    assert stayed[0] - 1 == stayed[1] > 0


@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@hosts("flux", "qwen-image")
def test_backends_of_pytorch(host_id: str, name: str) -> None:
    models: list[Any] = [HOST[host_id].build(), converted(host_id, Softmax()), converted(host_id, CLEAR)]
    for model in models:
        set_backend(model, name)
    plain, same, local = (run(HOST[host_id], model, *SIZE) for model in models)
    assert torch.equal(same, plain)
    torch.testing.assert_close(plain, wanted(host_id, None), **AS_STOCK)
    torch.testing.assert_close(local, wanted(host_id, CLEAR), **AS_STOCK)
    set_backend(models[2], "native")
    assert torch.equal(run(HOST[host_id], models[2], *SIZE), wanted(host_id, CLEAR))


def test_a_backend_that_is_set_around_a_call(flash: Backend) -> None:
    model = converted("flux", CLEAR)
    with attention_backend("_flash_3"):
        torch.testing.assert_close(run(HOST["flux"], model, *SIZE), wanted("flux", CLEAR), **AS_STOCK)
    assert flash.calls and set(Conversion.of(model).status.values()) == {"rerouted"}


@hosts("qwen-image-masked", "z-image-ragged")
def test_masks_of_the_text_are_honoured(host_id: str, flash: Backend) -> None:
    outputs = {}
    for name in ("native", "_flash_3"):
        for spec in (Softmax(), CLEAR):
            model: Any = converted(host_id, spec)
            set_backend(model, name)
            outputs[name, spec] = run(HOST[host_id], model, *SIZE)
    for spec in (Softmax(), CLEAR):
        torch.testing.assert_close(outputs["_flash_3", spec], outputs["native", spec], **AS_STOCK)
    assert distance(outputs["_flash_3", CLEAR], outputs["_flash_3", Softmax()]) > 1e-3


def test_gradients(flash: Backend) -> None:
    grads = []
    for name in ("native", "_flash_3"):
        model: Any = converted("flux", POOLED)
        set_backend(model, name)
        call("flux", model).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_a_backend_may_call_the_attention_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SageAttention does for heads that it does not take: that call is the backend's, not the layer's."""

    def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    with registered(Backend(fused), monkeypatch):
        for spec, want in ((Softmax(), wanted("flux", None)), (CLEAR, wanted("flux", CLEAR))):
            model: Any = converted("flux", spec)
            set_backend(model, "_flash_3")
            torch.testing.assert_close(run(HOST["flux"], model, *SIZE), want, **AS_STOCK)
            with Conversion.of(model).bypassed():
                torch.testing.assert_close(run(HOST["flux"], model, *SIZE), wanted("flux", None), **AS_STOCK)


def test_a_mode_around_the_model_sees_what_it_saw(flash: Backend) -> None:
    names: set[str] = set()

    class Sees(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(getattr(func, "__name__", ""))
            return func(*args, **kwargs or {})

    model: Any = converted("flux", CLEAR)
    set_backend(model, "_flash_3")
    with Sees():
        torch.testing.assert_close(run(HOST["flux"], model, *SIZE), wanted("flux", CLEAR), **AS_STOCK)
    assert "linear" in names


def test_an_error_in_a_backend_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Tensor:
        raise KeyboardInterrupt

    model: Any = converted("flux", CLEAR)
    with registered(Backend(fails), monkeypatch):
        set_backend(model, "_flash_3")
        with pytest.raises(KeyboardInterrupt):
            run(HOST["flux"], model, *SIZE)
    set_backend(model, "native")
    assert torch.equal(run(HOST["flux"], model, *SIZE), wanted("flux", CLEAR))


def test_threads_on_two_backends(flash: Backend) -> None:
    """A converted model in one thread, and a stock one on the same backend in another."""
    models: list[Any] = [converted("flux", CLEAR), HOST["flux"].build()]
    wants = [wanted("flux", CLEAR), wanted("flux", None)]
    for model in models:
        set_backend(model, "_flash_3")
    failed: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if distance(run(HOST["flux"], models[number], *SIZE), wants[number]) > 1e-5:
                failed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.parametrize("name", ["_flash_3", pytest.param("flex", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, id="rerouted"), pytest.param(dict(min_tokens=10**6), id="dense", marks=pytest.mark.slow)],
)
def test_compiled(name: str, options: Any, flash: Backend) -> None:
    models: list[Any] = [HOST["flux"].build() for _ in range(2)]
    for model in models:
        model.single_transformer_blocks = torch.nn.ModuleList()  # only what is compiled
        convert(model, CLEAR, grid=SIZE, **options)
        set_backend(model, name)
    for block in models[1].transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    want = run(HOST["flux"], models[0], *SIZE)
    flash.calls.clear()
    torch.testing.assert_close(run(HOST["flux"], models[1], *SIZE), want, **AS_STOCK)
    if name == "_flash_3":
        assert (whole("flux") in flash.calls) == bool(options)
    set_backend(models[1], "native")
    torch.testing.assert_close(run(HOST["flux"], models[1], *SIZE), want, **AS_STOCK)


def test_a_processor_that_calls_no_backend_says_so(flash: Backend) -> None:
    class Own:
        _attention_backend = None

        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any) -> Any:
            return hidden_states, encoder_hidden_states

    model: Any = converted("flux", Clear(radius=2))
    model.transformer_blocks[0].attn.set_processor(Own())
    set_backend(model, "_flash_3")
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"blocks\.0\.attn never called .*processor is Own"):
        call("flux", model)


GPU_ROWS = [
    pytest.param(name, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
                 id=f"{name}, on a GPU")
    for name in ("_native_cudnn", "_native_efficient", "_native_flash", "flex")
]  # fmt: skip


@pytest.mark.parametrize("name", GPU_ROWS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_backends_of_pytorch_on_a_gpu(name: str) -> None:
    models: list[Any] = [HOST["flux"].build(), converted("flux", Softmax()), converted("flux", CLEAR)]
    native = run_on_gpu(HOST["flux"], models[2].to("cuda", torch.bfloat16), *SIZE)
    for model in models:
        set_backend(model.to("cuda", torch.bfloat16), name)
    try:
        plain = run_on_gpu(HOST["flux"], models[0], *SIZE)
    except RuntimeError as error:  # cuDNN has no kernel for some sizes of some versions
        with pytest.raises(RuntimeError, match=re.escape(str(error).splitlines()[0])):
            run_on_gpu(HOST["flux"], models[1], *SIZE)
        return
    same, local = (run_on_gpu(HOST["flux"], model, *SIZE) for model in models[1:])
    assert torch.equal(same, plain) and distance(local, native) < 0.02
    assert set(Conversion.of(models[2]).status.values()) == {"rerouted"}


def test_a_mask_of_blocks_is_the_backends_own() -> None:
    """FlexAttention's masks may hide anything, so the layer stays dense and says so."""
    model: Any = HOST["flux"].build()
    conversion = convert(model, CLEAR, where="transformer_blocks.0.*")
    set_backend(model, "flex")
    tokens = whole("flux")[0]
    mask = flex_attention.create_block_mask(lambda b, h, q, k: k >= 0, None, None, tokens, tokens, device="cpu")
    with torch.no_grad(), pytest.raises(RuntimeError, match="dense: its attention has a mask of the type BlockMask"):
        call("flux", model, joint_attention_kwargs=dict(attention_mask=mask))
    conversion.revert()
    convert(model, Softmax())
    with torch.no_grad():
        output = call("flux", model, joint_attention_kwargs=dict(attention_mask=mask))
    torch.testing.assert_close(output, wanted("flux", None), **AS_STOCK)
