"""Ranks as processes, or one as a thread."""

import multiprocessing
import os
import sys
import threading
from multiprocessing.connection import Pipe

from tensorrt_llm.standin.rank import main

FORWARDED = ("TRTLLM", "TLLM")
"""MPI workers are given these of the environment, besides what `env_overrides` says."""


class Rank:
    """Something that can be waited for, and ended."""

    def __init__(self, process):
        self._process = process

    @property
    def pid(self):
        return self._process.pid if isinstance(self._process, multiprocessing.Process) else None

    def join(self, seconds):
        self._process.join(seconds)


def start_ranks(raw, knobs, world, overrides):
    """Start them. The connection to rank 0, what becomes ready when one ends, and them."""
    ours, inbox = Pipe()
    pairs = [Pipe() for _ in range(world - 1)]
    hubs = [hub for hub, _ in pairs]
    jobs = [(raw, knobs, 0, world, hubs, inbox)]
    jobs += [(raw, knobs, rank, world, [spoke], None) for rank, (_, spoke) in enumerate(pairs, 1)]
    if world == 1 and os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS") == "1":
        os.environ.update(overrides or {})
        thread = threading.Thread(target=main, args=jobs[0], daemon=True, name="executor")
        thread.start()
        return ours, [], [thread]
    environment = {k: v for k, v in os.environ.items() if k.startswith(FORWARDED)}
    environment.update(overrides or {})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy"])
    processes = []
    for job in jobs:
        process = context.Process(
            target=_enter, args=(environment, list(sys.path), job), daemon=True
        )
        process.start()
        processes.append(process)
    for connection in (inbox, *hubs, *(spoke for _, spoke in pairs)):
        connection.close()
    return ours, [process.sentinel for process in processes], processes


def _enter(environment, path, job):
    """A worker process has none of its parent's environment but what it is given."""
    for name in [it for it in os.environ if it.startswith((*FORWARDED, "BATON"))]:
        del os.environ[name]
    os.environ.update(environment)
    sys.path[:] = path
    main(*job)
