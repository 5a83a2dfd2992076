"""Rows of encoding: texts → embeddings, our ways against stock sentence-transformers on the same
exported folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

import llm2comp
from benchmarks.inputs import cast, fill_adapters, make_compressor, make_texts, mixed_lengths
from benchmarks.settings import Setting
from benchmarks.sides import Row, Side, Target, cosine_gap
from benchmarks.work import encode_flops
from llm2comp.model.encoder import as_sentence_transformer, merge_adapters
from llm2comp.storage.compiled import compile_folder
from llm2comp.storage.export import export
from llm2comp.storage.runtimes import RUNTIMES
from llm2comp.use.embed import embed

FOLDER = "model"
MAX_TOKENS = 512
KINDS = ("short", "mixed", "long")
# Name of a side → precision of the graph that it runs. None where OpenVINO cannot be compared: it
# is not installed, or the row may be run on the CUDA device that is there.
GRAPHS = {"ours, OpenVINO bf16": "bfloat16", "ours, OpenVINO int8": "int8"}
if RUNTIMES["openvino"].missing() or torch.cuda.is_available():
    GRAPHS = {}


def lengths_of(setting: Setting, kind: str) -> list[int]:
    """Tokens of the row's texts, BOS included: 20; log-normal within 20 and 512; 512."""
    count = setting.encode_texts[KINDS.index(kind)]
    if kind == "mixed":
        return mixed_lengths(count, 10)
    return [{"short": 20, "long": MAX_TOKENS}[kind]] * count


def live_model(setting: Setting) -> SentenceTransformer:
    """A trained-looking encoder (no matrix of LoRA is zero) on its backbone, adapters not
    merged.
    """
    compressor = make_compressor(setting)
    fill_adapters(compressor)
    return as_sentence_transformer(compressor.eval(), MAX_TOKENS)


def merged_model(setting: Setting, dtype: str) -> SentenceTransformer:
    """`live_model` as `llm2comp.load(..., merged=True, dtype=...)` gives it: LoRA in the weights,
    these in a dtype.
    """
    model = live_model(setting)
    merge_adapters(model)
    module: Any = model[0]
    cast(module.compressor.backbone.lm, dtype)
    return model


def write_folder(setting: Setting, folder: Path) -> None:
    """The exported folder that all sides but the live one load, and copies of it with a graph
    each.
    """
    export(live_model(setting), folder / FOLDER)
    for precision in GRAPHS.values():
        shutil.copytree(folder / FOLDER, folder / precision)
        compile_folder(folder / precision, "openvino", precision)


def stock_model(setting: Setting, folder: Path, dtype: str) -> SentenceTransformer:
    """As a user of sentence-transformers would load it for speed."""
    kwargs = {"attn_implementation": "sdpa", "dtype": dtype}
    return SentenceTransformer(
        str(folder / FOLDER), device=setting.device, local_files_only=True, model_kwargs=kwargs
    )


def _side(setting: Setting, kind: str, encode: Callable[[list[str]], Tensor], dtype: str) -> Side:
    lengths = lengths_of(setting, kind)
    texts = make_texts(lengths, setting.shape, 10)

    def run() -> tuple[int, float]:
        encode(texts)
        return sum(lengths), encode_flops(setting.shape, lengths, setting.memory_tokens)

    return Side(run, lambda: [encode(texts)], getattr(torch, dtype))


def our_side(
    setting: Setting, kind: str, model: SentenceTransformer, dtype: str | None = None
) -> Side:
    """`llm2comp.use.embed.embed` with its own batches."""

    def encode(texts: list[str]) -> Tensor:
        return torch.from_numpy(embed(model, texts).embeddings_ND)

    return _side(setting, kind, encode, dtype or setting.dtype)


def graph_side(kind: str, precision: str, setting: Setting, folder: Path) -> Side:
    """`llm2comp.use.embed.embed` on OpenVINO, held to the limit of half precision; int8 has no
    MFU.
    """
    side = our_side(
        setting, kind, llm2comp.load(folder / precision, backend="openvino"), "bfloat16"
    )
    return side if precision == "bfloat16" else replace(side, run=lambda: (side.run()[0], 0.0))


def stock_side(setting: Setting, kind: str, folder: Path, dtype: str) -> Side:
    """`SentenceTransformer.encode`, which sorts by length itself."""
    model: Any = stock_model(setting, folder, dtype)

    def encode(texts: list[str]) -> Tensor:
        found: Tensor = model.encode(
            texts, batch_size=setting.encode_batch, convert_to_tensor=True, show_progress_bar=False
        )
        return found.float().cpu()

    return _side(setting, kind, encode, dtype)


def _sides(kind: str) -> Mapping[str, Callable[[Setting, Path], Side]]:
    graphs = {
        name: partial(graph_side, kind, precision)
        for name, precision in GRAPHS.items()
        if kind == "mixed"
    }
    return {
        "ours, live": lambda setting, _: our_side(setting, kind, live_model(setting)),
        "ours, live, merged": lambda setting, _: our_side(
            setting, kind, merged_model(setting, setting.dtype), setting.dtype
        ),
        "ours, live, merged bf16": lambda setting, _: our_side(
            setting, kind, merged_model(setting, "bfloat16"), "bfloat16"
        ),
        "ours, exported folder": lambda setting, folder: our_side(
            setting, kind, llm2comp.load(folder / FOLDER, device=setting.device)
        ),
        **graphs,
        "stock bf16 weights": lambda setting, folder: stock_side(setting, kind, folder, "bfloat16"),
        "stock": lambda setting, folder: stock_side(setting, kind, folder, setting.dtype),
    }


def _row(kind: str, about: str) -> Row:
    targets: tuple[Target, ...] = ()
    if kind == "mixed":
        targets = (
            Target("cpu", "ours, live, merged bf16", "ratio", ">=", 2.5),
            Target("cuda-7b", "ours, exported folder", "ratio", ">=", 1.5),
            Target("cuda-7b", "ours, exported folder", "mfu", ">=", 0.55),
        )
        if not GRAPHS:
            about += "; no sides of OpenVINO: it is not installed, or a CUDA device is there"
    return Row(
        f"encoding, {about}",
        _sides(kind),
        "stock",
        targets=targets,
        differ=cosine_gap,
        limits=(1e-3, 1e-2),
        memory=("ours, exported folder", "stock") if kind == "mixed" else (),
        gemm_rows=lambda setting: min(4096, setting.encode_batch * 128),
        prepare=write_folder,
    )


ENCODING_ROWS: dict[str, Row] = {
    "encode_short": _row("short", "texts of 20 tokens"),
    "encode_mixed": _row("mixed", "texts of 20 to 512 tokens, log-normal"),
    "encode_long": _row("long", "texts of 512 tokens"),
}
