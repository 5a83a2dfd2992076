"""Rows of stages 2 and 3: a whole optimiser step (tokenising, loss, backward, clip, AdamW) on the
trainers' own losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inputs import draw_lengths, make_compressor, make_texts
from benchmarks.release_shaped import ReleaseShaped
from benchmarks.settings import Setting
from benchmarks.sides import Row, Side, Target, relative_error
from benchmarks.training import LIMITS, UNUSED, learner, loss_and_gradient
from benchmarks.work import contrastive_flops
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.recipe import SclStage, UclStage
from llm2comp.recipe.contrastive_stages import ContrastiveStage
from llm2comp.training.contrastive import contrastive_loss

# the release's side does a quarter of the batch per timed unit; else this row alone would take 10
# minutes
UCL_SHARE = 4
CHECKED = 4  # texts of a check


def our_contrastive(
    setting: Setting,
    stage: ContrastiveStage,
    columns: Sequence[Sequence[str]],
    savings: frozenset[str] | None = None,
) -> Side:
    """The stage's stock loss over the memory encoder, as ContrastiveTrainer runs it; columns after
    the first are documents.
    """
    compressor = make_compressor(setting)
    if savings is not None:
        compressor.backbone.savings = savings
    compressor.learn(memory=stage.train_memory)
    compressor.backbone.set_attention_dropout(stage.attention_dropout)
    model: Any = as_sentence_transformer(compressor, 512)
    objective = contrastive_loss(model, stage)

    def loss(part: Sequence[Sequence[str]]) -> Tensor:
        features = [model.preprocess(list(column)) for column in part]
        moved = [{name: tensor.to(setting.device) for name, tensor in f.items()} for f in features]
        value: Tensor = objective(moved, None)
        return value

    return _contrastive_side(setting, model, loss, columns)


def release_contrastive(
    setting: Setting, stage: ContrastiveStage, columns: Sequence[Sequence[str]], share: int = 1
) -> Side:
    """Two texts at a time, recomputed.

    `share`: time the first 1 / share of the rows, as two cost the same in any batch.
    """
    model = ReleaseShaped(setting, decoder=False, attention_dropout=stage.attention_dropout)
    return _contrastive_side(
        setting,
        model,
        model.contrastive_loss,
        [column[: len(column) // share] for column in columns],
    )


def _contrastive_side(
    setting: Setting,
    model: nn.Module,
    loss: Callable[[Sequence[Sequence[str]]], Tensor],
    columns: Sequence[Sequence[str]],
) -> Side:
    step = learner(model, 3e-5, clip=1.0)
    lengths = [len(text.split()) + 1 for column in columns for text in column]
    few = [column[:CHECKED] for column in columns]
    model.train()

    def run() -> tuple[int, float]:
        step([loss(columns)])
        return sum(lengths), contrastive_flops(setting.shape, lengths, setting.memory_tokens)

    return Side(
        run, lambda: loss_and_gradient(model, lambda: [loss(few)]), getattr(torch, setting.dtype)
    )


def ucl(setting: Setting) -> tuple[UclStage, list[list[str]]]:
    """The stage with the release's settings, and the batch twice; the longest text comes first: any
    part is as wide.
    """
    lengths = draw_lengths(setting.ucl_texts, setting.ucl_lengths, 2)
    lengths.insert(0, lengths.pop(lengths.index(max(lengths))))
    texts = make_texts(lengths, setting.shape, 2)
    return UclStage.model_validate({"data": UNUSED, "batch_size": setting.ucl_texts}), [
        texts,
        texts,
    ]


def scl(setting: Setting, triples: int, mini_batch: int | None) -> tuple[SclStage, list[list[str]]]:
    """The stage with the release's settings, and queries, positives and hard negatives."""
    bounds = (setting.scl_query, setting.scl_passage, setting.scl_passage)
    columns = [
        make_texts(draw_lengths(triples, b, 3 + i), setting.shape, 3 + i)
        for i, b in enumerate(bounds)
    ]
    settings = {
        "data": UNUSED,
        "batch_size": triples,
        "mini_batch_size": mini_batch,
        "schedule": {"learning_rate": 1e-4},
    }
    return SclStage.model_validate(settings), columns


def large_scl(setting: Setting, place: int) -> Side:
    """One of the two batch sizes whose peak memory is compared, under GradCache; no checks."""
    stage, columns = scl(setting, setting.memory_batches[place], setting.memory_mini_batch)
    return replace(our_contrastive(setting, stage, columns), check=None)


BOTH = ("ours", "release_shaped")


def _contrastive_gemm_rows(setting: Setting) -> int:
    return min(4096, setting.ucl_texts * (sum(setting.ucl_lengths) // 2 + setting.memory_tokens))


CONTRASTIVE_ROWS: dict[str, Row] = {
    "ucl": Row(
        "stage 2 (UCL), one optimiser step of two views per sentence",
        {
            "ours": lambda setting, _: our_contrastive(setting, *ucl(setting)),
            "release_shaped": lambda setting, _: release_contrastive(
                setting, *ucl(setting), UCL_SHARE
            ),
        },
        "release_shaped",
        targets=(
            Target("cpu", "ours", "ratio", ">=", 6.0),
            Target("cuda-7b", "ours", "ratio", ">=", 6.0),
        ),
        differ=relative_error,
        limits=LIMITS,
        memory=BOTH,
        gemm_rows=_contrastive_gemm_rows,
    ),
    "scl": Row(
        "stage 3 (SCL), one optimiser step of queries, positives and hard negatives",
        {
            "ours": lambda setting, _: our_contrastive(
                setting, *scl(setting, setting.scl_triples, setting.scl_mini_batch)
            ),
            "ours, GradCache": lambda setting, _: our_contrastive(
                setting, *scl(setting, setting.scl_triples, setting.memory_mini_batch)
            ),
            "release_shaped": lambda setting, _: release_contrastive(
                setting, *scl(setting, setting.scl_triples, None)
            ),
        },
        "release_shaped",
        targets=(Target("cuda-7b", "ours", "ratio", ">=", 4.0),),
        differ=relative_error,
        limits=LIMITS,
        memory=("ours", "ours, GradCache", "release_shaped"),
        gemm_rows=_contrastive_gemm_rows,
    ),
    "scl_memory": Row(
        "stage 3 under GradCache: peak memory of a batch against that of one 16 times smaller",
        {
            "small batch": lambda setting, _: large_scl(setting, 0),
            "16 x batch": lambda setting, _: large_scl(setting, 1),
        },
        "small batch",
        targets=(
            Target("cpu", "16 x batch", "memory", "<=", 1.3),
            Target("cuda-7b", "16 x batch", "memory", "<=", 1.3),
        ),
        memory=("16 x batch", "small batch"),
        timed=False,
    ),
}
