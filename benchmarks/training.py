"""Rows of the three stages: a whole optimiser step (batch, loss, backward, clip, AdamW) on the trainers' own losses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inputs import SEED, adapter_parameters, draw_lengths, make_compressor, make_texts, token_rows
from benchmarks.release_shaped import ReleaseShaped
from benchmarks.settings import Setting
from benchmarks.sides import Row, Side, Target, relative_error
from benchmarks.work import contrastive_flops, pretext_flops
from llm2comp.data.pretext import PretextCollator, PretextRows
from llm2comp.encoder import as_sentence_transformer
from llm2comp.recipe import PretextStage, SclStage, UclStage
from llm2comp.recipe.stages import ContrastiveStage
from llm2comp.training.contrastive import contrastive_loss
from llm2comp.training.trainers import PretextModel

UNUSED = [{"source": "unused"}]
MARGIN = 10
BATCHES = 16  # of stage 1, drawn once: a window of length grouping
CHECKED = 4  # texts of a contrastive check


def learner(model: nn.Module, learning_rate: float = 1e-4, clip: float = 2.0) -> Callable[[Tensor], None]:
    """Loss → one step of AdamW on whatever learns in the model."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=learning_rate)

    def step(loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, clip)
        optimiser.step()
        optimiser.zero_grad()

    return step


def loss_and_gradient(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    """Value without dropout, and the gradient of all adapters (and the memory, where it learns) as one vector."""
    model.eval()
    value = loss()
    value.backward()
    named = dict(model.named_parameters())
    weights = adapter_parameters(model) + [w for name, w in named.items() if name.endswith("vectors_KD")]
    gradient = torch.cat([w.grad.flatten().float() for w in weights if w.grad is not None])
    model.zero_grad()
    model.train()
    return [value, gradient]


def pretext_units(setting: Setting, grouped: bool) -> Iterator[list[list[dict[str, Any]]]]:
    """The batches of one timed unit after the other; both sides get the same texts, split at the same sites.

    They come from the trainer's own rows. Grouped: batches of like length, as our trainer makes them. Else: the unit's texts in
    chance order.
    """
    size, steps = setting.pretext_texts, setting.pretext_steps
    lengths = draw_lengths(BATCHES * size, setting.pretext_lengths, seed=1)
    samples = PretextRows(token_rows(lengths, setting.shape, seed=1), 10**6, MARGIN, SEED, size)
    for number in itertools.count():
        unit = [samples[i] for i in range(number * steps * size, (number + 1) * steps * size)]
        if not grouped:
            random.Random(number).shuffle(unit)
        yield [unit[start : start + size] for start in range(0, len(unit), size)]


def _pretext_side(
    setting: Setting, model: nn.Module, grouped: bool, loss: Callable[[list[dict[str, Any]]], Tensor], dtype: str
) -> Side:
    units, step = pretext_units(setting, grouped), learner(model)
    checked = next(pretext_units(setting, grouped=False))[0]
    model.train()

    def run() -> tuple[int, float]:
        tokens, flops = 0, 0.0
        for samples in next(units):
            step(loss(samples))
            lengths, sites = [len(s["ids"]) for s in samples], [s["site"] for s in samples]
            tokens += sum(lengths)
            flops += pretext_flops(setting.shape, lengths, sites, setting.memory_tokens)
        return tokens, flops

    return Side(run, lambda: loss_and_gradient(model, lambda: loss(checked)), getattr(torch, dtype))


def our_pretext(setting: Setting, dtype: str | None = None) -> Side:
    """PretextModel on length-grouped batches, as PretextTrainer runs it."""
    compressor = make_compressor(setting, dtype)
    compressor.learn(memory=True)
    compressor.backbone.set_checkpointing(setting.checkpointing)
    schedule = {"learning_rate": 1e-4}
    model = PretextModel(compressor, PretextStage.model_validate({"data": UNUSED, "schedule": schedule}))
    collate = PretextCollator(compressor.backbone.pad_id)

    def loss(samples: list[dict[str, Any]]) -> Tensor:
        batch = {name: tensor.to(setting.device) for name, tensor in collate(samples).items()}
        value: Tensor = model(items=model.items(batch), **batch)
        return value

    return _pretext_side(setting, model, True, loss, dtype or setting.dtype)


def release_pretext(setting: Setting) -> Side:
    """Unsorted batches, two copies, full logits."""
    model = ReleaseShaped(setting, decoder=True)

    def loss(samples: list[dict[str, Any]]) -> Tensor:
        return model.pretext_loss([s["ids"] for s in samples], [s["site"] for s in samples])

    return _pretext_side(setting, model, False, loss, setting.dtype)


def our_contrastive(setting: Setting, stage: ContrastiveStage, columns: Sequence[Sequence[str]]) -> Side:
    """The stage's stock loss over the memory encoder, as ContrastiveTrainer runs it; columns after the first are documents."""
    compressor = make_compressor(setting)
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


def release_contrastive(setting: Setting, stage: ContrastiveStage, columns: Sequence[Sequence[str]]) -> Side:
    """Two texts at a time, recomputed."""
    model = ReleaseShaped(setting, decoder=False, attention_dropout=stage.attention_dropout)
    return _contrastive_side(setting, model, model.contrastive_loss, columns)


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
        step(loss(columns))
        return sum(lengths), contrastive_flops(setting.shape, lengths, setting.memory_tokens)

    return Side(run, lambda: loss_and_gradient(model, lambda: loss(few)), getattr(torch, setting.dtype))


def ucl(setting: Setting) -> tuple[UclStage, list[list[str]]]:
    """The stage with the release's settings, and the batch twice."""
    texts = make_texts(draw_lengths(setting.ucl_texts, setting.ucl_lengths, 2), setting.shape, 2)
    return UclStage.model_validate({"data": UNUSED, "batch_size": setting.ucl_texts}), [texts, texts]


def scl(setting: Setting, triples: int, mini_batch: int | None) -> tuple[SclStage, list[list[str]]]:
    """The stage with the release's settings, and queries, positives and hard negatives."""
    bounds = (setting.scl_query, setting.scl_passage, setting.scl_passage)
    columns = [make_texts(draw_lengths(triples, b, 3 + i), setting.shape, 3 + i) for i, b in enumerate(bounds)]
    settings = {"data": UNUSED, "batch_size": triples, "mini_batch_size": mini_batch, "schedule": {"learning_rate": 1e-4}}
    return SclStage.model_validate(settings), columns


def large_scl(setting: Setting, place: int) -> Side:
    """One of the two batch sizes whose peak memory is compared, under GradCache; no checks."""
    stage, columns = scl(setting, setting.memory_batches[place], setting.memory_mini_batch)
    return replace(our_contrastive(setting, stage, columns), check=None)


BOTH = ("ours", "release_shaped")
LIMITS = (1e-3, 0.15)  # of loss and gradient vector; half precision rounds every product


def _gemm_rows(setting: Setting) -> int:
    return setting.pretext_texts * sum(setting.pretext_lengths) // 2


def _contrastive_gemm_rows(setting: Setting) -> int:
    return min(4096, setting.ucl_texts * (sum(setting.ucl_lengths) // 2 + setting.memory_tokens))


TRAINING_ROWS: dict[str, Row] = {
    "pretext": Row(
        "stage 1 (CTKD), one optimiser step",
        {
            "ours": lambda setting, _: our_pretext(setting),
            "ours bf16 weights": lambda setting, _: our_pretext(setting, "bfloat16"),
            "release_shaped": lambda setting, _: release_pretext(setting),
        },
        "release_shaped",
        targets=(
            Target("cpu", "ours", "ratio", ">=", 1.8),
            Target("cpu", "ours", "memory", "<=", 0.45),
            Target("cpu", "ours bf16 weights", "ratio", ">=", 3.0),
            Target("cuda-7b", "ours", "ratio", ">=", 1.8),
            Target("cuda-7b", "ours", "mfu", ">=", 0.5),
            Target("cuda-7b", "ours", "peak_gib", "<=", 22.0),
        ),
        differ=relative_error,
        limits=LIMITS,
        memory=("ours", "ours bf16 weights", "release_shaped"),
        gemm_rows=_gemm_rows,
    ),
    "ucl": Row(
        "stage 2 (UCL), one optimiser step of two views per sentence",
        {
            "ours": lambda setting, _: our_contrastive(setting, *ucl(setting)),
            "release_shaped": lambda setting, _: release_contrastive(setting, *ucl(setting)),
        },
        "release_shaped",
        targets=(Target("cpu", "ours", "ratio", ">=", 6.0), Target("cuda-7b", "ours", "ratio", ">=", 6.0)),
        differ=relative_error,
        limits=LIMITS,
        memory=BOTH,
        gemm_rows=_contrastive_gemm_rows,
    ),
    "scl": Row(
        "stage 3 (SCL), one optimiser step of queries, positives and hard negatives",
        {
            "ours": lambda setting, _: our_contrastive(setting, *scl(setting, setting.scl_triples, setting.scl_mini_batch)),
            "release_shaped": lambda setting, _: release_contrastive(setting, *scl(setting, setting.scl_triples, None)),
        },
        "release_shaped",
        targets=(Target("cuda-7b", "ours", "ratio", ">=", 4.0),),
        differ=relative_error,
        limits=LIMITS,
        memory=BOTH,
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
