"""Processes of one group (gloo, on the CPU) that run functions of the tests and answer what they return.

They are forks of a server that has imported everything, so that a group starts in a second; they see no GPU.
"""

import importlib
import multiprocessing
import os
import socket
import traceback
from unittest.mock import patch

SERVER = multiprocessing.get_context("forkserver")
PRELOAD = ["torch", "torch.distributed", "torch.distributed._functional_collectives", "vision_attn.parallel"]
VARIABLES = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Group:
    """Processes that wait for work.

    Args:
        size: How many.
        preload: Modules that the server of forks imports.
    """

    def __init__(self, size, preload=PRELOAD):
        SERVER.set_forkserver_preload(preload)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.size, self.pipes, self.processes = size, [], []
        with patch.dict(os.environ, VARIABLES):
            for rank in range(size):
                ours, theirs = SERVER.Pipe()
                process = SERVER.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
                process.start()
                self.pipes.append(ours)
                self.processes.append(process)

    def run(self, name, *args, seconds=120):
        """Return what the function `module:name` returns in each process; it gets its rank first.

        Raises:
            RuntimeError: If one raised; with its traceback.
            TimeoutError: If one does not answer in time.
        """
        self.begin(name, *args)
        return [self.answer(rank, seconds) for rank in range(self.size)]

    def begin(self, name, *args):
        """Let every process run a function."""
        for pipe in self.pipes:
            pipe.send((name, args))

    def answer(self, rank, seconds=120):
        """Return what a process returned."""
        if not self.pipes[rank].poll(seconds):
            raise TimeoutError(f"rank {rank} did not answer in {seconds} s")
        good, value = self.pipes[rank].recv()
        if not good:
            raise RuntimeError(f"rank {rank}: {value}")
        return value

    def close(self):
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe, rank, size, port):
    import torch

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    while True:
        name, args = pipe.recv()
        module, _, function = name.partition(":")
        try:
            torch.manual_seed(0)
            pipe.send((True, getattr(importlib.import_module(module), function)(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
