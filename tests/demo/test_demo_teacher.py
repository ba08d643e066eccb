"""The embedded teacher: real diffusers pipelines that load, save, draw and refuse what they do not know."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from vision_attn.demo import EmojiImg2ImgPipeline, EmojiPipeline, PixelVAE, WordEncoder, load_teacher

# isort: split
from diffusers import DiffusionPipeline, FluxTransformer2DModel


@pytest.fixture(scope="module")
def pipe():
    """The nano teacher; nothing here changes it."""
    pipe = load_teacher("nano")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt, seed=0, **kwargs):
    """Draw with two steps, as arrays `[B, height, width, 3]`."""
    call = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(seed), **kwargs}
    return pipe(prompt, **call).images


def test_prompt_to_a_pil_image_of_128_pixels(pipe):
    image = pipe("red apple", num_inference_steps=2).images[0]
    assert image.size == (128, 128)
    assert image.mode == "RGB"


def test_the_transformer_is_an_ordinary_flux_in_fp32(pipe):
    assert type(pipe.transformer) is FluxTransformer2DModel
    assert {model.dtype for model in (pipe.transformer, pipe.text_encoder, pipe.vae)} == {torch.float32}
    assert pipe.scheduler.config.shift == 3.0


@pytest.mark.parametrize("loader", [EmojiPipeline, DiffusionPipeline], ids=lambda loader: loader.__name__)
def test_save_and_reload_draw_the_same(pipe, loader, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is EmojiPipeline
    for name in ("transformer", "text_encoder"):
        theirs = getattr(again, name).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in getattr(pipe, name).state_dict().items())
    np.testing.assert_array_equal(
        draw(pipe, "red apple", height=64, width=64), draw(again, "red apple", height=64, width=64)
    )


def test_the_generator_decides_the_picture(pipe):
    small = {"height": 64, "width": 64}
    first, same, other = (draw(pipe, "octopus", seed, **small) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0.05


def test_guidance_against_the_null_prompt_is_on(pipe):
    small = {"height": 64, "width": 64}
    guided = draw(pipe, "octopus", **small)
    np.testing.assert_array_equal(guided, draw(pipe, "octopus", negative_prompt="", true_cfg_scale=3.0, **small))
    assert np.abs(guided - draw(pipe, "octopus", true_cfg_scale=1.0, **small)).max() > 0.01
    assert np.abs(guided - draw(pipe, "octopus", negative_prompt="red apple", **small)).max() > 0.01


def test_batch_of_prompts_with_two_images_each(pipe):
    shape = {"height": 32, "width": 64}
    images = draw(pipe, ["red apple", "octopus", "Fire-Engine"], num_images_per_prompt=2, **shape)
    assert images.shape == (6, 32, 64, 3)
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    pair = draw(pipe, ["red apple", "octopus"], generator=seeds, **shape)
    alone = draw(pipe, "octopus", 4, **shape)
    np.testing.assert_allclose(pair[1:], alone, atol=1e-4)


def test_ready_embeddings_and_callbacks(pipe):
    steps = []

    def on_step(_pipe, step, _timestep, tensors):
        steps.append((step, tuple(tensors["latents"].shape)))
        return tensors

    embeds, pooled, _ = pipe.encode_prompt(["red apple", "octopus"])
    call = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "height": 64, "width": 64}
    images = draw(pipe, None, callback_on_step_end=on_step, **call)
    assert steps == [(0, (2, 256, 48)), (1, (2, 256, 48))]
    np.testing.assert_array_equal(images, draw(pipe, ["red apple", "octopus"], height=64, width=64))


def test_image_to_image_at_256_pixels(pipe):
    image = pipe("red apple", num_inference_steps=2).images[0].resize((256, 256))
    redraw = EmojiImg2ImgPipeline.from_pipe(pipe)
    redraw.set_progress_bar_config(disable=True)
    assert redraw.transformer is pipe.transformer
    near = redraw("red apple", image=image, strength=0.1, num_inference_steps=10, true_cfg_scale=1.0).images[0]
    assert near.size == (256, 256)
    assert np.abs(np.asarray(near, float) - np.asarray(image, float)).mean() < 40
    with pytest.raises(ValueError, match="image is missing"):
        redraw("red apple")


def test_image_to_image_from_the_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    redraw = EmojiImg2ImgPipeline.from_pretrained(tmp_path)
    assert redraw("octopus", image=torch.rand(1, 3, 64, 32), num_inference_steps=2).images[0].size == (32, 64)


def test_unknown_words_are_named_with_close_ones(pipe):
    with pytest.raises(ValueError, match=r"'aple' \(close to .*'apple'.*'qqqq' \(nothing close is known\)"):
        pipe("red aple qqqq")
    with pytest.raises(ValueError, match="has 9 words, the most is 8"):
        pipe("red " * 9)
    with pytest.raises(ValueError, match="2 negative prompts do not match 1 prompts"):
        pipe("red apple", negative_prompt=["octopus", "pizza"])
    with pytest.raises(ValueError, match="'nano'"):
        load_teacher("huge")


def test_words_are_read_without_case_and_separators(pipe):
    ids = pipe.text_encoder.tokenize(["red apple", "Red-Apple", " red_apple,", "", "apple red"])
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[0], ids[2])
    assert not ids[3].any()
    assert not torch.equal(ids[0], ids[4])


def test_the_null_prompt_has_its_own_embedding():
    encoder = WordEncoder(["red", "apple"], dim=4, num_positions=3)
    sequence, pooled = encoder(encoder.tokenize(["", "red apple"]))
    assert sequence.shape == (2, 3, 4)
    assert torch.equal(sequence[0], encoder.null)
    torch.testing.assert_close(pooled[1], encoder.pool(encoder.embedding.weight[1:].mean(0)))


@pytest.mark.parametrize("shape", [(1, 3, 128, 128), (2, 3, 6, 10)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pixel_vae_is_exact(shape, dtype):
    vae, image = PixelVAE().to(dtype=dtype), torch.randn(shape).to(dtype)
    posterior = vae.encode(image).latent_dist
    assert posterior.mode().shape == (shape[0], 12, shape[2] // 2, shape[3] // 2)
    assert torch.equal(posterior.sample(), posterior.mode())
    assert torch.equal(vae.decode(posterior.mode()).sample, image)
    assert vae.dtype == dtype


def test_pixel_vae_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="7 x 8 pixels does not divide into 2 x 2"):
        PixelVAE().encode(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match="needs latent_channels 12"):
        PixelVAE(latent_channels=16)
