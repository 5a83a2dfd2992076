"""The parts of work for a GPU, rehearsed on the CPU: packed, put together elsewhere, cut off, gone
on with, collected.
"""

import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from test_general_data import data  # noqa: F401  a fixture
from tiny_run import write_rows

ROOT = Path(__file__).resolve().parents[1]
STUDY = """
format_version: 1
name: small
recipe: tiny
overrides:
  [pretext=null, ucl=null, scl.steps=2, scl.batch_size=4, scl.schedule.warmup_steps=1, watch=null]
systems:
  one: {scl.data: [{source: PAIRS}]}
after: [last]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the sources as they travel, with a study and a set to score on."""
    folder = tmp_path_factory.mktemp("gpu")
    for part in ("src", "tools", "recipes"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    pairs = [
        {"anchor": f"question {n} of {n * 7}", "positive": f"answer {n} to {n * 7}"}
        for n in range(24)
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    (folder / "small.yaml").write_text(STUDY.replace("PAIRS", str(folder / "pairs.jsonl")))
    sts = folder / "sets" / "sts" / "Small"
    sts.mkdir(parents=True)
    some = pairs[:6]
    rows = [
        {"sentence1": p["anchor"], "sentence2": q["positive"], "score": float(p is q)}
        for p in some
        for q in some
    ]
    write_rows(sts / "test.jsonl", rows)
    return folder


def run(place, *arguments, script="run.sh", **changes):
    settings = {
        "PYTHON": sys.executable,
        "PIECES": str(place / "packed"),
        "SITE": str(place / "site"),
        "OUT": str(place / "out"),
        "WORKERS": "1",
        "SETS": f"--local {place / 'sets'}",
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", str(place / "tools" / "gpu" / script), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=place,
        env=os.environ | settings | changes,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_pieces_add_up_to_what_was_packed(place, data):  # noqa: F811
    done = run(place, data, place / "packed", script="pack.sh", SKIP_WHEELS="1", PIECE="1K")
    assert done.returncode == 0, done.stderr
    pieces = sorted((place / "packed").glob("piece-*"))
    assert len(pieces) > 1
    assert all(piece.stat().st_size <= 1024 for piece in pieces)
    late = pieces[-1].read_bytes()
    pieces[-1].unlink()  # not arrived yet
    assert run(place, "setup").returncode == 0
    assert not (place / "data").exists()
    pieces[-1].write_bytes(late)
    assert run(place, "setup").returncode == 0
    assert json.loads((place / "data" / "general" / "counts.json").read_text())["rows"]
    assert list((place / "data" / "eval").rglob("*.jsonl"))


@pytest.mark.thorough
def test_a_part_is_cut_off_and_goes_on(place):
    (place / "packed").mkdir(exist_ok=True)
    (place / "packed" / "commit").write_text("a" * 40)
    cut = run(place, "study", "small.yaml", PART_SECONDS="1")
    assert cut.returncode != 0, "ended by its time"
    whole = run(place, "study", "small.yaml", WEIGHTS="1", PART_SECONDS="200")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    with tarfile.open(place / "out" / "small.tar.xz") as archive:
        names = archive.getnames()
        archive.extractall(place / "back", filter="data")
    assert (place / "out" / "small.commit").read_text().strip() == "a" * 40
    assert {"table.md", "results.json", "runs/one-seed0/recipe.yaml"} <= set(names)
    assert not any("checkpoint-" in name or "/model/" in name for name in names)
    weights = load_file(place / "back" / "runs/one-seed0/3-scl/adapter/adapter_model.safetensors")
    assert {str(value.dtype) for value in weights.values()} == {"torch.bfloat16"}
    again = run(place, "study", "small.yaml", PART_SECONDS="200")
    assert again.returncode == 0
    told = again.stdout + again.stderr
    assert "run 1/1 one-seed0" in told
    assert "trained" not in told


def test_results_of_another_commit_are_not_mixed_in(place):
    (place / "runs").mkdir(exist_ok=True)
    (place / "runs" / "gpu-other.commit").write_text("b" * 40)
    (place / "other.yaml").write_text(STUDY)
    done = run(place, "study", "other.yaml")
    assert done.returncode == 1
    assert "holds results of commit bbbb" in done.stderr


def test_results_are_of_the_code_s_commit_where_it_has_one(place):
    tree = shutil.copytree(place / "tools", place / "cloned" / "tools").parent
    git = ("git", "-C", str(tree), "-c", "user.name=x", "-c", "user.email=x@x")
    for command in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "x")):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    (place / "packed").mkdir(exist_ok=True)
    (place / "packed" / "commit").write_text("a" * 40)
    (tree / "runs").mkdir()
    (tree / "runs" / "gpu-other.commit").write_text("b" * 40)
    done = run(tree, "study", "other.yaml", PIECES=str(place / "packed"))
    assert f"this is {head.stdout.strip()}" in done.stderr


def test_new_pieces_take_the_place_of_what_was_unpacked(tmp_path, place):
    for number in (1, 2):
        (tmp_path / "new").mkdir(exist_ok=True)
        (tmp_path / "new" / "number").write_text(str(number))
        with tarfile.open(tmp_path / "data.tar.xz", "w:xz") as archive:
            archive.add(tmp_path / "new" / "number", "number")
        with tarfile.open(tmp_path / "piece-00", "w") as archive:
            archive.add(tmp_path / "data.tar.xz", "data.tar.xz")
        total = hashlib.sha256((tmp_path / "piece-00").read_bytes()).hexdigest()
        (tmp_path / "sum").write_text(f"{total}  -\n")
        done = run(place, "setup", PIECES=str(tmp_path), SITE=str(tmp_path / "site"))
        assert done.returncode == 0, done.stderr
        assert (place / "data" / "number").read_text() == str(number)


def test_no_piece_of_an_earlier_archive_stays(tmp_path, monkeypatch):
    study, out = tmp_path / "study", tmp_path / "out"
    for run_of in ("model-a-seed0", "model"):
        (study / run_of).mkdir(parents=True)
        (study / run_of / "log").write_bytes(os.urandom(3000))
    collect = runpy.run_path(str(ROOT / "tools" / "gpu" / "collect.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["collect", str(study), str(out), "s"])
    for piece, names in (
        (2**20, {"s.tar.xz"}),
        (2000, {"s.tar.xz.00", "s.tar.xz.01"}),
        (2**20, {"s.tar.xz"}),
    ):
        monkeypatch.setitem(collect.__globals__, "PIECE", piece)
        collect()
        assert {file.name for file in out.iterdir()} == names
    with tarfile.open(out / "s.tar.xz") as archive:
        assert archive.getnames() == ["model-a-seed0/log"]


def test_an_unknown_part_is_told(place):
    done = run(place, "everything")
    assert done.returncode == 2
    assert "expected setup, test, bench, general or objectives" in done.stderr
