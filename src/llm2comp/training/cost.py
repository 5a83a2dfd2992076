"""What training would cost on a named GPU: hours and price, by arithmetic alone.

A product with W weights costs 2 W FLOPs per token forward, as many back through frozen weights and
twice as many through trained ones. docs/scaling.md tells what is left out and what was checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from llm2comp.errors import RecipeError
from llm2comp.recipe import PretextStage, Stage, nearest
from llm2comp.recipe.objectives import OBJECTIVES
from llm2comp.training.estimates import embedding_weights

REACHED = 0.4  # share of the peak that training reaches: a guess
LAUNCH = 0.5e-3  # seconds in which the host starts the work of one layer in one pass: a guess


@dataclass(frozen=True)
class Gpu:
    """A card: GB (10⁹ bytes), peak TFLOP/s of dense bfloat16 products, price per hour."""

    name: str
    memory: float
    tflops: float
    price: float


# Memory and peak are the makers' figures. Prices are round numbers of ours, no quotes: say --price.
_CARDS = {"rtx4090": (24, 165, 0.5), "l40s": (48, 362, 1), "a100": (80, 312, 1.5)}
_CARDS |= {"h100": (80, 989, 3), "h200": (141, 989, 4)}
GPUS = {name: Gpu(name, *numbers) for name, numbers in _CARDS.items()}


def gpu_named(name: str, price: float | None = None) -> Gpu:
    """A card of the table, at another price if one is given. Raises RecipeError: no such card."""
    if name not in GPUS:
        known, near = ", ".join(GPUS), nearest(name, GPUS)
        raise RecipeError("no such GPU", where="--gpu", expected=known, found=name, fix=near)
    return GPUS[name] if price is None else replace(GPUS[name], price=price)


@dataclass(frozen=True)
class Size:
    """What a model's FLOPs depend on, over all its layers."""

    layers: int
    weights: float  # that one token meets: of a mixture's experts only the chosen
    down: float  # of these, the last product of each MLP
    attention: float  # FLOPs of one token that looks at one other
    head: int  # weights of the LM head
    adapter: int = 0  # LoRA weights that the stage trains
    whole: bool = False  # all weights of the encoder learn

    @classmethod
    def of(cls, lm: Any) -> Size:
        """Read from an LM without adapters; its weights may be on the meta device."""
        config, layers = lm.config, lm.config.num_hidden_layers
        width, heads = config.hidden_size, config.num_attention_heads
        inner = getattr(config, "intermediate_size", None) or 4 * width
        chosen = getattr(config, "num_experts_per_tok", None)
        met = [
            p.numel() * (chosen / len(p) if chosen and p.ndim == 3 else 1.0)
            for p in lm.parameters()
            if p.ndim >= 2
        ]
        wide = heads * (getattr(config, "head_dim", None) or width // heads)
        head = lm.get_output_embeddings().weight.numel()
        weights = sum(met) - embedding_weights(lm)
        return cls(layers, weights, layers * width * inner, 4.0 * layers * wide, head)

    def forward(self, tokens: int, adapted: bool = False) -> float:
        """A text once through all layers."""
        weights = self.weights + adapted * self.adapter
        return 2.0 * tokens * weights + self.attention * tokens**2

    def encoder(self, tokens: int) -> float:
        """Forward, and back to what learns."""
        products = 2.0 * tokens * self.weights * (3 if self.whole else 2)
        return products + 3 * (2.0 * tokens * self.adapter + self.attention * tokens**2)

    def decoder(self, tokens: int) -> float:
        """Forward, and back to the memory states, through frozen weights."""
        return 4.0 * tokens * self.weights + 3 * self.attention * tokens**2


class Passes(NamedTuple):
    """What one sample sends through the model: tokens of each pass, positions of the LM head."""

    encoder: list[int]  # there and back to what learns
    teacher: list[int]  # there alone
    decoder: list[int]  # there and back to the memory
    head: float  # each position as often as it is read, there and back


def pretext_passes(stage: PretextStage, text: int, site: int, memory: int) -> Passes:
    """Stage 1, a text of so many tokens split at `site`; objectives share the encoder pass."""
    after, before, names = text - site, site - 1, set(stage.objectives)  # before: BOS is given
    encoder = [site + memory] * ("memory" in stage.needs)
    encoder += [text] * ("mntp" in names) + [site, site] * ("ebae_ebar" in names)
    decoded = [name for name in names if "decoder" in OBJECTIVES[name].needs]
    decoder = [1 + memory + (before if name == "reconstruction" else after) for name in decoded]
    head = {"ctkd": 3.0 * (after + 1), "reconstruction": 2 * before, "ebae_ebar": 4}
    head |= dict.fromkeys(("continuation", "response"), 2.0 * after)
    head |= {"mntp": 2 * stage.mask_rate * text, "alignment": 0}
    teacher = [text] * ("ctkd" in names)
    return Passes(encoder, teacher, decoder, sum(head[name] for name in names))


def sample_passes(stage: Stage, length: float, columns: int, memory: int) -> list[Passes]:
    """The ways in which one sample may be computed, all equally likely: one for each site."""
    if not isinstance(stage, PretextStage):
        return [Passes([round(length) + memory] * columns, [], [], 0)]
    text = max(2, round(length))
    margin = min(stage.site_margin_tokens, text // 2)
    sites = range(margin, text - margin + 1)
    return [pretext_passes(stage, text, site, memory) for site in sites]


def cached(stage: Stage) -> bool:
    """Whether GradCache encodes each text once more, without a gradient."""
    return any(getattr(stage, f"mini_batch_{kind}", None) for kind in ("size", "tokens"))


def sample_flops(stage: Stage, size: Size, length: float, columns: int, memory: int) -> float:
    """FLOPs of a sample of `columns` texts, with what GradCache and checkpointing do again."""
    total, ways = 0.0, sample_passes(stage, length, columns, memory)
    for way in ways:
        total += sum(map(size.encoder, way.encoder)) + sum(map(size.decoder, way.decoder))
        total += sum(map(size.forward, way.teacher)) + 2.0 * size.head * way.head
        again = sum(size.forward(tokens, adapted=True) for tokens in way.encoder)
        total += cached(stage) * again
        if stage.gradient_checkpointing:
            # A decoder layer need not compute its last product again: nothing learns there.
            total += again + sum(size.forward(n) - 2.0 * size.down * n for n in way.decoder)
    return total / len(ways)


def layer_passes(stage: Stage, layers: int, columns: int, at_once: float) -> int:
    """How often a stage has some layer compute, forward or back; `at_once` texts are one pass."""
    batch = stage.batch_size * getattr(stage, "gradient_accumulation_steps", 1)
    batches = max(columns, math.ceil(batch * columns / at_once))
    way = sample_passes(stage, 32, 1, 0)[0]
    walks = 2 * len(way.encoder) + 2 * len(way.decoder) + len(way.teacher) + cached(stage)
    return stage.steps * batches * walks * layers


def hours(flops: float, launches: int, gpu: Gpu) -> float:
    """A stage takes what its products take, or what the host takes to start them."""
    return max(flops / (gpu.tflops * 1e12 * REACHED), launches * LAUNCH) / 3600
