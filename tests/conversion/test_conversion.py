"""`convert`, `Conversion` and `load`: options do what they say, bad input is refused by name and changes nothing."""

import re
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from converted_hosts import POOLED
from dense_oracle import RADIUS_2, DenseOracle
from host_runs import TEXT, run, stock
from tiny_hosts import HOST, Layout, noise, randomise
from torch import Tensor, nn

from vision_attn import Clear, Conversion, Grid, Host, Neighborhood, Softmax, convert, use_grid
from vision_attn.conversion import grids
from vision_attn.conversion.state import is_converted
from vision_attn.grid import holds
from vision_attn.kernels.local import Window

WHERE = {
    "glob": ("down_blocks.*", 2),
    "regex": (re.compile(r"down_blocks\.\d|mid_block"), 3),
    "predicate": (lambda name: "up_blocks" not in name and "mid" not in name, 2),
    "all": (None, 7),
}


@pytest.mark.parametrize("where, layers", WHERE.values(), ids=WHERE)
def test_where_selects_layers(where: Any, layers: int) -> None:
    model = HOST["sd15-unet"].build()
    conversion = convert(model, Clear(radius=2), where=where)
    assert len(conversion.layers) == layers
    run(HOST["sd15-unet"], model, 12, 10)
    assert set(conversion.status.values()) == {"rerouted"}


def test_min_tokens_leaves_small_grids_dense() -> None:
    case, model = HOST["sd15-unet"], HOST["sd15-unet"].build()
    conversion = convert(model, Clear(radius=2), min_tokens=30)
    output = run(case, model, 12, 10)
    with DenseOracle({Layout(0, (12, 10)), Layout(0, (6, 5))}, RADIUS_2):
        want = run(case, case.build(), 12, 10)
    torch.testing.assert_close(output, want, rtol=0, atol=2e-5)
    assert conversion.status["mid_block.attentions.0.transformer_blocks.0.attn1"].startswith("dense: 9 tokens")
    conversion.revert()
    convert(model, Clear(radius=2), min_tokens=121)
    assert torch.equal(run(case, model, 12, 10), stock("sd15-unet"))


@pytest.mark.parametrize("how", ["convert", "use_grid", "Conversion.use_grid"])
def test_a_grid_given_by_the_user(how: str) -> None:
    case, model, want = HOST["flux"], HOST["flux"].build(), HOST["flux"].build()
    inputs = case.inputs(12, 10, 2, TEXT) | dict(img_ids=noise(120, 3))
    conversion = convert(model, Clear(radius=2), grid=(12, 10) if how == "convert" else None)
    with torch.no_grad(), DenseOracle({Layout(TEXT, (12, 10))}, RADIUS_2):
        expected = want(**inputs).sample
    with torch.no_grad():
        if how == "convert":
            output = model(**inputs).sample
        else:
            with use_grid(model, 12, 10) if how == "use_grid" else conversion.use_grid(12, 10):
                output = model(**inputs).sample
            with pytest.raises(RuntimeError, match=r"none of the 2 .* img_ids .* not those of a grid.*use_grid"):
                model(**inputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_agree(backend: str) -> None:
    case, outputs = HOST["sd35"], []
    for name in ("auto", backend):
        model = case.build()
        convert(model, POOLED, backend=name)
        outputs.append(run(case, model, 12, 10))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_layers_print_as_a_table() -> None:
    case, model = HOST["flux"], HOST["flux"].build()
    conversion = convert(model, Clear(radius=2))
    assert set(conversion.status.values()) == {"not run yet"}
    assert str(conversion.layers).splitlines()[1].split() == [
        "transformer_blocks.0.attn", "2", "-", "-", "not", "run", "yet",
    ]  # fmt: skip
    run(case, model, 12, 10)
    head, *rows = [line.split() for line in str(conversion.layers).splitlines()]
    assert head == ["layer", "heads", "tokens", "attended", "status"]
    share = (RADIUS_2.allowed(Grid(12, 10)).sum().item() + 127**2 - 120**2) / 127**2
    assert rows[0] == ["transformer_blocks.0.attn", "2", "127", f"{share:.1%}", "rerouted"]
    assert "2 layers, 2 rerouted" in repr(conversion) and "radius=2" in repr(conversion)


def test_bypassed_is_the_stock_model_and_nests() -> None:
    case, model = HOST["sd35"], HOST["sd35"].build()
    conversion = convert(model, POOLED)
    converted = run(case, model, 12, 10)
    with conversion.bypassed():
        assert torch.equal(run(case, model, 12, 10), stock("sd35"))
        with pytest.raises(KeyError), Conversion.of(model).bypassed():
            raise KeyError
        assert torch.equal(run(case, model, 12, 10), stock("sd35"))
    assert torch.equal(run(case, model, 12, 10), converted)


def test_padding_of_the_text_is_not_seen() -> None:
    case, model = HOST["qwen-image-masked"], HOST["qwen-image-masked"].build()
    convert(model, Clear(radius=2))
    inputs = case.inputs(12, 10, 2, TEXT)
    padding = inputs["encoder_hidden_states_mask"] == 0
    outputs = []
    for where, value in ((padding, 0.0), (padding, 3.0), (~padding, 3.0)):
        inputs["encoder_hidden_states"][where] = value
        outputs.append(model(**inputs).sample)
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2], atol=1e-3)


@pytest.mark.parametrize("seen", [[7, 7], [7, 4]], ids=["same-length", "ragged"])
def test_cogview4_with_a_mask_stays_dense(seen: list[int]) -> None:
    case, model = HOST["cogview4"], HOST["cogview4"].build()
    inputs = case.inputs(12, 10, 2, TEXT)
    inputs["attention_mask"] = (torch.arange(TEXT) < torch.tensor(seen)[:, None]).float()
    want = model(**inputs).sample
    conversion = convert(model, Clear(radius=2))
    assert torch.equal(model(**inputs).sample, want)
    assert all(status.startswith("dense: the attention mask") for status in conversion.status.values())


class ToyAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ToyViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.text = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 5, 16))
        self.blocks = nn.Sequential(ToyAttention(16, 2), ToyAttention(16, 2))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([x, self.text.expand(len(x), -1, -1)], 1))


def toy_grid(module: nn.Module, inputs: Any) -> Grid:
    return Grid(*(side // 4 for side in inputs["pixels"].shape[-2:]))


def test_a_host_that_the_user_defines() -> None:
    model, pixels = ToyViT(), noise(2, 3, 24, 32)
    host = Host(layers=("blocks.?",), probe=toy_grid, others="suffix")
    stock_output = model(pixels)
    with DenseOracle({Layout(0, (6, 8), suffix=5)}, RADIUS_2):
        want = model(pixels)
    conversion = convert(model, Clear(radius=2), host=host)
    torch.testing.assert_close(model(pixels=pixels), want, rtol=0, atol=1e-5)
    assert {row.tokens for row in conversion.layers} == {53}
    conversion.revert()
    assert torch.equal(model(pixels), stock_output)
    with pytest.raises(ValueError, match="ToyViT has no self-attention over a grid: no module is called layers"):
        convert(model, Clear(radius=2), host=replace(host, layers=("layers.*",)))
    with pytest.raises(ValueError, match="stem: a Conv2d does not tell its heads"):
        convert(model, Clear(radius=2), host=replace(host, layers=("stem",)))
    assert torch.equal(model(pixels), stock_output)


class Encoded(nn.Module):
    """A host whose attention is PyTorch's own module, by itself or in its encoder layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2) if kind == "encoder" else layer
        if kind == "attention":
            self.encoder = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.patch(pixels).flatten(2).transpose(1, 2)
        if isinstance(self.encoder, nn.MultiheadAttention):
            return self.encoder(tokens, tokens, tokens, need_weights=False)[0]
        return self.encoder(tokens)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no-gradients"])
@pytest.mark.parametrize("kind", ["attention", "layer", "encoder"])
def test_attention_modules_of_pytorch(kind: str, gradients: bool, compiled: bool) -> None:
    """Without gradients they compute in functions of their own, which call no attention that others see."""
    torch._dynamo.reset()
    model, pixels = randomise(Encoded(kind)), noise(2, 3, 32, 24)
    names = "encoder" if kind == "attention" else "*.self_attn"
    host = Host(layers=(names,), probe=lambda module, inputs: Grid(8, 6))
    with torch.set_grad_enabled(gradients):
        before = model(pixels)
        want = masked(kind, pixels, Window(radius=2).allowed(Grid(8, 6)))
        conversion = convert(model, Clear(radius=2), host=host)
        run_model = torch.compile(model, backend="eager") if compiled else model
        torch.testing.assert_close(run_model(pixels), want, rtol=0, atol=1e-5)
        conversion.revert()
        assert torch.equal(model(pixels), before) and not torch.allclose(want, before, atol=1e-3)
    assert not any(module._forward_pre_hooks for module in model.modules())


def masked(kind: str, pixels: Tensor, seen: Tensor) -> Tensor:
    """Run the host with a mask of PyTorch's, True where a key is hidden."""
    model: Any = randomise(Encoded(kind))
    tokens = model.patch(pixels).flatten(2).transpose(1, 2)
    if kind == "attention":
        return model.encoder(tokens, tokens, tokens, need_weights=False, attn_mask=~seen)[0]
    return model.encoder(tokens, ~seen)


def test_specs_by_pattern_and_by_depth() -> None:
    model = HOST["sd15-unet"].build()
    conversion = convert(model, {"mid_block.*": Softmax(), "*": Clear(radius=2)})
    assert {name.split("_")[0]: type(spec) for name, spec in conversion.specs.items()} == {
        "down": Clear,
        "mid": Softmax,
        "up": Clear,
    }
    conversion.revert()
    conversion = convert(model, {"down_blocks.*": Clear(radius=2)})
    assert all(name.startswith("down_blocks") for name in conversion.specs)
    conversion.revert()
    vit = HOST["vit"].build()
    near, far = Neighborhood(3), Neighborhood(3, dilation=2)
    specs = list(convert(vit, [near, far]).specs.values())
    assert specs == [(near, far)[depth % 2] for depth in range(len(specs))]


def test_a_pattern_that_comes_too_late_is_refused() -> None:
    model, first = HOST["vit"].build(), Clear(radius=2)
    with pytest.raises(ValueError, match=r"'blocks\.0\.\*' gets no layer, because patterns before it match all"):
        convert(model, {"*": first, "blocks.0.*": Softmax()})
    specs = convert(model, {"blocks.0.*": Softmax(), "*": first}).specs
    assert specs == {"blocks.0.attn": Softmax(), "blocks.1.attn": first}


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    model = HOST["vit"].build()
    with pytest.raises(ValueError, match="layers"):
        convert(model, {"blocks.*": Softmax(), "down_blocks.*": Softmax()})
    assert not is_converted(model)


@pytest.mark.parametrize("host_id", ["flux", "sd35", "vit"])
@pytest.mark.parametrize("given", [(4, 4), (10, 12), (24, 5)], ids=str)
def test_a_given_grid_that_differs_from_the_inputs_is_refused(host_id: str, given: tuple[int, int]) -> None:
    case, model = HOST[host_id], HOST[host_id].build()
    conversion = convert(model, Clear(radius=2), grid=given)
    with pytest.raises(RuntimeError, match=f"the grid given, {given[0]} x {given[1]}, is not that of .*12 x 10"):
        run(case, model, 12, 10)
    assert set(conversion.status.values()) != {"rerouted"}
    with conversion.use_grid(12, 10):
        run(case, model, 12, 10)
    assert set(conversion.status.values()) == {"rerouted"}


def test_a_vit_that_drops_patches_is_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, patch_drop_rate=0.1)
    with pytest.raises(ValueError, match=r"set model.patch_drop = torch.nn.Identity"):
        convert(model, Clear(radius=2))
    model.patch_drop = nn.Identity()
    convert(model, Clear(radius=2))


@pytest.mark.parametrize(("before", "after", "held"), [(2, 3, True), (3, 0, False), (0, 4, False)])
def test_keys_without_a_query_lie_outside_the_grid(before: int, after: int, held: bool) -> None:
    assert holds(Grid(4, 5, prefix=2, suffix=3), before, after) == held


WRONG_HOSTS = [
    (lambda: Host(layers="blocks.*.attn", probe=print), TypeError, "layers must be a tuple of patterns"),
    (lambda: Host(layers=("a",), probe=print, others="front"), ValueError, "others must be one of 'prefix'"),
    (lambda: Host(layers=("a",), probe=print, more_keys="first"), ValueError, "more_keys must be one of False"),
    (lambda: Host(layers=("a",), probe=None), TypeError, "probe must be a function"),
]


@pytest.mark.parametrize("make, error, message", WRONG_HOSTS)
def test_a_wrong_host_is_refused(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "found, error, message",
    [
        ((12, 10), TypeError, r"probe must return a Grid, .* got \(12, 10\)"),
        ((), TypeError, r"probe must return a Grid, .* got \(\)"),
        (None, TypeError, "probe must return a Grid, .* got None"),
        ((Grid(12, 10, 1),) * 3, ValueError, r"blocks\.0\.attn: the host's probe found 3 grids for 2 samples"),
    ],
    ids=["sides", "nothing", "none", "more-than-samples"],
)
def test_what_a_probe_finds_is_checked(found: Any, error: Any, message: str) -> None:
    model = HOST["vit"].build()
    convert(model, Clear(radius=2), host=Host(layers=("blocks.*.attn",), probe=lambda module, inputs: found))
    with pytest.raises(error, match=message):
        run(HOST["vit"], model, 12, 10)


def test_a_given_grid_is_not_read_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    case, model = HOST["flux"], HOST["flux"].build()
    conversion = convert(model, Clear(radius=2), grid=(12, 10))
    want = run(case, model, 12, 10)
    monkeypatch.setattr(grids, "_capturing", lambda: True)
    monkeypatch.setattr(grids.GridContext, "_read", None)
    assert torch.equal(run(case, model, 12, 10), want)
    with pytest.raises(RuntimeError, match=r"the grid given, 12 x 10, is not that of .*img_ids has 100 tokens"):
        run(case, model, 10, 10)
    assert set(conversion.status.values()) == {"rerouted"}
