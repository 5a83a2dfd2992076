"""Stage 1's objectives as a recipe sees them: one row each. No torch here, as in all recipes.

The file of a row's name in `llm2comp.objectives` holds the loss: `loss`, and `positions`, what a
mean over positions runs over. To add an objective, write such a file and a row here.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

# Mean over a text's positions and then over texts, or over all positions of all texts.
Weighting = Literal["sample_mean", "token_mean"]
# memory      the memory states, which a gradient reaches; without it the text's own states learn
# decoder     the frozen decoder behind these states
# responses   data with a response to each text (`data.response`)
# teacher     a teacher's embedding of each response
# masks       masked tokens (`mask_rate`, `mask_token`, `mask_replacement`)
# prompts     prompts around each context (`bag_prompts`), for which there must be room
Need = Literal["memory", "decoder", "responses", "teacher", "masks", "prompts"]


@dataclass(frozen=True)
class ObjectiveRow:
    """What is known of an objective before anything is computed; `mean` is the release's."""

    about: str
    mean: Weighting
    needs: Set[Need]


INTO_MEMORY = "The model learns to put a text into its memory tokens, so that a frozen copy "
OBJECTIVES = {
    "ctkd": ObjectiveRow(
        f"{INTO_MEMORY}goes on as if it had read the text.", "sample_mean", {"memory", "decoder"}
    ),
    "continuation": ObjectiveRow(
        f"{INTO_MEMORY}of itself can continue it.", "token_mean", {"memory", "decoder"}
    ),
    "reconstruction": ObjectiveRow(
        f"{INTO_MEMORY}of itself can repeat it.", "token_mean", {"memory", "decoder"}
    ),
    "response": ObjectiveRow(
        f"{INTO_MEMORY}gives its own response to it.",
        "token_mean",
        {"memory", "decoder", "responses"},
    ),
    "alignment": ObjectiveRow(
        "The text's embedding is drawn to a teacher's embedding of the model's response.",
        "sample_mean",
        {"memory", "responses", "teacher"},
    ),
    "mntp": ObjectiveRow(
        "Some tokens of a text are hidden; the state before each must tell which it was "
        "(masked next token prediction).",
        "token_mean",
        {"masks"},
    ),
    "ebae_ebar": ObjectiveRow(
        "One state must tell the tokens of the text, and one those of what comes next (Llama2Vec).",
        "sample_mean",
        {"prompts"},
    ),
}
if TYPE_CHECKING:
    ObjectiveName = str  # a type checker cannot read the names from the table
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]
