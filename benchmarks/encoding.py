"""Rows of encoding: texts → embeddings, our two ways against stock sentence-transformers on the same exported folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

import llm2comp
from benchmarks.inputs import fill_adapters, make_compressor, make_texts, mixed_lengths
from benchmarks.settings import Setting
from benchmarks.sides import Row, Side, Target, cosine_gap
from benchmarks.work import encode_flops
from llm2comp.embed import embed
from llm2comp.encoder import as_sentence_transformer
from llm2comp.export import export

FOLDER = "model"
MAX_TOKENS = 512
KINDS = ("short", "mixed", "long")


def lengths_of(setting: Setting, kind: str) -> list[int]:
    """Tokens of the row's texts, BOS included: 20; log-normal within 20 and 512; 512."""
    count = setting.encode_texts[KINDS.index(kind)]
    if kind == "mixed":
        return mixed_lengths(count, 10)
    return [{"short": 20, "long": MAX_TOKENS}[kind]] * count


def live_model(setting: Setting) -> SentenceTransformer:
    """A trained-looking encoder (no matrix of LoRA is zero) on its backbone, adapters not merged."""
    compressor = make_compressor(setting)
    fill_adapters(compressor)
    return as_sentence_transformer(compressor.eval(), MAX_TOKENS)


def write_folder(setting: Setting, folder: Path) -> None:
    """The exported folder that three of the four sides load."""
    export(live_model(setting), folder / FOLDER)


def stock_model(setting: Setting, folder: Path, dtype: str) -> SentenceTransformer:
    """As a user of sentence-transformers would load it for speed."""
    kwargs = {"attn_implementation": "sdpa", "dtype": dtype}
    return SentenceTransformer(str(folder / FOLDER), device=setting.device, local_files_only=True, model_kwargs=kwargs)


def _side(setting: Setting, kind: str, encode: Callable[[list[str]], Tensor], dtype: str) -> Side:
    lengths = lengths_of(setting, kind)
    texts = make_texts(lengths, setting.shape, 10)

    def run() -> tuple[int, float]:
        encode(texts)
        return sum(lengths), encode_flops(setting.shape, lengths, setting.memory_tokens)

    return Side(run, lambda: [encode(texts)], getattr(torch, dtype))


def our_side(setting: Setting, kind: str, model: SentenceTransformer) -> Side:
    """`llm2comp.embed.embed`."""

    def encode(texts: list[str]) -> Tensor:
        return torch.from_numpy(embed(model, texts, batch_size=setting.encode_batch).embeddings_ND)

    return _side(setting, kind, encode, setting.dtype)


def stock_side(setting: Setting, kind: str, folder: Path, dtype: str) -> Side:
    """`SentenceTransformer.encode`, which sorts by length itself."""
    model: Any = stock_model(setting, folder, dtype)

    def encode(texts: list[str]) -> Tensor:
        found: Tensor = model.encode(texts, batch_size=setting.encode_batch, convert_to_tensor=True, show_progress_bar=False)
        return found.float().cpu()

    return _side(setting, kind, encode, dtype)


def _sides(kind: str) -> Mapping[str, Callable[[Setting, Path], Side]]:
    return {
        "ours, live": lambda setting, _: our_side(setting, kind, live_model(setting)),
        "ours, exported folder": lambda setting, folder: our_side(
            setting, kind, llm2comp.load(folder / FOLDER, device=setting.device)
        ),
        "stock bf16 weights": lambda setting, folder: stock_side(setting, kind, folder, "bfloat16"),
        "stock": lambda setting, folder: stock_side(setting, kind, folder, setting.dtype),
    }


def _row(kind: str, about: str) -> Row:
    targets: tuple[Target, ...] = ()
    if kind == "mixed":
        targets = (
            Target("cpu", "ours, exported folder", "ratio", ">=", 2.5),
            Target("cuda-7b", "ours, exported folder", "ratio", ">=", 1.5),
            Target("cuda-7b", "ours, exported folder", "mfu", ">=", 0.55),
        )
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
