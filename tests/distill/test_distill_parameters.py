"""What is restored from a checkpoint lies where the run that goes on has it; averages come and go without a trace."""

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from distill_case import settings
from torch import nn

from vision_attn.distill.config import OptimizerConfig
from vision_attn.distill.loop import accelerated
from vision_attn.distill.output import Checkpoints
from vision_attn.distill.parameters import Averaging, make_optimizer, make_schedule


class Run:
    """All that a run writes into its checkpoints, with the trained parameters on a device."""

    def __init__(self, config, accelerator, device):
        self.parameters = {name: nn.Parameter(torch.rand(size, device=device)) for name, size in (("a", 3), ("b", 4))}
        trained = list(self.parameters.values())
        bare = make_optimizer(config.optimizer, trained)
        self.schedule = make_schedule(config.optimizer, bare, config.run.steps)
        self.optimizer = accelerator.prepare(bare)
        self.averaging = Averaging(config.optimizer, trained, bare)
        accelerator.register_for_checkpointing(self.schedule, self.averaging)
        self.checkpoints = Checkpoints(config, accelerator, self.parameters)

    def update(self):
        for parameter in self.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.schedule.step()
        self.averaging.update()

    def tensors(self):
        """Return every tensor with one value for each of a parameter, by what holds it."""
        state = self.optimizer.state_dict()["state"]
        moments = {f"{key} {name}": t for key, values in state.items() for name, t in values.items() if t.dim()}
        means = {f"mean {i}": tensor for i, tensor in enumerate(self.averaging.ema.shadow_params)}
        return self.parameters | moments | means


def test_what_a_checkpoint_restores_lies_beside_the_parameters(tmp_path):
    """Files are read to the CPU. The device 'meta' stands for a GPU: a tensor that stayed on the CPU is seen."""
    config = settings(tmp_path, optimizer__ema=0.9, optimizer__schedule="cosine")
    with accelerated(config) as accelerator:
        first = Run(config, accelerator, "cpu")
        first.update()
        first.checkpoints.save(1)
    with accelerated(config) as accelerator:
        second = Run(config, accelerator, "meta")
        assert second.checkpoints.resume() == 1
        restored = second.tensors()
        assert set(restored) == set(first.tensors()) and len(restored) == 8
        assert {name: tensor.device.type for name, tensor in restored.items()} == dict.fromkeys(restored, "meta")
        second.update()  # mixing the devices is an error
    with accelerated(config) as accelerator:
        third = Run(config, accelerator, "cpu")
        third.checkpoints.resume()
        assert all(torch.equal(tensor, third.tensors()[name]) for name, tensor in first.tensors().items())
        assert third.schedule.state_dict() == first.schedule.state_dict()


class ScheduleFree(torch.optim.SGD):
    """Schedule-free SGD: in training the parameters lie between the iterate z and the mean x, and `eval` gives x."""

    learning = False

    def _move(self, to_mean):
        for p in self.param_groups[0]["params"]:
            z = self.state[p].setdefault("z", p.detach() - 0.7)
            p.data.lerp_(z, 1 - 1 / 0.9 if to_mean else 1 - 0.9)

    def eval(self):
        if self.learning:
            self._move(True)
        self.learning = False

    def train(self):
        if not self.learning:
            self._move(False)
        self.learning = True


@pytest.mark.parametrize("ema", [0.0, 0.9], ids=["no-mean", "mean"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, ScheduleFree])
def test_the_parameters_that_learn_come_back_bit_for_bit(kind, ema):
    parameter = nn.Parameter(torch.rand(1000))
    averaging = Averaging(OptimizerConfig(ema=ema), [parameter], kind([parameter], lr=0.1))
    averaging.begin()
    averaging.update()
    parameter.data += 0.1
    before = parameter.detach().clone()
    with pytest.raises(KeyboardInterrupt), averaging.evaluated():
        assert torch.equal(parameter, before) == (kind is torch.optim.SGD and not ema)
        raise KeyboardInterrupt
    assert torch.equal(parameter, before)
    assert getattr(averaging.optimizer, "learning", True)


@pytest.mark.parametrize("earlier", [False, True], ids=["first", "after-another"])
def test_a_run_leaves_the_process_as_it_was(earlier, tmp_path):
    AcceleratorState._reset_state(True)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    if earlier:
        from accelerate import Accelerator

        mine = Accelerator(mixed_precision="no")
    with accelerated(settings(tmp_path, run__precision="bf16")) as accelerator:
        assert accelerator.mixed_precision == "bf16" and not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    if earlier:
        assert mine.mixed_precision == "no" and mine.num_processes == 1
        AcceleratorState._reset_state(True)
    assert AcceleratorState._shared_state == {} == PartialState._shared_state
