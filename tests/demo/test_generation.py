"""`vision-attn generate`: the offline teachers and a saved Stable Diffusion, plain and by levels, and bad arguments."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_hosts import TEXT_DIM
from tiny_pipelines import build_sd
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vision_attn import Clear, convert
from vision_attn.cli import main
from vision_attn.conversion.state import is_converted
from vision_attn.demo import load_teacher
from vision_attn.demo.generation import Request, _size, call_of_text, generate
from vision_attn.highres.levels import Options


@pytest.fixture(scope="module")
def nano() -> Any:
    pipe = load_teacher("nano")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), np.float32)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    status = main(["generate", *arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def test_the_offline_teacher_plain_converted_and_above_its_size(tmp_path: Path, capsys: Any, nano: Any) -> None:
    out = tmp_path / "a.png"
    # On the CPU also where there is a GPU, as `nano` is: the pictures are compared.
    common = ["emoji-nano", "red apple", "--num-inference-steps", "2", "--out", str(out), "--device", "cpu"]
    assert "128 x 128 pixels, the host's attention" in run(capsys, *common)
    own = nano("red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    # At most one level of 255 apart: the command reads weights of its own, at other addresses, which changes last bits.
    np.testing.assert_allclose(pixels(out), np.asarray(own, np.float32), rtol=0, atol=1)
    text = run(capsys, *common, "--processor", "clear:radius=4", "--height", "128", "--width", "96")
    assert "Clear(radius=4) in 5 of 5 layers, a token sees " in text and pixels(out).shape == (128, 96, 3)
    text = run(capsys, *common, "--processor", "clear:radius=4", "--min-tokens", "2000")
    assert "Clear(radius=4) in 0 of 5 layers" in text
    levels = ["--highres", "--height", "160", "--width", "192", "--level-inference-steps", "1"]
    levels += ["--strength", "0.3", "0.2", "--rope", "interpolate"]
    text = run(capsys, *common, *levels, "--processor", "clear:radius=4")
    assert "160 x 192, Clear(radius=4) above the first level" in text and pixels(out).shape == (160, 192, 3)
    run(capsys, *common, "--seed", "1", "--set", "true_cfg_scale=1.0")
    assert np.abs(pixels(out) - np.asarray(own, np.float32)).max() > 20


def test_the_other_side_is_the_pipelines_own(tmp_path: Path, capsys: Any) -> None:
    common = [
        "emoji-unet",
        "red apple",
        "--num-inference-steps",
        "1",
        "--out",
        str(tmp_path / "a.png"),
        "--device",
        "cpu",
    ]
    assert "96 x 128 pixels" in run(capsys, *common, "--height", "96")
    assert "128 x 96 pixels" in run(capsys, *common, "--width", "96")
    pipe: Any = build_sd()
    pipe.unet.register_to_config(sample_size=(8, 12))
    factor = pipe.vae_scale_factor
    assert _size(pipe, 64, None) == {"height": 64, "width": 12 * factor} and _size(pipe, None, None) == {}
    assert _size(pipe, None, 64) == {"height": 8 * factor, "width": 64}
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match=r"give --height and --width: a .* does not say its default size"):
        _size(pipe, 64, None)


@pytest.mark.parametrize("by_levels", [False, True], ids=["plain", "highres"])
def test_an_adapter_names_its_attention(by_levels: bool, tmp_path: Path, nano: Any) -> None:
    conversion = convert(nano, Clear(radius=3, pool=2))
    conversion.save(tmp_path)
    conversion.revert()
    options = Options(num_inference_steps=2, level_inference_steps=1, quiet=True) if by_levels else None
    sides = (160, 160) if by_levels else (None, None)
    call = {} if by_levels else {"num_inference_steps": 2}
    image, note = generate(nano, Request("rocket", *sides, adapter=str(tmp_path), options=options, call=call))
    assert image.size == ((160, 160) if by_levels else (128, 128))
    assert "Clear(radius=3, pool=2) in 5 of 5 layers" in note and not is_converted(nano.transformer)
    spec = Clear(radius=3, pool=2, native_tokens=1032)
    request = Request("rocket", *sides, spec=spec, adapter=str(tmp_path), options=options, call=call)
    assert str(spec) in generate(nano, request)[1]


def test_the_pipeline_is_as_before_when_drawing_fails(nano: Any) -> None:
    with pytest.raises(ValueError, match="does not know: 'xylophonist'"):
        generate(nano, Request("xylophonist", spec=Clear(radius=4)))
    assert not is_converted(nano.transformer)


def text_encoder(folder: Path) -> dict[str, Any]:
    """A random CLIP text encoder with a vocabulary of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    sizes = dict(hidden_size=TEXT_DIM, intermediate_size=TEXT_DIM, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=16, bos_token_id=0, eos_token_id=1, **sizes)
    return dict(tokenizer=tokenizer, text_encoder=CLIPTextModel(config).eval())


def test_a_stable_diffusion_folder(tmp_path: Path, capsys: Any) -> None:
    parts = dict(build_sd().components) | text_encoder(tmp_path / "words")
    pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)  # type: ignore[arg-type]
    pipe.save_pretrained(tmp_path / "sd")
    out = tmp_path / "b.png"
    common = [str(tmp_path / "sd"), "a fox", "--num-inference-steps", "2", "--out", str(out), "--device", "cpu"]
    common += ["--height", "128", "--width", "64"]
    text = run(capsys, *common, "--processor", "neighborhood:kernel_size=3", "--min-tokens", "9")
    assert "128 x 64 pixels, Neighborhood(kernel_size=3) in " in text and pixels(out).shape == (128, 64, 3)
    text = run(capsys, *common, "--set", "guidance_scale=1.0", "--set", "negative_prompt=a cat")
    assert "the host's attention" in text


BAD: dict[str, tuple[list[str], str]] = {
    "model": (["emojis"], "emojis is neither a folder with model_index.json"),
    "hub": (["nobody/nothing"], "nobody/nothing could not be loaded"),
    "processor": (["emoji-nano", "--processor", "cleer"], "unknown processor 'cleer'"),
    "field": (["emoji-nano", "--processor", "clear:size=3"], "Clear has no field size"),
    "window": (["emoji-nano", "--processor", "neighborhood:kernel_size=99"], "does not fit"),
    "size": (["emoji-nano", "--highres"], "--highres needs --height and --width"),
    "unit": (["emoji-nano", "--highres", "--height", "254", "--width", "256"], "multiples of 4 pixels"),
    "levels": (
        ["emoji-nano", "--level-inference-steps", "3", "--rope", "ntk"],
        "--level-inference-steps and --rope go with --highres",
    ),
    "strength": (["emoji-nano", "--highres", "--strength", "2"], "strength must hold noise levels"),
    "min-tokens": (["emoji-nano", "--min-tokens", "9"], "--min-tokens goes with --processor"),
    "argument": (["emoji-nano", "--set", "guidance=3"], "EmojiPipeline takes no guidance: it takes "),
    "own-argument": (["emoji-nano", "--set", "height=3"], "EmojiPipeline takes no height"),
    "value": (["emoji-nano", "--set", "guidance"], "--set takes name=value"),
    "adapter": (["emoji-nano", "--adapter", "no-such-folder"], "no-such-folder"),
    "device": (["emoji-nano", "--device", "cuda:99"], "cuda"),
    "no-device": (["emoji-nano", "--device", "gpu"], "--device gpu cannot be used here, give cpu or cuda"),
    "teacher": (["emoji-huge"], "nor one of emoji, emoji-nano, emoji-unet"),
    "meta": (["emoji-nano", "--device", "meta"], "--device meta cannot be used here"),
    "height": (["emoji-nano", "--height", "0"], "height must be an int of at least 1, got 0"),
    "width": (["emoji-nano", "--width", "-8"], "width must be an int of at least 1, got -8"),
    "steps": (["emoji-nano", "--num-inference-steps", "0"], "num_inference_steps must be an int of at least 1, got 0"),
    "images": (["emoji-nano", "--set", "num_images_per_prompt=0"], "num_images_per_prompt must be an int of at"),
    "tensor": (["emoji-nano", "--set", "latents=1"], "EmojiPipeline takes a tensor as latents, got 1"),
    "schedule": (["emoji-nano", "--processor", "schedule"], "unknown processor 'schedule'"),
    "folder": (["damaged"], "damaged could not be loaded: KeyError: '_class_name'"),
    "out": (["emoji-nano", "--out", "no-such-folder/a.png"], "--out must be"),
    "suffix": (["emoji-nano", "--out", "a.txt"], "--out must be"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "damaged":
        Path("damaged").mkdir()
        Path("damaged/model_index.json").write_text("{}")
    files = list(tmp_path.iterdir())
    assert main(["generate", arguments[0], "red apple", *arguments[1:]]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vision-attn: ")]
    assert len(lines) == 1 and message in lines[0]
    assert list(tmp_path.iterdir()) == files


def test_seeds_that_are_too_large_are_refused(capsys: Any) -> None:
    for command in (["generate", "emoji-nano", "red apple"], ["demo"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--seed", str(2**64)])
        assert stopped.value.code == 2 and "a seed has at most 63 bits" in capsys.readouterr().err


def test_values_on_the_command_line() -> None:
    call = call_of_text(["guidance_scale=5", "negative_prompt=a cat", "sigmas=[1.0, 0.5]"])
    assert call == {"guidance_scale": 5, "negative_prompt": "a cat", "sigmas": [1.0, 0.5]}
