"""What is scored before and after training, and the recipe for the minutes between."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from llm2comp.data import python_docs
from llm2comp.data.weak_pairs import PYTHON_DOCS, Task, WeakPair
from llm2comp.lab.adapt.corpus import (
    DATA_FOLDER,
    PAIRS_FILE,
    PASSAGE_TOKENS,
    PASSAGES_FILE,
    TRAINED_TOKENS,
    Corpus,
    kinds,
    write_rows,
)
from llm2comp.lab.adapt.mining import with_negatives
from llm2comp.lab.adapt.planning import (
    BATCH,
    EPOCHS,
    LOOKS,
    PRETEXT_BATCH,
    TRIED,
    TRIED_PAIRS,
    WRITING,
    Clock,
    Plan,
    Wanted,
    recipe_of,
    told_of,
)
from llm2comp.lab.adapt.questions import written
from llm2comp.lab.adapt.verdict import ADAPTED, LM, START, Verdict, records, systems
from llm2comp.lab.evaluation.retrieval import Collection, Ranking
from llm2comp.lab.train import local_sets
from llm2comp.model.baselines.module import baseline
from llm2comp.model.encoder import merge_adapters
from llm2comp.model.vectors import embed_texts
from llm2comp.recipe import BUILTIN_ENCODERS, ModelSettings, Recipe
from llm2comp.runs.folder import Run
from llm2comp.storage.export import export
from llm2comp.storage.places import live_place
from llm2comp.system.console import say
from llm2comp.training.measuring import rate

RETAINED = 100  # queries of the Python documentation
MOST_PASSAGES = 20_000  # that stage 1 reads, or questions are written about
LONGEST = 512  # tokens of a text that the encoder of a causal LM reads


@dataclass
class Work:
    """What is scored before and after training.

    Args:
        wanted: what was asked for.
        run: the run directory.
        corpus: the documents.
        clock: of the minutes.
        held_out: what the verdict is given on.
        chooser: what chooses the checkpoint.
    """

    wanted: Wanted
    run: Path
    corpus: Corpus
    clock: Clock
    held_out: Task
    chooser: Task

    def __post_init__(self) -> None:
        task = self.held_out
        self.collection = Collection(task.queries, task.documents, task.relevant)
        self.rankings: dict[str, list[Ranking]] = {}
        self.retained: dict[str, float] = {}

    def before(self, first: SentenceTransformer, recipe: Recipe | None) -> Recipe:
        """Score what there is; the recipe that was begun, or one for the minutes that are left."""
        wanted, guide = self.wanted, None
        with self.clock.part("guide"):
            if wanted.guide and recipe is None:
                guide = str(_exported(first, wanted.model, self.run / DATA_FOLDER / "guide"))
        module: Any = first[0]
        with self.clock.part("scoring"):
            lm = baseline(module.compressor.backbone) if wanted.start else first
            self.rankings[LM] = self._ranked(lm)
            if wanted.start:
                merge_adapters(first)  # faster, and nothing decodes from here on
                self.rankings[START] = self._ranked(first)
            self.retained = self._scores(first)
        say(f"scored before training: {told_of(self.clock.parts)}")
        return recipe or self._planned(first, guide)

    def after(self, adapted: SentenceTransformer) -> dict[str, Any]:
        """Score what came of it; the whole record."""
        with self.clock.part("scoring"):
            self.rankings[ADAPTED] = self._ranked(adapted)
            after = self._scores(adapted)
        found = systems(self.collection, self.rankings)
        verdict = Verdict.of(found)
        return {
            "documents": self.corpus.source,
            "queries": len(self.held_out.queries),
            "passages": len(self.held_out.documents),
            "rows": records(found),
            "choice": verdict.choice,
            "sentence": verdict.sentence,
            "retention": [
                {"set": name, "before": self.retained[name], "after": after[name]} for name in after
            ],
        }

    def _ranked(self, model: SentenceTransformer) -> list[Ranking]:
        texts = list(self.held_out.documents.values())
        return self.collection.by_cosine(model, embed_texts(model, texts, role="document"))

    def _scores(self, model: SentenceTransformer) -> dict[str, float]:
        """On what is not of these documents: set → score."""
        scores: dict[str, float] = {}
        if self.corpus.source != PYTHON_DOCS:
            task = python_docs.retrieval()
            queries = dict(list(task.queries.items())[:RETAINED])
            answers = {document for query in queries for document in task.relevant[query]}
            texts = {name: task.documents[name] for name in sorted(answers)}
            found = Collection(queries, texts, {query: task.relevant[query] for query in queries})
            scores[PYTHON_DOCS] = found.score(
                model, embed_texts(model, list(texts.values()), role="document")
            ).ndcg_at_10
        folders = [Path(folder) for folder in self.wanted.retention]
        return scores | (local_sets(folders)(model) if folders else {})

    def _planned(self, first: SentenceTransformer, guide: str | None) -> Recipe:
        """A recipe for the minutes that are left, by the measured cost of a step."""
        wanted, clock, held_out = self.wanted, self.clock, (self.held_out, self.chooser)
        module: Any = first[0]
        longest = module.max_tokens if wanted.start else LONGEST
        recipe = partial(recipe_of, wanted, self.run, longest=longest, guide=guide)
        scored = clock.parts["scoring"] / (2 if wanted.start else 1)
        saved = max(clock.parts["guide"], 2 * clock.parts["loading"])
        judged, chosen = (len(t.queries) + len(t.documents) for t in held_out)
        after = scored + saved + (LOOKS + 1) * scored / judged * chosen
        read_too = wanted.pretext or wanted.questions
        passages = self.corpus.passages(held_out, MOST_PASSAGES) if read_too else []
        lm = recipe(Plan(1, BATCH)).model
        questions = self._questions(passages, first, lm, clock.left - after)
        pairs = partial(self.corpus.pairs, held_out, written=questions)
        with clock.part("timing a step"), tempfile.TemporaryDirectory() as folder:
            few = pairs(TRIED * BATCH)
            batch = min(BATCH, len(few) // 2)
            begin = time.monotonic()
            rows = with_negatives(few, first, wanted.negatives, least=2)
            mining = (time.monotonic() - begin) / len(few) * batch if wanted.negatives else 0.0
            write_rows(Path(folder) / PAIRS_FILE, rows)
            trial = Plan(TRIED, TRIED_PAIRS, pretext=TRIED if wanted.pretext else 0)
            write_rows(Path(folder) / PASSAGES_FILE, ({"text": text} for text in passages))
            tried = recipe(trial, data=Path(folder))
            texts = [str(row[key]) for row in rows for key in row if key != "kind"]
            read = self._tokens(texts, TRAINED_TOKENS) / len(rows)
            per_step = batch * read / rate(tried, "scl") + mining
            if wanted.pretext:
                read = self._tokens(passages, PASSAGE_TOKENS) / len(passages)
                per_pretext = PRETEXT_BATCH * read / rate(tried, "pretext")
        plan = Plan.of(clock.left, after, per_step, batch)
        if wanted.pretext:
            plan = plan.begun_with(per_pretext, EPOCHS * len(passages) // PRETEXT_BATCH)
        with clock.part("pairs"):
            found = pairs(plan.steps * batch)
            rows = with_negatives(found, first, wanted.negatives)
        plan = plan.over(len(rows))
        say(plan.told(wanted.minutes))
        if wanted.pretext and not plan.pretext:
            say(f"no time for stage 1: a step of it takes {per_pretext:.0f} s")
        with clock.part("pairs"):
            data = self.run / DATA_FOLDER
            write_rows(data / PAIRS_FILE, rows)
            if plan.pretext:
                write_rows(data / PASSAGES_FILE, ({"text": text} for text in passages))
        left_out = f"; {len(found) - len(rows):,} others find too few hard negatives"
        say(f"{len(rows):,} pairs to train on: {kinds(rows)}{left_out * (len(rows) < len(found))}")
        return recipe(plan)

    def _questions(
        self,
        passages: Sequence[str],
        first: SentenceTransformer,
        lm: ModelSettings,
        seconds: float,
    ) -> list[WeakPair]:
        """Questions by the LM about what is trained on, where they are wanted."""
        if not self.wanted.questions:
            return []
        with self.clock.part("questions"):
            return written(
                passages,
                lm.model_copy(update={"attention": "causal"}),
                first if self.wanted.start else None,
                WRITING * seconds,
                self.wanted.seed,
            )

    def _tokens(self, texts: Sequence[str], most: int) -> int:
        return sum(min(1 + len(self.corpus.weak.offsets(text)), most) for text in texts)


def _exported(live: SentenceTransformer, model: str, folder: Path) -> Path:
    """The starting encoder as a stock folder, as a guide must be: the run's own, or made here."""
    run = None if model in BUILTIN_ENCODERS else Run.of(model)
    whole = run is not None and live_place(model) == str(run.last)
    if run is not None and whole and (run.model / "modules.json").is_file():
        return run.model
    if not (folder / "modules.json").is_file():
        say("the starting encoder is exported, to find false negatives in the batches")
        export(live, folder)
    return folder.absolute()
