"""The UNet teacher: a real Stable Diffusion pipeline that loads, saves, draws its icons, and converts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from vision_attn.conversion.conversion import convert
from vision_attn.demo import EmojiUNetImg2ImgPipeline, EmojiUNetPipeline, PixelVAE, load_teacher
from vision_attn.processors import Clear, LinFusion, Softmax

# isort: split
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel


@pytest.fixture(scope="module")
def pipe():
    """The teacher; nothing here changes it but what is reverted."""
    pipe = load_teacher("unet")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt, seed=0, **kwargs):
    """Draw with two steps, as arrays `[B, height, width, 3]`."""
    call = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(seed), **kwargs}
    return pipe(prompt, **call).images


def test_it_is_stable_diffusion_with_ordinary_parts(pipe):
    assert isinstance(pipe, StableDiffusionPipeline) and type(pipe.unet) is UNet2DConditionModel
    assert type(pipe.scheduler) is DDIMScheduler
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    assert pipe.safety_checker is None and pipe.tokenizer is None
    assert {model.dtype for model in (pipe.unet, pipe.text_encoder, pipe.vae)} == {torch.float32}


def test_prompt_to_a_pil_image_of_128_pixels(pipe):
    image = pipe("red apple", num_inference_steps=1).images[0]
    assert image.size == (128, 128) and image.mode == "RGB"


@pytest.mark.parametrize("loader", [EmojiUNetPipeline, DiffusionPipeline], ids=lambda loader: loader.__name__)
def test_save_and_reload_draw_the_same(pipe, loader, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is EmojiUNetPipeline
    small = {"height": 64, "width": 64}
    np.testing.assert_array_equal(draw(pipe, "red apple", **small), draw(again, "red apple", **small))


def test_the_generator_decides_the_picture(pipe):
    small = {"height": 64, "width": 64}
    first, same, other = (draw(pipe, "octopus", seed, **small) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0.05


def test_guidance_against_the_null_prompt_is_on(pipe):
    small = {"height": 64, "width": 64}
    guided = draw(pipe, "octopus", **small)
    np.testing.assert_array_equal(guided, draw(pipe, "octopus", negative_prompt="", **small))
    assert np.abs(guided - draw(pipe, "octopus", guidance_scale=1.0, **small)).max() > 0.01
    assert np.abs(guided - draw(pipe, "octopus", negative_prompt="red apple", **small)).max() > 0.01


def test_batch_of_prompts_with_two_images_each(pipe):
    shape = {"height": 32, "width": 64}
    images = draw(pipe, ["red apple", "octopus", "Fire-Engine"], num_images_per_prompt=2, **shape)
    assert images.shape == (6, 32, 64, 3)
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    pair = draw(pipe, ["red apple", "octopus"], generator=seeds, **shape)
    np.testing.assert_allclose(pair[1:], draw(pipe, "octopus", 4, **shape), atol=1e-4)


def test_ready_embeddings(pipe):
    small = {"height": 64, "width": 64}
    embeds, negative = pipe.encode_prompt(["red apple", "octopus"])
    assert embeds.shape == negative.shape == (2, 9, 96)
    images = draw(pipe, None, prompt_embeds=embeds, **small)
    np.testing.assert_array_equal(images, draw(pipe, ["red apple", "octopus"], **small))
    np.testing.assert_array_equal(
        images, draw(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative, **small)
    )


def psnr_to_icons(pipe, steps, count):
    """PSNR in dB of the first `count` icons at 32 x 32 pixels, each drawn from its own seed."""
    icons = np.asarray(Image.open(Path(__file__).parents[1] / "golden" / "emoji" / "icons.png"), float) / 255
    prompts = ["red apple", "alarm clock", "angry face", "house"][:count]
    seeds = [torch.Generator().manual_seed(seed) for seed in range(count)]
    images = draw(pipe, prompts, generator=seeds, num_inference_steps=steps)
    small = images.reshape(count, 32, 4, 32, 4, 3).mean((2, 4))
    truth = np.stack(np.split(icons, 4, axis=1))[:count]
    return -10 * np.log10(np.square(small - truth).mean((1, 2, 3)))


def test_an_icon_is_recognisable_and_the_background_white(pipe):
    assert psnr_to_icons(pipe, 6, 1).min() > 14  # measured: 15.4; to another icon at most 10.4
    assert draw(pipe, "red apple", num_inference_steps=6)[0, :8, :8].mean() > 0.93


@pytest.mark.slow  # draws four pictures in twenty steps; the twin is above
def test_icons_are_recognisable(pipe):
    assert (psnr_to_icons(pipe, 20, 4) > 14).all()  # measured: 15.7, 17.2, 20.1, 19.9


def test_given_latents_are_used_as_they_are(pipe):
    latents = torch.randn(1, 48, 8, 8) + 1
    call = {"height": 32, "width": 32, "latents": latents.clone()}
    kept = pipe.prepare_latents(1, 48, 32, 32, torch.float32, "cpu", None, latents)
    torch.testing.assert_close(kept, latents)
    fresh = pipe.prepare_latents(1, 48, 32, 32, torch.float32, "cpu", torch.Generator().manual_seed(0))
    torch.testing.assert_close(fresh.mean((2, 3)), torch.zeros(1, 48))
    assert draw(pipe, "octopus", **call).shape == (1, 32, 32, 3)


def test_bad_prompts_are_refused(pipe):
    with pytest.raises(ValueError, match=r"'aple' \(close to .*'apple'"):
        pipe("red aple")
    with pytest.raises(ValueError, match="2 negative prompts do not match 1 prompts"):
        pipe("red apple", negative_prompt=["octopus", "pizza"])
    with pytest.raises(ValueError, match="image is missing"):
        EmojiUNetImg2ImgPipeline.from_pipe(pipe)("red apple")


@pytest.mark.parametrize("spec", [Softmax(), Clear(radius=4), LinFusion()], ids=lambda spec: type(spec).__name__)
def test_it_converts_draws_and_reverts(pipe, spec):
    small = {"height": 64, "width": 64}
    stock = draw(pipe, "octopus", **small)
    conversion = convert(pipe, spec)
    assert len(conversion.layers) == 7
    try:
        converted = draw(pipe, "octopus", **small)
    finally:
        conversion.revert()
    assert np.isfinite(converted).all()
    assert (np.abs(converted - stock).max() < 1e-3) == isinstance(spec, Softmax)
    np.testing.assert_array_equal(draw(pipe, "octopus", **small), stock)


def test_image_to_image_keeps_the_picture(pipe):
    image = torch.ones(1, 3, 64, 96)
    image[:, 1:, 20:40, 30:60] = 0
    redraw = EmojiUNetImg2ImgPipeline.from_pipe(pipe)
    redraw.set_progress_bar_config(disable=True)
    assert redraw.unet is pipe.unet
    near = redraw("red apple", image=image, strength=0.1, output_type="pt", num_inference_steps=20).images
    assert near.shape == image.shape
    assert (near - image).abs().mean() < 0.1


def test_centred_pixel_vae_decodes_what_it_encoded(pipe):
    image = torch.rand(2, 3, 8, 12) * 2 - 1
    latents = pipe.vae.encode(image).latent_dist.mode()
    assert latents.shape == (2, 48, 2, 3)
    torch.testing.assert_close(latents.mean(), image.mean() - 0.6)
    torch.testing.assert_close(pipe.vae.decode(latents).sample, image)
    with pytest.raises(ValueError, match="needs latent_channels 48"):
        PixelVAE(patch_size=4)
