"""Tiny pipelines of hosts beside those of `tiny_pipelines.py`: prompts come as embeddings, and guidance is on."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from dense_oracle import KERNEL_3, RADIUS_2, DenseOracle
from tiny_host_case import POOLED_DIM, TEXT_DIM, Layout, noise
from tiny_hosts import HOST
from torch import Tensor

from vision_attn import Clear, Multipole, Neighborhood, Softmax, convert
from vision_attn.processors import AttnSpec

SIZE = (6, 10)  # tokens of a picture that is not square
TEXT = (7, 5)  # tokens of the prompt, and of the negative prompt where it may have another number


def _kandinsky5() -> Any:
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.Kandinsky5T2IPipeline(
        transformer=HOST["kandinsky5"].build(), vae=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **absent,
    )  # fmt: skip
    pipe.resolutions = [(16 * SIZE[1], 16 * SIZE[0])]
    return pipe


def _kandinsky5_call(pipe: Any) -> Tensor:
    found = {}
    for seed, (name, text) in enumerate(zip(("", "negative_"), TEXT, strict=True)):
        found[f"{name}prompt_embeds_qwen"] = noise(2, text, TEXT_DIM, seed=seed)
        found[f"{name}prompt_embeds_clip"] = noise(2, POOLED_DIM, seed=seed)
        found[f"{name}prompt_cu_seqlens"] = text * torch.arange(3)
    return pipe(**found, **_sides(16)).image


def _lumina_next() -> Any:
    absent = dict.fromkeys(("text_encoder", "tokenizer"))
    transformer = HOST["lumina-next"].build()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.LuminaPipeline(transformer=transformer, vae=None, scheduler=scheduler, **absent)


def _lumina_next_call(pipe: Any) -> Tensor:
    """Prompts have masks of different lengths."""
    found = {}
    for seed, name in enumerate(("", "negative_")):
        found[f"{name}prompt_embeds"] = noise(2, TEXT[0], TEXT_DIM, seed=seed)
        found[f"{name}prompt_attention_mask"] = (torch.arange(TEXT[0]) < torch.tensor([[7], [4]])).long()
    return pipe(**found, **_sides(16)).images


def _amused() -> Any:
    """Return an AmusedPipeline whose pictures are codes."""
    return diffusers.AmusedPipeline(
        vqvae=None, tokenizer=None, text_encoder=None, transformer=HOST["uvit-down"].build(),
        scheduler=diffusers.AmusedScheduler(mask_token_id=19),
    )  # fmt: skip


def _amused_call(pipe: Any) -> Tensor:
    """Take the first step alone: later ones draw codes by lot, and a code is right or wrong."""
    logits: list[Tensor] = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: logits.append(output))
    found = dict(prompt_embeds=noise(2, POOLED_DIM), encoder_hidden_states=noise(2, TEXT[0], TEXT_DIM))
    negative = dict(negative_prompt_embeds=noise(2, POOLED_DIM, seed=1))
    negative |= dict(negative_encoder_hidden_states=noise(2, TEXT[0], TEXT_DIM, seed=1))
    codes = pipe(**found, **negative, **_sides(16)).images
    hook.remove()
    assert codes.shape == (2, 2 * SIZE[0], 2 * SIZE[1]) and len(logits) == 2
    return logits[0]


def _sides(patch: int) -> dict[str, Any]:
    return dict(
        height=patch * SIZE[0], width=patch * SIZE[1], num_inference_steps=2, guidance_scale=3.0, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "kandinsky5": (_kandinsky5, _kandinsky5_call),
    "lumina-next": (_lumina_next, _lumina_next_call),
    "amused": (_amused, _amused_call),
}
pipelines = pytest.mark.parametrize("make, call", PIPELINES.values(), ids=PIPELINES)


def draw(make: Callable[[], Any], call: Callable[[Any], Tensor], spec: AttnSpec | None = None) -> Tensor:
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    conversion = None if spec is None else convert(pipe, spec)
    found = call(pipe)
    assert conversion is None or set(conversion.status.values()) == {"rerouted"}
    return found


@pipelines
def test_attending_to_everything_changes_nothing(make: Callable[[], Any], call: Callable[[Any], Tensor]) -> None:
    want = draw(make, call)
    assert want.isfinite().all()
    for spec in (Softmax(), Clear(radius=100)):
        torch.testing.assert_close(draw(make, call, spec), want, rtol=0, atol=2e-5)


@pipelines
def test_a_window_equals_the_pipeline_with_a_dense_mask(make: Callable[[], Any], call: Callable[[Any], Tensor]) -> None:
    stock = draw(make, call)
    for spec, window in ((Clear(radius=2), RADIUS_2), (Neighborhood(kernel_size=3), KERNEL_3)):
        with DenseOracle({Layout(0, SIZE)}, window) as oracle:
            want = draw(make, call)
        assert oracle.calls
        found = draw(make, call, spec)
        torch.testing.assert_close(found, want, rtol=0, atol=2e-5)
        assert (found - stock).abs().max() > 1e-3


@pipelines
def test_multipole_draws_and_is_taken_back(make: Callable[[], Any], call: Callable[[Any], Tensor]) -> None:
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    want = call(pipe)
    conversion = convert(pipe, Multipole(cell=2, near=0, pool=1, exact=1))
    found = call(pipe)
    assert set(conversion.status.values()) == {"rerouted"}
    assert found.isfinite().all() and not torch.equal(found, want)
    conversion.revert()
    assert torch.equal(call(pipe), want)
