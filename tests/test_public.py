"""The public face: every name is there, comes from where it says, and costs nothing before it is used."""

import ast
import inspect
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llm2comp

NAMES = sorted(set(llm2comp.__all__) - {"__version__"})


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_is_there_and_documented(name):
    found = getattr(llm2comp, name)
    assert callable(found)
    assert inspect.getdoc(found)
    assert name in (llm2comp.__doc__ or ""), "told in the package's own docstring"


def test_the_type_checker_sees_the_same_names():
    tree = ast.parse(Path(llm2comp.__file__).read_text(encoding="utf-8"))
    (guard,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in guard.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {}
    for name, home in llm2comp._HOME.items():
        module, _, other = home.partition(":")
        homes[name] = f"llm2comp.{module}:{other or name}"
    assert seen == homes
    assert set(homes) == set(NAMES)


def test_a_public_name_is_never_a_room():
    """`llm2comp.export` is the function, whatever was imported before."""
    rooms = {path.stem for path in Path(llm2comp.__file__).parent.iterdir()}
    assert rooms & set(NAMES) == set()


def test_no_other_name():
    with pytest.raises(AttributeError, match="no attribute 'encode'"):
        llm2comp.encode  # noqa: B018


def test_import_takes_no_time():
    program = "import time; begin = time.perf_counter(); import llm2comp; print(time.perf_counter() - begin)"
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
        if times[-1] < 0.3:
            return
        time.sleep(0.1)
    pytest.fail(f"import llm2comp took {min(times):.2f} s at best")
