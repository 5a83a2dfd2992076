"""The README says nothing that is not so: its commands, files, recipes, links and Python are
checked here.

What a command does is tested where the command is; here it must exist, with the options given.
"""

import ast
import contextlib
import pkgutil
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import llm2comp
from llm2comp import load
from llm2comp.errors import RecipeError
from llm2comp.recipe import find_recipe
from llm2comp.use.embed import embed

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]

# Commands that are not ours, by their first words → why they need no check here.
ELSEWHERE = {
    "git clone": ".ci/run starts from a clean clone",
    "cd": "goes into that clone",
    "pip install": "`make setup` does the same under constraints.txt",
    "python -m venv": "`make setup` does the same",
    "python3 -m venv": "`make setup` does the same",
    "source .venv/bin/activate": "part of every virtual environment",
    "curl": "the server's own tests send such requests",
    "llama-server": "llama.cpp's; tests/test_llamacpp.py runs the library that it is made of",
}

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>[\w+-]*)[^\n]*\n(?P<body>.*?)^ "
    r"*(?P=fence) *$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    body: str
    line: int


def blocks(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        body = "".join(
            line[indent:] if line[:indent].isspace() else line
            for line in match["body"].splitlines(keepends=True)
        )
        found.append(Block(match["language"], body, text.count("\n", 0, match.start()) + 1))
    return found


def commands(text: str) -> list[str]:
    """The commands of all bash and sh blocks; `&&`, `;`, `|` and `&` part them, a backslash joins
    lines.
    """
    found = []
    for block in blocks(text):
        if block.language not in ("bash", "sh", "shell", "console"):
            continue
        for line in block.body.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(
                line.strip().removeprefix("$ "), posix=True, punctuation_chars=";&|"
            )
            lexer.commenters, lexer.whitespace_split = "#", True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if not set(word) <= set(";&|"):
                    words.append(word)
                    continue
                while words and re.match(r"[A-Za-z_]\w*=", words[0]):  # settings for one command
                    del words[0]
                if words:
                    found.append(shlex.join(words))
                words = []
    return found


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.M))


def command_tree() -> Any:
    from typer.main import get_command

    from llm2comp.cli import app

    return get_command(app)


def problem_of(command: str, targets: set[str], tree: Any) -> str | None:
    """What is wrong with a command, or None."""
    if any(f"{command} ".startswith(f"{prefix} ") for prefix in ELSEWHERE):
        return None
    program, *words = shlex.split(command)
    if program == "make":
        asked = {word for word in words if "=" not in word and not word.startswith("-")}
        return f"no such target: {sorted(asked - targets)}" if asked - targets else None
    if program not in ("llm2comp", ".venv/bin/llm2comp"):
        return f"{program}: neither checked here nor in the table ELSEWHERE"
    node, path = tree, ["llm2comp"]
    while hasattr(node, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in node.commands:
            return f"{' '.join(path)} has no command {name!r}: {sorted(node.commands)}"
        node = node.commands[name]
        path.append(name)
    known = {
        "--help",
        *(
            option
            for parameter in node.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        ),
    }
    unknown = [
        word for word in words if re.match(r"--?[A-Za-z]", word) and word.split("=")[0] not in known
    ]
    if unknown:
        return f"{' '.join(path)} has no option {unknown[0]}: {sorted(known)}"
    return missing_recipe(words[0]) if path[-1] == "train" and words else None


def missing_recipe(name: str) -> str | None:
    """A recipe to train must ship, unless its name says that it is the reader's own (`my...`)."""
    if PurePosixPath(name).name.startswith("my") or (ROOT / name).is_file():
        return None
    try:
        find_recipe(name)
    except RecipeError as error:
        return str(error)
    return None


def tree_entries(body: str) -> Iterator[str]:
    """Paths of a drawn file tree: a line is one or more names, two spaces apart, then whatever is
    said about them.

    How far in a name stands says whose child it is. The first column must hold a name; later ones
    count when they look like file names (a dot or a closing slash, no blank).
    """
    folders: list[tuple[int, str]] = []
    for line in body.splitlines():
        bare = re.sub(r"[│├└─|`]", " ", line)
        cells = re.split(r"\s{2,}", bare.strip().split(" #")[0])
        if not cells[0]:
            continue
        column = len(bare) - len(bare.lstrip())
        while folders and folders[-1][0] >= column:
            folders.pop()
        parent = folders[-1][1] if folders else ""
        for place, cell in enumerate(cells):
            name = cell.split()[0] if place == 0 else cell
            if place == 0 or re.fullmatch(r"[\w*.-]+(\.\w+|/)", name):
                yield parent + name
        first = cells[0].split()[0]
        if first.endswith("/"):
            folders.append((column, parent + first))


def missing_in_tree(body: str, root: Path) -> list[str]:
    return [
        entry
        for entry in tree_entries(body)
        if entry.strip("./") and not any(root.glob(entry.rstrip("/")))
    ]


def file_trees(text: str) -> list[str]:
    drawn = [block.body for block in blocks(text) if block.language in ("", "text", "tree")]
    return [
        body for body in drawn if re.search(r"^[│├└─ ]*(src|llm2comp|src/llm2comp)/", body, re.M)
    ]


def dead_links(page: Path) -> list[str]:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(<?([^)\s>#]+)[^)]*\)", prose)
    return [
        target
        for target in targets
        if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists()
    ]


def recipes_named(page: Path) -> set[str]:
    return set(re.findall(r"\brecipes/[\w./-]+\.ya?ml\b", page.read_text(encoding="utf-8")))


TEXT = README.read_text(encoding="utf-8")
COMMANDS = list(dict.fromkeys(commands(TEXT)))
PYTHON = [block for block in blocks(TEXT) if block.language in ("python", "py")]


def test_readme_has_what_is_checked():
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert any(command.startswith("llm2comp train ") for command in COMMANDS)
    assert PYTHON
    assert len(file_trees(TEXT)) == 1
    assert len(list(tree_entries(file_trees(TEXT)[0]))) >= 10
    assert recipes_named(README)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str):
    targets = make_targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {"help", "demo", "test", "lint"} <= targets
    assert problem_of(command, targets, command_tree()) is None


@pytest.mark.parametrize("block", PYTHON, ids=[f"line {block.line}" for block in PYTHON])
def test_python_compiles(block: Block):
    assert compile(
        block.body, f"README.md:{block.line}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    )


def private_names(text: str) -> list[str]:
    """Names of the package in a page's Python, or called in its prose, that are not public."""
    named = re.findall(r"`llm2comp\.([\w.]+)\(", FENCE.sub("", text))
    for block in blocks(text):
        for node in ast.walk(ast.parse(block.body)) if block.language in ("python", "py") else ():
            if isinstance(node, ast.Import):
                parts = [alias.name.split(".", 1) for alias in node.names]
                named += [part[1] for part in parts if part[0] == "llm2comp" and part[1:]]
            elif isinstance(node, ast.ImportFrom) and node.module == "llm2comp":
                named += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("llm2comp."):
                named.append(f"{node.module}".removeprefix("llm2comp."))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                named += [node.attr] if node.value.id == "llm2comp" else []
    return [name for name in named if name not in llm2comp.__all__]


NAMES_OF_PAGES = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=NAMES_OF_PAGES)
def test_pages_use_public_names_alone(page: Path):
    text = page.read_text(encoding="utf-8")
    assert private_names(text) == []


def test_private_names_are_found():
    page = """Call `llm2comp.load(x)` or `llm2comp.use.embed.embed(x)`.

```python
import llm2comp
import llm2comp.model.memory
from llm2comp import load, quiet
from llm2comp.storage.loading import identity

llm2comp.load().encode(["a"])
llm2comp.errors.RunError
```
"""
    found = ["use.embed.embed", "model.memory", "quiet", "storage.loading", "errors"]
    assert private_names(page) == found
    asked = [name for page in PAGES for name in re.findall(r"llm2comp\.(\w+)\(", page.read_text())]
    assert len(set(asked)) >= 5, "the pages use public names"


@pytest.mark.parametrize("page", PAGES, ids=NAMES_OF_PAGES)
def test_files_named_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    assert [entry for body in file_trees(text) for entry in missing_in_tree(body, ROOT)] == []
    assert [name for name in sorted(recipes_named(page)) if not (ROOT / name).is_file()] == []
    assert dead_links(page) == []


def functions_named(text: str) -> list[str]:
    """Dotted names in the last column of the table of equations."""
    rows = text.partition("## Equation")[2].partition("\n## ")[0].splitlines()
    cells = [row.rstrip("| ").rpartition("|")[2] for row in rows if row.startswith("| ")]
    return re.findall(r"`(\w+(?:\.\w+)+)`", " ".join(cells))


def missing_functions(names: list[str]) -> list[str]:
    """Names of no module, class or function: of the package, of `model`, or of the compressor's."""

    def exists(name: str) -> bool:
        for base in ("llm2comp", "llm2comp.model", "llm2comp.model.compressor"):
            with contextlib.suppress(ImportError, AttributeError):
                pkgutil.resolve_name(f"{base}.{name}")
                return True
        return False

    return [name for name in names if not exists(name)]


def test_functions_of_the_equations_exist():
    names = functions_named((ROOT / "docs" / "method.md").read_text(encoding="utf-8"))
    assert len(names) >= 20
    assert missing_functions(names) == []
    planted = ["measures.spectrum", "analysis.spectrum", "Compressor.memory", "objectives.loss.no"]
    assert missing_functions(planted) == planted[1:]


SIMILARITIES = [command for command in COMMANDS if command.startswith("llm2comp similarity ")]
ROW = re.compile(r"^((?: *-?\d\.\d{3})+)  (\S.*)$", re.M)


@pytest.mark.parametrize("command", SIMILARITIES)
@pytest.mark.usefixtures("smollm2")
def test_similar_texts_rank_first_and_what_is_shown_is_what_comes_out(command: str):
    """In each example the first text is nearest to the second, by a margin, and the README shows
    these cosines.
    """
    texts = shlex.split(command)[2:]
    assert len(texts) == 3, "an option: then this must load another model"
    vectors = embed(load(), texts, normalise=True).embeddings_ND
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > max(cosines[0, 2], cosines[1, 2]) + 0.1
    shown = {text: [float(cosine) for cosine in row.split()] for row, text in ROW.findall(TEXT)}
    assert [shown[text] for text in texts] == [
        pytest.approx(row, abs=0.02) for row in cosines.tolist()
    ]


def test_there_is_such_an_example():
    assert SIMILARITIES


SAMPLE = """\
Text, [a link](docs/none.md "title"), [another](https://example.org/x), [a place](#there).

```bash
# a comment
$ git clone https://example.org/x && cd x
HF_HUB_OFFLINE=1 make demo   # all of it
llm2comp train recipes/tiny.yaml \\
  --out 'runs/a b' | tee log
```

1. In a list:
   ```python
   x = 1
   if x:
       print(x)
   ```

```text
README.md  Makefile
src/llm2comp/        the package
├── errors.py        one error family
└── data/            sources, and more.
    └── rows.py
tests/  tools/       mirrors src
recipes/*.yaml       one = one experiment
```
"""


def test_the_checks_read_pages(tmp_path: Path):
    assert commands(SAMPLE) == [
        "git clone https://example.org/x",
        "cd x",
        "make demo",
        "llm2comp train recipes/tiny.yaml --out 'runs/a b'",
        "tee log",
    ]
    assert [block.body for block in blocks(SAMPLE) if block.language == "python"] == [
        "x = 1\nif x:\n    print(x)\n"
    ]
    (tree,) = file_trees(SAMPLE)
    assert list(tree_entries(tree)) == [
        "README.md",
        "src/llm2comp/",
        "src/llm2comp/errors.py",
        "src/llm2comp/data/",
        "src/llm2comp/data/rows.py",
        "tests/",
        "tools/",
        "recipes/*.yaml",
    ]
    (tmp_path / "src/llm2comp/data").mkdir(parents=True)
    for name in ("README.md", "src/llm2comp/errors.py", "tests", "tools"):
        (tmp_path / name).touch()
    assert missing_in_tree(tree, tmp_path) == ["src/llm2comp/data/rows.py", "recipes/*.yaml"]
    page = tmp_path / "README.md"
    page.write_text(SAMPLE)
    assert dead_links(page) == ["docs/none.md"]
    assert recipes_named(page) == {"recipes/tiny.yaml"}
    assert make_targets(".PHONY: a\nhelp:  ## list\nX := 1\nx-y: help\n\techo no: target\n") == {
        "help",
        "x-y",
    }


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make demo WORKERS=3", None),
        ("make nonsense", "no such target"),
        ("pip install -e .", None),
        ("pipx install x", "neither checked"),
        ("llm2comp --help", None),
        ("llm2comp fly", "no command 'fly'"),
        ("llm2comp sub one --out x", None),
        ("llm2comp sub two", "llm2comp sub has no command 'two'"),
        ("llm2comp sub one --outt=x", "no option --outt"),
        ("llm2comp train my-recipe.yaml", None),
        ("llm2comp train no-such-recipe", "no such recipe"),
    ],
)
def test_the_checks_find_wrong_commands(command: str, problem: str | None):
    import typer
    from typer.main import get_command

    app, sub = typer.Typer(), typer.Typer()
    app.command("train")(lambda recipe: None)
    app.command("other")(lambda: None)
    sub.command("one")(lambda out=typer.Option("x", "--out"): None)  # noqa: B008
    sub.command("more")(lambda: None)
    app.add_typer(sub, name="sub")
    found = problem_of(command, {"demo"}, get_command(app))
    assert found is None if problem is None else found is not None and problem in found
