"""Tiny made-up data in place of the data of mteb's tasks: they run without a network."""

import random
from typing import Any

from datasets import Dataset, DatasetDict

from llm2comp.lab.evaluation import evaluate as evaluate_module
from llm2comp.lab.evaluation.tasks import named_tasks

TOPICS = {
    "cooking": "flour butter oven salt bake pan stir sugar dough recipe",
    "sailing": "wind mast rope harbour deck tide anchor sail wave boat",
    "music": "chord violin rhythm tune choir drum note sing band melody",
}


def rehearse(monkeypatch) -> None:
    """Let `evaluate` see made-up data in every task that it names."""

    def with_made_up_data(names):
        found = named_tasks(names)
        for task in found:
            inject(task)
        return found

    # where it is called: `evaluate` holds the function by its name
    monkeypatch.setattr(evaluate_module, "named_tasks", with_made_up_data)


def inject(task: Any, seed: int = 0) -> None:
    """Put made-up English into a task in place of its data set."""
    draw = random.Random(f"{seed}:{task.metadata.name}")
    makers = {
        "STS": _sts,
        "PairClassification": _pairs,
        "Classification": _classification,
        "Clustering": _clustering,
        "Retrieval": _retrieval,
        "Reranking": _retrieval,
    }
    data = {split: makers[task.metadata.type](task, draw) for split in task.eval_splits}
    if task.metadata.type in ("Retrieval", "Reranking"):
        task.dataset = dict.fromkeys(task.hf_subsets, data)
    else:
        splits = DatasetDict({split: Dataset.from_dict(columns) for split, columns in data.items()})
        if task.metadata.type == "Classification":
            splits[task.train_split] = Dataset.from_dict(_classification(task, draw))
        task.dataset = dict.fromkeys(task.hf_subsets, splits)
    task.data_loaded = True


def _sentence(draw: random.Random, topic: str, words: int = 8) -> str:
    return " ".join(draw.choice(TOPICS[topic].split()) for _ in range(words))


def _sts(task: Any, draw: random.Random) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"sentence1": [], "sentence2": [], "score": []}
    for number in range(12):
        alike = number % 2 == 0
        first, second = ("cooking", "cooking") if alike else ("cooking", "sailing")
        row = (
            _sentence(draw, first),
            _sentence(draw, second),
            (4.0 if alike else 1.0) + draw.random(),
        )
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return columns


def _pairs(task: Any, draw: random.Random) -> dict[str, list[Any]]:
    pairs = _sts(task, draw)
    first, second, scores = pairs["sentence1"], pairs["sentence2"], pairs["score"]
    return {
        "sentence1": first,
        "sentence2": second,
        task.label_column_name: [int(score >= 3) for score in scores],
    }


def _classification(task: Any, draw: random.Random) -> dict[str, list[Any]]:
    labels = [label for label in range(len(TOPICS)) for _ in range(20)]
    topics = list(TOPICS)
    return {
        task.input_column_name: [_sentence(draw, topics[label]) for label in labels],
        task.label_column_name: labels,
    }


def _clustering(task: Any, draw: random.Random) -> dict[str, list[Any]]:
    """Rows that are whole sets, as mteb's legacy clustering has them; the newer one has a row per
    text.
    """
    rows = [(_sentence(draw, topic), topic) for topic in TOPICS for _ in range(10)]
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    if "Legacy" in "".join(base.__name__ for base in type(task).__mro__):
        return {task.input_column_name: [texts], task.label_column_name: [labels]}
    return {task.input_column_name: texts, task.label_column_name: labels}


def _retrieval(task: Any, draw: random.Random) -> dict[str, Any]:
    documents = {
        f"d{i}": (topic, _sentence(draw, topic, 14)) for i, topic in enumerate(list(TOPICS) * 5)
    }
    queries = {f"q{i}": (topic, _sentence(draw, topic, 5)) for i, topic in enumerate(TOPICS)}
    relevant = {
        q: {d: 1 for d, (about, _) in documents.items() if about == topic}
        for q, (topic, _) in queries.items()
    }
    return {
        "corpus": Dataset.from_list(
            [{"id": d, "title": about, "text": text} for d, (about, text) in documents.items()]
        ),
        "queries": Dataset.from_list([{"id": q, "text": text} for q, (_, text) in queries.items()]),
        "relevant_docs": relevant,
        "top_ranked": {q: list(documents) for q in queries}
        if task.metadata.type == "Reranking"
        else None,
    }
