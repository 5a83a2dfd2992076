"""A trained encoder as a plain sentence-transformers folder, and the check that a folder still gives what it gave.

`export` (DESIGN 1.7), so that `SentenceTransformer(folder)` needs no flag, no code and not this package:
1. write transformer, tokenizer and pooling as stock parts (`stock.py`)
2. load the folder as any user would, hold its embeddings against the native ones, store them as golden.json
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from torch import Tensor

from llm2comp.encoder import MemoryEncoder, check_prompt, embed_texts, memory_vectors
from llm2comp.errors import ModelFolderError
from llm2comp.export.card import write_card
from llm2comp.export.stock import stock_model
from llm2comp.export.weights import memory_names, memory_weights, set_weights, use_first, word_weights
from llm2comp.files import new_folder, to_json, write_text

__all__ = ["export", "load_folder", "memory_names", "memory_weights", "reweight", "set_weights", "use_first", "verify"]

FORMAT_VERSION = 1
GOLDEN_FILE = "golden.json"
CONFIG_FILE = "config_sentence_transformers.json"
GOLDEN_TEXTS = (
    "Compression keeps what matters.",
    "Mémoire 記憶 ذاكرة 🧠 — a line of many scripts, 12,345.678 numbers\nand a second line.",
    "A long text that is cut at the model's limit. " * 200,
)
MIN_COSINE = {"float32": 0.99999, "bfloat16": 0.999, "float16": 0.9999}


def export(model: SentenceTransformer, folder: Path, card: dict[str, str] | None = None, multi_vector: bool = False) -> None:
    """Write a live memory encoder as a stock sentence-transformers folder; replaces the folder as a whole.

    Args:
        model: as `as_sentence_transformer` or `llm2comp.load` on a stage folder give it.
        folder: where to.
        card: facts for the folder's README: `base`, `licence`, `trained_on`, `command`, `note`.
        multi_vector: for `MultiVectorEncoder(folder)`: a text is its memory states, each of length 1, scored by MaxSim.

    Raises:
        ModelFolderError: the exported folder embeds otherwise than the native encoder, or no stock folder can do what it
            does: separate memory in a bidirectional encoder, many vectors without memory tokens.
        BackboneError: the tokenizer cannot carry a template. RecipeError: a prompt that leaves no room for a text.
        RunError: the folder cannot be written.
    """
    module = model[0]
    if not isinstance(module, MemoryEncoder):
        raise ModelFolderError("is exported already", expected="a live memory encoder", found=type(module).__name__)
    for role, prompt in model.prompts.items():
        check_prompt(model, prompt or "", role, where=f"prompts.{role}")
    native = memory_vectors(model, GOLDEN_TEXTS).flatten(1) if multi_vector else embed_texts(model, GOLDEN_TEXTS)
    dtype = str(module.compressor.backbone.embedding_table.dtype).removeprefix("torch.")
    with new_folder(folder) as target:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            stock = stock_model(module, Path(scratch), multi_vector)
            stock.prompts = dict(model.prompts)
            stock.save(str(target), create_model_card=False)
        kind: Any = MultiVectorEncoder if multi_vector else SentenceTransformer
        exported = golden_vectors(kind(str(target), device="cpu", model_kwargs={"dtype": "float32"}))
        lowest = torch.cosine_similarity(native, exported).min().item()
        if not lowest >= MIN_COSINE[dtype]:
            raise ModelFolderError(
                "the exported folder does not embed as the native encoder",
                where=str(folder),
                expected=f"cosine ≥ {MIN_COSINE[dtype]}",
                found=f"{lowest:.6f}",
            )
        golden = {
            "format_version": FORMAT_VERSION,
            "llm2comp": version("llm2comp"),
            "base": module.compressor.backbone.name,
            "licence": (card or {}).get("licence", "unknown"),
            "minimum_cosine": MIN_COSINE[dtype],
            "texts": list(GOLDEN_TEXTS),
            "embeddings": _rounded(exported),
        }
        write_text(target / GOLDEN_FILE, to_json(golden))
        write_text(target / "README.md", write_card(module, card or {}, GOLDEN_FILE, multi_vector))


def golden_vectors(model: SentenceTransformer | MultiVectorEncoder, texts: Sequence[str] = GOLDEN_TEXTS) -> Tensor:
    """What the golden file holds of a model, a row per text: its embedding, or its vectors one behind the other."""
    if isinstance(model, SentenceTransformer):
        return embed_texts(model, texts)
    found = model.encode(list(texts), show_progress_bar=False)
    return torch.stack([vectors_KD.float().cpu().flatten() for vectors_KD in found])


def _rounded(embeddings_ND: Tensor) -> list[list[float]]:
    return [[round(value, 7) for value in row] for row in embeddings_ND.tolist()]


def verify(folder: Path) -> float:
    """Recompute the golden embeddings of an exported folder. Returns the lowest cosine to the stored ones.

    Raises:
        ModelFolderError: no such folder, no golden.json, a file missing or truncated, or embeddings that differ.
    """
    golden_file = folder / GOLDEN_FILE
    try:
        golden: dict[str, Any] = json.loads(golden_file.read_text(encoding="utf-8"))
        expected = torch.tensor(golden["embeddings"])
        minimum = float(golden["minimum_cosine"])
        texts = [str(text) for text in golden["texts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(
            f"cannot be checked: {error}", where=str(golden_file), expected="a model/ folder written by llm2comp"
        ) from error
    if golden.get("format_version") != FORMAT_VERSION:
        raise ModelFolderError(
            "unknown format", where=str(golden_file), expected=FORMAT_VERSION, found=golden.get("format_version")
        )
    found = golden_vectors(_load(folder, "cpu", MultiVectorEncoder if _is_multi_vector(folder) else SentenceTransformer), texts)
    if found.shape != expected.shape:
        raise ModelFolderError("embeddings of another shape", where=str(folder), expected=expected.shape, found=found.shape)
    lowest = torch.cosine_similarity(expected, found).min().item()
    if not lowest >= minimum:
        raise ModelFolderError(
            "gives other embeddings than when it was saved",
            where=str(folder),
            expected=f"cosine ≥ {minimum}",
            found=f"{lowest:.6f}",
            fix="a file was changed or damaged: copy the folder again",
        )
    return lowest


def reweight(folder: Path, weights_K: Sequence[float]) -> None:
    """Give the memory tokens of an exported folder other weights in the mean, and renew its golden vectors.

    Raises:
        ModelFolderError: not a folder that `export` wrote, or another number of memory tokens. RunError: cannot be written.
    """
    model = load_folder(folder, device="cpu")
    names = memory_names(model) or []
    if len(names) != len(weights_K) or (words := word_weights(model)) is None:
        found = f"{len(names)} memory tokens" if names else "another kind of model"
        raise ModelFolderError(
            "cannot be given weights",
            where=str(folder),
            expected=f"a folder with {max(2, len(weights_K))} memory tokens",
            found=found,
        )
    verify(folder)
    set_weights(model, weights_K)
    with new_folder(folder) as target:
        shutil.copytree(folder, target, dirs_exist_ok=True)
        words.save(str(target / json.loads((folder / "modules.json").read_text())[list(model).index(words)]["path"]))
        golden = json.loads((folder / GOLDEN_FILE).read_text(encoding="utf-8"))
        golden["embeddings"] = _rounded(golden_vectors(load_folder(target, device="cpu"), golden["texts"]))
        write_text(target / GOLDEN_FILE, to_json(golden))


def load_folder(folder: Path, device: str | None = None) -> SentenceTransformer:
    """`SentenceTransformer(folder)` with one clear error for whatever is wrong with the folder.

    Raises:
        ModelFolderError: missing, incomplete, truncated, or in need of code that is not installed.
    """
    if _is_multi_vector(folder):
        raise ModelFolderError(
            "holds several vectors per text", where=str(folder), fix="load it with sentence_transformers.MultiVectorEncoder"
        )
    model: SentenceTransformer = _load(folder, device, SentenceTransformer)
    return model


def _is_multi_vector(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return bool(config["model_type"] == MultiVectorEncoder.model_type)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # another kind of folder, or one that cannot be loaded


def _load(folder: Path, device: str | None, kind: type[Any]) -> Any:
    """A folder's model, of sentence-transformers' class `kind`, once it has embedded a text."""
    if not (folder / "modules.json").is_file():
        raise ModelFolderError("not a sentence-transformers folder", where=str(folder), expected="modules.json in it")
    try:
        safe = {"use_safetensors": True}
        model = kind(str(folder), device=device, local_files_only=True, model_kwargs=safe)
        golden_vectors(model, ["a trial: some damage shows only here"])
        return model
    except Exception as error:  # what libraries raise on a broken file has no common base
        raise cannot_be_loaded(folder, (str(error).strip() or type(error).__name__).splitlines()[0]) from error


def cannot_be_loaded(folder: Path, reason: str) -> ModelFolderError:
    """What a folder gets that some library stumbled over."""
    fix = "a file is missing or damaged: copy the folder again or export anew"
    return ModelFolderError(f"cannot be loaded: {reason}", where=str(folder), fix=fix)
