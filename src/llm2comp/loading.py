"""`llm2comp.load`: whatever the path is (model folder, run, stage of a run), a SentenceTransformer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llm2comp.errors import ModelFolderError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load(path: str | Path, device: str | None = None) -> SentenceTransformer:
    """An encoder ready to `encode`.

    Args:
        path: an exported model folder, a run directory (its finished model), or a stage folder of a run
            (adapters on the live backbone).
        device: `cpu`, `cuda`, `mps`; default: the best there is.

    Raises:
        ModelFolderError: nothing loadable there, or a damaged file.
    """
    from llm2comp.export import load_folder
    from llm2comp.training.run import CONFIG_FILE, FOLDERS, MODEL_FOLDER, RECIPE_FILE, read_run, stage_encoder

    folder = Path(path)
    if not folder.is_dir():
        raise ModelFolderError("no such folder", where=str(folder), expected="a model/ folder, a run, or a stage of a run")
    if (folder / RECIPE_FILE).is_file():
        folder = folder / MODEL_FOLDER
    if (folder / CONFIG_FILE).is_file() and (folder.parent / RECIPE_FILE).is_file() and folder.name in FOLDERS.values():
        stage = next(name for name, place in FOLDERS.items() if place == folder.name)
        model: SentenceTransformer = stage_encoder(folder.parent, read_run(folder.parent), stage)
        if device is not None:
            model.to(device)
        return model
    return load_folder(folder, device)
