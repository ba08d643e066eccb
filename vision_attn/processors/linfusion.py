"""LinFusion: normalised linear attention over all tokens, with small residual networks on the inputs of q and k.

    q_i = phi(W_q (x_i + f_q(x_i))),    k_j = phi(W_k (x_j + f_k(x_j))),    v_j = W_v x_j
    o_i = q_i (sum_j k_j v_j^T / N) / (q_i . sum_j k_j / N + 1e-4),    phi(x) = elu(x) + 1

f = Linear - LayerNorm - LeakyReLU - Linear. All tokens enter the sums, those outside the grid too. A host that projects
its text with separate weights (FLUX, SD3) projects it unchanged. With 'hedgehog' features, phi(x) = [softmax(W x),
softmax(-W x)] with a learned W per head. `rotate` maps q and k as they were before the host rotated them, and rotates
the features of the numerator instead, R_i phi(q_i) and R_j phi(k_j). `kernel_size` adds LiT's convolution of v.

Papers: 'LinFusion: 1 GPU, 1 Minute, 16K Image' - https://arxiv.org/abs/2409.02097,
'The Hedgehog & the Porcupine' - https://arxiv.org/abs/2402.04347, 'LiT' - https://arxiv.org/abs/2501.12976,
'RoFormer' - https://arxiv.org/abs/2104.09864
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn._checks import check_bool, check_int, check_one_of, is_int
from vision_attn.grid import Grid
from vision_attn.kernels.dense import around
from vision_attn.kernels.hedgehog import hedgehog
from vision_attn.kernels.linear import Features, linear_attention
from vision_attn.kernels.residual import MOST, Network, add_networks, network_reasons, run
from vision_attn.kernels.tapes import HERE, Tapes, can_repeat, is_plain
from vision_attn.processors.base import AttnSpec, Layer, Moment, Processor, register
from vision_attn.processors.positional import DepthwiseBranch, check_kernel_size, rotation_of, unrotated


@register(
    tests={
        "linfusion": {},
        "linfusion-hedgehog": dict(mid_dim=4, feature_map="hedgehog", features=2, kernel_size=3),
    },
    demo=[{}],
    bench={"linfusion": {}},
)
@dataclass(frozen=True)
class LinFusion(AttnSpec):
    """Linear attention that inherits the host's weights. Needs training (the authors: 100K steps).

    The last layer of f starts at zero, so training starts from the inherited projections; W starts as identity.

    Args:
        mid_dim: Width of f; None for the width of the tokens (the authors take it for SD 1.5 and 2.1, and a sixteenth
            of it for SDXL); -1 for no f.
        feature_map: 'elu' for the paper's features, 'hedgehog' for learned softmax features.
        features: How many W a head has; their features stand side by side. The first starts as identity, the next as
            twice the identity, and so on.
        kernel_size: Side in tokens of a depth-wise convolution of the values over the grid, odd; 0 for none. It starts
            at zero.
        rotate: Rotate features instead of q and k. Only for hosts that rotate (FLUX), and not over several processes.
    """

    mid_dim: int | None = None
    feature_map: str = "elu"
    features: int = 1
    kernel_size: int = 0
    rotate: bool = False

    def __post_init__(self) -> None:
        mid = self.mid_dim
        if mid is not None and not is_int(mid):
            raise TypeError(f"mid_dim must be an int or None, got {mid!r}")
        if mid is not None and mid != -1 and mid < 1:
            raise ValueError(f"mid_dim must be at least 1, or -1 for no residual network, got {mid}")
        check_one_of("feature_map", self.feature_map, ("elu", "hedgehog"))
        check_int("features", self.features, 1)
        if self.features > 1 and self.feature_map != "hedgehog":
            raise ValueError(f"features={self.features} needs feature_map='hedgehog', got {self.feature_map!r}")
        check_kernel_size(self.kernel_size)
        check_bool("rotate", self.rotate)

    def build(self, layer: Layer) -> "LinFusionAttention":
        """Return the processor of one layer.

        Raises:
            ValueError: If there is an f, and the layer's query projection is not known.
        """
        if self.mid_dim != -1 and layer.dim is None:
            raise ValueError(f"{layer.name} has no query projection that we know: use LinFusion(mid_dim=-1)")
        return LinFusionAttention(self, layer)

    def attended(self, grid: Grid) -> float:
        """Return 1.0: every token enters the sums."""
        return 1.0

    def flops(self, grid: Grid, layer: Layer) -> float:
        """Return the operations of the sums, the residual networks and the learned features."""
        features = 2 * self.features if self.feature_map == "hedgehog" else 1
        sums = 4 * features * layer.head_dim + (2 * features * layer.head_dim if features > 1 else 0)
        sums += 2 * self.kernel_size**2
        return grid.tokens * (sums * layer.num_heads * layer.head_dim + 8 * self.width(layer) * (layer.dim or 0))

    def products(self, grid: Grid, layer: Layer) -> float:
        """Return the operations of the residual networks."""
        return grid.tokens * 8.0 * self.width(layer) * (layer.dim or 0)

    def width(self, layer: Layer) -> int:
        """Return the width of f in a layer, 0 if there is no f."""
        if self.mid_dim == -1 or layer.dim is None:
            return 0
        return layer.dim if self.mid_dim is None else self.mid_dim

    @property
    def passes(self) -> float:
        """One for the sums, and partial sums; Hedgehog's features are written and read too."""
        return 1.3 if self.feature_map == "elu" else 4.0

    @property
    def calls(self) -> float:
        """Kernels of the sums and of the features, those of both residual networks, and the convolution."""
        more = 7.0 * (self.features - 1) + (2.0 if self.kernel_size else 0.0)
        return (6.0 if self.feature_map == "elu" else 12.0) + (4.0 if self.mid_dim != -1 else 0.0) + more


class _Affine(nn.Module):
    """W x + b for x of any dtype, in that of W, which is known when it runs: hooks may store it in another one.

    It is no `nn.Linear`, so what others do to all linear layers of a model (adapters, quantisation) leaves it alone.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_features, self.out_features = dim, out_dim
        self.weight = nn.Parameter(torch.empty(out_dim, dim))
        self.bias = nn.Parameter(torch.empty(out_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `nn.Linear` does."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out_dim]`."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Residual(nn.Sequential):
    """f: Linear - LayerNorm - LeakyReLU - Linear on tokens `[B, N, C]`, zero at the start."""

    def __init__(self, dim: int, mid_dim: int) -> None:
        last = _Affine(mid_dim, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(_Affine(dim, mid_dim), nn.LayerNorm(mid_dim), nn.LeakyReLU(0.01), last)

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x) in the dtype of x."""
        # without the calls of four modules, which take the host as long as what they compute
        network = None if torch.compiler.is_compiling() else self.network()
        return super().forward(x).to(x.dtype) if network is None else run(x, network)

    def network(self) -> Network | None:
        """Return the weights of f; None if its layers were replaced, or hooks have a part in their calls."""
        parts: Any = tuple(self._modules.values())
        if tuple(map(type, parts)) != _PARTS or not is_plain(*parts):
            return None
        first, norm, activation, last = parts
        if norm.weight is None or norm.bias is None:
            return None
        return Network(
            first.weight, first.bias, norm.weight, norm.bias, last.weight, last.bias, norm.eps,
            activation.negative_slope,
        )  # fmt: skip


_PARTS = _Affine, nn.LayerNorm, nn.LeakyReLU, _Affine
_NUMBERS = ("1", "eps"), ("2", "negative_slope")  # of which parts
_TENSORS = Tensor, nn.Parameter


class Hedgehog(nn.Module):
    """phi(x) = [softmax(W x), softmax(-W x)] on `[B, N, H, D]`, with W the identity at the start.

    Args:
        num_heads: H.
        head_dim: D.
        backend: How the features are computed.
        count: How many W a head has; their features stand side by side.

    Attributes:
        weight: W `[count * H, D, D]`, transposed as `hedgehog` takes it.
    """

    def __init__(self, num_heads: int, head_dim: int, backend: str = "auto", count: int = 1) -> None:
        super().__init__()
        self.backend, self.count = backend, count
        scales = torch.arange(1.0, count + 1).repeat_interleave(num_heads)
        self.weight = nn.Parameter(torch.eye(head_dim) * scales[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Return features `[B, N, H, count * 2 D]`: see `hedgehog`, whose fused kernel has no gradients."""
        weight = self.weight.to(x.device)  # offloading may have parked it elsewhere
        backend = "torch" if self.backend == "reference" else self.backend
        if self.count == 1:
            return hedgehog(x, weight, backend=backend)
        return torch.cat([hedgehog(x, own, backend=backend) for own in weight.chunk(self.count)], -1)


class LinFusionAttention(Processor):
    """`linear_attention` over all tokens.

    Attributes:
        to_q_: f_q, under the name of the released weights.
        to_k_: f_k.
        lepe: The depth-wise convolution.
    """

    apart = ("to_q_", "to_k_")

    def __init__(self, spec: LinFusion, layer: Layer) -> None:
        super().__init__()
        self.spec, self.backend = spec, layer.backend
        self.heads_alike = spec.feature_map != "hedgehog" and not spec.kernel_size
        if spec.mid_dim != -1:
            assert layer.dim is not None
            self.to_q_, self.to_k_ = (Residual(layer.dim, spec.width(layer)) for _ in range(2))
            self._tapes = Tapes()
        if spec.feature_map == "hedgehog":
            self.features_q, self.features_k = (
                Hedgehog(layer.num_heads, layer.head_dim, layer.backend, spec.features) for _ in range(2)
            )
        if spec.kernel_size:
            self.lepe = DepthwiseBranch(layer.num_heads * layer.head_dim, spec.kernel_size, layer.backend)
        self.wants = spec.rotate

    def residuals(self) -> Mapping[str, nn.Module]:
        """Return f_q and f_k."""
        modules: Any = self._modules
        return {} if self.spec.mid_dim == -1 else {"q": modules["to_q_"], "k": modules["to_k_"]}

    def add_residuals(self, x: Tensor, roles: Sequence[str]) -> Sequence[Tensor] | None:
        """Return the sums of some networks, in inference, in 16 bits and up to `MOST`: see `add_networks`."""
        if (
            self.backend not in ("auto", "triton") or type(x) is not Tensor or x.dim() != 3 or not x.is_contiguous()
            or x.numel() * (self.spec.mid_dim or x.shape[-1]) > MOST
            or torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")
        ):  # fmt: skip
            return None
        residuals: Any = [self._modules[f"to_{role}_"] for role in roles]
        numbers = tuple([getattr(f._modules.get(part), name, None) for f in residuals for part, name in _NUMBERS])
        added: Sequence[Tensor] | None = self._tapes.call(
            lambda x, numbers: self._added(x, residuals), (x, numbers), *residuals
        )
        return added

    def _added(self, x: Tensor, residuals: Sequence[nn.Module]) -> Sequence[Tensor] | None:
        """Return the sums, None if a module is more than its weights, or these are not as kernels take them."""
        if not can_repeat(x) and HERE.recorder is None:
            return None
        networks = tuple([f.network() if type(f) is Residual and is_plain(f) else None for f in residuals])
        known = tuple([n for n in networks if n is not None])
        weights = [t for network in known for t in network[:6]]
        if len(known) < len(networks) or any(t.device != x.device or type(t) not in _TENSORS for t in weights):
            return None
        if network_reasons(x, known, auto=self.backend == "auto"):
            return None
        return add_networks(x, known, backend=self.backend)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None,
        *moment: Moment,
    ) -> Tensor:  # fmt: skip
        """Attend linearly: see `Processor.forward`. There are no logits, so `scale` is not used."""
        features, rotary = "elu", None
        if self.spec.rotate:
            rotary = rotation_of(moment[0], self)
            q, k = unrotated(q, rotary), unrotated(k, rotary)
        if self.spec.feature_map == "hedgehog":
            q, k, features = self.features_q(q), self.features_k(k), "none"
            if rotary is not None:
                cos, sin = (t.repeat(1, 2 * self.spec.features) for t in rotary)
                rotary = cos, sin
        weight, known = key_weight(mask, grid, q), Features(features, rotary)
        o = linear_attention(q, k, v, features=known, key_weight=weight, eps=1e-4, backend=self.backend)
        return self.lepe(o, v, grid) if self.spec.kernel_size else o


def key_weight(mask: Tensor | None, grid: Grid, q: Tensor) -> Tensor | None:
    """Turn a key mask `[B, prefix + suffix]` into weights `[B, N, 1]` of all keys, in the dtype of q."""
    if mask is None:
        return None
    return around(mask, mask.new_ones(mask.shape[0], grid.image_tokens), grid)[..., None].to(q.dtype)
