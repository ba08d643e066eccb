"""Measures of pictures `[B, 3, height, width]` in [0, 1], with torchmetrics where it has them."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _torchmetrics() -> Any:
    try:
        import torchmetrics  # noqa: PLC0415, of the extra 'distill'
    except ModuleNotFoundError:
        raise ValueError("evaluation needs torchmetrics: pip install 'vision_attn[distill]'") from None
    return torchmetrics


def agreement(pictures: Tensor, others: Tensor) -> dict[str, float]:
    """Return the mean PSNR in dB and the mean SSIM of each picture to its counterpart."""
    functional = _torchmetrics().functional.image
    error = (pictures - others).square().mean((1, 2, 3)).clamp(min=1e-10)
    ssim = functional.structural_similarity_index_measure(pictures, others, data_range=1.0)
    return {"psnr_db": (-10 * error.log10()).mean().item(), "ssim": ssim.item()}


def kernel_distance(pictures: Tensor, others: Tensor, features: str = "pixels") -> float:
    """Return the kernel distance (KID, times 1000) of two sets of pictures.

    Args:
        pictures: One set.
        others: The other.
        features: 'pixels' for means over a 16 x 16 grid, or the name of a timm model with pretrained weights.

    Raises:
        ValueError: If the model's weights cannot be loaded.
    """
    _torchmetrics()
    from torchmetrics.image.kid import KernelInceptionDistance  # noqa: PLC0415

    size = min(len(pictures), len(others), 1000)
    module = _Pixels() if features == "pixels" else _Timm(features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it warns of the memory that all features take
        kid = KernelInceptionDistance(
            module, subsets=50 if size < len(pictures) else 1, subset_size=size, normalize=True
        )
    kid.update(pictures, real=False)
    kid.update(others, real=True)
    return 1000 * kid.compute()[0].item()


class _Pixels(nn.Module):
    num_features = 768

    def forward(self, images: Tensor) -> Tensor:
        """Return means over a 16 x 16 grid of bytes `[B, 3, height, width]`, scaled to unit size."""
        return F.adaptive_avg_pool2d(images.float() / 127.5 - 1, 16).flatten(1)


class _Timm(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        import timm  # noqa: PLC0415, optional

        try:
            self.model = timm.create_model(name, pretrained=True, num_classes=0).eval()
        except Exception as error:  # hub, network and name errors have no common class
            raise ValueError(f"eval.features: timm's {name!r} cannot be loaded: {error}") from None
        self.config: Any = timm.data.resolve_model_data_config(self.model)
        self.num_features = int(self.model.num_features)

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's pooled features of bytes `[B, 3, height, width]`."""
        mean, std = (torch.tensor(self.config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        x = F.interpolate(images.float() / 255, self.config["input_size"][-2:], mode="bicubic", antialias=True)
        with torch.no_grad():
            return self.model((x - mean) / std)


def retrieval(pictures: Tensor, gallery: Tensor, right: Sequence[int]) -> dict[str, float]:
    """Return how often the right picture of a gallery is the nearest to a drawn one, and is among the five nearest.

    Args:
        pictures: The drawn pictures.
        gallery: `[G, 3, height, width]`. Distances are those of the pixels at 64 px.
        right: The right place in the gallery for each picture.
    """
    small, all_small = (F.interpolate(t, (64, 64), mode="area").flatten(1) for t in (pictures, gallery))
    order = torch.cdist(small, all_small).argsort(1)
    hits = order == torch.as_tensor(list(right))[:, None]
    return {f"top{n}": hits[:, :n].any(1).float().mean().item() for n in (1, 5)}


_COARSE = 32  # pixels


def copies(picture: Tensor) -> float:
    """Count how often a picture `[3, height, width]` repeats itself: 1 if it does not, about 4 for four copies.

    A shift that lays some of k equal copies onto others gives a correlation of (pairs at that shift) / k. These sum to
    k - 1 over all shifts. So the count is 1 plus the sum of the autocorrelation's peaks, of the edges of the picture,
    that are above 0.2 and further out than an eighth of the side. The edges are those at 32 px, where copies that
    differ in detail still correlate. The more the copies differ, the further the count falls below their number.
    """
    scale = _COARSE / min(picture.shape[1:])
    height, width = (round(side * scale) for side in picture.shape[1:])
    coarse = F.interpolate(picture[None].float(), (height, width), mode="area")[0]
    edges = torch.cat([F.pad(coarse.diff(dim=1), (0, 0, 0, 1)), F.pad(coarse.diff(dim=2), (0, 1))])
    spectrum = torch.fft.rfft2(edges, s=(2 * height, 2 * width)).abs().square().sum(0)
    correlation = torch.fft.fftshift(torch.fft.irfft2(spectrum, s=(2 * height, 2 * width)))
    correlation = correlation / correlation.max().clamp(min=1e-12)
    near = _COARSE // 8
    peak = correlation == F.max_pool2d(correlation[None, None], near + 1, 1, near // 2)[0, 0]
    rows, columns = (torch.arange(2 * side) - side for side in (height, width))
    far = rows[:, None] ** 2 + columns**2 > near**2
    values = correlation[peak & far]
    return 1 + values[values > 0.2].sum().item()
