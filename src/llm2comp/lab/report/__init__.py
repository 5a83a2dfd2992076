"""`llm2comp report`: one self-contained HTML page about one or several training runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from llm2comp.errors import RunError
from llm2comp.lab.report.comparison import comparison_part, published_section
from llm2comp.lab.report.reading import RunLog, read_log
from llm2comp.lab.report.sections import run_part
from llm2comp.system.files import write_text
from llm2comp.system.folders import refuse_output

__all__ = ["page", "report"]
# Either is at the head of each page that was ever written.
PAGE_MARKS = (b'<meta name="generator" content="llm2comp">', b": training report</title>")


def report(runs: Sequence[Path], out: Path) -> Path:
    """Write a page about run folders; it needs no network and no other file. Returns `out`.

    Raises:
        RunError: no run, one given twice, a folder that is no run, a damaged file (and line); `out`
            is another's file, or cannot be written.
        RecipeError: a run's recipe.yaml is damaged.
    """
    refuse_output(out, (), _is_page)
    write_text(out, page(runs))
    return out


def _is_page(file: Path) -> bool:
    """Whether a file is an earlier report."""
    with file.open("rb") as stream:
        head = stream.read(4096)
    return any(mark in head for mark in PAGE_MARKS)


def page(runs: Sequence[Path]) -> str:
    """The page as text; the same folders give the same page. Raises as `report` does."""
    logs = _read_logs([Path(run) for run in runs])
    parts = [comparison_part(logs)] if len(logs) > 1 else []
    parts += [run_part(log, f"run{number}") for number, log in enumerate(logs, 1)]
    templates = Environment(
        loader=PackageLoader("llm2comp.lab.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    names = [log.label for log in logs]
    return templates.get_template("page.html.j2").render(
        names=names, parts=parts, published=published_section()
    )


def _read_logs(folders: Sequence[Path]) -> list[RunLog]:
    if not folders:
        raise RunError("no run to report", expected="one run folder or more")
    places = [folder.resolve() for folder in folders]
    for place, count in Counter(places).items():
        if count > 1:
            raise RunError("the same run is given more than once", where=str(place))
    names = Counter(place.name for place in places)
    labels = [
        place.name if names[place.name] == 1 else str(folder)
        for place, folder in zip(places, folders, strict=True)
    ]
    return [read_log(folder, label) for folder, label in zip(folders, labels, strict=True)]
