"""Own questions and answers, scored without any folder: the same figures as in BEIR's layout, and
what is refused.
"""

import csv
import json

import pytest

from llm2comp.errors import DataError
from llm2comp.lab.evaluation.evaluate import EvaluateOptions, evaluate
from llm2comp.lab.evaluation.pairs import Questions, pairs_task
from llm2comp.lab.evaluation.summary import RESULTS_FOLDER, read_summary, results_folder
from tiny_run import assert_refused, cli, finished, sentences, write_rows

ANSWERS = sentences(12, 8, seed=3)
QUESTIONS = [" ".join(text.split()[:2]) for text in ANSWERS]
ROWS = [{"anchor": q, "positive": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]


def write_csv(file, rows):
    with file.open("w", newline="") as out:
        table = csv.DictWriter(out, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return file


def renamed(rows, **names):
    return [{names[key]: value for key, value in row.items()} for row in rows]


def beir(folder, documents, queries, relevant):
    """The same as a local set, by hand.

    `relevant`: per query, places of its documents. Ids decide between equal scores.
    """
    (folder / "qrels").mkdir(parents=True)
    ids = [
        f"answer-{i}" if i < len(ANSWERS) else f"other-{i - len(ANSWERS)}"
        for i in range(len(documents))
    ]
    write_rows(
        folder / "corpus.jsonl",
        [{"_id": key, "title": "", "text": text} for key, text in zip(ids, documents, strict=True)],
    )
    write_rows(
        folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(queries)]
    )
    lines = [f"q{i}\t{ids[j]}\t1" for i, places in enumerate(relevant) for j in places]
    (folder / "qrels" / "test.tsv").write_text(
        "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
    )
    return folder


def scores(models, out, **options):
    found = evaluate(
        [str(model) for model in models], EvaluateOptions(device="cpu", **options), out
    )
    return [{task: score["score"] for task, score in row.scores.items()} for row in found]


def test_figures_are_those_of_the_same_set_in_a_folder(tmp_path):
    models = [finished()[1], "bm25", "tfidf"]
    file = write_csv(tmp_path / "qa.csv", ROWS)
    others = sentences(9, 8, seed=5) + ANSWERS[:4]
    write_rows(tmp_path / "more.jsonl", [{"body": text} for text in others])
    plain = beir(tmp_path / "retrieval" / "Plain", ANSWERS, QUESTIONS, [[i] for i in range(12)])
    more = beir(
        tmp_path / "retrieval" / "More", ANSWERS + others[:9], QUESTIONS, [[i] for i in range(12)]
    )
    asked = (
        Questions(str(file)),
        Questions(str(file), documents=str(tmp_path / "more.jsonl"), document="body"),
    )
    found = scores(models, tmp_path / "a", pairs=asked)
    expected = scores(models, tmp_path / "b", local=(plain, more))
    for ours, folder in zip(found, expected, strict=True):
        assert ours == pytest.approx(
            {"Pairs-qa": folder["Local-Plain"], "Pairs-qa-among-more": folder["Local-More"]},
            abs=1e-4,
        )
    assert len({json.dumps(each) for each in found}) == 3, "vacuous: all models alike"


def test_texts_that_are_equal_are_one_and_a_question_may_have_several_answers(tmp_path):
    rows = [
        *ROWS,
        {"anchor": f" {QUESTIONS[0]}", "positive": ANSWERS[7]},
        {"anchor": "another", "positive": f"{ANSWERS[1]} "},
    ]
    task = pairs_task(Questions(str(write_csv(tmp_path / "qa.csv", rows))))
    ((parts,),) = [each.values() for each in task.dataset.values()]
    assert len(parts["corpus"]) == 12
    assert len(parts["queries"]) == 13
    first = parts["queries"]["id"][parts["queries"]["text"].index(QUESTIONS[0])]
    texts = dict(zip(parts["corpus"]["id"], parts["corpus"]["text"], strict=True))
    assert {texts[key] for key in parts["relevant_docs"][first]} == {ANSWERS[0], ANSWERS[7]}
    other = parts["queries"]["id"][parts["queries"]["text"].index("another")]
    assert {texts[key] for key in parts["relevant_docs"][other]} == {ANSWERS[1]}


def test_results_are_kept_until_a_text_changes(tmp_path):
    def row(rows):
        file = write_csv(tmp_path / "qa.csv", rows)
        said = cli("evaluate", "bm25", "tfidf", "--pairs", file, "--out", tmp_path / "out")
        assert said.code == 0, said
        (result,) = (tmp_path / "out" / "results").rglob("*bm25*/**/Pairs-qa.json")
        return said, result.stat().st_mtime_ns

    first, written = row(ROWS)
    assert "12 questions, 12 answers to be found among 12 texts" in first.err
    assert f"results: {tmp_path / 'out' / 'summary.json'}" in first.err
    assert "Pairs-qa" in first.err
    assert row(ROWS)[1] == written
    assert row([*ROWS[:-1], ROWS[-1] | {"positive": "now another"}])[1] != written
    assert [each.model for each in read_summary(tmp_path / "out" / "summary.json")] == [
        "bm25",
        "tfidf",
    ]


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (("question", "answer"), "--query-column question --answer-column answer"),
        (("user_query", "Response"), "--query-column user_query --answer-column Response"),
        (("a", "b"), "--query-column a --answer-column b"),
    ],
)
def test_other_columns_are_named(tmp_path, names, advice):
    file = write_csv(tmp_path / "qa.csv", renamed(ROWS, anchor=names[0], positive=names[1]))
    assert_refused(
        cli("evaluate", "bm25", "--pairs", file, "--out", tmp_path / "out"), str(file), advice
    )
    options = ["--query-column", names[0], "--answer-column", names[1]]
    assert cli("evaluate", "bm25", "--pairs", file, *options, "--out", tmp_path / "out").code == 0


def test_columns_of_documents_are_named(tmp_path):
    file = write_csv(tmp_path / "qa.csv", ROWS)
    more = write_csv(tmp_path / "more.csv", [{"id": "1", "full_text": "a document"}])
    said = cli("evaluate", "bm25", "--pairs", file, "--documents", more, "--out", tmp_path / "out")
    assert_refused(said, str(more), "--document-column full_text")


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([*ROWS, {"anchor": "", "positive": "x"}], ["rows that cannot be used", "1 empty"]),
        ([ROWS[0], {"anchor": "same", "positive": "same"}], ["rows that cannot be used", "line 3"]),
        ([ROWS[0]], ["nothing to choose from", "two different answers"]),
        ([ROWS[0], ROWS[1] | {"positive": ANSWERS[0]}], ["nothing to choose from"]),
    ],
)
def test_files_that_give_no_figure(tmp_path, rows, parts):
    file = write_csv(tmp_path / "qa.csv", rows)
    assert_refused(
        cli("evaluate", "bm25", "--pairs", file, "--out", tmp_path / "out"), str(file), *parts
    )
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there(tmp_path):
    assert_refused(
        cli("evaluate", "bm25", "--pairs", tmp_path / "none.csv"), "none.csv", "no such file"
    )
    file = write_csv(tmp_path / "qa.csv", ROWS)
    assert_refused(
        cli("evaluate", "bm25", "--pairs", file, "--documents", tmp_path / "no.txt"),
        "no.txt",
        "no such file",
    )
    assert_refused(cli("evaluate", "bm25", "--documents", file), "--documents", "--pairs FILE")


def test_two_sets_of_one_name(tmp_path):
    (tmp_path / "other").mkdir()
    files = [write_csv(folder / "qa.csv", ROWS) for folder in (tmp_path, tmp_path / "other")]
    said = cli(
        "evaluate", "bm25", "--pairs", files[0], "--pairs", files[1], "--out", tmp_path / "out"
    )
    assert_refused(said, "2 sets are named 'Pairs-qa'")
    sets = [
        beir(folder / "retrieval" / "Same", ANSWERS, QUESTIONS, [[i] for i in range(12)])
        for folder in (tmp_path, tmp_path / "b")
    ]
    with pytest.raises(DataError, match="2 sets are named 'Local-Same'"):
        evaluate(["bm25"], EvaluateOptions(local=tuple(sets)), tmp_path / "out")


def test_where_results_go(tmp_path, monkeypatch):
    _, run = finished()
    monkeypatch.chdir(tmp_path)
    assert results_folder(str(run)) == run / "scores"
    assert results_folder(str(run / "1-pretext")) == run / "scores"
    assert results_folder("bm25", None, ["bm25", str(run)]) == run / "scores", (
        "beside the run that it is compared with"
    )
    assert results_folder("bm25", tmp_path / "mine", [str(run)]) == tmp_path / "mine"
    assert results_folder("bm25", None, ["bm25", "tfidf"]) == RESULTS_FOLDER
    said = cli("evaluate", "bm25", "tfidf", "--pairs", write_csv(tmp_path / "qa.csv", ROWS))
    assert said.code == 0
    assert f"results: {RESULTS_FOLDER / 'summary.json'}" in said.err
    assert {path.name for path in tmp_path.iterdir()} == {"qa.csv", str(RESULTS_FOLDER)}
