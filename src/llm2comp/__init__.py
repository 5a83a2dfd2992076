"""LLM2Comp: turn a causal language model into a text encoder by context compression.

    model = llm2comp.load()                    # a SentenceTransformer: the encoder in the package
    model.encode(["a text"])
    run = llm2comp.train("recipes/tiny.yaml")  # → path of the run; llm2comp.load(run)

The names in `__all__` are the public ones. Each is imported when it is first asked for, so that
`import llm2comp` takes no time; what else the package holds may change from version to version.

load, train                       whatever names an encoder → SentenceTransformer · a recipe → a run
adapt                             own documents, no labels → a run, and whether to use it (`lab`)
embed_texts, memory_states        texts → one vector each · → their memory states
embed, EmbedOptions               files of millions of texts → a folder of shards
maxsim                            memory states of queries and documents → scores
Index                             documents → answers, by words and meaning (extra `search`)
export, verify                    an encoder → a plain sentence-transformers folder · is it sound?
verify_url                        does a running server give a folder's embeddings?
compile_folder, reweight          its graph for CPUs · other weights of its memory tokens
baseline                          an untrained LM as an encoder, to compare with
evaluate, EvaluateOptions         models × tasks → scores (extra `lab`)
analyze                           a model and texts → why it is good, or not (extra `lab`)
Recipe, load_recipe               what to train, as a value
Backbone, load_backbone, Compressor   the frozen LM, and what makes memory states with it
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm2comp.lab.adapt import adapt
    from llm2comp.lab.analyze import analyze
    from llm2comp.lab.evaluation.evaluate import EvaluateOptions, evaluate
    from llm2comp.lab.train import train
    from llm2comp.model.backbone import Backbone, load_backbone
    from llm2comp.model.baselines.module import baseline
    from llm2comp.model.compressor import Compressor
    from llm2comp.model.memory import maxsim
    from llm2comp.model.vectors import embed_texts
    from llm2comp.model.vectors import memory_vectors as memory_states
    from llm2comp.recipe import Recipe, load_recipe
    from llm2comp.storage.certificate import verify_url
    from llm2comp.storage.compiled import compile_folder
    from llm2comp.storage.export import export
    from llm2comp.storage.golden import verify
    from llm2comp.storage.loading import load
    from llm2comp.storage.reweighting import reweight
    from llm2comp.use.bulk import embed_files as embed
    from llm2comp.use.index.index import Index
    from llm2comp.use.shards import EmbedOptions

__version__ = version("llm2comp")
__all__ = [
    "Backbone",
    "Compressor",
    "EmbedOptions",
    "EvaluateOptions",
    "Index",
    "Recipe",
    "__version__",
    "adapt",
    "analyze",
    "baseline",
    "compile_folder",
    "embed",
    "embed_texts",
    "evaluate",
    "export",
    "load",
    "load_backbone",
    "load_recipe",
    "maxsim",
    "memory_states",
    "reweight",
    "train",
    "verify",
    "verify_url",
]

# Public name → where it is defined, and its name there if that is another.
_HOME = {
    "Backbone": "model.backbone",
    "Compressor": "model.compressor",
    "EmbedOptions": "use.shards",
    "EvaluateOptions": "lab.evaluation.evaluate",
    "Index": "use.index.index",
    "Recipe": "recipe",
    "adapt": "lab.adapt",
    "analyze": "lab.analyze",
    "baseline": "model.baselines.module",
    "compile_folder": "storage.compiled",
    "embed": "use.bulk:embed_files",
    "embed_texts": "model.vectors",
    "evaluate": "lab.evaluation.evaluate",
    "export": "storage.export",
    "load": "storage.loading",
    "load_backbone": "model.backbone",
    "load_recipe": "recipe",
    "maxsim": "model.memory",
    "memory_states": "model.vectors:memory_vectors",
    "reweight": "storage.reweighting",
    "train": "lab.train",
    "verify": "storage.golden",
    "verify_url": "storage.certificate",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, _, other = _HOME[name].partition(":")
    try:
        module = import_module(f"{__name__}.{home}")
    except ModuleNotFoundError as error:
        from llm2comp.errors import missing_extra

        raise missing_extra(error) or error from error
    found = getattr(module, other or name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet."""
    return sorted(__all__)
