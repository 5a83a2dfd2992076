"""What both sides of a row are given: the same random LM, a tokenizer of whole words, texts of
known lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from benchmarks.settings import Setting, Shape
from llm2comp.model.backbone import Backbone
from llm2comp.model.compressor import Compressor
from llm2comp.recipe import AdapterSettings

POSITIONS = 1024
SEED = 0
SPECIALS = ("<s>", "</s>")


def config_of(shape: Shape) -> Any:
    """The shape as transformers' configuration.

    Wide initial weights, so that the LM's distributions are not all alike.
    """
    kind = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[shape.family]
    return kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=shape.tied,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )


def make_lm(setting: Setting, attention: str, dtype: str | None = None) -> Any:
    """The frozen LM, the same at every call: `attention` is eager or sdpa."""
    with torch.random.fork_rng(), torch.device(setting.device):
        torch.manual_seed(SEED)
        lm = transformers.AutoModelForCausalLM.from_config(
            config_of(setting.shape),
            attn_implementation=attention,
            dtype=getattr(torch, dtype or setting.dtype)
            if setting.device != "cpu"
            else torch.float32,
        )
    return cast(lm, dtype or setting.dtype).requires_grad_(False).eval()


def cast(lm: Any, dtype: str) -> Any:
    """The weights alone, as `from_pretrained(dtype=...)` gives them: angles of rotary positions
    stay float32.
    """
    for weight in lm.parameters():
        weight.data = weight.data.to(getattr(torch, dtype))
    return lm


def make_tokenizer(shape: Shape) -> Any:
    """A word is a token: `w2` .. up to the vocabulary."""
    words = [*SPECIALS, *(f"w{i}" for i in range(len(SPECIALS), shape.vocabulary))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIALS[1])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{SPECIALS[0]} $A", special_tokens=[(SPECIALS[0], 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIALS[0], eos_token=SPECIALS[1]
    )


def make_compressor(
    setting: Setting, dtype: str | None = None, dropout: float | None = None
) -> Compressor:
    """Our encoder: one copy of the LM, a fresh adapter of the recipe's default settings, fresh
    memory.
    """
    backbone = Backbone(
        make_lm(setting, "sdpa", dtype), make_tokenizer(setting.shape), name=setting.name
    )
    backbone.add_adapter("stage", AdapterSettings(), dropout, seed=SEED)
    return Compressor.fresh(backbone, setting.memory_tokens, SEED)


def fill_adapters(model: nn.Module) -> None:
    """Random values for LoRA's B matrices, zero when fresh: the same for models with the same
    layers.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """LoRA weights in the order of the layers."""
    return [weight for name, weight in model.named_parameters() if "lora_" in name]


def draw_lengths(count: int, bounds: tuple[int, int], seed: int) -> list[int]:
    """Uniform lengths within bounds, both included."""
    return [
        int(n)
        for n in np.random.default_rng((SEED, seed)).integers(bounds[0], bounds[1] + 1, count)
    ]


def mixed_lengths(count: int, seed: int) -> list[int]:
    """Log-normal around 110 tokens, cut to 20..512."""
    drawn = np.random.default_rng((SEED, seed)).lognormal(np.log(110), 0.9, count)
    return [int(n) for n in np.clip(drawn, 20, 512)]


def token_rows(lengths: Sequence[int], shape: Shape, seed: int) -> list[np.ndarray]:
    """Rows of random token ids behind BOS."""
    rng = np.random.default_rng((SEED, seed, 1))
    rows = [
        rng.integers(len(SPECIALS), shape.vocabulary, length, dtype=np.int32) for length in lengths
    ]
    for row in rows:
        row[0] = 0
    return rows


def make_texts(lengths: Sequence[int], shape: Shape, seed: int) -> list[str]:
    """Texts that become so many tokens, BOS included."""
    return [" ".join(f"w{i}" for i in row[1:]) for row in token_rows(lengths, shape, seed)]
