"""`vision-attn inspect` on an unknown model prints the ten lines that one would try, and they convert it."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from dense_oracle import DenseOracle
from tiny_host_case import CHANNELS, Layout, build, noise
from tiny_hosts import HOST
from torch import Tensor, nn

from vision_attn.cli import main
from vision_attn.conversion.state import is_rerouted, state_of
from vision_attn.demo import loading
from vision_attn.estimation.suggestion import suggest_host, usual_inputs
from vision_attn.kernels.local import Window


class ToyAttention(nn.Module):
    """Attention that says its heads, or keeps them to itself."""

    def __init__(self, dim: int, *, silent: bool = False) -> None:
        super().__init__()
        self.to_qkv, self.silent = nn.Linear(dim, 3 * dim), silent
        if not silent:
            self.heads, self.head_dim = 2, dim // 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ToyDiT(nn.Module):
    """Patches and text in one sequence."""

    def __init__(self, *, text_first: bool, silent: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.layers = nn.ModuleList(nn.ModuleDict(dict(mixer=ToyAttention(16, silent=silent))) for _ in range(2))
        self.text_first = text_first

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        image = self.embed(pixels).flatten(2).mT
        x = torch.cat([text, image] if self.text_first else [image, text], 1)
        for layer in self.layers:
            x = layer["mixer"](x)
        return x


class ToyBlock(nn.Module):
    """Features in, features out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([ToyAttention(dim)])

    def forward(self, features: Tensor) -> Tensor:
        return self.attentions[0](features.flatten(2).mT).mT.unflatten(-1, features.shape[-2:])


class ToyUNet(nn.Module):
    """Two levels of features `[B, C, height, width]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fine, self.coarse = nn.Conv2d(CHANNELS, 16, 3, padding=1), ToyBlock(16), ToyBlock(16)

    def forward(self, sample: Tensor) -> Tensor:
        features = self.fine(self.stem(sample))
        return self.coarse(F.avg_pool2d(features, 2))


def converted(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Run the suggested lines with a smaller disc, and a forward."""
    lines = suggest_host(model, inputs)
    assert len([line for line in lines.splitlines() if line]) <= 12
    names: dict[str, Any] = {"model": model}
    exec(lines.replace("radius=8", "radius=2"), names)
    with torch.no_grad():
        output: Tensor = model(**inputs)
    assert set(names["conversion"].status.values()) == {"rerouted"}
    return output


@pytest.mark.parametrize("text_first", [True, False], ids=["prefix", "suffix"])
@pytest.mark.parametrize("silent", [False, True], ids=["heads", "no-heads"])
def test_patches_beside_text(text_first: bool, silent: bool) -> None:
    model, masked = (build(ToyDiT, text_first=text_first, silent=silent) for _ in range(2))
    inputs = dict(pixels=noise(1, 3, 24, 20), text=noise(1, 7, 16, seed=1))
    layout = Layout(7, (6, 5)) if text_first else Layout(0, (6, 5), suffix=7)
    with torch.no_grad(), DenseOracle({layout}, Window(radius=2)):
        want = masked(**inputs)
    torch.testing.assert_close(converted(model, inputs), want, rtol=0, atol=2e-5)


def test_features_of_several_levels() -> None:
    model, masked = build(ToyUNet), build(ToyUNet)
    inputs = dict(sample=noise(2, CHANNELS, 12, 8))
    with torch.no_grad(), DenseOracle({Layout(0, (12, 8)), Layout(0, (6, 4))}, Window(radius=2)):
        want = masked(**inputs)
    torch.testing.assert_close(converted(model, inputs), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("host_id", "argument", "patch", "others"),
    [
        ("vit", "x", 8, "prefix"),
        ("hf-dinov3", "pixel_values", 8, "prefix"),
        ("sd35", "hidden_states", 2, "suffix"),
        ("cogview3plus", "hidden_states", 2, "prefix"),
    ],
)
def test_a_known_host_gets_the_grid_that_we_know(host_id: str, argument: str, patch: int, others: str) -> None:
    case = HOST[host_id]
    lines = suggest_host(case.build(), case.inputs(6, 5, 1, 7))
    assert f'height, width = inputs["{argument}"].shape[-2:]' in lines
    assert f"Grid(height // {patch}, width // {patch})" in lines and f'others="{others}"' in lines


def test_a_model_is_left_as_it_was() -> None:
    model = build(ToyDiT, text_first=True).train()
    suggest_host(model, dict(pixels=noise(1, 3, 24, 20), text=noise(1, 7, 16)))
    assert model.training and all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_models_of_which_nothing_can_be_said() -> None:
    plain = nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match="no module of this Conv2d calls scaled_dot_product_attention"):
        suggest_host(plain, dict(input=noise(1, 3, 4, 4)))
    with pytest.raises(ValueError, match=r"none of input is an image \[B, C, height, width\]"):
        suggest_host(plain, dict(input=noise(1, 3)))


def test_the_inputs_of_a_forward_are_guessed_from_its_arguments() -> None:
    found = usual_inputs(HOST["pixart"].build(), 64, 48)
    assert {name: tuple(value.shape) for name, value in found.items()} == dict(
        hidden_states=(1, CHANNELS, 8, 6), encoder_hidden_states=(1, 77, 32), timestep=(1,)
    )


def test_the_command_prints_lines_that_it_has_tried(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model = build(ToyUNet)
    model.stem = nn.Conv2d(3, 16, 3, padding=1)
    monkeypatch.setattr(loading, "load_target", lambda name: model)
    assert main(["inspect", "toy", "--height", "24", "--width", "16"]) == 0
    printed = capsys.readouterr().out
    assert "ToyUNet is not a known host" in printed and "('ToyBlock',)" in printed
    assert "# tried here: Clear(radius=8) on 2 layers, 2 rerouted in the last forward" in printed
    assert {state_of(module).status for module in model.modules() if is_rerouted(module)} == {"rerouted"}


def test_the_command_says_what_to_do_when_a_forward_fails(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(loading, "load_target", lambda name: build(ToyDiT, text_first=True))
    assert main(["inspect", "toy", "--height", "24", "--width", "16"]) == 2
    assert "missing 1 required positional argument: 'text'" in (printed := capsys.readouterr().err)
    assert "suggest_host(model, inputs) with inputs of yours" in printed


def test_the_command_still_refuses_by_name(capsys: Any) -> None:
    assert timm.is_model("xcit_nano_12_p16_224")
    assert main(["inspect", "xcit_nano_12_p16_224", "--height", "224", "--width", "224"]) == 2
    assert "it attends between channels" in capsys.readouterr().err
