"""What a model is called in results: a name, and a revision that changes with its weights."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from sentence_transformers import SentenceTransformer

from llm2comp.model.backbone import hub_commit, weights_digest
from llm2comp.model.baselines.kinds import NAMES
from llm2comp.model.baselines.module import BaselineEncoder
from llm2comp.model.memory import Order, mean_weights, prefix_weights
from llm2comp.runs.finished import limits_of
from llm2comp.runs.folder import Run, stage_of
from llm2comp.runs.starting import start_digest
from llm2comp.storage.compiled import compiled_of
from llm2comp.storage.places import model_folder, packaged
from llm2comp.storage.weights import memory_weights
from llm2comp.system.files import sha256

# Files and folders of a model folder that change nothing in what torch makes of it.
_NO_EFFECT = ("README.md", "done.json", "golden.json")
_NO_EFFECT_FOLDERS = ("checkpoint-", "best", "openvino", "onnx")


@dataclass(frozen=True)
class Identity:
    """What a model is called in results: `organisation/model`, and a revision that changes with its
    weights.
    """

    name: str
    revision: str


def identity(path: str | Path, model: SentenceTransformer) -> Identity:
    """Name and revision of a model that `load` gave.

    Two checkpoints, two weightings of one's memory, torch and a compiled graph never share both.
    """
    who, weights = _identity(path, model), memory_weights(model)
    if graph := compiled_of(model):
        who = Identity(
            f"{who.name}-{graph.backend}-{graph.precision}",
            _short(f"{who.revision}:{graph.digest}"),
        )
    if not weights or weights == mean_weights(len(weights)).tolist():
        return who
    count, size = len(weights), sum(weight > 0 for weight in weights)
    orders = [o for o in get_args(Order) if weights == prefix_weights(count, size, o).tolist()]
    part = "".join(f"-{order}-{size}" for order in orders)
    return Identity(who.name + part, _short(f"{who.revision}:{weights}"))


def _identity(path: str | Path, model: SentenceTransformer) -> Identity:
    folder, module = Path(packaged(str(path))).absolute(), model[0]
    if isinstance(module, BaselineEncoder):
        kind, _, name = str(path).partition(":")
        label = (
            f"llm2comp/{kind}-{plain_name(name)}"
            if name and kind in NAMES
            else f"local/{plain_name(folder.name)}"
        )
        saved, prompts = module.saved(), sorted(item for item in model.prompts.items() if item[1])
        own = (model.default_prompt_name, model.truncate_dim, model.similarity_fn_name)
        more = "" if own == (None, None, "cosine") else f":{own}"
        digest = weights_digest(saved.model.settings())
        return Identity(label, _short(f"{saved.to_yaml()}:{prompts}:{digest}{more}"))
    if not folder.is_dir():
        return Identity(str(path), hub_commit(str(path)) or "unknown")
    run, stage = Run.of(folder), stage_of(folder)
    if run is None:
        return Identity(f"local/{plain_name(folder.name)}", _short(_content(folder)))
    if stage is None:
        return Identity(
            f"llm2comp/{plain_name(run.path.name)}",
            _short(_content(model_folder(folder, str(path)))),
        )
    recipe = run.recipe
    names = list(recipe.stages)
    start = [start_digest(run.start)] if run.start else []
    parts = [_content(run.stage(earlier)) for earlier in names[: names.index(stage) + 1]]
    # queries are cut where a later stage says
    if stage != names[-1] and (roles := limits_of(recipe)[1]):
        parts.append(str(roles["query"]))
    label = f"llm2comp/{plain_name(run.path.name)}-{folder.name}"
    return Identity(
        label, _short(":".join([recipe.model.name, weights_digest(recipe.model), *start, *parts]))
    )


def plain_name(name: str) -> str:
    """A name without what a result folder's name cannot hold."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _content(folder: Path) -> str:
    """Hex digest over names and content of a folder's files.

    Those of checkpoints, logs and compiled graphs are left out.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        weighs = (
            file.is_file()
            and file.name not in _NO_EFFECT
            and file.suffix != ".jsonl"
            and not file.name.startswith(".")
        )
        if weighs and not place.parts[0].startswith(_NO_EFFECT_FOLDERS):
            digest.update(f"{place.as_posix()}:{sha256(file)}".encode())
    return digest.hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
