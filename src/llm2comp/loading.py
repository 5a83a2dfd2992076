"""`llm2comp.load`: whatever names a model (folder, run, stage of a run, baseline, Hub id), a SentenceTransformer."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm2comp.baselines.settings import BASELINE_FILE, NAMES
from llm2comp.errors import ModelFolderError
from llm2comp.files import sha256
from llm2comp.recipe import nearest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Encoders that need no training: `kind:NAME` is one over the causal LM NAME.
BASELINES = tuple(NAMES)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Files of a model folder that change nothing in what it gives.
_NO_EFFECT = ("README.md", "done.json", "golden.json")


@dataclass(frozen=True)
class Identity:
    """What a model is called in results: `organisation/model`, and a revision that changes with its weights."""

    name: str
    revision: str


def load(path: str | Path, device: str | None = None) -> SentenceTransformer:
    """An encoder ready to `encode`.

    Args:
        path: an exported model folder, a run directory (its finished model), a stage folder of a run (adapters on the live
            backbone), `mean:NAME`, `echo:NAME`, ... (the causal LM NAME as a training-free encoder, one of BASELINES), the
            folder of a saved one, or the Hub id of a sentence-transformers model.
        device: `cpu`, `cuda`, `mps`; default: the best there is.

    Raises:
        ModelFolderError: nothing loadable there, an unfinished run, or a damaged file.
        BackboneError: no such device; a causal LM that cannot be loaded. RecipeError: settings of a saved baseline.
    """
    from llm2comp.backbone import resolve_device
    from llm2comp.export import load_folder
    from llm2comp.training.run import read_run, stage_encoder

    if device is not None:
        device = str(resolve_device(device))
    kind, _, name = str(path).partition(":")
    if name and kind in BASELINES:
        return _baseline(kind, name, device)
    folder = Path(path).absolute()
    if not folder.is_dir():
        return _from_hub(str(path), device)
    if (folder / BASELINE_FILE).is_file():
        from llm2comp.baselines.encoder import load_saved

        return load_saved(folder, device)
    stage = stage_of(folder)
    if stage is None:
        return load_folder(_finished(folder, str(path)), device)
    recipe = read_run(folder.parent)
    if device is not None:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": device})})
    model: SentenceTransformer = stage_encoder(folder.parent, recipe, stage)
    return model


def stage_of(folder: Path) -> str | None:
    """The stage (`pretext`, `ucl`, `scl`) whose folder in a run this is."""
    from llm2comp.training.run import FOLDERS, RECIPE_FILE

    named = {place: stage for stage, place in FOLDERS.items()}
    return named.get(folder.name) if (folder.parent / RECIPE_FILE).is_file() else None


def run_of(path: str | Path) -> Path | None:
    """The run directory that a path belongs to: the run itself, a stage or the model of it; None for anything else."""
    from llm2comp.training.run import FOLDERS, MODEL_FOLDER, RECIPE_FILE

    folder = Path(path).absolute()
    if (folder / RECIPE_FILE).is_file():
        return folder
    return (
        folder.parent if folder.name in (*FOLDERS.values(), MODEL_FOLDER) and (folder.parent / RECIPE_FILE).is_file() else None
    )


def identity(path: str | Path, model: SentenceTransformer) -> Identity:
    """Name and revision of a model that `load` gave; two checkpoints never share both."""
    from llm2comp.backbone import weights_digest
    from llm2comp.baselines.encoder import BaselineEncoder
    from llm2comp.training.run import FOLDERS, read_run

    folder, module = Path(path).absolute(), model[0]
    if isinstance(module, BaselineEncoder):
        kind, _, name = str(path).partition(":")
        label = f"llm2comp/{kind}-{_plain(name)}" if name and kind in BASELINES else f"local/{_plain(folder.name)}"
        saved, prompts = module.saved(), sorted(item for item in model.prompts.items() if item[1])
        return Identity(label, _short(f"{saved.to_yaml()}:{prompts}:{weights_digest(saved.model.settings())}"))
    if not folder.is_dir():
        commit = getattr(getattr(model[0], "config", None), "_commit_hash", None)
        return Identity(str(path), str(commit or "unknown"))
    run, stage = run_of(folder), stage_of(folder)
    if run is None:
        return Identity(f"local/{_plain(folder.name)}", _short(_content(folder)))
    if stage is None:
        return Identity(f"llm2comp/{_plain(run.name)}", _short(_content(_finished(folder, str(path)))))
    recipe = read_run(run)
    names = list(recipe.stages)
    parts = [_content(run / FOLDERS[earlier]) for earlier in names[: names.index(stage) + 1]]
    label = f"llm2comp/{_plain(run.name)}-{folder.name}"
    return Identity(label, _short(":".join([recipe.model.name, weights_digest(recipe.model), *parts])))


def _finished(folder: Path, asked: str) -> Path:
    """The model folder itself, or the one in a finished run."""
    from llm2comp.training.run import MODEL_FOLDER, RECIPE_FILE

    if not (folder / RECIPE_FILE).is_file():
        return folder
    if not (folder / MODEL_FOLDER).is_dir():
        raise ModelFolderError(
            "the run is not finished", where=asked, expected=f"{MODEL_FOLDER}/ in it", fix="run it again, or load a stage"
        )
    return folder / MODEL_FOLDER


def _baseline(kind: str, name: str, device: str | None) -> SentenceTransformer:
    from llm2comp.backbone import load_backbone
    from llm2comp.baselines.encoder import baseline
    from llm2comp.recipe import ModelSettings

    return baseline(load_backbone(ModelSettings(name=name, device=device or "auto", attention="causal")), NAMES[kind])


def _from_hub(name: str, device: str | None) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    expected = f"a model/ folder, a run, a stage of a run, a Hub id, or KIND:NAME with KIND one of {', '.join(BASELINES)}"
    if not _HUB_ID.fullmatch(name):
        kind, colon, _ = name.partition(":")
        fix = nearest(kind, BASELINES) if colon else None
        raise ModelFolderError("no such folder", where=name, expected=expected, fix=fix)
    try:
        return SentenceTransformer(name, device=device, model_kwargs={"use_safetensors": True})
    except Exception as error:  # the libraries raise some twenty kinds
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ModelFolderError(
            f"no such folder, nor a model that the Hub gives: {cause}", where=name, expected=expected
        ) from error


def _plain(name: str) -> str:
    """A name without what a result folder's name cannot hold."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _content(folder: Path) -> str:
    """Hex digest over names and content of a folder's files, those of checkpoints and logs left out."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        weighs = file.is_file() and file.name not in _NO_EFFECT and file.suffix != ".jsonl" and not file.name.startswith(".")
        if weighs and not place.parts[0].startswith(("checkpoint-", "best")):
            digest.update(f"{place.as_posix()}:{sha256(file)}".encode())
    return digest.hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
