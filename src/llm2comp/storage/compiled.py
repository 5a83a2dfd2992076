"""Exported folders run by OpenVINO or ONNX Runtime on CPUs, for speed.

The transformer is a graph, all else is as it was.

1. `compile_folder` traces the folder's transformer (ids, mask → token states; batch and length
   free), writes the graph into `openvino/` or `onnx/` of the folder, and holds the embeddings it
   gives against torch's in float32
2. `load_compiled` gives the folder as sentence-transformers loads it, but for the torch model: the
   graph stands in its place. Tokenizer, memory weights, pooling and prompts are the folder's own,
   so the graph outlives `reweight`
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn

from llm2comp.errors import ModelFolderError, install_extra, one_line
from llm2comp.storage.golden import cannot_be_loaded, golden_vectors, load_folder
from llm2comp.storage.runtimes import RUNTIMES, RunGraph, Runtime
from llm2comp.system.files import sha256, to_json, write_text
from llm2comp.system.folders import GRAPH, new_folder, refuse_foreign

FORMAT_VERSION = 1
GRAPH_FILE = "llm2comp.json"
# Lowest cosine to torch's float32 embeddings of the golden texts.
MIN_COSINE = {"float32": 0.9999, "bfloat16": 0.999, "int8": 0.995}


@dataclass(frozen=True)
class Compiled:
    """What runs in the place of the torch model; `digest` changes with the graph's files."""

    backend: str
    precision: str
    digest: str


class Graph(nn.Module):
    """A graph as transformers' models are called: `input_ids`, `attention_mask` (B, T) →
    `last_hidden_state` (B, T, D).
    """

    def __init__(self, config: Any, run: RunGraph, compiled: Compiled) -> None:
        super().__init__()
        self.config, self.run, self.compiled = config, run, compiled

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> dict[str, Tensor]:
        """Token states, float32."""
        return {
            "last_hidden_state": torch.from_numpy(
                self.run(input_ids.numpy(), attention_mask.numpy())
            )
        }


class CompiledTransformer(Transformer):
    """sentence-transformers' own first module over a `Graph`."""

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: Any,
        config: Any,
        backend: str,
        *_: Any,
        **__: Any,
    ) -> Any:
        return _open(Path(model_name_or_path) / backend, config, runtime_of(backend))

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Not this way: the folder holds the graph beside the weights."""
        raise NotImplementedError("copy the model's folder: it holds the compiled graph, too")


def runtime_of(backend: str, precision: str = "float32") -> Runtime:
    """The runtime of that name, once it is sure to be installed.

    Raises:
        ModelFolderError: unknown backend, a precision it does not offer, or its extra is not
            installed.
    """
    if (runtime := RUNTIMES.get(backend)) is None:
        raise ModelFolderError(
            "no such backend",
            where="backend",
            expected=f"torch, {', '.join(RUNTIMES)}",
            found=backend,
        )
    if precision not in runtime.precisions:
        expected = f"{', '.join(runtime.precisions)} with {backend}"
        raise ModelFolderError(
            "no such precision", where="precision", expected=expected, found=precision
        )
    if missing := runtime.missing():
        raise ModelFolderError(
            f"needs {missing[0]}, which is not installed",
            where=f"backend {backend}",
            fix=install_extra(runtime.name),
        )
    return runtime


def compile_folder(folder: Path, backend: str = "openvino", precision: str = "float32") -> float:
    """Write the graph of an exported folder into it; one of the same backend is replaced.

    Args:
        folder: as `export` wrote it, or another sentence-transformers folder over a transformer.
        backend: `openvino` or `onnx`.
        precision: `float32`; for openvino also `bfloat16` (computing; weights are kept in float16)
            and `int8` (weights).

    Returns:
        The lowest cosine to torch's float32 embeddings of the golden texts.

    Raises:
        ModelFolderError: not such a folder, a model that the runtime cannot express, embeddings
            that differ too much, or the extra is not installed. RunError: the folder cannot be
            written.
    """
    runtime = runtime_of(backend, precision)
    refuse_foreign(folder / backend, GRAPH)
    model = load_folder(folder, device="cpu").float()
    if not isinstance(module := model[0], Transformer):
        raise ModelFolderError(
            "cannot be compiled",
            where=str(folder),
            expected="a transformer as the first module",
            found=type(module).__name__,
        )
    expected_ND = golden_vectors(model)
    features = module.preprocess(["two texts,", "one of them longer than the other"])
    traced = features["input_ids"], features["attention_mask"]
    with new_folder(folder / backend, GRAPH) as target:
        try:
            runtime.write(module.auto_model, *traced, target, precision)
        except (OSError, MemoryError):
            raise
        # what converters raise on a model they do not know has no common base
        except Exception as error:
            problem = f"{backend} cannot express this model: {_reason(error)}"
            raise ModelFolderError(problem, where=str(folder), fix="stay with torch") from error
        files = {file.name: sha256(file) for file in sorted(target.iterdir())}
        facts = {"format_version": FORMAT_VERSION, "precision": precision, "files": files}
        write_text(target / GRAPH_FILE, to_json(facts, indent=1))
        module.model = _open(target, module.auto_model.config, runtime)
        lowest = torch.cosine_similarity(expected_ND, golden_vectors(model)).min().item()
        if not lowest >= MIN_COSINE[precision]:
            raise ModelFolderError(
                f"{backend} in {precision} does not embed as torch does",
                where=str(folder),
                expected=f"cosine ≥ {MIN_COSINE[precision]}",
                found=f"{lowest:.6f}",
                fix="choose a finer precision: " + ", ".join(runtime.precisions)
                if len(runtime.precisions) > 1
                else None,
            )
    return lowest


def load_compiled(folder: Path, backend: str = "openvino") -> SentenceTransformer:
    """A folder with its graph, on the CPU; the torch model's weights are not read.

    Raises:
        ModelFolderError: not an exported folder, no graph in it, a file missing or damaged, or the
            extra is not installed.
    """
    runtime_of(backend)
    try:
        first = json.loads((folder / "modules.json").read_text(encoding="utf-8"))[0]["type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelFolderError(
            "not an exported folder",
            where=str(folder),
            expected="a model/ folder",
            fix="write one with llm2comp export",
        ) from error
    try:
        model: SentenceTransformer = SentenceTransformer._load_with_module_classes(
            str(folder),
            {first: CompiledTransformer},
            device="cpu",
            local_files_only=True,
            backend=backend,
        )
        golden_vectors(model, ["a trial: some damage shows only here"])
        return model
    except ModelFolderError:
        raise
    except Exception as error:  # what libraries raise on a broken file has no common base
        raise cannot_be_loaded(folder, _reason(error)) from error


def compiled_of(model: SentenceTransformer) -> Compiled | None:
    """What runs in the place of a loaded model's torch model; None: torch does."""
    graph = getattr(model[0], "model", None)
    return graph.compiled if isinstance(graph, Graph) else None


def _open(folder: Path, config: Any, runtime: Runtime) -> Graph:
    """The graph in a folder that `compile_folder` wrote, once its files are found unchanged."""
    fix = f"write it again: llm2comp export, or compile_folder(..., {runtime.name!r})"
    try:
        facts = json.loads((folder / GRAPH_FILE).read_text(encoding="utf-8"))
        version, precision, files = (
            facts["format_version"],
            str(facts["precision"]),
            dict(facts["files"]),
        )
    except FileNotFoundError as error:
        raise ModelFolderError(
            "holds no compiled graph", where=str(folder), expected=GRAPH_FILE, fix=fix
        ) from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelFolderError(
            f"cannot be read: {_reason(error)}", where=str(folder / GRAPH_FILE), fix=fix
        ) from error
    if version != FORMAT_VERSION or precision not in runtime.precisions:
        raise ModelFolderError(
            "unknown format",
            where=str(folder / GRAPH_FILE),
            found=f"{version}, {precision}",
            fix=fix,
        )
    for name, digest in files.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ModelFolderError("is missing or damaged", where=str(folder / name), fix=fix)
    try:
        run = runtime.open(folder, precision, torch.get_num_threads())
    except Exception as error:
        raise ModelFolderError(
            f"cannot be loaded: {_reason(error)}", where=str(folder), fix=fix
        ) from error
    return Graph(config, run, Compiled(runtime.name, precision, ":".join(files.values())))


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__
