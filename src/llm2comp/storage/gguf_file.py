"""An exported folder as one GGUF file, which llama.cpp and what is built on it read.

1. numbers of the config, under llama.cpp's names; attention causal or not
2. the tokenizer: byte-level BPE, or BPE over pieces with a byte fallback (SentencePiece's). The
   last memory token is the end token that llama.cpp puts behind every text; those before it are
   control tokens, which a client writes behind its text
3. the weights, under llama.cpp's names; rows of queries and keys of Llama in its order
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llm2comp.errors import ModelFolderError
from llm2comp.system.files import explain_disk_errors, to_json

GGUF_FILE = "model.gguf"
TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls a family, and where it keeps its weights otherwise.

    Args:
        arch: its name there.
        halves: queries and keys turn pairs of neighbours, not of halves: their rows change places.
        norm_plus_one: weights of norms are kept less 1.
    """

    arch: gguf.MODEL_ARCH
    halves: bool = False
    norm_plus_one: bool = False


FAMILIES = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, halves=True),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, halves=True),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3),
    "gemma": Family(gguf.MODEL_ARCH.GEMMA, norm_plus_one=True),
    "gemma3_text": Family(gguf.MODEL_ARCH.GEMMA3, norm_plus_one=True),
}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a text is parted before BPE → llama.cpp's name of it.
PARTINGS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_WORDS + _REST, "ByteLevel"): "qwen2",
    (_WORDS + "{1,3}" + _REST, "ByteLevel"): "llama-bpe",
}


def write_gguf(folder: Path, file: Path, memory: Sequence[int], dtype: str) -> str:
    """Write an exported folder that reads its last token as one file.

    Args:
        folder: as `export` wrote it, in float32.
        file: where to.
        memory: ids of its memory tokens, one or more.
        dtype: of the matrices, one of TYPES; vectors are float32.

    Returns:
        What a client must write behind a text: the memory tokens but the last. Often nothing.

    Raises:
        ModelFolderError: a tokenizer, a window or weights that llama.cpp does not compute alike.
    """
    config: Any = AutoConfig.from_pretrained(folder)
    family = FAMILIES[config.model_type]
    names = {index: f"<|llm2comp_memory_{i}|>" for i, index in enumerate(memory)}
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[family.arch])
    _write_numbers(writer, config)
    _write_tokenizer(writer, tokenizer, names, config.vocab_size)
    for name, tensor in _tensors(weights, config, family):
        data = tensor.numpy()
        kind = TYPES[dtype if data.ndim > 1 else "float32"]
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    with explain_disk_errors(file), contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return "".join(list(names.values())[:-1])


def _write_numbers(writer: gguf.GGUFWriter, config: Any) -> None:
    """Step 1 of the module docstring."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name("llm2comp")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config.model_type == "gemma3_text":
        _require_gemmas_layers(config)
        writer.add_sliding_window(config.sliding_window)
    writer.add_causal_attention(getattr(config, "is_causal", True) is not False)
    writer.add_pooling_type(gguf.PoolingType.LAST)


def _require_gemmas_layers(config: Any) -> None:
    """Raise ModelFolderError unless each sixth layer is full, as llama.cpp takes it to be."""
    full = [kind == "full_attention" for kind in config.layer_types]
    base = config.rope_parameters.get("sliding_attention", {}).get("rope_theta", 10000.0)
    if full != [i % 6 == 5 for i in range(len(full))] or base != 10000.0:
        raise ModelFolderError(
            "Gemma 3 with other layers than llama.cpp knows",
            where="config.json",
            expected="each sixth layer full, the others' rope_theta 10,000",
            found=f"full: {full}, rope_theta {base:,.0f}",
        )


def _write_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: dict[str, Any], memory: dict[int, str], size: int
) -> None:
    """Step 2 of the module docstring."""
    model, kinds = tokenizer["model"], gguf.TokenType
    tokens = {index: piece for piece, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, kinds.NORMAL)
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    tokens |= memory
    types |= dict.fromkeys(memory, kinds.CONTROL)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if model.get("byte_fallback"):
        _write_pieces(writer, tokenizer, tokens, types, merges, size)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_parting(tokenizer))
        writer.add_token_merges(merges)
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([types.get(i, kinds.UNUSED) for i in range(size)])
    template = tokenizer["post_processor"]
    first = template["single"][0].get("SpecialToken", {}).get("id")
    bos = template["special_tokens"].get(first, {"ids": [None]})["ids"][0]
    if has_bos := bos is not None and bos not in memory:
        writer.add_bos_token_id(bos)
    writer.add_add_bos_token(has_bos)
    writer.add_eos_token_id(max(memory))
    writer.add_add_eos_token(True)


def _write_pieces(
    writer: gguf.GGUFWriter,
    tokenizer: dict[str, Any],
    tokens: dict[int, str],
    types: dict[int, gguf.TokenType],
    merges: list[str],
    size: int,
) -> None:
    """SentencePiece's pieces: a score for each, by the first merge that makes it."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    for index, piece in tokens.items():
        if len(piece) == 6 and piece.startswith("<0x"):
            types[index] = gguf.TokenType.BYTE
        elif piece == tokenizer["model"].get("unk_token"):
            types[index] = gguf.TokenType.UNKNOWN
            writer.add_unk_token_id(index)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    worst = len(merges)
    writer.add_token_scores([-float(rank.get(tokens.get(i, ""), worst)) for i in range(size)])
    normalizer, before = to_json(tokenizer["normalizer"]), tokenizer["pre_tokenizer"] or {}
    if before.get("prepend_scheme", "never") != "never":
        raise ModelFolderError(
            "puts a space before texts in another way than llama.cpp",
            where="tokenizer",
            expected="one before each part (Llama 2's own normaliser), or none (Gemma)",
            found=f"Metaspace, {before['prepend_scheme']}",
        )
    writer.add_add_space_prefix('"Prepend"' in normalizer)


def _parting(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of how the tokenizer parts a text before BPE."""
    before = tokenizer["pre_tokenizer"] or {"type": "none"}
    steps = before.get("pretokenizers", [before])
    key = tuple(
        step["pattern"].get("Regex", "") if step["type"] == "Split" else step["type"]
        for step in steps
    )
    normalizer = tokenizer["normalizer"]
    if key not in PARTINGS or (normalizer and normalizer["type"] != "NFC"):
        raise ModelFolderError(
            "parts texts before BPE in a way that llama.cpp has no name for",
            where="tokenizer",
            expected=", ".join(PARTINGS.values()),
            found=" → ".join(key),
        )
    return PARTINGS[key]


def _tensors(
    weights: dict[str, Tensor], config: Any, family: Family
) -> Iterator[tuple[str, Tensor]]:
    """Step 3 of the module docstring."""
    names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, kept in weights.items():
        part, tensor = name.split(".")[-2], kept.float()
        if family.halves and part in heads:
            halves = tensor.reshape(heads[part], 2, len(tensor) // heads[part] // 2, -1)
            tensor = halves.swapaxes(1, 2).reshape(kept.shape)
        if (found := names.get_name(f"model.{name}", (".weight", ".bias"))) is None:
            raise ModelFolderError("llama.cpp has no such weights", where=name)
        yield found, tensor + (family.norm_plus_one and part.endswith("norm"))
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        size = 2 * len(scaled)
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
        yield "rope_freqs.weight", plain / scaled
