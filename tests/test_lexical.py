"""The lexical floor through the same tasks as any encoder."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer

from llm2comp.errors import DataError
from llm2comp.evaluate import Options, evaluate
from llm2comp.evaluation.lexical import TfidfEncoder, texts_of
from llm2comp.evaluation.paper14 import PAPER14
from llm2comp.evaluation.tasks import local_tasks
from tiny_run import sentences, write_rows


def sts(folder, rows):
    home = folder / "sts" / "One"
    home.mkdir(parents=True)
    write_rows(home / "test.jsonl", rows)
    return folder


def retrieval(folder):
    home = folder / "retrieval" / "Found"
    (home / "qrels").mkdir(parents=True)
    documents = [f"{text} word{i}" for i, text in enumerate(sentences(12, 6, seed=3))]
    write_rows(home / "corpus.jsonl", [{"_id": f"d{i}", "title": f"title{i}", "text": t} for i, t in enumerate(documents)])
    write_rows(home / "queries.jsonl", [{"_id": f"q{i}", "text": f"word{i} title{i}"} for i in range(6)])
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(6))]
    (home / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_figure_is_sklearn_s_on_the_texts_compared(tmp_path):
    texts = sentences(40, 5, seed=8)
    rows = [
        {"sentence1": texts[2 * i], "sentence2": texts[2 * i + 1] + " " + texts[2 * i][: 4 * i], "score": i} for i in range(20)
    ]
    found = evaluate(["tfidf"], Options(local=(sts(tmp_path / "sets", rows),)), tmp_path / "out")[0]
    vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    vectorizer.fit([row[key] for row in rows for key in ("sentence1", "sentence2")])
    first, second = (vectorizer.transform([row[key] for row in rows]).toarray() for key in ("sentence1", "sentence2"))
    expected = spearmanr((first * second).sum(1), [row["score"] for row in rows]).statistic
    assert found.scores["Local-One"]["score"] == pytest.approx(expected, abs=1e-5)
    assert 0.2 < expected < 1
    assert found.name == "llm2comp/tfidf"
    assert json.loads((tmp_path / "out" / "summary.json").read_text())[0]["model"] == "tfidf"


def test_titles_and_queries_count(tmp_path):
    """Words that only titles share with the queries find their documents."""
    row = evaluate(["tfidf"], Options(local=(retrieval(tmp_path / "sets"),)), tmp_path / "out")[0]
    assert row.scores["Local-Found"]["score"] == 1.0


def test_texts_of_every_layout(tmp_path):
    (task,) = local_tasks(retrieval(tmp_path / "sets"))
    found = list(texts_of(task))
    assert "word5 title5" in found
    assert any(text.startswith("title0 ") and text.endswith("word0") for text in found)
    assert not {"d0", "q0"} & set(found), "ids are no texts"


def test_all_kinds_of_tasks(tmp_path):
    """The paper's 14 tasks on made-up data: clustering, retrieval, STS, classification, pairs, reranking."""
    row = evaluate(["tfidf"], Options(tasks=("paper14",), rehearse=True), tmp_path)[0]
    assert set(row.scores) == set(PAPER14)
    assert row.synthetic
    assert all(np.isfinite(found["score"]) for found in row.scores.values())
    assert row.scores["Banking77Classification"]["score"] > 0.9, "topics have words of their own"


def test_no_word_that_counts(tmp_path):
    rows = [{"sentence1": "the of", "sentence2": "and to", "score": i} for i in range(3)]
    (task,) = local_tasks(sts(tmp_path / "sets", rows))
    with pytest.raises(DataError, match="no words to weigh"):
        TfidfEncoder().fit_task(task)
