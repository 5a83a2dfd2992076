"""What other engines can compute exactly of an encoder, and how its folder is written for them.

sentence-transformers weighs the memory tokens (WordWeights). Other engines know no such module;
what all of them know is last-token pooling. It is exact where the last memory state is the whole
embedding: one memory token, all weights on the last one, or a nested encoder whose last state was
trained to stand alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights

from llm2comp.errors import ModelFolderError
from llm2comp.model.compressor import Compressor
from llm2comp.model.memory import prefix_weights
from llm2comp.system.console import Engine, MemoryPooling
from llm2comp.system.files import to_json, write_text

# Keys of a pooling config before sentence-transformers 5.4: text-embeddings-inference 1.9 reads
# these alone, and refuses a folder without the first two.
OLD_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@dataclass(frozen=True)
class Limits:
    """What an engine can compute, as its source says (docs/clients.md).

    Args:
        families: of LMs, with attention both ways and causal.
        rope: kinds of positions.
        more: whether it can also average a text's tokens, put a prompt around them, project.
    """

    families: tuple[str, ...]
    rope: tuple[str, ...]
    more: bool = True


_PLAIN = ("llama", "mistral", "qwen2", "qwen3")
LIMITS: dict[Engine, Limits] = {
    "tei": Limits(_PLAIN, ("default",)),
    "vllm": Limits(_PLAIN, ("default", "llama3", "linear", "yarn")),
    "llama.cpp": Limits((*_PLAIN, "gemma", "gemma3_text"), ("default", "llama3"), more=False),
}


def refuse_unfit(compressor: Compressor, engine: Engine, longest: int) -> None:
    """Raise ModelFolderError unless an engine computes exactly what an encoder does as it stands.

    `longest`: positions of its longest input.
    """
    if (limits := LIMITS.get(engine)) is None:
        return
    config: Any = compressor.backbone.config
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = {part["rope_type"] for part in ([rope] if "rope_type" in rope else rope.values())}
    window = getattr(config, "sliding_window", None) or longest
    one_sided = config.model_type == "gemma3_text" and compressor.backbone.attention == "causal"
    averaged = compressor.settings.pooling == "mean" and compressor.backbone.bos_id is None
    lacks = {
        f"the family {config.model_type!r}": config.model_type not in limits.families,
        f"positions of kind {', '.join(kinds)}": not kinds <= set(limits.rope),
        f"a window of {window} positions, and texts of {longest}": window < longest
        and not one_sided,
        f"a weighted mean of {compressor.states} states, which needs WordWeights": not (
            compressor.last_alone or averaged and limits.more
        ),
        "a projection": compressor.projection is not None and not limits.more,
        "no memory token behind the text": not compressor.memory.count and not limits.more,
    }
    if reasons := [reason for reason, lacking in lacks.items() if lacking]:
        raise ModelFolderError(
            f"cannot be computed exactly by {engine}",
            where=f"export for {engine}",
            expected=f"one of {', '.join(limits.families)}, read by its last memory token: one "
            "token, or memory.nested with 1",
            found="; ".join(reasons),
            fix="export for sentence-transformers, or train such an encoder",
        )


@contextlib.contextmanager
def read_as(compressor: Compressor, pooling: MemoryPooling | None) -> Iterator[None]:
    """Let an encoder's embedding be its last memory state for a while, or what it was.

    Args:
        compressor: the encoder proper; its weights are as before at the end.
        pooling: `last`, or `mean` (the stored weights); None: `last` where the last state was
            trained to stand alone and nobody chose other weights.

    Raises:
        ModelFolderError: `last` of an encoder whose last state was not trained to stand alone.
    """
    weights_K = compressor.get_buffer("weights_K")
    stored_K = weights_K.clone()
    has_memory = compressor.settings.pooling == "memory"
    nested = has_memory and compressor.prefixes[0] == 1 and compressor.order == "last"
    chosen = stored_K.unique().numel() > 1
    if pooling == "last" and not (nested or compressor.last_alone):
        raise ModelFolderError(
            "its last memory state alone was not trained to be an embedding",
            where="pooling last",
            expected="one memory token, memory.nested with 1, or all weights on the last token",
            found=f"{compressor.states} states, nested {list(compressor.prefixes[:-1])}, "
            f"from the {compressor.order}",
            fix="pooling mean"
            + "; num_memory=1 takes the last state all the same" * (compressor.order == "last"),
        )
    if pooling == "last" or (pooling is None and nested and not chosen):
        weights_K.copy_(prefix_weights(compressor.states, 1, "last"))
    try:
        yield
    finally:
        weights_K.copy_(stored_K)


def write_both_schemas(folder: Path) -> None:
    """Add the older keys to a folder's pooling config, so that older readers find their mode.

    Not beside WordWeights: a reader that knows no such module would average all tokens, and must
    stop instead.
    """
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    if Pooling.__name__ not in kinds or WordWeights.__name__ in kinds:
        return
    file = folder / kinds[Pooling.__name__] / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    old = {key: config["pooling_mode"] == name for name, key in OLD_KEYS.items()}
    write_text(file, to_json(config | old, indent=2))
