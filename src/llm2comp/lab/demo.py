"""`llm2comp demo`: the whole path on a small LM and the documentation of one's own Python."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from llm2comp.data import python_docs
from llm2comp.lab.evaluation.retrieval import Collection
from llm2comp.lab.report import report
from llm2comp.lab.report.reading import SEARCHES_FILE
from llm2comp.lab.train import train
from llm2comp.measures.spectrum import effective_rank, spectrum
from llm2comp.model.backbone import load_backbone
from llm2comp.model.baselines.module import baseline
from llm2comp.model.encoder import merge_adapters
from llm2comp.model.vectors import embed_texts
from llm2comp.runs.folder import MODEL_FOLDER, Run
from llm2comp.storage.loading import load
from llm2comp.system.console import say
from llm2comp.system.files import to_json, write_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TITLES = {"pretext": "after CTKD", "ucl": "after UCL", "scl": "after SCL"}
FUSED = "encoder + BM25"
# What a row of the table is, in one line each.
LINES = {
    "backbone, mean-pooled": "the LM as it comes: mean of its states over the text, nothing "
    "trained",
    TITLES[
        "pretext"
    ]: "memory tokens hold what the LM needs to go on with a text; not yet what tells it "
    "from others",
    TITLES["ucl"]: "two views of a text were pulled together, other texts pushed away",
    TITLES[
        "scl"
    ]: "summaries were pulled to the documentation that follows them: what the search below uses",
    "BM25": "matching of words, no model",
    FUSED: "ranks of both added (reciprocal rank fusion): what to use where words and meaning "
    "both count",
}
# The demo's LMs and their recipes.
RECIPES = {"smollm2": "python-docs", "tiny": "tiny"}
QUESTIONS = (
    "copy a whole folder of files to another place",
    "split a string at white space, respecting quotes as a shell does",
    "largest common divisor of two whole numbers",
)


SEARCHED_MODULES = frozenset(
    """bisect collections copy csv datetime difflib fnmatch fractions functools glob gzip hashlib
    heapq itertools json math operator os pathlib random re shlex shutil statistics string
    subprocess tempfile textwrap threading time urllib zipfile""".split()  # noqa: SIM905
)


def demo(out: Path, recipe: str = RECIPES["smollm2"]) -> Path:
    """Train, score every stage on the held-out fifth of the documentation, search it.

    Returns the model folder.
    """
    begin = time.monotonic()
    run = train(recipe, out)
    trained = time.monotonic()
    rows = score(run)
    say(table(rows))
    for row in rows:
        say(f"  {row['model']}: {LINES[str(row['model'])]}")
    model = load(run / MODEL_FOLDER)
    found = list(search(model, QUESTIONS))
    keys = ("name", "summary", "cosine")
    rows_found = [
        {"question": asked, "answers": [dict(zip(keys, one, strict=True)) for one in best]}
        for asked, best in found
    ]
    write_text(run / "scores" / SEARCHES_FILE, to_json(rows_found, indent=1))
    for question, answers in found:
        say(Text(f"\n{question}", style="bold"))
        for name, summary, cosine in answers:
            say(Text.assemble(f"  {cosine:.2f}  ", (name, "green"), f"  {summary[:90]}"))
    page = report([run], run / "report.html")
    end = time.monotonic()
    say(f"\nwhy it is as good as it is: {page}")
    say(
        f"{run / MODEL_FOLDER}   ({trained - begin:.0f} s training, {end - trained:.0f} s "
        "scoring and search)"
    )
    return run / MODEL_FOLDER


def score(run: Path) -> list[dict[str, float | str | None]]:
    """Retrieval figures of the backbone, each stage of a run, BM25, and the last stage with BM25.

    They are kept in `scores/`.

    Encoders have an effective rank beside them, that of the documents' embeddings.
    """
    task = python_docs.retrieval()
    collection = Collection(task.queries, task.documents, task.relevant)
    rows: list[dict[str, float | str | None]] = []
    for name, model in _encoders(Run(run)):
        documents_ND = embed_texts(model, list(task.documents.values()))
        scores = collection.score(model, documents_ND)
        rank = effective_rank(spectrum(documents_ND))
        rows.append(
            {
                "model": name,
                "ndcg_at_10": scores.ndcg_at_10,
                "mrr_at_10": scores.mrr_at_10,
                "effective_rank": rank,
            }
        )
        say(f"{name}: nDCG@10 {100 * scores.ndcg_at_10:.1f}")
    for name, scores in (
        ("BM25", collection.score_bm25()),
        (FUSED, collection.score_fused(model, documents_ND)),
    ):
        rows.append(
            {
                "model": name,
                "ndcg_at_10": scores.ndcg_at_10,
                "mrr_at_10": scores.mrr_at_10,
                "effective_rank": None,
            }
        )
    say(f"{len(task.queries)} queries over {len(task.documents)} held-out documents")
    write_text(run / "scores" / "python-docs.json", to_json(rows, indent=1))
    return rows


def _encoders(run: Run) -> Iterator[tuple[str, SentenceTransformer]]:
    yield "backbone, mean-pooled", baseline(load_backbone(run.recipe.model))
    for stage in run.recipe.stages:
        if run.stage(stage).is_dir():
            model = run.encoder(stage)
            merge_adapters(model)  # faster, and nothing decodes here
            yield TITLES[stage], model


def table(rows: list[dict[str, float | str | None]]) -> Table:
    """The demo's result as a rich table."""
    shown = Table(
        "model",
        "nDCG@10",
        "MRR@10",
        "effective rank",
        title="held-out Python documentation: summary line → body",
    )
    for row in rows:
        figures = [row["ndcg_at_10"], row["mrr_at_10"]]
        rank = row["effective_rank"]
        shown.add_row(
            str(row["model"]),
            *(f"{100 * float(x or 0):.1f}" for x in figures),
            f"{rank:.1f}" if rank else "–",
        )
    return shown


def search(
    model: SentenceTransformer, questions: tuple[str, ...]
) -> Iterator[tuple[str, list[tuple[str, str, float]]]]:
    """For each question the three functions with the nearest docs: name, summary, cosine."""
    named = [
        (name, text)
        for name, text in python_docs.functions()
        if name.split(".")[0] in SEARCHED_MODULES and "._" not in name
    ]
    documents = model.encode_document(
        [text[:300] for _, text in named], convert_to_tensor=True, show_progress_bar=False
    )
    queries = model.encode_query(list(questions), convert_to_tensor=True, show_progress_bar=False)
    for question, cosines in zip(questions, model.similarity(queries, documents), strict=True):
        best = cosines.topk(3)
        answers = [
            (named[i], value)
            for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        yield question, [(name, text.splitlines()[0], value) for (name, text), value in answers]
