"""Two processes (gloo) that learn together, are killed, and go on."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from distill_case import arguments, metrics, settings, write_images

from vision_attn.demo import load_teacher
from vision_attn.distill.cache import write_cache
from vision_attn.distill.loop import train

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
        self.processes = [SERVER.Process(target=self._run, args=(config, rank, port)) for rank in range(2)]
        for process in self.processes:
            process.start()

    @classmethod
    def _run(cls, config, rank, port):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        AcceleratorState._reset_state(True)
        cls.prepare()
        train(config)

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
    """Forks whose parameters are spread over both (FSDP 2). Accelerate does it for GPUs only: it is told of some."""

    @staticmethod
    def prepare():
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class Launched:
    """The same by the command: `accelerate launch` starts CPU processes through MPI only, so torchrun does it here."""

    COMMAND = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

    def __init__(self, config):
        self.process = subprocess.Popen(
            [*self.COMMAND, "-m", "vision_attn.distill", *arguments(config.run.out.parent, **CHANGES)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
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


STEPS = 20
CHANGES = dict(run__steps=STEPS, run__save_every=4, run__keep=9, run__sheet_every=6, optimizer__ema=0.8)


def wait_for(root, step, running):
    """Wait until a step is in the metrics."""
    path, end = root / "out" / "metrics.jsonl", time.monotonic() + 90
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert running.alive() and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("start", [Forks, Sharded, pytest.param(Launched, marks=pytest.mark.slow)])
def test_two_processes_learn_the_same_and_go_on_exactly_after_kill_9(start, tmp_path):
    root = tmp_path
    write_images(root / "images", count=8)
    config = settings(root, **CHANGES)
    write_cache(config)
    running = start(config)
    wait_for(root, 6, running)
    running.kill()
    states = sorted((root / "out").glob("checkpoint-*[0-9]/state.json"))
    assert states and json.loads(states[-1].read_text())["step"] < STEPS
    before = {line["step"]: line["total"] for line in metrics(root)}
    start(config).finish()
    stopped = metrics(root)
    assert [line["step"] for line in stopped] == list(range(1, STEPS + 1))
    assert all(line["total"] == before[line["step"]] for line in stopped if line["step"] in before)
    for state in (json.loads(path.read_text()) for path in (root / "out").glob("checkpoint-*/state.json")):
        assert state["processes"] == 2 and len(set(state["checksums"])) == (2 if start is Sharded else 1)
    adapter = safetensors.torch.load_file(root / "out" / "adapter" / "vision_attn.safetensors")
    roles = (".to_q.", ".to_k.", ".to_v.", ".to_out.", ".vision_attn.")  # what is trained, and nothing else
    assert all(any(role in name for role in roles) for name in adapter)
    assert all(line["norm"] > 0 for line in stopped)
    untrained = load_teacher("nano").transformer.state_dict()
    assert not any(torch.equal(tensor, untrained[name]) for name, tensor in adapter.items() if name in untrained)
    (root / "out").rename(root / "stopped")
    start(config).finish()
    assert metrics(root) == stopped  # to the last digit
    whole = safetensors.torch.load_file(root / "out" / "adapter" / "vision_attn.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in adapter.items())
    losses = [line["prediction"] for line in stopped]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:4])
