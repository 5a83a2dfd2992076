"""What workers are given to do in tests/test_workers.py. Imports little, as each worker does it."""

import os
import signal
import time

import torch


def dies(_):
    os.kill(os.getpid(), signal.SIGKILL)


def waits(file):
    """Says who it is, and then works for ten minutes."""
    file.with_suffix(".part").write_text(str(os.getpid()))
    file.with_suffix(".part").rename(file)
    time.sleep(600)


def waits_or_fails(file):
    """`waits` for a name of a number; else fails in a way that nobody foresaw, once another one is
    at work.
    """
    if file.name.isdigit():
        waits(file)
    while not file.with_name("0").exists():
        time.sleep(0.05)
    return 1 / 0


def tells(meeting):
    """What a worker sees of the machine, once another one has come to the folder `meeting`."""
    (meeting / str(os.getpid())).touch()
    while len(list(meeting.iterdir())) < 2:  # a worker that starts late would find nothing to do
        time.sleep(0.05)
    return os.getpid(), torch.get_num_threads(), os.environ.get("CUDA_VISIBLE_DEVICES")
