"""Rows of an index: one search among many passages, and the command `llm2comp search` from its
start to its answer.
"""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from benchmarks.inputs import SEED
from benchmarks.settings import Setting
from benchmarks.sides import Row, Side, Target
from llm2comp.system.console import GENERAL_TINY

if TYPE_CHECKING:  # lancedb is not to be imported before a process forks
    from llm2comp.use.index.store import Ranked, Store

TABLE, WIDTH, K, CHECKED = "passages-random", 576, 10, 100
VOCABULARY, WORDS_OF_A_PASSAGE, WORDS_OF_A_QUESTION = 5_000, 60, 6
Search: TypeAlias = "Callable[[Store, np.ndarray, str], Ranked]"


@functools.cache
def questions(count: int) -> tuple[np.ndarray, list[str]]:
    """Random vectors of length 1 and random words."""
    draw = np.random.default_rng(SEED)
    vectors = draw.normal(size=(count, WIDTH)).astype(np.float32)
    words = draw.integers(VOCABULARY, size=(count, WORDS_OF_A_QUESTION))
    texts = [" ".join(f"word{number}" for number in row) for row in words]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), texts


def make_table(setting: Setting, folder: Path) -> None:
    """Passages of random words with random vectors of SmolLM2-135M's width."""
    from llm2comp.use.index.store import Store

    draw, table = np.random.default_rng(SEED + 1), Store(folder, TABLE, WIDTH)
    state = {"sha256": "", "size": 1, "mtime": 1, "headings": ["a"], "first": 1, "last": 9}
    for begin in range(0, setting.search_passages, 1000):
        vectors = draw.normal(size=(1000, WIDTH)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        words = draw.integers(VOCABULARY, size=(1000, WORDS_OF_A_PASSAGE))
        table.add(
            [
                state
                | {
                    "path": f"/docs/{begin + i}.md",
                    "number": 0,
                    "text": " ".join(f"word{number}" for number in words[i]),
                    "vector": vectors[i],
                }
                for i in range(1000)
            ]
        )
    table.finish()


def in_memory(table: Store, vector_D: np.ndarray, _: str) -> Ranked:
    """Ours, exact."""
    return table.by_vector(vector_D, K)


def by_words(table: Store, _: np.ndarray, text: str) -> Ranked:
    """Ours, BM25."""
    return table.by_words(text, K)


def hybrid(table: Store, vector_D: np.ndarray, text: str) -> Ranked:
    """Ours, both; without the making of the question's vector."""
    from llm2comp.use.index.hits import fused

    return fused([table.by_vector(vector_D, 100), table.by_words(text, 100)])[:K]


def lance(table: Store, vector_D: np.ndarray, _: str) -> Ranked:
    """LanceDB's own exact search, as its documentation shows it."""
    query = table.table.search(vector_D).distance_type("cosine").select(["_distance"])
    found = query.with_row_id(True).limit(K).to_arrow()
    return [(number, 0.0) for number in found["_rowid"].to_pylist()]


def search_side(setting: Setting, folder: Path, search: Search, checked: bool) -> Side:
    """Questions one after the other, each with its ten passages read."""
    from llm2comp.use.index.store import Store

    table = Store(folder, TABLE)
    vectors, texts = questions(CHECKED)
    numbers = itertools.count()

    def run() -> tuple[int, float]:
        for _ in range(setting.search_questions):
            at = next(numbers) % CHECKED
            table.rows([number for number, _ in search(table, vectors[at], texts[at])])
        return setting.search_questions, 0.0

    def check() -> list[torch.Tensor]:
        return [
            torch.tensor([number for number, _ in search(table, vector, text)])
            for vector, text in zip(vectors, texts, strict=True)
        ]

    return Side(run, check if checked else None)


def missed(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """1 − recall@10."""
    common = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, expected, strict=True)]
    return 1.0 - sum(common) / sum(len(row) for row in expected)


def make_index(setting: Setting, folder: Path) -> None:
    """A small index of the packaged encoder on the toy LM."""
    from llm2comp.use.index.index import Index

    for number in range(20):
        (folder / "docs").mkdir(exist_ok=True)
        (folder / "docs" / f"{number}.md").write_text(f"# Page {number}\n\nWords of page {number}.")
    Index(folder / "index", GENERAL_TINY).add(folder / "docs")


def command_side(arguments: list[str], folder: Path) -> Side:
    """One process from its start to its end."""

    def run() -> tuple[int, float]:
        command = [sys.executable, *arguments]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        return 1, 0.0

    return Side(run)


def _search(search: Search, checked: bool = False) -> Callable[[Setting, Path], Side]:
    return lambda setting, folder: search_side(setting, folder, search, checked)


def _command(*arguments: str) -> Callable[[Setting, Path], Side]:
    return lambda _, folder: command_side(list(arguments), folder)


_ASK = ("-m", "llm2comp", "search", "words of page 7", "--db", "index", "-k", "1")
SEARCH_ROWS: dict[str, Row] = {
    "search": Row(
        "one question among many passages of random vectors, ten passages read (questions/s)",
        {
            "vectors, exact": _search(in_memory, checked=True),
            "words": _search(by_words),
            "hybrid": _search(hybrid),
            "LanceDB's exact search": _search(lance, checked=True),
        },
        "LanceDB's exact search",
        targets=(
            Target("cpu", "vectors, exact", "ms", "<=", 10),
            Target("cpu", "hybrid", "ms", "<=", 10),
        ),
        differ=missed,
        limits=(0.02, 0.02),
        prepare=make_table,
    ),
    "search_start": Row(
        "`llm2comp search` from its start to its answer, and what imports cost (1/s)",
        {
            "words alone": _command(*_ASK, "--keywords-only"),
            "hybrid": _command(*_ASK),
            "import lancedb": _command("-c", "import lancedb"),
            "import torch": _command("-c", "import torch"),
            "import sentence_transformers, peft": _command(
                "-c", "import sentence_transformers, peft"
            ),
        },
        "import lancedb",
        targets=(
            Target("cpu", "words alone", "ms", "<=", 3000),
            Target("cpu", "hybrid", "ms", "<=", 3000),
        ),
        prepare=make_index,
    ),
}
