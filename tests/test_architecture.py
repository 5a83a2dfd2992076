"""The house rules, read from the source with `ast`: who may import whom, what no file may do, how
big a thing may be.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "llm2comp"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE

# From the lowest: the wings, and what some of them hold. A unit (a folder or file; the longest name
# that fits) may import from lower ranks.
RANKS: tuple[frozenset[str], ...] = tuple(
    frozenset(rank.split())
    for rank in (
        "errors",
        "system.files system.console system.hub",
        "system.cache system.folders",
        "recipe",
        "model.tokens",
        "model.memory",
        "model.backbone",
        "model.compressor",
        "model.encoder model.baselines model.judges data",
        "model.inputs",
        "model.vectors",
        "runs objectives",
        "measures storage storage.runtimes",
        "storage.compiled",
        "storage.loading storage.identity",
        "training use",
        "lab.plots lab.evaluation",
        "lab.train",
        "lab.analyze lab.report",
        "lab.study lab.analysis_table",
        "lab.demo lab.adapt lab.budget",
        "cli",
        "__init__ __main__",
    )
)
# Instead of all lower ranks: these alone.
ONLY = {
    "data": {
        *("errors", "system.files", "system.folders", "system.cache", "system.hub"),
        *("recipe", "model.tokens"),
    }
}
# Foreign packages that only these units may import. "recipe, errors and system import no torch" is
# the same rule turned round.
FOREIGN = {
    "peft": {"model.backbone"},
    "transformers": {"model.backbone", "training", "model.encoder", "storage"},
}
LIGHT = {"errors", "system", "recipe"}
HEAVY = {"torch", "transformers", "peft", "sentence_transformers", "accelerate", "datasets"}
PRINTING = {"cli", "lab.demo", "system.console"}
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "shelve"}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60
# Excused from the sizes: "path" or "path:function" → the reason.
EXCUSED: dict[str, str] = {}


@dataclass(frozen=True)
class Module:
    """One parsed file of the package."""

    path: str  # relative to the package, such as data/sources.py
    text: str
    tree: ast.Module

    @property
    def unit(self) -> str:
        """The unit of RANKS that the file belongs to; without one, its room."""
        name = self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return unit_of(name) or name.split(".")[0]

    def within(self, units: Iterable[str]) -> bool:
        return any(covers(unit, self.unit) for unit in units)

    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(self.tree)

    def at(self, node: ast.AST, problem: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 0)}: {problem}"


def read(package: Path) -> list[Module]:
    files = sorted(package.rglob("*.py"))
    texts = [
        (file.relative_to(package).as_posix(), file.read_text(encoding="utf-8")) for file in files
    ]
    return [Module(path, text, ast.parse(text, path)) for path, text in texts]


def imports(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Every import in the file, nested, relative and for type checking alike, as (node, dotted
    name).
    """
    folder = [PACKAGE, *module.path.split("/")[:-1]]
    for node in module.nodes():
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            yield from (
                (node, a.value)
                for a in node.args[:1]
                if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def called(call: ast.Call) -> str:
    """Dotted name of what a call calls, as far as it is plain names: `torch.load`, `.cuda` on any
    other object.
    """
    parts: list[str] = []
    node: ast.expr = call.func
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "", *parts])


def covers(unit: str, name: str) -> bool:
    """Whether a dotted name below the package is a unit's, or lies in it."""
    return name == unit or name.startswith(f"{unit}.")


def unit_of(name: str) -> str | None:
    """The longest unit of RANKS in a dotted name below the package."""
    return max(
        (unit for rank in RANKS for unit in rank if covers(unit, name)), key=len, default=None
    )


def is_door(name: str) -> bool:
    """Whether a name is a wing whose contents have ranks of their own, and it has none: its
    `__init__` is empty.
    """
    return unit_of(name) is None and any(covers(name, unit) for rank in RANKS for unit in rank)


def rank_of(unit: str | None) -> int | None:
    return next((rank for rank, units in enumerate(RANKS) if unit in units), None)


def wrong_directions(modules: list[Module]) -> list[str]:
    """Imports inside the package that go up, sideways, or out of a unit's own list; units without a
    rank.
    """
    found = []
    for module in modules:
        rank = rank_of(module.unit)
        if rank is None and not (
            is_door(module.unit) and module.path == f"{module.unit}/__init__.py"
        ):
            found.append(f"{module.path}: {module.unit} has no rank in RANKS")
        for node, name in imports(module):
            package, _, rest = name.partition(".")
            constant = rest.startswith("__") and rest != "__main__"  # such as llm2comp.__version__
            if package != PACKAGE or constant or (rank is None and not is_door(module.unit)):
                continue
            target = unit_of(rest)
            if target is None:
                found.append(
                    module.at(
                        node,
                        f"imports {name}, no unit of RANKS: import from the unit that defines it",
                    )
                )
            elif target == module.unit:
                continue
            elif rank is None or not rank_of(target) < rank:
                found.append(
                    module.at(node, f"{module.unit} may not import {target}: it is not below")
                )
            elif module.unit in ONLY and target not in ONLY[module.unit]:
                found.append(
                    module.at(
                        node,
                        f"{module.unit} may not import {target}: only {sorted(ONLY[module.unit])}",
                    )
                )
    return found


def wrong_foreigners(modules: list[Module]) -> list[str]:
    """Foreign packages outside the units that may know them."""
    found = []
    for module in modules:
        for node, name in imports(module):
            package = name.split(".")[0]
            if package in FOREIGN and not module.within(FOREIGN[package]):
                found.append(
                    module.at(
                        node,
                        f"{module.unit} may not import {package}: only {sorted(FOREIGN[package])}",
                    )
                )
            elif package in HEAVY and module.within(LIGHT):
                found.append(
                    module.at(node, f"{module.unit} may not import {package}: it must stay light")
                )
            elif package in PICKLES:
                found.append(module.at(node, f"imports {package}: a file of it can run code"))
    return found


def forbidden_calls(modules: list[Module]) -> list[str]:
    """Calls that tie the code to a device, hide output from the console, or run what a file or a
    repository holds.
    """
    found = [
        m.at(node, "torch.load: use safetensors")
        for m in modules
        for node, name in imports(m)
        if name == "torch.load"
    ]
    for module in modules:
        for node in module.nodes():
            if not isinstance(node, ast.Call):
                continue
            name = called(node)
            if name.endswith(".cuda"):
                found.append(module.at(node, ".cuda(): use .to(device)"))
            elif name == "torch.load":
                found.append(module.at(node, "torch.load: use safetensors"))
            elif name in ("json.dumps", "json.dump") and module.unit != "system.files":
                found.append(
                    module.at(node, f"{name}: write with files.to_json, which never gives NaN")
                )
            elif name == "print" and not module.within(PRINTING):
                found.append(module.at(node, "print(): log, or return it to the command line"))
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("trust_remote_code", "allow_pickle") and not off:
                    found.append(module.at(node, f"{keyword.arg} must be off"))
    return found


def oversized(modules: list[Module]) -> dict[str, int]:
    """Files and functions over their size, as `path` or `path:function` → lines."""
    found = {}
    for module in modules:
        lines = len(module.text.splitlines())
        if lines > MAX_FILE_LINES:
            found[module.path] = lines
        for node in module.nodes():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    found[f"{module.path}:{node.name}"] = lines
    return found


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    found = read(SOURCE)
    assert len(found) >= 5, f"hardly a file below {SOURCE}"
    assert {"errors", "recipe", "model.backbone"} <= {module.unit for module in found}
    assert (
        sum(1 for module in found for _, name in imports(module) if name.startswith(f"{PACKAGE}."))
        >= 5
    )
    return found


@pytest.mark.parametrize("rule", [wrong_directions, wrong_foreigners, forbidden_calls])
def test_rule_holds(modules: list[Module], rule: Callable[[list[Module]], list[str]]):
    assert rule(modules) == []


def test_sizes(modules: list[Module]):
    found = oversized(modules)
    assert {what: lines for what, lines in found.items() if what not in EXCUSED} == {}
    assert set(EXCUSED) <= set(found), "excused without need"


def test_command_line_starts_light(tmp_path: Path):
    """`llm2comp --help` answers before torch, transformers or sentence-transformers are
    imported.
    """
    program = """
import sys
from llm2comp.cli import main
sys.argv = ["llm2comp", "--help"]
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
heavy = {"torch", "transformers", "sentence_transformers", "peft", "datasets"} & set(sys.modules)
assert not heavy, f"imported: {sorted(heavy)}"
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


PLANTED = [
    (
        wrong_directions,
        "model/tokens.py",
        "from llm2comp.model.backbone import Backbone",
        "tokens may not import model.backbone",
    ),
    (
        wrong_directions,
        "recipe.py",
        "def f():\n    import llm2comp.cli",
        "recipe may not import cli",
    ),
    (wrong_directions, "objectives/kl.py", "from ..model import states", "no unit of RANKS"),
    (wrong_directions, "objectives/kl.py", "from .. import runs", "objectives may not import runs"),
    (
        wrong_directions,
        "storage.py",
        "from llm2comp.training.run import train",
        "storage may not import training",
    ),
    (
        wrong_directions,
        "storage/golden.py",
        "from llm2comp.storage import loading",
        "storage may not import storage.loading",
    ),
    (
        wrong_directions,
        "model/memory.py",
        "import importlib\nimportlib.import_module('llm2comp.lab.demo')",
        "may not import lab.demo",
    ),
    (
        wrong_directions,
        "data/rows.py",
        "from ..model.memory import MemoryTokens",
        "data may not import model.memory",
    ),
    (
        wrong_directions,
        "training/sample.py",
        "from llm2comp.lab.evaluation.running import run_task",
        "may not import lab.evaluation",
    ),
    (wrong_directions, "stray.py", "", "stray has no rank"),
    (wrong_directions, "model/stray.py", "", "model has no rank"),
    (
        wrong_directions,
        "model/__init__.py",
        "from llm2comp.errors import BackboneError",
        "model may not import errors",
    ),
    (wrong_directions, "lab/demo.py", "from llm2comp import Encoder", "no unit of RANKS"),
    (
        wrong_foreigners,
        "model/encoder.py",
        "from peft import LoraConfig",
        "encoder may not import peft",
    ),
    (
        wrong_foreigners,
        "model/compressor.py",
        "def f():\n    import transformers.utils",
        "compressor may not import transformers",
    ),
    (
        wrong_foreigners,
        "recipe.py",
        "def f():\n    from torch import nn",
        "recipe may not import torch",
    ),
    (wrong_foreigners, "system/hub.py", "import torch", "system.hub may not import torch"),
    (wrong_foreigners, "system/files.py", "import pickle", "imports pickle"),
    (forbidden_calls, "model/memory.py", "model().weight.cuda()", ".cuda()"),
    (forbidden_calls, "use/embed.py", "print('x')", "print()"),
    (forbidden_calls, "lab/study.py", "json.dumps({})", "files.to_json"),
    (forbidden_calls, "system/cache.py", "json.dump({}, out)", "files.to_json"),
    (forbidden_calls, "model/backbone.py", "torch.load('x')", "torch.load"),
    (forbidden_calls, "model/backbone.py", "from torch import load", "torch.load"),
    (
        forbidden_calls,
        "model/backbone.py",
        "load('x', trust_remote_code=True)",
        "trust_remote_code",
    ),
]


@pytest.mark.parametrize(("rule", "path", "source", "expected"), PLANTED)
def test_rule_finds_planted_violation(
    tmp_path: Path, rule: Callable[[list[Module]], list[str]], path: str, source: str, expected: str
):
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(source)
    (found,) = rule(read(tmp_path))
    assert found.startswith(path)
    assert expected in found


def test_rules_allow_what_they_should(tmp_path: Path):
    allowed = {
        "model/__init__.py": "",
        "training/__init__.py": "from llm2comp import storage\nfrom llm2comp.data import rows",
        "training/trainers.py": "from transformers import Trainer",
        "training/run.py": "from . import stages\nfrom .stages import Stage\nimport torch",
        "model/backbone/__init__.py": "from peft import LoraConfig\nload('x', "
        "trust_remote_code=False)",
        "cli.py": "from llm2comp import __version__\nprint(__version__)",
        "model/encoder.py": "from llm2comp.model.compressor import Compressor\nx.to('cuda')",
        "storage/loading.py": "from llm2comp.storage import golden",
    }
    for path, source in allowed.items():
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text(source)
    modules = read(tmp_path)
    assert len(modules) == len(allowed)
    assert [*wrong_directions(modules), *wrong_foreigners(modules), *forbidden_calls(modules)] == []


def test_sizes_find_planted_violations(tmp_path: Path):
    (tmp_path / "long.py").write_text("x = 1\n" * (MAX_FILE_LINES + 1))
    (tmp_path / "deep.py").write_text(
        "class A:\n    def f(self):\n" + "        x = 1\n" * MAX_FUNCTION_LINES
    )
    (tmp_path / "fits.py").write_text("def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1))
    assert oversized(read(tmp_path)) == {
        "long.py": MAX_FILE_LINES + 1,
        "deep.py:f": MAX_FUNCTION_LINES + 1,
    }
