"""Other weights for the memory tokens of a trained encoder: folder, stage or finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from sentence_transformers import SentenceTransformer

from llm2comp.errors import ModelFolderError
from llm2comp.model.backbone.sharded import header_of
from llm2comp.model.compressor import STATE_FILE
from llm2comp.runs.folder import Run, stage_of
from llm2comp.storage.golden import (
    GOLDEN_FILE,
    Precision,
    golden_vectors,
    load_as,
    load_folder,
    rounded,
    verify,
)
from llm2comp.storage.places import live_place
from llm2comp.storage.weights import memory_names, set_weights, word_weights
from llm2comp.system.files import to_json, write_bytes, write_text
from llm2comp.system.folders import new_folder


def reweight(path: str | Path, weights_K: Sequence[float]) -> list[Path]:
    """Store other weights for the memory tokens of a trained encoder: other embeddings.

    Args:
        path: a model folder, a stage of a run, or a finished run (its last stage and its model/).
        weights_K: a weight per memory token, which sum to 1.

    Returns:
        The folders that were changed.

    Raises:
        ModelFolderError: not a folder that `export` wrote, an unsound one, or another number of
            memory tokens.
        RunError: cannot be written.
    """
    folder, stage = Path(path).absolute(), Path(live_place(str(path))).absolute()
    changed = []
    if stage_of(folder) is None:
        model = Run(folder).model if Run.of(path) == Run(folder) else folder
        _reweight_folder(model, weights_K)  # first: it refuses a folder that is not sound
        changed.append(model)
    if stage_of(stage) is not None:
        _reweight_stage(stage, weights_K)
        changed.append(stage)
    return changed


def _reweight_stage(stage: Path, weights_K: Sequence[float]) -> None:
    file = stage / STATE_FILE
    tensors = load_file(file)
    if len(weights_K) != len(tensors["weights"]):
        raise ModelFolderError(
            "another number of memory tokens",
            where=str(file),
            expected=len(tensors["weights"]),
            found=len(weights_K),
        )
    tensors["weights"] = torch.tensor(weights_K, dtype=torch.float32)
    write_bytes(file, save(tensors, header_of(file)))


def _reweight_folder(folder: Path, weights_K: Sequence[float]) -> None:
    """The weights of an exported folder, and its golden vectors under them."""
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
    with new_folder(folder, None) as target:
        shutil.copytree(folder, target, dirs_exist_ok=True)
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        words.save(str(target / modules[list(model).index(words)]["path"]))
        golden = json.loads((folder / GOLDEN_FILE).read_text(encoding="utf-8"))
        vectors = golden_vectors(
            load_as(target, "cpu", SentenceTransformer, "float32"), golden["texts"]
        )
        golden["embeddings"] = rounded(vectors)
        if half := golden.get("precision"):
            kind, texts = type(model), golden["texts"]
            golden["precision"] = Precision.of(
                target, kind, vectors, texts, half["dtype"], half["weights"]
            ).record()
        write_text(target / GOLDEN_FILE, to_json(golden))
