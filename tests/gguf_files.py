"""Tiny LMs as GGUF files, written by llama.cpp's own package."""

import json

import gguf
import numpy as np

# family of tests/families.py → GGUF's architecture
ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma2": "GEMMA2",
    "gemma3": "GEMMA3",
}


def as_gguf_spells(name, weight, config):
    """A weight as GGUF keeps it: Llama's rotary halves interleaved, Gemma's norms with the one
    added.
    """
    if config.model_type in ("llama", "mistral") and name.endswith(("q_proj", "k_proj")):
        heads = (
            config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
        )
        return (
            weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
            .swapaxes(1, 2)
            .reshape(weight.shape)
        )
    return weight + 1 if config.model_type.startswith("gemma") and "norm" in name else weight


def write_gguf(
    file,
    lm,
    tokenizer,
    kind="F32",
    name="tiny",
    licence="mit",
    tokens_of="gpt2",
    scaled=False,
    **facts,
):
    """Write a model and its byte-level tokenizer; matrices in `kind`, the rest in float32.

    Returns the weights as gguf itself reads them again, by the model's names, as GGUF spells them.
    """
    config, family = lm.config, lm.config.model_type.removesuffix("_text")
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[family]]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    if licence:
        writer.add_license(licence)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    angles = config.rope_parameters
    writer.add_rope_freq_base(angles.get("full_attention", angles)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if window := getattr(config, "sliding_window", None):
        writer.add_sliding_window(window)
    _write_tokenizer(writer, tokenizer, config.vocab_size, tokens_of)
    for key, value in facts.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(
            key.replace("__", "."), value
        )
    names, read = gguf.get_tensor_name_map(architecture, config.num_hidden_layers), {}
    tied = config.tie_word_embeddings
    for path, weight in lm.state_dict().items():
        if path == "lm_head.weight" and tied:
            continue
        stem, _, part = path.rpartition(".")
        values = as_gguf_spells(stem, weight.float().numpy(), config).astype(np.float32)
        place = f"{names.get_name(stem)}.{part}"
        quantised = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        packed = gguf.quants.quantize(values, quantised)
        read[path] = gguf.quants.dequantize(packed, quantised)
        writer.add_tensor(place, packed, raw_dtype=quantised)
    if scaled:
        writer.add_tensor("rope_freqs.weight", np.ones(head // 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _write_tokenizer(writer, tokenizer, rows, model):
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = {token["content"] for token in told["added_tokens"] if token["special"]}
    tokens = [token for token, _ in vocabulary] + [
        f"[PAD{i}]" for i in range(len(vocabulary), rows)
    ]
    types = [3 if token in special else 1 for token, _ in vocabulary] + [5] * (
        rows - len(vocabulary)
    )
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if model == "llama":  # sentencepiece: scores, no merges
        writer.add_token_scores([float(-i) for i in range(len(tokens))])
    else:
        writer.add_token_merges([" ".join(pair) for pair in told["model"]["merges"]])
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)
