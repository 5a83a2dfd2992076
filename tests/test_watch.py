"""The collapse watch: changes nothing, tells the truth, steers where it is asked to."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import llm2comp
from llm2comp.data.sources import read_pairs, read_texts
from llm2comp.errors import DataError, RecipeError, RunError
from llm2comp.lab.train import train
from llm2comp.measures.geometry import alignment
from llm2comp.measures.spectrum import effective_rank, spectrum
from llm2comp.model.compressor import Compressor
from llm2comp.recipe import WATCHED, PairData, TextData, parse_recipe
from llm2comp.runs.folder import FOLDERS
from llm2comp.runs.keys import stage_keys
from llm2comp.training.sample import Watch, unchanged_randomness
from llm2comp.training.watch import warnings_of
from oracles import embed_texts
from tiny_run import cli, finished, make_tree, sentences, write_recipe, write_rows

SETTINGS = {"every_steps": 2, "texts": 24, "max_tokens": 48}
FIGURES = {
    "effective_rank",
    "participation_ratio",
    "uniformity",
    "anisotropy",
    "alignment",
    "context_recovered",
}


def lines(run, stage):
    return [
        json.loads(line) for line in (run / FOLDERS[stage] / "watch.jsonl").read_text().splitlines()
    ]


def state(run, stage):
    folder = run / FOLDERS[stage]
    return load_file(folder / "memory.safetensors") | load_file(
        folder / "adapter" / "adapter_model.safetensors"
    )


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def tree(folder, stages=("pretext", "ucl", "scl"), watch=None, **stage_changes):
    """The tiny recipe with dropout on; `stage_changes` go to every stage."""
    found = make_tree(
        folder, adapter={"rank": 2, "alpha": 4, "dropout": 0.2}, watch=SETTINGS | (watch or {})
    )
    for stage in ("pretext", "ucl", "scl"):
        found[stage] = (
            found[stage] | {"attention_dropout": 0.2} | stage_changes if stage in stages else None
        )
    return found


def sts_folder(folder):
    home = folder / "sets" / "sts" / "Planted"
    home.mkdir(parents=True)
    texts = sentences(24, 6, seed=5)
    rows = [
        {"sentence1": a, "sentence2": b, "score": i % 6}
        for i, (a, b) in enumerate(zip(texts, texts[1:], strict=False))
    ]
    write_rows(home / "test.jsonl", rows)
    return str(folder / "sets")


@pytest.mark.thorough
def test_watching_changes_nothing_that_is_learned(tmp_path):
    """Dropout on, and local sets whose library seeds every generator: bit for bit the same
    weights.
    """
    watched = tree(tmp_path, watch={"every_steps": 1, "tasks": [sts_folder(tmp_path)]})
    with_watch = train(parse_recipe(watched), tmp_path / "with")
    without = train(parse_recipe(watched | {"watch": None}), tmp_path / "without")
    for stage in FOLDERS:
        assert same_weights(state(with_watch, stage), state(without, stage)), stage
        assert len(lines(with_watch, stage)) == 5
        assert all(set(line["tasks"]) == {"Local-Planted"} for line in lines(with_watch, stage))
        assert not (without / FOLDERS[stage] / "watch.jsonl").exists()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("objective", "encoder"),
    [
        ("mntp", {"pooling": "mean"}),
        ("ebae_ebar", {"pooling": "last_token", "prompt": "{text} In one word:"}),
    ],
)
def test_encoders_without_memory_are_watched_through_all_stages(tmp_path, objective, encoder):
    """Correlations of memory tokens are null, all else is there; the report of such a run can be
    written.
    """
    planned = tree(tmp_path) | {"encoder": encoder}
    planned["pretext"]["objective"] = objective
    run = train(parse_recipe(planned), tmp_path / "run")
    for stage in FOLDERS:
        found = lines(run, stage)
        assert len(found) == 3
        assert all(line["memory_correlation"] is None for line in found)
        assert all(1 <= line["effective_rank"] <= line["dimensions"] for line in found)
    assert cli("report", run).code == 0


def test_unchanged_randomness_is_needed_and_works():
    import random

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(7)
    expected = draw(), draw()
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(7)
    first = draw()
    with unchanged_randomness():
        inside = draw()
        np.random.seed(1)
        torch.manual_seed(1)
    assert (first, draw()) == expected
    assert inside == expected[1]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """(folder, run): as `finished`, watched as often as a recipe is that says nothing of it."""
    folder = tmp_path_factory.mktemp("watched")
    return folder, train(parse_recipe(make_tree(folder, watch={})), folder / "run")


@pytest.mark.thorough
def test_lines_of_a_run(watched):
    _, run = watched
    before = None
    for stage, place in FOLDERS.items():
        rows = lines(run, stage)
        assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
        losses = {}
        for line in (run / place / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            losses[row["step"]] = row["loss"]
        assert [row["loss"] for row in rows] == [None, *(losses[step] for step in (1, 2, 3, 4))]
        first = {key: rows[0][key] for key in FIGURES - {"alignment"}}
        assert before is None or first == pytest.approx(before, rel=1e-4), (
            "a stage begins where the one before ended"
        )
        before = {key: rows[-1][key] for key in first}
        assert rows[0]["effective_rank"] != rows[-1]["effective_rank"], "training moves the figures"
        assert not any(row["best"] for row in rows)


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["pretext", "scl"])
def test_figures_are_those_of_the_trained_encoder(stage, watched):
    """The last line against the stage as loaded from its files, embedded by
    sentence-transformers.
    """
    folder, run = watched
    last = lines(run, stage)[-1]
    model = llm2comp.load(run / FOLDERS[stage])
    model[0].max_tokens = model[0].compressor.max_tokens(256)  # the watch's own limit
    model[0].role_max_tokens = {}
    texts = list(dict.fromkeys(read_texts(TextData(source=str(folder / "texts.jsonl"))).rows))
    assert last["texts"] == len(texts) == 40, "the sample holds all texts, in another order"
    embeddings = embed_texts(model, texts).numpy()
    assert last["effective_rank"] == pytest.approx(effective_rank(spectrum(embeddings)), rel=1e-3)
    assert np.allclose(last["spectrum"], spectrum(embeddings)[:39], rtol=1e-2, atol=1e-5)
    pairs = read_pairs(PairData(source=str(folder / "pairs.jsonl"), negatives=("negatives",))).rows
    encode = model.encode_query if stage == "scl" else model.encode
    anchors = torch.as_tensor(encode([pair.anchor for pair in pairs])).numpy()
    positives = embed_texts(model, [pair.positive for pair in pairs]).numpy()
    assert last["alignment"] == pytest.approx(alignment(anchors, positives), rel=1e-3)
    correlation = np.array(last["memory_correlation"])
    assert correlation.shape == (3, 3)
    assert np.allclose(np.diag(correlation), 1)
    assert 0 < last["context_recovered"] < 1


class Planted:
    """Gives a figure the values of a list, watch by watch, and keeps the weights that each was
    given for.
    """

    def __init__(self, patch, figure, values):
        self.values, self.states, self.steps = list(values), [], 0
        real = Watch.measure

        def measure(watch, compressor, prompt):
            found = real(watch, compressor, prompt)
            adapter = list(compressor.backbone.adapters.parameters("ucl"))
            self.states.append(
                [tensor.detach().clone() for tensor in (compressor.memory.vectors_KD, *adapter)]
            )
            value = self.values[min(self.steps, len(self.values) - 1)]
            self.steps += 1
            return found | (
                {"tasks": {figure: value}} if figure not in WATCHED else {figure: value}
            )

        patch.setattr(Watch, "measure", measure)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("figure", "values", "best"),
    [
        ("effective_rank", [1, 5, 9, 3, 9], 2),
        ("alignment", [4, 3, 2, 1, 1], 3),
        ("context_recovered", [0.5, None, 0.1, 0.2, 0.3], 0),
        ("Local-Planted", [0.1, 0.2, 0.3, 0.4, 0.5], 4),
    ],
)
def test_keep_best(tmp_path, monkeypatch, figure, values, best):
    watch = {"every_steps": 1} | (
        {"tasks": [sts_folder(tmp_path)]} if figure not in WATCHED else {}
    )
    recipe = parse_recipe(
        tree(tmp_path, stages=["ucl"], watch=watch, keep_best=figure, train_memory=True)
    )
    planted = Planted(monkeypatch, figure, values)
    run = train(recipe, tmp_path / "run")
    assert json.loads((run / "2-ucl" / "done.json").read_text())["kept_step"] == best
    assert [row["best"] for row in lines(run, "ucl")].index(True) == 0
    assert not (run / "2-ucl" / "best").exists()
    kept = state(run, "ucl")
    memory = planted.states[best][0]
    assert torch.equal(kept["memory"], memory)
    assert any(not torch.equal(memory, other[0]) for other in planted.states)
    adapters = {tuple(tensor.shape): [] for tensor in planted.states[best][1:]}
    for tensor in planted.states[best][1:]:
        adapters[tuple(tensor.shape)].append(tensor)
    for name, tensor in kept.items():
        if "lora" in name:
            assert any(torch.equal(tensor, other) for other in adapters[tuple(tensor.shape)]), name
    assert len(planted.states) == 5
    llm2comp.load(run).encode(["a text"])


def test_early_stop(tmp_path, monkeypatch):
    watch = {"every_steps": 1}
    recipe = parse_recipe(
        tree(tmp_path, stages=["ucl"], watch=watch, keep_best="effective_rank", patience=2, steps=9)
    )
    planted = Planted(monkeypatch, "effective_rank", [3, 4, 2, 2, 2, 2, 9, 9, 9, 9])
    run = train(recipe, tmp_path / "run")
    assert [row["step"] for row in lines(run, "ucl")] == [0, 1, 2, 3]
    assert json.loads((run / "2-ucl" / "done.json").read_text())["kept_step"] == 1
    steps = planted.steps
    train(recipe, tmp_path / "run")
    assert planted.steps == steps, "a stage that was stopped early is done"


def test_a_watch_that_steers_is_part_of_the_stage(tmp_path):
    recipe = parse_recipe(tree(tmp_path, stages=["ucl"], keep_best="uniformity"))
    train(recipe, tmp_path / "run")
    other = parse_recipe(
        tree(tmp_path, stages=["ucl"], watch={"every_steps": 1}, keep_best="uniformity")
    )
    with pytest.raises(RunError, match="another recipe"):
        train(other, tmp_path / "run")


def test_what_a_steering_watch_measures_on_is_part_of_the_stage(tmp_path):
    folder = sts_folder(tmp_path)
    keys = []
    for _ in range(2):
        for figure in ("Local-Planted", None):
            watch = {"tasks": [folder]}
            recipe = parse_recipe(tree(tmp_path, stages=["ucl"], watch=watch, keep_best=figure))
            keys.append(stage_keys(recipe)["ucl"])
        (file,) = Path(folder).rglob("test.jsonl")
        file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    steered, watched, steered_anew, watched_anew = keys
    assert steered != steered_anew
    assert watched == watched_anew


def test_a_watch_that_only_looks_is_not(tmp_path):
    run = shutil.copytree(finished()[1], tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    tree_of = make_tree(finished()[0])
    train(parse_recipe(tree_of | {"watch": SETTINGS}), run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before


def line(step, rank=10.0, correlation=0.5, recovered=0.5):
    matrix = np.full((4, 4), correlation)
    np.fill_diagonal(matrix, 1.0)
    return {
        "step": step,
        "effective_rank": rank,
        "memory_correlation": matrix.tolist(),
        "context_recovered": recovered,
    }


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (line(5), []),
        (line(5, rank=7.1), []),
        (line(5, rank=6.9), ["effective rank falls: 10.0 at step 0, now 6.9"]),
        (line(5, correlation=0.995), ["memory tokens become copies: 3 of 4"]),
        (line(5, recovered=-0.2), ["memory misleads"]),
        (line(0, recovered=-0.2), []),
        (line(5, recovered=None), []),
        (line(5, 2.0, 1.0, -1.0), ["effective rank falls", "copies", "misleads"]),
    ],
)
def test_warnings(now, said):
    found = warnings_of(line(0), now, compresses=True)
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))


@pytest.mark.thorough
def test_a_warning_is_said_once(tmp_path, monkeypatch):
    real = Watch.measure
    monkeypatch.setattr(
        Watch,
        "measure",
        lambda *args, **kwargs: real(*args, **kwargs) | {"context_recovered": -0.3},
    )
    said = cli("train", write_recipe(tmp_path, scl=None, watch={}), "--out", tmp_path / "run")
    assert said.code == 0, said
    assert said.err.count("warning, pretext step 1: the memory misleads") == 1
    assert said.err.count("memory misleads") == 1
    assert [len(row["warnings"]) for row in lines(tmp_path / "run", "pretext")] == [0, 1, 1, 1, 1]
    assert not any(row["warnings"] for row in lines(tmp_path / "run", "ucl")), (
        "no longer trained to compress"
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"patience": 3}, ["ucl", "patience 3 waits for nothing"]),
        (
            {"keep_best": "efective_rank"},
            ["keep_best 'efective_rank'", "effective_rank", "watch.tasks names no set"],
        ),
        ({"keep_best": "loss", "watch": None}, ["needs the watch"]),
    ],
)
def test_contradictions_in_a_recipe(tmp_path, changes, parts):
    found = tree(
        tmp_path, stages=["ucl"], **{key: value for key, value in changes.items() if key != "watch"}
    )
    found |= {"watch": None} if "watch" in changes else {}
    with pytest.raises(RecipeError) as error:
        parse_recipe(found)
    assert all(part in str(error.value) for part in parts), error.value


def test_what_a_watch_names_is_checked_before_training(tmp_path):
    folder = sts_folder(tmp_path)
    wrong = tree(tmp_path, stages=["ucl"], watch={"tasks": [folder]}, keep_best="Local-Planed")
    with pytest.raises(RecipeError, match="Local-Planted"):
        train(parse_recipe(wrong), tmp_path / "run")
    with pytest.raises(DataError, match="no such folder"):
        train(
            parse_recipe(tree(tmp_path, stages=["ucl"], watch={"tasks": [folder + "x"]})),
            tmp_path / "run",
        )
    data = {"data": [{"source": str(tmp_path / "none.jsonl")}]}
    with pytest.raises(DataError, match="no such file"):
        train(parse_recipe(tree(tmp_path, stages=["ucl"], watch=data)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_own_sources(tmp_path):
    """Other texts and pairs than those trained on: an SCL-only run has neither texts nor a split
    without them.
    """
    write_rows(tmp_path / "short.jsonl", [{"text": text} for text in sentences(30, 3, seed=8)])
    found = tree(
        tmp_path, stages=["scl"], watch={"data": [{"source": str(tmp_path / "short.jsonl")}]}
    )
    run = train(parse_recipe(found), tmp_path / "run")
    assert [row["texts"] for row in lines(run, "scl")] == [24] * 3
    assert [row["context_recovered"] for row in lines(run, "scl")] == [None] * 3, (
        "no text is long enough to be split"
    )
    plain = train(parse_recipe(tree(tmp_path, stages=["scl"])), tmp_path / "plain")
    assert lines(plain, "scl")[0]["context_recovered"] is not None


def test_the_sample_is_drawn_from_the_recipe_s_seed(tmp_path):
    recipe = parse_recipe(tree(tmp_path))
    from llm2comp.model.backbone import load_backbone

    compressor = Compressor.fresh(load_backbone(recipe.model), 3, 0)
    one, same = (Watch(recipe, recipe.watch, compressor).rows for _ in range(2))
    other = Watch(recipe.model_copy(update={"seed": 1}), recipe.watch, compressor).rows
    assert one == same != other
    assert len(one) == 24


@pytest.mark.slow
def test_two_ranks_stop_together(tmp_path):
    """Rank 0 alone watches; the stop reaches the other, or the run would hang."""
    recipe = write_recipe(tmp_path, pretext=None, scl=None)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "-m",
        "llm2comp",
        "train",
        str(recipe),
    ]
    changes = [
        "ucl.keep_best=loss",
        "ucl.patience=1",
        "ucl.steps=40",
        "watch.every_steps=1",
        "ucl.batch_size=2",
    ]
    command += [*changes, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(lines(tmp_path / "run", "ucl")) < 40
