"""`llm2comp.load`: whatever names a model → a SentenceTransformer.

A folder, a run, a stage of a run, a baseline, a Hub id.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from sentence_transformers import SentenceTransformer

from llm2comp.errors import BackboneError, ModelFolderError, one_line
from llm2comp.model.backbone import licence_in, load_backbone, resolve_device
from llm2comp.model.backbone.sources import BUILTIN_MODELS, is_gguf
from llm2comp.model.baselines.kinds import BASELINE_FILE, NAMES
from llm2comp.model.baselines.module import baseline, load_saved
from llm2comp.model.encoder import merge_adapters, to_dtype
from llm2comp.recipe import BUILTIN_ENCODERS, ModelSettings, expanded, missing_path, nearest
from llm2comp.runs.folder import Run, stage_of
from llm2comp.runs.starting import run_card
from llm2comp.storage.compiled import load_compiled
from llm2comp.storage.golden import load_folder
from llm2comp.storage.places import model_folder, packaged
from llm2comp.storage.weights import use_prefix
from llm2comp.system.console import GENERAL, Dtype
from llm2comp.system.hub import hub, not_at_hand

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


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
            `builtin:general-tiny` (on a toy LM), an exported model folder, a run directory (its
            finished model), a stage folder of a run (adapters on the live backbone), `mean:NAME`,
            `echo:NAME`, ... (the causal LM NAME as a training-free encoder, one of NAMES), the
            folder of a saved one, or the Hub id of a sentence-transformers model.
        device: `cpu`, `cuda`, `mps`; default: the best there is.
        num_memory: j: the embedding is the mean of the last j memory states, of an encoder that
            an earlier version trained of the first j; default: all, by their stored weights.
        backend: `torch`; `openvino` or `onnx`: the compiled graph in an exported folder, on the CPU
            (docs/speed.md).
        dtype: of weights and computing under torch; default: what the folder, the recipe or the Hub
            model says.
        merged: put a live encoder's adapters into its weights: faster, for encoding alone (no
            frozen LM is left).

    Raises:
        ModelFolderError: nothing loadable there, an unfinished run, a damaged file, or not so many
            memory tokens.
        BackboneError: no such device or dtype; a causal LM that cannot be loaded. RecipeError:
            settings of a saved baseline.
    """
    if dtype not in get_args(Dtype):
        raise BackboneError(
            "no such dtype", where="dtype", expected=", ".join(get_args(Dtype)), found=dtype
        )
    if dtype != "auto" and backend != "torch":
        fix = "leave dtype out; a graph's precision is chosen when it is written"
        raise BackboneError(
            "cannot change its dtype",
            where=f"backend {backend}",
            expected="dtype auto",
            found=dtype,
            fix=fix,
        )
    model = (
        _load(str(path), device, dtype)
        if backend == "torch"
        else _load_graph(str(path), device, backend)
    )
    if merged:
        merge_adapters(model)
    if num_memory is not None:
        use_prefix(model, num_memory)
    return model


def _load(path: str, device: str | None, dtype: Dtype) -> SentenceTransformer:
    if device is not None:
        device = str(resolve_device(device))
    kind, _, name = path.partition(":")
    if name and kind in NAMES:
        return _baseline(kind, name, device, dtype)
    path = packaged(path)
    if not Path(path).absolute().is_dir():
        return to_dtype(_from_hub(path, device), dtype)
    folder = Path(path).absolute()
    if (folder / BASELINE_FILE).is_file():
        return to_dtype(load_saved(folder, device), dtype)
    stage = stage_of(folder)
    if stage is None:
        return to_dtype(load_folder(model_folder(folder, path), device), dtype)
    run = Run(folder.parent)
    changes = ({} if device is None else {"device": device}) | (
        {} if dtype == "auto" else {"dtype": dtype}
    )
    settings = run.recipe.model.model_copy(update=changes)
    return run.encoder(stage, run.recipe.model_copy(update={"model": settings}))


def _load_graph(path: str, device: str | None, backend: str) -> SentenceTransformer:
    if device not in (None, "cpu"):
        raise BackboneError(
            "runs on the CPU only", where=f"backend {backend}", expected="device cpu", found=device
        )
    return load_compiled(model_folder(expanded(path).absolute(), path), backend)


def card_facts(path: str) -> dict[str, str]:
    """Facts for an exported folder's README, of a run, a stage or a packaged encoder; else none."""
    run = Run.of(packaged(path))
    if run is None:
        return {}
    # The card of a packaged encoder names the licence that its data ask for, beside the LM's.
    card = run.path / "README.md"
    own = licence_in(card) if card.is_file() else "unknown"
    return run_card(run) | ({} if own == "unknown" else {"licence": own})


def _baseline(kind: str, name: str, device: str | None, dtype: Dtype) -> SentenceTransformer:
    settings = ModelSettings(name=name, device=device or "auto", dtype=dtype, attention="causal")
    return baseline(load_backbone(settings), kind)


def _from_hub(name: str, device: str | None) -> SentenceTransformer:
    expected = (
        f"{GENERAL}, a model/ folder, a run, a stage of a run, a Hub id, or KIND:NAME with "
        f"KIND one of {', '.join(NAMES)}"
    )
    if (nearest_folder := missing_path(name)) is not None:
        raise ModelFolderError(
            "no such folder", where=name, expected=expected, found=f"there is {nearest_folder}"
        )
    if not _HUB_ID.fullmatch(name) or is_gguf(name):
        kind, colon, _ = name.partition(":")
        fix = (
            (nearest(name, BUILTIN_ENCODERS) if kind == "builtin" else nearest(kind, NAMES))
            if colon
            else None
        )
        if name in BUILTIN_MODELS or is_gguf(name):
            fix = (
                "a language model is no encoder yet: train one on it, or take it untrained, "
                f"as mean:{name}"
            )
        raise ModelFolderError("no such folder", where=name, expected=expected, fix=fix)
    try:
        with hub(name):
            return SentenceTransformer(name, device=device, model_kwargs={"use_safetensors": True})
    except Exception as error:  # the libraries raise some twenty kinds
        if (why := not_at_hand(name, "modules.json") and not_at_hand(name)) is not None:
            raise ModelFolderError(why, where=name, expected=expected) from error
        cause = one_line(f"{type(error).__name__}: {error}")
        raise ModelFolderError(
            f"no such folder, nor a model that the Hub gives: {cause}",
            where=name,
            expected=expected,
        ) from error
