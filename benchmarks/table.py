"""Raw measurements of a row → figures → table rows with targets, met or missed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.sides import Row, Target

MIB, GIB = 2**20, 2**30
COLUMNS = ("row", "side", "tokens/s", "ratio", "peak MiB", "memory ratio", "MFU", "target")
NAMES = {
    "ratio": "ratio",
    "memory": "memory ratio",
    "mfu": "MFU",
    "peak_gib": "peak GiB",
    "ms": "ms",
}


def figures(row: Row, times: dict[str, Any], peaks: dict[str, int]) -> dict[str, dict[str, float]]:
    """By side: `tokens_per_second`, `ms` (of one), `ratio` (median over rounds of the ratio within
    one), `mfu`, `peak_bytes`, `memory`.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in row.sides}
    rates = times.get("tokens_per_second", {})
    for name, of_side in rates.items():
        found[name]["tokens_per_second"] = median(of_side)
        found[name]["ms"] = 1000 / median(of_side)
        found[name]["ratio"] = median(a / b for a, b in zip(of_side, rates[row.base], strict=True))
        if used := times["mfu"][name]:
            found[name]["mfu"] = median(used)
    for name, peak in peaks.items():
        found[name] |= {"peak_bytes": peak, "peak_gib": peak / GIB}
        if row.base in peaks and peaks[row.base] > 0:
            found[name]["memory"] = peak / peaks[row.base]
    return found


def verdict(target: Target, of_side: dict[str, float], setting: str) -> str:
    """`ratio ≥ 1.8: met`; of another setting's target: not judged."""
    sign = {">=": "≥", "<=": "≤"}[target.sense]
    text = f"{NAMES[target.figure]} {sign} {target.limit:g}"
    if target.setting != setting:
        return f"{text} ({target.setting}): not judged"
    if target.figure not in of_side:
        return f"{text}: not measured"
    value = of_side[target.figure]
    met = value >= target.limit if target.sense == ">=" else value <= target.limit
    return f"{text}: {'met' if met else 'missed'}"


def cells(
    name: str, row: Row, found: dict[str, dict[str, float]], setting: str, like: str
) -> list[list[str]]:
    """Table rows of one row.

    `like`: the setting whose targets are shown where this one has none (cpu for quick).
    """
    lines = []
    shown = setting if any(target.setting == setting for target in row.targets) else like
    for side, of_side in found.items():
        targets = [t for t in row.targets if t.side == side and t.setting == shown]
        base = side == row.base
        lines.append(
            [
                name,
                f"{side} (base)" if base else side,
                _rate(of_side["tokens_per_second"]) if "tokens_per_second" in of_side else "",
                f"{of_side['ratio']:.2f}" if "ratio" in of_side and not base else "",
                f"{of_side['peak_bytes'] / MIB:,.1f}" if "peak_bytes" in of_side else "",
                f"{of_side['memory']:.2f}" if "memory" in of_side and not base else "",
                f"{of_side['mfu']:.0%}" if "mfu" in of_side else "",
                "; ".join(verdict(target, of_side, setting) for target in targets),
            ]
        )
    return lines


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.3g}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The table."""
    table = [COLUMNS, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    table.insert(1, ["-" * width for width in widths])
    padded = (
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in table
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
