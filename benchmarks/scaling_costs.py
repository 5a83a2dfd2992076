"""What stages and encoding cost on GPUs, by arithmetic alone; docs/scaling.md derives the formulas.

Sizes in bytes, times in seconds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace

from benchmarks.scaling_inputs import Assumed, Gpu, Model
from benchmarks.settings import Shape
from benchmarks.work import body_flops, contrastive_flops, encode_flops, pretext_flops
from llm2comp.recipe import ContrastiveStage, PretextStage, Recipe, SclStage, Stage, UclStage
from llm2comp.training.plan import activations, logits

GB = 1e9


@dataclass(frozen=True)
class Load:
    """One stage's work, or encoding's (`stage` None).

    Args:
        columns: mean tokens of a sample's views or columns.
        longest: tokens of the longest text.
        batch: samples per step of all GPUs together, as in the paper.
        older: adapters of stages before.
    """

    stage: Stage | None
    columns: tuple[int, ...]
    longest: int
    samples: int
    batch: int
    older: int = 0


def loads(recipe: Recipe, assumed: Assumed) -> dict[str, Load]:
    """The three stages with the paper's samples and batches (METHOD 2: 4, 128, 1,024), then encoding."""
    found = {}
    for older, (name, stage) in enumerate(recipe.stages.items()):
        columns: tuple[int, ...]
        if isinstance(stage, UclStage):
            columns, longest = (assumed.sentence_tokens,) * 2, assumed.sentence_longest
        elif isinstance(stage, SclStage):
            columns, longest = (assumed.query_tokens, *(assumed.document_tokens,) * 2), assumed.document_longest
        else:
            columns, longest = (assumed.pretext_tokens,), assumed.pretext_longest
        batch = stage.batch_size * (8 if isinstance(stage, SclStage) else 1)  # the recipe's is per GPU, on 8
        found[name] = Load(stage, columns, max(longest, *columns), stage.steps * batch, batch, older)
    found["encode"] = Load(None, (assumed.text_tokens,), assumed.text_tokens, assumed.texts, assumed.encode_batch)
    return found


@dataclass(frozen=True)
class Way:
    """How a stage is run: form of the frozen weights, sharding (DDP, FSDP2, ZeRO-3), GPUs, texts whose graphs stand at once."""

    form: str
    sharding: str
    gpus: int
    checkpointing: bool
    at_once: int

    def share(self, load: Load) -> int:
        """Samples of a step on one GPU: its part of the paper's batch, one at least."""
        return load.batch if load.stage is None else math.ceil(load.batch / self.gpus)


def cached(load: Load) -> bool:
    """Whether GradCache encodes each text once without a gradient first."""
    return isinstance(load.stage, ContrastiveStage) and bool(load.stage.mini_batch_size or load.stage.mini_batch_tokens)


def sample_flops(shape: Shape, load: Load, way: Way, memory: int) -> tuple[float, float]:
    """Of one sample: model FLOPs, and those that are done, with what GradCache and checkpointing compute again.

    Recomputing a layer stops at the last state that the backward pass wants: in the decoder, where nothing learns, before the
    down projection. In the encoder nothing is left out: a layer with LoRA is one operation.
    """
    decoder: list[int] = []
    if isinstance(load.stage, PretextStage):
        (length,), margin = load.columns, load.stage.site_margin_tokens
        sites = range(margin, length - margin + 1)  # all equally likely
        encoder, decoder = [site + memory for site in sites], [1 + memory + length - site for site in sites]
        model, samples = pretext_flops(shape, [length] * len(sites), list(sites), memory), len(sites)
    elif load.stage is None:
        flops = encode_flops(shape, load.columns, memory)
        return flops, flops
    else:
        encoder, samples = [length + memory for length in load.columns], 1
        model = contrastive_flops(shape, load.columns, memory)
    forward = body_flops(shape, encoder, lora=True)
    skipped = 2.0 * shape.layers * shape.hidden * shape.intermediate * sum(decoder)
    again = cached(load) * forward + way.checkpointing * (forward + body_flops(shape, decoder) - skipped)
    return model / samples, (model + again) / samples


def activation_bytes(shape: Shape, load: Load, way: Way, assumed: Assumed, tokens: float) -> float:
    """`training.plan`'s estimate, and under checkpointing the one layer that is recomputed.

    Encoding holds one layer's states alone, without LoRA and with nothing to go back to: 6 D + 3 F a position.
    """
    full = way.form == "float32"
    if load.stage is None:
        return way.at_once * tokens * (6 * shape.hidden + 3 * shape.intermediate) * (4 if full else 2)
    stage, factor = load.stage, assumed.contrastive if isinstance(load.stage, ContrastiveStage) else 1.0

    def of(layers: int, checkpointing: bool) -> float:
        config = SimpleNamespace(hidden_size=shape.hidden, num_hidden_layers=layers, intermediate_size=shape.intermediate)
        changes = {"gradient_checkpointing": checkpointing, "precision": "float32" if full else "bfloat16"}
        return activations(config, stage.model_copy(update=changes), way.at_once, tokens, full)

    kept = of(shape.layers, way.checkpointing) + (of(1, False) if way.checkpointing else 0.0)
    return factor * kept + logit_bytes(shape, load, way, way.at_once * tokens)


def logit_bytes(shape: Shape, load: Load, way: Way, positions: float = math.inf) -> float:
    """One chunk of logits; none but in stage 1."""
    return logits(SimpleNamespace(vocab_size=shape.vocabulary), load.stage, positions, way.form == "float32")


def memory_bytes(model: Model, load: Load, way: Way, assumed: Assumed, tokens: float | None = None) -> float:
    """Peak on one GPU with texts of `tokens` each (None: the longest, which GradCache's sorted batches put together)."""
    base, layers, parts = model.base[way.form], model.layers, 1
    if way.sharding != "DDP":
        parts = way.gpus
        whole = model.root + 2 * layers / model.shape.layers  # FSDP2: this layer and the next
        held = layers / parts + whole
        if way.sharding == "ZeRO-3":
            held = base / parts + min(2 * assumed.live_weights, base)
        base = int(min(held, model.base[way.form]))
    learning = 0.0
    if load.stage is not None:
        rows = assumed.memory_tokens * model.shape.hidden if isinstance(load.stage, PretextStage) else 0
        learning = (16 * (model.adapter + rows) + 4 * load.older * model.adapter) / parts
    length = (load.longest if tokens is None else tokens) + assumed.memory_tokens
    return base + learning + activation_bytes(model.shape, load, way, assumed, length)


def encodings(load: Load, way: Way) -> int:
    """Batches that one GPU sends through the encoder per step, one after the other."""
    if isinstance(load.stage, PretextStage) or load.stage is None:
        return math.ceil(way.share(load) / way.at_once)
    return len(load.columns) * math.ceil(way.share(load) / way.at_once)


def passes(load: Load, way: Way) -> tuple[int, int]:
    """Of a step, through all layers: forward and backward, and recomputations, for which backward has the weights there."""
    count = encodings(load, way)
    if isinstance(load.stage, PretextStage):
        return 5 * count, 2 * count * way.checkpointing
    return count * (1 if load.stage is None else 2 + cached(load)), count * way.checkpointing


def traffic_bytes(model: Model, load: Load, way: Way) -> float:
    """What one GPU sends per step, by rings: n·(R − 1)/R for a gather or a reduce-scatter of n bytes."""
    if load.stage is None or way.gpus == 1:
        return 0.0
    ring = (way.gpus - 1) / way.gpus
    sent, gradients = 0.0, 4.0 * model.adapter
    if isinstance(load.stage, ContrastiveStage):  # gather of all columns, reduce-scatter of their gradients
        sent += 2 * len(load.columns) * way.share(load) * way.gpus * model.shape.hidden * 4
    if way.sharding == "DDP":
        return ring * (sent + 2 * gradients)
    adapters, gathers = (1 + load.older) * gradients, passes(load, way)[0]
    return ring * (sent + gathers * (model.layers + adapters) + model.root + encodings(load, way) * gradients)


def limits(model: Model, load: Load, way: Way, gpu: Gpu, assumed: Assumed) -> dict[str, float]:
    """Seconds of a step, were each resource alone: compute, memory (weights read), link, host. A step takes the longest."""
    work = way.share(load) * sample_flops(model.shape, load, way, assumed.memory_tokens)[1]
    read = model.layers if way.form != "nf4" else model.base["nf4"] - model.root + 2 * model.layers  # unpacked, then read
    link = gpu.link if way.gpus <= assumed.node else min(gpu.link, gpu.network)
    walks = sum(passes(load, way))
    return {
        "compute": work / (gpu.tflops * 1e12 * assumed.hfu),
        "memory": walks * read / (gpu.bandwidth * GB * assumed.bandwidth_share),
        "link": traffic_bytes(model, load, way) / (link * GB * assumed.link_share),
        "host": walks * model.shape.layers * assumed.launch_ms / 1e3,
    }


def text_tokens(load: Load, way: Way) -> int:
    """Text tokens of a step on all GPUs; every view and column counts."""
    return way.share(load) * way.gpus * sum(load.columns)


def ways(load: Load, form: str, sharding: str, gpus: int) -> Iterator[Way]:
    """From the recipe's own settings to the thriftiest: checkpointing, then fewer and fewer texts at once."""
    own = load.stage is not None and load.stage.gradient_checkpointing
    first = Way(form, sharding, gpus, own, 1)
    share = first.share(load)
    most = min(share, getattr(load.stage, "mini_batch_size", None) or share)
    yield replace(first, at_once=most)
    halves = itertools.takewhile(lambda n: n >= 1, (most >> i for i in itertools.count()))
    yield from (replace(first, checkpointing=load.stage is not None, at_once=n) for n in halves)


PLACES = (("bf16", "DDP"), ("bf16", "FSDP2"), ("nf4", "DDP"))


def place(
    model: Model, work: Mapping[str, Load], gpus: int, gpu: Gpu, assumed: Assumed, sharding: str | None = None
) -> dict[str, Way]:
    """The first of `PLACES` where every load fits, with its way by load; empty: none. `sharding`: this one, in bf16.

    Every process loads the whole base before it is spread (docs/launch.md), so sharding cannot help a base that is too large.
    """
    room = assumed.usable * gpu.memory * GB
    for form, spread in [("bf16", sharding)] if sharding else PLACES:
        kind = spread if gpus > 1 else "DDP"
        if model.base[form] > room:
            continue
        found = {}
        for name, load in work.items():
            own = "DDP" if load.stage is None else kind  # encoding: a copy on each GPU
            fits = (way for way in ways(load, form, own, gpus) if memory_bytes(model, load, way, assumed) <= room)
            if way := next(fits, None):
                found[name] = way
        if len(found) == len(work):
            return found
    return {}
