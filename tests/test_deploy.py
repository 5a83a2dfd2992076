"""The container's steps, made here as a script; the unit's command is one that there is."""

import configparser
import os
import re
import shlex
import site
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from llm2comp.cli import app
from llm2comp.use.serve.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"


def steps():
    """(instruction, rest) of the Containerfile, in order."""
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def options_of(words):
    (serve,) = [c for name, c in get_command(app).commands.items() if name == "serve"]
    known = {option for parameter in serve.params for option in parameter.opts}
    return {word for word in words if word.startswith("--")} - known


def test_what_the_container_copies_and_runs_is_there():
    made = dict(steps())
    assert made["FROM"].endswith("python:3.11-slim")
    sources = [word for name, rest in steps() if name == "COPY" for word in rest.split()[:-1]]
    assert {"constraints.txt", "pyproject.toml", "src", "recipes"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    needed = re.search(r"include = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())[1]
    assert set(re.findall(r'"/([^"]+)"', needed)) <= set(sources), "what the package is built of"
    command = eval(made["ENTRYPOINT"])
    assert command[:2] == ["llm2comp", "serve"]
    assert options_of(command) == set()
    assert made["USER"] == "llm2comp"


def test_the_unit_starts_a_command_that_there_is_and_waits_for_the_drain():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / "llm2comp.service")
    service = unit["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert (program, words[0]) == ("/opt/llm2comp/bin/llm2comp", "serve")
    assert options_of(words) == set()
    assert int(service["TimeoutStopSec"]) > Settings().drain_seconds
    assert service["LoadCredential"].startswith("keys:")


@pytest.mark.slow
def test_the_steps_of_the_container_as_a_script(tmp_path):
    """Its COPY and RUN lines in a folder and a virtual environment of their own, which borrows the
    libraries that are installed here; without root, the user's line is left out.
    """
    venv, source = tmp_path / "venv", tmp_path / "src"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (packages,) = (venv / "lib").glob("python3*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    lines = ["set -euo pipefail", f"mkdir -p {source}", f"cd {source}"]
    for name, rest in steps():
        if name == "COPY":
            *sources, target = rest.split()
            lines += [f"cp -r {ROOT / source} {target}" for source in sources]
        elif name == "RUN" and "useradd" not in rest and "fetch" not in rest:
            lines.append(rest)
    lines.append("llm2comp serve --help | grep -- --api-key-file")
    lines.append("python -c 'import llm2comp; print(llm2comp.__file__)'")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = f"{venv / 'bin'}:{environment['PATH']}"
    script = ["bash", "-c", "\n".join(lines)]
    said = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert str(packages) in said.stdout.splitlines()[-1], "the package itself, not the checkout"
    assert len([line for line in lines if line.startswith("pip install")]) == 2
    assert (packages / "llm2comp" / "use" / "serve" / "page.html").is_file()
