"""`--dry-run`: the resolved plan of a recipe and what it will need, from the model's config alone (no weights are read)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from rich.table import Table

from llm2comp.backbone import resolve_device
from llm2comp.backbone.adapters import AdapterStack
from llm2comp.backbone.frozen import Frozen
from llm2comp.backbone.loading import load_skeleton, load_tokenizer
from llm2comp.backbone.quiet import quiet_libraries
from llm2comp.compressor import room_for_text
from llm2comp.console import say
from llm2comp.pretext.kl import CHUNK, CHUNK_ON_GPU
from llm2comp.recipe import ContrastiveStage, PretextStage, Recipe, SclStage, Stage, UclStage
from llm2comp.training.stages import enough, load_answers, load_queries, load_texts, pair_datasets

SAMPLE = 1000
GIB = 2**30
PROCESS = 3 * GIB // 2  # interpreter, libraries and texts, as the demo's process holds them between its stages


@dataclass(frozen=True)
class StagePlan:
    """What one stage will read and hold. Lengths in tokens, sizes in bytes; `peak` is an estimate."""

    name: str
    rows: int
    samples: int
    tokens: int
    trainable: int
    peak: int


def plan(recipe: Recipe) -> tuple[list[StagePlan], int]:
    """Plans of all stages, and the bytes of the frozen base.

    Raises:
        BackboneError, DataError: as the run itself would.
    """
    device = resolve_device(recipe.model.device)
    lm = load_skeleton(recipe.model)
    config = lm.config
    room_for_text(getattr(config, "max_position_embeddings", None), recipe.memory_tokens, SAMPLE)
    base_parameters = sum(p.numel() for p in lm.parameters())
    kinds = {"lora": AdapterStack, "none": Frozen}
    adapters: Any = None if recipe.adapter.kind == "full" else kinds[recipe.adapter.kind](lm, recipe.model.name)
    layers = base_parameters - embedding_weights(lm)
    tokenizer = load_tokenizer(recipe.model)
    full = recipe.model.dtype == "float32" or (recipe.model.dtype == "auto" and device.type == "cpu")
    base = base_bytes(lm, 4 if full else 2, recipe.model.quantization)
    plans, held = [], base + (0 if adapters else 4 * (layers + lm.get_input_embeddings().weight.numel()))
    for name, stage in recipe.stages.items():
        learning = layers
        if adapters is not None:
            with torch.device("meta"):
                adapters.add(name, recipe.adapter)
            learning = sum(p.numel() for p in adapters.parameters(name))
        texts, rows, per_sample = stage_texts(stage)
        mean = mean_tokens(tokenizer, texts, stage)
        samples = stage.steps * stage.batch_size * getattr(stage, "gradient_accumulation_steps", 1)
        trainable = learning + trained_embeddings(stage, lm, recipe.memory_tokens, recipe.encoder.projection)
        at_once = texts_at_once(stage, per_sample, mean)
        length = mean + recipe.memory_tokens
        kept = activations(config, stage, at_once, length, full) + logits(config, stage, at_once * length, full)
        peak = held + 16 * trainable + kept
        plans.append(StagePlan(name, rows, samples, int(samples * per_sample * mean), trainable, peak))
        held += 4 * learning if adapters else 0
    return plans, base


def base_bytes(lm: Any, size: int, quantization: str | None) -> int:
    """Bytes of the frozen base, `size` per weight; in 4 or 8 bits linear layers but the head take less (scales counted)."""
    head = lm.get_output_embeddings()
    linear = sum(m.weight.numel() for m in lm.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    rest = sum(p.numel() for p in lm.parameters()) - linear
    return int(size * rest + {"nf4": 0.5625, "int8": 1.0}.get(quantization or "", float(size)) * linear)


def stage_texts(stage: Stage) -> tuple[list[str], int, int]:
    """The first thousand of a stage's texts, how many there are, how many (views, columns) make one sample.

    Raises:
        DataError: as the stage would.
    """
    if isinstance(stage, SclStage):
        pairs = [pair for spec in stage.data for pair in load_queries(stage, spec)]
        pair_datasets(pairs, stage.batch_size)
        columns = 2 + max((len(p.negatives) for p in pairs), default=0)
        return [f"{p.anchor} {p.positive}" for p in pairs[:SAMPLE]], len(pairs), columns
    assert isinstance(stage, PretextStage | UclStage)
    texts: Iterable[str] = load_texts(stage.data) if isinstance(stage, UclStage) or not stage.answered else ()
    if isinstance(stage, PretextStage) and stage.answered:
        texts = [f"{a.text} {a.response}" for a in load_answers(stage) if len(a.text) >= stage.min_characters]
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
        enough("ucl", len(distinct), stage.batch_size)
    return first, count, 2 if isinstance(stage, UclStage) else 1


def texts_at_once(stage: Stage, per_sample: int, mean: float) -> float:
    """Texts of mean length whose graphs stand in memory together."""
    if isinstance(stage, ContrastiveStage):
        size, limit = stage.mini_batch_size, stage.mini_batch_tokens
        batch = stage.batch_size if size or limit else stage.batch_size * per_sample
        batch = min(batch, size) if size and not limit else batch
    else:
        assert isinstance(stage, PretextStage)
        limit, batch = stage.max_tokens_per_batch, stage.batch_size
        batch = batch * stage.gradient_accumulation_steps if limit else batch
    return min(batch, max(1.0, limit / mean)) if limit else batch


def mean_tokens(tokenizer: Any, texts: Sequence[str], stage: Stage) -> float:
    """Mean length of a text after cutting, over some texts."""
    limit = stage.document_max_tokens if isinstance(stage, SclStage) else stage.max_tokens  # type: ignore[attr-defined]
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    share = 0.5 if isinstance(stage, SclStage) else 1.0
    return sum(min(len(row) * share, limit) for row in rows) / max(1, len(rows))


def embedding_weights(lm: Any) -> int:
    """Weights of input embeddings and head, counted once where they are tied."""
    modules = (lm.get_input_embeddings(), lm.get_output_embeddings())
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def trained_embeddings(stage: Stage, lm: Any, memory_tokens: int, projection: int | str | None = None) -> int:
    """Trained weights beside the adapter: the memory's rows, the whole table of embeddings, the projection."""
    rows, width = (int(n) for n in lm.get_input_embeddings().weight.shape)
    mapped = 0 if projection is None else (width + 1) * (width if projection == "same" else int(projection))
    if isinstance(stage, ContrastiveStage):
        memory, table = stage.train_memory, stage.train_embeddings
    else:
        memory, table = True, isinstance(stage, PretextStage) and stage.train_embeddings == "all"
    return (memory_tokens * width + mapped) * memory + rows * width * table


def activations(config: Any, stage: Stage, texts: float, tokens: float, full: bool) -> int:
    """Estimate of what the backward pass keeps: states per token and layer.

    Per token and layer about 20 D + 6 F numbers (projections, LoRA's inputs and dropout, norms; F = width of the MLP);
    checkpointing keeps D. In stage 1 the encoder sees half of a text; of the rest the decoder, without LoRA, keeps half.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    f = getattr(config, "intermediate_size", None) or 4 * d
    size = 4 if full and stage.precision == "float32" else 2
    per_layer = d if stage.gradient_checkpointing else 20 * d + 6 * f
    return int(texts * tokens * layers * per_layer * size * (0.75 if isinstance(stage, PretextStage) else 1.0))


def logits(config: Any, stage: Stage | None, positions: float, full: bool) -> int:
    """Estimate of one chunk of logits in float32, of teacher and student with their logarithms; only stage 1 has any."""
    at_once = min(CHUNK if full else CHUNK_ON_GPU, positions) if isinstance(stage, PretextStage) else 0
    return int(4 * at_once * config.vocab_size * 4)


def show_plan(recipe: Recipe) -> None:
    """Print the resolved recipe, a table of stages, and whether it will fit the device found."""
    quiet_libraries()
    say(recipe.to_yaml())
    plans, base = plan(recipe)
    table = Table("stage", "rows", "samples", "text tokens", "trainable parameters", "peak memory, about")
    for p in plans:
        table.add_row(p.name, f"{p.rows:,}", f"{p.samples:,}", f"{p.tokens:,}", f"{p.trainable:,}", f"{p.peak / GIB:.1f} GiB")
    say(table)
    device = resolve_device(recipe.model.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    worst = max(p.peak for p in plans) + (PROCESS if device.type == "cpu" else 0)
    verdict = (
        "will fit"
        if worst < 0.9 * free
        else "will probably NOT fit: lower batch_size, or set gradient_checkpointing, max_tokens_per_batch or mini_batch_tokens"
    )
    say(f"{device}: {free / GIB:.1f} GiB free, base model {base / GIB:.1f} GiB, needs about {worst / GIB:.1f} GiB: {verdict}")
