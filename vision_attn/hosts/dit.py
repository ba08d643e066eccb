"""Diffusion transformers: where each keeps its image tokens, and how its forward tells their grid."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vision_attn.grid import Grid
from vision_attn.hosts.host import (
    Found,
    Host,
    Timestep,
    any_size,
    grid_of_patches,
    is_a,
    not_whole,
    one_or_each,
    packed_size,
    patch_grid,
)


def _patches(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    return grid_of_patches(inputs["hidden_states"], module.config.patch_size)  # type: ignore[union-attr, arg-type]


def _square_patches(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    found = _patches(module, inputs)
    if isinstance(found, Grid) and found.height != found.width:
        return f"DiT joins its patches to a square, and {found} is not square"
    return found


def _qwen(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    """Read `img_shapes`: (frames, height, width) in tokens of the image and of the reference images after it."""
    shapes = inputs["img_shapes"]
    if not shapes:
        return "img_shapes is missing"
    shapes = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
    frames, height, width = shapes[0]
    if frames != 1:
        return f"img_shapes holds {frames} layers, not one image"
    return Grid(height, width, suffix=sum(t * h * w for t, h, w in shapes[1:]))


def _qwen_21(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    """Read `img_shapes`, where the image is last. Each place of a reference image in the text becomes 2 x 2 tokens."""
    *references, (frames, height, width) = inputs["img_shapes"][0]
    if frames != 1:
        return f"img_shapes holds {frames} layers, not one image"
    given = sum(t * h * w for t, h, w in references)
    return Grid(height, width, prefix=inputs["encoder_hidden_states"].shape[1] + given - given // 4)


def _nucleus(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    """Read `img_shapes`, which may be that of one image; text after it gives keys."""
    shapes = inputs["img_shapes"]
    return _qwen(module, {"img_shapes": [shapes] if isinstance(shapes, tuple) else shapes})


def _flex(model: Any) -> str | None:
    if any(is_a(block.attn.processor, "QwenImage21FlexAttnProcessor") for block in model.transformer_blocks):
        return "its processors run flex attention: call model.set_attn_processor(QwenImage21AttnProcessor()) first"
    return None


def _control(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the size of the condition: the image itself may come as tokens."""
    return grid_of_patches(inputs["controlnet_cond"], module.config.patch_size)  # type: ignore[union-attr, arg-type]


def _hidream(module: nn.Module, inputs: Mapping[str, Any]) -> Found:
    """Read the latents, or the sizes of those that were cut before. What pads images that are not square comes last."""
    if inputs.get("hidden_states_masks") is None:
        return _patches(module, inputs)
    sizes = inputs["img_sizes"]
    return one_or_each([Grid(*size) for size in (sizes.tolist() if isinstance(sizes, Tensor) else sizes)])


def _hunyuan_image(module: Any, inputs: Mapping[str, Any]) -> Grid | str:
    image = inputs["hidden_states"]
    if image.dim() != 4:
        return f"the input is not one image, but {tuple(image.shape)}"
    return Grid(*_two_sides(module, "", *image.shape[-2:]))


def _two_sides(model: Any, layer: str, height: int, width: int) -> tuple[int, int]:
    """Return the grid where `config.patch_size` has two sides, after that of a frame or alone."""
    *_, rows, columns = model.config.patch_size
    return height // rows, width // columns


def _joy_image(module: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read latents `[B, C, 1, height, width]`, or `[B, images, C, 1, height, width]`, of which the last comes first."""
    image = inputs["hidden_states"]
    if image.dim() not in (5, 6) or image.shape[-3] != 1:
        return f"the input is not one image with reference images, but {tuple(image.shape)}"
    height, width = _two_sides(module, "", *image.shape[-2:])
    return Grid(height, width, suffix=(image.shape[1] - 1) * height * width if image.dim() == 6 else 0)


def _joy_image_plus(module: nn.Module, inputs: Mapping[str, Any]) -> Found:
    """Read the frames, rows and columns of each sample's images, of which the first is drawn; padding comes last."""
    shapes = [shapes[0] for shapes in inputs["shape_list"]]
    if any(frames != 1 for frames, _, _ in shapes):
        return f"shape_list holds {max(frames for frames, _, _ in shapes)} frames, not one image"
    tokens = inputs["hidden_states"].shape[1]
    return one_or_each([Grid(rows, columns, suffix=tokens - rows * columns) for _, rows, columns in shapes])


def _z_image(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    """Read a list of images `[C, frames, height, width]`; padding and text come after the image tokens."""
    images, patch, frames = inputs["x"], inputs.get("patch_size", 2), inputs.get("f_patch_size", 1)
    if isinstance(images[0], (list, tuple)):
        return "several images in one sample"
    shapes = {tuple(map(int, image.shape[-3:])) for image in images}
    if len(shapes) != 1:
        return f"images of different sizes in one batch: {sorted(shapes)}"
    t, height, width = shapes.pop()
    return Grid(height // patch, width // patch) if t == frames else f"{t} frames, not one image"


def _fibo_2(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    """Return the grid of the latents; images to edit come after it, and gist tokens of the text before it."""
    found = _patches(module, inputs)
    if isinstance(found, str):
        return found
    more = [_patches(module, {"hidden_states": image}) for image in inputs.get("context_latents") or ()]
    suffix = [grid.tokens for grid in more if isinstance(grid, Grid)]
    return Grid(found.height, found.width, suffix=sum(suffix))


def _kandinsky(module: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read latents `[B, frames, height, width, C]`, channels last."""
    latents = inputs["hidden_states"]
    if latents.dim() != 5:
        return f"the input is not latents [B, frames, height, width, C], but {tuple(latents.shape)}"
    frames = latents.shape[1] // module.config.patch_size[0]
    if frames != 1:
        return f"the input is a video of {frames} frames, and a grid is one image"
    if inputs.get("sparse_params") is not None:
        return "sparse_params reorder the tokens to blocks, and choose which blocks attend to which: leave them out"
    return Grid(*_two_sides(module, "", *latents.shape[2:4]))


_BLOCKS = ("transformer_blocks.*.attn",)


def _no_square(model: Any, height: float, width: float) -> str | None:
    rows, columns = patch_grid(model, "", int(height), int(width))
    return not_whole(model, height, width) or (None if rows == columns else "DiT joins its patches to a square")


def _whole_patches(model: Any, height: float, width: float) -> str | None:
    patch = model.config.patch_size
    return None if height % patch == width % patch == 0 else f"its sides must be multiples of {patch} latents"


def _too_large(model: Any, height: float, width: float) -> str | None:
    """Compare the patches of a side with the table of positions: its sides (SD3), or its tokens (AuraFlow)."""
    most, patch = model.config.pos_embed_max_size, model.config.patch_size
    if is_a(model, "AuraFlowTransformer2DModel"):
        most = math.isqrt(most)
        if why := _whole_patches(model, height, width):
            return why
    large = max(height, width) // patch > most
    return not_whole(model, height, width) or (f"its positions end at {most} patches a side" if large else None)


def _beyond_resolution(model: Any, height: float, width: float) -> str | None:
    """Compare the latents with those that HiDream pads images to which are not square."""
    most = math.prod(model.config.max_resolution)
    large = height != width and height * width > most
    return _whole_patches(model, height, width) or (f"it takes at most {most} latents" if large else None)


def _beyond_axes(model: Any, height: float, width: float) -> str | None:
    _, rows, columns = model.config.axes_lens
    patch = model.config.patch_size
    large = height // patch > rows or width // patch > columns
    return _whole_patches(model, height, width) or (f"its positions end at {rows} x {columns}" if large else None)


def _beyond_table(model: Any, height: float, width: float) -> str | None:
    """Compare the patches of a side with the table of positions that Lumina-Next's pipeline makes."""
    large = max(height, width) // model.config.patch_size > 384
    return _whole_patches(model, height, width) or ("its positions end at 384 patches a side" if large else None)


def _beyond_rotary(model: Any, height: float, width: float) -> str | None:
    """Compare the patches with the rotary positions that Kandinsky 5 has for each axis."""
    *_, rows, columns = model.config.patch_size
    if height % rows or width % columns:
        return f"its sides must be multiples of {rows} and {columns} latents"
    *_, most_rows, most_columns = model.visual_rope_embeddings.max_pos
    large = height // rows > most_rows or width // columns > most_columns
    return f"its positions end at {most_rows} x {most_columns}" if large else None


_THOUSAND, _ONE = Timestep("timestep", noise=1000), Timestep("timestep", noise=1)

DITS = (
    Host(
        models=("DiTTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        probe=_square_patches,
        refuses=_no_square,
        timestep=_THOUSAND,
    ),
    Host(
        models=("PixArtTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        probe=_patches,
        timestep=_THOUSAND,
    ),
    Host(
        models=("HunyuanDiT2DModel", "HunyuanDiT2DControlNetModel"),
        layers=("blocks.*.attn1",),
        probe=_patches,
        timestep=_THOUSAND,
    ),
    Host(
        models=("SD3Transformer2DModel",),
        layers=(*_BLOCKS, "transformer_blocks.*.attn2"),
        probe=_patches,
        others="suffix",
        timestep=_THOUSAND,
        text=333,
        refuses=_too_large,
    ),
    Host(
        models=("SD3ControlNetModel",),
        layers=(*_BLOCKS, "transformer_blocks.*.attn2"),
        probe=_control,
        others="suffix",
        timestep=_THOUSAND,
        text=333,
        refuses=_too_large,
    ),
    Host(
        models=("AuraFlowTransformer2DModel",),
        layers=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        probe=_patches,
        others="prefix",
        timestep=_ONE,
        text=264,
        refuses=_too_large,
    ),
    Host(
        models=("CogView3PlusTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        probe=_patches,
        others="prefix",
        timestep=_THOUSAND,
        text=224,
        refuses=_too_large,
    ),
    Host(
        models=("CogView4Transformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        probe=_patches,
        others="prefix",
        mask_means_dense=True,  # its mask reaches the logits as an additive 0 / 1
        timestep=_THOUSAND,
        text=224,
        refuses=_whole_patches,
    ),
    Host(
        models=("GlmImageTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        probe=_patches,
        others="prefix",
        more_keys=True,  # the cache of reference images
        mask_means_dense=True,  # as CogView4
        timestep=_THOUSAND,
        text=128,
        refuses=_whole_patches,
    ),
    Host(
        models=("Lumina2Transformer2DModel",),
        layers=("layers.*.attn", "noise_refiner.*.attn"),
        probe=_patches,
        others="prefix",
        mask_means_dense=True,  # texts of different lengths: the image starts elsewhere in each sample
        timestep=Timestep("timestep", noise=0, image=1),
        text=256,
        refuses=_beyond_axes,
    ),
    Host(
        models=("LuminaNextDiT2DModel",),
        layers=("layers.*.attn1",),
        probe=_patches,
        timestep=Timestep("timestep", noise=0, image=1),
        refuses=_beyond_table,
    ),
    Host(
        models=("HiDreamImageTransformer2DModel",),
        layers=("double_stream_blocks.*.block.attn1", "single_stream_blocks.*.block.attn1"),
        probe=_hidream,
        others="suffix",
        timestep=Timestep("timesteps", noise=1000),
        text=384,
        refuses=_beyond_resolution,
    ),
    Host(
        models=("HunyuanImageTransformer2DModel",),
        layers=(*_BLOCKS, "single_transformer_blocks.*.attn"),
        probe=_hunyuan_image,
        others="suffix",
        timestep=_THOUSAND,
        size=_two_sides,
        text=1128,
    ),
    Host(
        models=("ErnieImageTransformer2DModel",),
        layers=("layers.*.self_attention",),
        probe=_patches,
        others="suffix",
        timestep=_THOUSAND,
        text=256,
        refuses=_whole_patches,
    ),
    Host(
        models=("PRXTransformer2DModel",),
        layers=("blocks.*.attention",),
        probe=_patches,
        others="prefix",
        more_keys=True,  # the text gives keys and asks nothing
        timestep=_ONE,
        text=256,
        refuses=_whole_patches,
    ),
    Host(
        models=("QwenImageTransformer2DModel", "QwenImageControlNetModel"),
        layers=_BLOCKS,
        probe=_qwen,
        others="prefix",
        timestep=_ONE,
        size=packed_size,
        refuses=any_size,
        text=256,
    ),
    Host(
        models=("JoyImageEditTransformer3DModel",),
        layers=("double_blocks.*.attn",),
        probe=_joy_image,
        others="suffix",
        timestep=_THOUSAND,
        size=_two_sides,
        text=1024,
    ),
    Host(
        models=("JoyImageEditPlusTransformer3DModel",),
        layers=("double_blocks.*.attn",),
        probe=_joy_image_plus,
        others="suffix",
        timestep=_THOUSAND,
        size=_two_sides,
        text=1024,
    ),
    Host(
        models=("NucleusMoEImageTransformer2DModel",),
        layers=_BLOCKS,
        probe=_nucleus,
        others="suffix",
        more_keys="last",  # the text gives keys and asks nothing
        timestep=_ONE,
        size=packed_size,
        refuses=any_size,
        text=256,
    ),
    Host(
        models=("QwenImage21Transformer2DModel",),
        layers=_BLOCKS,
        probe=_qwen_21,
        more_keys=True,  # the image asks by itself, also without a cache
        timestep=_ONE,
        problem=_flex,
        text=256,
    ),
    Host(
        models=("ZImageTransformer2DModel",),
        layers=("layers.*.attention", "noise_refiner.*.attention"),
        probe=_z_image,
        others="suffix",
        timestep=Timestep("t", noise=0, image=1),
        size=packed_size,
        refuses=any_size,
        text=128,
    ),
    Host(
        models=("BriaFibo2Transformer2DModel",),
        layers=("layers.*.attention", "noise_refiner.*.attention"),
        probe=_fibo_2,
        others="prefix",
        mask_means_dense=True,  # prompts of other lengths in one batch: then the gist tokens come last
        timestep=_ONE,
        size=packed_size,
        refuses=any_size,
        text=512,
    ),
    Host(
        models=("ZImageControlNetModel",),  # its other layers are those of the transformer
        layers=("control_layers.*.attention", "control_noise_refiner.*.attention"),
        probe=_z_image,
        others="suffix",
        timestep=Timestep("t", noise=0, image=1),
        size=packed_size,
        refuses=any_size,
        text=128,
    ),
    Host(
        models=("Kandinsky5Transformer3DModel",),  # of one frame: text to image, and image to image
        layers=("visual_transformer_blocks.*.self_attention",),
        probe=_kandinsky,
        timestep=_THOUSAND,
        size=_two_sides,
        refuses=_beyond_rotary,
    ),
)
