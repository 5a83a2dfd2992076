"""`adapt`: hold out, score what there is, plan, train, score again, say what to use."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from llm2comp.data import python_docs
from llm2comp.data.documents import Offsets
from llm2comp.data.weak_pairs import PYTHON_DOCS, Task
from llm2comp.errors import RunError
from llm2comp.lab.adapt.corpus import (
    DATA_FOLDER,
    HELD_OUT,
    VALIDATING,
    Corpus,
    read_task,
    write_task,
)
from llm2comp.lab.adapt.planning import LOOKING, SCORING, Clock, Wanted, told_of
from llm2comp.lab.adapt.verdict import table
from llm2comp.lab.adapt.work import Work
from llm2comp.lab.report import report
from llm2comp.lab.report.reading import ADAPTED_FILE
from llm2comp.lab.train import train
from llm2comp.model.backbone.quiet import quiet_libraries
from llm2comp.model.vectors import embed_texts
from llm2comp.recipe import BUILTIN_ENCODERS, expanded
from llm2comp.runs.folder import RECIPE_FILE, Run
from llm2comp.storage.loading import load
from llm2comp.storage.places import live_place
from llm2comp.system.console import GENERAL, say
from llm2comp.system.files import to_json, write_text
from llm2comp.system.folders import RUN, claim, refuse_taken

WANTED_FILE = "wanted.json"
SAMPLE = 16  # passages whose embedding is timed
LEAST_TASK = (40, 80)  # queries and passages, however slow the machine


def adapt(
    documents: str | Path,
    out: str | Path | None = None,
    model: str | Path = GENERAL,
    minutes: float = 10.0,
    *,
    retention: Sequence[str | Path] = (),
    negatives: int = 0,
    guide: bool = True,
    write_questions: bool = False,
    pretext: bool = False,
    device: str | None = None,
    seed: int = 0,
) -> Path:
    """Make an encoder for your own documents, without labels, and say whether to use it.

    The verdict is given on a fifth that is held out first. The same call goes on after a stop.

    Args:
        documents: a folder, a file, or `builtin:python-docs`.
        out: the run directory; default: `runs/NAME-adapted`.
        model: the encoder to start from (`builtin:general`, a run, a stage of one), or a causal LM.
        minutes: for scoring and training together; loading of libraries is not counted.
        retention: folders of local sets (docs/evaluate.md) on which nothing should be lost.
        negatives: hard negatives that are mined for each pair.
        guide: let the encoder take false negatives out of the batches (GISTEmbed).
        write_questions: let the LM write questions about the passages, to train on as well.
        pretext: let stage 1 (CTKD) read the passages before.
        device: `cpu`, `cuda`, `mps`; default: the best there is.
        seed: of what is drawn.

    Returns:
        The run directory.

    Raises:
        DataError: documents that cannot be read, or too few. RunError: `out` is something else's.
        RecipeError: too few minutes.
    """
    quiet_libraries()
    clock, name = Clock(60 * minutes), Path(str(documents)).name.removeprefix("builtin:")
    run = expanded(out) if out is not None else Path("runs") / f"{name}-adapted"
    refuse_taken(run, RUN)
    start = (model := str(model)) in BUILTIN_ENCODERS or Run.of(model) is not None
    sets = tuple(str(expanded(folder).absolute()) for folder in retention)
    guide = guide and start
    wanted = Wanted(
        model, start, minutes, negatives, guide, write_questions, pretext, device, seed, sets
    )
    _adapted(run, str(documents), wanted, clock)
    return run


def _adapted(run: Path, documents: str, wanted: Wanted, clock: Clock) -> None:
    """All of it, in a run directory that is new or this adaptation's own."""
    place = live_place(wanted.model) if wanted.start else f"mean:{wanted.model}"
    with clock.part("loading"):
        first = load(place, wanted.device)
    with clock.part("reading"):
        corpus = Corpus.read(documents, _offsets(first))
        begun = _begun(run, wanted, corpus)
        python_docs.retrieval()  # for what is retained: kept, so that scoring is scoring
    scored = run / "scores" / ADAPTED_FILE
    if begun and scored.is_file():
        record = json.loads(scored.read_text("utf-8"))
    else:
        work = Work(wanted, run, corpus, clock, *_tasks(run, corpus, first, clock.seconds))
        recipe = work.before(first, Run(run).recipe if begun else None)
        del first
        with clock.part("training"):
            train(recipe, run)
        record = work.after(load(run, wanted.device))
        write_text(scored, to_json(record, indent=1))
    _tell(run, record, clock)


def _offsets(model: SentenceTransformer) -> Offsets:
    def offsets(text: str) -> list[tuple[int, int]]:
        found = model.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(found["offset_mapping"])

    return offsets


def _begun(run: Path, wanted: Wanted, corpus: Corpus) -> bool:
    """Whether the same was begun here before; if not, the run is made this one's.

    Raises RunError: the run is of other documents, or was asked for otherwise.
    """
    asked = {**vars(wanted), "documents": corpus.digest, "retention": list(wanted.retention)}
    file = run / DATA_FOLDER / WANTED_FILE
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if changed := sorted(key for key in asked if before.get(key) != asked[key]):
            raise RunError(
                "the run directory is of another adaptation",
                where=str(run),
                found=f"other {', '.join(changed)}",
                fix="give another --out, or delete the directory",
            )
        return (run / RECIPE_FILE).is_file()
    if (run / RECIPE_FILE).is_file():
        raise RunError("holds another run", where=str(run), fix="give another --out")
    claim(run, RUN)
    write_text(file, to_json(asked, indent=1))
    return False


def _tasks(
    run: Path, corpus: Corpus, model: SentenceTransformer, seconds: float
) -> tuple[Task, Task]:
    """The tasks of a run: as they were, or as large as embedding them may cost."""
    data = run / DATA_FOLDER
    before = read_task(data / HELD_OUT, HELD_OUT), read_task(data / VALIDATING, VALIDATING)
    if before[0] is not None and before[1] is not None:
        return before[0], before[1]
    tasks = corpus.tasks()
    sample = list(tasks[0].documents.values())[:SAMPLE]
    embed_texts(model, sample[:4])  # the first call also tries what can be saved
    begin = time.monotonic()
    embed_texts(model, sample)
    each = (time.monotonic() - begin) / len(sample)
    parts = [
        min(1.0, share * seconds / (each * len(task.documents)))
        for task, share in zip(tasks, (SCORING, LOOKING), strict=True)
    ]
    tasks = corpus.tasks(*map(_part, tasks, parts))
    for task, name in zip(tasks, (HELD_OUT, VALIDATING), strict=True):
        write_task(task, data / name, name)
    asked, found = ([len(named) for named in (task.queries, task.documents)] for task in tasks)
    say(
        f"verdict: {asked[0]:,} queries over {asked[1]:,} passages; checkpoint chosen by other "
        f"documents: {found[0]:,} over {found[1]:,}"
    )
    return tasks


def _part(task: Task, share: float) -> tuple[int, int]:
    """Queries and passages of a share of a task, but no fewer than say something."""
    sizes = (len(task.queries), len(task.documents))
    queries, documents = (
        max(least, round(share * size)) for least, size in zip(LEAST_TASK, sizes, strict=True)
    )
    return queries, documents


def _tell(run: Path, record: dict[str, Any], clock: Clock) -> None:
    """Table, retention, verdict, the page, the next command."""
    say(table(record["rows"], record["queries"], record["passages"]))
    for row in record["retention"]:
        before, after = 100 * row["before"], 100 * row["after"]
        say(f"retained, {row['set']}: {before:.1f}, after {after:.1f} ({after - before:+.1f})")
    say(f"verdict: {record['sentence']}")
    say("the queries are headings and first sentences of these documents, not what people asked")
    say(f"report: {report([run], run / 'report.html')}")
    if clock.parts:
        say(f"{(clock.seconds - clock.left) / 60:.1f} min: {told_of(clock.parts)}")
    if record["documents"] != PYTHON_DOCS:
        words = ["index", record["documents"], "--db", f"{run}-index", "--model", str(run)]
        say(f"next: llm2comp {shlex.join(words)}")
