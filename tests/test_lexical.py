"""The lexical floor through the same tasks as any encoder."""

import json
from types import SimpleNamespace

import bm25s
import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer

from llm2comp.data import python_docs
from llm2comp.errors import DataError
from llm2comp.lab.evaluation.evaluate import EvaluateOptions, evaluate
from llm2comp.lab.evaluation.lexical import LEXICAL, TfidfEncoder, texts_of
from llm2comp.lab.evaluation.paper14 import PAPER14
from llm2comp.lab.evaluation.retrieval import Collection
from llm2comp.lab.evaluation.tasks import local_tasks
from rehearsal import rehearse
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
    write_rows(
        home / "corpus.jsonl",
        [{"_id": f"d{i}", "title": f"title{i}", "text": t} for i, t in enumerate(documents)],
    )
    write_rows(
        home / "queries.jsonl", [{"_id": f"q{i}", "text": f"word{i} title{i}"} for i in range(6)]
    )
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(6))]
    (home / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_figure_is_sklearn_s_on_the_texts_compared(tmp_path):
    texts = sentences(40, 5, seed=8)
    rows = [
        {
            "sentence1": texts[2 * i],
            "sentence2": texts[2 * i + 1] + " " + texts[2 * i][: 4 * i],
            "score": i,
        }
        for i in range(20)
    ]
    found = evaluate(
        ["tfidf"], EvaluateOptions(local=(sts(tmp_path / "sets", rows),)), tmp_path / "out"
    )[0]
    vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    vectorizer.fit([row[key] for row in rows for key in ("sentence1", "sentence2")])
    first, second = (
        vectorizer.transform([row[key] for row in rows]).toarray()
        for key in ("sentence1", "sentence2")
    )
    expected = spearmanr((first * second).sum(1), [row["score"] for row in rows]).statistic
    assert found.scores["Local-One"]["score"] == pytest.approx(expected, abs=1e-5)
    assert 0.2 < expected < 1
    assert found.name == "llm2comp/tfidf"
    assert json.loads((tmp_path / "out" / "summary.json").read_text())[0]["model"] == "tfidf"


def test_titles_and_queries_count(tmp_path):
    """Words that only titles share with the queries find their documents."""
    row = evaluate(
        ["tfidf"], EvaluateOptions(local=(retrieval(tmp_path / "sets"),)), tmp_path / "out"
    )[0]
    assert row.scores["Local-Found"]["score"] == 1.0


def test_texts_of_every_layout(tmp_path):
    (task,) = local_tasks(retrieval(tmp_path / "sets"))
    found = list(texts_of(task))
    assert "word5 title5" in found
    assert any(text.startswith("title0 ") and text.endswith("word0") for text in found)
    assert not {"d0", "q0"} & set(found), "ids are no texts"


@pytest.mark.thorough
@pytest.mark.parametrize("model", LEXICAL)
def test_all_kinds_of_tasks(tmp_path, monkeypatch, model):
    """The paper's 14 tasks on made-up data: clustering, retrieval, STS, classification, pairs,
    reranking.
    """
    rehearse(monkeypatch)
    row = evaluate([model], EvaluateOptions(tasks=("paper14",)), tmp_path)[0]
    assert set(row.scores) == set(PAPER14)
    assert all(np.isfinite(found["score"]) for found in row.scores.values())
    assert row.scores["Banking77Classification"]["score"] > 0.9, "topics have words of their own"


def test_no_word_that_counts(tmp_path):
    rows = [{"sentence1": "the of", "sentence2": "and to", "score": i} for i in range(3)]
    (task,) = local_tasks(sts(tmp_path / "sets", rows))
    with pytest.raises(DataError, match="no words to weigh"):
        TfidfEncoder().fit_task(task)


# ---- BM25


def bm25s_scores(documents, queries):
    """(Q, D) scores of the library's own index."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(documents, stopwords="en", show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(queries, stopwords="en", show_progress=False, return_ids=False)
    return np.stack([index.get_scores(words) for words in tokens])


def searched(documents, queries, **options):
    """Query → document → score, by place."""
    encoder = LEXICAL["bm25"]()
    asked = Dataset.from_list([{"id": f"q{i}", "text": text} for i, text in enumerate(queries)])
    corpus = Dataset.from_list(
        [{"id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)]
    )
    encoder.index(corpus, task_metadata=SimpleNamespace(name="here"))
    return encoder.search(asked, **({"top_k": len(documents)} | options))


def test_bm25_is_bm25s_s():
    documents, queries = sentences(60, 12, seed=1) + ["", "the of and"], sentences(20, 4, seed=2)
    queries += [f"{queries[0]} {queries[0]}", "not-a-word-of-them"]
    expected = bm25s_scores(documents, queries)
    found = searched(documents, queries)
    assert (expected > 0).any(axis=1).sum() == len(queries) - 1
    for i, scores in enumerate(expected):
        assert found[f"q{i}"] == pytest.approx(
            {f"d{j}": float(s) for j, s in enumerate(scores) if s > 0}, rel=1e-4
        )


def test_bm25_ranks_candidates_and_those_without_a_word_in_common_last():
    found = searched(["alpha beta", "gamma", "alpha"], ["alpha"], top_ranked={"q0": ["d1", "d2"]})
    assert list(found["q0"]) == ["d2", "d1"]
    assert found["q0"]["d1"] == 0
    assert list(searched(["alpha beta", "gamma", "alpha"], ["alpha"], top_k=1)["q0"]) == ["d2"]


def test_bm25_is_the_demo_s(tmp_path):
    """The same figure from `evaluate` as from the demo's reference."""
    task = python_docs.retrieval()
    names = list(task.queries)[:60]
    queries = {name: task.queries[name] for name in names}
    relevant = {name: task.relevant[name] for name in names}
    home = tmp_path / "retrieval" / "Docs"
    (home / "qrels").mkdir(parents=True)
    write_rows(
        home / "corpus.jsonl",
        [{"_id": key, "title": "", "text": text} for key, text in task.documents.items()],
    )
    write_rows(
        home / "queries.jsonl", [{"_id": key, "text": text} for key, text in queries.items()]
    )
    lines = [f"{query}\t{document}\t1" for query, ids in relevant.items() for document in ids]
    (home / "qrels" / "test.tsv").write_text(
        "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
    )
    found = evaluate(["BM25"], EvaluateOptions(local=(tmp_path,)), tmp_path / "out")[0]
    expected = Collection(queries, task.documents, relevant).score_bm25().ndcg_at_10
    assert 0.2 < expected < 0.95
    assert found.scores["Local-Docs"]["score"] == pytest.approx(expected, abs=2e-3), (
        "but for the order of equal scores"
    )
    assert (found.model, found.name) == ("BM25", "llm2comp/bm25")


def test_no_word_that_documents_have(tmp_path):
    with pytest.raises(DataError, match="no words to weigh"):
        searched(["the", "of"], ["alpha"])


def test_a_figure_that_is_no_number_is_a_failure(tmp_path):
    """Pairs that share no word have one similarity: no correlation with anything."""
    rows = [{"sentence1": f"alpha{i}", "sentence2": f"beta{i}", "score": i} for i in range(5)]
    found = evaluate(
        list(LEXICAL), EvaluateOptions(local=(sts(tmp_path / "sets", rows),)), tmp_path / "out"
    )
    for row in found:
        assert row.scores == {}
        assert "score is not a number" in row.failed["Local-One"]
    assert "NaN" not in (tmp_path / "out" / "summary.json").read_text()
