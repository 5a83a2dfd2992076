"""The public face: every name is there, comes from where it says, and costs nothing before it is
used.
"""

import ast
import inspect
import subprocess
import sys
from functools import partial
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
    """At most 0.3 s of computing; the best of three, as a machine may be busy."""
    program = (
        "import time; begin = time.process_time(); import llm2comp; "
        "print(time.process_time() - begin)"
    )
    run = partial(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert min(float(run().stdout) for _ in range(3)) < 0.3


@pytest.mark.thorough
def test_a_missing_lab_is_one_line():
    """Without mteb and matplotlib the package loads and trains; what judges says what to
    install.
    """
    program = """
import sys
sys.modules |= dict.fromkeys(("bm25s", "jinja2", "matplotlib", "mteb"))  # as if not installed
import llm2comp
llm2comp.load, llm2comp.train, llm2comp.export, llm2comp.verify
for name in ("evaluate", "analyze"):
    try:
        getattr(llm2comp, name)
    except llm2comp.errors.RunError as error:
        print(str(error).count("is not installed"), "[lab]" in str(error))
sys.argv = ["llm2comp", "report", "."]
from llm2comp.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout == "1 True\n1 True\n"
    assert done.returncode == 1
    assert done.stderr.startswith("error: judging encoders: ")
    assert "[lab]" in done.stderr
    assert "Traceback" not in done.stderr
