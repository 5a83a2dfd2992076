"""Stage 1: objectives that make memory states stand in for a text, and those that train a text's own states."""

from llm2comp.pretext.from_text import mask_token_id
from llm2comp.pretext.objectives import (
    ALIGNMENT,
    DEFAULT_WEIGHTING,
    FROM_MEMORY,
    FROM_TEXT,
    OBJECTIVES,
    count_items,
    pretext_loss,
)

__all__ = [
    "ALIGNMENT",
    "DEFAULT_WEIGHTING",
    "FROM_MEMORY",
    "FROM_TEXT",
    "OBJECTIVES",
    "count_items",
    "mask_token_id",
    "pretext_loss",
]
