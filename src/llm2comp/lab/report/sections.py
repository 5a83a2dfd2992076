"""One run as sections of the page."""

from __future__ import annotations

import shlex

from llm2comp.lab.plots import heatmap_figure, spectrum_figure
from llm2comp.lab.report.blocks import (
    NONE,
    PageSection,
    Part,
    Plot,
    Points,
    Table,
    curves,
    drawn,
    duration,
    number,
    percent,
)
from llm2comp.lab.report.reading import Evaluation, RunLog, StageLog, columns
from llm2comp.lab.report.verdict import (
    adapted_section,
    measured_states,
    searches_section,
    short_section,
    use_section,
    warnings_section,
)
from llm2comp.lab.report.words import (
    ABOUT,
    FIGURES,
    HEATMAP,
    LOSS,
    RANKS,
    SPECTRUM,
    TASKS,
    WATCH_PLOTS,
    adapter_of,
    sentence,
)
from llm2comp.recipe import PretextStage, Stage


def run_part(run: RunLog, ident: str) -> Part:
    """The sections of one run."""
    sections = [short_section(run, ident), *use_section(run, ident), *searches_section(run, ident)]
    sections += [
        *adapted_section(run, ident),
        *warnings_section(run, ident),
        overview(run, ident),
        *_scores(run, ident),
        *_course(run, ident),
    ]
    sections += [section for stage in run.stages for section in _stage(run, stage, ident)]
    sections += _environment(run, ident)
    return Part(ident, run.label, sentence(run), sections)


def overview(run: RunLog, ident: str) -> PageSection:
    """Table of model, data, settings and progress."""
    recipe = run.recipe
    facts = {
        "Recipe": recipe.name,
        "Model": recipe.model.name
        + (f" at {recipe.model.revision}" if recipe.model.revision else ""),
        "Memory tokens": str(recipe.memory.tokens),
        "Attention of the encoder": recipe.model.attention,
        "Adapter": adapter_of(recipe),
        "Objective of stage 1": recipe.pretext.objective_name if recipe.pretext else "",
        "Seed": str(recipe.seed),
    }
    header = ("stage", "data", "steps", "batch", "learning rate", "time")
    table = Table("The stages, in order", header, tuple(map(_stage_row, run.stages)), numeric=False)
    known = tuple((name, value) for name, value in facts.items() if value)
    return PageSection(f"{ident}-overview", "What was trained", facts=known, tables=(table,))


def _stage_row(stage: StageLog) -> tuple[str, ...]:
    settings = stage.settings
    batch = str(settings.batch_size)
    if isinstance(settings, PretextStage) and settings.gradient_accumulation_steps > 1:
        batch += f" × {settings.gradient_accumulation_steps}"
    peak = settings.schedule.learning_rate
    rates = peak if peak == "auto" else f"{peak:g} to {settings.schedule.floor_learning_rate:g}"
    time = duration(stage.done.seconds) if stage.done else NONE
    return (stage.title, _data(settings), _steps(stage), batch, rates, time)


def _data(settings: Stage) -> str:
    names = []
    for spec in getattr(settings, "data", ()):
        parts = [
            spec.source,
            spec.subset,
            spec.file,
            f"first {spec.limit:,} rows" if spec.limit else None,
        ]
        names.append(", ".join(part for part in parts if part))
    return "; ".join(names)


def _steps(stage: StageLog) -> str:
    planned = stage.settings.steps
    if stage.done is None:
        return f"{stage.reached:,} of {planned:,}, not " + (
            "finished" if stage.reached else "begun"
        )
    early = f" of {planned:,}, stopped early" if stage.reached < planned else ""
    kept = f", step {stage.done.kept_step:,} kept" if stage.done.kept_step is not None else ""
    return f"{stage.reached:,}{early}{kept}"


def _scores(run: RunLog, ident: str) -> list[PageSection]:
    tables: list[Table] = []
    text = (RANKS,) if run.demo and measured_states(run) else ()
    if run.demo:
        rows = tuple(
            (row.model, percent(row.ndcg_at_10), percent(row.mrr_at_10), number(row.effective_rank))
            for row in run.demo
        )
        caption = (
            "Finding held-out Python documentation by its summary line; nDCG and MRR times 100"
        )
        tables.append(Table(caption, ("model", "nDCG@10", "MRR@10", "effective rank"), rows))
    models = columns(run.evaluations)
    if models:
        tables.append(evaluation_table(models))
    failed = tuple(
        (task, name, why) for name, entry in models.items() for task, why in entry.failed.items()
    )
    if failed:
        tables.append(Table("Tasks that failed", ("task", "model", "why"), failed, numeric=False))
    return (
        [PageSection(f"{ident}-scores", "Scores", text=text, tables=tuple(tables))]
        if tables
        else []
    )


def evaluation_table(entries: dict[str, Evaluation]) -> Table:
    """Tasks down, models across, scores times 100; the mean is over tasks that all models have."""
    metrics = {
        task: f"{score.metric}, {score.split}"
        for e in entries.values()
        for task, score in e.scores.items()
    }
    tasks = dict.fromkeys(
        [*metrics, *(task for entry in entries.values() for task in entry.failed)]
    )
    rows = []
    for task in tasks:
        cells = [
            percent(entry.scores[task].score)
            if task in entry.scores
            else "failed"
            if task in entry.failed
            else NONE
            for entry in entries.values()
        ]
        rows.append((task, *cells, metrics.get(task, NONE)))
    if len(tasks) > 1 and all(len(entry.scores) == len(tasks) for entry in entries.values()):
        means = [
            sum(score.score for score in entry.scores.values()) / len(tasks)
            for entry in entries.values()
        ]
        rows.append((f"mean of {len(tasks)}", *map(percent, means), NONE))
    return Table(
        "Evaluation, main score of each task times 100", ("task", *entries, "metric"), tuple(rows)
    )


def _course(run: RunLog, ident: str) -> list[PageSection]:
    """Measures of collapse and spectra, from before training to the end."""
    states = measured_states(run)
    if not states:
        return []
    used = {
        name: value
        for name, value in FIGURES.items()
        if any(value(watch) is not None for _, watch in states)
    }
    rows = tuple(
        (name, *(number(value(watch)) for value in used.values())) for name, watch in states
    )
    table = Table(f"Measured on the same {states[0][1].texts:,} texts", ("encoder", *used), rows)
    plots = spectrum_plots(
        f"{ident}-spectrum", run.label, {name: watch.spectrum for name, watch in states}
    )
    return [
        PageSection(
            f"{ident}-course", "Before and after each stage", tables=(table,), plots=tuple(plots)
        )
    ]


def spectrum_plots(ident: str, of: str, spectra: dict[str, tuple[float, ...]]) -> list[Plot]:
    """Spectra in one drawing, in a list that is empty without any value above zero."""
    spectra = {
        name: values for name, values in spectra.items() if any(value > 0 for value in values)
    }
    if not spectra:
        return []
    longest = max(map(len, spectra.values()))
    rows = tuple(
        (
            str(i + 1),
            *(number(values[i]) if i < len(values) else NONE for values in spectra.values()),
        )
        for i in range(longest)
    )
    table = Table(
        "Singular values of the embeddings' covariance, largest first",
        ("direction", *spectra),
        rows,
    )
    return [drawn(ident, "Spectrum", of, spectrum_figure(spectra), SPECTRUM, table)]


def _stage(run: RunLog, stage: StageLog, ident: str) -> list[PageSection]:
    """What was logged and watched while a stage trained."""
    place, of = f"{ident}-{stage.name}", f"{run.label}, {stage.title}"
    loss: Points = [(line.step, line.loss) for line in stage.metrics]
    logged = {
        name: [
            (line.step, value)
            for line in stage.metrics
            if (value := getattr(line, field)) is not None
        ]
        for field, name in (
            ("learning_rate", "learning rate"),
            ("grad_norm", "gradient norm"),
            ("tokens_per_second", "tokens/s"),
        )
    }
    plots = curves(f"{place}-loss", "Loss", of, {"loss": loss}, LOSS[stage.name], beside=logged)
    for title, names, reading in WATCH_PLOTS:
        lines: dict[str, Points] = {
            name: [(w.step, value) for w in stage.watch if (value := FIGURES[name](w)) is not None]
            for name in names
        }
        ylabel = "directions" if title == "Effective rank" else title.lower()
        plots += curves(f"{place}-{title.split()[0].lower()}", title, of, lines, reading, ylabel)
    tasks = dict.fromkeys(task for line in stage.watch for task in line.tasks)
    scores: dict[str, Points] = {
        task: [(line.step, 100 * line.tasks[task]) for line in stage.watch if task in line.tasks]
        for task in tasks
    }
    plots += curves(f"{place}-tasks", "Evaluation sets", of, scores, TASKS, "score × 100")
    plots += _heatmap(stage, place, of)
    names = (
        tuple(stage.settings.objectives)
        if isinstance(stage.settings, PretextStage)
        else (stage.name,)
    )
    about = tuple(ABOUT[name] for name in names)
    return (
        [PageSection(place, f"Stage {stage.number}: {stage.title}", about, plots=tuple(plots))]
        if plots
        else []
    )


def _heatmap(stage: StageLog, place: str, of: str) -> list[Plot]:
    if stage.result is None or not stage.result.memory_correlation:
        return []
    matrix = stage.result.memory_correlation
    places = [str(i) for i in range(1, len(matrix) + 1)]
    rows = tuple(
        (i, *(f"{cosine:.3f}" for cosine in row)) for i, row in zip(places, matrix, strict=True)
    )
    table = Table(f"{of}: mean cosine between memory tokens", ("token", *places), rows)
    figure = heatmap_figure(matrix, f"step {stage.result.step:,}")
    return [drawn(f"{place}-memory", "Memory tokens", of, figure, HEATMAP, table)]


def _environment(run: RunLog, ident: str) -> list[PageSection]:
    found = run.environment
    if found is None:
        return []
    facts = (
        ("Started", found.started),
        ("Device", found.device),
        ("Machine", found.machine),
        ("Python", found.python),
    )
    table = Table(
        "Packages", ("package", "version"), tuple(sorted(found.packages.items())), numeric=False
    )
    command = shlex.join(found.command)
    return [
        PageSection(
            f"{ident}-environment",
            "Environment",
            facts=facts,
            code=command,
            tables=(table,),
            folded=True,
        )
    ]
