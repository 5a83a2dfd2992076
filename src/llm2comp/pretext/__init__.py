"""Stage 1: objectives that make memory states stand in for a text."""

from llm2comp.pretext.objectives import DEFAULT_WEIGHTING, OBJECTIVES, continuation, count_items, ctkd, pretext_loss

__all__ = ["DEFAULT_WEIGHTING", "OBJECTIVES", "continuation", "count_items", "ctkd", "pretext_loss"]
