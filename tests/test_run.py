"""Run directories: what lies in them, what a second call does, what changes and failures leave."""

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import llm2comp
from llm2comp.data.loaded import Pair
from llm2comp.errors import DataError, RunError
from llm2comp.recipe import load_recipe, parse_recipe
from llm2comp.training import run as run_module
from llm2comp.training import stages, trainers
from llm2comp.training.stages import pair_datasets
from tiny_run import (
    assert_refused,
    cli,
    finished,
    make_tree,
    no_file_over,
    sentences,
    small_disk,
    write_pairs,
    write_recipe,
    write_rows,
)

STAGES = {"pretext": "1-pretext", "ucl": "2-ucl", "scl": "3-scl"}
FILES_OF_A_STAGE = {
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "config.json",
    "done.json",
    "memory.safetensors",
    "metrics.jsonl",
    "watch.jsonl",
}


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def state(run):
    """Content and time of every file of a run that a second call must leave alone."""
    rewritten = {"recipe.yaml", "environment.json", "report.html", ".lock"}
    return {
        name: ((run / name).read_bytes(), (run / name).stat().st_mtime_ns)
        for name in files_in(run) - rewritten
    }


def weights(run, stage):
    tensors = load_file(run / STAGES[stage] / "adapter" / "adapter_model.safetensors")
    return torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())])


def trained_now(said):
    return [folder for folder in STAGES.values() if f"{folder}: done before" not in said.err]


def train(folder, *overrides, **changes):
    return cli("train", write_recipe(folder, **changes), *overrides, "--out", folder / "run")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Data and a finished run whose recipe names them by relative paths."""
    folder = tmp_path_factory.mktemp("original")
    with contextlib.chdir(folder):
        assert train(Path()).code == 0
    return folder


@pytest.fixture
def home(original, tmp_path, monkeypatch):
    """A copy of it to be changed, and the working directory."""
    shutil.copytree(original, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return Path()


# ---- what lies there


def test_layout():
    _, run = finished()
    assert {path.name for path in run.iterdir()} - {".lock", ".llm2comp.json"} == {
        "recipe.yaml",
        "environment.json",
        "1-pretext",
        "2-ucl",
        "3-scl",
        "model",
    }
    for place in STAGES.values():
        assert files_in(run / place) == FILES_OF_A_STAGE
    assert {
        "modules.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "golden.json",
        "README.md",
    } <= files_in(run / "model")


def test_recipe_and_environment():
    folder, run = finished()
    assert load_recipe(run / "recipe.yaml") == parse_recipe(make_tree(folder))
    environment = json.loads((run / "environment.json").read_text())
    assert {"python", "machine", "device", "packages", "command", "started"} <= set(environment)
    assert (
        environment["packages"]["torch"] == torch.__version__.split("+")[0]
        or environment["packages"]["torch"]
    )
    assert {"llm2comp", "transformers", "peft", "sentence-transformers"} <= set(
        environment["packages"]
    )


@pytest.mark.parametrize("stage", STAGES)
def test_stage_files(stage):
    folder = finished()[1] / STAGES[stage]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.keys() == {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
        assert all(value > 0 for value in row.values())
    config, done = (
        json.loads((folder / name).read_text()) for name in ("config.json", "done.json")
    )
    assert config["stage"] == stage
    assert config["stack"] == list(STAGES)[: list(STAGES).index(stage) + 1]
    assert done["inputs"] == config["inputs"]
    assert done["steps"] == 4
    assert weights(finished()[1], stage).abs().sum() > 0


# ---- running again


@pytest.mark.thorough
def test_a_second_call_trains_nothing_and_changes_nothing(home, monkeypatch):
    before = state(home / "run")
    for name in stages.RUNNERS:
        monkeypatch.setitem(stages.RUNNERS, name, lambda *_: pytest.fail("trains again"))
    monkeypatch.setattr(run_module, "export", lambda *_: pytest.fail("exports again"))
    said = train(home)
    assert said.code == 0, said
    assert trained_now(said) == []
    assert state(home / "run") == before


@pytest.mark.thorough
@pytest.mark.parametrize(
    "override",
    [
        "pretext.log_every_steps=3",
        "ucl.save_every_steps=2",
        "scl.log_every_steps=2",
        "report_to=[]",
    ],
)
def test_settings_without_effect_may_change(home, override):
    before = state(home / "run")
    said = train(home, override)
    assert said.code == 0, said
    assert trained_now(said) == []
    assert state(home / "run") == before
    key, value = override.split("=")
    assert f"{key.split('.')[-1]}: {value}" in (home / "run" / "recipe.yaml").read_text()


@pytest.mark.thorough
def test_another_length_of_the_finished_encoder_only_exports_again(home):
    before = llm2comp.load(home / "run").max_seq_length
    said = train(home, "max_tokens=20")
    assert said.code == 0, said
    assert trained_now(said) == []
    assert llm2comp.load(home / "run").max_seq_length == 20 + 3 != before
    assert llm2comp.load(home / "run" / "3-scl").max_seq_length == 20 + 3


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("file", "retrained"), [("texts.jsonl", ["pretext", "ucl", "scl"]), ("pairs.jsonl", ["scl"])]
)
def test_other_content_of_a_data_file_trains_what_depends_on_it(
    home, tmp_path_factory, file, retrained
):
    before = {stage: weights(home / "run", stage) for stage in STAGES}
    if file == "texts.jsonl":
        write_rows(home / file, [{"text": text} for text in sentences(40, seed=7)])
    else:
        write_pairs(home / file, [1] * 24, seed=7)
    said = train(home)
    assert said.code == 0, said
    assert trained_now(said) == [STAGES[stage] for stage in retrained]
    changed = [
        stage for stage in STAGES if not torch.equal(before[stage], weights(home / "run", stage))
    ]
    assert changed == retrained
    fresh = tmp_path_factory.mktemp("fresh") / "run"
    assert cli("train", home / "recipe.yaml", "--out", fresh).code == 0
    for stage in STAGES:
        assert torch.equal(weights(home / "run", stage), weights(fresh, stage)), (
            "as a run that began with these data"
        )
    assert cli("verify", home / "run" / "model").code == 0


class StoppedError(Exception):
    pass


def stop_at(monkeypatch, stage, step):
    """Training of a stage ends with an exception before its step number `step`."""
    real = trainers.StageMixin.training_step

    def training_step(self, *args, **kwargs):
        if self.stage_name == stage and self.state.global_step == step - 1:
            raise StoppedError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(trainers.StageMixin, "training_step", training_step)


@pytest.mark.thorough
def test_checkpoints_of_other_data_are_not_gone_on_from(home, monkeypatch, tmp_path_factory):
    """Data change, the retraining stops half way, data change once more."""
    for seed in (7, 8):
        write_rows(home / "texts.jsonl", [{"text": text} for text in sentences(40, seed=seed)])
        with monkeypatch.context() as patch:
            if seed == 7:
                stop_at(patch, "ucl", 4)
                with pytest.raises(StoppedError):
                    train(home)
                assert (home / "run" / "2-ucl" / "checkpoint-3").exists()
                assert not (home / "run" / "2-ucl" / "done.json").exists(), (
                    "the old result is no longer called done"
                )
                with pytest.raises(RunError, match="not finished"):
                    llm2comp.load(home / "run" / "2-ucl")
            else:
                said = train(home)
                assert said.code == 0, said
    fresh = tmp_path_factory.mktemp("fresh") / "run"
    assert cli("train", home / "recipe.yaml", "--out", fresh).code == 0
    for stage, place in STAGES.items():
        assert torch.equal(weights(home / "run", stage), weights(fresh, stage))
        rows = [
            json.loads(line)
            for line in (home / "run" / place / "metrics.jsonl").read_text().splitlines()
        ]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.thorough
def test_a_damaged_mark_means_training_again(home, monkeypatch):
    before = weights(home / "run", "scl")
    (home / "run" / "2-ucl" / "done.json").write_bytes(b"\x00")
    with monkeypatch.context() as patch:
        stop_at(patch, "ucl", 2)
        with pytest.raises(StoppedError):
            train(home)
    assert not (home / "run" / "2-ucl" / "done.json").exists(), (
        "an unfinished stage is not called done"
    )
    said = train(home)
    assert (said.code, trained_now(said)) == (0, ["2-ucl"])
    assert torch.equal(weights(home / "run", "scl"), before)


@pytest.mark.thorough
def test_a_stopped_stage_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, "scl", 4)
        with pytest.raises(StoppedError):
            train(tmp_path)
    assert (tmp_path / "run" / "3-scl" / "checkpoint-3" / "complete").exists()
    counted = []
    real = trainers.StageMixin.training_step
    monkeypatch.setattr(
        trainers.StageMixin,
        "training_step",
        lambda self, *a, **k: counted.append(1) or real(self, *a, **k),
    )
    assert train(tmp_path).code == 0
    assert len(counted) == 1, "the last of four steps"
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "3-scl" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    whole = finished()[1]
    assert not list((tmp_path / "run").glob("*/checkpoint-*"))
    for stage in STAGES:
        torch.testing.assert_close(weights(tmp_path / "run", stage), weights(whole, stage))


def test_stopping_is_one_line(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(stages.RUNNERS, "pretext", stop)
    said = train(tmp_path)
    assert said.code == 130
    assert said.err.endswith("stopped; run the same command again to go on\n")


# ---- a full disk


@pytest.mark.thorough
@pytest.mark.parametrize("size", [5_000, 12_000], ids=["adapter", "optimizer"])
def test_full_disk_at_a_checkpoint(tmp_path, size):
    make_tree(tmp_path)
    with no_file_over(size):
        said = train(tmp_path, ucl=None, scl=None)
    assert_refused(said, "1-pretext/checkpoint-1: cannot write", "free space")
    assert files_in(tmp_path / "run" / "1-pretext") == {
        "config.json",
        "metrics.jsonl",
        "watch.jsonl",
    }
    assert train(tmp_path, ucl=None, scl=None).code == 0
    assert cli("verify", tmp_path / "run" / "model").code == 0


def test_full_disk_at_the_end_of_a_stage(tmp_path, monkeypatch):
    real = run_module._finish

    def finish(*arguments):
        with no_file_over(5_000):
            real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_finish", finish)
        assert_refused(
            train(tmp_path, ucl=None, scl=None), "1-pretext: cannot write: File too large"
        )
    assert "done.json" not in files_in(tmp_path / "run" / "1-pretext")
    with pytest.raises(RunError, match="not finished"):
        llm2comp.load(tmp_path / "run" / "1-pretext")
    assert train(tmp_path, ucl=None, scl=None).code == 0
    assert torch.equal(weights(tmp_path / "run", "pretext"), weights(finished()[1], "pretext"))


@pytest.mark.thorough
def test_full_disk_at_the_export(home):
    before = state(home / "run")
    with no_file_over(60_000):
        said = train(home, "max_tokens=20")
    assert_refused(said, "run/model: cannot write", "free space")
    assert state(home / "run") == before, "the old model is still there, and nothing else"
    assert cli("verify", home / "run" / "model").code == 0
    assert train(home, "max_tokens=20").code == 0
    assert llm2comp.load(home / "run").max_seq_length == 23


@pytest.mark.thorough
def test_a_disk_that_is_really_full(tmp_path):
    """Whatever file it is that meets the end: one message; once there is room, the same command
    succeeds.
    """
    recipe = write_recipe(tmp_path)
    command = ("train", recipe, "--out", tmp_path / "disk" / "run")
    with small_disk(tmp_path / "disk", "48k"):
        for size in ("48k", "96k", "160k", "224k"):
            subprocess.run(["mount", "-o", f"remount,size={size}", tmp_path / "disk"], check=True)
            assert_refused(cli(*command), "disk/run", "cannot write: ", "free space")
            for done in (tmp_path / "disk" / "run").glob("*/done.json"):
                assert json.loads(done.read_text())
            for checkpoint in (tmp_path / "disk" / "run").glob("*/checkpoint-*"):
                assert (checkpoint / "complete").exists()
        subprocess.run(["mount", "-o", "remount,size=20m", tmp_path / "disk"], check=True)
        said = cli(*command)
        assert said.code == 0, said
        assert cli("verify", tmp_path / "disk" / "run" / "model").code == 0
        assert torch.equal(weights(tmp_path / "disk" / "run", "scl"), weights(finished()[1], "scl"))


# ---- hard negatives


def test_two_hard_negatives_per_query(tmp_path):
    make_tree(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", [2] * 24)
    said = train(tmp_path, pretext=None, ucl=None)
    assert said.code == 0, said
    assert "stage 3: 24 pairs; 24 with 2 hard negatives" in said.err


def test_mixed_numbers_of_hard_negatives(tmp_path):
    make_tree(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", [0] * 6 + [1] * 8 + [3] * 9 + [5] * 2)
    said = train(tmp_path, "scl.steps=8", pretext=None, ucl=None)
    assert said.code == 0, said
    assert (
        "stage 3: 25 pairs; 6 with 0 hard negatives, 8 with 1 hard negatives, 11 with 3 "
        "hard negatives" in said.err
    )
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "3-scl" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == list(range(1, 9))


def make_pairs(*counts, repeat=False):
    return [
        Pair(f"q{0 if repeat else i}", f"p{i}", tuple(f"n{i}.{j}" for j in range(n)))
        for i, n in enumerate(counts)
    ]


def columns(tables):
    return {name: (len(table), table.column_names[2:]) for name, table in tables.items()}


def test_pairs_are_grouped_by_their_negatives():
    tables = pair_datasets(make_pairs(0, 2, 0, 2, 2), 2)
    assert columns(tables) == {
        "with 0 hard negatives": (2, []),
        "with 2 hard negatives": (3, ["negative_1", "negative_2"]),
    }
    assert tables["with 2 hard negatives"][0] == {
        "anchor": "q1",
        "positive": "p1",
        "negative_1": "n1.0",
        "negative_2": "n1.1",
    }


def test_groups_too_small_for_a_batch_lose_negatives():
    assert columns(pair_datasets(make_pairs(1, 1, 3, 2, 1), 3)) == {
        "with 1 hard negatives": (5, ["negative_1"])
    }
    assert columns(pair_datasets(make_pairs(*[3] * 4, 5, 7, 0, 0, 0, 0), 4)) == {
        "with 0 hard negatives": (4, []),
        "with 3 hard negatives": (6, ["negative_1", "negative_2", "negative_3"]),
    }


def test_the_lowest_group_is_left_out_if_too_small(capsys):
    assert columns(pair_datasets(make_pairs(0, 2, 2, 2), 2)) == {
        "with 2 hard negatives": (3, ["negative_1", "negative_2"])
    }
    assert "left out: 1 pairs with 0 hard negatives, too few for a batch" in capsys.readouterr().err


@pytest.mark.parametrize("pairs", [make_pairs(1, 1, 1), make_pairs(1, 2, 3)])
def test_pairs_too_few_for_a_batch_are_one_group(pairs):
    """Batches are then clipped to them (`batches.clipped`)."""
    assert columns(pair_datasets(pairs, 4)) == {"with 1 hard negatives": (3, ["negative_1"])}


def test_one_pair_many_times_is_too_few():
    with pytest.raises(DataError, match="too few usable rows"):
        pair_datasets(make_pairs(*[1] * 9, repeat=True), 4)


def test_copied_run_directories_are_runs(tmp_path):
    run = Path(shutil.copytree(finished()[1], tmp_path / "copy"))
    recipe = load_recipe(run / "recipe.yaml")
    before = state(run)
    assert llm2comp.train(recipe, run) == run
    assert state(run) == before


def test_other_weights_under_the_same_name_train_anew(tmp_path):
    """The folder of a local model may be replaced; stages that its old weights made do not count as
    done.
    """
    from llm2comp.model.backbone import weights_digest
    from llm2comp.recipe import ModelSettings

    folder = tmp_path / "backbone"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"a" * 3_000_000)
    first = weights_digest(ModelSettings(name=str(folder)))
    assert first == weights_digest(ModelSettings(name=str(folder)))
    (folder / "model.safetensors").write_bytes(b"a" * 2_999_999 + b"b")
    assert weights_digest(ModelSettings(name=str(folder))) != first
    assert weights_digest(ModelSettings(name="owner/on-the-hub")) == ""
    assert weights_digest(ModelSettings(name="builtin:tiny")) != ""
