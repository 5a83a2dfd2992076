"""Files of a local evaluation set → checked rows → the data that mteb's tasks evaluate.

Training leaves bad rows out and counts them. A figure needs every row: the first bad one is a
DataError with its file and line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from datasets import Dataset, DatasetDict
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

from llm2comp.errors import DataError
from llm2comp.lab.evaluation.set_files import _QRELS, _SPLITS, CheckedRow, Parts, SetFiles


def read_sts(files: SetFiles, split: str) -> Parts:
    """Pairs of sentences with a score each, on any scale."""
    rows = files.rows(f"{split}.jsonl")
    table = [
        {
            "sentence1": r.text("sentence1"),
            "sentence2": r.text("sentence2"),
            "score": r.number("score"),
        }
        for r in rows
    ]
    _must_differ((row["score"] for row in table), "score", rows)
    return DatasetDict({split: Dataset.from_list(table)})


def read_pairs(files: SetFiles, split: str) -> Parts:
    """Pairs of sentences that mean the same (1) or not (0)."""
    rows = files.rows(f"{split}.jsonl")
    table = [
        {
            "sentence1": r.text("sentence1"),
            "sentence2": r.text("sentence2"),
            "labels": r.zero_or_one("label"),
        }
        for r in rows
    ]
    _must_differ((row["labels"] for row in table), "label", rows)
    return DatasetDict({split: Dataset.from_list(table)})


def read_classification(files: SetFiles, split: str) -> Parts:
    """Texts with a class, to learn from and to judge by.

    Classes become numbers, in the order of their names.
    """
    train, judged = files.rows("train.jsonl"), files.rows(f"{split}.jsonl")
    codes = {name: code for code, name in enumerate(sorted({row.label("label") for row in train}))}
    _must_differ(codes, "label", train)
    for row in judged:
        if row.label("label") not in codes:
            nearest = difflib.get_close_matches(row.label("label"), codes, n=1)
            fix = f"did you mean {nearest[0]!r}?" if nearest else None
            raise DataError(
                f"no text of the train part has the label {row.label('label')!r}",
                where=row.where,
                fix=fix,
            )
    tables = {
        name: Dataset.from_list(
            [{"text": row.text("text"), "label": codes[row.label("label")]} for row in rows]
        )
        for name, rows in (("train", train), (split, judged))
    }
    return DatasetDict(tables)


def read_clustering(files: SetFiles, split: str) -> Parts:
    """Texts with the class that a cluster should gather."""
    rows = files.rows(f"{split}.jsonl")
    table = [{"sentences": row.text("text"), "labels": row.label("label")} for row in rows]
    _must_differ((row["labels"] for row in table), "label", rows)
    return DatasetDict({split: Dataset.from_list(table)})


def read_retrieval(files: SetFiles, split: str) -> Parts:
    """Documents, queries and judgements in BEIR's layout.

    A query that only another split judges is left to that split.
    """
    documents, queries = _by_id(files.rows("corpus.jsonl")), _by_id(files.rows("queries.jsonl"))
    relevant: dict[str, dict[str, int]] = {}
    for row in files.rows(f"qrels/{split}.tsv", *_QRELS):
        query, document = row.value("query-id"), row.value("corpus-id")
        for name, key, known in (("queries", query, queries), ("corpus", document, documents)):
            if key not in known:
                raise DataError(f"{key!r} is no _id of {name}.jsonl", where=row.where)
        if document in relevant.setdefault(query, {}):
            raise DataError(
                f"query {query!r} and document {document!r} are judged twice", where=row.where
            )
        relevant[query][document] = row.relevance("score")
    elsewhere = {
        row.value("query-id")
        for other in _SPLITS
        if other != split and files.find(f"qrels/{other}.tsv")
        for row in files.rows(f"qrels/{other}.tsv", *_QRELS)
    }
    for query, row in queries.items():
        if not any(relevant.get(query, {}).values()) and (
            query in relevant or query not in elsewhere
        ):
            raise DataError(
                f"query {query!r} has no relevant document",
                where=row.where,
                fix="remove it or judge it",
            )
    corpus = [
        {"id": key, "title": row.title(), "text": row.text("text", may_be_blank=True)}
        for key, row in documents.items()
    ]
    asked = [
        {"id": key, "text": row.text("text")} for key, row in queries.items() if key in relevant
    ]
    return {split: collection(corpus, asked, relevant, None)}


def read_reranking(files: SetFiles, split: str) -> Parts:
    """Queries with their candidates.

    Wrong candidates get larger ids, which rank first on ties: ties give no advantage.
    """
    corpus: list[dict[str, str]] = []
    queries: list[dict[str, str]] = []
    relevant: dict[str, dict[str, int]] = {}
    for number, row in enumerate(files.rows(f"{split}.jsonl")):
        query = str(number)
        queries.append({"id": query, "text": row.text("query")})
        relevant[query] = {}
        for key, prefix, grade in (("positive", "answer", 1), ("negative", "other", 0)):
            for index, text in enumerate(row.texts(key)):
                document = f"{query}-{prefix}-{index}"
                corpus.append({"id": document, "title": "", "text": text})
                relevant[query][document] = grade
    candidates = {query: list(documents) for query, documents in relevant.items()}
    return {split: collection(corpus, queries, relevant, candidates)}


def collection(
    corpus: list[dict[str, str]],
    queries: list[dict[str, str]],
    relevant: dict[str, dict[str, int]],
    candidates: dict[str, list[str]] | None,
) -> RetrievalSplitData:
    """What mteb ranks: documents, queries, query → document → grade.

    Also query → candidates, where not all documents are ranked.
    """
    return RetrievalSplitData(
        corpus=Dataset.from_list(corpus),
        queries=Dataset.from_list(queries),
        relevant_docs=relevant,
        top_ranked=candidates,
    )


def _by_id(rows: list[CheckedRow]) -> dict[str, CheckedRow]:
    found: dict[str, CheckedRow] = {}
    for row in rows:
        first = found.setdefault(row.text("_id"), row)
        if first is not row:
            raise DataError(
                f"_id {row.text('_id')!r} is there twice",
                where=row.where,
                found=f"first at {first.where}",
            )
    return found


def _must_differ(values: Iterable[object], key: str, rows: list[CheckedRow]) -> None:
    """Raise DataError if all rows have one value: every encoder would then get the same score."""
    if len(set(values)) < 2:
        raise DataError(
            f"every row has the same {key!r}",
            where=rows[0].where,
            expected="two or more different ones",
        )
