"""The head of a report: better than word matching or not, what helped, what got worse.

Also how to use the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llm2comp.lab.report.blocks import PageSection, Table, duration, percent
from llm2comp.lab.report.reading import Evaluation, RunLog, WatchLine
from llm2comp.runs.folder import FOLDERS, MODEL_FOLDER

# Points (of 100) within which two scores are called alike, and the share of a score whose loss is
# warned of.
ALIKE, LOST = 0.5, 0.1
BM25 = "BM25"
LEXICAL_TITLES = {"llm2comp/bm25": BM25, "llm2comp/tfidf": "TF-IDF"}  # by their names in a summary
NOT_SCORED = (
    "Not scored beside word matching yet. Whether it is better than that, your own questions and "
    "answers tell: llm2comp evaluate {run} bm25 --pairs FILE"
)


@dataclass(frozen=True)
class Course:
    """One score in percent: the encoder after each stage, and baselines without training."""

    of: str
    states: tuple[tuple[str, float], ...]
    beside: tuple[tuple[str, float], ...]

    def changes(self) -> Iterator[tuple[str, float, float]]:
        """Stage, score before it, score after it."""
        for (_, before), (name, after) in zip(self.states, self.states[1:], strict=False):
            yield name.removeprefix("after "), before, after


def short_section(run: RunLog, ident: str) -> PageSection:
    """Verdict and tiles."""
    found = courses(run)
    said = [verdict(course) for course in found if course.beside]
    text = [*said[1:], *(line for course in found if (line := stages_sentence(course)))]
    if run.adapted:
        said = [run.adapted.sentence, *said]
    if not said:
        text.insert(0, NOT_SCORED.format(run=run.folder))
    cards = _cards(run, found, len(list(warnings(run))))
    return PageSection(
        f"{ident}-short", "In short", tuple(text), cards, lead=said[0] if said else ""
    )


def warnings_section(run: RunLog, ident: str) -> list[PageSection]:
    """The section on what got worse, if anything did."""
    spoken = tuple(warnings(run))
    return [PageSection(f"{ident}-warnings", "Warnings", warnings=spoken)] if spoken else []


def adapted_section(run: RunLog, ident: str) -> list[PageSection]:
    """What `adapt` found on the held-out documents; empty for other runs."""
    if (found := run.adapted) is None:
        return []
    rows = tuple((r.system, *map(percent, (r.ndcg_at_10, r.low, r.high))) for r in found.rows)
    caption = f"{found.queries:,} queries over {found.passages:,} passages that were held out"
    header = ("system", "nDCG@10", "95 % from", "to")
    kept = tuple((r.set, percent(r.before), percent(r.after)) for r in found.retention)
    beside = Table("What it could do before, on other sets", ("set", "before", "after"), kept)
    text = f"Documents: {found.documents}. Their headings and first sentences are the queries."
    tables = (Table(caption, header, rows), *((beside,) if kept else ()))
    return [PageSection(f"{ident}-adapted", "On your documents", (text,), tables=tables)]


def courses(run: RunLog) -> list[Course]:
    """The scores that say whether the encoder is good: the demo's, and those of `evaluate`."""
    found = []
    states = tuple(
        (row.model, 100 * row.ndcg_at_10) for row in run.demo if row.effective_rank is not None
    )
    beside = tuple(
        (row.model, 100 * row.ndcg_at_10) for row in run.demo if row.effective_rank is None
    )
    if states:
        found.append(Course("Python documentation, nDCG@10", states, beside))
    return [*found, *_evaluated(run)]


def _evaluated(run: RunLog) -> list[Course]:
    """The mean over the sets that the encoder, its stages and word matching all have.

    Of each model itself, all of its memory states; of several revisions the newest.
    """
    name = run.folder.resolve().name
    entries = {e.model: e for e in run.evaluations if e.scores and not e.variant}
    lexical = {LEXICAL_TITLES[e.name]: e for e in entries.values() if e.name in LEXICAL_TITLES}
    ours: dict[str, Evaluation] = {}
    since: list[str] = []  # stages since the last one that has scores
    for stage in run.stages:
        since.append(stage.title)
        last = stage is run.stages[-1]
        entry = entries.get(f"{name}/{FOLDERS[stage.name]}") or (
            entries.get(name) if last else None
        )
        if entry:
            ours["after " + (" and ".join(since) if ours else since[-1])] = entry
            since = []
    if not ours:
        return []
    tasks = set.intersection(*(set(entry.scores) for entry in (*ours.values(), *lexical.values())))
    if not tasks:
        return []

    def mean(entry: Evaluation) -> float:
        return 100 * sum(entry.scores[task].score for task in tasks) / len(tasks)

    of = f"mean of {len(tasks)} sets" if len(tasks) > 1 else next(iter(tasks))
    return [
        Course(
            of,
            *(
                tuple((title, mean(entry)) for title, entry in group.items())
                for group in (ours, lexical)
            ),
        )
    ]


def verdict(course: Course) -> str:
    """Better than word matching or not, in a sentence."""
    name, score = course.states[-1]
    rivals = dict(course.beside)
    rival = BM25 if BM25 in rivals else next(iter(rivals))
    gain = score - rivals[rival]
    how = (
        "is about as good as"
        if abs(gain) < ALIKE
        else "is better than"
        if gain > 0
        else "is not better than"
    )
    subject = f"The encoder {name}" if name.startswith("after ") else name[:1].upper() + name[1:]
    others = "".join(f"; {other} {value:.1f}" for other, value in course.beside if other != rival)
    figures = f"{score:.1f} against {rivals[rival]:.1f}{others}"
    return f"{subject} {how} {rival}, which only matches words: {figures} ({course.of}, × 100)."


def stages_sentence(course: Course) -> str:
    """Which stage helped and which hurt; empty if only one state has a score."""
    parts = []
    for stage, before, after in course.changes():
        word = (
            "changed little"
            if abs(after - before) < ALIKE
            else "helped"
            if after > before
            else "hurt"
        )
        parts.append(f"{stage} {word} ({before:.1f} → {after:.1f})")
    return ", ".join(parts) + "." if parts else ""


def warnings(run: RunLog) -> Iterator[str]:
    """What got worse: warnings of the watch, stages that lowered a score, misleading memory.

    Each kind of warning is told once per stage.
    """
    misleading = []
    for stage in run.stages:
        given = [(line.step, text) for line in stage.watch for text in line.warnings]
        for kind in dict.fromkeys(text.partition(":")[0] for _, text in given):
            texts = {step: text for step, text in given if text.partition(":")[0] == kind}
            steps = ", ".join(f"{step:,}" for step in texts)
            yield f"{stage.title}, step{'s'[: len(texts) > 1]} {steps}: {list(texts.values())[-1]}"
        last, told = stage.result, any("the memory misleads" in text for _, text in given)
        if (
            last
            and last.step
            and not told
            and last.context_recovered is not None
            and last.context_recovered < 0
        ):
            misleading.append(f"{stage.title} ({last.context_recovered:.2f})")
    for course in courses(run):
        for stage_title, before, after in course.changes():
            if before - after > max(ALIKE, LOST * before):
                yield (
                    f"{stage_title} made it worse: from {before:.1f} to {after:.1f} "
                    f"({course.of}, × 100)"
                )
    if misleading and run.recipe.pretext:
        yield (
            f"context recovered is below 0 after {', '.join(misleading)}: the memory misleads the "
            "LM, which goes on worse with it than without any context"
        )


def measured_states(run: RunLog) -> list[tuple[str, WatchLine]]:
    """Measures of the watch before training and after each stage (unfinished: the last so far)."""
    states = []
    for stage in run.stages:
        if stage.number == run.stages[0].number and stage.watch and stage.watch[0].step == 0:
            states.append(("before training", stage.watch[0]))
        if stage.result and (stage.done or stage.result.step > 0):
            states.append(
                (
                    f"after {stage.title}"
                    if stage.done
                    else f"{stage.title}, step {stage.result.step}",
                    stage.result,
                )
            )
    return states


def _cards(run: RunLog, found: list[Course], warned: int) -> tuple[tuple[str, str, str], ...]:
    """Tiles with the run's main figures."""
    cards = []
    for course in found:
        beside = "".join(f"; {name} {value:.1f}" for name, value in course.beside)
        (first, before), (last, after) = course.states[0], course.states[-1]
        several = len(course.states) > 1
        shown, note = (
            (f"{before:.1f} → {after:.1f}", f"{first} → {last}")
            if several
            else (f"{after:.1f}", last)
        )
        cards.append((course.of, shown, note + beside))
    measured = measured_states(run)
    if len(measured) > 1:
        (first, begin), (last, end) = measured[0], measured[-1]
        label = f"effective rank, {end.texts:,} texts"
        cards.append(
            (label, f"{begin.effective_rank:.1f} → {end.effective_rank:.1f}", f"{first} → {last}")
        )
    done = [stage.done for stage in run.stages if stage.done]
    if done:
        steps = sum(stage.reached for stage in run.stages if stage.done)
        note = f"{steps:,} steps in {len(done)} finished stages"
        cards.append(("training time", duration(sum(each.seconds for each in done)), note))
    if found or any(stage.watch for stage in run.stages):
        cards.append(("warnings", str(warned) if warned else "none", "of the watch and the scores"))
    return tuple(cards)


def use_section(run: RunLog, ident: str) -> list[PageSection]:
    """Three lines of Python that use the model (or the last finished stage)."""
    compare = (
        'print(model.similarity(model.encode_query(["a question"]), '
        'model.encode_document(["a text", "another text"])))'
    )
    done = [stage for stage in run.stages if stage.done]
    if (run.folder / MODEL_FOLDER).is_dir():
        place, begin, call = (
            run.folder / MODEL_FOLDER,
            "from sentence_transformers import SentenceTransformer",
            "SentenceTransformer",
        )
    elif done:
        place, begin, call = run.folder / FOLDERS[done[-1].name], "import llm2comp", "llm2comp.load"
    else:
        return []
    return [
        PageSection(
            f"{ident}-use",
            "Use this model",
            code="\n".join([begin, f"model = {call}({str(place)!r})", compare]),
        )
    ]


def searches_section(run: RunLog, ident: str) -> list[PageSection]:
    """What the encoder found for a few questions."""
    rows = tuple(
        (
            search.question,
            ", ".join(f"{answer.name} ({answer.cosine:.2f})" for answer in search.answers),
        )
        for search in run.searches
    )
    caption = "Functions of Python's library whose documentation is nearest, with the cosine"
    table = Table(caption, ("asked", "found"), rows, numeric=False)
    return [PageSection(f"{ident}-searches", "Example searches", tables=(table,))] if rows else []
