"""One batch: its noise, the forwards of teacher and student, their losses, and the layer that gave a NaN.

    loss = task * |student - target|^2 + prediction * |student - teacher|^2
           + attention * mean over layers of |a_student - a_teacher|^2 + variance * |var_student - var_teacher|^2
           + guided * |g_student - g_teacher|^2,    g = guidance * with prompt + (1 - guidance) * without
           + balance * mean over mixtures of heads of sum_h f_h P_h

where |.|^2 is a mean over the elements. Guidance multiplies the difference of two predictions, and so its error.
Flow matching: x_t = (1 - s) x_0 + s e, target e - x_0. Diffusion: x_t = sqrt(a) x_0 + sqrt(1 - a) e, target e,
v = sqrt(a) e - sqrt(1 - a) x_0, or x_0: the scheduler's `prediction_type`.

Papers: 'CLEAR' - https://arxiv.org/abs/2412.16112, 'LinFusion' - https://arxiv.org/abs/2409.02097 (1, 0.5, 0.5),
'LiT' - https://arxiv.org/abs/2501.12976 (the variance), 'MoH' - https://arxiv.org/abs/2410.11842 (the balance)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.distill.config import Config, LossConfig
from vision_attn.distill.denoiser import Batch, Interface
from vision_attn.distill.parameters import holds_shards, own
from vision_attn.distill.student import Student, attention_outputs, routed_queries


@dataclass(frozen=True)
class Noisy:
    """A batch with its noise: what both models are given, and what they should predict.

    Attributes:
        call: The denoiser's arguments.
        latents: The noisy latents.
        target: The prediction that the scheduler asks for.
    """

    call: dict[str, Any]
    latents: Tensor
    target: Tensor


class Step:
    """Computes the losses of a batch.

    Args:
        config: `loss`, `data.null_prob` and `run.seed` are used.
        student: The model in training.
        interface: How its denoiser is called.
    """

    def __init__(self, config: Config, student: Student, interface: Interface) -> None:
        self.config, self.student, self.interface = config, student, interface
        self.noising = Noising(student.pipe.scheduler)
        weights = config.loss
        self.layers = student.compared(weights.layers, weights.every) if weights.attention else []

    def noisy(self, batch: Batch, number: int) -> Noisy:
        """Add noise to a batch, and seed the random numbers of the models.

        All of it follows from `run.seed` and `number` alone, so that a run that was stopped goes on exactly.
        """
        generator = torch.Generator().manual_seed(self.config.run.seed * 7_368_787 + number)
        self.student.seed(generator.initial_seed())
        clean = batch.latents
        timesteps = self.noising.draw(len(clean), self.config.loss.noise_levels, generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        chosen = torch.rand(len(clean), generator=generator) < self.config.data.null_prob
        if self.config.loss.guided:
            half = len(clean) // 2
            batch = batch.twice(half)
            clean, timesteps, noise = batch.latents, timesteps[:half].repeat(2), torch.cat([noise[:half]] * 2)
            chosen = torch.arange(2 * half) >= half
        latents = self.noising.add(clean, noise, timesteps)
        call = self.interface.arguments(latents.to(self.student.dtype), timesteps, batch.without_prompts(chosen))
        return Noisy(call, latents, self.noising.target(clean, noise, timesteps))

    def losses(self, model: Any, noisy: Noisy) -> dict[str, Tensor]:
        """Return the losses by name, and 'total'.

        Args:
            model: The student's model as it is called: with several processes, in the wrapper of `prepare`.
            noisy: What `noisy` returned.
        """
        weights, student = self.config.loss, self.student
        taught = self._taught(model, noisy) if weights.prediction or weights.guided or self.layers else None
        learned = self._forward(model, student.model, noisy)
        if taught is None and weights.variance and learned.variance is not None:
            taught = self._taught(model, noisy)
        return distillation_losses(learned, taught or learned, noisy.target, weights, student.group)

    def _taught(self, model: Any, noisy: Noisy) -> "Outputs":
        with self.student.teaching(model) as teacher:
            return self._forward(teacher, self.student.copy or self.student.model, noisy)

    def _forward(self, model: Any, inner: Any, noisy: Noisy) -> "Outputs":
        with attention_outputs(inner, self.layers) as attention, routed_queries(inner) as queries:
            output = model(**noisy.call)[0]
        loads = [mixture.balance(q) for mixture, q in queries] if self.config.loss.balance else []
        outputs = Outputs.of(output, noisy.latents, dict(attention))
        return replace(outputs, balance=torch.stack(loads).mean()) if loads else outputs


@dataclass(frozen=True)
class Outputs:
    """What one forward of a denoiser gave.

    Attributes:
        prediction: Like the latents.
        variance: The learned variances, None if the model has none.
        attention: Outputs of the compared layers by name.
        balance: Mean over the layers of the loss of the load, None if no layer is a mixture of heads.
    """

    prediction: Tensor
    variance: Tensor | None
    attention: Mapping[str, Tensor]
    balance: Tensor | None = None

    @classmethod
    def of(cls, output: Tensor, latents: Tensor, attention: Mapping[str, Tensor]) -> "Outputs":
        """Split a denoiser's output for `latents`: with twice their channels, the second half are variances."""
        if output.dim() == 4 and output.shape[1] == 2 * latents.shape[1]:
            prediction, variance = output.chunk(2, dim=1)
            return cls(prediction, variance, attention)
        return cls(output, None, attention)


def distillation_losses(
    student: Outputs, teacher: Outputs, target: Tensor, weights: LossConfig, group: Any = None
) -> dict[str, Tensor]:
    """Return all losses by name, unweighted, and their weighted sum as 'total'. A loss of weight 0 is left out.

    Args:
        student: With gradients.
        teacher: Without gradients.
        target: The prediction that the scheduler asks for.
        weights: The factors of the sum.
        group: Processes that share each picture, which have whole predictions and slices of the layers' outputs. The
            losses are then those of the whole picture, and the sum over the processes of what a parameter gets is its
            gradient. None for one process.
    """
    losses: dict[str, Tensor] = {}
    if weights.task:
        losses["task"] = _mse(student.prediction, target)
    if weights.prediction:
        losses["prediction"] = _mse(student.prediction, teacher.prediction)
    if weights.guided:
        losses["guided"] = _mse(*(_guided(o.prediction, weights.guidance) for o in (student, teacher)))
    if weights.attention and student.attention:
        pairs = [(student.attention[name], teacher.attention[name]) for name in student.attention]
        each = torch.stack([_mse(*pair) for pair in pairs])
        if weights.relative:
            squares = torch.stack([a.float().square().mean() for _, a in pairs])
            each = each / (squares if group is None else _over_slices(squares, pairs, group)).clamp(min=1e-12)
        losses["attention"] = (each if group is None else _over_slices(each, pairs, group)).mean()
    if weights.variance and student.variance is not None and teacher.variance is not None:
        losses["variance"] = _mse(student.variance, teacher.variance)
    if weights.balance and student.balance is not None:
        whole = student.balance  # of all tokens, in each process
        share = whole if group is None else whole / torch.distributed.get_world_size(group)
        losses["balance"] = share + (whole - share).detach()
    total = torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()
    return {**losses, "total": total}


def _guided(prediction: Tensor, guidance: float) -> Tensor:
    """Return what guidance makes of a prediction: the first half of the batch has prompts, the second has none."""
    prompted, unprompted = prediction.float().chunk(2)
    return guidance * prompted + (1 - guidance) * unprompted


def _over_slices(each: Tensor, pairs: list[tuple[Tensor, Tensor]], group: Any) -> Tensor:
    """Return each layer's mean over all tokens, whose gradient is that of the own slices' part of it."""
    held = torch.tensor([float(a.numel()) for a, _ in pairs], device=each.device)
    parts = torch.stack([held, held * each.detach()])
    torch.distributed.all_reduce(parts, group=group)
    own = each * held / parts[0]
    return own + (parts[1] / parts[0] - own).detach()


def _mse(a: Tensor, b: Tensor) -> Tensor:
    return F.mse_loss(a.float(), b.float())


class Noising:
    """Adds noise as a pipeline's scheduler defines it, at the scheduler's own training timesteps.

    Args:
        scheduler: One of flow matching, or one with `alphas_cumprod`. It is not changed.

    Raises:
        ValueError: If no loss is known for the scheduler's `prediction_type`.
    """

    def __init__(self, scheduler: Any) -> None:
        fresh = type(scheduler).from_config(scheduler.config)  # the grid of training, not that of the last call
        self.flow = hasattr(fresh, "scale_noise")
        self.kind = "flow" if self.flow else fresh.config.get("prediction_type", "epsilon")
        if self.kind not in ("flow", "epsilon", "v_prediction", "sample"):
            raise ValueError(f"no loss is known for a scheduler whose prediction_type is {self.kind!r}")
        if self.flow:
            self.timesteps, self.levels = fresh.timesteps.float().cpu(), fresh.sigmas[: len(fresh.timesteps)].cpu()
        else:
            alphas = fresh.alphas_cumprod.double().cpu()
            self.timesteps = torch.arange(len(alphas) - 1, -1, -1)
            noise, picture = (1 - alphas).sqrt().flip(0), alphas.sqrt().flip(0)
            self.levels, self.alphas = noise / (noise + picture), alphas

    def draw(self, batch_size: int, how: str, generator: torch.Generator) -> Tensor:
        """Draw timesteps `[B]`: see `LossConfig.noise_levels`."""
        from diffusers.training_utils import compute_density_for_timestep_sampling  # noqa: PLC0415, optional

        u = compute_density_for_timestep_sampling(
            how, batch_size, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=generator
        )
        return self.timesteps[(u * len(self.timesteps)).long().clamp(max=len(self.timesteps) - 1)]

    def at_level(self, level: float) -> Tensor:
        """Return the timestep `[1]` nearest to a noise level s: s parts noise to 1 - s parts picture."""
        return self.timesteps[(self.levels - level).abs().argmin()][None]

    def _parts(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of picture and noise, `[B, 1, ...]`."""
        timesteps = timesteps.cpu()
        if self.flow:
            place = (self.timesteps - timesteps[:, None].to(self.timesteps)).abs().argmin(1)
            noise = self.levels[place].double()
            picture = 1 - noise
        else:
            alpha = self.alphas[timesteps.long()]
            picture, noise = alpha.sqrt(), (1 - alpha).sqrt()
        shape = (-1, *[1] * (like.dim() - 1))
        return picture.to(like).view(shape), noise.to(like).view(shape)

    def add(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents."""
        picture_part, noise_part = self._parts(timesteps, clean)
        return picture_part * clean + noise_part * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser should predict."""
        if self.kind == "flow":
            return noise - clean
        if self.kind == "epsilon":
            return noise
        if self.kind == "sample":
            return clean
        picture_part, noise_part = self._parts(timesteps, clean)
        return picture_part * noise - noise_part * clean


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite."""


def explain(step: int, what: str, computing: Step, noisy: Noisy) -> NonFiniteError:
    """Run the student once more on the batch; return an error that names the first layer with a NaN or an infinity."""
    model, parameters = computing.student.model, computing.student.parameters
    bad = [name for name, p in parameters.items() if not torch.isfinite(own(p)).all()]
    if bad:
        where: str | None = f"parameters are not finite: {', '.join(bad[:4])}"
    elif holds_shards(parameters):  # the other processes would have to run the model too
        where = "a sharded model is not searched for the layer"
    else:
        where = _first_layer(model, noisy)
    if where is None:
        gradients = [
            name for name, p in parameters.items() if p.grad is not None and not torch.isfinite(own(p.grad)).all()
        ]
        named = f"its first non-finite gradients are those of {', '.join(gradients[:4])}"
        where = f"the forward pass is finite; {named}" if gradients else "the forward pass is finite here"
    return NonFiniteError(
        f"step {step}: {what} is not finite; {where}. Lower optimizer.learning_rate, keep optimizer.clip at 1, or "
        "compute in bf16 rather than fp16"
    )


def _first_layer(model: nn.Module, noisy: Noisy) -> str | None:
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(t, Tensor) and not torch.isfinite(t).all() for t in tensors):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(**noisy.call)
    finally:
        for handle in hooks:
            handle.remove()
    return f"the first layer whose output is not finite: {found[0]}" if found else None
