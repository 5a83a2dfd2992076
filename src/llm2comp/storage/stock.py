"""A live encoder as stock sentence-transformers modules.

Its folder needs no flag, no code and not this package.

1. merge the adapters into a float32 copy of the LM; keep the model without its LM head
2. append the memory vectors to the embedding table, after the last token's row (row ÷ the family's
   embedding scale)
3. let the tokenizer's one template put BOS and prompt before, prompt and memory tokens after every
   text, cut or not. Memory tokens are ids of this template alone, in no vocabulary: a name in one
   would be found in texts that happen to hold it
4. write `is_causal: false` (bidirectional encoders) into the config
5. pool: memory tokens by their weight, all else 0 (WordWeights, then mean); the last or only
   memory token, or a prompt's last one: by last token; the text's tokens: mean, BOS as good as none
6. put the projection, if there is one, after the pooling (Dense). Where memory tokens are weighed,
   put it before that, on the token states: the map of a mean is the mean of the maps, and
   WordWeights gives float32, which Dense refuses in a model of half precision
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Pooling,
    Transformer,
    WordWeights,
)
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llm2comp.errors import BackboneError
from llm2comp.model.compressor import BOS_WEIGHT, Compressor
from llm2comp.model.encoder import MemoryEncoder

MEMORY_NAME = re.compile(r"<(llm2comp_)*mem_\d+>")
# Key of the folder's config.json for the order of prefixes. Earlier versions wrote none: "first".
ORDER_KEY = "llm2comp_memory_order"
TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
# Gemma 3 halves its sliding window when it reads this key; `is_causal` alone suffices there.
NO_BIDIRECTIONAL_KEY = {"gemma3_text", "gemma3"}


def stock_model(
    module: MemoryEncoder, folder: Path, multi_vector: bool = False
) -> SentenceTransformer | MultiVectorEncoder:
    """The modules; the transformer among them is written to `folder` on the way.

    Raises:
        BackboneError: no fast tokenizer. ModelFolderError: no stock module can do what this encoder
            does.
    """
    compressor = module.compressor
    ids = _write_transformer(module, folder)
    transformer = Transformer(
        str(folder),
        modality_config=TEXT_ONLY,
        module_output_name="token_embeddings",
        unpad_inputs=False,  # WordWeights needs the padded mask
        max_seq_length=module.max_seq_length,
    )
    if multi_vector:
        others = sorted(transformer.tokenizer.get_vocab())
        mask = MultiVectorMask(others, skiplist_tasks=["query", "document"])
        return MultiVectorEncoder(
            modules=[transformer, mask, Normalize("token_embeddings")], device="cpu"
        )
    modules = [transformer, *_projected(compressor, _pooling(compressor, transformer, ids))]
    return SentenceTransformer(modules=modules, device="cpu")


def _write_transformer(module: MemoryEncoder, folder: Path) -> dict[str, int]:
    """Steps 1 to 4 of the module docstring up to the config.

    Returns the memory tokens' ids by their names.
    """
    compressor = module.compressor
    backbone = compressor.backbone
    tokenizer, memory = _tokenizer(compressor)
    body = backbone.adapters.merged(torch.float32).base_model
    ids = list(memory.values())
    with torch.no_grad():
        if compressor.input_table is not None:
            own = next(compressor.input_table.parameters())
            body.get_input_embeddings().weight.copy_(own)
        if ids and max(ids) >= len(body.get_input_embeddings().weight):
            body.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        table = body.get_input_embeddings().weight
        table[ids] = (compressor.memory.vectors_KD / backbone.embedding_scale).to(table)
    if backbone.attention == "bidirectional":
        body.config.is_causal = False
        if body.config.model_type not in NO_BIDIRECTIONAL_KEY:
            body.config.use_bidirectional_attention = True
    if ids:
        setattr(body.config, ORDER_KEY, compressor.order)
    body.save_pretrained(folder)
    tokenizer.model_max_length = module.max_seq_length
    tokenizer.save_pretrained(folder)
    return memory


def _tokenizer(compressor: Compressor) -> tuple[Any, dict[str, int]]:
    """The backbone's tokenizer with the template BOS, prompt, text, memory; padded on the right.

    It is rebuilt as the generic class: a family's own class may set up its template anew when it is
    loaded. No chat template.
    """
    backbone = compressor.backbone
    backend: Any = getattr(backbone.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BackboneError(
            "has no fast tokenizer, which the exported folder needs", where=backbone.name
        )
    backend = Tokenizer.from_str(backend.to_str())
    vocabulary, prefix = backend.get_vocab(with_added_tokens=True), "<mem_"
    while f"{prefix}0>" in vocabulary:  # WordWeights goes by names, so ours are no token's
        prefix = prefix.replace("mem_", "llm2comp_mem_")
    first = max(vocabulary.values()) + 1
    memory = {f"{prefix}{i}>": first + i for i in range(compressor.memory.count)}
    own = dict(backbone.tokenizer.special_tokens_map)
    if backbone.bos_token is not None:
        own["bos_token"] = backbone.bos_token
    start = {} if backbone.bos_token is None else {backbone.bos_token: [backbone.bos_id]}
    around = {"<before>": compressor.before, "<behind>": compressor.behind}
    pieces = (
        start
        | {name: ids for name, ids in around.items() if ids}
        | {name: [i] for name, i in memory.items()}
    )
    template = [
        name
        for name in (*start, "<before>", "$A", "<behind>", *memory)
        if name == "$A" or name in pieces
    ]
    kept: Any = [
        {
            "id": name,
            "ids": ids,
            "tokens": [name if name in memory else backend.id_to_token(i) for i in ids],
        }
        for name, ids in pieces.items()
    ]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=kept)
    special = {key: own[key] for key in ("bos_token", "eos_token", "unk_token") if key in own}
    special["pad_token"] = own.get("pad_token") or own.get("eos_token") or _any_token(backend)
    # Qwen 2's own class, which transformers loads for its models whatever the folder says, would
    # otherwise add `<|endoftext|>` where there is none: at the first memory token's id.
    special.setdefault("unk_token", special["pad_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="right", truncation_side="right", **special
    ), memory


def _any_token(backend: Any) -> str:
    """A token to pad with where the family has none.

    Padding is masked, so any that is found in texts anyway will do.

    Another one would be found in texts from now on. Where there is none at all, id 0's.
    """
    added = backend.get_added_tokens_decoder()
    return str(added[min(added)].content if added else backend.id_to_token(0))


def _pooling(compressor: Compressor, transformer: Any, memory: dict[str, int]) -> list[Any]:
    """Step 5 of the module docstring."""
    width = int(compressor.backbone.input_table.shape[1])
    if compressor.last_alone:
        return [Pooling(width, "lasttoken")]
    if compressor.settings.pooling == "memory":
        weights, rest = (
            dict(zip(memory, compressor.get_buffer("weights_K").tolist(), strict=True)),
            0.0,
        )
    elif (bos := compressor.backbone.bos_token) is None:
        return [Pooling(width, "mean")]
    else:
        weights, rest = {bos: BOS_WEIGHT}, 1.0
    size = transformer.auto_model.get_input_embeddings().weight.shape[0]
    by_id = {index: token for token, index in (transformer.tokenizer.get_vocab() | memory).items()}
    words = WordWeights(
        [by_id.get(index, f"<unused_{index}>") for index in range(size)],
        weights,
        unknown_word_weight=rest,
    )
    words.requires_grad_(False)
    return [words, Pooling(compressor.width, "mean")]


def _projected(compressor: Compressor, pooling: list[Any]) -> list[Any]:
    """Step 6 of the module docstring."""
    if (linear := compressor.projection) is None:
        return pooling
    weighed = isinstance(pooling[0], WordWeights)
    name = "token_embeddings" if weighed else "sentence_embedding"
    dense = Dense(
        linear.in_features, linear.out_features, activation_function=None, module_input_name=name
    )
    dense.linear.load_state_dict(linear.state_dict())
    return [dense, *pooling] if weighed else [*pooling, dense]
