"""What a stage trains on: the texts, responses and pairs of its sources, as rows in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llm2comp.data.loaded import Pair, Response
from llm2comp.data.pretext import Masking, PretextRows
from llm2comp.data.response_rows import ResponseRows, response_rows
from llm2comp.data.sources import iterate_sources, read_pairs, read_responses
from llm2comp.data.store import stored_rows
from llm2comp.errors import DataError
from llm2comp.model.backbone import Backbone
from llm2comp.model.compressor import Compressor
from llm2comp.model.tokens import room_for_text
from llm2comp.objectives.mntp import mask_token_id
from llm2comp.recipe import PairData, PretextStage, SclStage, TextData
from llm2comp.system.console import say


def load_texts(specs: Sequence[TextData]) -> Iterator[str]:
    """Texts of a stage one by one, with a line per source: what was read and what left out."""
    return iterate_sources(specs, say)


def load_responses(stage: PretextStage) -> list[Response]:
    """All texts of a stage with their responses, and the teacher's embeddings if it aligns."""
    found: list[Response] = []
    for spec in stage.data:
        loaded = read_responses(spec, teacher="teacher" in stage.needs)
        say(loaded.summary())
        found += loaded.rows
    widths = sorted({len(given.teacher_D) for given in found if given.teacher_D is not None})
    if len(widths) > 1:
        raise DataError(
            "teachers of several widths",
            where="pretext.data",
            found=widths,
            fix="embed all responses by one",
        )
    return found


def load_queries(stage: SclStage, spec: PairData) -> list[Pair]:
    """Pairs of one source, each query behind its instruction."""
    loaded = read_pairs(spec)
    say(loaded.summary())
    prompt = stage.prompt_of(spec)
    suffix = stage.query_suffix if spec.instruction else ""
    return [
        Pair(f"{prompt}{pair.anchor}{suffix}", pair.positive, pair.negatives)
        for pair in loaded.rows
    ]


def pretext_samples(
    compressor: Compressor, stage: PretextStage, samples: int, seed: int
) -> PretextRows:
    """So many samples of stage 1 in their fixed order. Raises DataError when no text is fit."""
    backbone = compressor.backbone
    max_tokens = compressor.max_tokens(stage.max_tokens)
    around = [sum(map(len, backbone.around(prompt))) for prompt in stage.prompts]
    max_tokens = room_for_text(backbone.max_positions, max(around, default=0), max_tokens)
    rows: Any
    limits = (stage, backbone.tokenise, max_tokens, backbone.bos_id)
    if stage.needs_responses:
        rows, left_out = response_rows(load_responses(stage), *limits)
    else:
        rows, left_out = stored_rows(*limits, backbone.tokenizer, say)
    reasons = "; left out: " * bool(left_out) + ", ".join(
        f"{count:,} {reason}" for reason, count in left_out.items()
    )
    say(f"stage 1: {len(rows):,} texts of up to {max_tokens} tokens{reasons}")
    together = stage.batch_size if stage.group_by_length else 1
    masks = masking(backbone, stage, seed) if "masks" in stage.needs else None
    if stage.needs_responses:
        return ResponseRows(rows, samples, seed, together, masks)
    return PretextRows(rows, samples, stage.site_margin_tokens, seed, together, masks)


def masking(backbone: Backbone, stage: PretextStage, seed: int) -> Masking:
    """The masks of MNTP. Raises BackboneError when the mask token is not one token."""
    mask_id = mask_token_id(backbone.tokenizer, stage.mask_token, backbone.name)
    return Masking(
        stage.mask_rate, mask_id, len(backbone.tokenizer), stage.mask_replacement == "bert", seed
    )
