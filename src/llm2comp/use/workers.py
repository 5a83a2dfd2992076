"""Tasks in several processes of this machine: each takes the next one.

Each process gets one CUDA device, in turn. On a CPU they share the cores evenly.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from llm2comp.errors import RunError
from llm2comp.model.backbone.quiet import quiet_libraries
from llm2comp.system.console import console

DEVICES = "CUDA_VISIBLE_DEVICES"
Item = TypeVar("Item")
Found = TypeVar("Found")


def in_workers(
    task: Callable[[Item], Found], items: Sequence[Item], workers: int, folder: Path
) -> Iterator[Found]:
    """Results as they finish. Each worker logs to `folder`/worker-N.log.

    Raises:
        RunError: a worker died. Llm2CompError: what a task raises.
    """
    context = multiprocessing.get_context("spawn")
    seats: Any = context.SimpleQueue()
    for number in range(workers):
        seats.put((number, device_of(number), folder / f"worker-{number}.log"))
    others = set(multiprocessing.active_children())
    try:
        with ProcessPoolExecutor(
            min(workers, len(items)), context, _sit_down, (seats, threads_of(workers))
        ) as pool:
            try:
                for done in _as_they_finish([pool.submit(task, item) for item in items]):
                    yield done.result()
            # whoever waits for these results has stopped: what is half done can be done again
            except BaseException:
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()
                raise
    except BrokenProcessPool as error:
        logs = str(folder / "worker-*.log")
        raise RunError(
            "a worker died", where=logs, fix="if memory ran out, fewer --workers; then run it again"
        ) from error


def _as_they_finish(tasks: Iterable[Future[Found]]) -> Iterator[Future[Found]]:
    """Like `as_completed`, but it wakes up every second.

    polars, which mteb imports, handles Ctrl-C with SA_RESTART: an endless wait goes on as if
    nothing had happened.
    """
    left = set(tasks)
    while left:
        done, left = wait_for(left, timeout=1, return_when=FIRST_COMPLETED)
        yield from done


def threads_of(workers: int) -> int:
    """Threads per worker: an equal share of this process's threads."""
    return max(1, torch.get_num_threads() // workers)


def device_of(worker: int) -> str | None:
    """The CUDA device of a worker, as `CUDA_VISIBLE_DEVICES` names it; None without one."""
    count = torch.cuda.device_count()
    if not count:
        return None
    named = os.environ.get(DEVICES)
    return (named.split(",") if named else [str(number) for number in range(count)])[worker % count]


def _sit_down(seats: Any, threads: int) -> None:
    """Set up this process as a worker, before it computes anything."""
    # on Ctrl-C the first process speaks, and ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(
        target=_end_with, args=(multiprocessing.parent_process(),), daemon=True
    ).start()
    number, device, log = seats.get()
    if device is not None:
        os.environ[DEVICES] = device
    torch.set_num_threads(threads)
    console.file = Path(log).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 open as long as the process lives
    quiet_libraries()


def _end_with(parent: Any) -> None:
    """End this worker when its parent dies; otherwise it would keep the locks of its run."""
    wait([parent.sentinel])
    os._exit(1)
