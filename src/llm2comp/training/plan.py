"""`--dry-run`: the resolved plan of a recipe and what it will need.

The model's config alone is read, no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table

from llm2comp.model.backbone import KINDS, resolve_device
from llm2comp.model.backbone.loading import load_skeleton, load_tokenizer, resolve_dtype
from llm2comp.model.backbone.quiet import quiet_libraries
from llm2comp.recipe import PretextStage, Recipe, SclStage, Stage, UclStage
from llm2comp.system.console import say
from llm2comp.training.batches import clipped, most_in_a_batch, pair_datasets
from llm2comp.training.checks import check
from llm2comp.training.cost import Gpu, Size, hours, layer_passes, sample_flops
from llm2comp.training.estimates import (
    activations,
    base_bytes,
    free_memory,
    logits,
    texts_at_once,
    tokens_at_once,
    trained_embeddings,
)
from llm2comp.training.measuring import said, times
from llm2comp.training.rows import load_queries, load_responses, load_texts
from llm2comp.training.sample import LocalSets

SAMPLE = 1000
GIB = 2**30
FITS = "will fit"
FITS_NOT = (
    "will probably NOT fit: lower batch_size, or set gradient_checkpointing, "
    "max_tokens_per_batch or mini_batch_tokens"
)
# interpreter, libraries and texts, as the demo's process holds them between its stages
PROCESS = 3 * GIB // 2
# bytes of a trained weight: itself, its gradient, two of AdamW
TRAINED = 16


@dataclass(frozen=True)
class StagePlan:
    """What one stage will read, hold and compute.

    Lengths are in tokens, sizes in bytes. `peak`, `flops` and `launches` (how often a layer has
    something to compute) are estimates.
    """

    name: str
    rows: int
    samples: int
    tokens: int
    trainable: int
    peak: int
    flops: float
    launches: int


def plan(
    recipe: Recipe, gpu: Gpu | None = None, local_sets: LocalSets | None = None
) -> tuple[list[StagePlan], int]:
    """Plans of all stages, here or on some GPU, and the bytes of the frozen base.

    `local_sets` as in `run.train`.

    Raises:
        BackboneError, DataError, RecipeError: as the run itself would.
    """
    check(recipe, local_sets)
    device = torch.device("cuda") if gpu else resolve_device(recipe.model.device)
    free = int(1e9 * gpu.memory) if gpu else free_memory(device)
    lm = load_skeleton(recipe.model)
    config, size = lm.config, replace(Size.of(lm), whole=recipe.adapter.kind == "full")
    with torch.device("meta"):
        trained = KINDS[recipe.adapter.kind](lm, recipe.model.name)
    copied = sum(p.numel() for p in trained.copy.parameters()) if trained.copy else 0
    tokenizer = load_tokenizer(recipe.model)
    full = resolve_dtype(recipe.model.dtype, device) == torch.float32
    base = base_bytes(lm, 4 if full else 2, recipe.model.quantization)
    plans, held = [], base + 4 * copied
    for name, asked in recipe.stages.items():
        with torch.device("meta"):
            trained.add(name, recipe.adapter)
        learning = sum(p.numel() for p in trained.parameters(name))
        texts, rows, per_sample, batch = stage_texts(asked)
        trainable = learning + trained_embeddings(
            asked, lm, recipe.memory_tokens, recipe.encoder.projection
        )
        fixed = held + TRAINED * trainable
        # the run measures what is free beside the base, and cuts its batches by that
        left = max(0, free - fixed - (PROCESS if device.type == "cpu" else 0))
        stage = planned(asked, batch, config, full, device, left)
        mean = mean_tokens(tokenizer, texts, stage)
        samples = stage.steps * stage.batch_size * getattr(stage, "gradient_accumulation_steps", 1)
        at_once = texts_at_once(stage, per_sample, mean)
        length = mean + recipe.memory_tokens
        kept = activations(config, stage, at_once, length, full) + logits(
            config, stage, at_once * length, full
        )
        peak = fixed + kept
        own = size if size.whole else replace(size, adapter=learning)
        flops = samples * sample_flops(stage, own, mean, per_sample, recipe.memory_tokens)
        launches = layer_passes(stage, size.layers, per_sample, at_once)
        tokens = int(samples * per_sample * mean)
        plans.append(StagePlan(name, rows, samples, tokens, trainable, peak, flops, launches))
        held += 0 if copied else 4 * learning
    return plans, base


def planned(
    stage: Stage, batch: int, config: Any, full: bool, device: torch.device, free: int
) -> Stage:
    """The stage with the batch and the tokens at once that it will be trained with.

    `free`: bytes that the base and the optimiser leave.
    """
    stage = stage.model_copy(update={"batch_size": batch})
    limit = "max_tokens_per_batch" if isinstance(stage, PretextStage) else "mini_batch_tokens"
    tokens = tokens_at_once(stage, config, full, device, free)
    return stage if tokens is None else stage.model_copy(update={limit: tokens})


def stage_texts(stage: Stage) -> tuple[list[str], int, int, int]:
    """A stage's first thousand texts, how many there are, how many make one sample, the batch.

    A sample is so many views or columns.

    Raises:
        DataError: as the stage would.
    """
    if isinstance(stage, SclStage):
        pairs = [pair for spec in stage.data for pair in load_queries(stage, spec)]
        stage = clipped("scl", stage, most_in_a_batch(pairs))
        pair_datasets(pairs, stage.batch_size)
        columns = 2 + max((len(p.negatives) for p in pairs), default=0)
        return (
            [f"{p.anchor} {p.positive}" for p in pairs[:SAMPLE]],
            len(pairs),
            columns,
            stage.batch_size,
        )
    assert isinstance(stage, PretextStage | UclStage)
    texts: Iterable[str] = (
        load_texts(stage.data) if isinstance(stage, UclStage) or not stage.needs_responses else ()
    )
    if isinstance(stage, PretextStage) and stage.needs_responses:
        texts = [
            f"{a.text} {a.response}"
            for a in load_responses(stage)
            if len(a.text) >= stage.min_characters
        ]
    first: list[str] = []
    distinct: set[str] = set()
    most, count = stage.batch_size if isinstance(stage, UclStage) else 0, 0
    for text in texts:
        if len(text) < stage.min_characters:
            continue
        count += 1
        if len(first) < SAMPLE:
            first.append(text)
        if len(distinct) < most:
            distinct.add(text)
    if isinstance(stage, UclStage):
        return first, count, 2, clipped("ucl", stage, len(distinct)).batch_size
    return first, count, 1, stage.batch_size


def mean_tokens(tokenizer: Any, texts: Sequence[str], stage: Stage) -> float:
    """Mean length of a text after cutting, over some texts."""
    limit = stage.document_max_tokens if isinstance(stage, SclStage) else stage.max_tokens  # type: ignore[attr-defined]
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    share = 0.5 if isinstance(stage, SclStage) else 1.0
    return sum(min(len(row) * share, limit) for row in rows) / max(1, len(rows))


def beside(stage: SclStage | None) -> Iterable[str]:
    """A line for each part of SCL's loss beside the contrastive one."""
    if stage is None:
        return
    if (teacher := stage.teacher) is not None:
        temperatures = (
            f"{teacher.temperature:g}, ours {teacher.student_temperature or stage.temperature:g}"
        )
        yield f"scl.teacher: {teacher.name}, weight {teacher.weight:g}, temperature {temperatures}"
    if (guide := stage.guide) is not None:
        same = (
            " (the teacher)"
            if teacher and (guide.name, guide.revision) == (teacher.name, teacher.revision)
            else ""
        )
        yield f"scl.guide: {guide.name}{same}, margin {guide.margin:g}"
    if stage.pretext_weight:
        size = stage.pretext_batch_size or "pretext.batch_size"
        yield f"scl.pretext_weight: {stage.pretext_weight:g}, on {size} more texts per step"


def show_plan(
    recipe: Recipe,
    verbose: bool = False,
    gpu: Gpu | None = None,
    local_sets: LocalSets | None = None,
) -> None:
    """Print a table of stages, whether they will fit the device, and how long they will take.

    Args:
        recipe: what to plan.
        verbose: print the resolved recipe, too.
        gpu: plan for this card, by arithmetic; None: for the device that is here, by a trial.
        local_sets: as in `run.train`.
    """
    quiet_libraries()
    plans, base = plan(recipe, gpu, local_sets)
    columns = ("stage", "rows", "samples", "text tokens", "trainable parameters")
    table = Table(*columns, "peak memory, about")
    for p in plans:
        counts = (p.rows, p.samples, p.tokens, p.trainable)
        table.add_row(p.name, *(f"{n:,}" for n in counts), f"{p.peak / GIB:.1f} GiB")
    say(table)
    if recipe.start_from:
        say(f"starts from {recipe.start_from}; its adapters stay as they are")
    for line in beside(recipe.scl):
        say(line)
    device = None if gpu else resolve_device(recipe.model.device)
    free = int(1e9 * gpu.memory) if gpu else free_memory(device)  # type: ignore[arg-type]
    on_cpu = device is not None and device.type == "cpu"
    process = PROCESS if on_cpu else 0
    worst = max(p.peak for p in plans) + process
    fits = worst < 0.9 * free
    own = f"libraries {process / GIB:.1f} GiB, " if process else ""
    need = f"base model {base / GIB:.1f} GiB, {own}needs about {worst / GIB:.1f} GiB"
    has = (
        f"{gpu.name}: {free / GIB:.1f} GiB in all"
        if gpu
        else f"{device}: {free / GIB:.1f} GiB free"
    )
    say(f"{has}, {need}: {FITS if fits else FITS_NOT}")
    if gpu:
        say(predicted(plans, gpu))
    else:
        tokens = {p.name: p.tokens for p in plans}
        say(f"time: {times(recipe, tokens) if fits else 'not measured, as it may not fit'}")
    say(recipe.to_yaml() if verbose else "the whole recipe, every default written out: --verbose")


def predicted(plans: Sequence[StagePlan], gpu: Gpu) -> str:
    """For people: hours of each stage on one such card, and their price."""
    found = {p.name: hours(p.flops, p.launches, gpu) for p in plans}
    each = ", ".join(f"{name} {said(value)}" for name, value in found.items())
    price = sum(found.values()) * gpu.price
    time = f"{said(sum(found.values()))} on one {gpu.name} ({each})"
    return (
        f"time: about {time}, price {price:,.2f} at {gpu.price:g} an hour; predicted, see "
        "docs/scaling.md"
    )
