"""The student, what of it is trained, and its teacher: the same model, or a frozen copy if the host's weights learn."""

import copy
import fnmatch
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.adapters.adapter import CONFIG
from vision_attn.adapters.published import check_clear, check_linfusion
from vision_attn.conversion.conversion import Conversion, convert, load
from vision_attn.conversion.projections import FUSED
from vision_attn.conversion.state import computing_dtype, is_quantised, model_state
from vision_attn.distill.config import Config, StudentConfig
from vision_attn.distill.denoiser import denoiser_of
from vision_attn.parallel import enable
from vision_attn.parallel.models import has_plan
from vision_attn.processors.base import CHILD
from vision_attn.processors.moh import MoHAttention

_ROLES = {
    "q": ("to_q", "q_proj", "to_query"),
    "k": ("to_k", "k_proj", "to_key"),
    "v": ("to_v", "v_proj", "to_value"),
    "out": ("to_out.0", "to_out", "out_layer"),
}
_LORA = "pytorch_lora_weights.safetensors"  # diffusers' name


@dataclass
class Student:
    """A converted denoiser in training.

    Attributes:
        pipe: Its pipeline.
        model: The denoiser.
        conversion: The conversion of the model.
        parameters: The trained parameters by name.
        copy: The teacher, if the model cannot be both.
        dtype: Dtype of the frozen weights.
        group: The processes over which student and teacher are cut, None for one.
    """

    pipe: Any
    model: nn.Module
    conversion: Conversion
    parameters: dict[str, nn.Parameter]
    copy: nn.Module | None
    dtype: torch.dtype
    group: Any = None

    def share(self, count: int) -> None:
        """Cut student and teacher over `count` processes each, which compute a batch together.

        Raises:
            ValueError: If diffusers has no plan for the model, or `count` does not divide the processes.
        """
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if world % count:
            raise ValueError(f"run.share: {count} does not divide {world} processes")
        if not has_plan(self.model):
            name = type(self.model).__name__
            raise ValueError(
                f"run.share: a teacher attends over processes as diffusers plans, and a {name} has no plan"
            )
        for model in (self.model, self.copy):
            if model is not None:
                self.group = enable(model, share=count).group

    def to(self, device: torch.device) -> None:
        """Move the student and its teacher; the rest of the pipeline stays where it is."""
        for model in (self.model, self.copy):
            if model is not None:
                model.to(device)

    def seed(self, number: int) -> None:
        """Seed all random numbers that a forward draws: PyTorch's, for dropout, and those of the processors."""
        torch.manual_seed(number)
        model_state(self.model).shared.seed()

    @contextmanager
    def teaching(self, model: Any) -> Iterator[Any]:
        """Return the teacher inside the `with` block, without gradients.

        Args:
            model: The student's model as it is called: with several processes, in the wrapper of `prepare`.
        """
        with torch.no_grad(), ExitStack() as restored:
            if self.copy is None:
                restored.enter_context(self.conversion.bypassed())
                restored.enter_context(_without_lora(self.model))
            yield model if self.copy is None else self.copy

    def compared(self, pattern: str, every: int) -> list[str]:
        """Return the names of the layers whose outputs are compared: one in `every` layers, if it fits the pattern.

        Raises:
            ValueError: If there are none.
        """
        names = [name for name in list(self.conversion.specs)[::every] if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            some = ", ".join(list(self.conversion.specs)[::every][:4])
            one = f"one in {every} of " if every > 1 else ""
            raise ValueError(f"loss.layers: {pattern!r} is none of {one}the converted layers, such as {some}")
        return names


def make_student(config: Config, pipe: Any) -> Student:
    """Convert the denoiser of a pipeline and choose what is trained. Seed PyTorch's random numbers before.

    Raises:
        ValueError: If the processor does not fit, nothing would be trained, or `run.export` cannot hold the result.
        FileNotFoundError: If there is no such adapter.
    """
    name, model = denoiser_of(pipe)
    dtype = computing_dtype(model) or torch.float32
    student, spec = config.student, config.student.spec()
    needs_copy = student.trains_weights or student.adapter is not None
    teacher = copy.deepcopy(model).requires_grad_(False).eval() if needs_copy else None
    if student.adapter is not None:
        if lora_beside(student.adapter):
            raise ValueError(f"student.adapter: {student.adapter} has LoRA layers beside it, which would be left out")
        conversion = load(pipe, student.adapter, spec=None if isinstance(spec, dict) else spec)
        if not (student.trains_weights or model_state(model).originals):
            teacher = None  # the adapter has none of the host's weights
    else:
        options: dict[str, Any] = {"where": student.where, "min_tokens": student.min_tokens}
        conversion = convert(pipe, spec, components=(name,), **options)
    _check_export(config, conversion)  # before LoRA, which renames the projections until it is merged
    if student.init == "random":
        randomise(conversion)
    parameters = choose_trainables(conversion, student)
    if config.run.checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
        model.train()  # diffusers checkpoints in training mode only
    return Student(pipe, model, conversion, parameters, teacher, dtype)


def _check_export(config: Config, conversion: Conversion) -> None:
    """Refuse a student that `run.export` cannot hold."""
    try:
        if config.run.export == "clear":
            check_clear(conversion)
        elif config.run.export == "linfusion":
            check_linfusion(conversion)
    except ValueError as error:
        raise ValueError(f"run.export: {error}") from None


def choose_trainables(conversion: Conversion, student: StudentConfig) -> dict[str, nn.Parameter]:
    """Freeze the model except for the parameters that are trained; return these by name, in float32.

    Raises:
        ValueError: If there are none, or projections are quantised or cannot be told apart.
    """
    model = _model_of(conversion)
    model.requires_grad_(False)
    if student.trainable == "lora":
        _add_lora(conversion, student)
    for parameter in conversion.parameters():
        parameter.requires_grad_(True)
    if student.trainable == "model":
        model.requires_grad_(True)
        frozen = [name for name, parameter in model.named_parameters() if is_quantised(parameter)]
        if frozen:
            raise ValueError(f"{frozen[0]} is quantised: student.trainable must be 'new' or 'lora'")
    if student.trainable == "attention":
        for name, projection in _projections(conversion, student.projections):
            if is_quantised(projection.weight):  # type: ignore[arg-type]
                raise ValueError(f"{name} is quantised: student.trainable must be 'new' or 'lora'")
            projection.requires_grad_(True)
    chosen = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not chosen:
        raise ValueError(
            f"{student.processor} has no parameters of its own: student.trainable must be 'attention', 'model' or "
            "'lora'"
        )
    for parameter in chosen.values():
        parameter.data = parameter.data.float()
    return chosen


def randomise(conversion: Conversion) -> None:
    """Initialise the projections and the processors of the converted layers anew, each as its own class does."""
    for _, projection in _projections(conversion, list(_ROLES)):
        projection.reset_parameters()  # type: ignore[operator]
    for name in conversion.specs:
        for inner in _model_of(conversion).get_submodule(f"{name}.{CHILD}").modules():
            if hasattr(inner, "reset_parameters"):
                inner.reset_parameters()  # type: ignore[operator]


def _model_of(conversion: Conversion) -> nn.Module:
    return next(iter(conversion.models.values()))


def _projections(conversion: Conversion, roles: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the projections of the converted layers by full name.

    Raises:
        ValueError: If a layer's projections are fused.
    """
    for name in conversion.specs:
        own: dict[str, Any] = dict(_model_of(conversion).get_submodule(name).named_modules())
        if any(fused in own for fused in FUSED) and "to_q" not in own:
            raise ValueError(
                f"{name} projects q, k and v at once: unfuse_qkv_projections() before training; where its model never "
                "had them apart, student.trainable must be 'new' or 'model'"
            )
        for role in roles:
            found = next((key for key in _ROLES[role] if isinstance(own.get(key), nn.Linear)), None)
            if found is not None:
                yield f"{name}.{found}", own[found]


def _add_lora(conversion: Conversion, student: StudentConfig) -> None:
    """Add LoRA layers to the projections of the converted layers."""
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415, optional

    names = [name for name, _ in _projections(conversion, student.projections)]
    lora = LoraConfig(r=student.rank, lora_alpha=2 * student.rank, target_modules=names)
    inject_adapter_in_model(lora, _model_of(conversion))


def load_lora(model: Any, folder: Path) -> None:
    """Load the LoRA layers that lie beside an adapter, if there are any."""
    for place in lora_beside(folder):
        model.load_lora_adapter(place, weight_name=_LORA, prefix=None)


def lora_beside(source: str | Path) -> list[Path]:
    """Return the folders of LoRA layers beside an adapter, which may lie in a folder of `source`, as for `load`."""
    root = Path(source)
    places = [root] if (root / CONFIG).exists() else sorted(path.parent for path in root.glob(f"*/{CONFIG}"))
    return [place for place in places if (place / _LORA).exists()]


def merge_lora(model: nn.Module) -> bool:
    """Add LoRA layers into the weights and take them out; return False, with nothing done, if these are quantised."""
    weights = [layer.get_base_layer().weight for _, layer in _lora_layers(model)]
    if any(is_quantised(weight) or weight.itemsize < 2 for weight in weights):
        return False
    for name, layer in _lora_layers(model):
        layer.merge()
        outer, _, own = name.rpartition(".")
        setattr(model.get_submodule(outer), own, layer.get_base_layer())
    return True


@contextmanager
def _without_lora(model: nn.Module) -> Iterator[None]:
    """Switch LoRA layers off inside the `with` block. Peft's own switch also freezes them, which DDP would miss."""
    layers = [layer for _, layer in _lora_layers(model)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "_disable_adapters")]


@contextmanager
def attention_outputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the outputs of attention layers by name; of a layer with two outputs, that of the image tokens.

    A layer that a backward pass runs again after the `with` block is not kept a second time.
    """
    kept: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            kept[name] = output[0] if isinstance(output, tuple) else output

        return keep

    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield kept
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def routed_queries(model: nn.Module) -> Iterator[list[tuple[MoHAttention, Tensor]]]:
    """Keep the queries of each mixture of heads that runs inside the `with` block.

    What is computed of them belongs after the block: inside, gradient checkpointing would compute it again.
    """
    kept: list[tuple[MoHAttention, Tensor]] = []

    def keep(module: Any, args: tuple[Any, ...]) -> None:
        kept.append((module, args[0]))

    hooks = [part.register_forward_pre_hook(keep) for part in model.modules() if isinstance(part, MoHAttention)]
    try:
        yield kept
    finally:
        for handle in hooks:
            handle.remove()
