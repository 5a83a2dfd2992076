"""All our errors.

A message says what is wrong and, if known, where, what was expected, what was found, what to do.
"""

from __future__ import annotations

import json
from importlib.metadata import distribution
from urllib.parse import unquote, urlsplit

# Extra → what it is for, and the modules it brings.
EXTRAS = {
    "lab": ("judging encoders", "bm25s jinja2 matplotlib mteb"),
    "search": ("reading and searching documents", "docx lancedb lxml pypdfium2 trafilatura"),
    "ray": ("embedding on a cluster", "ray"),
    "serve": ("serving encoders", "fastapi orjson prometheus_client uvicorn"),
}


def one_line(what: object, most: int = 300) -> str:
    """Another library's error message as one line, cut to a maximum length."""
    return " ".join(str(what).split())[:most]


def install_extra(name: str) -> str:
    """The pip command that installs an extra (`lab`, `openvino`, ...) from our own source."""
    # PEP 610; none: from an index
    origin = json.loads(distribution("llm2comp").read_text("direct_url.json") or "{}")
    url, editable = origin.get("url", ""), origin.get("dir_info", {}).get("editable", False)
    if url.startswith("file:"):
        return f"pip install {'-e ' * editable}'{unquote(urlsplit(url).path)}[{name}]'"
    vcs = f"{origin['vcs_info']['vcs']}+" if "vcs_info" in origin else ""
    return f"pip install 'llm2comp[{name}]{f' @ {vcs}{url}' if url else ''}'"


def missing_extra(error: ModuleNotFoundError) -> RunError | None:
    """What to install where an import needs an extra; None: another module is missing."""
    package = (error.name or "").partition(".")[0]
    for extra, (purpose, modules) in EXTRAS.items():
        if package in modules.split():
            return RunError(f"{package} is not installed", where=purpose, fix=install_extra(extra))
    return None


class Llm2CompError(Exception):
    """Base of all errors that a user can cause or fix.

    The command line prints them without a traceback.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.where, self.expected, self.found, self.fix = (
            problem,
            where,
            expected,
            found,
            fix,
        )
        lines = [f"{where}: {problem}" if where else problem]
        lines += [
            f"  {name}: {value}"
            for name, value in (("expected", expected), ("found", found))
            if value is not None
        ]
        if fix:
            lines.append(f"  to do: {fix}")
        super().__init__("\n".join(lines))


class RecipeError(Llm2CompError):
    """A recipe that cannot be read, or whose settings contradict each other or the backbone."""


class DataError(Llm2CompError):
    """Texts or pairs that are missing, unreadable, or unfit for the stage that asked for them."""


class BackboneError(Llm2CompError):
    """A causal language model that cannot be loaded or cannot do what the method needs of it."""


class RunError(Llm2CompError):
    """A run directory that does not fit the recipe, or a stage that could not be finished."""


class ModelFolderError(Llm2CompError):
    """A saved encoder that is missing, incomplete, or gives other embeddings than it gave."""
