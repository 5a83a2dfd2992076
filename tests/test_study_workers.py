"""A study by several processes is the study by one."""

import json
import os

import pytest

from llm2comp.errors import RunError
from llm2comp.lab.study.definition import load_study
from llm2comp.lab.study.grid import runs_of
from llm2comp.lab.study.jobs import Bench, Outcome, groups
from llm2comp.lab.study.running import study
from llm2comp.lab.study.workers import outcomes
from study_example import weights, write_study
from tiny_run import assert_refused, cli


@pytest.mark.thorough
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


class Tells:
    """In which process it was done."""

    def outcomes(self, bench):
        yield Outcome(str(os.getpid()))


def test_one_job_needs_no_other_process(tmp_path):
    bench = Bench(tmp_path, ("last",), {"set": "1"}, ())
    (own,) = outcomes([Tells()], bench, 2)
    assert own.name == str(os.getpid())


def test_less_than_one_worker_is_refused():
    said = cli("study", "objectives", "--workers", 0)
    assert (said.code, said.out) == (2, "")
    assert "--workers" in said.err
