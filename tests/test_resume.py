"""A run that is killed and run again ends with the weights of a run that was not; same seed, same
result.
"""

import functools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm2comp.model.compressor import Compressor
from llm2comp.recipe import parse_recipe
from llm2comp.runs.folder import FOLDERS
from llm2comp.training import run as run_module
from llm2comp.training.progress import ProgressCallback, StepLines
from llm2comp.training.run import train
from llm2comp.training.sample import Watch
from tiny_run import make_tree, write_pairs

STEPS, SAVE_EVERY = 7, 2
STAGES = ("pretext", "ucl", "scl")


class StoppedError(Exception):
    """Stands for whatever ends a process in the middle."""


def make_recipe(
    folder, steps=STEPS, adapter_dropout=0.2, attention_dropout=0.2, keep_best=None, **changes
):
    """All three stages, dropout on, a checkpoint every two steps."""
    changes = {"watch": {"every_steps": 1, "texts": 8, "max_tokens": 32}} | changes
    tree = make_tree(folder, adapter={"rank": 2, "alpha": 4, "dropout": adapter_dropout}, **changes)
    for stage in STAGES:
        if stage in tree:
            common = {
                "steps": steps,
                "save_every_steps": SAVE_EVERY,
                "log_every_steps": 1,
                "keep_best": keep_best,
            }
            tree[stage] = tree[stage] | common | {"attention_dropout": attention_dropout}
    tree["pretext"] |= {"gradient_accumulation_steps": 2, "batch_size": 2}
    return parse_recipe(tree)


def train_until(recipe, run, stop_at, end, seen, saving=False):
    """Train until (stage, step), then `end()`: before that step's checkpoint is begun, or with half
    of it written.

    Appends each (stage, step) that is trained to the file `seen`.
    """
    on_step_end, save = ProgressCallback.on_step_end, Compressor.save

    def watched_step(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        with seen.open("a") as out:
            out.write(json.dumps([self.name, state.global_step]) + "\n")
        if not saving and (self.name, state.global_step) == stop_at:
            end()

    def watched_save(self, folder, adapter):
        save(self, folder, adapter)
        if saving and (adapter, folder.name) == (stop_at[0], f"checkpoint-{stop_at[1]}"):
            end()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_end", watched_step)
        patch.setattr(Compressor, "save", watched_save)
        return train(recipe, run)


def main(recipe, run, stage, step, seen, saving):
    """The process to be killed, by itself, with the signal that nothing can catch."""
    torch.set_num_threads(1)
    kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
    train_until(
        parse_recipe(json.loads(recipe)),
        Path(run),
        (stage, int(step)),
        kill,
        Path(seen),
        saving == "saving",
    )


def killed(recipe, run, stage, step, seen, saving=False):
    arguments = [
        recipe.model_dump_json(),
        str(run),
        stage,
        str(step),
        str(seen),
        "saving" if saving else "step",
    ]
    command = [
        sys.executable,
        "-c",
        "import sys, test_resume; test_resume.main(*sys.argv[1:])",
        *arguments,
    ]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    assert not (run / FOLDERS[stage] / "done.json").exists()


def stop():
    raise StoppedError


def trained(seen):
    """(stage, step) of every step trained since the last call."""
    lines = (
        [tuple(json.loads(line)) for line in seen.read_text().splitlines()] if seen.exists() else []
    )
    seen.unlink(missing_ok=True)
    return lines


def weights(run):
    """Every weights file of a finished run, byte for byte."""
    files = sorted(run.rglob("*.safetensors"))
    assert len(files) >= 3
    assert not list(run.rglob("checkpoint-*")), "a finished stage keeps no checkpoint"
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def metrics(run, stage):
    rows = [
        json.loads(line)
        for line in (run / FOLDERS[stage] / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows
    ]


def watched(run, stage):
    rows = [
        json.loads(line) for line in (run / FOLDERS[stage] / "watch.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def written(run):
    """When each stage and the model were called done, and when they were written."""
    return {
        path: path.stat().st_mtime_ns
        for path in sorted(run.rglob("*"))
        if path.name in ("done.json", "model.safetensors")
    }


def steps_of(stage, first, last=STEPS):
    return [(stage, step) for step in range(first, last + 1)]


@pytest.mark.thorough
def test_killed_and_run_again_ends_as_if_never_killed(tmp_path):
    """Killed at a random step of stage 1, stopped by an error in stage 2, killed in stage 3 with a
    checkpoint half written.
    """
    seed = int(os.environ.get("LLM2COMP_TEST_SEED", random.randrange(10**6)))
    print(f"LLM2COMP_TEST_SEED={seed}")  # noqa: T201
    steps = random.Random(seed)
    recipe, run, seen = (
        make_recipe(tmp_path, keep_best="uniformity"),
        tmp_path / "run",
        tmp_path / "seen.jsonl",
    )
    reference = train(recipe, tmp_path / "reference")

    first = steps.randint(SAVE_EVERY + 1, STEPS)
    killed(recipe, run, "pretext", first, seen)
    assert trained(seen) == steps_of("pretext", 1, first)

    second = steps.randint(SAVE_EVERY + 1, STEPS)
    with pytest.raises(StoppedError):
        train_until(recipe, run, ("ucl", second), stop, seen)
    # the step's own checkpoint was not yet begun
    resumed = (first - 1) // SAVE_EVERY * SAVE_EVERY + 1
    assert resumed > 1
    assert trained(seen) == steps_of("pretext", resumed) + steps_of("ucl", 1, second)
    before = written(run)
    assert [path.parent.name for path in before] == ["1-pretext"]

    third = steps.choice([4, 6])
    killed(recipe, run, "scl", third, seen, saving=True)
    resumed = (second - 1) // SAVE_EVERY * SAVE_EVERY + 1
    assert trained(seen) == steps_of("ucl", resumed) + steps_of("scl", 1, third)
    assert (run / "3-scl" / f"checkpoint-{third}" / "memory.safetensors").exists()
    assert not (run / "3-scl" / f"checkpoint-{third}" / "complete").exists()

    train_until(recipe, run, ("never", 0), stop, seen)
    assert trained(seen) == steps_of("scl", third - SAVE_EVERY + 1)
    assert {path: written(run)[path] for path in before} == before, (
        "a finished stage was written again"
    )
    assert weights(run) == weights(reference)
    for stage in STAGES:
        rows = metrics(run, stage)
        assert rows == metrics(reference, stage)
        assert watched(run, stage) == watched(reference, stage)
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    golden = [
        json.loads((r / "model" / "golden.json").read_text())["embeddings"]
        for r in (run, reference)
    ]
    assert golden[0] == golden[1]

    times = written(run)
    assert {path.name for path in times} == {"done.json", "model.safetensors"}
    train_until(recipe, run, ("never", 0), stop, seen)
    assert trained(seen) == []
    assert written(run) == times, "a finished run was written again"


@pytest.mark.thorough
@pytest.mark.parametrize("patience", [None, 2])
def test_stopped_between_the_last_step_and_done(tmp_path, monkeypatch, patience):
    """No step is trained twice or beyond the end, and the best step is kept, not the last."""
    recipe = make_recipe(tmp_path, keep_best="uniformity")
    settings = {"patience": patience, "save_every_steps": 1}
    stage = recipe.ucl.model_copy(update=settings)
    recipe = recipe.model_copy(update={"ucl": stage, "pretext": None, "scl": None})
    # step 1 is the best, step 3 the second in vain
    last = STEPS if patience is None else 3
    looks, measure = iter([2.0, 1.0, *[3.0] * (last - 1)] * 2), Watch.measure
    monkeypatch.setattr(
        Watch, "measure", lambda *a, **k: measure(*a, **k) | {"uniformity": next(looks)}
    )
    reference, run, seen = tmp_path / "reference", tmp_path / "run", tmp_path / "seen.jsonl"
    train(recipe, reference)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_mark_done", lambda *_: stop())
        with pytest.raises(StoppedError):
            train_until(recipe, run, ("never", 0), stop, seen)
    assert trained(seen) == steps_of("ucl", 1, last)
    train_until(recipe, run, ("never", 0), stop, seen)
    assert trained(seen) == []
    assert weights(run) == weights(reference)
    kept = [
        json.loads((place / "2-ucl/done.json").read_text())["kept_step"]
        for place in (reference, run)
    ]
    assert kept == [1, 1]
    assert not (run / "2-ucl" / "best").exists()


def test_the_best_by_loss_is_the_same_after_a_stop(tmp_path):
    """Checkpoints, logs and watches at different steps: a watch's loss is of the same steps."""
    recipe = make_recipe(tmp_path, keep_best="loss", watch={"every_steps": 3, "texts": 8})
    stage = recipe.ucl.model_copy(update={"log_every_steps": 10})
    recipe = recipe.model_copy(update={"ucl": stage, "pretext": None, "scl": None})
    reference, run, seen = tmp_path / "reference", tmp_path / "run", tmp_path / "seen.jsonl"
    train(recipe, reference)
    with pytest.raises(StoppedError):
        train_until(recipe, run, ("ucl", 5), stop, seen)
    train_until(recipe, run, ("never", 0), stop, seen)
    assert trained(seen) == steps_of("ucl", 1, 5) + steps_of("ucl", 5)
    losses = [
        [row["loss"] for row in StepLines(place / "2-ucl" / "watch.jsonl").read()]
        for place in (reference, run)
    ]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4


def test_same_seed_same_result_other_seed_other_result(tmp_path):
    def result(name, **changes):
        return weights(train(make_recipe(tmp_path, steps=2, scl=None, **changes), tmp_path / name))

    first = result("first")
    torch.manual_seed(1234)
    torch.randn(7)
    random.seed(99)
    assert result("again") == first
    others = [
        result("seed", seed=1),
        result("no-adapter-dropout", adapter_dropout=0.0),
        result("no-attention-dropout", attention_dropout=0.0),
    ]
    adapters = [name for name in first if "adapter_model" in name]
    assert len(adapters) == 2
    for other in others:
        for name in adapters:
            assert other[name] != first[name], f"vacuous: {name} does not depend on it"


@pytest.mark.thorough
def test_new_data_of_a_stage_trains_it_again_and_no_stage_before_it(tmp_path):
    recipe, seen = make_recipe(tmp_path, steps=2), tmp_path / "seen.jsonl"
    run = train(recipe, tmp_path / "run")
    times, before = written(run), weights(run)
    write_pairs(tmp_path / "pairs.jsonl", [1] * 24, seed=77)
    train_until(recipe, run, ("never", 0), stop, seen)
    assert trained(seen) == steps_of("scl", 1, 2)
    changed = {name for name, content in weights(run).items() if content != before[name]}
    assert changed == {"3-scl/adapter/adapter_model.safetensors", "model/model.safetensors"}, (
        "SCL leaves the memory as it is"
    )
    same = [path for path, time in written(run).items() if times[path] == time]
    assert [path.parent.name for path in same] == ["1-pretext", "2-ucl"]


def test_learning_rates_of_a_run_are_those_of_its_schedule(tmp_path):
    """As the trainer logs them, and not moved by a resume."""
    from llm2comp.training.schedule import learning_rate

    recipe, run, seen = (
        make_recipe(tmp_path, ucl=None, scl=None),
        tmp_path / "run",
        tmp_path / "seen.jsonl",
    )
    with pytest.raises(StoppedError):
        train_until(recipe, run, ("pretext", 5), stop, seen)
    train_until(recipe, run, ("never", 0), stop, seen)
    assert trained(seen) == steps_of("pretext", 1, 5) + steps_of("pretext", 5)
    rates = [row["learning_rate"] for row in metrics(run, "pretext")]
    assert len(set(rates)) > 4
    expected = [learning_rate(recipe.pretext.schedule, STEPS, step) for step in range(STEPS)]
    assert rates == pytest.approx(expected, rel=1e-6)
