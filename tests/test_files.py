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
from llm2comp.system.files import (
    explain_disk_errors,
    open_to_others,
    sha256,
    to_json,
    whole_or_gone,
    write_bytes,
    write_text,
)
from llm2comp.system.folders import (
    MARK_FILE,
    START,
    Kind,
    claim,
    new_folder,
    refuse_foreign,
    refuse_output,
    refuse_taken,
    remove_folder,
    unclaim,
)
from tiny_run import no_file_over, small_disk

KIND = Kind("a test", ("a.txt", "only-in-old.txt"), ("a.txt",))
OTHER = Kind("another", ("b.txt",), ("b.txt",))


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
    with (
        pytest.raises(
            RunError, match=r"x\.txt: cannot write: (No space left on device|File too large)"
        ),
        limit,
    ):
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
    with new_folder(folder, KIND) as target:
        assert target.parent == tmp_path, "on the same disk"
        (target / "a.txt").write_text("new")
        assert (folder / "a.txt").read_text() == "old", "nothing changes before the end"
    assert names(tmp_path) == ["model", f"model/{MARK_FILE}", "model/a.txt"]
    assert (folder / "a.txt").read_text() == "new"


# ---- what is whose


def written(folder, kind=KIND, files=("x/y.bin", "z")):
    with new_folder(folder, kind) as new:
        for name in files:
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text("ours")
    return folder


def refused(folder, kind, *parts):
    """Neither replaced nor removed, and nothing changes."""
    before = {
        name: (folder / name).read_bytes() for name in names(folder) if (folder / name).is_file()
    }
    for attempt in (
        lambda: refuse_foreign(folder, kind),
        lambda: written(folder, kind),
        lambda: remove_folder(folder, kind),
    ):
        with pytest.raises(RunError, match="would replace what is not its own") as caught:
            attempt()
        assert all(part in str(caught.value) for part in (str(folder), *parts)), caught.value
    assert {
        name: (folder / name).read_bytes() for name in names(folder) if (folder / name).is_file()
    } == before


def test_a_folder_that_was_written_before_is_replaced_whole_and_removed(tmp_path):
    folder = written(tmp_path / "m", files=("x/y.bin", "old"))
    written(folder)
    assert names(folder) == [MARK_FILE, "x", "x/y.bin", "z"]
    (folder / "a.txt").write_text("put beside by the same kind of command")
    (folder / ".DS_Store").write_text("")
    remove_folder(folder, KIND)
    remove_folder(folder, KIND)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["thesis.txt", "x/notes.md", ".git/config", "deep/er/a.txt", "A.TXT"]
)
def test_a_file_of_others_in_it_stops_that(tmp_path, name):
    folder = written(tmp_path / "m")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("years of work")
    refused(folder, KIND, name)


def test_so_does_a_link_in_it(tmp_path):
    folder = written(tmp_path / "m")
    (tmp_path / "far").mkdir()
    (folder / "link").symlink_to(tmp_path / "far")
    refused(folder, KIND, "link")


@pytest.mark.parametrize("mark", ["", "{}", "[]", '{"a test": 3}', '{"another": ["y"]}'])
def test_a_folder_without_its_mark_is_not_replaced(tmp_path, mark):
    folder = tmp_path / "m"
    folder.mkdir()
    if mark:
        (folder / MARK_FILE).write_text(mark)
    written(folder)  # empty
    (folder / MARK_FILE).write_text(mark)
    refused(folder, KIND, "a new or empty folder, or a test", "x, z")


def test_one_kind_does_not_replace_another(tmp_path):
    refused(written(tmp_path / "m", OTHER), KIND, "x, z")


def test_folders_from_before_there_were_marks_are_known_by_their_files(tmp_path):
    folder = filled(tmp_path / "m")
    refuse_foreign(folder, KIND)
    refused(folder, OTHER, "a.txt")
    (folder / "b.txt").write_text("")
    refused(folder, KIND, "b.txt")


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    written(tmp_path / "far")
    (tmp_path / "m").symlink_to(tmp_path / "far")
    written(tmp_path / "m", files=("new",))
    assert (tmp_path / "m").is_symlink()
    assert names(tmp_path / "far") == [MARK_FILE, "new"]


def test_a_folder_that_is_filled_bit_by_bit(tmp_path):
    folder = tmp_path / "m"
    claim(folder, OTHER)
    claim(folder, OTHER)
    (folder / "b.txt").write_text("")
    (folder / "thesis.txt").write_text("")
    claim(folder, OTHER)
    claim(folder, KIND)  # of nothing that is there would its files take the place
    assert set(json.loads((folder / MARK_FILE).read_text())) == {"another", "a test"}
    whole = Kind("all of a folder")
    for kind, found in (
        (Kind("a third", ("thesis.*",)), "thesis.txt"),
        (whole, "b.txt, thesis.txt"),
    ):
        for attempt in (refuse_taken, claim):
            with pytest.raises(RunError, match=f"(?s)not its own.*found: {found}"):
                attempt(folder, kind)
    claim(tmp_path / "new", whole)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".lock").write_text("")
    claim(tmp_path / "hidden", whole)


def test_a_claim_that_is_undone_leaves_what_others_have_there(tmp_path):
    whole, folder = Kind("all of a folder"), tmp_path / "m"
    for hidden in ((), (".git/HEAD", ".bashrc")):
        for name in hidden:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("years of work")
        kept = names(tmp_path)
        before = claim(folder, whole)
        (folder / "table" / "data").mkdir(parents=True)
        (folder / "link").symlink_to(tmp_path)
        for name in (".lock", "table/data/x", *[".cache"] * bool(hidden)):
            (folder / name).write_text("")
        unclaim(folder, before)
        assert names(tmp_path) == sorted([*kept, *["m/.cache"] * bool(hidden)])


def test_a_start_of_a_run_takes_no_file_of_others_along(tmp_path):
    folder = written(tmp_path / "start", START)
    written(folder, START)
    (folder / ".notes").write_text("years of work")
    refused(folder, START, ".notes")


def test_outputs_that_are_inputs_folders_or_anothers(tmp_path):
    place, link, hard = (tmp_path / name for name in ("in.txt", "link.txt", "hard.txt"))
    refuse_output(place, [place])  # not there yet
    place.write_text("mine")
    link.symlink_to(place)
    hard.hardlink_to(place)
    for out in (place, link, hard, tmp_path / "." / "in.txt", tmp_path / "x" / ".." / "in.txt"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(RunError, match="(?s)replace its own input.*in.txt"):
            refuse_output(out, [tmp_path / "no", place])
    with pytest.raises(RunError, match="a folder stands there"):
        refuse_output(tmp_path / "x")
    refuse_output(place, [tmp_path / "x"], lambda file: file.read_text() == "mine")
    with pytest.raises(RunError, match="not its own"):
        refuse_output(place, (), lambda file: file.read_text() == "other")
    place.write_text("")
    refuse_output(place, (), lambda _: False)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_what_is_written_has_the_umasks_mode(tmp_path, mask):
    before = os.umask(mask)
    try:
        folder = written(tmp_path / "m", files=("a/b",))
        with new_folder(folder, KIND) as new:
            (new / "a").mkdir(mode=0o700)
            save_file({"a": torch.zeros(10)}, new / "a" / "b.safetensors")
            (new / "tool").touch(mode=0o700)
        write_bytes(tmp_path / "deep" / "file", b"x")
        (tmp_path / "one").touch(mode=0o600)
        open_to_others(tmp_path / "one")
    finally:
        os.umask(before)
    modes = {
        path: (tmp_path / path).stat().st_mode & 0o777
        for path in ("m", "m/a", "m/a/b.safetensors", "m/tool", "one")
    }
    modes |= {
        path: (tmp_path / path).stat().st_mode & 0o777
        for path in ("deep", "deep/file", f"m/{MARK_FILE}")
    }
    executable = {"m", "m/a", "deep", "m/tool"}
    files = set(modes) - executable
    assert {modes[path] for path in executable} == {0o777 & ~mask}
    assert {modes[path] for path in files} == {0o666 & ~mask}


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), OSError(28, "No space left on device"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("old", [False, True])
def test_new_folder_changes_nothing_on_an_error(tmp_path, error, old):
    if old:
        filled(tmp_path / "model")
    before = names(tmp_path)
    with (
        pytest.raises(RunError if isinstance(error, OSError) else type(error)),
        new_folder(tmp_path / "model", KIND) as target,
    ):
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
    with pytest.raises(RunError, match="Input/output error"), new_folder(folder, KIND) as target:
        (target / "a.txt").write_text("new")
    assert names(tmp_path) == ["model", "model/a.txt"]
    assert (folder / "a.txt").read_text() == "old"


def test_new_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(RunError, match="a file of that name"), new_folder(tmp_path / "model", KIND):
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
    with (
        full,
        pytest.raises(RunError, match="disk: cannot write: ") as caught,
        whole_or_gone(place),
    ):
        write(place)
    assert caught.value.fix == "free space or choose another place, then run again"
    assert names(tmp_path) in ([], ["disk"])
    if write is not by_torch:
        assert (
            "File too large" in str(caught.value)
            if kind == "limit"
            else "No space left" in str(caught.value)
        )


@pytest.mark.parametrize(
    "error",
    [ValueError("a bug"), RuntimeError("CUDA error"), DataError("bad"), RunError("(os error 28)")],
)
def test_other_errors_pass(tmp_path, error):
    with pytest.raises(type(error)) as caught, explain_disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert (
        sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_what_is_not_finite_is_null_in_json(value):
    tree = {"a": value, "b": [1.5, {"c": (value, "NaN")}], "d": None}
    assert json.loads(to_json(tree, indent=1), parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, {"c": [None, "NaN"]}],
        "d": None,
    }
    assert to_json({"x": [1, 2.5, True]}, sort_keys=True) == json.dumps({"x": [1, 2.5, True]}), (
        "all else as ever"
    )
