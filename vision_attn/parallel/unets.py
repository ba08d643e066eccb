"""UNets over processes: each holds whole rows of the latents, and all get the whole output.

The model's own code runs as it is: its convolutions and group norms get classes that know of the neighbours, and its
transformers get the whole grid of their level.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vision_attn.hosts import find_host
from vision_attn.hosts.host import argument_names
from vision_attn.parallel.ranks import Cut
from vision_attn.parallel.rows import LEVEL, ROWS, Level, RowConv, RowNorm, Rows, reach

UNETS = ("UNet2DConditionModel",)
_HOOK = "vision_attn_rows"
_LAYER = "_vision_attn"  # attribute of a converted layer
_BLOCKS = (
    "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn",
    "UNetMidBlock2D",
)  # fmt: skip
_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


class EnabledUNet:
    """A UNet that `enable` has cut over processes.

    Attributes:
        group: The processes that share a picture with this one.
    """

    def __init__(self, model: Any, group: Any) -> None:
        self.group = group
        self._model, levels, host = model, len(model.config.block_out_channels), find_host(model)
        self._rows = Rows(Cut.over(group), levels)
        side = 2 ** (levels - 1)
        for name, part in host.parts(model):
            halvings = (side // host.size(model, name, side, side)[0]).bit_length() - 1
            setattr(host.watched(part), LEVEL, Level(self._rows, halvings))
        reach_all(model, self._rows)
        setattr(model, ROWS, self._rows)
        _register(model, self._rows)

    def disable(self) -> None:
        """Let the model run in one process again."""
        from diffusers.hooks import HookRegistry  # noqa: PLC0415

        HookRegistry.check_if_exists_or_initialize(self._model).remove_hook(_HOOK, recurse=False)
        for module in self._model.modules():
            for name in (ROWS, LEVEL):
                vars(module).pop(name, None)
            _take_back(module)


def refuse(model: Any) -> None:
    """Refuse a UNet with parts that see beyond their rows in another way.

    Raises:
        ValueError: If there is one; it is named.
    """
    if ROWS in vars(model):
        raise ValueError("this UNet is already cut over processes: disable() that first")
    known = (*model.down_blocks, *model.up_blocks, *([] if model.mid_block is None else [model.mid_block]))
    for block in known:
        if type(block).__name__ not in _BLOCKS:
            raise ValueError(
                f"a UNet with a {type(block).__name__} cannot be cut over processes: known blocks are "
                f"{', '.join(_BLOCKS)}"
            )
    config = model.config
    for name, wanted in (("downsample_padding", 1), ("attention_type", "default")):
        if getattr(config, name, wanted) != wanted:
            raise ValueError(f"a UNet with {name}={getattr(config, name)!r} cannot be cut over processes: {wanted!r}")
    if getattr(config, "addition_embed_type", None) == "image_hint":
        raise ValueError("a UNet whose input gets an image as a hint cannot be cut over processes")


def unconverted(model: nn.Module) -> str | None:
    """Return the name of a self-attention over the image that no processor answers, None if there is none."""
    names = find_host(model).layer_names(model)
    return next((name for name in names if _LAYER not in vars(model.get_submodule(name))), None)


def reach_all(model: nn.Module, rows: Rows) -> None:
    """Let every convolution and group norm of a model know of the neighbours' rows: also those that adapters brought.

    Raises:
        ValueError: If one cannot.
    """
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.GroupNorm)) or ROWS in vars(module):
            continue
        _take_back(module)  # adapters make layers of the class of those that they adapt
        ours = _class_for(module)
        if ours is None:
            raise ValueError(
                f"{name} sees rows of other processes in a way that is not known: {module}. Hooks that offload single "
                "layers come after parallel.enable"
            )
        if ours is not type(module):
            setattr(module, ROWS, rows)
            module.__class__ = ours


def _take_back(module: nn.Module) -> None:
    """Give a convolution or group norm its own class back, if it has one that knows of the neighbours."""
    own: dict[Any, Any] = {RowConv: nn.Conv2d, RowNorm: nn.GroupNorm}
    if type(module) in own:
        module.__class__ = own[type(module)]


def _class_for(module: nn.Conv2d | nn.GroupNorm) -> Any:
    """Return a class that knows of the neighbours' rows, the module's own if it needs none; None if there is none."""
    if type(module) is nn.GroupNorm:
        return None if "forward" in vars(module) else RowNorm
    if type(module) is not nn.Conv2d or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return None
    farthest = max(reach(module))
    return nn.Conv2d if farthest == 0 else RowConv if farthest == 1 and module.stride[0] <= 2 else None


def _register(model: Any, rows: Rows) -> None:
    """Hook the model's own forward as diffusers does: after PyTorch's hooks, which see the whole picture."""
    from diffusers.hooks import HookRegistry, ModelHook  # noqa: PLC0415

    class RowHook(ModelHook):
        """Cuts the inputs into rows, and gathers the output."""

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            """Keep the own rows."""
            named = dict(zip(argument_names(module), args, strict=False))
            return (), cut_inputs(module, rows, named | kwargs)

        def post_forward(self, module: Any, output: Any) -> Any:
            """Gather the rows of all."""
            if isinstance(output, tuple):
                return (rows.whole(output[0]), *output[1:])
            return type(output)(sample=rows.whole(output.sample))

    HookRegistry.check_if_exists_or_initialize(model).register_hook(RowHook(), _HOOK)


def cut_inputs(model: Any, rows: Rows, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward of which this process computes its rows.

    Raises:
        ValueError: If the model or an argument reaches over rows in a way that is not known.
    """
    _check_forward(model, inputs)
    if [type(module) for module in model.modules()] != rows.modules:  # adapters came, or a conversion went
        if stock := unconverted(model):
            raise ValueError(f"convert every self-attention of a UNet that is cut over processes: {stock} is not")
        reach_all(model, rows)
        rows.modules = [type(module) for module in model.modules()]
    rows.begin(*inputs["sample"].shape[-2:])
    cut: dict[str, Any] = {"sample": rows.own(inputs["sample"])}
    for name in _RESIDUALS:
        given = inputs.get(name)
        if isinstance(given, Tensor):
            cut[name] = rows.own(given)
        elif given is not None:
            cut[name] = tuple(rows.own(t) for t in given)
    return inputs | cut


def _check_forward(model: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse what would see one process's rows alone."""
    if inputs.get("attention_mask") is not None:
        raise ValueError("a UNet that is cut over processes takes no attention_mask")
    if "ip_adapter_masks" in (inputs.get("cross_attention_kwargs") or {}):
        raise ValueError("a UNet that is cut over processes takes no ip_adapter_masks: they are of the whole picture")
    if any(getattr(block, "s1", None) for block in model.up_blocks):
        raise ValueError("FreeU filters the whole picture: disable_freeu() before a UNet is cut over processes")
