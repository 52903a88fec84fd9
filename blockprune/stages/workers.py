"""Worker processes on one machine: each does its part of the same work, and takes over what a dead one has left."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from blockprune.errors import UserError, explanation, redacted
from blockprune.model.device import device_of
from blockprune.model.model import Model, load_model
from blockprune.progress import Listener
from blockprune.stages.fields import Shared

POLL_S = 0.5


def started(n: int, work: Callable[[int], None], progress: Listener) -> Iterator[None]:
    """Calls `work(0)` to `work(n - 1)`, each in a process of its own, and comes back again and again until all have ended.

    `work` is pickled. UserError when all have died; of fewer a line is said.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(n)]
    processes = [context.Process(target=_apart, args=(work, i, errors), daemon=True) for i, (_, errors) in enumerate(pipes)]
    for process in processes:
        process.start()
    try:
        yield from _wait(processes, [errors for errors, _ in pipes], progress)
    finally:
        for process in processes:
            process.terminate()


def _wait(processes: Sequence[BaseProcess], errors: Sequence[Connection], progress: Listener) -> Iterator[None]:
    reported: set[int | None] = set()
    while any(process.is_alive() for process in processes):
        for i, process in enumerate(processes):
            if process.exitcode and process.pid not in reported:
                reported.add(process.pid)
                why = errors[i].recv() if errors[i].poll() else f"exit code {process.exitcode}"
                progress.say(f"worker {i + 1} died ({why}); others take over its work", "red")
        yield
        time.sleep(POLL_S)
    if all(process.exitcode for process in processes):
        raise UserError("all workers died: see their messages above; the same command goes on from here")


def _apart(work: Callable[[int], None], number: int, errors: Connection) -> None:
    """A worker process. What a user or the system can mend of its failure goes to `errors` in a line."""
    try:
        work(number)
    except Exception as err:
        if (line := explanation(err)) is None:
            raise
        errors.send(redacted(line))
        sys.exit(2)


def own_model(request: Shared, number: int) -> Model:
    """The model of a worker process, which gets its share of the processor's threads, and the GPU of its number."""
    torch.set_num_threads(max(1, torch.get_num_threads() // request.workers))
    device = request.device
    if device in (None, "cuda") and (n_gpus := torch.cuda.device_count()):
        device = f"cuda:{number % n_gpus}"
    return load_model(request.model, request.resolution, device_of(device), getattr(torch, request.dtype))
