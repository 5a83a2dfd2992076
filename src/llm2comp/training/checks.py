"""All that can be known before anything trains: `train`, `--dry-run` and studies ask the same
`check`.

Nothing is written, and of the model only configuration and tokenizer are read; of the data as much
as shows that they suffice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from llm2comp.data.pretext import token_rows
from llm2comp.data.sources import iterate_sources, read_pairs, read_responses, read_texts
from llm2comp.errors import BackboneError, RecipeError
from llm2comp.model.backbone import KINDS, resolve_device
from llm2comp.model.backbone.families import attention_dropouts, starting_token
from llm2comp.model.backbone.loading import load_skeleton, load_tokenizer
from llm2comp.model.backbone.naming import require_weights
from llm2comp.model.backbone.quantized import quantization_config
from llm2comp.model.encoder import refuse_long_prompt
from llm2comp.model.judges import load_judges
from llm2comp.model.tokens import room_for_text
from llm2comp.objectives.mntp import mask_token_id
from llm2comp.recipe import (
    ContrastiveStage,
    PairData,
    PretextStage,
    Recipe,
    SclStage,
    Stage,
    TextData,
    UclStage,
)
from llm2comp.recipe.parts import TEXT
from llm2comp.runs.starting import check_start
from llm2comp.training.batches import enough, most_in_a_batch
from llm2comp.training.sample import LocalSets
from llm2comp.training.watch import check_watch

LEAST_ROWS = 2  # of different ones: one text is like nothing, and tells nothing apart


def check(recipe: Recipe, local_sets: LocalSets | None = None, run: Path | None = None) -> None:
    """Find before training what some stage would stumble over; `local_sets` as in `run.train`.

    `run`: its directory, if there is one.

    Raises:
        RecipeError: settings that the model cannot go with: dimensions, prompts without room,
            loggers that are not here; a teacher or guide that cannot be loaded or gives no
            embeddings; a start that it cannot go on from.
        BackboneError: no such model or device, no causal LM; what an objective or a stage asks of
            it and it lacks.
        DataError: a missing file or column, too few texts or pairs.
    """
    check_data(recipe, local_sets)
    check_start(recipe, run)
    known = _Known(recipe)
    for name, stage in recipe.stages.items():
        known.check_stage(name, stage)
    for name, stage in recipe.stages.items():
        check_rows(name, stage, known)
    if recipe.watch is not None and recipe.watch.data:
        enough("watch", _different(iterate_sources(recipe.watch.data, lambda _: None)))
    if recipe.scl is not None:
        load_judges(recipe.scl, "cpu")
    _check_loggers(recipe)


def check_data(recipe: Recipe, local_sets: LocalSets | None = None) -> None:
    """Find a missing file or column of any stage: reads a row of each source."""
    for stage in recipe.stages.values():
        specs: tuple[TextData | PairData, ...] = stage.data  # type: ignore[attr-defined]
        for spec in specs:
            first = spec.model_copy(update={"limit": 1})
            if isinstance(stage, PretextStage) and stage.needs_responses:
                read_responses(first, teacher="teacher" in stage.needs)  # type: ignore[arg-type]
            else:
                read_pairs(first) if isinstance(first, PairData) else read_texts(first)
    check_watch(recipe, local_sets)


class _Known:
    """What configuration and tokenizer tell about a recipe's model."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.name = recipe, recipe.model.name
        resolve_device(recipe.model.device)
        if recipe.model.quantization:
            quantization_config(recipe.model.quantization, torch.float32)
        self.lm, self.tokenizer = load_skeleton(recipe.model), load_tokenizer(recipe.model)
        require_weights(self.name)
        self.positions: int | None = getattr(self.lm.config, "max_position_embeddings", None)
        self.bos_id = starting_token(self.tokenizer, recipe.model.bos, self.name)
        self.added = recipe.memory_tokens + self.tokens(recipe.encoder.prompt.replace(TEXT, ""))
        self.room(8)
        self.dropouts = bool(attention_dropouts(self.lm))
        hidden = int(self.lm.get_input_embeddings().weight.shape[1])
        projection = recipe.encoder.projection
        self.width = projection if isinstance(projection, int) else hidden
        with torch.device("meta"):
            KINDS[recipe.adapter.kind](self.lm, self.name).add("check", recipe.adapter)

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """As `Backbone.tokenise`."""
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [([] if self.bos_id is None else [self.bos_id]) + list(row) for row in rows]

    def tokens(self, prompt: str) -> int:
        """Tokens of a prompt, without BOS."""
        return len(self.tokenise([prompt])[0]) - int(self.bos_id is not None)

    def room(self, asked: int, more: int = 0) -> int:
        """As `Compressor.max_tokens`."""
        return room_for_text(self.positions, self.added + more, asked)

    def check_stage(self, name: str, stage: Stage) -> None:
        """What a stage's settings ask of the model."""
        if stage.attention_dropout > 0 and not self.dropouts:
            fix = f"set {name}.attention_dropout: 0"
            raise BackboneError("has no attention dropout", where=self.name, fix=fix)
        dims = stage.matryoshka_dims if isinstance(stage, ContrastiveStage) else ()
        if too_wide := [dim for dim in dims if dim > self.width]:
            where, expected = f"{name}.matryoshka_dims", f"up to {self.width}"
            raise RecipeError(
                "more dimensions than the model has", where=where, expected=expected, found=too_wide
            )
        if isinstance(stage, SclStage):
            limit = self.room(stage.query_max_tokens)
            for number, spec in enumerate(stage.data):
                if prompt := stage.prompt_of(spec):
                    tokens = len(self.tokenise([prompt])[0])
                    refuse_long_prompt(prompt, tokens, limit, f"scl.data.{number}.instruction")
        if isinstance(stage, PretextStage):
            self._check_objectives(stage)

    def _check_objectives(self, stage: PretextStage) -> None:
        if "masks" in stage.needs:
            mask_token_id(self.tokenizer, stage.mask_token, self.name)
        if self.limit(stage) < 2 * stage.site_margin_tokens and not stage.needs_responses:
            raise RecipeError(
                "no split site exists in the longest text that fits the model",
                where="pretext.site_margin_tokens",
                expected=f"{self.limit(stage) // 2} or less",
                found=stage.site_margin_tokens,
            )

    def limit(self, stage: PretextStage) -> int:
        """Longest text of stage 1."""
        texts = (prompt.replace(TEXT, "") for prompt in stage.prompts)
        longest = max((self.tokens(text) for text in texts), default=0)
        return room_for_text(self.positions, longest, self.room(stage.max_tokens))


def check_rows(name: str, stage: Stage, known: _Known) -> None:
    """Whether a stage's data hold two different rows at least.

    Raises DataError; reads no further than needed.
    """
    if isinstance(stage, SclStage):
        pairs = [pair for spec in stage.data for pair in read_pairs(spec).rows]
        enough(name, most_in_a_batch(pairs))
    elif isinstance(stage, UclStage):
        enough(
            name, _different(text for text in _texts(stage) if len(text) >= stage.min_characters)
        )
    elif isinstance(stage, PretextStage) and not stage.needs_responses:
        limits = (stage, known.tokenise, known.limit(stage), known.bos_id)
        token_rows(_texts(stage), *limits, keep=lambda rows: _two(name, rows))


def _texts(stage: PretextStage | UclStage) -> Iterable[str]:
    return iterate_sources(stage.data, lambda _: None)


def _different(items: Iterable[Any]) -> int:
    """How many different ones there are, counted no further than needed."""
    seen: set[Any] = set()
    for item in items:
        seen.add(item)
        if len(seen) == LEAST_ROWS:
            break
    return len(seen)


def _two(name: str, rows: Iterable[Any]) -> Sequence[Any]:
    found = _different(row.tobytes() for row in rows)
    if found:
        enough(name, found)
    return range(found)


def _check_loggers(recipe: Recipe) -> None:
    for name in recipe.report_to:
        try:
            for logger in get_reporting_integration_callbacks([name]):
                logger()
        except (ValueError, ImportError, RuntimeError) as error:
            raise RecipeError(
                f"cannot be logged to: {error}", where="report_to", found=name
            ) from error
