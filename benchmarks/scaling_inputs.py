"""What the cost model takes as given: cards, assumptions, models' weights. Nothing here is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from benchmarks.inputs import config_of
from benchmarks.settings import LLAMA2_7B, Shape
from benchmarks.work import body_flops
from llm2comp.backbone.adapters import AdapterStack
from llm2comp.backbone.loading import load_skeleton
from llm2comp.errors import BackboneError
from llm2comp.recipe import AdapterSettings, ModelSettings
from llm2comp.training.plan import base_bytes, embedding_weights

SHAPES = {
    "1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128_256, tied=True),  # as Llama 3.2 1B
    "7b": LLAMA2_7B,
    "70b": Shape("llama", 80, 8192, 28_672, 64, 8, 128, 32_000),  # as Llama 2 70B
}


# Of the frozen weights: name, bytes of a weight, quantization.
FORMS: tuple[tuple[str, int, str | None], ...] = (("float32", 4, None), ("bf16", 2, None), ("nf4", 2, "nf4"))


def number(default: float, about: str) -> Any:
    """A field that the command line can change, with its help."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class Gpu:
    """What a card's maker says of it, and a price that we assume."""

    memory: float = number(0, "GB (10^9) of the card")
    tflops: float = number(0, "peak of dense bfloat16 products, TFLOP/s")
    bandwidth: float = number(0, "of the card's memory, GB/s")
    link: float = number(0, "GB/s that a GPU sends to others of its node")
    network: float = number(0, "GB/s that a whole node sends to another")
    price: float = number(0, "per GPU and hour")


# Memory, TFLOP/s and bandwidth: data sheets. Links and networks: of a usual machine. Prices: round numbers of ours, no quotes.
GPUS = {
    "rtx4090": Gpu(24, 165, 1008, 25, 25, 0.5),
    "l40s": Gpu(48, 362, 864, 25, 50, 1.0),
    "a100": Gpu(80, 312, 2039, 300, 200, 1.5),
    "h100": Gpu(80, 989, 3350, 450, 400, 3.0),
    "h200": Gpu(141, 989, 4800, 450, 400, 4.0),
}


@dataclass(frozen=True)
class Assumed:
    """Every other number that is not a shape or a setting of the recipe. Lengths in tokens, BOS included, without memory."""

    hfu: float = number(0.4, "share of the peak that the work done reaches, recomputation included")
    usable: float = number(0.9, "share of the card's memory that may be planned with")
    contrastive: float = number(1.1, "times the plan's activations in stages 2 and 3; the most that --check found")
    link_share: float = number(0.7, "share of links and network that transfers reach")
    bandwidth_share: float = number(0.8, "share of the memory's bandwidth that reading weights reaches")
    launch_ms: float = number(0.5, "milliseconds in which the host starts one layer's kernels, in one pass")
    node: int = number(8, "GPUs of a node")
    memory_tokens: int = number(8, "memory tokens behind each text")
    live_weights: int = number(10**9, "weights that ZeRO-3 holds whole at once (its default)")
    pretext_tokens: int = number(340, "mean text of stage 1")
    pretext_longest: int = number(512, "longest text of stage 1, the recipe's limit")
    sentence_tokens: int = number(32, "mean sentence of stage 2")
    sentence_longest: int = number(128, "longest sentence of stage 2")
    query_tokens: int = number(48, "mean query of stage 3 with its instruction")
    document_tokens: int = number(200, "mean document of stage 3")
    document_longest: int = number(1024, "longest document of stage 3, the recipe's limit")
    texts: int = number(10**6, "texts to encode")
    text_tokens: int = number(256, "mean text to encode")
    encode_batch: int = number(64, "texts encoded at once")


@dataclass(frozen=True)
class Model:
    """A shape, and what its weights take: `base` by form (float32, bf16, nf4), `root` = embeddings and head in bf16."""

    name: str
    shape: Shape
    base: Mapping[str, int]
    root: int
    adapter: int  # weights of one stage's LoRA, counted

    @property
    def layers(self) -> int:
        """Bytes of the layers in bf16."""
        return self.base["bf16"] - self.root


def read_model(name: str) -> Model:
    """A shape by its name, or of a folder, a config.json or a Hub id.

    Raises:
        BackboneError: not to be had, or layers that are not llama's seven products, which the FLOP formulas count.
    """
    if name in SHAPES:
        with torch.device("meta"):
            return model_of(name, SHAPES[name], transformers.AutoModelForCausalLM.from_config(config_of(SHAPES[name])))
    lm = load_skeleton(ModelSettings(name=name))
    c = lm.config
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    sizes: list[int] = [found for key in keys if isinstance(found := getattr(c, key, None), int)]
    if len(sizes) == len(keys):
        layers, hidden, intermediate, heads = sizes
        grouped, width = getattr(c, "num_key_value_heads", None) or heads, getattr(c, "head_dim", None) or hidden // heads
        table, head = lm.get_input_embeddings().weight, lm.get_output_embeddings()
        tied = table is head.weight
        shape = Shape(c.model_type, layers, hidden, intermediate, heads, grouped, width, len(table), tied)
        linear = sum(m.weight.numel() for m in lm.modules() if isinstance(m, torch.nn.Linear) and m is not head)
        if 2 * linear == products_flops(shape):
            return model_of(name.rstrip("/").removesuffix("/config.json").rpartition("/")[2], shape, lm)
    raise BackboneError(
        "has no llama-like layers, which the FLOP formulas count",
        where=f"{name} (model_type {c.model_type})",
        expected="dense layers of q, k, v, o, gate, up, down",
        fix=f"name another model, or one of {', '.join(SHAPES)}",
    )


def model_of(name: str, shape: Shape, lm: Any) -> Model:
    """The counts of a causal LM; its weights are not read. LoRA layers are put into it."""
    base = {form: base_bytes(lm, size, kind) for form, size, kind in FORMS}
    root = 2 * embedding_weights(lm)
    adapters = AdapterStack(lm, name)
    with torch.device("meta"):
        adapters.add("stage", AdapterSettings())
    return Model(name, shape, base, root, sum(p.numel() for p in adapters.parameters("stage")))


def products_flops(shape: Shape) -> float:
    """A token's forward FLOPs in the layers' products, two per weight."""
    return body_flops(shape, [1]) - 4.0 * shape.layers * shape.heads * shape.head_dim
