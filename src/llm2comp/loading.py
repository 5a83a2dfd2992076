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
        ModelFolderError: nothing loadable there, an unfinished run, or a damaged file.
        BackboneError: no such device.
    """
    from llm2comp.backbone import resolve_device
    from llm2comp.export import load_folder
    from llm2comp.training.run import FOLDERS, MODEL_FOLDER, RECIPE_FILE, read_run, stage_encoder

    if device is not None:
        device = str(resolve_device(device))
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise ModelFolderError("no such folder", where=str(path), expected="a model/ folder, a run, or a stage of a run")
    if (folder.parent / RECIPE_FILE).is_file() and folder.name in FOLDERS.values():
        stage = next(name for name, place in FOLDERS.items() if place == folder.name)
        recipe = read_run(folder.parent)
        if device is not None:
            recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": device})})
        model: SentenceTransformer = stage_encoder(folder.parent, recipe, stage)
        return model
    if (folder / RECIPE_FILE).is_file():
        folder = folder / MODEL_FOLDER
        if not folder.is_dir():
            raise ModelFolderError(
                "the run is not finished",
                where=str(path),
                expected=f"{MODEL_FOLDER}/ in it",
                fix="run it again, or load a stage",
            )
    return load_folder(folder, device)
