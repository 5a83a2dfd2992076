"""`budget`: what a vector may cost, and what it still finds."""

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from llm2comp.data.loaded import Pair
from llm2comp.errors import DataError, ModelFolderError
from llm2comp.lab.budget import _stored, _task, budget, export_row, worth
from llm2comp.lab.evaluation.retrieval import Collection
from llm2comp.model.vectors import embed_texts
from llm2comp.storage.loading import load
from tiny_run import assert_refused, cli, finished, sentences, write_rows

TEXTS = sentences(40, 12, seed=8)
PAIRS = [Pair(" ".join(text.split()[:5]), text) for text in TEXTS[:15]]


@pytest.fixture(scope="module")
def rows():
    """Of an encoder of three memory tokens and 32 dimensions."""
    return budget(finished()[1], TEXTS, PAIRS, "cpu")


def row_of(rows, *wanted):
    (found,) = [r for r in rows if (r.tokens, r.dims, r.precision, r.scoring) == wanted]
    return found


def test_bytes_are_what_numbers_take(rows):
    assert len(rows) == 3 * 4 * 3  # (mean and maxsim of 3, mean of 1) × 32, 16, 8 dims × precisions
    assert row_of(rows, 3, 32, "float32", "mean").bytes_per_passage == 128
    assert row_of(rows, 3, 32, "float16", "mean").bytes_per_passage == 64
    assert row_of(rows, 3, 16, "int8", "maxsim").bytes_per_passage == 48
    assert row_of(rows, 1, 8, "binary", "mean").bytes_per_passage == 1
    assert all(row.ms_per_query > 0 for row in rows)
    sizes = [row.bytes_per_passage for row in rows]
    assert sizes == sorted(sizes)


def test_the_whole_vector_scores_as_the_encoder_itself(rows):
    model = load(finished()[1] / "3-scl", "cpu")  # the exported one cuts queries elsewhere
    queries = {f"q{n}": pair.anchor for n, pair in enumerate(PAIRS)}
    documents = {f"d{n}": text for n, text in enumerate(TEXTS)}
    relevant = {f"q{n}": {f"d{n}"} for n in range(len(PAIRS))}
    collection = Collection(queries, documents, relevant)
    ranked = collection.by_cosine(model, embed_texts(model, TEXTS, role="document"))
    expected = float(collection.ndcg_of_each(ranked).mean())
    assert 0.1 < expected < 1
    whole = row_of(rows, 3, 32, "float32", "mean")
    assert whole.ndcg_at_10 == pytest.approx(expected, abs=1e-6)


def test_a_question_with_several_answers_is_one_query():
    """Who ranks all of its answers first has found all there is to find."""
    pairs = [Pair(f"question {n % 5}", text) for n, text in enumerate(TEXTS[:15])]
    task = _task(TEXTS, pairs)
    assert list(task.queries.values()) == [f"question {n}" for n in range(5)]
    assert list(task.documents.values()) == TEXTS
    assert [len(task.relevant[query]) for query in task.queries] == [3] * 5
    perfect = [[(name, 1.0) for name in sorted(right)] for right in task.relevant.values()]
    collection = Collection(task.queries, task.documents, task.relevant)
    assert collection.ndcg_of_each(perfect) == pytest.approx(1)


def test_a_worthy_row_is_bettered_by_no_cheaper_one(rows):
    kept = worth(rows)
    assert 1 < len(kept) < len(rows)
    for row in rows:
        cheaper = [k for k in kept if k.bytes_per_passage <= row.bytes_per_passage]
        assert max(k.ndcg_at_10 for k in cheaper) >= row.ndcg_at_10


@pytest.mark.parametrize(
    ("precision", "error"), [("float32", 0), ("float16", 1e-3), ("int8", 5e-3)]
)
def test_what_is_stored_comes_back(precision, error):
    vectors = np.random.default_rng(0).uniform(-1, 1, (50, 2, 16)).astype(np.float32)
    stored, back = _stored(vectors, precision)
    assert np.abs(back(stored) - vectors).max() <= error
    signs, back = _stored(vectors, "binary")
    assert signs.shape == (50, 2, 2)
    assert np.array_equal(back(signs) > 0, vectors > 0)


def test_a_row_is_exported_as_it_was_measured(rows, tmp_path):
    row = row_of(rows, 1, 16, "int8", "mean")
    told = export_row(finished()[1], row, tmp_path / "model", "cpu")
    assert 'precision="int8"' in told
    exported = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(TEXTS[:4])
    model = load(finished()[1] / "3-scl", "cpu")
    model[0].compressor.use_prefix(1)
    expected = embed_texts(model, TEXTS[:4])[:, :16]
    assert np.allclose(exported, expected, atol=1e-5)
    with pytest.raises(ModelFolderError, match="some of the states"):
        export_row(finished()[1], row_of(rows, 3, 16, "int8", "maxsim"), tmp_path / "x", "cpu")


def test_an_encoder_without_memory_tokens_varies_in_dimensions_alone():
    found = budget(str(finished()[1] / "model"), TEXTS, PAIRS, "cpu")
    assert {(row.tokens, row.scoring) for row in found} == {(1, "mean")}
    assert {row.dims for row in found} == {32, 16, 8}


def test_the_command_shows_rows_and_refuses_what_is_none(tmp_path):
    two = [
        f"This is text {n} of all. {a}. {b}."
        for n, (a, b) in enumerate(zip(TEXTS, TEXTS[5:], strict=False))
    ]
    file = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in two])
    options = ("--texts", file, "--device", "cpu")
    said = cli("budget", finished()[1], *options, "--export", 1, "--out", tmp_path / "one")
    assert said.code == 0, said.err
    assert "nDCG@10" in said.err
    assert (tmp_path / "one" / "modules.json").is_file()
    assert_refused(cli("budget", finished()[1], "--texts", tmp_path / "no.jsonl"), "no.jsonl")
    assert_refused(cli("budget", tmp_path / "no-run", *options), "no such folder")
    assert_refused(cli("budget", finished()[1], *options, "--export", 1), "--out")
    with pytest.raises(DataError, match="too few queries"):
        budget(finished()[1], ["one text"], (), "cpu")
