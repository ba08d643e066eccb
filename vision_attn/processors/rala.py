"""RALA: linear attention whose keys are weighed by a global query, with a gate and a positional branch.

    a = N softmax_j(scale * mean_i(phi(q_i)) . phi(k_j)),    phi(x) = elu(x) + 1
    y_i = phi(q_i) (sum_j a_j phi(k_j) v_j^T / N) / (phi(q_i) . sum_j a_j phi(k_j) / N + 1e-6)
    o_i = (y_i + p_i) * g_i,    p = depth-wise 5 x 5 convolution of v over the grid

The weights raise the rank of the sum, and the gate raises that of the output. All tokens enter the sums; tokens outside
the grid have no p. In the paper g is a projection of the token. A pretrained host has no such projection, so here
g_i = 1 + W_g v_i per head.

Paper: 'Breaking the Low-Rank Dilemma of Linear Attention' - https://arxiv.org/abs/2411.07635
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vision_attn._checks import check_bool
from vision_attn.grid import Grid
from vision_attn.kernels.backend import for_inference
from vision_attn.kernels.image import add_depthwise
from vision_attn.kernels.linear import Features, feature_mean, linear_attention
from vision_attn.processors.base import AttnSpec, Layer, Moment, Processor, register
from vision_attn.processors.linfusion import key_weight
from vision_attn.processors.positional import DepthwiseBranch, check_kernel_size, rotation_of, unrotated


@register(tests={"rala": {}}, demo=[{}], bench={"rala": {}})
@dataclass(frozen=True)
class RALA(AttnSpec):
    """Rank-augmented linear attention. Needs training.

    W_g and the convolution start at zero, so training starts from linear attention with weighed keys.

    Args:
        kernel_size: Side of the convolution in tokens, odd; 0 for no positional branch.
        rotate: Map q and k as they were before the host rotated them, and rotate the features of the numerator instead,
            as the paper's backbones do. Only for hosts that rotate (FLUX), and not over several processes.
    """

    kernel_size: int = 5
    rotate: bool = False

    def __post_init__(self) -> None:
        check_kernel_size(self.kernel_size)
        check_bool("rotate", self.rotate)

    def build(self, layer: Layer) -> "RALAAttention":
        """Return the processor of one layer."""
        return RALAAttention(self, layer)

    def attended(self, grid: Grid) -> float:
        """Return 1.0: every token enters the sums."""
        return 1.0

    def flops(self, grid: Grid, layer: Layer) -> float:
        """Return the operations of the sums, the gate and the convolution."""
        per_channel = 6 * layer.head_dim + 2 * self.kernel_size**2
        return grid.tokens * layer.num_heads * layer.head_dim * per_channel

    @property
    def passes(self) -> float:
        """Two for the sums, and the mean of q before them, and the gate and the convolution after them."""
        return 9.0

    @property
    def calls(self) -> float:
        """Kernels of the mean and of the sums, and one of the gate and the convolution."""
        return 12.0


class RALAAttention(Processor):
    """`rank_augmented_attention` with a gate and a positional branch.

    Attributes:
        gate: W_g `[H, D, D]`, transposed: channel e of W_g v is the sum over d of `v[d] gate[d, e]`.
        lepe: The depth-wise convolution.
    """

    def __init__(self, spec: RALA, layer: Layer) -> None:
        super().__init__()
        self.spec, self.backend = spec, layer.backend
        self.gate = nn.Parameter(torch.zeros(layer.num_heads, layer.head_dim, layer.head_dim))
        if spec.kernel_size:
            self.lepe = DepthwiseBranch(layer.num_heads * layer.head_dim, spec.kernel_size, layer.backend)
        self.wants = spec.rotate

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None,
        *moment: Moment,
    ) -> Tensor:  # fmt: skip
        """Attend linearly: see `Processor.forward`."""
        weight, rotary = key_weight(mask, grid, q), None
        if self.spec.rotate:
            rotary = rotation_of(moment[0], self)
            q, k = unrotated(q, rotary), unrotated(k, rotary)
        y = rank_augmented_attention(q, k, v, rotary=rotary, key_weight=weight, scale=scale, backend=self.backend)
        gate = self.gate.to(v.device)  # offloading may have parked it elsewhere
        if self.spec.kernel_size:
            return self.lepe(y, v, grid, gate)
        return add_depthwise(y, v, grid, None, None, gate=gate, backend=for_inference(self.backend, y, v, gate))


def rank_augmented_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    key_weight: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return y of the formula above.

    Args:
        q: Queries `[B, N, H, D]`.
        k: Keys, like `q`.
        v: Values, like `q`.
        rotary: Cosine and sine `[N, D]`, as `Features` takes them.
        key_weight: Weights `[B, N, H]`, not negative, broadcasting; 0 hides a key.
        scale: Factor of the logits of a, `D ** -0.5` if None.
        backend: How the operators run.

    Returns:
        `[B, N, H, D]` in the dtype of `q`.
    """
    features = Features("elu", rotary)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g = feature_mean(q, features=Features("elu"), weight=key_weight, scale=scale, backend=backend)
    return linear_attention(
        q, k, v, features=features, key_weight=key_weight, global_query=g, eps=1e-6, backend=backend
    )
