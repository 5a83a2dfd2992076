"""Rows of stage 1: a whole optimiser step (batch, loss, backward, clip, AdamW) on the trainer's own
loss.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inputs import SEED, adapter_parameters, draw_lengths, make_compressor, token_rows
from benchmarks.release_shaped import ReleaseShaped
from benchmarks.settings import Setting
from benchmarks.sides import Row, Side, Target, relative_error
from benchmarks.work import pretext_flops
from llm2comp.data.pretext import PretextCollator, PretextRows
from llm2comp.recipe import PretextStage
from llm2comp.training.compiling import compiled
from llm2comp.training.memory_limits import pieces_of
from llm2comp.training.pretext_model import PretextModel

UNUSED = [{"source": "unused"}]
MARGIN = 10
BATCHES = 16  # of stage 1, drawn once: a window of length grouping


def learner(
    model: nn.Module, learning_rate: float = 1e-4, clip: float = 2.0
) -> Callable[[Iterable[Tensor]], None]:
    """Loss, in parts that add up to it → one step of AdamW on whatever learns in the model."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=learning_rate)

    def step(losses: Iterable[Tensor]) -> None:
        for loss in losses:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, clip)
        optimiser.step()
        optimiser.zero_grad()

    return step


def loss_and_gradient(model: nn.Module, losses: Callable[[], Iterable[Tensor]]) -> list[Tensor]:
    """Value without dropout, and the gradient of all adapters (and the memory, where it learns) as
    one vector.
    """
    model.eval()
    value = torch.zeros(())
    for loss in losses():
        loss.backward()
        value = value + loss.detach().float().cpu()
    named = dict(model.named_parameters())
    weights = adapter_parameters(model) + [
        w for name, w in named.items() if name.endswith("vectors_KD")
    ]
    gradient = torch.cat([w.grad.flatten().float() for w in weights if w.grad is not None])
    model.zero_grad()
    model.train()
    return [value, gradient]


def pretext_units(setting: Setting, grouped: bool) -> Iterator[list[list[dict[str, Any]]]]:
    """The batches of one timed unit after the other; both sides get the same texts, split at the
    same sites.

    They come from the trainer's own rows. Grouped: batches of like length, as our trainer makes
    them. Else: the unit's texts in chance order.
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
    setting: Setting,
    model: nn.Module,
    grouped: bool,
    losses: Callable[[list[dict[str, Any]]], Iterator[Tensor]],
    dtype: str,
    half: torch.dtype | None = None,
) -> Side:
    """`losses`: a batch's loss, in parts that add up to it; each part's graph is gone before the
    next one is made.
    """
    units, step = pretext_units(setting, grouped), learner(model)
    checked = next(pretext_units(setting, grouped=False))[0]
    model.train()

    def run() -> tuple[int, float]:
        tokens, flops = 0, 0.0
        for samples in next(units):
            step(losses(samples))
            lengths, sites = [len(s["ids"]) for s in samples], [s["site"] for s in samples]
            tokens += sum(lengths)
            flops += pretext_flops(setting.shape, lengths, sites, setting.memory_tokens)
        return tokens, flops

    return Side(
        run,
        lambda: loss_and_gradient(model, lambda: losses(checked)),
        half or getattr(torch, dtype),
    )


@dataclass(frozen=True)
class Way:
    """How our stage 1 runs: all that it can save by default, and what of it a row leaves out or
    adds.
    """

    dtype: str | None = None  # of the frozen base; None = the setting's
    savings: frozenset[str] | None = None  # None = what the LM admits
    grouped: bool = True  # batches of like length
    autocast: bool = False  # bfloat16
    max_tokens: int | None = None  # per piece of a batch, as pretext.max_tokens_per_batch
    compile: bool = False


def our_pretext(setting: Setting, way: Way = Way()) -> Side:  # noqa: B008
    """PretextModel on batches as PretextTrainer draws and cuts them."""
    compressor = make_compressor(setting, way.dtype)
    if way.savings is not None:
        compressor.backbone.savings = way.savings
    compressor.learn(memory=True)
    compressor.backbone.set_checkpointing(setting.checkpointing)
    schedule = {"learning_rate": 1e-4}
    model = PretextModel(
        compressor, PretextStage.model_validate({"data": UNUSED, "schedule": schedule})
    )
    collate = PretextCollator(compressor.backbone.pad_id)
    # The model holds what compiles it: a context that nobody holds ends at once.
    model.held = contextlib.ExitStack()
    model.held.enter_context(compiled(model, way.compile))

    def losses(samples: list[dict[str, Any]]) -> Iterator[Tensor]:
        batch = {name: tensor.to(setting.device) for name, tensor in collate(samples).items()}
        items = model.items(batch)
        for piece in pieces_of(batch, way.max_tokens):
            with torch.autocast(setting.device, torch.bfloat16, enabled=way.autocast):
                yield model(items=items, **piece)

    half = torch.bfloat16 if way.autocast else None
    return _pretext_side(setting, model, way.grouped, losses, way.dtype or setting.dtype, half)


def release_pretext(setting: Setting) -> Side:
    """Unsorted batches, two copies, full logits."""
    model = ReleaseShaped(setting, decoder=True)

    def losses(samples: list[dict[str, Any]]) -> Iterator[Tensor]:
        yield model.pretext_loss([s["ids"] for s in samples], [s["site"] for s in samples])

    return _pretext_side(setting, model, False, losses, setting.dtype)


# Of loss and gradient vector. In half precision every product is rounded: in a random model of 12
# layers two ways to compute the same gradient are each 0.25 from float32, and 0.09 from each other;
# deeper ones further (docs/log.md, 2026-11-27).
LIMITS = (1e-3, 0.3)


def _gemm_rows(setting: Setting) -> int:
    return setting.pretext_texts * sum(setting.pretext_lengths) // 2


def _in_this_way(way: Way) -> Callable[[Setting, Path], Side]:
    return lambda setting, _: our_pretext(setting, way)


TRAINING_ROWS: dict[str, Row] = {
    "pretext": Row(
        "stage 1 (CTKD), one optimiser step",
        {
            "ours": lambda setting, _: our_pretext(setting),
            "ours bf16 weights": lambda setting, _: our_pretext(setting, Way(dtype="bfloat16")),
            "ours, text by text": lambda setting, _: our_pretext(setting, Way(max_tokens=1)),
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
        memory=("ours", "ours bf16 weights", "ours, text by text", "release_shaped"),
        gemm_rows=_gemm_rows,
    ),
    "pretext_parts": Row(
        "stage 1 (CTKD), what each saving brings: added one after the other, the last "
        "two each to all before",
        {
            name: _in_this_way(way)
            for name, way in {
                "padded, in full": Way(savings=frozenset(), grouped=False),
                "+ batches of like length": Way(savings=frozenset()),
                "+ last layer for needed states": Way(savings=frozenset({"last layer"})),
                "+ packing (= ours)": Way(),
                "ours, autocast bf16": Way(autocast=True),
                "ours, compile": Way(compile=True),
            }.items()
        },
        "padded, in full",
        differ=relative_error,
        limits=LIMITS,
        memory=("padded, in full", "+ packing (= ours)"),
        gemm_rows=_gemm_rows,
    ),
}
