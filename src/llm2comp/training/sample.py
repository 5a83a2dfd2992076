"""The fixed sample of texts and pairs that a run is watched on, and its figures."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor

from llm2comp.data.loaded import Pair
from llm2comp.data.sources import read_pairs, read_texts
from llm2comp.errors import RunError
from llm2comp.measures.collapse import collapse
from llm2comp.measures.context import context_recovered, split_sample
from llm2comp.measures.geometry import alignment
from llm2comp.model.compressor import Compressor
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.vectors import memory_states
from llm2comp.recipe import PretextStage, Recipe, TextData, UclStage, WatchSettings

# Rows read to draw the sample from.
POOL = 8192
# Shorter texts of a stage's own sources are left out: headings and the like.
MIN_CHARACTERS = 20


class LocalScores(Protocol):
    """Scores an encoder on local sets: their names, and name → score, 0 to 1."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sets."""

    def __call__(self, model: SentenceTransformer) -> dict[str, float]:
        """Name → score."""


# From folders of local sets; handed in from above, as training knows nothing of mteb.
LocalSets: TypeAlias = Callable[[Sequence[Path]], LocalScores]


class Watch:
    """The fixed sample of a run, and what it shows at any moment.

    Raises:
        DataError: a source of the sample cannot be read. RecipeError: `keep_best` names no figure
            and no local set.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: WatchSettings,
        compressor: Compressor,
        local_sets: LocalSets | None = None,
    ) -> None:
        backbone = compressor.backbone
        self.settings = settings
        self.limit = compressor.max_tokens(settings.max_tokens)
        rows = backbone.tokenise(_sample_texts(recipe, settings), self.limit)
        self.rows = [row for row in rows if len(row) > 1]
        self.splits = split_sample(self.rows, backbone.pad_id, recipe.seed)
        self.pairs = _sample_pairs(recipe, settings)
        self.scores = local_scores(settings, local_sets)

    def measure(self, compressor: Compressor, prompt: bool) -> dict[str, Any]:
        """All figures of an encoder as it is now.

        `prompt`: anchors of pairs behind their instruction.

        Raises:
            DataError: an embedding is zero or not finite; names the row of the sample.
        """
        begin = time.monotonic()
        training = compressor.training
        compressor.eval()
        try:
            with unchanged_randomness():
                figures = self._figures(compressor, prompt)
        finally:
            compressor.train(training)
        rounded = {
            key: float(f"{value:.6g}") if isinstance(value, float) else value
            for key, value in figures.items()
        }
        return rounded | {"seconds": round(time.monotonic() - begin, 2)}

    def _figures(self, compressor: Compressor, prompt: bool) -> dict[str, Any]:
        memory_NKD = memory_states(compressor, self.rows)
        tokens_NKD = memory_NKD.numpy() if compressor.memory.count else None
        found = asdict(collapse(_embeddings(compressor, memory_NKD), tokens_NKD))
        found["context_recovered"] = context_recovered(compressor, self.splits)
        found["alignment"] = None
        if self.pairs:
            anchors = [
                (instruction if prompt else "") + pair.anchor for instruction, pair in self.pairs
            ]
            positives = [pair.positive for _, pair in self.pairs]
            rows = compressor.backbone.tokenise(anchors + positives, self.limit)
            both_ND = _embeddings(compressor, memory_states(compressor, rows))
            found["alignment"] = alignment(both_ND[: len(anchors)], both_ND[len(anchors) :])
        found["tasks"] = (
            self.scores(as_sentence_transformer(compressor, self.limit)) if self.scores else {}
        )
        return found


def local_scores(settings: WatchSettings, local_sets: LocalSets | None) -> LocalScores | None:
    """What scores the local sets that a watch names; None without any.

    Raises:
        DataError: a folder that holds none. RunError: nothing to score them with was handed in.
    """
    if not settings.tasks:
        return None
    if local_sets is None:
        fix = "train with llm2comp.train, or hand in llm2comp.lab.train.local_sets"
        raise RunError("nothing here scores local sets", where="watch.tasks", fix=fix)
    return local_sets([Path(folder).expanduser() for folder in settings.tasks])


def _embeddings(compressor: Compressor, memory_NKD: Tensor) -> NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(compressor.pool(memory_NKD).cpu().numpy())


@contextmanager
def unchanged_randomness() -> Iterator[None]:
    """All generators go on afterwards as if nothing had drawn from them inside."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _sample_texts(recipe: Recipe, settings: WatchSettings) -> list[str]:
    """Texts drawn from the watch's own sources.

    Else those of the first stage that reads texts, or the pairs' positives.
    """
    specs: Sequence[TextData] = settings.data
    for stage in recipe.stages.values():
        if not specs and isinstance(stage, PretextStage | UclStage):
            specs = stage.data
    if specs:
        texts = [text for spec in specs for text in read_texts(_at_most(spec)).rows]
    else:
        assert recipe.scl is not None
        texts = [
            pair.positive for spec in recipe.scl.data for pair in read_pairs(_at_most(spec)).rows
        ]
    least = 0 if settings.data else MIN_CHARACTERS
    usable = list(dict.fromkeys(text for text in texts if len(text) >= least)) or list(
        dict.fromkeys(texts)
    )
    return random.Random(recipe.seed).sample(usable, min(settings.texts, len(usable)))


def _sample_pairs(recipe: Recipe, settings: WatchSettings) -> list[tuple[str, Pair]]:
    """(what stands before the anchor in SCL, pair), none without a source of pairs."""
    specs = settings.pairs or (recipe.scl.data if recipe.scl else ())
    found = []
    for spec in specs:
        prompt = recipe.scl.prompt_of(spec) if recipe.scl else ""
        found += [(prompt, pair) for pair in read_pairs(_at_most(spec)).rows]
    return random.Random(recipe.seed).sample(found, min(settings.texts, len(found)))


def _at_most(spec: Any) -> Any:
    return spec.model_copy(update={"limit": min(POOL, spec.limit or POOL)})
