"""Evaluation sets in files: mteb's figures against formulas on the same vectors, its cache, and
every way to be unusable.
"""

import gzip
import json
import math
import os
import random
import zlib
from pathlib import Path

import mteb
import numpy as np
import pytest
import torch
import zstandard
from mteb.models.model_meta import ModelMeta
from scipy.stats import spearmanr
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import v_measure_score

from llm2comp.errors import DataError
from llm2comp.lab.evaluation.local import KINDS, LocalSet, as_mteb, find_sets

WORDS = [f"word{i}" for i in range(60)]


class WordSums:
    """Encodes a text as the sum of fixed vectors of its words; knows what it has encoded."""

    def __init__(self, *_, **__):
        self.mteb_model_meta = ModelMeta.create_empty({"name": "tests/word-sums", "revision": "1"})
        self.texts = []

    def embed(self, texts):
        def vector(word):
            return np.random.default_rng(zlib.crc32(word.encode())).standard_normal(16)

        return np.array(
            [sum((vector(word) for word in text.split()), np.zeros(16)) for text in texts]
        )

    def encode(self, inputs, **_):
        texts = [text for batch in inputs for text in batch["text"]]
        self.texts += texts
        return self.embed(texts)

    def similarity(self, embeddings1, embeddings2):
        return torch.tensor(cosines(np.asarray(embeddings1), np.asarray(embeddings2)))

    def similarity_pairwise(self, embeddings1, embeddings2):
        return self.similarity(embeddings1, embeddings2).diagonal()


def cosines(a_ND, b_MD):
    return (a_ND / np.linalg.norm(a_ND, axis=1, keepdims=True)) @ (
        b_MD / np.linalg.norm(b_MD, axis=1, keepdims=True)
    ).T


def figure(task, model=None):
    result = mteb.evaluate(
        model or WordSums(), task, cache=None, co2_tracker=False, show_progress_bar=False
    )
    return result.task_results[0].get_score()


# ---- sets to be written: {file: rows}, with a row for each line


def texts(count, seed, length=5):
    """Different texts."""
    drawn = np.random.default_rng(seed)
    return [f"{' '.join(drawn.choice(WORDS, length))} text{index}" for index in range(count)]


def pairs(key, values, seed):
    both = zip(texts(len(values), seed), texts(len(values), seed + 1), values, strict=True)
    # two words in common for large values, so that the figures are away from zero
    return [
        {"sentence1": a, "sentence2": b + f" {a[:12]}" * int(2 * value > max(values)), key: value}
        for a, b, value in both
    ]


def labelled(counts, seed):
    """Texts that share a word with the others of their label, in mixed order."""
    rows = [
        {"text": f"{text} {label}", "label": label}
        for number, (label, count) in enumerate(counts.items())
        for text in texts(count, seed + number, 3)
    ]
    random.Random(seed).shuffle(rows)
    return rows


SCORES = np.random.default_rng(0).uniform(0, 5, 40).round(2).tolist()
STS = {"test.jsonl": pairs("score", SCORES, 1)}
PAIRS = {"test.jsonl": pairs("label", [i % 3 % 2 for i in range(40)], 3)}
CLASSIFICATION = {
    "train.jsonl": labelled({"red": 40, "green": 25, "blue": 9}, 5),
    "test.jsonl": labelled({"red": 10, "green": 10, "blue": 10}, 9),
}
CLUSTERING = {"test.jsonl": labelled({"1": 20, "2": 20, "3": 20, "4": 20}, 13)}
DOCUMENTS = {
    str(i): (f"title{i} {text.split()[0]}" if i % 4 else "", text if i != 39 else "")
    for i, text in enumerate(texts(40, 17), 1)
}
# ids that documents have too, as in real collections
QUERIES = {str(i): text for i, text in enumerate(texts(12, 18), 1)}
GRADES = {
    query: {
        str((int(query) * 7 + 3 * i) % 40 + 1): grade
        for i, grade in enumerate((3, 0, 1, 2, 1)[: 2 + int(query) % 4])
    }
    for query in QUERIES
}
RETRIEVAL = {
    "corpus.jsonl": [
        {"_id": key, "title": title, "text": text} for key, (title, text) in DOCUMENTS.items()
    ],
    "queries.jsonl": [{"_id": key, "text": text} for key, text in QUERIES.items()],
    "qrels/test.tsv": [
        "query-id\tcorpus-id\tscore",
        *(
            f"{query}\t{document}\t{grade}"
            for query, judged in GRADES.items()
            for document, grade in judged.items()
        ),
    ],
}
RERANKING = {
    "test.jsonl": [
        {
            "query": query,
            "positive": texts(1 + i % 3, 100 + i),
            "negative": texts(5 + i % 4, 200 + i),
        }
        for i, query in enumerate(texts(9, 19))
    ]
}
SETS = dict(zip(KINDS, (STS, PAIRS, CLASSIFICATION, CLUSTERING, RETRIEVAL, RERANKING), strict=True))


def content(rows):
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def write(root, kind, name="Set", files=None):
    """Write a set; `files` replace the kind's own, None leaves one out."""
    local = LocalSet(kind, name, root / kind / name)
    local.folder.mkdir(parents=True)
    for file, rows in (SETS[kind] | (files or {})).items():
        path = local.folder / file
        path.parent.mkdir(exist_ok=True)
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        elif rows is not None:
            path.write_text(content(rows), encoding="utf-8")
    return local


# ---- figures (mteb rounds those of retrieval and reranking to five digits)


def test_sts_is_spearman_of_cosines(tmp_path):
    a_ND, b_ND = (
        WordSums().embed([row[key] for row in STS["test.jsonl"]])
        for key in ("sentence1", "sentence2")
    )
    expected = spearmanr(cosines(a_ND, b_ND).diagonal(), SCORES).statistic
    assert 0.2 < expected < 0.99
    assert figure(as_mteb(write(tmp_path, "sts"))) == pytest.approx(expected, abs=1e-9)


def average_precision(relevant, scores):
    """Mean of the precisions at the places of the relevant ones."""
    ranked = np.asarray(relevant)[np.argsort(-np.asarray(scores), kind="stable")]
    return np.mean([ranked[: place + 1].mean() for place in np.flatnonzero(ranked)])


def test_pairs_is_the_average_precision_by_cosine(tmp_path):
    a_ND, b_ND = (
        WordSums().embed([row[key] for row in PAIRS["test.jsonl"]])
        for key in ("sentence1", "sentence2")
    )
    labels = [row["label"] for row in PAIRS["test.jsonl"]]
    likeness = {
        "cosine": cosines(a_ND, b_ND).diagonal(),
        "dot": (a_ND * b_ND).sum(1),
        "euclidean": -np.linalg.norm(a_ND - b_ND, axis=1),
        "manhattan": -np.abs(a_ND - b_ND).sum(1),
    }
    expected = {name: average_precision(labels, scores) for name, scores in likeness.items()}
    assert len({round(value, 6) for value in expected.values()}) > 1
    assert 0.4 < expected["cosine"] < 0.999
    assert expected["cosine"] != max(expected.values()), "vacuous: no other similarity is better"
    assert figure(as_mteb(write(tmp_path, "pair_classification"))) == pytest.approx(
        expected["cosine"], abs=1e-9
    )


def test_classification_is_accuracy_of_ten_regressions_on_sixteen_texts_a_class(tmp_path):
    train, test = CLASSIFICATION["train.jsonl"], CLASSIFICATION["test.jsonl"]
    x_ND, x_MD = (WordSums().embed([row["text"] for row in rows]) for rows in (train, test))
    order, accuracies = list(range(len(train))), []
    for _ in range(10):
        np.random.RandomState(42).shuffle(order)  # from the order before, as mteb does
        drawn = [
            i
            for label in ("red", "green", "blue")
            for i in [i for i in order if train[i]["label"] == label][:16]
        ]
        drawn.sort(key=order.index)
        assert len(drawn) == 16 + 16 + 9
        regression = LogisticRegression(max_iter=100, random_state=42).fit(
            x_ND[drawn], [train[i]["label"] for i in drawn]
        )
        accuracies.append(regression.score(x_MD, [row["label"] for row in test]))
    assert len(set(accuracies)) > 1
    assert 0.5 < np.mean(accuracies) < 0.99
    assert figure(as_mteb(write(tmp_path, "classification"))) == pytest.approx(
        np.mean(accuracies), abs=1e-9
    )


def test_classification_of_two_classes_by_name(tmp_path):
    """Figures that mteb adds for two classes want numbers."""
    two = {
        "train.jsonl": labelled({"no": 20, "yes": 20}, 1),
        "test.jsonl": labelled({"no": 10, "yes": 10}, 2),
    }
    assert figure(as_mteb(write(tmp_path, "classification", files=two))) > 0.5


def accuracy_by_hand(train, test):
    """Accuracy of one regression on all of a train part of at most 16 texts a class."""
    x_ND, x_MD = (WordSums().embed([row["text"] for row in rows]) for rows in (train, test))
    names = [[str(row["label"]).strip() for row in rows] for rows in (train, test)]
    return (
        LogisticRegression(max_iter=100, random_state=42).fit(x_ND, names[0]).score(x_MD, names[1])
    )


@pytest.mark.parametrize("tested", [("blue", "red"), ("blue", "green"), ("green",), ("red",)])
def test_the_test_part_may_lack_classes(tmp_path, tested):
    train = labelled({"blue": 12, "green": 12, "red": 12}, 1)
    test = labelled(dict.fromkeys(tested, 8), 22)
    task = as_mteb(
        write(tmp_path, "classification", files={"train.jsonl": train, "test.jsonl": test})
    )
    found = figure(task)
    assert 0 < found <= 1
    assert found == pytest.approx(accuracy_by_hand(train, test), abs=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["classification", "clustering"])
def test_labels_are_told_apart_by_what_they_say(tmp_path, kind):
    """Outer spaces, a number and its digits, 1 and 1.0, are one label."""
    plain = {
        file: [row | {"label": str(len(row["label"]))} for row in rows]
        for file, rows in SETS[kind].items()
    }
    other = {
        file: [
            row | {"label": (f" {row['label']}\t", int(row["label"]), float(row["label"]))[i % 3]}
            for i, row in enumerate(rows)
        ]
        for file, rows in plain.items()
    }
    if kind == "clustering":  # its labels have one length
        plain = SETS[kind]
        other = {
            "test.jsonl": [
                row | {"label": (int(row["label"]), f"{row['label']} ")[i % 2]}
                for i, row in enumerate(plain["test.jsonl"])
            ]
        }
    found = [
        figure(as_mteb(write(tmp_path, kind, name, files)))
        for name, files in (("plain", plain), ("other", other))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-9)


def test_yes_and_no_are_labels(tmp_path):
    train, test = labelled({"no": 20, "yes": 20}, 1), labelled({"no": 10, "yes": 10}, 2)
    said = {
        file: [row | {"label": row["label"] == "yes"} for row in rows]
        for file, rows in (("train.jsonl", train), ("test.jsonl", test))
    }
    assert figure(as_mteb(write(tmp_path, "classification", files=said))) > 0.5
    pairs = [row | {"label": bool(row["label"])} for row in PAIRS["test.jsonl"]]
    found = [
        figure(as_mteb(write(tmp_path, "pair_classification", name, {"test.jsonl": rows})))
        for name, rows in (("a", pairs), ("b", PAIRS["test.jsonl"]))
    ]
    assert found[0] == found[1]


def test_clustering_is_v_measure_of_ten_draws(tmp_path):
    rows = CLUSTERING["test.jsonl"]
    x_ND, labels = (
        WordSums().embed([row["text"] for row in rows]),
        np.array([row["label"] for row in rows]),
    )
    drawing, measures = random.Random(42), []
    for _ in range(10):
        drawn = drawing.choices(range(len(rows)), k=16384)
        assert len(set(drawn)) == len(rows), "all texts take part"
        kmeans = MiniBatchKMeans(4, batch_size=512, init="k-means++", n_init=1, random_state=42)
        measures.append(v_measure_score(labels[drawn], kmeans.fit_predict(x_ND[drawn])))
    assert 0.05 < np.mean(measures) < 0.95
    task = as_mteb(write(tmp_path, "clustering"))
    assert figure(task) == pytest.approx(np.mean(measures), abs=1e-9)
    assert figure(task) == pytest.approx(np.mean(measures), abs=1e-9), (
        "a second evaluation has the same draws"
    )


def ndcg_at_10(grades, ranking):
    """Järvelin and Kekäläinen (2002), with the grade as gain."""

    def dcg(found):
        return sum(grade / math.log2(place + 1) for place, grade in enumerate(found[:10], 1))

    return dcg([grades.get(key, 0) for key in ranking]) / dcg(sorted(grades.values(), reverse=True))


def test_retrieval_is_ndcg_with_graded_gain_on_title_and_text(tmp_path):
    documents_ND = WordSums().embed([f"{title} {text}" for title, text in DOCUMENTS.values()])
    ranking = np.argsort(-cosines(WordSums().embed(QUERIES.values()), documents_ND), axis=1)
    ids = list(DOCUMENTS)
    figures = [
        ndcg_at_10(GRADES[query], [ids[i] for i in row])
        for query, row in zip(QUERIES, ranking, strict=True)
    ]
    assert min(figures) < 0.1 < np.mean(figures) < max(figures) < 1
    assert figure(as_mteb(write(tmp_path, "retrieval"))) == pytest.approx(
        np.mean(figures), abs=6e-6
    )


@pytest.mark.parametrize("title", [None, ""])
def test_documents_need_no_title(tmp_path, title):
    rows = [
        {"_id": row["_id"], "text": row["text"]} | ({} if title is None else {"title": None})
        for row in RETRIEVAL["corpus.jsonl"]
    ]
    empty = [row | {"title": ""} for row in RETRIEVAL["corpus.jsonl"]]
    found, expected, whole = (
        figure(as_mteb(write(tmp_path, "retrieval", name, files)))
        for name, files in (
            ("A", {"corpus.jsonl": rows}),
            ("B", {"corpus.jsonl": empty}),
            ("C", {}),
        )
    )
    assert found == expected != whole


def test_reranking_is_mean_average_precision(tmp_path):
    expected = []
    for row in RERANKING["test.jsonl"]:
        candidates = row["positive"] + row["negative"]
        scores = cosines(WordSums().embed([row["query"]]), WordSums().embed(candidates))[0]
        expected.append(
            average_precision([1] * len(row["positive"]) + [0] * len(row["negative"]), scores)
        )
    assert min(expected) < 0.3 < np.mean(expected) < 0.99
    assert figure(as_mteb(write(tmp_path, "reranking"))) == pytest.approx(
        np.mean(expected), abs=6e-6
    )


def test_ties_gain_nothing_in_reranking(tmp_path):
    same = {"test.jsonl": [{"query": "a", "positive": ["b"] * 12, "negative": ["b"] * 30}]}
    worst = np.mean([i / (30 + i) for i in range(1, 13)])
    assert figure(as_mteb(write(tmp_path, "reranking", files=same))) == pytest.approx(
        worst, abs=6e-6
    )


# ---- what mteb keeps


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_result_is_kept_until_the_data_change(tmp_path, kind):
    local, cache = write(tmp_path, kind), mteb.ResultCache(tmp_path / "cache")

    def evaluate():
        model = WordSums()
        result = mteb.evaluate(
            model, as_mteb(local), cache=cache, co2_tracker=False, show_progress_bar=False
        )
        return result.task_results[0].get_score(), len(model.texts)

    score, encoded = evaluate()
    assert 0 < score < 1
    assert encoded > 0
    (file,) = (tmp_path / "cache").rglob("Local-Set.json")
    kept = json.loads(file.read_text())
    assert kept["dataset_revision"] == as_mteb(local).metadata.revision
    assert kept["scores"]["test"][0]["main_score"] == pytest.approx(score)
    assert evaluate() == (pytest.approx(score, abs=1e-6), 0), "read back, nothing encoded"

    file = "queries.jsonl" if kind == "retrieval" else "test.jsonl"
    rows = SETS[kind][file]
    # 8 answers it
    changed = (
        rows[:-6]
        if kind != "retrieval"
        else [rows[0] | {"text": " ".join(DOCUMENTS["8"])}, *rows[1:]]
    )
    (local.folder / file).write_text(content(changed), encoding="utf-8")
    again, encoded = evaluate()
    assert encoded > 0
    assert again != pytest.approx(score, abs=1e-3)
    assert evaluate() == (pytest.approx(again, abs=1e-6), 0)


def test_revision_is_that_of_the_files_that_count(tmp_path):
    def revision(name, **files):
        local = write(
            tmp_path, "sts", name, {file.replace("_", "."): rows for file, rows in files.items()}
        )
        return as_mteb(local).metadata.revision

    plain = revision("A")
    assert len(plain) == 12
    assert int(plain, 16) >= 0
    assert (
        revision("B", dev_jsonl=STS["test.jsonl"][:9], train_jsonl=STS["test.jsonl"][:5]) == plain
    )
    assert revision("C", test_jsonl=STS["test.jsonl"][1:]) != plain


# ---- which files


def test_dev_stands_in_for_test_and_train_never_does(tmp_path):
    few, more = STS["test.jsonl"][:9], STS["test.jsonl"][:12]

    def split_and_count(name, **files):
        task = as_mteb(
            write(tmp_path, "sts", name, {f"{file}.jsonl": rows for file, rows in files.items()})
        )
        (parts,) = task.dataset.values()
        assert list(parts) == task.metadata.eval_splits
        return task.metadata.eval_splits[0], len(parts[task.metadata.eval_splits[0]])

    assert split_and_count("both", test=few, dev=more) == ("test", 9)
    assert split_and_count("dev", test=None, dev=more) == ("dev", 12)
    refused(
        write(tmp_path, "sts", "train", {"test.jsonl": None, "train.jsonl": more}),
        "test.jsonl or dev.jsonl",
        "train.jsonl",
    )


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_compressed_files_give_the_same(tmp_path, kind):
    packed = {}
    for number, (file, rows) in enumerate(SETS[kind].items()):
        data = content(rows).encode()
        packed |= {
            file: None,
            f"{file}{('.gz', '.zst')[number % 2]}": (gzip.compress, zstandard.compress)[number % 2](
                data
            ),
        }
    assert figure(as_mteb(write(tmp_path / "packed", kind, files=packed))) == figure(
        as_mteb(write(tmp_path, kind))
    )


def test_queries_of_other_splits_are_not_asked(tmp_path):
    lines = RETRIEVAL["qrels/test.tsv"]
    keep = [line for line in lines if line.split("\t")[0] not in ("3", "5")]
    files = {
        "qrels/test.tsv": keep,
        "qrels/train.tsv": [lines[0], *(line for line in lines if line not in keep)],
    }
    (parts,) = as_mteb(write(tmp_path, "retrieval", files=files)).dataset.values()
    assert list(parts) == ["test"]
    assert sorted(parts["test"]["queries"]["id"]) == sorted(set(QUERIES) - {"3", "5"})
    assert sorted(parts["test"]["relevant_docs"]) == sorted(set(QUERIES) - {"3", "5"})


def test_names_do_not_collide_with_those_of_mteb(tmp_path):
    task = as_mteb(write(tmp_path, "sts", "STS12"))
    assert task.metadata.name == "Local-STS12"
    assert task.metadata.main_score == "cosine_spearman"


# ---- finding


def test_sets_are_found_from_every_height(tmp_path):
    for kind in reversed(KINDS):
        write(tmp_path, kind, f"{kind}-b")
        write(tmp_path, kind, f"{kind}-a")
    (tmp_path / "readme.md").write_text("notes")
    (tmp_path / ".cache").mkdir()
    found = find_sets(tmp_path)
    assert [(each.kind, each.name) for each in found] == [
        (kind, f"{kind}-{end}") for kind in KINDS for end in "ab"
    ]
    assert all(each.folder == tmp_path / each.kind / each.name for each in found)
    assert find_sets(tmp_path / "retrieval") == [each for each in found if each.kind == "retrieval"]
    assert find_sets(tmp_path / "retrieval" / "retrieval-b") == [
        found[KINDS.index("retrieval") * 2 + 1]
    ]
    assert len([as_mteb(each) for each in found]) == 12


def test_folders_may_be_relative(tmp_path, monkeypatch):
    local = write(tmp_path, "sts", "Set")
    monkeypatch.chdir(local.folder)
    assert (
        find_sets(Path())
        == find_sets(Path("../../..") / tmp_path.name)
        == find_sets(Path(".."))
        == [local]
    )


def refused(what, *parts):
    """The one DataError for a folder to search or a set to read, whose message has these parts."""
    with pytest.raises(DataError) as error:
        as_mteb(what) if isinstance(what, LocalSet) else find_sets(what)
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in:\n{error.value}"


def test_folders_without_sets(tmp_path):
    layouts = (
        "<kind>/<set>/<files>, where <kind> is one of sts, pair_classification, classification"
    )
    refused(tmp_path, "no evaluation set", layouts)
    refused(tmp_path / "nothing", "no such folder", layouts)
    (tmp_path / "sts").mkdir()
    refused(tmp_path / "sts", "no evaluation set", layouts)
    refused(tmp_path, "no evaluation set", layouts)
    refused(tmp_path / "sts" / "STS12", "no such folder")
    refused(LocalSet("sts", "STS12", tmp_path / "sts" / "STS12"), "no such folder", "STS12")


def test_misspelt_kinds(tmp_path):
    write(tmp_path, "sts")
    (tmp_path / "sts").rename(tmp_path / "clasification")
    refused(tmp_path, "did you mean 'classification' instead of 'clasification'?")
    refused(tmp_path / "clasification", "did you mean 'classification'")
    refused(tmp_path / "clasification" / "Set", "did you mean 'classification'")
    write(tmp_path, "sts")
    refused(
        tmp_path, "no kind of evaluation is named 'clasification'", "did you mean 'classification'"
    )
    refused(
        LocalSet("reranker", "Set", tmp_path),
        "no kind of evaluation is named 'reranker'",
        "did you mean 'reranking'",
    )


def test_two_sets_of_one_name(tmp_path):
    write(tmp_path, "sts", "Same")
    write(tmp_path, "clustering", "Same")
    refused(tmp_path, "two sets are named 'Same'", "sts, clustering")
    assert len(find_sets(tmp_path / "sts")) == 1


# ---- rows that cannot be used: each replaces the second line of a file


def second(rows, row):
    return [rows[0], row, *rows[2:]]


BAD_ROWS = [
    ("sts", "test.jsonl", '{"sentence1": "a", ', ("line 2", "malformed JSON")),
    ("sts", "test.jsonl", '["a", "b", 1]', ("line 2", "not a JSON object")),
    ("sts", "test.jsonl", "", ("line 2", "empty")),
    (
        "sts",
        "test.jsonl",
        '{"sentence1": "a", "sentence2": "b"}',
        ("line 2", "no key 'score'", "sentence1, sentence2"),
    ),
    (
        "sts",
        "test.jsonl",
        '{"sentence1": "a", "sentence2": "b", "score": "high"}',
        ("line 2", "'score' is not a number"),
    ),
    (
        "sts",
        "test.jsonl",
        '{"sentence1": "a", "sentence2": "b", "score": "3"}',
        ("line 2", "'score' is not a number"),
    ),
    (
        "sts",
        "test.jsonl",
        '{"sentence1": "a", "sentence2": "b", "score": NaN}',
        ("line 2", "'score' is not a number"),
    ),
    (
        "sts",
        "test.jsonl",
        '{"sentence1": "a", "sentence2": "b", "score": true}',
        ("line 2", "'score' is not a number"),
    ),
    (
        "sts",
        "test.jsonl",
        '{"sentence1": "a", "sentence2": "b", "score": 1e999}',
        ("line 2", "'score' is not a number"),
    ),
    (
        "sts",
        "test.jsonl",
        '{"sentence1": ["a"], "sentence2": "b", "score": 1}',
        ("line 2", "'sentence1' is not a string"),
    ),
    (
        "sts",
        "test.jsonl",
        '{"sentence1": "a", "sentence2": null, "score": 1}',
        ("line 2", "'sentence2' is not a string"),
    ),
    (
        "sts",
        "test.jsonl",
        '{"sentence1": " ", "sentence2": "b", "score": 1}',
        ("line 2", "'sentence1'", "with a text in it"),
    ),
    (
        "sts",
        "test.jsonl",
        '{"sentence1": "\\ud800", "sentence2": "b", "score": 1}',
        ("line 2", "UTF-8", "ud800"),
    ),
    (
        "pair_classification",
        "test.jsonl",
        '{"sentence1": "a", "sentence2": "b", "label": 2}',
        ("line 2", "not 0 or 1"),
    ),
    (
        "pair_classification",
        "test.jsonl",
        '{"sentence1": "a", "sentence2": "b", "label": "1"}',
        ("line 2", "not 0 or 1"),
    ),
    (
        "classification",
        "train.jsonl",
        '{"text": "a", "label": null}',
        ("line 2", "'label' is not a string"),
    ),
    (
        "classification",
        "train.jsonl",
        '{"text": 5, "label": "red"}',
        ("line 2", "'text' is not a string"),
    ),
    (
        "classification",
        "test.jsonl",
        '{"text": "a", "label": "grene"}',
        ("line 2", "'grene'", "did you mean 'green'?"),
    ),
    (
        "classification",
        "test.jsonl",
        '{"text": "a", "label": 7}',
        ("line 2", "no text of the train part has the label '7'"),
    ),
    ("clustering", "test.jsonl", '{"text": "a", "labels": "1"}', ("line 2", "no key 'label'")),
    (
        "clustering",
        "test.jsonl",
        '{"text": "a", "label": 1.5}',
        ("line 2", "'label' is not a string"),
    ),
    (
        "retrieval",
        "corpus.jsonl",
        '{"_id": "1", "title": "", "text": "a"}',
        ("line 2", "_id '1' is there twice", "line 1"),
    ),
    (
        "retrieval",
        "corpus.jsonl",
        '{"_id": 2, "title": "", "text": "a"}',
        ("line 2", "'_id' is not a string"),
    ),
    (
        "retrieval",
        "corpus.jsonl",
        '{"_id": "2", "title": 3, "text": "a"}',
        ("line 2", "'title' is not a string"),
    ),
    ("retrieval", "corpus.jsonl", '{"_id": "2", "title": "a"}', ("line 2", "no key 'text'")),
    (
        "retrieval",
        "queries.jsonl",
        '{"_id": "1", "text": "a"}',
        ("line 2", "_id '1' is there twice"),
    ),
    (
        "retrieval",
        "queries.jsonl",
        '{"_id": "2", "text": ""}',
        ("line 2", "'text' is not a string with a text in it"),
    ),
    ("retrieval", "qrels/test.tsv", "none\t1\t1", ("line 2", "'none' is no _id of queries.jsonl")),
    ("retrieval", "qrels/test.tsv", "1\tnone\t1", ("line 2", "'none' is no _id of corpus.jsonl")),
    ("retrieval", "qrels/test.tsv", "1\t2\thigh", ("line 2", "'score' is not a whole number")),
    ("retrieval", "qrels/test.tsv", "1\t2\t-1", ("line 2", "'score' is not a whole number")),
    ("retrieval", "qrels/test.tsv", "1\t2", ("line 2", "wrong number of columns")),
    ("retrieval", "qrels/test.tsv", RETRIEVAL["qrels/test.tsv"][2], ("line 3", "are judged twice")),
    (
        "reranking",
        "test.jsonl",
        '{"query": "a", "positive": [], "negative": ["b"]}',
        ("line 2", "'positive'", "one or more"),
    ),
    (
        "reranking",
        "test.jsonl",
        '{"query": "a", "positive": ["b"], "negative": []}',
        ("line 2", "'negative'", "one or more"),
    ),
    (
        "reranking",
        "test.jsonl",
        '{"query": "a", "positive": "b", "negative": ["c"]}',
        ("line 2", "'positive'", "list"),
    ),
    (
        "reranking",
        "test.jsonl",
        '{"query": "a", "positive": [1], "negative": ["c"]}',
        ("line 2", "'positive' is not a string"),
    ),
]


@pytest.mark.parametrize(("kind", "file", "row", "parts"), BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, kind, file, row, parts):
    local = write(tmp_path, kind, files={file: second(SETS[kind][file], row)})
    refused(local, str(local.folder / file), *parts)


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind in KINDS for file in SETS[kind]])
def test_files_that_are_empty_broken_or_missing(tmp_path, kind, file):
    for name, rows, parts in (
        ("empty", [], ("no row in it",)),
        (
            "not-text",
            [b"\xff\xfe".decode("latin-1")],
            ("line 1" if file.endswith("jsonl") else "no column 'query-id'",),
        ),
        ("missing", None, ("a part is missing", f"expected: {file}")),
    ):
        local = write(tmp_path, kind, name, {file: rows})
        refused(local, str(local.folder if rows is None else local.folder / file), *parts)
    for ending, compress in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        cut = compress(content(SETS[kind][file]).encode())[:-20]
        local = write(tmp_path, kind, f"cut{ending}", {file: None, f"{file}{ending}": cut})
        refused(local, f"{local.folder / file}{ending}")
    local = write(
        tmp_path, kind, "twice", {f"{file}.gz": gzip.compress(content(SETS[kind][file]).encode())}
    )
    refused(local, "the same part twice", Path(file).name, f"{Path(file).name}.gz")


def test_qrels_need_their_header_and_a_row(tmp_path):
    lines = RETRIEVAL["qrels/test.tsv"]
    refused(
        write(tmp_path, "retrieval", "A", {"qrels/test.tsv": lines[1:]}), "no column 'query-id'"
    )
    refused(
        write(tmp_path, "retrieval", "B", {"qrels/test.tsv": lines[:1]}),
        "qrels/test.tsv: no row in it",
    )


@pytest.mark.parametrize("judgements", [[], ["3\t1\t0", "3\t2\t0"]])
def test_a_query_without_relevant_document(tmp_path, judgements):
    lines = [
        line for line in RETRIEVAL["qrels/test.tsv"] if not line.startswith("3\t")
    ] + judgements
    local = write(tmp_path, "retrieval", files={"qrels/test.tsv": lines})
    refused(
        local, f"{local.folder / 'queries.jsonl'}, line 3", "query '3' has no relevant document"
    )


@pytest.mark.parametrize(
    ("kind", "file", "key", "value"),
    [
        ("sts", "test.jsonl", "score", 2.5),
        ("pair_classification", "test.jsonl", "label", 1),
        ("classification", "train.jsonl", "label", "red"),
        ("clustering", "test.jsonl", "label", "1"),
    ],
)
def test_one_value_for_all_rows_says_nothing_about_an_encoder(tmp_path, kind, file, key, value):
    local = write(tmp_path, kind, files={file: [row | {key: value} for row in SETS[kind][file]]})
    refused(local, f"every row has the same {key!r}", str(local.folder / file))


# ---- the real sets


SHARED = {
    "STSBenchmark": ("sts", "dev", 1500),
    "STS12": ("sts", "test", 3108),
    "STS13": ("sts", "test", 1500),
    "MRPC": ("pair_classification", "test", 1725),
    "CLINC150": ("classification", "test", 4500),
    "TREC": ("classification", "test", 500),
    "StackOverflowTitles": ("clustering", "test", 20000),
    "Cranfield": ("retrieval", "test", 225),
    "CISI": ("retrieval", "test", 76),
    "TrecQA": ("reranking", "dev", 65),
}
# texts to train on, documents
BESIDES = {"CLINC150": 15000, "TREC": 5452, "Cranfield": 1400, "CISI": 1460}


@pytest.mark.shared
@pytest.mark.parametrize("name", SHARED)
def test_shared_sets(name):
    root = Path(os.environ.get("LLM2COMP_SHARED", "")) / "data" / "eval"
    if not os.environ.get("LLM2COMP_SHARED") or not root.is_dir():
        pytest.skip("LLM2COMP_SHARED does not name a folder that holds data/eval")
    kind, split, count = SHARED[name]
    (local,) = [each for each in find_sets(root) if each.name == name]
    assert local.kind == kind
    task = as_mteb(local)
    assert task.metadata.eval_splits == [split]
    (parts,) = task.dataset.values()
    if kind in ("retrieval", "reranking"):
        assert len(parts[split]["queries"]) == len(parts[split]["relevant_docs"]) == count
        assert len(parts[split]["corpus"]) == BESIDES.get(name, 1117)
    else:
        assert {part: len(table) for part, table in parts.items()} == {split: count} | (
            {"train": BESIDES[name]} if name in BESIDES else {}
        )
