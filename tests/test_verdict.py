"""What a report says first: better than word matching or not, which stage helped, which hurt, what
got worse, how to use it.
"""

import ast
import json

import pytest

from llm2comp.lab.report import page
from llm2comp.lab.report.reading import columns, read_log
from llm2comp.lab.report.sections import evaluation_table
from llm2comp.lab.report.verdict import (
    courses,
    short_section,
    stages_sentence,
    use_section,
    verdict,
    warnings,
)
from synthetic_run import write_run

MODELS = ("backbone, mean-pooled", "after CTKD", "after UCL", "after SCL")


@pytest.fixture
def run(tmp_path):
    """A run without scores and warnings, to be changed."""
    folder = write_run(tmp_path / "mine", scores=False)
    (folder / "scores").mkdir()
    rewrite(folder, warnings=[])
    return folder


def rewrite(run, folders=("1-pretext", "2-ucl", "3-scl"), **changes):
    for folder in folders:
        file = run / folder / "watch.jsonl"
        lines = [json.loads(line) | changes for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def demo_scores(run, figures, **beside):
    rows = [
        {"model": m, "ndcg_at_10": x / 100, "mrr_at_10": 0.1, "effective_rank": 9.0}
        for m, x in zip(MODELS, figures, strict=True)
    ]
    rows += [
        {
            "model": m.replace("_", " "),
            "ndcg_at_10": x / 100,
            "mrr_at_10": 0.1,
            "effective_rank": None,
        }
        for m, x in beside.items()
    ]
    (run / "scores" / "python-docs.json").write_text(json.dumps(rows))


def summary(run, **figures):
    """Scores of models by their names in a summary; `done` stands for the run's own, `run_1` for
    its first stage.
    """
    labels = {"done": "mine", "run_1": "mine/1-pretext", "run_2": "mine/2-ucl"}
    names = {"bm25": "llm2comp/bm25", "tfidf": "llm2comp/tfidf"}
    rows = [
        {
            "model": labels.get(key, key),
            "name": names.get(key, f"llm2comp/{key}"),
            "revision": "1",
            "scores": {
                task: {"score": x / 100, "metric": "ndcg_at_10", "split": "test"}
                for task, x in scores.items()
            },
        }
        for key, scores in figures.items()
    ]
    (run / "scores" / "summary.json").write_text(json.dumps(rows))


def short(run):
    section = short_section(read_log(run, "mine"), "r")
    return (
        section.lead,
        section.text,
        {label: (figure, note) for label, figure, note in section.cards},
    )


@pytest.mark.parametrize(
    ("last", "how"),
    [
        (42.4, "is not better than"),
        (61.7, "is about as good as"),
        (62.3, "is about as good as"),
        (70.0, "is better than"),
    ],
)
def test_the_verdict_of_the_demo(run, last, how):
    demo_scores(run, (5.6, 7.0, 3.9, last), BM25=61.9)
    lead, text, cards = short(run)
    figures = f"{last} against 61.9 (Python documentation, nDCG@10, × 100)"
    assert lead == f"The encoder after SCL {how} BM25, which only matches words: {figures}."
    assert text == (f"CTKD helped (5.6 → 7.0), UCL hurt (7.0 → 3.9), SCL helped (3.9 → {last}).",)
    assert cards["Python documentation, nDCG@10"] == (
        f"5.6 → {last}",
        "backbone, mean-pooled → after SCL; BM25 61.9",
    )


def test_what_joins_the_encoder_with_bm25_is_told_too(run):
    demo_scores(run, (5.6, 5.7, 5.4, 42.4), encoder_and_BM25=66.0, BM25=61.9)
    lead, text, _ = short(run)
    assert "42.4 against 61.9; encoder and BM25 66.0 (" in lead
    assert text[0].startswith("CTKD changed little (5.6 → 5.7), UCL changed little (5.7 → 5.4), ")


def test_the_verdict_of_an_evaluation_is_over_sets_that_all_have(run):
    summary(
        run,
        done={"A": 40, "B": 60, "C": 99},
        run_1={"A": 30, "B": 50},
        bm25={"A": 20, "B": 70},
        tfidf={"A": 44, "B": 45},
    )
    (course,) = courses(read_log(run, "mine"))
    assert course.of == "mean of 2 sets"
    assert course.states == (("after CTKD", 40.0), ("after UCL and SCL", 50.0))
    assert dict(course.beside) == pytest.approx({"BM25": 45.0, "TF-IDF": 44.5})
    assert verdict(course) == (
        "The encoder after UCL and SCL is better than BM25, which only matches words: 50.0 "
        "against 45.0; TF-IDF 44.5 (mean of 2 sets, × 100)."
    )
    summary(run, done={"A": 40}, tfidf={"A": 44})
    assert (
        "is not better than TF-IDF, which only matches words: 40.0 against 44.0 (A, × 100)"
        in short(run)[0]
    )


def test_the_verdict_is_about_the_encoder_itself_as_it_is_now(run):
    """Neither about some of its memory tokens, nor about an earlier revision of it."""
    rows = [
        ("mine", "llm2comp/mine", "old", 30),
        ("mine", "llm2comp/mine", "new", 50),
        ("mine", "llm2comp/mine-last-1", "new", 10),
        ("mine/2-ucl", "llm2comp/mine-2-ucl-last-1", "new", 5),
        ("bm25", "llm2comp/bm25", "1", 40),
    ]
    summary = [
        {
            "model": model,
            "name": name,
            "revision": revision,
            "scores": {"A": {"score": x / 100, "metric": "ndcg_at_10", "split": "test"}},
        }
        for model, name, revision, x in rows
    ]
    (run / "scores" / "summary.json").write_text(json.dumps(summary))
    log = read_log(run, "mine")
    (course,) = courses(log)
    assert course.states == (("after SCL", 50.0),)
    assert verdict(course).startswith("The encoder after SCL is better than BM25")
    shown = evaluation_table(columns(log.evaluations))
    names = ("mine, old", "mine, new", "mine (last-1)", "mine/2-ucl (last-1)", "bm25")
    assert shown.header == ("task", *names, "metric")
    assert shown.rows[0] == ("A", *(f"{row[-1]:.2f}" for row in rows), "ndcg_at_10, test")


def test_models_that_share_no_set_are_not_compared(run):
    summary(run, done={"A": 40}, bm25={"B": 44})
    lead, text, _ = short(run)
    assert lead == ""
    assert "Not scored beside word matching yet" in text[0]


@pytest.mark.parametrize("scored", [True, False])
def test_without_word_matching_beside_it_says_how_to_get_it(run, scored):
    if scored:
        summary(run, done={"A": 40}, other={"A": 44})
    lead, text, _ = short(run)
    assert lead == ""
    assert f"llm2comp evaluate {run} bm25 --pairs FILE" in text[0]


def test_what_got_worse_is_warned_of(run):
    log = read_log(run, "mine")
    assert list(warnings(log)) == []
    assert short(run)[2]["warnings"][0] == "none"
    demo_scores(run, (5.6, 7.0, 3.9, 42.4), BM25=61.9)
    summary(run, done={"A": 40}, run_2={"A": 50}, bm25={"A": 20})
    rewrite(run, ["2-ucl"], context_recovered=-0.5)
    rewrite(run, ["3-scl"], context_recovered=-1.25)
    assert list(warnings(read_log(run, "mine"))) == [
        "UCL made it worse: from 7.0 to 3.9 (Python documentation, nDCG@10, × 100)",
        "SCL made it worse: from 50.0 to 40.0 (A, × 100)",
        "context recovered is below 0 after UCL (-0.50), SCL (-1.25): the memory misleads the LM, "
        "which goes on worse with it than without any context",
    ]
    assert short(run)[2]["warnings"][0] == "3"


def test_small_falls_and_what_the_watch_said_are_not_warned_of_again(run):
    demo_scores(run, (60.0, 58.0, 57.9, 57.5), BM25=61.9)
    told = "the memory misleads: the LM continues worse with it than without any context (-0.20)"
    rewrite(run, ["1-pretext"], context_recovered=-0.2, warnings=[told])
    (only,) = warnings(read_log(run, "mine"))
    assert only.endswith(told)
    (course,) = courses(read_log(run, "mine"))
    assert (
        stages_sentence(course)
        == "CTKD hurt (60.0 → 58.0), UCL changed little (58.0 → 57.9), SCL changed little "
        "(57.9 → 57.5)."
    )


def test_memory_that_was_never_trained_to_hold_context_is_no_warning(tmp_path):
    run = write_run(tmp_path / "mine", ["pretext=null"], scores=False)
    rewrite(run, ["2-ucl", "3-scl"], context_recovered=-3.0, warnings=[])
    assert list(warnings(read_log(run, "mine"))) == []


def test_three_lines_use_the_model(run):
    (live,) = use_section(read_log(run, "mine"), "r")
    assert live.code.splitlines()[1] == f"model = llm2comp.load({str(run / '3-scl')!r})"
    (run / "model").mkdir()
    (section,) = use_section(read_log(run, "mine"), "r")
    first, second, third = section.code.splitlines()
    assert first == "from sentence_transformers import SentenceTransformer"
    assert second == f"model = SentenceTransformer({str(run / 'model')!r})"
    assert third.startswith("print(model.similarity(")
    ast.parse(section.code)


def test_nothing_finished_is_not_to_be_used(tmp_path):
    run = write_run(tmp_path / "mine", unfinished=("pretext",), scores=False)
    assert use_section(read_log(run, "mine"), "r") == []


@pytest.mark.thorough
def test_searches_are_shown(run):
    answers = [
        {"name": "shutil.copytree", "summary": "Copies.", "cosine": 0.714},
        {"name": "os.link", "summary": "", "cosine": 0.5},
    ]
    searches = [{"question": "copy <all>", "answers": answers}, {"question": "none", "answers": []}]
    (run / "scores" / "searches.json").write_text(json.dumps(searches))
    text = page([run])
    assert (
        '<th scope="row">copy &lt;all&gt;</th><td>shutil.copytree (0.71), os.link (0.50)</td>'
        in text
    )
    assert "Example searches" in text
    (run / "scores" / "searches.json").unlink()
    assert "Example searches" not in page([run])


def test_what_was_measured_once_is_a_table_without_a_drawing(run):
    for name in ("metrics.jsonl", "watch.jsonl"):
        file = run / "1-pretext" / name
        file.write_text(file.read_text().splitlines()[0] + "\n")
    text = page([run])
    assert text.count("Measured at one step alone.") == 6, (
        "loss, rank, context, uniformity, anisotropy, sets"
    )
    figure = text[text.index('<figure id="run1-pretext-loss">') :]
    figure = figure[: figure.index("</figure>")]
    assert "<svg" not in figure
    assert "<details" not in figure
    assert "<td>" in figure
    whole = text[text.index('<figure id="run1-ucl-loss">') :]
    assert "<svg" in whole[: whole.index("</figure>")]


@pytest.mark.thorough
def test_two_ranks_are_explained_where_both_stand(run):
    assert "More texts fill more directions" not in page([run])
    demo_scores(run, (5.6, 7.0, 3.9, 42.4), BM25=61.9)
    text = page([run])
    assert "More texts fill more directions" in text
    assert "effective rank, 256 texts" in text
