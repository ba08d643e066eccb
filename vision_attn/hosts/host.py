"""What `convert` must know about a kind of host: which modules attend over the grid, and where the grid is."""

import fnmatch
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from vision_attn._checks import check_one_of
from vision_attn.grid import Grid

Found = Grid | tuple[Grid, ...] | str
"""The grid of a forward, or one for each sample of its batch; or why there is none."""

Probe = Callable[[nn.Module, Mapping[str, Any]], Found]
"""Returns the grid that a forward of a module attends over, from its arguments by name, or why there is none.

The host's `others` places the tokens that the grid leaves out (the text of a DiT). Samples whose grids differ are
padded to one number of tokens, and attended to one by one.
"""


class Timestep(NamedTuple):
    """The argument that tells how noisy the input is, and its values at pure noise and at the image."""

    argument: str
    noise: float
    image: float = 0.0


def grid_of_patches(image: Tensor, patch: int = 1) -> Grid | str:
    """Return the grid of an image `[B, C, height, width]` that is cut into patches, or why there is none."""
    if image.dim() != 4:
        return f"the input is not an image, but {tuple(image.shape)}"
    return Grid(image.shape[-2] // patch, image.shape[-1] // patch)


def one_or_each(grids: Sequence[Grid]) -> Found:
    """Return the grid that all samples of a batch have, or one for each."""
    return grids[0] if len(set(grids)) == 1 else tuple(grids)


def is_a(module: object, *names: str) -> bool:
    """Whether a module is of a class with one of these names, or of one that was made of it, as FSDP and users do."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's forward, in order.

    What a forward hands on as `*args` has the names of the class above it.
    """
    names: tuple[str, ...] = ()
    for cls in type(module).__mro__:
        if "forward" not in vars(cls):
            continue
        every = list(inspect.signature(vars(cls)["forward"]).parameters.values())[1:]
        own = list(itertools.takewhile(lambda one: one.kind is not one.VAR_POSITIONAL, every))
        names += tuple(one.name for one in own if one.kind is not one.VAR_KEYWORD)[len(names) :]
        if len(own) == len(every):
            break
    return names


def _whole(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [("", model)]


def _itself(part: nn.Module) -> nn.Module:
    return part


def patch_grid(model: Any, layer: str, height: int, width: int) -> tuple[int, int]:
    """Return the grid of an input that is cut into patches of `config.patch_size`."""
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    if not isinstance(patch, int):
        raise ValueError(f"a {type(model).__name__} does not tell its grid for an input of {height} x {width}")
    return height // patch, width // patch


def packed_size(model: nn.Module, layer: str, height: int, width: int) -> tuple[int, int]:
    """Return the grid of packed latents: the pipeline packs 2 x 2 of them into one token."""
    return height // 2, width // 2


def any_size(model: nn.Module, height: float, width: float) -> None:
    """Take every size: the pipeline rounds it."""
    return None


def _no_problem(model: nn.Module) -> None:
    return None


def not_whole(model: Any, height: float, width: float) -> str | None:
    """Return why a model does not take an input of this size: the pixels are not those of whole latents."""
    return None if height == int(height) and width == int(width) else "pixels that make no whole latents"


@dataclass(frozen=True)
class Host:
    """One kind of model. Give your own to `convert(model, spec, host=Host(...))` for a model that is not known.

        def probe(module, inputs):
            return Grid(*inputs["pixels"].shape[-2:])

        convert(model, Clear(radius=8), host=Host(layers=("blocks.*.attn",), probe=probe, others="prefix"))

    Args:
        layers: Patterns (as in a shell) of the names of the attention modules, as their part of the model names them.
        probe: `(module, arguments by name) -> Grid`, called before each forward of the watched module. It may return a
            string that says why there is no grid; the forward then runs the host's own attention. Count in the
            `Grid` only the tokens whose number you know; the rest of a sequence goes where `others` says.
        others: Where the tokens lie that the probe does not count, such as text: 'prefix', 'suffix', or 'none' if there
            are none.
        models: Names of the model classes.
        parts: `model -> [(name, part)]`, the parts with a grid of their own; by default the whole model.
        watched: `part -> module`, the module whose arguments the probe gets; by default the part itself.
        reads: Name of the argument whose values the probe reads, if it needs more than shapes. It is read once, and
            not under `torch.compile`, where the user must give the grid.
        counted: Name of the argument `[B, N, C]` whose tokens a grid that is given there must have; by default `reads`.
        after: Names of arguments `[..., n, C]` that may be given, each for n tokens after the grid.
        mask_means_dense: Whether layers with an attention mask stay dense, because the mask means that the grid lies
            elsewhere in each sample; 'added' if that holds for masks that are not bool, which are added to the logits.
        more_keys: Whether a layer may have more keys than queries: text that only gives keys, or a cache. Those without
            a query are the first ones, of the prefix; or with 'last' the last ones, of the suffix.
        biases: Whether masks with a number for each pair of tokens are relative positions, and no padding.
        axes: How many axes queries may have: 4 `[B, H, N, D]`, or also 3 `[B * H, N, D]`.
        timestep: Where the model's forward tells how far the denoising is, for schedules; None if it does not.
        finest: Name of the model's argument whose last two axes are the finest grid, if grids differ by layer.
        size: `(model, layer, height, width) -> (height, width)`, the grid of a layer for an input of this size, for
            estimates; by default the size divided by the model's `config.patch_size`.
        refuses: `(model, height, width) -> str | None`, why the model does not take an input of this size, in latents
            or pixels that may be broken; for estimates.
        text: Tokens of a usual prompt, for estimates.
        problem: `model -> str | None`, why a model of these classes cannot be converted.

    Raises:
        TypeError: If `layers` is not a tuple of patterns, or `probe` not a function.
        ValueError: If `others`, `more_keys` or `mask_means_dense` is none of its three.
    """

    layers: tuple[str, ...]
    probe: Probe
    others: Literal["prefix", "suffix", "none"] = "none"
    models: tuple[str, ...] = ()
    parts: Callable[[nn.Module], list[tuple[str, nn.Module]]] = _whole
    watched: Callable[[nn.Module], nn.Module] = _itself
    reads: str = ""
    counted: str = ""
    after: tuple[str, ...] = ()
    mask_means_dense: bool | Literal["added"] = False
    more_keys: bool | Literal["last"] = False
    biases: bool = False
    axes: tuple[int, ...] = (4,)
    timestep: Timestep | None = None
    finest: str = ""
    size: Callable[[nn.Module, str, int, int], tuple[int, int]] = patch_grid
    refuses: Callable[[nn.Module, float, float], str | None] = not_whole
    text: int = 0
    problem: Callable[[nn.Module], str | None] = _no_problem

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not self.layers or not all(isinstance(p, str) for p in self.layers):
            raise TypeError(f"layers must be a tuple of patterns such as ('blocks.*.attn',), got {self.layers!r}")
        check_one_of("others", self.others, ("prefix", "suffix", "none"))
        check_one_of("more_keys", self.more_keys, (False, True, "last"))
        check_one_of("mask_means_dense", self.mask_means_dense, (False, True, "added"))
        if not callable(self.probe):
            raise TypeError(f"probe must be a function (module, arguments) -> Grid, got {self.probe!r}")

    def unasked(self, queries: int, keys: int) -> tuple[int, int]:
        """Return how many keys before the first query, and after the last one, have no query."""
        return (0, keys - queries) if self.more_keys == "last" else (keys - queries, 0)

    def find(self, model: nn.Module) -> Iterator[tuple[nn.Module, list[tuple[str, nn.Module]]]]:
        """Yield each watched module with the attention layers of its part, by their full names."""
        for part_name, part in self.parts(model):
            prefix = f"{part_name}." if part_name else ""
            found = [
                (prefix + name, module)
                for name, module in part.named_modules()
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.layers)
            ]
            around = {name.rpartition(".")[0] for name, _ in found}  # transformers before 5.1 wraps `ViTSelfAttention`
            found = [(name, module) for name, module in found if name not in around]
            if found:
                yield self.watched(part), found

    def layer_names(self, model: nn.Module) -> list[str]:
        """Return the names of all attention layers over a grid, in order of depth.

        Raises:
            ValueError: If there is none.
        """
        names = [name for _, found in self.find(model) for name, _ in found]
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no self-attention over a grid: no module is called "
                f"{', '.join(self.layers)}"
            )
        return names

    def grid_at(self, model: nn.Module, layer: str, height: int, width: int) -> Grid:
        """Return the sequence of a layer for an input of a given size and a usual prompt.

        Args:
            model: The model.
            layer: Name of the layer.
            height: Height of the model's input, in latents or pixels.
            width: Width of the model's input.

        Raises:
            ValueError: If the input is smaller than a token.
        """
        prefix: Any = getattr(model, "num_prefix_tokens", 0)
        grid = self.size(model, layer, height, width)
        return Grid(*grid, prefix, self.text) if self.others == "suffix" else Grid(*grid, prefix + self.text)

    def positions(self, model: nn.Module, module: str, height: int, width: int) -> int:
        """Return the number of places that a convolution `module` of the model has for an input, as for `grid_at`."""
        rows, columns = self.size(model, module, height, width)
        return rows * columns


def passed(thresholds: tuple[float, ...], host: Host, inputs: Mapping[str, Any]) -> float | None:
    """Return the last threshold that the denoising has passed. Compiled blocks depend on it, so it has few values."""
    time = inputs.get(host.timestep.argument) if host.timestep is not None else None
    if time is None or host.timestep is None:
        return None
    _, noise, image = host.timestep
    values = set(time.flatten().tolist()) if isinstance(time, Tensor) else {float(time)}
    shares = [(value - noise) / (image - noise) for value in values]
    passed = {max((t for t in thresholds if t <= share + 1e-6), default=0.0) for share in shares}
    if len(passed) > 1:
        raise ValueError(
            f"a schedule runs one stage for the whole batch, but the timesteps {sorted(values)} are in {len(passed)} "
            "stages: run the samples of each stage by themselves"
        )
    return passed.pop()


def heads_of(name: str, module: nn.Module) -> tuple[int, int]:
    """Return (num_heads, head_dim) of an attention module of diffusers, timm or transformers.

    Raises:
        ValueError: If the module does not say.
    """
    names = ("heads", "num_heads", "num_attention_heads")
    num_heads: Any = next((getattr(module, name) for name in names if getattr(module, name, None)), None)
    head_dim = getattr(module, "head_dim", getattr(module, "attention_head_size", None))
    inner: Any = getattr(module, "inner_dim", None)
    if inner is None and isinstance(qkv := getattr(module, "qkv", None), nn.Linear):
        inner = qkv.out_features // 3
    if inner is None:
        projection = getattr(module, "to_q", None) or getattr(module, "to_query", None)
        inner = getattr(projection, "out_features", None)
    if num_heads is None or (head_dim is None and inner is None):
        raise ValueError(f"{name}: a {type(module).__name__} does not tell its heads: it needs `heads` and `head_dim`")
    return num_heads, inner // num_heads if head_dim is None else head_dim


def input_dim(module: nn.Module) -> int | None:
    """Return the channels of the tokens that a module projects to queries, None if it does not say."""
    fused = ("to_qkv", "to_qkv_mlp_proj", "qkv", "img_qkv_proj", "img_attn_qkv")
    for name in ("to_q", *fused, "q_proj", "query", "to_query"):
        projection: Any = getattr(module, name, None)
        if not hasattr(projection, "in_features"):
            projection = getattr(projection, "linear", None)  # Gemma 4's, which may clamp
        if hasattr(projection, "in_features"):
            return int(projection.in_features)
    return None
