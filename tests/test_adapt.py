"""`adapt`: own documents → a run and a verdict, on documents that nothing was trained on."""

import json
import re
import shutil

import numpy as np
import pytest

from llm2comp.data.weak_pairs import Seen, WeakPair
from llm2comp.errors import DataError, RecipeError, RunError
from llm2comp.lab.adapt import adapt, running, work
from llm2comp.lab.adapt.corpus import read_task
from llm2comp.lab.adapt.mining import with_negatives
from llm2comp.lab.adapt.planning import LEAST_STEPS, Plan
from llm2comp.lab.adapt.verdict import ADAPTED, BM25, LM, START, Verdict, hybrid
from llm2comp.lab.evaluation.retrieval import Collection
from llm2comp.runs.folder import Run
from llm2comp.storage.golden import verify
from llm2comp.storage.loading import load
from tiny_run import WORDS, assert_refused, cli, finished, sentences


def write_documents(folder, count=40):
    """Documents of random words: heading and two sections each."""
    folder.mkdir(parents=True)
    for n in range(count):
        one, two, *more = sentences(6, 14, seed=500 + n)
        name = f"{WORDS[n % len(WORDS)]} {WORDS[(7 * n + 3) % len(WORDS)]} {n}"
        body = f"{more[1]}. {more[2]}. {more[3]}."
        text = f"# About {name}\n\nSo {one}. {two}. {more[0]}.\n\n## More of {name}\n\n{body}\n"
        (folder / f"{n:03}.md").write_text(text)
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(documents, run, what was said): twenty minutes, of which so little data needs seconds."""
    place = tmp_path_factory.mktemp("adapted")
    documents = write_documents(place / "documents")
    (documents / "broken.pdf").write_bytes(b"%PDF-1.7 no more than that")
    options = ("-o", place / "run", "--model", finished()[1], "--minutes", 20, "--device", "cpu")
    said = cli("adapt", documents, *options)
    assert said.code == 0, said.err
    return documents, place / "run", " ".join(said.err.split())


def record_of(run):
    return json.loads((run / "scores" / "adapted.json").read_text())


@pytest.mark.thorough
def test_every_system_is_scored_on_held_out_documents(adapted):
    documents, run, said = adapted
    record = record_of(run)
    names = [row["system"] for row in record["rows"]]
    assert names == [BM25, *(n for one in (LM, START, ADAPTED) for n in (one, hybrid(one)))]
    for row in record["rows"]:
        assert 0 <= row["low"] <= row["ndcg_at_10"] <= row["high"] <= 1
    assert record["sentence"] in said
    assert [row["set"] for row in record["retention"]] == ["builtin:python-docs"]
    assert "broken.pdf" in said
    assert f"llm2comp index {documents} --db {run}-index --model {run}" in said
    assert record["sentence"].split(" (")[0] in (run / "report.html").read_text()


@pytest.mark.thorough
def test_what_is_held_out_is_in_no_pair_and_chooses_nothing(adapted):
    _, run, _ = adapted
    tasks = [read_task(run / "data" / name, name) for name in ("held-out", "validation")]
    pairs = [json.loads(line) for line in (run / "data" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) > 30
    held = Seen()
    for task in tasks:
        assert set(task.relevant) == set(task.queries)
        for text in task.documents.values():
            held.add(text)
    assert not any(held.alike(pair["positive"]) for pair in pairs)
    assert not set(tasks[0].documents.values()) & set(tasks[1].documents.values())
    recipe = Run(run).recipe
    assert (recipe.scl.keep_best, [set_.split("/")[-1] for set_ in recipe.watch.tasks]) == (
        "Local-validation",
        ["validation"],
    )


@pytest.mark.thorough
def test_the_plan_comes_first_and_the_guide_is_the_start(adapted):
    _, run, said = adapted
    steps = int(re.search(r"plan for 20 minutes: (\d+) steps", said)[1])
    recipe = Run(run).recipe
    assert steps == recipe.scl.steps
    assert (
        said.index("plan for")
        < said.index("stage 3")
        < said.index("verdict: " + record_of(run)["sentence"])
    )
    assert recipe.scl.guide.name == str(finished()[1] / "model")
    assert recipe.start_from == str(finished()[1])


@pytest.mark.thorough
def test_it_is_a_run_as_any_other(adapted):
    _, run, _ = adapted
    assert verify(run / "model") > 0.99999
    live, start = load(run / "3-scl")[0], load(finished()[1] / "3-scl")[0]
    assert live.compressor.backbone.adapters.names[-1] == "scl"
    assert live.max_tokens == start.max_tokens, "it reads as much as what it started from"


@pytest.mark.thorough
def test_the_same_again_trains_nothing_and_says_the_same(adapted, capsys):
    documents, run, _ = adapted
    times = {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
    adapt(documents, run, finished()[1], 20, device="cpu")
    assert record_of(run)["sentence"] in " ".join(capsys.readouterr().err.split())
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")} == times
    with pytest.raises(RunError, match=r"another adaptation(.*\n)*.*minutes"):
        adapt(documents, run, finished()[1], 5, device="cpu")
    with pytest.raises(RunError, match="holds another run"):
        adapt(documents, finished()[1], finished()[1], 20, device="cpu")


@pytest.mark.slow
def test_it_goes_on_after_a_stop(adapted, tmp_path, monkeypatch):
    """Stopped after the plan: the same held-out task and the same recipe are taken up."""
    documents, run, _ = adapted
    copy = shutil.copytree(run, tmp_path / "run")
    for name in ("scores", "3-scl", "model"):
        shutil.rmtree(copy / name)
    recipe = (copy / "recipe.yaml").read_text()
    monkeypatch.setattr(work, "rate", lambda *_: pytest.fail("planned again"))
    adapt(documents, copy, finished()[1], 20, device="cpu")
    assert (copy / "recipe.yaml").read_text() == recipe.replace(str(run), str(copy))
    ours, theirs = (record_of(each)["rows"] for each in (copy, run))
    assert ours[:5] == theirs[:5]


@pytest.mark.slow
def test_a_causal_lm_may_be_the_start(adapted, tmp_path):
    """Nothing to guide by then, and no encoder to compare with."""
    documents, _, _ = adapted
    run = adapt(documents, tmp_path / "run", finished()[0] / "backbone", 20, device="cpu")
    names = [row["system"] for row in record_of(run)["rows"]]
    assert names == [BM25, LM, hybrid(LM), ADAPTED, hybrid(ADAPTED)]
    recipe = Run(run).recipe
    assert (recipe.start_from, recipe.scl.guide, recipe.memory.tokens) == (None, None, 8)


def test_questions_are_kept_where_they_find_their_passage(capsys):
    """A tiny LM writes; each kept one finds its passage by words or by meaning, and only it."""
    from llm2comp.lab.adapt import questions
    from llm2comp.recipe import ModelSettings

    lm = ModelSettings(name="builtin:tiny", attention="causal", device="cpu")
    passages = [f"{text}." for text in sentences(24, 12, seed=9)]
    few = questions.written(passages, lm, None, 0.0, seed=0)  # no time: one batch all the same
    told = re.search(r"(\d+) of (\d+) written questions", capsys.readouterr().err)
    assert len(few) == int(told[1]) <= int(told[2]) <= questions.AT_ONCE < len(passages)
    assert int(told[2]) > 0
    asked = {passage: " ".join(passage.split()[2:6]) for passage in passages}
    asked[passages[0]] = "none of these words is there"
    asked[passages[1]] = asked[passages[2]]
    kept = questions._found(asked, None)
    assert {pair.passage for pair in kept} == {*passages} - {passages[0], passages[1]}
    assert all(pair.query == asked[pair.passage] for pair in kept)
    encoder = load(finished()[1])
    by_both = questions._found(asked, encoder)
    assert {pair.passage for pair in kept} <= {pair.passage for pair in by_both}


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (" how is a disk copied?\n\nText: another\nQuestion: x", "how is a disk copied?"),
        ("\n\n what  comes after an empty line ", "what comes after an empty line"),
        ("disk copy", None),
        ("how to find out how much disk space is free?", None),  # an example, copied
        (" ".join(["many"] * 80), None),
        ("", None),
    ],
)
def test_a_question_is_the_first_line_that_is_one(said, read):
    from llm2comp.lab.adapt.questions import _read

    assert _read(said) == read


@pytest.mark.slow
def test_stage_1_and_written_questions_are_part_of_the_plan(adapted, tmp_path):
    documents, _, _ = adapted
    options = ("--model", "builtin:general-tiny", "--minutes", 3, "--device", "cpu")
    said = cli(
        "adapt", documents, "-o", tmp_path / "run", *options, "--pretext", "--write-questions"
    )
    assert said.code == 0, said.err
    run = Run(tmp_path / "run")
    assert run.recipe.pretext is not None
    assert list(run.recipe.stages) == ["pretext", "scl"]
    texts = (run.path / "data" / "passages.jsonl").read_text().splitlines()
    held = Seen()
    for name in ("held-out", "validation"):
        for text in read_task(run.path / "data" / name, name).documents.values():
            held.add(text)
    assert len(texts) > 20
    assert not any(held.alike(json.loads(text)["text"]) for text in texts)
    assert f"plan for 3 minutes: {run.recipe.pretext.steps} steps of 8 passages" in said.err
    assert "written questions find their passage" in said.err
    assert verify(run.path / "model") > 0.99999


def scores(**means):
    """nDCG of 200 queries around a mean; all from the same draws."""
    draws = np.random.default_rng(0).normal(0, 0.1, 200)
    return {
        name.replace("_", " "): np.clip(
            mean + draws + np.random.default_rng(i).normal(0, 0.02, 200), 0, 1
        )
        for i, (name, mean) in enumerate(means.items(), 1)
    }


@pytest.mark.parametrize(
    ("start", "both", "adapted_alone", "adapted_both", "choice", "says"),
    [
        (0.3, 0.45, 0.4, 0.6, hybrid(ADAPTED), "use hybrid with the adapted encoder"),
        (0.3, 0.45, 0.4, 0.5, BM25, "keep BM25"),
        (0.3, 0.60, 0.4, 0.6, hybrid(START), "use hybrid with the encoder that you started from"),
        (0.3, 0.45, 0.7, 0.6, ADAPTED, "use the adapted encoder alone"),
        (0.3, 0.40, 0.2, 0.3, BM25, "keep BM25"),
    ],
)
def test_the_verdict_is_what_the_figures_say(
    start, both, adapted_alone, adapted_both, choice, says
):
    means = {
        BM25: 0.5,
        START: start,
        hybrid(START): both,
        ADAPTED: adapted_alone,
        hybrid(ADAPTED): adapted_both,
    }
    found = Verdict.of(scores(**means))
    assert found.choice == choice
    assert found.sentence.startswith(says)
    assert "of BM25, difference" in found.sentence
    few = Verdict.of({name: values[:20] for name, values in scores(**means).items()})
    assert "20 queries alone" in few.sentence


def test_a_difference_that_chance_explains_is_none():
    """Two points better on the mean, by a few queries."""
    base = np.linspace(0.2, 0.8, 100)
    better = base.copy()
    better[:4] += 0.5
    better[4:8] -= 0.1
    found = Verdict.of({BM25: base, ADAPTED: base, hybrid(ADAPTED): better})
    assert better.mean() > base.mean() + 0.01
    assert found.choice == BM25


@pytest.mark.thorough
def test_mined_negatives_are_other_passages(adapted):
    _, run, _ = adapted
    rows = [json.loads(line) for line in (run / "data" / "pairs.jsonl").read_text().splitlines()]
    pairs = [WeakPair(row["kind"], row["anchor"], row["positive"]) for row in rows]
    mined = with_negatives(pairs, load(finished()[1]), 2)
    assert len(mined) > 5
    passages = {pair.passage for pair in pairs}
    for row in mined:
        assert {row["negative_1"], row["negative_2"]} <= passages - {row["positive"]}
    assert with_negatives(pairs, None, 0) == rows


@pytest.mark.thorough
def test_the_plan_is_over_the_pairs_that_negatives_leave(tmp_path, monkeypatch):
    """Mining leaves out pairs: the others are not seen the more often for it."""
    planned = []

    def begin(recipe, run):
        planned.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "train", begin)
    monkeypatch.setattr(work, "rate", lambda *_: 1e6)
    documents = write_documents(tmp_path / "documents")
    options = ("--model", finished()[1], "--minutes", 20, "--device", "cpu")
    cli("adapt", documents, "-o", tmp_path / "run", *options, "--negatives", 2)
    rows = (tmp_path / "run" / "data" / "pairs.jsonl").read_text().splitlines()
    (recipe,) = planned
    assert 0 < recipe.scl.steps * recipe.scl.batch_size <= 3 * len(rows)


def test_too_few_pairs_with_hard_negatives_are_refused():
    texts = sentences(12, 8, seed=3)
    pairs = [WeakPair("heading", *pair) for pair in zip(texts[:6], texts[6:], strict=True)]
    with pytest.raises(DataError, match=r"too few pairs have 8(.*\n)*.*give fewer --negatives"):
        with_negatives(pairs, load("mean:builtin:tiny", "cpu"), 8, least=2)


def test_minutes_that_do_not_suffice_are_refused_with_those_that_do():
    assert Plan.of(300, 100, 10, 32).steps == 20
    with pytest.raises(RecipeError, match=r"too short(.*\n)*.*at least 3 more"):
        Plan.of(100, 150, 30, 32)
    with pytest.raises(RecipeError, match=r"too short(.*\n)*.*at least 1 more"):
        Plan.of(160, 150, 5, 32)
    assert Plan.of(100 + 3 * 60, 150, 30, 32).steps >= LEAST_STEPS


@pytest.mark.parametrize("pairs", [2, 16, 31, 32, 75, 10_000])
def test_no_pair_is_seen_more_than_three_times(pairs):
    plan = Plan.of(300, 100, 10, 32).over(pairs)
    assert 2 * pairs < plan.steps * plan.batch <= 3 * pairs or plan.steps == 20
    assert LEAST_STEPS <= plan.steps <= 20
    assert plan.batch == min(32, pairs)


def test_bad_input_is_one_clear_line(tmp_path):
    out = tmp_path / "out"
    assert_refused(cli("adapt", tmp_path / "none", "-o", out), "no such file or folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "one.md").write_text("# One\n\nA few words.\n")
    (tmp_path / "scan").mkdir()
    (tmp_path / "scan" / "a.pdf").write_bytes(b"%PDF-1.7 no more than that")
    model = ("--model", finished()[1], "--device", "cpu")
    for place, told in (("empty", "it is empty"), ("few", "too few documents"), ("scan", "a.pdf")):
        assert_refused(cli("adapt", tmp_path / place, "-o", out, *model), told)
    said = cli("adapt", tmp_path / "few", "-o", out, "--model", tmp_path / "no-model")
    assert_refused(said, "--model", "no such folder")
    assert not out.exists()


def test_short_documents_are_too_few_queries(tmp_path):
    folder = tmp_path / "short"
    folder.mkdir()
    for n, text in enumerate(sentences(30, 3)):
        (folder / f"{n}.md").write_text(f"{text}\n")
    with pytest.raises(DataError, match="too few queries"):
        adapt(folder, tmp_path / "out", finished()[1], 20, device="cpu")


def test_ndcg_of_each_query_has_the_evaluators_mean():
    texts = dict(enumerate(sentences(30, 8, seed=3)))
    documents = {f"d{n}": text for n, text in texts.items()}
    queries = {f"q{n}": " ".join(texts[n].split()[:3]) for n in range(12)}
    relevant = {f"q{n}": {f"d{n}", f"d{(n + 5) % 30}"} for n in range(12)}
    collection = Collection(queries, documents, relevant)
    ranked = [[(d, -place) for place, (d, _) in enumerate(row)] for row in collection.by_bm25(10)]
    each = collection.ndcg_of_each(ranked)  # without ties, which the evaluator orders by itself
    assert len(set(each)) > 3
    expected = collection._score_rankings(ranked).ndcg_at_10
    assert each.mean() == pytest.approx(expected, abs=1e-9)
