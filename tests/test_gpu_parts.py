"""The parts of work for a GPU, rehearsed on the CPU: packed, put together elsewhere, cut off, gone
on with, collected.
"""

import json
import os
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


def test_an_unknown_part_is_told(place):
    done = run(place, "everything")
    assert done.returncode == 2
    assert "expected setup, test, bench, general or objectives" in done.stderr
