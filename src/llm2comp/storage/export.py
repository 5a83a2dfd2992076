"""Write a trained encoder as a plain sentence-transformers folder.

`export`, so that `SentenceTransformer(folder)` needs no flag, no code and not this package:
1. make transformer, tokenizer and pooling as stock parts in float32 (`stock.py`), and hold their
   embeddings against those of the native encoder in float32: half precision would blur the
   comparison, and with it what is wrong
2. round the weights to the dtype asked for, write the folder, load it as any user would: in float32
   it gives what was rounded
3. store these embeddings as golden.json, and beside them how far half precision takes them
   (`Precision`)
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from llm2comp.errors import ModelFolderError
from llm2comp.model.backbone.quantized import in_float32
from llm2comp.model.encoder import MemoryEncoder, check_prompt
from llm2comp.model.vectors import embed_texts, memory_vectors
from llm2comp.storage.card import write_card
from llm2comp.storage.engines import read_as, refuse_unfit, write_both_schemas
from llm2comp.storage.gguf_folder import write_gguf_folder
from llm2comp.storage.golden import (
    FORMAT_VERSION,
    GOLDEN_FILE,
    GOLDEN_TEXTS,
    MIN_COSINE,
    TOLD_BELOW,
    Precision,
    golden_vectors,
    hold,
    load_as,
    lowest_cosine,
    rounded,
)
from llm2comp.storage.stock import stock_model
from llm2comp.system.console import Engine, MemoryPooling, say
from llm2comp.system.files import to_json, write_text
from llm2comp.system.folders import EXPORTED, new_folder, refuse_foreign

UNLIKE = "the exported folder does not embed as the native encoder"
DTYPES = ("float32", "bfloat16", "float16")


def export(
    model: SentenceTransformer,
    folder: Path,
    card: dict[str, str] | None = None,
    multi_vector: bool = False,
    dtype: str | None = None,
    pooling: MemoryPooling | None = None,
    engine: Engine = "sentence-transformers",
) -> None:
    """Write a live memory encoder as a stock folder; an earlier one is replaced as a whole.

    Args:
        model: as `as_sentence_transformer` or `llm2comp.load` on a stage folder give it.
        folder: where to.
        card: facts for the folder's README: `base`, `licence`, `trained_on`, `command`, `note`.
        multi_vector: for `MultiVectorEncoder(folder)`: a text is its memory states, each of length
            1, scored by MaxSim.
        dtype: of the stored weights, one of DTYPES; default: that of the encoder's LM.
        pooling: `last`: the last memory state alone, which every engine can read; `mean`: all
            states by their weights (WordWeights); default: `last` for an encoder with nested memory
            of 1 whose weights nobody changed, else `mean`.
        engine: what will run the folder. `tei` and `vllm`: a folder for sentence-transformers that
            they read alike; `llama.cpp`: one GGUF file, by default in float16 (docs/clients.md).

    Raises:
        ModelFolderError: the exported folder embeds otherwise than the native encoder, or no stock
            folder can do what it does (many vectors without memory tokens); no such dtype; `last`
            of an encoder whose last state was not trained to stand alone; the engine cannot compute
            exactly what the encoder does.
        BackboneError: the tokenizer cannot carry a template. RecipeError: a prompt that leaves no
            room for a text.
        RunError: the folder holds something else than an exported model, or cannot be written.
    """
    module = model[0]
    if not isinstance(module, MemoryEncoder):
        raise ModelFolderError(
            "is exported already", expected="a live memory encoder", found=type(module).__name__
        )
    for role, prompt in model.prompts.items():
        check_prompt(model, prompt or "", role, where=f"prompts.{role}")
    refuse_foreign(folder, EXPORTED)
    if multi_vector and engine != "sentence-transformers":
        raise ModelFolderError("reads one vector a text", where=f"export for {engine}")
    dtype = _checked_dtype(dtype or ("float16" if engine == "llama.cpp" else None), module)
    with read_as(module.compressor, "mean" if multi_vector else pooling):
        refuse_unfit(module.compressor, engine, module.max_seq_length)
        if engine == "llama.cpp":
            _write_gguf(model, folder, card or {}, dtype)
            return
        precision = _write_folder(model, folder, card or {}, multi_vector, dtype)
    if precision.computing < TOLD_BELOW:
        say(
            f"{folder}: computed in {dtype}, its embeddings differ from float32 (lowest "
            f"cosine {precision.computing:.4f}); "
            "compute in float32: model_kwargs={'dtype': 'float32'}, or export with dtype float32"
        )


def _write_gguf(model: SentenceTransformer, folder: Path, card: dict[str, str], dtype: str) -> None:
    """By way of a folder in float32, which is held against the native encoder."""
    with (
        new_folder(folder, EXPORTED) as target,
        tempfile.TemporaryDirectory(dir=target.parent) as scratch,
    ):
        _write_folder(model, Path(scratch) / "stock", card, False, "float32")
        write_gguf_folder(Path(scratch) / "stock", target, card, dtype)


def _write_folder(
    model: SentenceTransformer, folder: Path, card: dict[str, str], multi_vector: bool, dtype: str
) -> Precision:
    """The three steps of the module docstring."""
    module: Any = model[0]
    with in_float32(module):
        native = (
            memory_vectors(model, GOLDEN_TEXTS).flatten(1)
            if multi_vector
            else embed_texts(model, GOLDEN_TEXTS)
        )
    with new_folder(folder, EXPORTED) as target:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            stock = stock_model(module, Path(scratch), multi_vector)
            _keep_settings(model, stock)
            hold(folder, native, golden_vectors(stock), UNLIKE)
            stored = _write(stock, target, dtype)
        write_both_schemas(target)
        exported = golden_vectors(load_as(target, "cpu", type(stock), "float32"))
        hold(folder, stored, exported, UNLIKE)
        precision = Precision.of(
            target, type(stock), exported, GOLDEN_TEXTS, dtype, lowest_cosine(native, exported)
        )
        facts = card | {"precision": precision.told()}
        golden = _golden(module.compressor.backbone.name, facts, precision, exported)
        write_text(target / GOLDEN_FILE, to_json(golden))
        write_text(
            target / "README.md",
            write_card(module, model.prompts, facts, GOLDEN_FILE, multi_vector),
        )
    return precision


def _checked_dtype(dtype: str | None, module: MemoryEncoder) -> str:
    """The dtype asked for, or the LM's own."""
    dtype = dtype or str(module.compressor.backbone.input_table.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ModelFolderError(
            "no such dtype", where="dtype", expected=", ".join(DTYPES), found=dtype
        )
    return dtype


def _golden(
    base: str, facts: Mapping[str, str], precision: Precision, vectors_ND: Tensor
) -> dict[str, Any]:
    """What golden.json holds."""
    return {
        "format_version": FORMAT_VERSION,
        "llm2comp": version("llm2comp"),
        "base": base,
        "licence": facts.get("licence", "unknown"),
        "minimum_cosine": MIN_COSINE,
        "precision": precision.record(),
        "texts": list(GOLDEN_TEXTS),
        "embeddings": rounded(vectors_ND),
    }


def _keep_settings(model: SentenceTransformer, stock: Any) -> None:
    """Copy settings that users made on the live model (prompts, truncate_dim, ...)."""
    stock.prompts = dict(model.prompts)
    if isinstance(stock, SentenceTransformer):
        stock.default_prompt_name, stock.truncate_dim = (
            model.default_prompt_name,
            model.truncate_dim,
        )
        stock.similarity_fn_name = model.similarity_fn_name


def _write(stock: Any, target: Path, dtype: str) -> Tensor:
    """Round the transformer's weights, save all.

    Returns the golden vectors of the rounded weights, in float32.
    """
    for parameter in stock[0].auto_model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    stock.save(str(target), create_model_card=False)
    for parameter in stock[0].auto_model.parameters():
        parameter.data = parameter.data.float()
    return golden_vectors(stock)
