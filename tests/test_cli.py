"""The command line as such: help, what it imports, how it ends, and what a person sees
meanwhile.
"""

import io
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.table import Table
from typer.main import get_command

from llm2comp import errors
from llm2comp.cli import app, using
from llm2comp.data import hub
from llm2comp.errors import Llm2CompError, RunError, install_extra
from llm2comp.system import console
from llm2comp.system.console import Bar, say
from llm2comp.training.progress import METRICS_FILE
from tiny_run import Said, assert_refused, cli, finished, write_recipe

GROUPS = {
    "Make an encoder": ("adapt", "fetch", "train", "demo", "generate-responses", "study"),
    "Use an encoder": ("index", "search", "serve", "embed", "similarity", "export", "verify"),
    "Judge an encoder": ("budget", "evaluate", "analyze", "report"),
}
COMMANDS = tuple(command for group in GROUPS.values() for command in group)


# ---- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help(command):
    said = cli(command, "--help")
    assert said.code == 0
    assert said.err == ""
    assert f"Usage: llm2comp {command}" in said.out


def test_help_names_every_command_and_so_does_no_argument():
    said = cli("--help")
    assert said.code == 0
    for command in COMMANDS:
        assert f"│ {command} " in said.out
    nothing = cli()
    assert nothing.code == 2
    assert "Usage: llm2comp" in nothing.out + nothing.err


def test_commands_stand_in_groups_make_use_judge():
    out = cli("--help").out
    places = [
        out.index(line)
        for group, commands in GROUPS.items()
        for line in (f"─ {group} ─", *(f"│ {c} " for c in commands))
    ]
    assert places == sorted(places)


def test_no_command_is_in_no_group():
    found = {
        command.name or command.callback.__name__.replace("_", "-")
        for command in app.registered_commands
    }
    assert found >= set(COMMANDS)
    assert {command.rich_help_panel for command in app.registered_commands} == set(GROUPS)


@pytest.mark.thorough
@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)], ids=str)
def test_nothing_in_help_is_cut_at_80_columns(command):
    """In a process of its own: how wide the help may be is asked for once."""
    environment = os.environ | {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}
    run = [sys.executable, "-m", "llm2comp", *command, "--help"]
    out = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout
    assert "…" not in out
    assert not re.search(r"<\w+\|[^>\n]*$", out, re.M), "a list of values that is folded"
    assert max(map(len, out.splitlines())) <= 80
    node = get_command(app)
    for name in command:
        node = node.commands[name]
    options = [
        "--help",
        *(
            name
            for parameter in node.params
            if not getattr(parameter, "hidden", False)
            for name in parameter.opts
            if name.startswith("--")
        ),
    ]
    for name in options:
        assert re.search(rf"{name}[ ,]", out), f"{name} is not whole"


def test_help_imports_nothing_heavy():
    """So that it answers within a second; importing sentence-transformers alone takes ten."""
    program = f"""
import sys
from llm2comp.cli import app
for arguments in [["--help"], *([command, "--help"] for command in {COMMANDS!r})]:
    try:
        app(arguments)
    except SystemExit as stop:
        assert stop.code == 0
names = "torch transformers sentence_transformers datasets numpy pyarrow yaml"
heavy = set(names.split()) & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_python_m_and_the_version():
    import llm2comp

    assert llm2comp.__version__ == version("llm2comp")
    assert cli("--version") == Said(0, f"llm2comp {version('llm2comp')}\n", "")
    command = [sys.executable, "-m", "llm2comp", "train", "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "100"}
    )
    assert "Usage: llm2comp train " in done.stdout
    assert "--dry-run" in done.stdout


def test_the_package_shows_its_names_and_imports_nothing_heavy():
    program = """
import sys
import llm2comp
assert {"load", "train", "__version__"} <= set(dir(llm2comp)), dir(llm2comp)
assert not any(name in dir(llm2comp) for name in ("TYPE_CHECKING", "annotations", "Any"))
names = "torch transformers sentence_transformers datasets numpy pyarrow yaml typer"
heavy = set(names.split()) & set(sys.modules)
assert not heavy, heavy
assert all(callable(getattr(llm2comp, name)) for name in ("load", "train"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'llm2comp[lab]'"),
        (
            {"url": "file:///home/me/llm2comp", "dir_info": {"editable": True}},
            "pip install -e '/home/me/llm2comp[lab]'",
        ),
        ({"url": "file:///home/me/a%20b", "dir_info": {}}, "pip install '/home/me/a b[lab]'"),
        (
            {"url": "file:///x/llm2comp-1.whl", "archive_info": {}},
            "pip install '/x/llm2comp-1.whl[lab]'",
        ),
        (
            {"url": "https://host/llm2comp", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "pip install 'llm2comp[lab] @ git+https://host/llm2comp'",
        ),
    ],
)
def test_an_extra_is_installed_from_where_the_package_came_from(monkeypatch, origin, command):
    text = json.dumps(origin) if origin else None
    monkeypatch.setattr(errors, "distribution", lambda _: SimpleNamespace(read_text=lambda _: text))
    assert install_extra("lab") == command


# ---- how it ends


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RunError("a problem", where="here", expected=1, found=2, fix="do so"),
            "error: here: a problem\n  expected: 1\n  found: 2\n  to do: do so\n",
        ),
        (Llm2CompError("a problem"), "error: a problem\n"),
        (OSError(28, "No space left on device", "/x/y"), "error: /x/y: No space left on device\n"),
        (OSError(28, "No space left on device"), "error: No space left on device\n"),
        (OSError("odd"), "error: odd\n"),
    ],
)
def test_errors_end_in_one_message(monkeypatch, error, message):
    def fails(*_):
        raise error

    monkeypatch.setattr(using, "_read_source", fails)
    said = cli("embed", "x.txt", "-m", "m", "-o", "o.npy")
    assert (said.code, said.out, said.err) == (1, "", message)


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), RuntimeError("a bug"), AttributeError("a bug")]
)
def test_programming_errors_keep_their_traceback(monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(using, "_read_source", fails)
    with pytest.raises(type(error)):
        cli("embed", "x.txt", "-m", "m", "-o", "o.npy")


def test_interrupted(monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(using, "_read_source", stopped)
    said = cli("embed", "x.txt", "-m", "m", "-o", "o.npy")
    assert (said.code, said.err) == (130, "stopped; run the same command again to go on\n")


def test_train_and_verify_say_where_the_result_is(tmp_path):
    said = cli(
        "train",
        write_recipe(tmp_path, pretext=None, scl=None),
        "ucl.steps=1",
        "--out",
        tmp_path / "run",
    )
    assert said.code == 0, said
    assert said.out == ""
    assert said.err.endswith(
        f"finished: {tmp_path / 'run' / 'model'}\nreport: {tmp_path / 'run' / 'report.html'}\n"
    )
    assert "tiny-run" in (tmp_path / "run" / "report.html").read_text()
    said = cli("verify", tmp_path / "run" / "model")
    assert said.code == 0
    sound, cosine = said.err.rstrip("\n").rsplit(" ", 1)
    assert sound == f"{tmp_path / 'run' / 'model'}: sound, lowest cosine"
    assert float(cosine) == pytest.approx(1, abs=1e-6)


def test_default_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = cli("train", write_recipe(tmp_path, pretext=None, scl=None), "ucl.steps=1", "name=mine")
    assert said.code == 0, said
    assert (
        json.loads((tmp_path / "runs" / "mine" / "2-ucl" / "done.json").read_text())["steps"] == 1
    )


# ---- what a person sees


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


@pytest.fixture
def shown(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=out, width=200))
    return out


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(clock, shown):
    with Bar("embed", 1000) as bar:
        for _ in range(25):
            clock(1)
            bar.advance(40, "5 texts/s")
    assert shown.getvalue().splitlines() == [
        "embed 400/1,000: 5 texts/s, 10 s, 15 s left",
        "embed 800/1,000: 5 texts/s, 20 s, 5 s left",
        "embed 1,000/1,000: 5 texts/s, 25 s, 0 s left",
    ]


def test_a_total_that_is_estimated_is_told_anew(clock, shown):
    with Bar("index", 0) as bar:
        bar.expect(40)
        clock(10)
        bar.advance(10)
        bar.expect(20)
        clock(10)
        bar.advance(10)
    with Bar("index", 0):
        pass
    assert shown.getvalue().splitlines() == [
        "index 10/40: 10 s, 30 s left",
        "index 20/20: 20 s, 0 s left",
        "index 20/20: 20 s, 0 s left",
    ]


def test_time_left_of_a_resumed_task_counts_only_what_was_done_now(clock, shown):
    with Bar("ucl", 100, done=80) as bar:
        clock(10)
        bar.advance(10)
    assert shown.getvalue().splitlines()[0] == "ucl 90/100: 10 s, 10 s left"


def test_a_failed_task_shows_no_last_line(shown):
    def fail():
        with Bar("embed", 10):
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        fail()
    assert shown.getvalue() == ""


def test_progress_on_a_terminal_is_a_live_bar(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=out, width=120, force_terminal=True))
    with Bar("embed", 10) as bar:
        bar.advance(10, "loss 0.5")
    assert "━" in out.getvalue()
    assert "10/10" in out.getvalue()
    assert "loss 0.5" in out.getvalue()


@pytest.mark.parametrize(
    "text", ["[bold]x[/bold]", "[/INST]", "runs/[x]/model", "a" * 500, ":smile:"]
)
def test_lines_are_printed_as_they_are(shown, text):
    say(text)
    assert shown.getvalue() == text + "\n"


def test_tables_too(shown):
    table = Table("stage")
    table.add_row("ucl")
    say(table)
    assert "│ ucl" in shown.getvalue()


def test_training_shows_loss_and_rate_per_stage(tmp_path):
    said = cli("train", write_recipe(tmp_path, pretext=None, scl=None), "--out", tmp_path / "run")
    *_, last = (tmp_path / "run" / "2-ucl" / METRICS_FILE).read_text().splitlines()
    assert f"ucl 4/4: loss {json.loads(last)['loss']:.4f} " in said.err, "that of the last step"
    assert " tokens/s, " in said.err
    assert "\r" not in said.err
    assert "\x1b" not in said.err


@pytest.mark.thorough
def test_libraries_keep_quiet(tmp_path, capfd):
    """What the libraries print at file-descriptor level counts as well."""
    run = finished()[1]
    capfd.readouterr()
    assert cli("similarity", "a", "b", "-m", run).code == 0
    assert cli("train", write_recipe(tmp_path, pretext=None), "--out", tmp_path / "run").code == 0
    assert capfd.readouterr() == ("", "")


def test_brackets_in_paths_are_printed_as_they_are(tmp_path):
    odd = tmp_path / "[bold]"
    odd.mkdir()
    (odd / "in.txt").write_text("a\nb\n")
    said = cli("embed", odd / "in.txt", "-m", finished()[1], "-o", odd / "out.npy")
    assert said.code == 0, said
    assert f"{odd / 'out.npy'}: 2 embeddings" in said.err
    assert_refused(
        cli("embed", odd / "no" / "[/x].txt", "-m", finished()[1], "-o", odd / "out.npy"),
        "[/x].txt",
    )


def test_a_hub_name_that_cannot_be_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_ADVICE", "advice")
    said = cli(
        "embed", "no-such-owner/no-such-set", "-m", finished()[1], "-o", tmp_path / "out.npy"
    )
    assert_refused(
        said, "no-such-owner/no-such-set: not a file, nor a loadable Hub data set", "advice"
    )


def test_out_of_device_memory_says_what_to_do(tmp_path, monkeypatch):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("llm2comp.training.run.train", run_out)
    assert_refused(
        cli("train", write_recipe(tmp_path), "--out", tmp_path / "run"),
        "out of device memory",
        "batch_size",
    )
