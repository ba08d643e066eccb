"""Two processes (gloo) that learn together, are killed, and go on.

They run on the CPU and see no GPU. PyTorch's barrier uses the accelerator of the machine, whatever the process group
uses, so on a machine with one GPU the second process would ask for a second GPU.
"""

import gc
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate.state import DistributedType, PartialState
from distill_case import arguments, metrics, settings, write_images
from torch.nn.parallel import DistributedDataParallel

from vision_attn.demo import load_teacher
from vision_attn.distill.cache import write_cache
from vision_attn.distill.loop import train

ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["vision_attn.distill.loop", "vision_attn.demo", "accelerate.state"])


class Forks:
    """Two processes that have imported everything already, with the variables that torchrun sets.

    They are forks of a server that has only imported: a fork of this process, whose threads do not come with it,
    can wait for one of them for ever.
    """

    def __init__(self, config):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        # daemons, so that one that waits for ever does not keep pytest from ending
        self.processes = [SERVER.Process(target=self._run, args=(config, rank, port), daemon=True) for rank in range(2)]
        with patch.dict(os.environ, ON_CPU):  # the server starts with the first process
            for process in self.processes:
                process.start()

    @classmethod
    def _run(cls, config, rank, port):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **ON_CPU}
        cls.prepare()
        with patch("torch.distributed.destroy_process_group", cls._destroy):
            train(config)

    @staticmethod
    def _destroy(group=None, destroy=torch.distributed.destroy_process_group):
        """DDP is gone before its group: as the group's last owner it could wait for gloo's threads for ever."""
        assert not any(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
        destroy(group)

    @staticmethod
    def prepare():
        """Set what accelerate's configuration would."""

    def alive(self):
        return all(process.is_alive() for process in self.processes)

    def kill(self):
        for process in self.processes:
            process.kill()  # SIGKILL, as kill -9
            process.join()

    def finish(self):
        for process in self.processes:
            process.join(120)
        assert [process.exitcode for process in self.processes] == [0, 0]


class Sharded(Forks):
    """Forks whose parameters are spread over both (FSDP 2). Accelerate does so for GPUs only, and is told of some."""

    @staticmethod
    def prepare():
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class Sharing(Forks):
    """Forks that compute one batch together. diffusers divides by the number of accelerators, and a CPU has none."""

    @staticmethod
    def prepare():
        torch.accelerator.device_count = lambda: 1


class SharingShards(Sharing):
    """The same, with parameters that are spread over both too."""

    @staticmethod
    def prepare():
        Sharded.prepare()
        Sharing.prepare()


class Launched:
    """The same by the command: torchrun, because `accelerate launch` starts CPU processes through MPI only."""

    COMMAND = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

    def __init__(self, config):
        self.process = subprocess.Popen(
            [*self.COMMAND, "-m", "vision_attn.distill", *arguments(config.run.out.parent, **LONG)],
            env=os.environ | ON_CPU,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def alive(self):
        return self.process.poll() is None

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self):
        output, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, output[:3000]


def wait_for(root, step, running):
    """Wait until a step is in the metrics."""
    path, end = root / "out" / "metrics.jsonl", time.monotonic() + 90
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert running.alive() and time.monotonic() < end
        time.sleep(0.01)


def states(root):
    """Return what the complete checkpoints say of themselves, the oldest first."""
    return [json.loads(path.read_text()) for path in sorted((root / "out").glob("checkpoint-*[0-9]/state.json"))]


def adapter(root):
    return safetensors.torch.load_file(root / "out" / "adapter" / "vision_attn.safetensors")


def kill_and_go_on(start, config, root, step):
    """Kill a run with `kill -9` after a step and start it again; return the totals before by step, and all lines."""
    running = start(config)
    wait_for(root, step, running)
    running.kill()
    assert 0 < states(root)[-1]["step"] < config.run.steps
    before = {line["step"]: line["total"] for line in metrics(root)}
    start(config).finish()
    return before, metrics(root)


def check_trained(root):
    """What was trained is in the adapter, and nothing else."""
    tensors, untrained = adapter(root), load_teacher("nano").transformer.state_dict()
    roles = (".to_q.", ".to_k.", ".to_v.", ".to_out.", ".vision_attn.")
    assert tensors and all(any(role in name for role in roles) for name in tensors)
    assert not any(torch.equal(tensor, untrained[name]) for name, tensor in tensors.items() if name in untrained)


SHORT = dict(run__steps=7, run__save_every=3, optimizer__ema=0.8)
LONG = dict(run__steps=20, run__save_every=4, run__keep=9, run__sheet_every=6, optimizer__ema=0.8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    write_images(root / "images", count=8)
    write_cache(settings(root))
    return root


@pytest.fixture(scope="module")
def killed(root):
    return kill_and_go_on(Forks, settings(root, **SHORT), root, 5)


def test_two_processes_go_on_exactly_after_kill_9(root, killed):
    before, lines = killed
    assert [line["step"] for line in lines] == list(range(1, 8)) and {4, 5} <= set(before)  # from the checkpoint of 3
    assert all(line["total"] == before[line["step"]] for line in lines if line["step"] in before)  # to the last digit
    assert all(state["processes"] == 2 and len(set(state["checksums"])) == 1 for state in states(root))
    assert all(line["norm"] > 0 for line in lines)
    check_trained(root)


def test_a_sharded_model_learns_what_two_whole_ones_learn(root, killed, tmp_path):
    config = settings(root, **SHORT | dict(run__steps=2, run__out=tmp_path / "out"))
    Sharded(config).finish()
    (state,) = states(tmp_path)
    assert state["processes"] == 2 and len(set(state["checksums"])) == 2
    for sharded, whole in zip(metrics(tmp_path), killed[1], strict=False):
        assert sharded == pytest.approx(whole, rel=1e-4)
    check_trained(tmp_path)
    assert set(adapter(tmp_path)) == set(adapter(root))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "trainable"), [(Sharing, "attention"), (Sharing, "lora"), (SharingShards, "attention")]
)
def test_two_processes_that_share_a_batch_learn_what_one_learns(root, tmp_path, start, trainable):
    """Tokens are cut over both, the teacher's too: as the model itself with LoRA, as a copy of it otherwise."""
    more = dict(student__trainable=trainable, loss__task=0.5, run__checkpointing="true", run__save_every=0)
    shared = settings(root, **SHORT | more | dict(run__share=2, run__steps=3, run__out=tmp_path / "shared" / "out"))
    start(shared).finish()
    alone = settings(root, **SHORT | more | dict(run__steps=3, run__out=tmp_path / "alone" / "out"))
    train(alone)
    lines = metrics(tmp_path / "alone")
    assert lines[0]["attention"] > 0 and lines[0]["prediction"] > 0
    for found, expected in zip(metrics(tmp_path / "shared"), lines, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    for name, tensor in adapter(tmp_path / "alone").items():
        torch.testing.assert_close(adapter(tmp_path / "shared")[name], tensor, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_the_load_of_a_shared_batch_is_learned_once(tmp_path):
    """Each process routes the tokens of all, and the gradients of all are added."""
    fields = {"spec": {"class": "Clear", "radius": 3}, "share": 0.5, "shared": 0}
    more = dict(model__base="emoji:base", student__processor="MoH", student__fields=fields, loss__balance=5.0)
    more |= dict(run__steps=2, run__save_every=0, optimizer__clip=0)
    write_images(tmp_path / "images", count=4)
    write_cache(settings(tmp_path, **more))
    Sharing(settings(tmp_path, **more, run__share=2, run__out=tmp_path / "shared" / "out")).finish()
    train(settings(tmp_path, **more))
    for found, expected in zip(metrics(tmp_path / "shared"), metrics(tmp_path), strict=True):
        assert expected["balance"] > 0.5 and found == pytest.approx(expected, rel=1e-4)


def test_a_batch_is_not_shared_by_processes_that_are_not_there(root, tmp_path):
    with pytest.raises(ValueError, match=r"run\.share: 2 does not divide 1 processes"):
        train(settings(root, run__share=2, run__out=tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("start", [Forks, Sharded, Launched])
def test_a_long_run_of_two_processes_goes_on_exactly_after_kill_9(start, tmp_path):
    root = tmp_path
    write_images(root / "images", count=8)
    config = settings(root, **LONG)
    write_cache(config)
    before, stopped = kill_and_go_on(start, config, root, 6)
    assert [line["step"] for line in stopped] == list(range(1, 21))
    assert all(line["total"] == before[line["step"]] for line in stopped if line["step"] in before)
    for state in states(root):
        assert state["processes"] == 2 and len(set(state["checksums"])) == (2 if start is Sharded else 1)
    check_trained(root)
    tensors = adapter(root)
    (root / "out").rename(root / "stopped")
    start(config).finish()
    assert metrics(root) == stopped  # to the last digit
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapter(root).items())
    losses = [line["prediction"] for line in stopped]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:4])
