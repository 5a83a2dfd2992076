"""`python -m benchmarks [--quick | --setting NAME | --device cuda] [--only ROW] [--out FOLDER]`:
JSON and a table.

1. every measurement runs in a process of its own (`worker.py`): a fork of one that has done all
   imports, which take longer than many a measurement; a fresh one where memory counts (a fork has
   not touched the libraries' pages) and on CUDA
2. per row: preparation, one process that times all sides in turns, then one process per side for
   its peak memory; of these alone two run at once, with half of the cores each
3. SETTING.json (all raw figures) and SETTING.md (the table) are written anew after every row; the
   table is printed at the end
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.rows import ROWS
from benchmarks.settings import SETTINGS
from benchmarks.table import cells, figures, markdown
from benchmarks.worker import ABOUT, PREPARE, measured, peaks_at_once
from llm2comp.system.console import say
from llm2comp.system.files import write_text

ROOT = Path(__file__).resolve().parents[1]


class Failed(Exception):  # noqa: N818
    """A measurement ended with an error; the message says why."""


def measure(
    setting: str, row: str, folder: Path, side: str | None = None, fresh: bool = False
) -> dict[str, Any]:
    """What one worker found. Raises Failed."""
    fork = (
        not fresh
        and SETTINGS[setting].device == "cpu"
        and "forkserver" in multiprocessing.get_all_start_methods()
    )
    context = multiprocessing.get_context("forkserver" if fork else "spawn")
    context.set_forkserver_preload(["benchmarks.worker"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        try:
            return process.submit(measured, setting, row, folder, side).result()
        except SystemExit as error:
            raise Failed(str(error)) from error
        except Exception as error:
            traceback.print_exception(error)
            raise Failed(f"{type(error).__name__}: {error}") from error


def measure_peaks(setting: str, row: str, folder: Path) -> dict[str, int]:
    """Peak memory of each side that the row names. Raises Failed."""
    with ThreadPoolExecutor(peaks_at_once(SETTINGS[setting])) as pool:
        found = pool.map(
            lambda side: measure(setting, row, folder, side, fresh=True), ROWS[row].memory
        )
        return {
            side: result["peak_bytes"] for side, result in zip(ROWS[row].memory, found, strict=True)
        }


def measure_row(setting: str, name: str, folder: Path) -> dict[str, Any]:
    """Raw figures of one row: times and peaks, or the error."""
    row, begin = ROWS[name], time.monotonic()
    result: dict[str, Any] = {"about": row.about, "base": row.base, "times": {}, "peaks": {}}
    try:
        # rows that are prepared in the same way share what that wrote
        if (
            row.prepare is not None
            and not (prepared := folder / f"{PREPARE}-{row.prepare.__name__}").exists()
        ):
            measure(setting, name, folder, PREPARE)
            prepared.touch()
        if row.timed:
            result["times"] = measure(setting, name, folder)
        result["peaks"] = measure_peaks(setting, name, folder)
    except Failed as error:
        result["error"] = str(error)
    result["seconds"] = round(time.monotonic() - begin, 1)
    return result


def report(setting: str, facts: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """The table with its head."""
    lines = []
    for name, result in results.items():
        if "error" in result:
            lines.append([name, "", "", "", "", "", "", f"error: {result['error']}"])
            continue
        found = figures(ROWS[name], result["times"], result["peaks"])
        result["figures"] = found
        lines += cells(
            name,
            ROWS[name],
            found,
            setting,
            "cpu" if SETTINGS[setting].device == "cpu" else "cuda-7b",
        )
    head = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if value is not None
    )
    note = SETTINGS[setting].note
    rounds = (
        f"Setting {setting}: medians of {SETTINGS[setting].pairs} interleaved "
        f"rounds{'; ' * bool(note)}{note}."
    )
    return f"{rounds}\n{head}\n\n{markdown(lines)}\n"


def run(setting: str, names: list[str], out: Path) -> bool:
    """Measure rows of one setting. Returns whether all of them ended well."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            facts = measure(setting, names[0], folder, ABOUT)
        except Failed as error:
            say(f"error: {error}")
            return False
        text = ""
        for name in names:
            results[name] = measure_row(setting, name, folder)
            say(f"{setting} {name}: {results[name]['seconds']} s {results[name].get('error', '')}")
            text = report(setting, facts, results)
            content = {
                "format_version": 1,
                "setting": setting,
                "environment": facts,
                "rows": results,
            }
            write_text(out / f"{setting}.json", json.dumps(content, indent=1))
            write_text(out / f"{setting}.md", text)
    print(text)
    return not any("error" in result for result in results.values())


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed and memory: docs/benchmarks.md"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model and three rounds: a check of the suite itself",
    )
    parser.add_argument(
        "--only", action="append", choices=tuple(ROWS), help="this row; may be given several times"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: shapes of 7B and 0.6B in bfloat16",
    )
    parser.add_argument(
        "--setting", choices=tuple(SETTINGS), help="this configuration alone, such as cpu-135m"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "benchmarks", help="folder of the results"
    )
    asked = parser.parse_args()
    if asked.quick and asked.device == "cuda":
        parser.error("--quick is for the CPU")
    on_device = [name for name, setting in SETTINGS.items() if setting.device == asked.device]
    usual = [
        name
        for name in on_device
        if not name.startswith("cpu-135m") and (name == "quick") == asked.quick
    ]
    settings = [asked.setting] if asked.setting else usual
    names = [name for name in ROWS if name in (asked.only or ROWS)]
    ended_well = [run(setting, names, asked.out) for setting in settings]
    if not all(ended_well):
        sys.exit(1)


if __name__ == "__main__":
    main()
