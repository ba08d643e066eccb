"""The ten lines that one would try for a model that is no known host: which modules attend over a grid, and where.

A forward is run twice, the second time with another image. What is looked at are the calls of
`scaled_dot_product_attention` with as many queries as keys: how many tokens they have, and which of the first call's
queries the image changes.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vision_attn.hosts.host import argument_names, heads_of


@dataclass
class _Call:
    """One call of self-attention: its module, its queries `[B, H, N, D]`, and images that modules around it got."""

    module: str
    queries: Tensor
    around: list[tuple[str, str, Tensor]] = field(default_factory=list)  # module, argument, value

    @property
    def tokens(self) -> int:
        """N."""
        return self.queries.shape[-2]


class _Watch(TorchFunctionMode):
    """Records the self-attention of a forward, and who runs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[_Call] = []
        self.running: list[tuple[str, list[tuple[str, Tensor]]]] = []

    def __enter__(self) -> "_Watch":
        self.hooks: list[Any] = []
        for name, module in self.model.named_modules():
            begin = functools.partial(self._begin, name, argument_names(module))
            self.hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(self._end, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def _begin(self, name: str, names: Sequence[str], module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        images = [(given, value) for given, value in inputs.items() if isinstance(value, Tensor) and value.dim() == 4]
        self.running.append((name, images))

    def _end(self, *_: Any) -> None:
        self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.running:
            q, k = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            if q.dim() == 4 and q.shape[-2] == k.shape[-2]:
                around = [(name, *image) for name, images in self.running for image in images]
                self.calls.append(_Call(self.running[-1][0], q.detach().clone(), around))
        return func(*args, **kwargs)


def usual_inputs(model: nn.Module, height: int, width: int) -> dict[str, Any]:
    """Return the inputs that a forward of a model is likely to take, from the names of its arguments.

    Args:
        model: A model of timm, transformers or diffusers.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """
    config: Any = getattr(model, "config", None)
    told: Any = config if isinstance(config, Mapping) else {}
    names = argument_names(model)
    on_latents = any(cls.__name__ == "ModelMixin" for cls in type(model).__mro__)
    side = 8 if on_latents else 1
    channels = told.get("in_channels", 4) if on_latents else 3
    image = torch.rand(1, channels, height // side, width // side)
    text = next((told[name] for name in ("cross_attention_dim", "joint_attention_dim") if told.get(name)), 64)
    known = dict.fromkeys(("x", "sample", "pixel_values", "hidden_states", "input"), image)
    known |= dict(timestep=torch.ones(1), encoder_hidden_states=torch.rand(1, 77, text))
    if not on_latents:
        names = names[:1]
        known.setdefault(names[0], image)
    return {name: known[name] for name in names if name in known}


def suggest_host(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Return the lines that one would try to convert a model that is no known host.

    Args:
        model: The model. It is run twice, in eval mode and without gradients, and left as it was.
        inputs: Arguments of its forward by name. One of them is an image `[B, C, height, width]`, best not square.

    Returns:
        Python lines that end with a call of `convert`; they use `model`.

    Raises:
        ValueError: If no argument is an image, or no module attends to as many keys as it has queries, or no grid fits.
    """
    name = next((n for n, value in inputs.items() if isinstance(value, Tensor) and value.dim() == 4), None)
    if name is None:
        raise ValueError(f"none of {', '.join(inputs) or 'the arguments'} is an image [B, C, height, width]")
    calls = _calls_of(model, inputs)
    if not calls:
        raise ValueError(
            f"no module of this {type(model).__name__} calls scaled_dot_product_attention with as many queries as keys"
        )
    image: Tensor = inputs[name]
    changed = _calls_of(model, {**inputs, name: image + torch.rand_like(image)})
    first = calls[0]
    moved = (first.queries != changed[0].queries).any((0, 1, 3)).nonzero().flatten().tolist()
    patches = _patches(*image.shape[-2:])
    together = bool(moved) and moved[-1] - moved[0] + 1 == len(moved) and len(moved) in patches
    if not together:  # each query knows of the whole image
        moved = [first.tokens - max((count for count in patches if count <= first.tokens), default=0)]
        moved = list(range(moved[0], first.tokens))
    if moved and all(call.tokens >= len(moved) for call in calls):
        return _by_root(model, name, calls, moved, patches[len(moved)])
    return _by_blocks(model, calls)


def _calls_of(model: nn.Module, inputs: Mapping[str, Any]) -> list[_Call]:
    training = model.training
    try:
        with torch.no_grad(), _Watch(model.eval()) as watch, torch.random.fork_rng():
            torch.manual_seed(0)
            model(**inputs)
    finally:
        model.train(training)
    return watch.calls


def _patches(height: int, width: int) -> dict[int, int]:
    """Return the sides of patches by how many there are; of several sides the one that divides the image."""
    sides = range(min(height, width), 0, -1)
    exact = [p for p in sides if height % p == width % p == 0]
    return {(height // p) * (width // p): p for p in (*sides, *exact)}


def _by_root(model: nn.Module, name: str, calls: list[_Call], moved: list[int], patch: int) -> str:
    """Suggest a probe of the whole model's image, whose tokens in the first call are those `moved`."""
    before, after = moved[0], calls[0].tokens - 1 - moved[-1]
    if before and after:
        raise ValueError(f"{before} tokens lie before the {len(moved)} of the image, and {after} behind them")
    others = "prefix" if before else "suffix" if after else "none"
    probe = [
        "def probe(module, inputs):",
        f'    height, width = inputs["{name}"].shape[-2:]',
        f"    return Grid(height // {patch}, width // {patch})" if patch > 1 else "    return Grid(height, width)",
    ]
    rest = "probe=probe" if others == "none" else f'probe=probe, others="{others}"'
    return _lines(model, calls, probe, _name_patterns([call.module for call in calls]), rest)


def _by_blocks(model: nn.Module, calls: list[_Call]) -> str:
    """Suggest a probe of the blocks around the layers, which get features of several sizes."""
    parts, argument, last = [], "", True
    for call in calls:
        for name, given, value in reversed(call.around):
            if name != call.module and math.prod(value.shape[-2:]) == call.tokens:
                found = name, given, True
            elif name != call.module and math.prod(value.shape[1:3]) == call.tokens:
                found = name, given, False
            else:
                continue
            parts.append((found[0], call.module[len(found[0]) + 1 :] if found[0] else call.module))
            argument, last = found[1:]
            break
        else:
            raise ValueError(f"nothing around {call.module} has the sides of a grid of {call.tokens} tokens")
    kinds = sorted({type(model.get_submodule(part)).__name__ for part, _ in parts})
    sides = "-2:" if last else "1:3"
    probe = [
        "def probe(module, inputs):",
        f'    return Grid(*inputs["{argument}"].shape[{sides}])',
        "",
        "def blocks(model):",
        f"    return [(n, m) for n, m in model.named_modules() if type(m).__name__ in {tuple(kinds)!r}]",
    ]
    return _lines(model, calls, probe, _name_patterns([layer for _, layer in parts]), "parts=blocks, probe=probe")


def _name_patterns(names: Sequence[str]) -> tuple[str, ...]:
    """Return patterns of names in which numbers vary; a number at the end must not stand for what is inside."""
    return tuple(dict.fromkeys(re.sub(r"\b\d+\b(?=\.)", "*", re.sub(r"\.\d+$", ".[0-9]", name)) for name in names))


def _lines(model: nn.Module, calls: list[_Call], probe: list[str], layers: tuple[str, ...], rest: str) -> str:
    lines = ["from vision_attn import Clear, Grid, Host, convert", "", *probe, ""]
    silent = dict.fromkeys(call.module for call in calls if not _tells(model.get_submodule(call.module)))
    if silent:
        shape = calls[0].queries.shape
        lines += [f"for name in {tuple(silent)!r}:", "    layer = model.get_submodule(name)"]
        lines += [f"    layer.num_heads, layer.head_dim = {shape[1]}, {shape[3]}"]
    lines += [f"host = Host(layers={layers!r}, {rest})", "conversion = convert(model, Clear(radius=8), host=host)"]
    return "\n".join(lines)


def _tells(module: nn.Module) -> bool:
    """Whether a module says how many heads it has."""
    try:
        heads_of("", module)
    except ValueError:
        return False
    return True
