"""What the page says about its figures, and about what a run trained."""

from __future__ import annotations

from collections.abc import Callable

from llm2comp.lab.report.reading import RunLog, WatchLine
from llm2comp.recipe import Recipe
from llm2comp.recipe.objectives import OBJECTIVES

# Figures of the watch as a table's columns: title → value.
FIGURES: dict[str, Callable[[WatchLine], float | None]] = {
    "effective rank": lambda w: w.effective_rank,
    "participation ratio": lambda w: w.participation_ratio,
    "context recovered": lambda w: w.context_recovered,
    "uniformity": lambda w: w.uniformity,
    "alignment": lambda w: w.alignment,
    "anisotropy": lambda w: w.anisotropy,
}


# Plots of the watch: title, which figures share it, how to read it.
WATCH_PLOTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "Effective rank",
        ("effective rank", "participation ratio"),
        "About how many independent directions the embeddings use: higher is richer, a "
        "fall towards 1 is collapse.",
    ),
    (
        "Context recovered",
        ("context recovered",),
        "How much of a text's effect on the language model survives in the memory "
        "tokens: 1 is all of it, 0 is none; below 0: "
        "the memory misleads the LM, as memory does that is not trained.",
    ),
    (
        "Uniformity and alignment",
        ("uniformity", "alignment"),
        "Lower is better for both: uniformity falls as texts spread out, alignment as "
        "texts that belong together come closer.",
    ),
    (
        "Anisotropy",
        ("anisotropy",),
        "The mean cosine of texts that have nothing to do with each other: near 0 is "
        "good, near 1 all embeddings look alike.",
    ),
)


ABOUT = {
    **{name: row.about for name, row in OBJECTIVES.items()},
    "ucl": "Each text is read twice, with random differences; its two embeddings are pulled "
    "together, others away.",
    "scl": "Queries are pulled to the texts that answer them, and away from the other texts of "
    "the batch.",
}


LOSS = {
    "pretext": "Lower is better: how far the language model is from the right continuation with "
    "the memory tokens alone.",
    "ucl": "Lower is better: how hard it still is to tell a text's second view from the other "
    "texts of the batch.",
    "scl": "Lower is better: how hard it still is to tell a query's text from the other texts "
    "of the batch.",
}


TASKS = "Scores on evaluation sets while the stage trained, times 100: higher is better."


RANKS = (
    "The effective rank in the first table is that of all held-out documents; elsewhere "
    "on this page it is that of the watch's "
    "few texts. More texts fill more directions, so compare it within a table only."
)


HEATMAP = (
    "Mean cosine of each two memory tokens: bright squares off the diagonal are tokens that "
    "carry the same."
)


SPECTRUM = (
    "How much the embeddings spread along each direction: a slow decline uses many, a "
    "cliff means that the rest collapsed."
)


def sentence(run: RunLog) -> str:
    """One sentence: which model was trained on which data."""
    stages = ", then ".join(stage.title for stage in run.stages)
    tokens = run.recipe.memory.tokens
    return (
        f"{run.recipe.model.name} as a text encoder with {tokens} memory "
        f"token{'s'[: tokens != 1]}, trained by {stages}."
    )


def adapter_of(recipe: Recipe) -> str:
    """What learned beside the memory tokens."""
    settings = recipe.adapter
    if settings.kind == "none":
        return "nothing"
    return (
        "all layers of a copy"
        if settings.kind == "full"
        else f"LoRA, rank {settings.rank}, alpha {settings.alpha:g}"
    )
