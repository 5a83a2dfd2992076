"""What a path of a model means: a packaged encoder, a run, a stage, a model folder."""

from __future__ import annotations

from pathlib import Path

from llm2comp.errors import ModelFolderError
from llm2comp.recipe import BUILTIN_ENCODERS, expanded
from llm2comp.runs.folder import MODEL_FOLDER, RECIPE_FILE, Run


def packaged(path: str) -> str:
    """The last stage of a packaged encoder; any other path as it is, `~` expanded."""
    encoder = BUILTIN_ENCODERS.get(path)
    return str(expanded(path)) if encoder is None else str(Run(encoder).last)


def live_place(path: str) -> str:
    """The last stage of a run or a packaged encoder, where the LM is at hand; else the path."""
    path = packaged(path)
    run = Run.of(path)
    return str(run.last) if run is not None and run.path == Path(path).absolute() else path


def model_folder(folder: Path, asked: str | None = None) -> Path:
    """The exported folder that a path means: itself, or the one in a finished run.

    Raises:
        ModelFolderError: the run is not finished; names what was `asked` for.
    """
    if not (folder / RECIPE_FILE).is_file():
        return folder
    if not (folder / MODEL_FOLDER).is_dir():
        raise ModelFolderError(
            "the run is not finished",
            where=asked or str(folder),
            expected=f"{MODEL_FOLDER}/ in it",
            fix="run it again, or load a stage",
        )
    return folder / MODEL_FOLDER
