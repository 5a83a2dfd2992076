"""Rows of training beside plainer ways to do the same step: peft's own LoRA layers with stacked
adapters, and stock peers.

"peft's layers" is how this package trained before `backbone/lora.py`: each adapter an operation of
its own in float32, older adapters stacked instead of folded, one attention call per packed text.
"stock" is what a user of sentence-transformers and peft would write: their Transformer, mean
pooling, a LoRA adapter, their ranking loss; its `ours` pools in the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners import lora
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from benchmarks.contrastive import scl, ucl
from benchmarks.inputs import SEED, make_lm, make_tokenizer
from benchmarks.settings import Setting
from benchmarks.sides import Row, Side, Target, cosine_gap, relative_error
from benchmarks.training import LIMITS, UNUSED, _pretext_side, learner, loss_and_gradient
from benchmarks.work import contrastive_flops
from llm2comp.data.pretext import PretextCollator
from llm2comp.model.backbone import Backbone, layout
from llm2comp.model.backbone.families import DEFAULT_LORA_TARGETS
from llm2comp.model.compressor import Compressor
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.recipe import AdapterSettings, EncoderSettings, PretextStage
from llm2comp.training.contrastive import contrastive_loss
from llm2comp.training.pretext_model import PretextModel

BEFORE, STOCK = "peft's layers", "stock"
MAX_TOKENS = 512
TARGET_SETTING = "cpu-135m-bf16"
# Open for the life of the process: a context that nobody holds ends at once, and the adapters would
# be stacked again.
FOLDED = contextlib.ExitStack()


def compressor_of(
    setting: Setting,
    adapters: int,
    encoder: EncoderSettings | None = None,
    attention: str = "bidirectional",
    bos: str = "auto",
) -> Compressor:
    """An encoder with so many adapters, no dropout; all but the newest hold random values."""
    backbone = Backbone(
        make_lm(setting, "sdpa"), make_tokenizer(setting.shape), attention, setting.name, bos
    )
    generator = torch.Generator().manual_seed(SEED)
    for number in range(adapters):
        name = f"stage{number}"
        backbone.add_adapter(name, AdapterSettings(dropout=0.0), seed=number)
        for weight in backbone.adapters.parameters(name) if number + 1 < adapters else ():
            weight.data = 0.01 * torch.randn(weight.shape, generator=generator).to(weight)
    return Compressor.fresh(backbone, setting.memory_tokens, SEED, encoder)


def as_before(compressor: Compressor) -> None:
    """peft's own forward passes."""
    for module in compressor.modules():
        if isinstance(module, lora.Linear):
            module.__class__ = lora.Linear


@contextlib.contextmanager
def one_call_per_text() -> Iterator[None]:
    """Inside, packed texts are cut apart for attention, however short they are."""
    usual, layout.SHORT = layout.SHORT, 0
    try:
        yield
    finally:
        layout.SHORT = usual


def in_its_way(side: Side, before: bool) -> Side:
    """A side whose passes go text by text if `before`."""
    if not before:
        return side

    def inside(work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with one_call_per_text():
                return work()

        return run

    return replace(side, run=inside(side.run), check=side.check and inside(side.check))


def pretext_side(setting: Setting, before: bool) -> Side:
    """One CTKD step; one adapter, so nothing is folded."""
    compressor = compressor_of(setting, 1)
    if before:
        as_before(compressor)
    compressor.learn(memory=True)
    model = PretextModel(
        compressor,
        PretextStage.model_validate({"data": UNUSED, "schedule": {"learning_rate": 1e-4}}),
    )
    collate = PretextCollator(compressor.backbone.pad_id)

    def losses(samples: list[dict[str, Any]]) -> Iterator[Tensor]:
        batch = collate(samples)
        yield model(items=model.items(batch), **batch)

    return in_its_way(_pretext_side(setting, model, True, losses, setting.dtype), before)


def contrastive_side(setting: Setting, row: str, adapters: int, before: bool) -> Side:
    """One step of UCL (two adapters) or SCL (three); dropout is off, so that both ways compute the
    same.
    """
    stage, columns = ucl(setting) if row == "ucl" else scl(setting, setting.scl_triples, None)
    compressor = compressor_of(setting, adapters)
    compressor.learn(memory=False)
    if before:
        as_before(compressor)
    else:
        FOLDED.enter_context(compressor.backbone.adapters.folded())
    model: Any = as_sentence_transformer(compressor, MAX_TOKENS)
    return in_its_way(
        _ranking_side(setting, model, contrastive_loss(model, stage), columns, gradients=True),
        before,
    )


def _ranking_side(
    setting: Setting, model: Any, objective: Any, columns: Sequence[Sequence[str]], gradients: bool
) -> Side:
    """A step of a ranking loss; checked by loss and gradient, or by the embeddings of the first
    column alone.
    """
    step, few = learner(model, 3e-5, clip=1.0), [column[:4] for column in columns]
    lengths = [len(text.split()) + 1 for column in columns for text in column]
    model.train()

    def loss(part: Sequence[Sequence[str]]) -> Tensor:
        value: Tensor = objective([model.preprocess(list(column)) for column in part], None)
        return value

    def run() -> tuple[int, float]:
        step([loss(columns)])
        return sum(lengths), contrastive_flops(
            setting.shape, lengths, 0 if not gradients else setting.memory_tokens
        )

    def embeddings() -> list[Tensor]:
        model.eval()
        found: Tensor = model.encode(few[0], convert_to_tensor=True, show_progress_bar=False)
        model.train()
        return [found.float()]

    check = (lambda: loss_and_gradient(model, lambda: [loss(few)])) if gradients else embeddings
    return Side(run, check, getattr(torch, setting.dtype))


def mean_pooled(setting: Setting, _: Path) -> Side:
    """Ours with mean pooling and causal attention, as the stock side has them; no memory tokens,
    and no BOS on either side.
    """
    stage, columns = scl(setting, setting.scl_triples, None)
    compressor = compressor_of(setting, 1, EncoderSettings(pooling="mean"), "causal", bos="none")
    model: Any = as_sentence_transformer(compressor, MAX_TOKENS)
    return _ranking_side(setting, model, contrastive_loss(model, stage), columns, gradients=False)


def write_lm(setting: Setting, folder: Path) -> None:
    """The LM and its tokenizer as a folder for the stock side."""
    make_lm(setting, "sdpa").save_pretrained(folder / "lm")
    tokenizer = make_tokenizer(setting.shape)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    tokenizer.save_pretrained(folder / "lm")


def stock(setting: Setting, folder: Path) -> Side:
    """sentence-transformers and peft as their documentation shows them, in the setting's dtype."""
    stage, columns = scl(setting, setting.scl_triples, None)
    transformer = Transformer(
        str(folder / "lm"), model_kwargs={"dtype": setting.dtype, "attn_implementation": "sdpa"}
    )
    width = setting.shape.hidden
    model: Any = SentenceTransformer(
        modules=[transformer, Pooling(width, "mean")], device=setting.device
    )
    model.add_adapter(
        peft.LoraConfig(
            task_type="FEATURE_EXTRACTION",
            r=16,
            lora_alpha=32,
            target_modules=list(DEFAULT_LORA_TARGETS),
        )
    )
    objective = MultipleNegativesRankingLoss(model, scale=1 / stage.temperature)
    return _ranking_side(setting, model, objective, columns, gradients=False)


def _before_row(
    about: str, ratio: float, sides: Callable[[bool], Callable[[Setting, Path], Side]]
) -> Row:
    return Row(
        f"{about}, beside peft's own layers, stacked adapters and one attention call per text",
        {"ours": sides(False), BEFORE: sides(True)},
        BEFORE,
        targets=(
            Target(TARGET_SETTING, "ours", "ratio", ">=", ratio),
            Target(TARGET_SETTING, "ours", "memory", "<=", 0.6),
        ),
        differ=relative_error,
        limits=LIMITS,
        memory=("ours", BEFORE),
    )


def _contrastive(name: str, adapters: int) -> Callable[[bool], Callable[[Setting, Path], Side]]:
    return lambda before: lambda setting, _: contrastive_side(setting, name, adapters, before)


BEFORE_ROWS: dict[str, Row] = {
    "pretext_layers": _before_row(
        "stage 1 (CTKD)", 1.6, lambda before: lambda setting, _: pretext_side(setting, before)
    ),
    "ucl_layers": _before_row("stage 2 (UCL) over two adapters", 2.0, _contrastive("ucl", 2)),
    "scl_layers": _before_row("stage 3 (SCL) over three adapters", 2.0, _contrastive("scl", 3)),
    "scl_stock": Row(
        "mean pooling, one LoRA adapter, ranking loss: ours beside sentence-transformers with peft",
        {"ours": mean_pooled, STOCK: stock},
        STOCK,
        targets=(Target(TARGET_SETTING, "ours", "ratio", ">=", 1.5),),
        differ=cosine_gap,
        limits=(1e-3, 1e-2),
        memory=("ours", STOCK),
        prepare=write_lm,
    ),
}
