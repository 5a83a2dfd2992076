"""A study by several processes is the study by one; a process that dies is told, and none outlives
the first one.
"""

import json
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
from llm2comp.lab.study.definition import load_study
from llm2comp.lab.study.grid import runs_of
from llm2comp.lab.study.jobs import Bench, Outcome, groups
from llm2comp.lab.study.running import study
from llm2comp.lab.study.workers import outcomes
from llm2comp.use.workers import device_of, threads_of
from study_example import weights, write_study
from tiny_run import assert_refused, cli


def test_two_workers_do_what_one_does(tmp_path):
    """Failures as well: the diverging system is told, the others go on."""
    mad = {"learning_rate": 1e30, "floor_learning_rate": 0.0}
    systems = {"long": {}, "short": {"scl.steps": 1}, "bad": {"pretext.schedule": mad}}
    file = write_study(tmp_path, systems=systems, training_free=["mean"], models=["tfidf"])
    one, two = tmp_path / "one", tmp_path / "two"
    with pytest.raises(RunError, match="failed: bad-seed0, bad-seed1"):
        study(file, one)
    said = cli("study", file, "--out", two, "--workers", 2)
    assert_refused(said, "failed: bad-seed0, bad-seed1")
    for name in ("results.json", "table.csv", "table.md", "averages.svg"):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    table = json.loads((two / "results.json").read_text())["table"]
    assert [row["system"] for row in table if row["average_mean"] is not None] == [
        "mean",
        "tfidf",
        *["long", "short"] * 2,
    ]
    assert all("not finite" in row["failed"] for row in table if row["system"] == "bad")
    names = [f"{system}-seed{seed}" for system in ("long", "short") for seed in (0, 1)]
    for name in names:
        assert weights(two / "runs" / name) == weights(one / "runs" / name)
    done = [line for line in said.err.splitlines() if line.startswith("run ")]
    assert [line.split(" ")[1] for line in done] == [f"{number}/6" for number in range(1, 7)]
    assert sum("scl trained" in line and "pretext from long" in line for line in done) == 2, (
        "one worker has both"
    )
    logs = [(two / f"worker-{number}.log").read_text() for number in (0, 1)]
    assert all("Local-One" in log for log in logs), "vacuous: one did all"
    summaries = [json.loads((out / "scores" / "summary.json").read_text()) for out in (one, two)]
    assert len(summaries[0]) == len(summaries[1]) > 6, "a row was lost"


def test_runs_that_can_share_a_stage_are_one_job(tmp_path):
    systems = {
        "A": {},
        "B": {"scl.steps": 1},
        "C": {"pretext": None},
        "D": {"pretext": None, "scl": None},
        "E": {"memory.tokens": 2},
    }
    file = write_study(tmp_path, systems=systems)
    runs = runs_of(load_study(file), "study")
    found = [[run.name for run in group.runs] for group in groups(runs)]
    assert found == [
        [f"{name}-seed{seed}" for name in names] for seed in (0, 1) for names in ("AB", "CD", "E")
    ]
    shared = [{key for run in group.runs for key in run.keys.values()} for group in groups(runs)]
    assert sum(map(len, shared)) == len(set.union(*shared)), "two jobs have a stage in common"


def bench(folder):
    return Bench(folder, ("last",), {"set": "1"}, ())


class Dies:
    def outcomes(self, bench):
        os.kill(os.getpid(), signal.SIGKILL)
        yield Outcome("never")


class Waits:
    """Says who it is, and then works for ten minutes."""

    def __init__(self, file):
        self.file = file

    def outcomes(self, bench):
        self.file.with_suffix(".part").write_text(str(os.getpid()))
        self.file.with_suffix(".part").rename(self.file)
        time.sleep(600)
        yield Outcome("never")


class Fails:
    """In a way that nobody foresaw, once another one is at work."""

    def __init__(self, other):
        self.other = other

    def outcomes(self, bench):
        while not self.other.exists():
            time.sleep(0.05)
        yield Outcome(str(1 / 0))


class Tells:
    """What a worker sees of the machine."""

    def outcomes(self, bench):
        time.sleep(0.5)
        yield Outcome(
            f"{os.getpid()} {torch.get_num_threads()} {os.environ.get('CUDA_VISIBLE_DEVICES')}"
        )


def test_a_worker_that_dies_is_told(tmp_path):
    with pytest.raises(RunError, match=r"(?s)a worker died.*fewer --workers"):
        list(outcomes([Dies(), Dies()], bench(tmp_path), 2))


def test_an_error_ends_all_workers(tmp_path):
    """As Ctrl-C does: nobody waits for what the others are at."""
    with pytest.raises(ZeroDivisionError):
        list(outcomes([Waits(tmp_path / "pid"), Fails(tmp_path / "pid")], bench(tmp_path), 2))
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_workers_share_the_cores_and_take_devices_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    assert (threads_of(2), threads_of(8)) == (2, 1)
    found = [
        outcome.name.split()
        for outcome in outcomes([Tells() for _ in range(4)], bench(tmp_path), 2)
    ]
    assert {(threads, device) for _, threads, device in found} == {("2", "3"), ("2", "GPU-5f")}
    assert str(os.getpid()) not in {process for process, *_ in found}
    (own,) = outcomes([Tells()], bench(tmp_path), 2)
    assert own.name.split()[0] == str(os.getpid()), "one job needs no other process"


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


@pytest.mark.parametrize("how", ["killed", "ctrl-c"])
def test_workers_end_with_the_first_process(how, tmp_path):
    """Killed, it can tell nobody; Ctrl-C at a terminal reaches all of them."""
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from pathlib import Path
from test_study_workers import Waits, bench
from llm2comp.lab.study.workers import outcomes
if __name__ == "__main__":
    here = Path({str(tmp_path)!r})
    list(outcomes([Waits(here / str(n)) for n in range(2)], bench(here), 2))
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


def test_less_than_one_worker_is_refused():
    said = cli("study", "objectives", "--workers", 0)
    assert (said.code, said.out) == (2, "")
    assert "--workers" in said.err
