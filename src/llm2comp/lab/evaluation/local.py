"""Evaluation sets in a folder → mteb tasks. Needs only files, no network.

    folder/<kind>/<set>/...        <split> is test, or dev if there is no test
    sts, pair_classification       <split>.jsonl  {"sentence1", "sentence2", "score" or "label" (0
                                                  or 1)}
    classification                 train.jsonl, <split>.jsonl  {"text", "label"}
    clustering                     <split>.jsonl  {"text", "label"}
    retrieval                      corpus.jsonl {"_id", "title", "text"}, queries.jsonl {"_id",
                                   "text"},
                                   qrels/<split>.tsv  query-id, corpus-id, score
    reranking                      <split>.jsonl  {"query", "positive": [...], "negative": [...]}

Every file may end in .gz or .zst besides.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata
from sklearn.metrics import accuracy_score, f1_score

from llm2comp.errors import DataError
from llm2comp.lab.evaluation import local_rows as rows
from llm2comp.lab.evaluation.set_files import Parts, SetFiles


@dataclass(frozen=True)
class LocalSet:
    """One evaluation set: kind/name is where it lies below the folder of all sets."""

    kind: str
    name: str
    folder: Path


class _Classification(AbsTaskClassification):
    samples_per_label = 16

    def _calculate_scores(self, y_test: Any, y_pred: Any) -> Any:
        """Accuracy, and F1 over classes.

        mteb adds the figures of two classes as soon as the test part happens to hold two.
        """
        return {
            "accuracy": accuracy_score(y_test, y_pred),
            "f1": f1_score(y_test, y_pred, average="macro"),
        }


class _Clustering(AbsTaskClustering):
    """mteb's clustering on all texts, with the same random draws each time."""

    max_fraction_of_documents_to_embed = None

    def _evaluate_subset(self, *args: Any, **kwargs: Any) -> Any:
        self.rng_state = Random(self.seed)
        return super()._evaluate_subset(*args, **kwargs)


@dataclass(frozen=True)
class _Kind:
    """How mteb evaluates a kind of set: mteb's name, the task class, the main metric."""

    name: str
    base: type[AbsTask]
    main_score: str
    read: Callable[[SetFiles, str], Parts]
    split_file: str = "{}.jsonl"


_KINDS = {
    "sts": _Kind("STS", AbsTaskSTS, "cosine_spearman", rows.read_sts),
    "pair_classification": _Kind(
        "PairClassification", AbsTaskPairClassification, "cosine_ap", rows.read_pairs
    ),
    "classification": _Kind(
        "Classification", _Classification, "accuracy", rows.read_classification
    ),
    "clustering": _Kind("Clustering", _Clustering, "v_measure", rows.read_clustering),
    "retrieval": _Kind(
        "Retrieval", AbsTaskRetrieval, "ndcg_at_10", rows.read_retrieval, "qrels/{}.tsv"
    ),
    "reranking": _Kind("Reranking", AbsTaskRetrieval, "map_at_1000", rows.read_reranking),
}
KINDS = tuple(_KINDS)


def find_sets(folder: Path) -> list[LocalSet]:
    """Sets in a folder of kinds, of one kind, or of one set; by order of `KINDS`, then by name.

    Raises DataError if there is none, for a kind that is not known, and for two sets of one name.
    """
    folder = Path(os.path.abspath(folder.expanduser()))  # noqa: PTH100  # not resolve(): a link keeps its name
    inside = _folders(folder)
    if any(path.name in KINDS for path in inside):
        for path in inside:
            if path.name not in KINDS:
                raise DataError(
                    f"no kind of evaluation is named {path.name!r}",
                    where=str(folder),
                    **_advice([path.name]),
                )
        found = [LocalSet(path.name, each.name, each) for path in inside for each in _folders(path)]
    elif folder.name in KINDS:
        found = [LocalSet(folder.name, each.name, each) for each in inside]
    elif folder.parent.name in KINDS and folder.is_dir():
        found = [LocalSet(folder.parent.name, folder.name, folder)]
    else:
        found = []
    if not found:
        problem = "no evaluation set in it" if folder.is_dir() else "no such folder"
        names = [*(path.name for path in inside), folder.name, folder.parent.name]
        raise DataError(problem, where=str(folder), **_advice(names))
    found.sort(key=lambda each: (KINDS.index(each.kind), each.name))
    name, count = Counter(each.name for each in found).most_common(1)[0]
    if count > 1:
        kinds = ", ".join(each.kind for each in found if each.name == name)
        raise DataError(
            f"two sets are named {name!r}",
            where=str(folder),
            found=f"kinds {kinds}",
            fix="rename one of them",
        )
    return found


def as_mteb(local: LocalSet) -> AbsTask:
    """Read a set as an mteb task `Local-<name>` with its data in memory.

    Raises DataError for the first row that is unusable.

    sts                  Spearman correlation of cosine and score
    pair_classification  average precision by cosine
    classification       accuracy of a logistic regression on 16 texts a class, mean of 10 draws
    clustering           V-measure of mini-batch k-means with as many clusters as classes, mean of
                         10 draws of 16,384 texts from
                         the whole set with replacement: mteb's later protocol, as one k-means may
                         be points off by luck
    retrieval            nDCG@10 with the grades as gain, over all documents (title and text)
    reranking            mean average precision over the candidates of each query

    The revision is taken from the files' content. It also names the subset, because mteb's cache
    looks at splits and subsets before it decides what is missing: a set that has changed is
    evaluated again.

    mteb seeds the global random numbers of Python, numpy and torch whenever a task is made or
    evaluated.
    """
    if local.kind not in _KINDS:
        raise DataError(
            f"no kind of evaluation is named {local.kind!r}",
            where=str(local.folder),
            **_advice([local.kind]),
        )
    kind = _KINDS[local.kind]
    files = SetFiles(local.folder)
    split = files.evaluated_split(kind.split_file)
    parts = kind.read(files, split)
    revision = files.revision()
    return make_task(local.kind, f"Local-{local.name}", split, parts, revision)


def make_task(kind_name: str, name: str, split: str, parts: Parts, revision: str) -> AbsTask:
    """An mteb task of a kind with its data in memory.

    `revision`: what the data are told by; see `as_mteb`.
    """
    kind = _KINDS[kind_name]
    metadata = TaskMetadata(
        name=name,
        description=f"{kind_name} on files of one's own: {name}",
        type=kind.name,  # type: ignore[arg-type]
        category="t2c" if kind_name in ("classification", "clustering") else "t2t",
        dataset={"path": f"local/{name}", "revision": revision},
        eval_splits=[split],
        eval_langs={revision: ["eng-Latn"]},  # mteb asks for a language; no figure depends on it
        main_score=kind.main_score,
        is_public=False,
    )
    task: AbsTask = type("LocalTask", (kind.base,), {"metadata": metadata})()
    task.dataset = {revision: parts}
    task.data_loaded = True
    return task


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _advice(names: list[str]) -> dict[str, Any]:
    """Help for an error message: the known kinds, and the one nearest to the first name."""
    likely = (
        (name, kind)
        for name in names
        for kind in difflib.get_close_matches(name.lower(), KINDS, n=1, cutoff=0.7)
    )
    fix = next(
        (f"did you mean {kind!r} instead of {name!r}?" for name, kind in likely if name != kind),
        None,
    )
    return {
        "expected": f"<kind>/<set>/<files>, where <kind> is one of {', '.join(KINDS)}",
        "fix": fix,
    }
