"""Figures of the code in a checkout: `python tools/house.py [CHECKOUT]`.

Statements (`ast.stmt`), lines of files and functions, rooms, own imports inside functions, and how
long `import llm2comp` and `llm2comp --help` take (the best of three, with this interpreter).
"""

import ast
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def own_imports(function: ast.AST) -> int:
    """Imports of our own modules anywhere inside a function."""
    found = 0
    for node in ast.walk(function):
        if isinstance(node, ast.ImportFrom):
            found += f"{node.module}.".startswith("llm2comp.")
        elif isinstance(node, ast.Import):
            found += any(f"{alias.name}.".startswith("llm2comp.") for alias in node.names)
    return found


def outermost(node: ast.AST) -> list[ast.AST]:
    """Functions that stand in no other function."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        found += [child] if isinstance(child, FUNCTIONS) else outermost(child)
    return found


def seconds(root: Path, *command: str) -> float:
    """Best wall time of three runs over the checkout's own source."""
    spent, environment = [], os.environ | {"PYTHONPATH": str(root / "src")}
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, env=environment, capture_output=True)
        spent.append(time.perf_counter() - begin)
    return min(spent)


def figures(root: Path) -> dict[str, object]:
    """Name → figure."""
    package = root / "src" / "llm2comp"
    trees, lines, longest = [], [], ("", 0)
    for file in sorted(package.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        trees.append(ast.parse(text))
        lines.append(len(text.splitlines()))
        for node in ast.walk(trees[-1]):
            if isinstance(node, FUNCTIONS):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                longest = max(longest, (node.name, size), key=lambda pair: pair[1])
    rooms = {path.stem for path in package.iterdir() if path.is_dir() or path.suffix == ".py"}
    rooms -= {"__init__", "__main__", "__pycache__", "assets", "py"}
    return {
        "statements": sum(isinstance(n, ast.stmt) for tree in trees for n in ast.walk(tree)),
        "files": len(lines),
        "lines of a file, median": statistics.median(lines),
        "lines of a file, most": max(lines),
        "longest function": f"{longest[0]} {longest[1]}",
        "rooms": len(rooms),
        "own imports in functions": sum(own_imports(f) for tree in trees for f in outermost(tree)),
        "import llm2comp, s": round(seconds(root, "-c", "import llm2comp"), 2),
        "llm2comp --help, s": round(seconds(root, "-m", "llm2comp", "--help"), 2),
    }


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[1]
    for name, value in figures(Path(sys.argv[1]).resolve() if sys.argv[1:] else here).items():
        print(f"{name:28} {value}")
