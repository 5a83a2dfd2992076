"""A backbone, data and a recipe so small that a whole run takes seconds; and the command line in
this process.
"""

import atexit
import contextlib
import functools
import io
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from families import SENTENCES, make_lm, make_tokenizer
from llm2comp.recipe import parse_recipe

WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()})
# At step 0 and the last: each look costs as much as some steps of so small a model.
FEW_LOOKS = {"every_steps": 1000, "texts": 8, "max_tokens": 32}
SCHEDULE = {"learning_rate": 1e-2, "floor_learning_rate": 1e-3, "warmup_steps": 1}


def sentences(count, words=12, seed=0):
    """Texts of distinct random words, about 30 tokens each."""
    chosen = random.Random(seed)
    return [" ".join(chosen.sample(WORDS, words)) for _ in range(count)]


def save_backbone(folder, family="llama", lm=None, **tokenizer):
    """A tiny random LM with its tokenizer, as a local folder."""
    (lm or make_lm(family)).save_pretrained(folder)
    make_tokenizer(**tokenizer).save_pretrained(folder)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(path, negatives=(0,), seed=1):
    """One pair per entry of `negatives`, with so many hard negatives."""
    queries, answers = sentences(len(negatives), 4, seed), sentences(len(negatives), 10, seed + 1)
    wrong = iter(sentences(sum(negatives), 10, seed + 2))
    rows = [
        {"anchor": q, "positive": a, "negatives": [next(wrong) for _ in range(n)]}
        for q, a, n in zip(queries, answers, negatives, strict=True)
    ]
    return write_rows(path, rows)


def make_tree(folder, **changes):
    """A recipe of three stages over files in `folder`, which it writes; `changes` replace whole
    sections.
    """
    if not (folder / "backbone").exists():
        save_backbone(folder / "backbone")
        write_rows(folder / "texts.jsonl", [{"text": text} for text in sentences(40)])
        write_pairs(folder / "pairs.jsonl", [1] * 24)
    texts = [{"source": str(folder / "texts.jsonl")}]
    pairs = {
        "source": str(folder / "pairs.jsonl"),
        "negatives": ["negatives"],
        "instruction": "find the text",
    }
    few = {"steps": 4, "batch_size": 4, "schedule": SCHEDULE, "log_every_steps": 1}
    tree = {
        "format_version": 1,
        "name": "tiny-run",
        "model": {"name": str(folder / "backbone"), "device": "cpu"},
        "memory": {"tokens": 3},
        "adapter": {"rank": 2, "alpha": 4},
        "watch": FEW_LOOKS,
        "pretext": few
        | {
            "data": texts,
            "min_characters": 20,
            "max_tokens": 48,
            "site_margin_tokens": 4,
            "long_texts": "truncate",
        },
        "ucl": few | {"data": texts, "max_tokens": 32},
        "scl": few | {"data": [pairs], "query_max_tokens": 24, "document_max_tokens": 40},
    }
    return {key: value for key, value in (tree | changes).items() if value is not None}


def write_recipe(folder, **changes):
    """`make_tree` as a file."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(make_tree(folder, **changes)))
    return file


@functools.cache
def finished():
    """(folder, run): a run of all three stages, made once per test process.

    Not to be changed: copy it.
    """
    folder = Path(tempfile.mkdtemp(prefix="llm2comp-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    from llm2comp.training.run import train

    return folder, train(parse_recipe(make_tree(folder)), folder / "run")


@dataclass(frozen=True)
class Said:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def cli(*arguments, stdin=b""):
    """`llm2comp ARGUMENTS` in this process, as its console script would run it."""
    from llm2comp.cli import main

    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["llm2comp", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return Said(code, out.getvalue(), err.getvalue())


def assert_refused(said, *parts):
    """One clear message, with these parts, a code that is not 0, and no result on standard
    output.
    """
    assert said.code == 1, said
    assert said.err.count("error: ") == 1, said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    message = said.err[said.err.index("error: ") :]
    assert len(message) < 1500, message
    for part in parts:
        assert part in message, message


@contextlib.contextmanager
def no_file_over(size):
    """The kernel cuts every file of this process at `size` bytes: a write that ends in the middle,
    as on a full disk.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(folder, size):
    """A disk of `size` bytes mounted on a folder; skips the test where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if (
        sys.platform != "linux"
        or subprocess.run(command, capture_output=True, check=False).returncode
    ):
        pytest.skip("no right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
