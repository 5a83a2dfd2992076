"""Plain text, Markdown, reStructuredText and source code → blocks; their lines are exact."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from markdown_it import MarkdownIt

from llm2comp.data.documents.blocks import Block, Headings, paragraphs, under
from llm2comp.data.loaded import Tally
from llm2comp.data.tables import file_lines
from llm2comp.errors import DataError
from llm2comp.system.files import is_unicode

# A line of one repeated mark, under or over the title of a section.
_RULE = re.compile(r"([!-/:-@\[-`{-~])\1{2,}\s*")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def lines_of(path: Path) -> list[str]:
    """The lines of a text file without their ends. Raises DataError where it is not Unicode."""
    found = [line.rstrip("\r\n") for line in file_lines(path)]
    for number, line in enumerate(found, 1):
        if not (line.isascii() or is_unicode(line)):
            raise DataError(f"not UTF-8 (line {number})", where=str(path))
    return found


def plain(path: Path, _: Tally) -> Iterator[Block]:
    """Paragraphs of any text file, of source code too."""
    return paragraphs(lines_of(path))


def markdown(path: Path, _: Tally) -> Iterator[Block]:
    """Blocks of a Markdown file; front matter is left out."""
    lines = lines_of(path)
    end = _front_matter_end(lines)
    return markdown_blocks([""] * end + lines[end:])


def _front_matter_end(lines: Sequence[str]) -> int:
    """How many lines front matter takes: a YAML mapping between two rules; 0: there is none."""
    rules = [number for number, line in enumerate(lines) if line.strip() == "---"]
    if len(rules) < 2 or rules[0] > 0:
        return 0
    try:  # not safe_load, for which a date that does not exist is an error
        found = yaml.compose("\n".join(lines[1 : rules[1]]), yaml.SafeLoader)
    except yaml.YAMLError:
        return 0
    return rules[1] + 1 if isinstance(found, yaml.MappingNode) else 0


def markdown_blocks(lines: Sequence[str]) -> Iterator[Block]:
    """Paragraphs, lists, tables and code of Markdown as they are written."""
    headings = dict[int, str]()
    tokens = MarkdownIt("commonmark").enable("table").parse("\n".join(lines))
    for number, token in enumerate(tokens):
        if token.level or token.map is None or token.type == "hr":
            continue
        begin, end = token.map
        if token.type == "heading_open":
            headings = under(headings, int(token.tag[1:]), tokens[number + 1].content)
        else:
            while end > begin and not lines[end - 1].strip():
                end -= 1
            yield Block("\n".join(lines[begin:end]), tuple(headings.values()), begin + 1, end)


def restructured(path: Path, _: Tally) -> Iterator[Block]:
    """Paragraphs of a reStructuredText file; its titles are known by the lines under them."""
    lines, marks, headings = lines_of(path), list[str](), dict[int, str]()
    begin, number = 0, 0
    while number + 1 < len(lines):
        title, rule = lines[number], lines[number + 1]
        alone = number == 0 or not lines[number - 1].strip()
        over = number > 0 and bool(_RULE.fullmatch(lines[number - 1]))
        long_enough = len(rule.rstrip()) >= len(title.rstrip())
        titled = _RULE.fullmatch(rule) and title.strip() and not _RULE.fullmatch(title)
        if titled and long_enough and (alone or over):
            above = tuple(headings.values())
            yield from paragraphs(lines[begin : number - over], above, begin + 1)
            mark = rule[0] + rule[0] * over  # with a line above it is a level of its own
            if mark not in marks:
                marks.append(mark)
            headings = under(headings, marks.index(mark) + 1, title)
            begin = number = number + 2
        else:
            number += 1
    yield from paragraphs(lines[begin:], tuple(headings.values()), begin + 1)


def python(path: Path, _: Tally) -> Iterator[Block]:
    """Docstrings of a Python file, each under the name that it documents."""
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse("\n".join(lines_of(path)))
    return _docstrings(tree, (path.stem,))


def _docstrings(node: ast.AST, headings: Headings) -> Iterator[Block]:
    if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        first = node.body[0] if node.body else None
        doc = ast.get_docstring(node, clean=False)
        if doc and doc.strip() and first is not None:
            text = inspect.cleandoc(doc)
            begin = first.lineno + doc[: len(doc) - len(doc.lstrip())].count("\n")
            end = min(begin + text.count("\n"), first.end_lineno or begin)
            yield Block(text, headings, begin, end)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS):
            yield from _docstrings(child, (*headings, child.name))
        elif isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _docstrings(child, headings)
