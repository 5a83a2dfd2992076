"""Documentation of the standard library, read from its files and from modules written in C."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Literal, TypeAlias

Kind = Literal["topic", "module", "member"]


Doc: TypeAlias = tuple[str, Kind, str]  # qualified name, kind, raw documentation


_LEFT_OUT = {"test", "tests", "idle_test", "__pycache__", "pydoc_data"}


_SIGNATURE = re.compile(r"^[\w.]+\(.*\)\s*([-=]>\s*\S+(\s+\S+){0,3})?\.?$")


_C_MEMBERS = (  # no slot wrappers: their docs are the same on every type
    types.BuiltinFunctionType, types.MethodDescriptorType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType, staticmethod,
)  # fmt: skip


_INHERITED = {
    getattr(value, "__doc__", None) for owner in (object, type) for value in vars(owner).values()
}


@dataclass(frozen=True)
class Entry:
    """The documentation of one thing: first paragraph as one line, and the rest (may be empty)."""

    name: str
    summary: str
    body: str
    kind: Kind = "member"

    @property
    def text(self) -> str:
        """Summary, blank line, body."""
        return f"{self.summary}\n\n{self.body}" if self.body else self.summary


def normalise(text: str) -> str:
    """Lower case, white space collapsed: what decides whether two texts are the same."""
    return " ".join(text.lower().split())


def _topic_docs() -> Iterator[Doc]:
    """Topics of the language reference; none where a distribution leaves pydoc's data out."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in topics.items():
        yield f"topic:{name}", "topic", re.sub(r'(?m)^[*=\-~^"]{3,}$', "", text)  # no underlines


def _source_docs() -> Iterator[Doc]:
    """Docstrings of the library's Python files, without tests and files that do not parse."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, files in os.walk(root):
        # no site-packages
        subfolders[:] = [
            name for name in subfolders if name.isidentifier() and name not in _LEFT_OUT
        ]
        for file in (Path(folder, name) for name in files if name.endswith(".py")):
            try:
                with warnings.catch_warnings(action="ignore"):
                    tree = ast.parse(file.read_bytes())
            except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            module = _public(
                ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            )
            yield module, "module", ast.get_docstring(tree, clean=False) or ""
            yield from _docs_in(tree, module)


def _docs_in(node: ast.AST, prefix: str) -> Iterator[Doc]:
    """Docstrings of functions, classes and methods below a node.

    Those under `if` and `try` too, but not those inside functions.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{child.name}"
            yield name, "member", ast.get_docstring(child, clean=False) or ""
            if isinstance(child, ast.ClassDef):
                yield from _docs_in(child, name)
        elif isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _docs_in(child, prefix)


def _compiled_docs() -> Iterator[Doc]:
    """Docs of modules written in C with their functions, types and methods.

    Docs that any type or object has are left out.
    """
    for module in _compiled_modules():
        name = _public(module.__name__)
        yield name, "module", module.__doc__ or ""
        for path, item in _c_members(module):
            doc = getattr(item, "__doc__", None)
            if isinstance(doc, str) and doc != type(item).__doc__ and doc not in _INHERITED:
                yield f"{name}.{path}".removeprefix("builtins."), "member", doc


def _c_members(module: types.ModuleType) -> Iterator[tuple[str, object]]:
    """Functions and types of a module and the members of its types, by their path in it.

    Second names of builtins are left out.
    """
    for name, value in list(vars(module).items()):
        if isinstance(value, types.BuiltinFunctionType):
            yield name, value
        elif isinstance(value, type) and (
            value.__name__ == name or value.__module__ == module.__name__ != "builtins"
        ):
            yield name, value
            yield from (
                (f"{name}.{inner}", item)
                for inner, item in vars(value).items()
                if isinstance(item, _C_MEMBERS)
            )


def _compiled_modules() -> Iterator[types.ModuleType]:
    """Modules of the standard library that are built in or extension files, if they import here."""
    # readline changes how this process reads a terminal
    for name in sorted(sys.stdlib_module_names - {"readline"}):
        try:
            with warnings.catch_warnings(action="ignore"):
                spec = importlib.util.find_spec(name)
                compiled = spec and (
                    spec.origin == "built-in" or isinstance(spec.loader, ExtensionFileLoader)
                )
                module = importlib.import_module(name) if compiled else None
        except Exception:  # broken or missing on this machine
            continue
        if module:
            yield module


def _public(module: str) -> str:
    """`_heapq`, `_pydecimal`, `posix` → `heapq`, `decimal`, `os`: the module that users import."""
    for prefix in ("_py", "_"):
        if module.startswith(prefix) and module.removeprefix(prefix) in sys.stdlib_module_names:
            return module.removeprefix(prefix)
    return {"posix": "os", "nt": "os"}.get(module, module)


def _entry(name: str, kind: Kind, doc: str) -> Entry | None:
    """Clean indentation, drop signatures that open the doc; None where nothing is left."""
    lines = inspect.cleandoc(doc.encode("utf-8", "replace").decode("utf-8")).splitlines()
    while lines and (not lines[0].strip() or _SIGNATURE.match(lines[0].strip())):
        del lines[0]
    head, *rest = _paragraphs("\n".join(lines)) or [""]
    return Entry(name, " ".join(head.split()), "\n\n".join(rest), kind) if head.strip() else None


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n").rstrip() for part in re.split(r"\n\s*?\n", text) if part.strip()]
