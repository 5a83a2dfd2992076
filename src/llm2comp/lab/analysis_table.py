"""An analysis in words: its figures as a table, its readouts as lines."""

from __future__ import annotations

from rich.table import Table

from llm2comp.lab.analyze import Analysis


def table(found: Analysis) -> Table:
    """The figures in words."""
    shown = Table(
        "figure", "value", "how to read it", title=f"{found.model}: {found.collapse.texts:,} texts"
    )
    dimensions = found.collapse.dimensions
    told = {
        "effective_rank": f"directions in use, of {dimensions:,}",
        "participation_ratio": f"the same by variance, of {dimensions:,}",
        "above_one_percent": "directions with 1 % or more of the largest one's variance",
        "uniformity": "the lower, the more evenly texts are spread (0 = all the same)",
        "anisotropy": "mean cosine of random texts (0 = no common direction)",
        "alignment": "squared distance of related texts (0 = the same)",
        "context_recovered": "share of the context's effect on the LM that the memory carries (1 "
        "= all)",
    }
    for key, meaning in told.items():
        value = found.figures.get(key)
        shown.add_row(
            key.replace("_", " "),
            "withheld" if value is None else f"{value:.4g}",
            found.withheld.get(key, meaning),
        )
    quantiles = found.scores["random"]
    shown.add_row(
        "random pairs",
        f"{quantiles[50]:.3f}",
        f"half of them score less; 1 % score {quantiles[99]:.3f} or more",
    )
    if found.scores["related"]:
        share = 100 * (found.scores["related_above"] or 0)
        shown.add_row(
            "related pairs",
            f"{found.scores['related'][50]:.3f}",
            f"{share:.0f} % of them score more than that 1 %",
        )
    if found.clusters is not None:
        shown.add_row(
            "memory clusters",
            f"{max(found.clusters) + 1}",
            f"of {len(found.clusters)} tokens: {found.clusters}",
        )
    return shown


def readout_lines(found: Analysis) -> list[str]:
    """Readouts as plain lines."""
    lines = []
    for readout in found.readouts:
        lines += ["", f"text: {_one_line(readout.text)}"]
        lines += [
            f"  memory token {i}: {_one_line(' '.join(words))}"
            for i, words in enumerate(readout.words)
        ]
        lines += [f"  the LM goes on from the text: {_one_line(readout.from_text)}"]
        lines += [f"  from the memory alone: {_one_line(readout.from_memory)}"]
    return lines


def _one_line(text: str) -> str:
    line = " ".join(
        "".join(character if character.isprintable() else " " for character in text).split()
    )
    return line if len(line) <= 160 else line[:157] + "..."
