"""Tasks in several processes: a process that dies is told, and none outlives the first one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from llm2comp.errors import RunError
from llm2comp.use.workers import device_of, in_workers, threads_of
from worker_tasks import dies, tells, waits_or_fails


@pytest.mark.thorough
def test_a_worker_that_dies_is_told(tmp_path):
    with pytest.raises(RunError, match=r"(?s)a worker died.*fewer --workers"):
        list(in_workers(dies, [0, 1], 2, tmp_path))


@pytest.mark.thorough
def test_an_error_ends_all_workers(tmp_path):
    """As Ctrl-C does: nobody waits for what the others are at."""
    with pytest.raises(ZeroDivisionError):
        list(in_workers(waits_or_fails, [tmp_path / "0", tmp_path / "x"], 2, tmp_path))
    assert not psutil.pid_exists(int((tmp_path / "0").read_text()))


@pytest.mark.thorough
def test_workers_share_the_cores_and_take_devices_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    assert (threads_of(2), threads_of(8)) == (2, 1)
    (meeting := tmp_path / "meeting").mkdir()
    found = list(in_workers(tells, [meeting] * 4, 2, tmp_path))
    assert {(threads, device) for _, threads, device in found} == {(2, "3"), (2, "GPU-5f")}
    assert os.getpid() not in {process for process, *_ in found}


@pytest.mark.parametrize(
    ("named", "count", "expected"),
    [
        (None, 2, ["0", "1", "0"]),
        ("3,GPU-5f", 2, ["3", "GPU-5f", "3"]),
        (None, 0, [None] * 3),
        ("", 0, [None] * 3),
    ],
)
def test_device_of_a_worker(named, count, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert [device_of(worker) for worker in range(3)] == expected


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["killed", "ctrl-c"])
def test_workers_end_with_the_first_process(how, tmp_path):
    """Killed, it can tell nobody; Ctrl-C at a terminal reaches all of them."""
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from pathlib import Path
from worker_tasks import waits
from llm2comp.use.workers import in_workers
if __name__ == "__main__":
    here = Path({str(tmp_path)!r})
    list(in_workers(waits, [here / str(n) for n in range(2)], 2, here))
"""
    file = tmp_path / "first.py"
    file.write_text(code)
    first = subprocess.Popen(
        [sys.executable, file], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 400
    while not all((tmp_path / str(n)).exists() for n in range(2)):
        assert first.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.1)
    workers = [psutil.Process(int((tmp_path / str(n)).read_text())) for n in range(2)]
    if how == "killed":
        first.kill()
    else:
        os.killpg(first.pid, signal.SIGINT)
    gone, alive = psutil.wait_procs(workers, timeout=30)
    for process in alive:
        process.kill()
    assert len(gone) == 2
    said = first.communicate(timeout=60)[1]
    assert "worker died" not in said
    assert said.rstrip().endswith("KeyboardInterrupt") == (how == "ctrl-c"), said
