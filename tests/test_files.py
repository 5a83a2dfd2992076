"""Files and folders are whole or not there, whatever happens while they are written."""

import contextlib
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from llm2comp.errors import DataError, RunError
from llm2comp.files import explain_disk_errors, new_folder, sha256, to_json, whole_or_gone, write_bytes, write_text
from tiny_run import no_file_over, small_disk


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def filled(folder, content="old"):
    folder.mkdir()
    (folder / "a.txt").write_text(content)
    return folder


def write_half(folder, error):
    (folder / "half.txt").write_text("half")
    raise error


def test_write_makes_parents_replaces_and_leaves_nothing_else(tmp_path):
    place = tmp_path / "deep" / "er" / "x.txt"
    write_text(place, "née")
    write_bytes(place, b"new")
    assert place.read_bytes() == b"new"
    assert names(tmp_path) == ["deep", "deep/er", "deep/er/x.txt"]


@pytest.mark.parametrize("failing", ["write", "flush", "fsync", "replace"])
def test_failed_write_keeps_what_was_there(tmp_path, monkeypatch, failing):
    place = tmp_path / "x.txt"
    place.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif failing == "replace":
        monkeypatch.setattr("pathlib.Path.replace", full)
    limit = no_file_over(1000) if failing in ("write", "flush") else contextlib.nullcontext()
    with pytest.raises(RunError, match=r"x\.txt: cannot write: (No space left on device|File too large)"), limit:
        write_bytes(place, b"new" * (100_000 if failing == "write" else 400))
    assert place.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "x.txt", "new")
    assert names(tmp_path) == []


def test_new_folder_takes_the_place_of_the_old_as_a_whole(tmp_path):
    folder = filled(tmp_path / "model")
    (folder / "only-in-old.txt").write_text("")
    with new_folder(folder) as target:
        assert target.parent == tmp_path, "on the same disk"
        (target / "a.txt").write_text("new")
        assert (folder / "a.txt").read_text() == "old", "nothing changes before the end"
    assert names(tmp_path) == ["model", "model/a.txt"]
    assert (folder / "a.txt").read_text() == "new"
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [False, True])
def test_new_folder_changes_nothing_on_an_error(tmp_path, error, old):
    if old:
        filled(tmp_path / "model")
    before = names(tmp_path)
    with pytest.raises(RunError if isinstance(error, OSError) else type(error)), new_folder(tmp_path / "model") as target:
        write_half(target, error)
    assert names(tmp_path) == before


def test_new_folder_puts_the_old_one_back_when_the_last_step_fails(tmp_path, monkeypatch):
    folder = filled(tmp_path / "model")
    rename = type(folder).rename

    def fails_once(self, target):
        if target == folder and self.name[-4:] != ".old":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", fails_once)
    with pytest.raises(RunError, match="Input/output error"), new_folder(folder) as target:
        (target / "a.txt").write_text("new")
    assert names(tmp_path) == ["model", "model/a.txt"]
    assert (folder / "a.txt").read_text() == "old"


def test_new_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(RunError, match="a file of that name"), new_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "mine"
    assert names(tmp_path) == ["model"]


def test_whole_or_gone(tmp_path):
    with whole_or_gone(tmp_path / "kept"):
        filled(tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt), whole_or_gone(tmp_path / "gone"):
        write_half(filled(tmp_path / "gone"), KeyboardInterrupt())
    assert names(tmp_path) == ["kept", "kept/a.txt"]


def by_safetensors(folder):
    save_file({"a": torch.zeros(100_000)}, folder / "x")


def by_torch(folder):
    torch.save({"a": torch.zeros(100_000)}, folder / "x")


def by_tokenizers(folder):
    Tokenizer(models.WordLevel({f"a{i}": i for i in range(20_000)}, "a0")).save(str(folder / "x"))


def by_python(folder):
    (folder / "x").write_text("x" * 400_000)


WRITERS = [by_safetensors, by_torch, by_tokenizers, by_python]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", ["limit", "disk"])
def test_every_librarys_failed_write_is_explained(tmp_path, write, kind):
    place = tmp_path / "disk"
    place.mkdir()
    full = no_file_over(65_536) if kind == "limit" else small_disk(place, 65_536)
    with full, pytest.raises(RunError, match="disk: cannot write: ") as caught, whole_or_gone(place):
        write(place)
    assert caught.value.fix == "free space or choose another place, then run again"
    assert names(tmp_path) in ([], ["disk"])
    if write is not by_torch:
        assert "File too large" in str(caught.value) if kind == "limit" else "No space left" in str(caught.value)


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), RuntimeError("CUDA error"), DataError("bad"), RunError("(os error 28)")]
)
def test_other_errors_pass(tmp_path, error):
    with pytest.raises(type(error)) as caught, explain_disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_what_is_not_finite_is_null_in_json(value):
    tree = {"a": value, "b": [1.5, {"c": (value, "NaN")}], "d": None}
    assert json.loads(to_json(tree, indent=1), parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, {"c": [None, "NaN"]}],
        "d": None,
    }
    assert to_json({"x": [1, 2.5, True]}, sort_keys=True) == json.dumps({"x": [1, 2.5, True]}), "all else as ever"
