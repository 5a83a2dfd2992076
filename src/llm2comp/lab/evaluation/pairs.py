"""A file of questions and their answers → an mteb task.

Each question must find its answer among all answers, and among more texts if given.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llm2comp.data.columns import MissingColumnError, likely
from llm2comp.data.loaded import Loaded
from llm2comp.data.sources import read_pairs, read_texts
from llm2comp.errors import DataError
from llm2comp.lab.evaluation.local import make_task
from llm2comp.lab.evaluation.local_rows import collection
from llm2comp.recipe import PairData, TextData
from llm2comp.system.console import say
from llm2comp.system.files import to_json

if TYPE_CHECKING:
    from mteb.abstasks.abstask import AbsTask

T = TypeVar("T")
SPLIT = "test"


@dataclass(frozen=True)
class Questions:
    """A file of questions and answers, and other texts that the search runs over.

    Args:
        file: any source of pairs (docs/data.md); `query` and `answer` are its columns.
        documents: a source of texts, whose column `document` joins the answers; those that are an
            answer count once.
    """

    file: str
    query: str = "anchor"
    answer: str = "positive"
    documents: str | None = None
    document: str = "text"


def pairs_task(asked: Questions) -> AbsTask:
    """Read questions and answers as an mteb retrieval task `Pairs-<file>`, by nDCG@10.

    Texts that differ only in outer white space are one. A question that is there several times has
    several answers. On equal scores a text that answers nothing ranks first.

    Raises:
        DataError: no such file or column; a row without question or answer (a figure needs every
            row); fewer than two texts.
    """
    pairs = _whole(
        asked.file,
        lambda: read_pairs(PairData(source=asked.file, anchor=asked.query, positive=asked.answer)),
        _question_and_answer,
    )
    answers = dict.fromkeys(pair.positive.strip() for pair in pairs)
    name = f"Pairs-{_plain(asked.file)}"
    others: list[str] = []
    if asked.documents is not None:
        spec = TextData(source=asked.documents, column=asked.document)
        texts = _whole(asked.documents, lambda: read_texts(spec), _document)
        others = [
            text for text in dict.fromkeys(text.strip() for text in texts) if text not in answers
        ]
        name += f"-among-{_plain(asked.documents)}"
    if len(answers) + len(others) < 2:
        raise DataError(
            "nothing to choose from",
            where=asked.file,
            expected="two different answers or more",
            found=len(answers),
        )
    ids = {text: f"answer-{number}" for number, text in enumerate(answers)}
    relevant: dict[str, dict[str, int]] = {}
    queries = {
        text: f"query-{number}"
        for number, text in enumerate(dict.fromkeys(pair.anchor.strip() for pair in pairs))
    }
    for pair in pairs:
        relevant.setdefault(queries[pair.anchor.strip()], {})[ids[pair.positive.strip()]] = 1
    corpus = [*ids.items(), *((text, f"other-{number}") for number, text in enumerate(others))]
    say(
        f"{name}: {len(queries):,} questions, {len(ids):,} answers to be found among "
        f"{len(corpus):,} texts"
    )
    parts = collection(
        [{"id": key, "title": "", "text": text} for text, key in corpus],
        [{"id": key, "text": text} for text, key in queries.items()],
        relevant,
        None,
    )
    content = to_json([corpus, list(queries.items()), relevant]).encode()
    return make_task(
        "retrieval", name, SPLIT, {SPLIT: parts}, hashlib.sha256(content).hexdigest()[:12]
    )


def _whole(
    source: str, read: Callable[[], Loaded[T]], columns: Callable[[Sequence[str]], str]
) -> list[T]:
    """All rows of a source; `columns`: the options that would fit the columns it has."""
    try:
        loaded = read()
    except MissingColumnError as error:
        raise error.advised(f"say which columns to read, such as {columns(error.names)}") from None
    if loaded.skipped:
        raise DataError(
            "rows that cannot be used",
            where=source,
            found=loaded.left_out(),
            fix="mend or remove them",
        )
    return loaded.rows


def _question_and_answer(names: Sequence[str]) -> str:
    """The options that name the likeliest columns."""
    question = likely("anchor", names) or "NAME"
    answer = likely("positive", [name for name in names if name != question]) or "NAME"
    return f"--query-column {shlex.quote(question)} --answer-column {shlex.quote(answer)}"


def _document(names: Sequence[str]) -> str:
    return f"--document-column {shlex.quote(likely('column', names) or 'NAME')}"


def _plain(source: str) -> str:
    """A source's name without folder and ending."""
    return re.sub(r"[^\w-]+", "-", Path(source).name.partition(".")[0]).strip("-") or "file"
