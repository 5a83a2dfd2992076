"""A study trains each stage once, scores as `evaluate` does, says what failed, and computes its
table as the formulas say.
"""

import csv
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from llm2comp.errors import RecipeError, RunError
from llm2comp.lab.evaluation.evaluate import EvaluateOptions, evaluate
from llm2comp.lab.evaluation.published import published
from llm2comp.lab.study.definition import Study, load_study, shipped_studies
from llm2comp.lab.study.figures import figures
from llm2comp.lab.study.grid import runs_of
from llm2comp.lab.study.results import (
    Failure,
    Results,
    StudyRow,
    averages,
    bootstrap,
    comparisons,
    mean_sd,
    records,
    resample_indices,
)
from llm2comp.lab.study.running import study, write_results
from llm2comp.lab.study.table import as_markdown
from llm2comp.recipe import load_recipe
from llm2comp.runs.folder import FOLDERS
from llm2comp.training import run as run_module
from llm2comp.training.run import train
from study_example import weights, write_study
from tiny_run import assert_refused, cli

SETS = ("Local-One", "Local-Two")


class StoppedError(Exception):
    """Stands for whatever ends a process in the middle."""


def recorded(patch, stop_at=None):
    """(stage, run) of every training that begins from now on; the `stop_at`-th does not end."""
    begun = []

    def recording(stage, runner):
        def run(compressor, settings, folder, *rest):
            begun.append((stage, folder.parent.name))
            if len(begun) == stop_at:
                raise StoppedError
            return runner(compressor, settings, folder, *rest)

        return run

    patch.setattr(
        run_module,
        "RUNNERS",
        {stage: recording(stage, runner) for stage, runner in run_module.RUNNERS.items()},
    )
    return begun


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, study folder, results, trainings of the first call, which was stopped, and of the
    second).
    """
    folder = tmp_path_factory.mktemp("study")
    file, out = write_study(folder, training_free=["mean"], models=["tfidf"]), folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        first = recorded(patch, stop_at=6)
        with pytest.raises(StoppedError):
            study(file, out)
    with pytest.MonkeyPatch.context() as patch:
        second = recorded(patch)
        results = study(file, out)
    return folder, out, results, first, second


# ---- training


@pytest.mark.thorough
def test_each_stage_is_trained_once_and_a_stopped_study_goes_on(done):
    _, out, _, first, second = done
    assert first == [
        *[
            ("pretext", "long-seed0"),
            ("ucl", "long-seed0"),
            ("scl", "long-seed0"),
            ("scl", "short-seed0"),
        ],
        *[("pretext", "long-seed1"), ("ucl", "long-seed1")],
    ]
    assert second == [("ucl", "long-seed1"), ("scl", "long-seed1"), ("scl", "short-seed1")]
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        "long-seed0",
        "long-seed1",
        "short-seed0",
        "short-seed1",
    ]


@pytest.mark.thorough
def test_shared_stages_are_bit_equal_and_own_files(done):
    _, out, _, _, _ = done
    for seed in (0, 1):
        for stage in ("1-pretext", "2-ucl"):
            ours, theirs = (
                out / "runs" / f"{name}-seed{seed}" / stage for name in ("long", "short")
            )
            files = sorted(file.relative_to(ours) for file in ours.rglob("*") if file.is_file())
            assert {"adapter", "done.json", "watch.jsonl", "memory.safetensors"} <= {
                file.parts[0] for file in files
            }
            for file in files:
                assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
                assert not (ours / file).samefile(theirs / file), (
                    "a later change of one run must not reach the other"
                )
    adapters = [
        out / "runs" / f"long-seed{seed}" / "1-pretext/adapter/adapter_model.safetensors"
        for seed in (0, 1)
    ]
    assert adapters[0].read_bytes() != adapters[1].read_bytes(), "vacuous: the seed changes nothing"


@pytest.mark.thorough
def test_a_run_that_took_stages_over_equals_one_that_trained_them(done, tmp_path):
    _, out, _, _, _ = done
    taken = out / "runs" / "short-seed1"
    assert weights(train(load_recipe(taken / "recipe.yaml"), tmp_path / "alone")) == weights(taken)


@pytest.mark.thorough
def test_a_finished_study_trains_and_scores_nothing_again(done, monkeypatch):
    folder, out, results, _, _ = done
    before = {
        name: (out / name).read_bytes()
        for name in ("results.json", "table.csv", "table.md", "averages.svg")
    }
    begun, scored = recorded(monkeypatch), []
    monkeypatch.setattr("llm2comp.lab.study.jobs.train", lambda *_, **__: pytest.fail("trained"))
    ours = evaluate
    monkeypatch.setattr(
        "llm2comp.lab.study.jobs.evaluate",
        lambda models, *rest: scored.extend(models) or ours(models, *rest),
    )
    assert study(folder / "study.yaml", out) == results
    assert (begun, scored) == ([], ["tfidf"]), (
        "the name of a foreign model tells nothing of its content: mteb's files do"
    )
    assert {name: (out / name).read_bytes() for name in before} == before


@pytest.mark.thorough
def test_a_stage_taken_over_is_there_whole_or_not_at_all(done, tmp_path, monkeypatch):
    _, out, _, _, _ = done
    sibling, run = out / "runs" / "long-seed0", tmp_path / "run"
    recipe = load_recipe(sibling / "recipe.yaml", ["scl=null", "name=other"])

    def half(source, target, **_):
        shutil.copy(source / "done.json", target)
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(run_module.shutil, "copytree", half)
        with pytest.raises(StoppedError):
            train(recipe, run, siblings=[sibling])
    assert not (run / "1-pretext").exists()
    begun = recorded(monkeypatch)
    train(recipe, run, siblings=[tmp_path / "none", sibling])
    assert begun == []
    name = "2-ucl/adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (sibling / name).read_bytes()


@pytest.mark.thorough
def test_stages_of_other_inputs_are_not_taken(done, tmp_path, monkeypatch):
    _, out, _, _, _ = done
    sibling = out / "runs" / "long-seed0"
    recipe = load_recipe(sibling / "recipe.yaml", ["scl=null", "ucl.steps=1"])
    begun = recorded(monkeypatch)
    train(recipe, tmp_path / "run", siblings=[sibling])
    assert begun == [("ucl", "run")]


# ---- scores and table


@pytest.mark.thorough
def test_scores_are_those_of_evaluate(done, tmp_path):
    folder, out, results, _, _ = done
    rows = {(row.system, row.stage): row for row in results.rows}
    assert list(rows) == [
        *[("mean", "training-free"), ("tfidf", "model")],
        *[("long", "ucl"), ("short", "ucl"), ("long", "last"), ("short", "last")],
    ]
    assert results.sets == SETS
    options = EvaluateOptions(local=(folder / "sets",))
    places = {
        ("long", "last", 1): "runs/long-seed1/3-scl",
        ("short", "ucl", 0): "runs/short-seed0/2-ucl",
    }
    models = {key: str(out / place) for key, place in places.items()}
    models["mean", "training-free", 0] = f"mean:{folder / 'backbone'}"
    for (system, stage, seed), model in models.items():
        (own,) = evaluate([model], options, tmp_path / "scores")
        expected = {task: 100 * found["score"] for task, found in own.scores.items()}
        assert rows[system, stage].scores[seed] == pytest.approx(expected, abs=1e-3)
    assert rows["long", "last"].scores[0] != rows["short", "last"].scores[0], "vacuous"
    assert rows["long", "ucl"].scores == rows["short", "ucl"].scores


@pytest.mark.thorough
def test_rank_and_samples_are_those_of_the_run(done):
    _, out, results, _, _ = done
    rows = {(row.system, row.stage): row for row in results.rows}
    for system, stage, place in (("long", "ucl", "2-ucl"), ("short", "last", "3-scl")):
        for seed in (0, 1):
            last = (
                (out / "runs" / f"{system}-seed{seed}" / place / "watch.jsonl")
                .read_text()
                .splitlines()[-1]
            )
            assert rows[system, stage].ranks[seed] == json.loads(last)["effective_rank"]
    assert rows["long", "ucl"].samples == {0: 4 * (3 + 2), 1: 4 * (3 + 2)}
    assert rows["short", "last"].samples == {0: 4 * (3 + 2 + 1), 1: 4 * (3 + 2 + 1)}


@pytest.mark.thorough
def test_table_holds_mean_and_deviation_over_seeds(done):
    _, out, results, _, _ = done
    table = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert [(row["system"], row["stage"]) for row in table] == [
        (row.system, row.stage) for row in results.rows
    ]
    for shown, row in zip(table, results.rows, strict=True):
        seeds = list(row.scores)
        cells = np.array([[row.scores[seed][name] for name in SETS] for seed in seeds])
        for name, values in zip((*SETS, "average"), (*cells.T, cells.mean(1)), strict=True):
            assert float(shown[f"{name}_mean"]) == pytest.approx(np.mean(values), abs=1e-4)
            if len(seeds) > 1:
                assert float(shown[f"{name}_sd"]) == pytest.approx(np.std(values, ddof=1), abs=1e-4)
            else:
                assert shown[f"{name}_sd"] == ""
    content = json.loads((out / "results.json").read_text())
    assert [row["system"] for row in content["table"]] == [row.system for row in results.rows]
    pairs = [(pair["first"], pair["second"], pair["stage"]) for pair in content["pairs"]]
    assert pairs == [("long", "short", "last")], "they share stage 2"


def example(seeds=(0, 1, 2), seed=7, **changes):
    """Made-up results: a grid over k and a training-free row."""
    rng = np.random.default_rng(seed)
    sets = ("x", "y", "z")
    rows = [
        StudyRow(
            system=f"A-k{k}",
            stage=stage,
            base="A",
            axes={"k": str(k)},
            scores={s: {name: float(40 + k + 5 * rng.normal()) for name in sets} for s in seeds},
            ranks=dict.fromkeys(seeds, 10.0 + k),
            samples=dict.fromkeys(seeds, 100 * k),
        )
        for stage in ("ucl", "scl")
        for k in (1, 4, 16)
    ]
    free = StudyRow(
        system="mean", stage="training-free", base="mean", scores={0: dict.fromkeys(sets, 30.0)}
    )
    return Results(name="example", sets=sets, rows=(free, *rows), **changes)


@pytest.mark.parametrize("seeds", [(0, 1, 2), (4,)])
def test_bootstrap_is_the_naive_double_loop(seeds):
    """Cells of both systems drawn together, one by one, from the same draws."""
    results = example(seeds)
    pair = next(
        each
        for each in comparisons(results)
        if (each["first"], each["second"], each["stage"]) == ("A-k1", "A-k4", "scl")
    )
    a, b = (
        next(r for r in results.rows if (r.system, r.stage) == (name, "scl"))
        for name in ("A-k1", "A-k4")
    )
    cells = [(seed, name) for seed in seeds for name in results.sets]
    draws = resample_indices(len(cells))
    assert draws.shape == (10_000, len(cells))
    assert set(np.unique(draws)) == set(range(len(cells)))
    means = []
    for draw in draws:
        first = second = 0.0
        for index in draw:
            seed, name = cells[index]
            first += a.scores[seed][name]
            second += b.scores[seed][name]
        means.append((first - second) / len(cells))
    means.sort()
    assert (pair["seeds"], pair["sets"]) == (len(seeds), 3)
    assert pair["low"] == pytest.approx(np.quantile(means, 0.025), abs=1e-9)
    assert pair["high"] == pytest.approx(np.quantile(means, 0.975), abs=1e-9)
    assert pair["share_above_0"] == sum(mean > 0 for mean in means) / len(means)
    expected = np.mean(list(averages(a, results.sets).values())) - np.mean(
        list(averages(b, results.sets).values())
    )
    assert pair["difference"] == pytest.approx(expected)
    assert pair["low"] < pair["difference"] < pair["high"]


def test_bootstrap_of_what_is_sure():
    assert bootstrap([2.0, 2.0, 2.0]) == (2.0, 2.0, 1.0)
    assert bootstrap([-1.0]) == (-1.0, -1.0, 0.0)


@pytest.mark.parametrize(("more", "compared"), [(0.0, 0), (1e-6, 1)])
def test_a_stage_that_two_systems_share_is_not_compared(more, compared):
    results = example()
    row = results.rows[1]
    scores = {
        seed: {name: value + more for name, value in of_sets.items()}
        for seed, of_sets in row.scores.items()
    }
    other = row.model_copy(update={"system": "other", "scores": scores})
    assert len(comparisons(results.model_copy(update={"rows": (row, other)}))) == compared


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], (None, None)), ([3.0], (3.0, None)), ([1.0, 4.0], (2.5, 1.5 * 2**0.5))],
)
def test_mean_and_sample_deviation(values, expected):
    assert mean_sd(values) == pytest.approx(expected)


def test_a_seed_without_a_set_has_no_average_and_is_not_compared():
    results = example()
    holed = results.rows[1]
    scores = holed.scores | {2: {"x": 1.0, "y": 2.0}}
    rows = tuple(
        row.model_copy(update={"scores": scores}) if row is holed else row for row in results.rows
    )
    results = results.model_copy(update={"rows": rows})
    assert list(averages(rows[1], results.sets)) == [0, 1]
    record = records(results)[1]
    assert record["seeds"] == 2
    assert record["x_mean"] == pytest.approx(np.mean([scores[s]["x"] for s in (0, 1, 2)]))
    seeds = {
        each["seeds"]
        for each in comparisons(results)
        if rows[1].system in (each["first"], each["second"])
    }
    assert seeds == {2, 3}
    assert all(
        each["seeds"] == 2
        for each in comparisons(results)
        if each["stage"] == "ucl" and each["first"] == rows[1].system
    )


def test_published_rows_are_cited_in_columns_of_their_own():
    plain, cited = records(example()), records(example(published=True))
    assert cited[: len(plain)] == plain
    paper = cited[len(plain) :]
    assert len(paper) == len(published()) > 20
    assert all(row["source"] == "paper" and "average_mean" not in row for row in paper)
    ctkd = next(row for row in paper if (row["system"], row["stage"]) == ("LLM2Comp-KL", "pretext"))
    assert (ctkd["paper: average"], ctkd["paper: STS17"]) == (52.49, 81.56)
    assert not any(key.startswith("paper") for row in plain for key in row)
    assert "| LLM2Comp-KL | pretext | 32k | 52.49 |" in as_markdown(example(published=True))


def test_failures_stand_in_the_tables():
    results = example(
        failures=(Failure(system="A-k4", run="A-k4-seed1", reason="the loss is not finite"),)
    )
    assert {row["system"] for row in records(results) if row["failed"]} == {"A-k4"}
    assert "| A-k4-seed1 | the loss is not finite |" in as_markdown(results)
    assert "not finite" not in as_markdown(example())


def test_the_same_results_give_the_same_files(tmp_path):
    results = example(published=True)
    for name in ("one", "two"):
        write_results(Results.model_validate_json(results.model_dump_json()), tmp_path / name)
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    plots = {f"{name}.{ending}" for name in ("averages", "over-k") for ending in ("svg", "png")}
    assert set(files) == plots | {"results.json", "table.csv", "table.md"}
    assert {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()} == files
    plain = [row.model_copy(update={"axes": {}}) for row in example().rows]
    write_results(example().model_copy(update={"rows": tuple(plain)}), tmp_path / "two")
    assert not list((tmp_path / "two").glob("over-*")), "a plot of earlier results"


def test_plots_draw_averages_with_their_deviations():
    results = example()
    drawn = figures(results)
    (axes,) = drawn["over-k"].axes
    lines = [line for line in axes.lines if line.get_linestyle() != "None"]
    expected = [[row for row in results.rows if row.stage == stage] for stage in ("ucl", "scl")]
    for line, rows in zip(lines, expected, strict=True):
        means = [np.mean([list(row.scores[s].values()) for s in row.scores]) for row in rows]
        np.testing.assert_allclose(line.get_xydata(), list(zip((1, 4, 16), means, strict=True)))
    half = [np.ptp(segment[:, 1]) / 2 for c in axes.collections for segment in c.get_segments()]
    deviations = [
        np.std(list(averages(row, results.sets).values()), ddof=1)
        for rows in expected
        for row in rows
    ]
    np.testing.assert_allclose(half, deviations)
    assert axes.get_xscale() == "log"
    (axes,) = drawn["averages"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "mean",
        "A-k1",
        "A-k4",
        "A-k16",
    ]
    assert len(axes.collections) == 6, "one bar per trained row, none for what has one seed"
    named = [row.model_copy(update={"axes": {"k": f"v{row.system}"}}) for row in results.rows]
    assert set(figures(results.model_copy(update={"rows": tuple(named)}))) == {"averages"}


def test_many_systems_keep_their_marks():
    rows = [
        StudyRow(system=f"s{n}", stage="scl", base=f"s{n}", scores={0: {"a": 40.0 + n}})
        for n in range(40)
    ]
    drawn = figures(Results(name="many", sets=("a",), rows=tuple(rows)))
    (line,) = drawn["averages"].axes[0].lines
    assert (len(line.get_xdata()), line.get_linestyle()) == (40, "None")
    assert line.get_marker() not in ("", "None")


# ---- settings


def refused(tmp_path, **changes):
    file = write_study(tmp_path, **changes)
    with pytest.raises(RecipeError) as caught:
        runs_of(load_study(file), str(file))
    return str(caught.value)


@pytest.mark.parametrize(
    ("systems", "says"),
    [
        ({"long": {}, "odd one": {}}, "odd one"),
        (
            {"good": {}, "bad": {"pretext.objectiv": "ctkd"}},
            "system 'bad': pretext.objectiv: unknown key; did you mean 'objective'?",
        ),
        ({"bad": {"memory.tokens": 0}}, "system 'bad': memory.tokens"),
        (
            {"bad": {"pretext": None, "ucl": None, "scl": None}},
            "system 'bad': settings: a recipe needs at least one of",
        ),
        ({"bad": {"scl.data.7.source": "x"}}, "system 'bad', scl.data.7.source=x"),
        ({"bad": {"seed": 3}}, "a system cannot set seed"),
        ({"A": {}, "a": {}}, "two runs would have one folder"),
    ],
)
def test_a_system_that_is_wrong_is_named_before_anything_is_trained(tmp_path, systems, says):
    assert says in refused(tmp_path, systems=systems)


def test_missing_data_of_a_system_is_named_before_anything_is_trained(tmp_path):
    file = write_study(
        tmp_path, systems={"good": {}, "bad": {"scl.data.0.source": str(tmp_path / "none.jsonl")}}
    )
    said = cli("study", file, "--out", tmp_path / "out")
    assert_refused(said, "system 'bad', ", "none.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"system": {}}, "system: unknown key; did you mean 'systems'?"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "given twice: 1, 1"),
        ({"after": ["sft"]}, "after.0"),
        ({"after": []}, "after names no stage"),
        ({"training_free": ["ecko"]}, "did you mean 'echo'?"),
        ({"systems": {}}, "needs systems, training_free or models"),
        ({"systems": {}, "models": ["tfidf"], "grid": {"k": {"1": {}}}}, "grid varies systems"),
        ({"grid": {"k": {}}}, "grid.k"),
    ],
)
def test_a_study_that_is_wrong(tmp_path, changes, says):
    assert says in refused(tmp_path, **changes)


def test_grid_is_every_system_with_every_combination(tmp_path):
    grid = {
        "k": {"1": {"memory.tokens": 1}, "8": {"memory.tokens": 8}},
        "t": {"hot": {"ucl.temperature": 0.1}},
    }
    file = write_study(
        tmp_path, systems={"A": {}, "B": {"pretext": None}}, grid=grid, after=["pretext", "last"]
    )
    runs = runs_of(load_study(file, ["scl=null"]), "study")
    assert [run.name for run in runs] == [
        f"{system}-k{k}-thot-seed{seed}" for seed in (0, 1) for system in ("A", "B") for k in (1, 8)
    ]
    last = runs[-1]
    assert (
        last.recipe.memory.tokens,
        last.recipe.ucl.temperature,
        last.recipe.seed,
        last.recipe.ucl.steps,
    ) == (8, 0.1, 1, 2)
    assert (last.base, last.axes) == ("B", {"k": "8", "t": "hot"})
    assert last.recipe.pretext is None is last.recipe.scl
    assert last.scored(("pretext", "last")) == {"last": "ucl"}
    assert runs[0].scored(("pretext", "last")) == {"pretext": "pretext", "last": "ucl"}


def test_a_part_of_a_study_with_another_recipe_and_seed(tmp_path):
    grid = {"k": {"1": {"memory.tokens": 1}, "8": {"memory.tokens": 8}}}
    file = write_study(tmp_path, systems={"A": {}, "B": {"pretext": None}}, grid=grid)
    other = tmp_path / "other.yaml"
    settings = yaml.safe_load(Path(yaml.safe_load(file.read_text())["recipe"]).read_text())
    other.write_text(yaml.safe_dump(settings | {"max_tokens": 77}))
    options = ["--recipe", other, "--seed", 5, "--seed", 6, "--only", "B-k8", "--only", "A-k1"]
    said = cli("study", file, "--out", tmp_path / "out", "--dry-run", *options)
    assert said.code == 0, said
    shown = [word for word in said.err.split() if "-seed" in word and word[0] in "AB"]
    assert shown == ["A-k1-seed5", "B-k8-seed5", "A-k1-seed6", "B-k8-seed6"]
    replaced = {"recipe": str(other), "seeds": [5], "only": ["B-k8"]}
    (run,) = runs_of(load_study(file, replaced=replaced), "study")
    assert (run.name, run.recipe.max_tokens, run.recipe.memory.tokens) == ("B-k8-seed5", 77, 8)
    said = cli("study", file, "--out", tmp_path / "out", "--only", "A-k2")
    assert_refused(said, "only: no such row: 'A-k2'", "did you mean 'A-k8'?", "B-k1")
    assert not (tmp_path / "out").exists()


def test_a_study_that_is_not_there_names_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'objectives'"):
        load_study(tmp_path / "objective.yaml")


@pytest.mark.parametrize("name", sorted(shipped_studies()))
def test_shipped_study_is_sound(name, monkeypatch, request):
    """Every system is a valid recipe; stages that can be shared have one key."""
    if name == "general":
        request.getfixturevalue("smollm2")  # its keys hold what the LM is
    # its data is made by tools/general_data.py
    monkeypatch.setattr("llm2comp.lab.study.grid.check", lambda *_: None)
    found = load_study(name)
    assert found.name == name
    runs = runs_of(found, name) if found.systems else []
    values = np.prod([len(axis) for axis in found.grid.values()], dtype=int)
    assert len(runs) == len(found.systems) * values * len(found.seeds)
    counts = {
        stage: len({run.keys[stage] for run in runs if stage in run.keys}) for stage in FOLDERS
    }
    if name == "scl-steps":
        assert counts == {"pretext": 3, "ucl": 3, "scl": 18}
        assert len(runs) == 21
        assert {run.recipe.scl.schedule.total_steps for run in runs if run.recipe.scl} == {2000}
    if name == "training-free":
        assert (runs, len(found.training_free), found.models, found.published) == (
            [],
            7,
            ("tfidf",),
            True,
        )


def test_shipped_studies_are_all_there():
    named = {
        "general",
        "lowres",
        "objectives",
        "memory-tokens",
        "response",
        "scl-steps",
        "settings",
        "start",
        "training-free",
    }
    assert set(shipped_studies()) == named
    every = load_study("objectives")
    assert list(every.systems) == ["RC", "NLL", "CTKD", "MNTP", "EBAE-EBAR", "LLM2Vec-Gen", "none"]
    assert isinstance(every, Study)


# ---- command line


@pytest.mark.thorough
def test_dry_run_lists_what_is_to_train_and_to_share(done, tmp_path):
    folder, out, _, _, _ = done
    file = write_study(tmp_path)
    said = cli("study", file, "--out", tmp_path / "new", "--dry-run")
    assert said.code == 0, said
    rows = [line.split("│")[1:-1] for line in said.err.splitlines() if "seed" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[:2] == [
        ["long-seed0", "train", "train", "train", str(4 * (3 + 2 + 2))],
        ["short-seed0", "from long-seed0", "from long-seed0", "train", "4"],
    ]
    assert len(cells) == 4
    assert not (tmp_path / "new").exists()
    said = cli("study", folder / "study.yaml", "--out", out, "--set", "ucl.steps=1", "--dry-run")
    lines = [line for line in said.err.splitlines() if line.startswith("│ long-seed")]
    states = Counter(cell.strip() for line in lines for cell in line.split("│")[2:5])
    assert states == {"done": 2, "train": 4}


@pytest.mark.thorough
def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    """`later` has the same stage as the one that failed: it is not tried again."""
    mad = {"learning_rate": 1e30, "floor_learning_rate": 0.0}
    systems = {
        "bad": {"ucl.schedule": mad},
        "later": {"ucl.schedule": mad, "scl": None},
        "good": {},
    }
    file = write_study(tmp_path, systems=systems, seeds=[0], after=["pretext", "ucl"])
    begun = recorded(monkeypatch)
    out = tmp_path / "out"
    said = cli("study", file, "--out", out, "--set", "scl=null", "--set", "pretext.steps=1")
    assert_refused(said, "failed: bad-seed0, later-seed0", "table.md")
    assert "run 3/3 good-seed0: " in said.err
    assert begun == [("pretext", "bad-seed0"), ("ucl", "bad-seed0"), ("ucl", "good-seed0")]
    table = {
        (row["system"], row["stage"]): row for row in csv.DictReader((out / "table.csv").open())
    }
    assert "not finite" in table["bad", "ucl"]["failed"]
    assert "not finite" in table["later", "ucl"]["failed"]
    assert table["bad", "ucl"]["average_mean"] == ""
    assert float(table["bad", "pretext"]["average_mean"]) == float(
        table["good", "pretext"]["average_mean"]
    )
    assert table["good", "ucl"]["failed"] == ""
    assert float(table["good", "ucl"]["average_mean"]) != float(
        table["good", "pretext"]["average_mean"]
    )
    with pytest.raises(RunError, match="failed: bad-seed0, later-seed0"):
        study(file, out, changes=["scl=null", "pretext.steps=1"])
    assert begun[3:] == [("ucl", "bad-seed0")], "what failed is tried again, what is done is not"


def test_nothing_to_score_on_is_an_error(tmp_path):
    file = write_study(tmp_path, scores=[])
    assert_refused(cli("study", file, "--out", tmp_path / "out"), "--local DIR")
    assert_refused(
        cli("study", file, "--out", tmp_path / "out", "--local", tmp_path / "none"),
        "none: no such folder",
    )
    assert not (tmp_path / "out").exists()


def test_a_study_without_training(tmp_path):
    file = write_study(tmp_path, systems={}, training_free=["mean", "last_token"], scores=[])
    said = cli("study", file, "--out", tmp_path / "out", "--local", tmp_path / "sets")
    assert said.code == 0, said
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["system"], row["seeds"]) for row in content["table"]] == [
        ("mean", None),
        ("last_token", None),
    ]
    (pair,) = content["pairs"]
    assert (pair["stage"], pair["seeds"], pair["sets"]) == ("training-free", 1, 2)
    assert not list(Path(tmp_path / "out").glob("runs/*"))


def test_training_free_rows_are_over_the_recipe_s_own_lm(tmp_path):
    """With all that `model` says of it, and never with scores kept for other settings."""
    file = write_study(tmp_path, systems={}, training_free=["mean"])

    def score(*changes):
        (row,) = study(file, tmp_path / "out", changes=changes).rows
        return row.scores[0]

    found = [score(), score("model.bos=none"), score("model.bos=</s>")]
    assert all(set(scores) == set(SETS) for scores in found)
    assert len({tuple(scores.values()) for scores in found}) == 3
    assert [score(), score("model.bos=none")] == found[:2]
    with pytest.raises(RunError, match="failed: mean"):
        score("model.bos=<nobody>")


def test_only_leaves_any_row_of_a_study(tmp_path):
    """Training-free rows and models as well, which may take longer than all the training."""
    file = write_study(tmp_path, training_free=["mean", "last_token"], models=["tfidf"])
    said = cli("study", file, "--out", tmp_path / "out", "--only", "tfidf", "--only", "mean")
    assert said.code == 0, said
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["system"] for row in content["table"]] == ["mean", "tfidf"]
    assert not list((tmp_path / "out").glob("runs/*"))
    short = load_study(file, replaced={"only": ["short"]})
    assert [run.name for run in runs_of(short, "study")] == ["short-seed0", "short-seed1"]
    assert short.wanted(["mean", "last_token"]) == []
