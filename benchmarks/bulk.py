"""A row of `embed` into a folder: peak memory must not grow with the number of texts."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import llm2comp
from benchmarks.inputs import SEED
from benchmarks.settings import Setting
from benchmarks.sides import Row, Side, Target
from llm2comp.system.files import write_text

# The smallest encoder of the package: what is held beside it shows.
MODEL = "builtin:general-tiny"
WORDS = [
    "time",
    "person",
    "year",
    "way",
    "day",
    "thing",
    "man",
    "world",
    "life",
    "hand",
    "part",
    "child",
    "eye",
    "woman",
    "place",
    "work",
]


def bulk_side(setting: Setting, texts: int, folder: Path) -> Side:
    """A file of so many texts of three to six words → a new folder of shards, all from the start:
    survey, model, shards.
    """
    file, out, draw = folder / f"short-{texts}.jsonl", folder / f"out-{texts}", random.Random(SEED)
    if not file.exists():
        rows = (" ".join(draw.choices(WORDS, k=draw.randint(3, 6))) for _ in range(texts))
        write_text(file, "".join(json.dumps({"text": row}) + "\n" for row in rows))

    def run() -> tuple[int, float]:
        shutil.rmtree(out, ignore_errors=True)
        llm2comp.embed([file], out, MODEL, device=setting.device)
        return texts, 0.0

    return Side(run)


def _texts(place: int) -> Callable[[Setting, Path], Side]:
    return lambda setting, folder: bulk_side(setting, setting.bulk_texts[place], folder)


SIDES = {"100 x texts": _texts(1), "texts": _texts(0)}
BULK_ROWS: dict[str, Row] = {
    "embed_folder": Row(
        "`embed` of short texts into a folder: peak memory of 100 times as many",
        SIDES,
        "texts",
        targets=(Target("cpu", "100 x texts", "memory", "<=", 1.2),),
        memory=tuple(SIDES),
        timed=False,
    ),
}
