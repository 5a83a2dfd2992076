"""Stage 1: objectives that make memory states stand in for a text."""

from llm2comp.pretext.objectives import DEFAULT_WEIGHTING, OBJECTIVES, count_items, pretext_loss

__all__ = ["DEFAULT_WEIGHTING", "OBJECTIVES", "count_items", "pretext_loss"]
