"""`llm2comp.load`: whatever names a model (folder, run, stage of a run, baseline, Hub id), a SentenceTransformer."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from llm2comp.baselines.settings import BASELINE_FILE, NAMES
from llm2comp.console import GENERAL, GENERAL_TINY, Dtype
from llm2comp.errors import BackboneError, ModelFolderError, one_line
from llm2comp.files import sha256
from llm2comp.hub import hub, not_at_hand
from llm2comp.recipe import expanded, missing_path, nearest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Encoders that come with the package: run directories without data and logs. The LM is not part of them.
_ASSETS = Path(__file__).parent / "assets"
BUILTIN_ENCODERS = {name: _ASSETS / name.removeprefix("builtin:") for name in (GENERAL, GENERAL_TINY)}
# Encoders that need no training: `kind:NAME` is one over the causal LM NAME.
BASELINES = tuple(NAMES)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Files and folders of a model folder that change nothing in what torch makes of it.
_NO_EFFECT = ("README.md", "done.json", "golden.json")
_NO_EFFECT_FOLDERS = ("checkpoint-", "best", "openvino", "onnx")


@dataclass(frozen=True)
class Identity:
    """What a model is called in results: `organisation/model`, and a revision that changes with its weights."""

    name: str
    revision: str


def load(
    path: str | Path = GENERAL,
    device: str | None = None,
    num_memory: int | None = None,
    backend: str = "torch",
    dtype: Dtype = "auto",
    merged: bool = False,
) -> SentenceTransformer:
    """An encoder ready to `encode`.

    Args:
        path: `builtin:general` (default: the encoder that comes with the package, on SmolLM2-135M),
            `builtin:general-tiny` (on a toy LM), an exported model folder, a run directory
            (its finished model), a stage folder of a run (adapters on the live backbone), `mean:NAME`, `echo:NAME`, ... (the
            causal LM NAME as a training-free encoder, one of BASELINES), the folder of a saved one, or the Hub id of a
            sentence-transformers model.
        device: `cpu`, `cuda`, `mps`; default: the best there is.
        num_memory: j: the embedding is the mean of the last j memory states, of an encoder that
            an earlier version trained of the first j; default: all, by their stored weights.
        backend: `torch`; `openvino` or `onnx`: the compiled graph in an exported folder, on the CPU (docs/speed.md).
        dtype: of weights and computing under torch; default: what the folder, the recipe or the Hub model says.
        merged: put a live encoder's adapters into its weights: faster, for encoding alone (no frozen LM is left).

    Raises:
        ModelFolderError: nothing loadable there, an unfinished run, a damaged file, or not so many memory tokens.
        BackboneError: no such device or dtype; a causal LM that cannot be loaded. RecipeError: settings of a saved baseline.
    """
    from llm2comp.encoder import merge_adapters
    from llm2comp.export import use_prefix

    if dtype not in get_args(Dtype):
        raise BackboneError("no such dtype", where="dtype", expected=", ".join(get_args(Dtype)), found=dtype)
    if dtype != "auto" and backend != "torch":
        fix = "leave dtype out; a graph's precision is chosen when it is written"
        raise BackboneError("cannot change its dtype", where=f"backend {backend}", expected="dtype auto", found=dtype, fix=fix)
    model = _load(str(path), device, dtype) if backend == "torch" else _load_graph(str(path), device, backend)
    if merged:
        merge_adapters(model)
    if num_memory is not None:
        use_prefix(model, num_memory)
    return model


def _load(path: str, device: str | None, dtype: Dtype) -> SentenceTransformer:
    from llm2comp.backbone import resolve_device
    from llm2comp.encoder import to_dtype
    from llm2comp.export import load_folder
    from llm2comp.training.run import read_run, stage_encoder

    if device is not None:
        device = str(resolve_device(device))
    kind, _, name = path.partition(":")
    if name and kind in BASELINES:
        return _baseline(kind, name, device, dtype)
    path = _packaged(path)
    if not Path(path).absolute().is_dir():
        return to_dtype(_from_hub(path, device), dtype)
    folder = Path(path).absolute()
    if (folder / BASELINE_FILE).is_file():
        from llm2comp.baselines.encoder import load_saved

        return to_dtype(load_saved(folder, device), dtype)
    stage = stage_of(folder)
    if stage is None:
        return to_dtype(load_folder(_finished(folder, path), device), dtype)
    recipe = read_run(folder.parent)
    changes = ({} if device is None else {"device": device}) | ({} if dtype == "auto" else {"dtype": dtype})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})
    model: SentenceTransformer = stage_encoder(folder.parent, recipe, stage)
    return model


def _load_graph(path: str, device: str | None, backend: str) -> SentenceTransformer:
    from llm2comp.compiled import load_compiled

    if device not in (None, "cpu"):
        raise BackboneError("runs on the CPU only", where=f"backend {backend}", expected="device cpu", found=device)
    return load_compiled(_finished(expanded(path).absolute(), path), backend)


def live_place(path: str) -> str:
    """The last stage of a run or of a packaged encoder, where the LM is at hand; any other path as it is."""
    path = _packaged(path)
    run = run_of(path)
    return str(_last_stage(run)) if run == Path(path).absolute() else path


def card_facts(path: str) -> dict[str, str]:
    """Facts about a run, a stage or a packaged encoder for the README of its exported folder; none for other models."""
    from llm2comp.training.finished import card_of
    from llm2comp.training.run import read_run

    run = run_of(_packaged(path))
    return card_of(read_run(run)) if run else {}


def _packaged(path: str) -> str:
    """The last stage of a packaged encoder; any other path as it is, `~` expanded."""
    return str(_last_stage(BUILTIN_ENCODERS[path])) if path in BUILTIN_ENCODERS else str(expanded(path))


def _last_stage(run: Path) -> Path:
    from llm2comp.training.run import FOLDERS, read_run

    return run / FOLDERS[list(read_run(run).stages)[-1]]


def stage_of(folder: Path) -> str | None:
    """The stage (`pretext`, `ucl`, `scl`) whose folder in a run this is."""
    from llm2comp.training.run import FOLDERS, RECIPE_FILE

    named = {place: stage for stage, place in FOLDERS.items()}
    return named.get(folder.name) if (folder.parent / RECIPE_FILE).is_file() else None


def run_of(path: str | Path) -> Path | None:
    """The run directory that a path belongs to: the run itself, a stage or the model of it; None for anything else."""
    from llm2comp.training.run import FOLDERS, MODEL_FOLDER, RECIPE_FILE

    folder = expanded(path).absolute()
    if (folder / RECIPE_FILE).is_file():
        return folder
    return (
        folder.parent if folder.name in (*FOLDERS.values(), MODEL_FOLDER) and (folder.parent / RECIPE_FILE).is_file() else None
    )


def identity(path: str | Path, model: SentenceTransformer) -> Identity:
    """Name and revision of a model that `load` gave.

    Two checkpoints, two weightings of one's memory, torch and a compiled graph never share both.
    """
    from llm2comp.compiled import compiled_of
    from llm2comp.export import memory_weights
    from llm2comp.memory import Order, mean_weights, prefix_weights

    who, weights = _identity(path, model), memory_weights(model)
    if graph := compiled_of(model):
        who = Identity(f"{who.name}-{graph.backend}-{graph.precision}", _short(f"{who.revision}:{graph.digest}"))
    if not weights or weights == mean_weights(len(weights)).tolist():
        return who
    count, size = len(weights), sum(weight > 0 for weight in weights)
    orders = [o for o in get_args(Order) if weights == prefix_weights(count, size, o).tolist()]
    part = "".join(f"-{order}-{size}" for order in orders)
    return Identity(who.name + part, _short(f"{who.revision}:{weights}"))


def _identity(path: str | Path, model: SentenceTransformer) -> Identity:
    from llm2comp.backbone import hub_commit, weights_digest
    from llm2comp.baselines.encoder import BaselineEncoder
    from llm2comp.training.run import FOLDERS, read_run

    folder, module = Path(_packaged(str(path))).absolute(), model[0]
    if isinstance(module, BaselineEncoder):
        kind, _, name = str(path).partition(":")
        label = f"llm2comp/{kind}-{_plain(name)}" if name and kind in BASELINES else f"local/{_plain(folder.name)}"
        saved, prompts = module.saved(), sorted(item for item in model.prompts.items() if item[1])
        return Identity(label, _short(f"{saved.to_yaml()}:{prompts}:{weights_digest(saved.model.settings())}"))
    if not folder.is_dir():
        return Identity(str(path), hub_commit(str(path)) or "unknown")
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


def model_folder(folder: Path) -> Path:
    """The exported folder that a path means: itself, or the one in a finished run. Raises ModelFolderError: not finished."""
    return _finished(folder, str(folder))


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


def _baseline(kind: str, name: str, device: str | None, dtype: Dtype) -> SentenceTransformer:
    from llm2comp.backbone import load_backbone
    from llm2comp.baselines.encoder import baseline
    from llm2comp.recipe import ModelSettings

    settings = ModelSettings(name=name, device=device or "auto", dtype=dtype, attention="causal")
    return baseline(load_backbone(settings), NAMES[kind])


def _from_hub(name: str, device: str | None) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    from llm2comp.backbone.sources import BUILTIN_MODELS, is_gguf

    expected = (
        f"{GENERAL}, a model/ folder, a run, a stage of a run, a Hub id, or KIND:NAME with KIND one of {', '.join(BASELINES)}"
    )
    if (nearest_folder := missing_path(name)) is not None:
        raise ModelFolderError("no such folder", where=name, expected=expected, found=f"there is {nearest_folder}")
    if not _HUB_ID.fullmatch(name) or is_gguf(name):
        kind, colon, _ = name.partition(":")
        fix = (nearest(name, BUILTIN_ENCODERS) if kind == "builtin" else nearest(kind, BASELINES)) if colon else None
        if name in BUILTIN_MODELS or is_gguf(name):
            fix = f"a language model is no encoder yet: train one on it, or take it untrained, as mean:{name}"
        raise ModelFolderError("no such folder", where=name, expected=expected, fix=fix)
    try:
        with hub(name):
            return SentenceTransformer(name, device=device, model_kwargs={"use_safetensors": True})
    except Exception as error:  # the libraries raise some twenty kinds
        if (why := not_at_hand(name, "modules.json") and not_at_hand(name)) is not None:
            raise ModelFolderError(why, where=name, expected=expected) from error
        cause = one_line(f"{type(error).__name__}: {error}")
        raise ModelFolderError(
            f"no such folder, nor a model that the Hub gives: {cause}", where=name, expected=expected
        ) from error


def _plain(name: str) -> str:
    """A name without what a result folder's name cannot hold."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _content(folder: Path) -> str:
    """Hex digest over names and content of a folder's files, those of checkpoints, logs and compiled graphs left out."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        weighs = file.is_file() and file.name not in _NO_EFFECT and file.suffix != ".jsonl" and not file.name.startswith(".")
        if weighs and not place.parts[0].startswith(_NO_EFFECT_FOLDERS):
            digest.update(f"{place.as_posix()}:{sha256(file)}".encode())
    return digest.hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
