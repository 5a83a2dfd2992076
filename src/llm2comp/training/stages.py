"""One function per stage: rows, encoder, objective → trainer → artefacts in the stage's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from llm2comp.data.pretext import PretextCollator
from llm2comp.data.response_rows import ResponseRows
from llm2comp.data.store import distinct, stored_texts
from llm2comp.errors import RunError
from llm2comp.model.compressor import Compressor
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.judges import load_judges
from llm2comp.objectives.alignment import map_to_teacher
from llm2comp.recipe import PretextStage, SclStage, Stage, UclStage
from llm2comp.system.console import say
from llm2comp.training import progress
from llm2comp.training.batches import clipped, most_in_a_batch, pair_datasets
from llm2comp.training.compiling import compiled
from llm2comp.training.contrastive import contrastive_loss
from llm2comp.training.pretext_model import KeptPretext, PretextModel
from llm2comp.training.ranks import ranks, sharding
from llm2comp.training.rows import load_queries, pretext_samples
from llm2comp.training.sample import Watch
from llm2comp.training.trainers import ContrastiveTrainer, PretextTrainer, last_checkpoint, step_of
from llm2comp.training.views import CropCollator
from llm2comp.training.watch import WatchCallback, ended, keep_best


@dataclass(frozen=True)
class RunOptions:
    """What a run gives to each of its stages beside their own settings."""

    report_to: tuple[str, ...] = ()
    watch: Watch | None = None
    pretext: PretextStage | None = None  # for scl.pretext_weight


def run_pretext(
    compressor: Compressor, stage: PretextStage, folder: Path, seed: int, options: RunOptions
) -> int | None:
    """Stage 1: context compression."""
    compressor.learn(memory=True, embeddings=stage.train_embeddings == "all")
    settings = _arguments(compressor, stage, folder, seed, options.report_to)
    per_step = stage.batch_size * stage.gradient_accumulation_steps
    if stage.max_tokens_per_batch is None:
        settings["gradient_accumulation_steps"] = stage.gradient_accumulation_steps
    else:
        settings["per_device_train_batch_size"] = per_step  # the trainer cuts it by length
    arguments = TrainingArguments(**settings)
    dataset = pretext_samples(
        compressor, stage, stage.steps * per_step * arguments.world_size, seed
    )
    if compressor.memory.count and "memory" not in stage.needs:
        say(
            f"stage 1: {stage.objective_name} does not train the memory tokens; "
            "encoder.pooling: mean or last_token has none"
        )
    table_VD, to_teacher = compressor.backbone.input_table, None
    if "teacher" in stage.needs:
        assert isinstance(dataset, ResponseRows), (
            "the recipe asks for responses where it asks for alignment"
        )
        width = len(dataset.given[0].teacher_D)  # type: ignore[arg-type]
        to_teacher = map_to_teacher(
            table_VD.shape[1], width, seed, table_VD.device, compressor.projection
        )
    model, collate = (
        PretextModel(compressor, stage, to_teacher),
        PretextCollator(compressor.backbone.pad_id),
    )
    trainer = PretextTrainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=collate
    )
    kept = _train(trainer, compressor, "pretext", stage, folder, options)
    model.save_map(folder)
    return kept


def run_ucl(
    compressor: Compressor, stage: UclStage, folder: Path, seed: int, options: RunOptions
) -> int | None:
    """Stage 2: SimCSE; each text twice under different dropout, or also cropped."""
    rows = stored_texts(stage.data, stage.min_characters, say)
    different = distinct(rows, stage.batch_size * ranks())
    stage = clipped("ucl", stage, different, ranks())
    say(f"stage 2: {len(rows):,} texts of {stage.min_characters} characters or more")
    compressor.learn(memory=stage.train_memory, embeddings=stage.train_embeddings)
    model = as_sentence_transformer(compressor, stage.max_tokens)
    arguments = SentenceTransformerTrainingArguments(
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        **_arguments(compressor, stage, folder, seed, options.report_to),
    )
    crops = CropCollator(model.preprocess, seed=seed, share=stage.crop_share)
    trainer = ContrastiveTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=crops if stage.views == "crop" else None,
        loss=contrastive_loss(model, stage),
    )
    return _train(trainer, compressor, "ucl", stage, folder, options)


def run_scl(
    compressor: Compressor, stage: SclStage, folder: Path, seed: int, options: RunOptions
) -> int | None:
    """Stage 3: query against positive, hard negatives and the rest of the batch."""
    pairs = [pair for spec in stage.data for pair in load_queries(stage, spec)]
    stage = clipped("scl", stage, most_in_a_batch(pairs), ranks())
    rows = pair_datasets(pairs, stage.batch_size * ranks())
    say(
        f"stage 3: {len(pairs):,} pairs; "
        + ", ".join(f"{len(part):,} {name}" for name, part in rows.items())
    )
    compressor.learn(memory=stage.train_memory, embeddings=stage.train_embeddings)
    limits = {"query": stage.query_max_tokens, "document": stage.document_max_tokens}
    model = as_sentence_transformer(compressor, stage.document_max_tokens, limits)
    columns = {column for part in rows.values() for column in part.column_names}
    arguments = SentenceTransformerTrainingArguments(
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        router_mapping={
            column: "query" if column == "anchor" else "document" for column in columns
        },
        **_arguments(compressor, stage, folder, seed, options.report_to),
    )
    train_dataset = next(iter(rows.values())) if len(rows) == 1 else rows
    judges = load_judges(stage, compressor.backbone.input_table.device)
    loss = contrastive_loss(model, stage, judges)
    trainer = ContrastiveTrainer(
        model=model, args=arguments, train_dataset=train_dataset, loss=loss
    )
    trainer.judges = judges
    if stage.pretext_weight:
        trainer.kept = kept_pretext(compressor, stage, seed, options.pretext)
    return _train(trainer, compressor, "scl", stage, folder, options)


def kept_pretext(
    compressor: Compressor, stage: SclStage, seed: int, pretext: PretextStage | None
) -> KeptPretext:
    """Stage 1's loss, to be added to that of stage 3."""
    assert pretext is not None, "a recipe with scl.pretext_weight has a pretext section"
    size = stage.pretext_batch_size or pretext.batch_size
    pretext = pretext.model_copy(update={"batch_size": size})
    rows = pretext_samples(compressor, pretext, stage.steps * size, seed)
    model = PretextModel(compressor, pretext)
    return KeptPretext(
        model, rows, PretextCollator(compressor.backbone.pad_id), size, stage.pretext_weight
    )


RUNNERS = {"pretext": run_pretext, "ucl": run_ucl, "scl": run_scl}


def _arguments(
    compressor: Compressor, stage: Stage, folder: Path, seed: int, report_to: Sequence[str]
) -> dict[str, Any]:
    """What all stages ask of their trainer."""
    device = compressor.backbone.input_table.device
    return {
        "output_dir": str(folder),
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.batch_size,
        "learning_rate": stage.schedule.peak,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm or 0.0,
        "bf16": stage.precision == "bfloat16",
        "logging_steps": stage.log_every_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_steps": stage.save_every_steps or max(1, stage.steps // 10),
        "save_total_limit": 2,
        "dataloader_num_workers": stage.workers,
        "dataloader_pin_memory": device.type == "cuda",
        "use_cpu": device.type == "cpu",
        "report_to": list(report_to) or "none",
        "seed": seed,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }


def _train(
    trainer: Any, compressor: Compressor, name: str, stage: Stage, folder: Path, options: RunOptions
) -> int | None:
    """Train from the last complete checkpoint, or from the start.

    Returns the step that was kept, if the stage kept one.
    """
    counter = progress.TokenCounter()
    trainer.begin_stage(compressor, name, stage, counter)
    backbone = compressor.backbone
    backbone.set_attention_dropout(stage.attention_dropout)
    backbone.set_checkpointing(stage.gradient_checkpointing)
    callbacks: list[TrainerCallback] = [
        progress.ProgressCallback(name, counter),
        progress.MetricsCallback(folder, counter),
    ]
    if options.watch is not None:
        callbacks.append(WatchCallback(options.watch, compressor, name, stage, folder, counter))
    _keep_callbacks(trainer, callbacks)
    # sharded weights are in pieces that a second copy would have to follow
    folded = contextlib.nullcontext() if sharding() else backbone.adapters.folded()
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None and ended(stage, folder, step_of(checkpoint)):
        trainer._load_from_checkpoint(checkpoint)  # what stopped it came before `done.json`
    else:
        with folded, compiled(backbone, stage.compile):
            trainer.train(resume_from_checkpoint=checkpoint)
        if stage.patience is None and trainer.state.global_step < stage.steps:
            raise RunError(
                "the data gave out before the last step",
                where=name,
                expected=f"{stage.steps:,} steps",
                found=f"{trainer.state.global_step:,}",
                fix=f"give more rows that differ, or lower {name}.batch_size",
            )
    backbone.set_attention_dropout(0.0)
    backbone.set_checkpointing(False)
    compressor.eval()
    return keep_best(compressor, name, folder) if stage.keep_best else None


def _keep_callbacks(trainer: Any, own: Sequence[TrainerCallback]) -> None:
    for foreign in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(foreign)
    for callback in own:
        trainer.add_callback(callback)
