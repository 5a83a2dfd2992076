"""The cache of corpora: its rows are those read and tokenised anew, whatever happened to it; memory
does not grow with them.
"""

import gzip
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time

import numpy as np
import pytest
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from families import make_tokenizer
from llm2comp.data import store
from llm2comp.data.pretext import PretextRows, token_rows
from llm2comp.data.sources import read_texts
from llm2comp.data.store import distinct, stored_rows, stored_texts, tokenizer_digest, write_rows
from llm2comp.errors import DataError, RunError
from llm2comp.recipe import PretextStage, TextData
from llm2comp.system.cache import cache_folder
from measuring import peak_bytes
from test_resume import StoppedError, make_recipe, stop, train_until, trained, weights
from tiny_run import no_file_over, sentences
from tiny_run import write_rows as write_lines

TOKENIZER = make_tokenizer()
BOS, MAX_TOKENS = 0, 48


def tokenise(texts):
    return [[BOS, *row] for row in TOKENIZER(list(texts), add_special_tokens=False)["input_ids"]]


def unused(texts):
    raise AssertionError("tokenised although it was in the cache")


@pytest.fixture
def source(tmp_path):
    texts = sentences(30) + ["brief"] + [" ".join(sentences(4, seed=n)) for n in range(3)]
    return write_lines(
        tmp_path / "texts.jsonl",
        [{"text": text, "other": text[::-1]} for text in texts] + [{"text": ""}],
    )


def stage(*sources, **settings):
    data = [
        {"source": str(source)} if not isinstance(source, dict) else source for source in sources
    ]
    limits = {"min_characters": 15, "site_margin_tokens": 4, "long_texts": "truncate"}
    return PretextStage.model_validate({"data": data} | limits | settings)


def stored(root, stage, tokenise=tokenise, max_tokens=MAX_TOKENS, tokenizer=TOKENIZER, bos_id=BOS):
    lines = []
    rows, left_out = stored_rows(stage, tokenise, max_tokens, bos_id, tokenizer, lines.append, root)
    return rows, left_out, lines


def as_lists(rows):
    return [row.tolist() for row in rows]


def folders(root):
    return sorted(path for path in root.iterdir() if path.is_dir())


@pytest.mark.parametrize("policy", ["skip", "truncate", "chunk"])
def test_rows_are_those_of_the_texts_in_memory(tmp_path, source, policy):
    other = write_lines(tmp_path / "more.jsonl", [{"text": text} for text in sentences(5, seed=9)])
    both = stage(source, other, long_texts=policy)
    texts = [read_texts(spec) for spec in both.data]
    expected, left_out = token_rows(
        [t for loaded in texts for t in loaded.rows], both, tokenise, MAX_TOKENS, BOS
    )
    for tokens_by in (tokenise, unused):  # made, then found
        rows, found_left_out, lines = stored(tmp_path / "cache", both, tokens_by)
        assert as_lists(rows) == as_lists(expected)
        assert found_left_out == left_out
        assert found_left_out["under 15 characters"] == 1
        assert lines == [loaded.summary() for loaded in texts]
        assert lines[0] == "texts.jsonl: 34 rows; left out: 1 empty (line 35)"
    assert len(folders(tmp_path / "cache")) == 1


def test_a_store_is_a_sequence_of_arrays(tmp_path, source):
    rows, _, _ = stored(tmp_path, stage(source))
    expected = as_lists(rows)
    assert len({len(row) for row in expected}) > 3
    assert rows.lengths.tolist() == [len(row) for row in expected]
    assert rows[-1].tolist() == rows[np.int64(len(rows) - 1)].tolist() == expected[-1]
    assert rows[0].dtype == np.int32
    for outside in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            rows[outside]
    assert as_lists(pickle.loads(pickle.dumps(rows))) == expected
    listed = PretextRows([np.array(row) for row in expected], 200, 4, 7, 4)
    held = PretextRows(rows, 200, 4, 7, 4)
    assert [held[i] for i in range(200)] == [listed[i] for i in range(200)]


def test_what_the_rows_depend_on_is_the_key(tmp_path, source):
    """Each change makes a folder of its own; where the file lies and how the tokenizer was last
    used do not.
    """
    root = tmp_path / "cache"
    first = as_lists(stored(root, stage(source))[0])
    variants = [
        {"stage": stage(source, min_characters=16)},
        {"stage": stage(source, site_margin_tokens=5)},
        {"stage": stage(source, long_texts="chunk")},
        {"stage": stage({"source": str(source), "limit": 20})},
        {"stage": stage({"source": str(source), "column": "other"})},
        {"stage": stage(source, source)},
        {"stage": stage(source), "max_tokens": MAX_TOKENS - 1},
        {"stage": stage(source), "bos_id": None},
        {"stage": stage(source), "tokenizer": make_tokenizer(bos=False)},
        {"stage": stage(shutil.copy(source, tmp_path / "renamed.jsonl"))},
    ]
    for number, variant in enumerate(variants, 2):
        stored(root, **variant)
        assert len(folders(root)) == number, variant
    text = source.read_text()
    source.write_text(text.replace(text[12:15], "xyz", 1))
    assert as_lists(stored(root, stage(source))[0]) != first
    source.write_text(text)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(source, tmp_path / "elsewhere")
    digest = tokenizer_digest(TOKENIZER)
    TOKENIZER(["a b", "c"], padding=False, truncation=True, max_length=1)
    assert '"truncation":{' in TOKENIZER.backend_tokenizer.to_str(), "vacuous: the tokenizer forgot"
    assert tokenizer_digest(TOKENIZER) == digest
    assert as_lists(stored(root, stage(moved), unused)[0]) == first


def truncated(file):
    os.truncate(file, file.stat().st_size - 4)


def altered(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def emptied(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncated, altered, emptied, os.unlink])
@pytest.mark.parametrize("name", ["tokens.i32", "bounds.i64", "stored.json"])
def test_a_damaged_store_is_made_anew(tmp_path, source, name, damage):
    rows, left_out, lines = stored(tmp_path, stage(source))
    expected, (folder,) = (
        as_lists(rows),
        [p for p in folders(tmp_path) if p.name.startswith("tokens-")],
    )
    damage(folder / name)
    rows, *told = stored(tmp_path, stage(source))
    assert (as_lists(rows), told) == (expected, [left_out, lines])
    assert as_lists(stored(tmp_path, stage(source), unused)[0]) == expected
    assert sorted(path.name for path in folder.iterdir()) == [
        "bounds.i64",
        "stored.json",
        "tokens.i32",
    ]


def test_damage_is_seen_in_each_part_of_a_large_file(tmp_path):
    file = tmp_path / "large"
    file.write_bytes(bytes(3 * store.PARTS * store.PART_BYTES))
    known = store._known(file)
    for part in range(store.PARTS):
        with file.open("rb+") as stream:
            stream.seek(3 * part * store.PART_BYTES + 5)
            stream.write(b"\1")
        assert store._known(file) != known, part
        known = store._known(file)


def test_an_open_store_outlives_its_folder_but_not_damage(tmp_path, source):
    rows, _, _ = stored(tmp_path, stage(source))
    expected = as_lists(rows)
    os.truncate(rows.folder / "tokens.i32", 4 * int(rows.bounds[-1]) - 4)
    assert as_lists(rows[i] for i in range(len(rows) - 1)) == expected[:-1]
    with pytest.raises(DataError, match="is damaged"):
        rows[-1]
    rows, _, _ = stored(tmp_path, stage(source))
    shutil.rmtree(tmp_path / rows.folder.name)
    assert as_lists(rows) == expected


def in_new_process(work, *args):
    """Spawned: the test process has threads, which a fork would leave behind half-way."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=args)
    process.start()
    return process


def make_slowly(folder, source, number):
    def slowly(texts):
        with (folder / "made").open("a") as out:
            out.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return tokenise(texts)

    (folder / f"ready-{number}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.01)
    rows, _, lines = stored(folder / "cache", stage(source), slowly)
    (folder / f"found-{number}").write_text(json.dumps([as_lists(rows), lines]))


@pytest.mark.thorough
def test_processes_at_once_make_it_once(tmp_path, source):
    for process in [in_new_process(make_slowly, tmp_path, source, number) for number in range(2)]:
        process.join(120)
    assert len({(tmp_path / f"found-{number}").read_text() for number in range(2)}) == 1
    assert len((tmp_path / "made").read_text().splitlines()) == 1


def make_killed(folder, source):
    def killed(texts):
        os.kill(os.getpid(), signal.SIGKILL)

    stored(folder / "cache", stage(source), killed)


@pytest.mark.thorough
def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(tmp_path, source):
    process = in_new_process(make_killed, tmp_path, source)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (leftover,) = folders(tmp_path / "cache")
    assert leftover.name.startswith(".tokens-")
    expected = token_rows(
        read_texts(stage(source).data[0]).rows, stage(source), tokenise, MAX_TOKENS, BOS
    )[0]
    assert as_lists(stored(tmp_path / "cache", stage(source))[0]) == as_lists(expected)
    assert not leftover.exists()


def test_sources_that_fail_leave_nothing(tmp_path, source):
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(source.read_bytes())[:-40])
    with pytest.raises(DataError, match="cannot be read"):
        stored(tmp_path / "cache", stage(source, broken))
    with pytest.raises(DataError, match="no text is fit"):
        stored(tmp_path / "cache", stage(source, min_characters=10**6))
    with pytest.raises(DataError, match="column: text"):
        stored(tmp_path / "cache", stage({"source": str(source), "column": "texd"}))
    with pytest.raises(DataError, match=r"did you mean 'texts.jsonl'"):
        stored(tmp_path / "cache", stage(tmp_path / "text.jsonl"))
    assert folders(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, source):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write: Not a directory") as error:
        stored(tmp_path / "file" / "cache", stage(source))
    assert "LLM2COMP_CACHE" in error.value.fix
    with pytest.raises(RunError, match="cannot write: File too large") as error, no_file_over(2000):
        stored(tmp_path / "cache", stage(source))
    assert "LLM2COMP_CACHE" in error.value.fix
    with pytest.raises(RunError, match="LLM2COMP_CACHE"), no_file_over(500):
        stored_texts(stage(source).data, 0, print, tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LLM2COMP_CACHE", "~/chosen")
    assert cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("LLM2COMP_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "llm2comp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "llm2comp"


def test_texts_of_stage_two(tmp_path, source):
    specs = stage(source, source).data
    expected = [text for text in read_texts(specs[0]).rows if len(text) >= 15] * 2
    for _ in range(2):
        lines = []
        texts = stored_texts(specs, 15, lines.append, tmp_path / "cache")
        assert texts.to_dict() == {"anchor": expected, "positive": expected}
        assert lines == ["texts.jsonl: 34 rows; left out: 1 empty (line 35)"] * 2
    (folder,) = folders(tmp_path / "cache")
    assert {file["filename"] for file in texts.cache_files} == {str(folder / "texts.arrow")}, (
        "not memory-mapped"
    )
    assert [distinct(texts, most) for most in (1, 5, 33, 34, 99)] == [1, 5, 33, 33, 33]
    assert len(set(expected)) == 33
    batches = list(NoDuplicatesBatchSampler(texts, batch_size=11, drop_last=True))
    assert len(batches) == 6
    assert all(len(set(texts[batch]["anchor"])) == 11 for batch in batches)
    none = stored_texts(specs, 10**6, print, tmp_path / "cache")
    assert (len(none), distinct(none, 4)) == (0, 0)


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    def words(texts):
        return [[len(word) for word in text.split()] for text in texts]

    some = [{"text": " ".join(sentences(4, seed=seed))} for seed in range(1500)]
    files = {times: write_lines(tmp_path / f"{times}.jsonl", some * times) for times in (1, 10)}
    peaks = {}
    for times, file in files.items():
        texts = read_texts(TextData(source=str(file))).rows
        peaks["list", times] = peak_bytes(
            lambda texts=texts, file=file: token_rows(texts, stage(file), words, 48, None)
        )
        peaks["store", times] = peak_bytes(
            lambda file=file: stored(tmp_path / "cache", stage(file), words, bos_id=None)
        )
        peaks["texts", times] = peak_bytes(
            lambda file=file: stored_texts(stage(file).data, 0, print, tmp_path / "cache")
        )
    per_row = {
        kind: (peaks[kind, 10] - peaks[kind, 1]) / (9 * len(some))
        for kind in ("list", "store", "texts")
    }
    assert per_row["list"] > 200, f"vacuous: {per_row}"
    assert per_row["store"] < 24, per_row
    assert per_row["texts"] < 24, per_row


def test_rows_written_come_back(tmp_path):
    rows = [np.arange(n, dtype=np.int32) - 3 for n in (1, 0, 7, 2)]
    assert as_lists(write_rows(tmp_path, iter(rows))) == as_lists(rows)


@pytest.mark.thorough
@pytest.mark.parametrize("deleted", [False, True])
def test_resume_is_exact_with_the_cache_and_without(tmp_path, monkeypatch, deleted):
    """Stopped in stage 1 and in stage 2; what was trained is bit for bit that of a run that was
    not, its cache there or not.
    """
    recipe, run, seen = (
        make_recipe(tmp_path, steps=4, scl=None, watch=None),
        tmp_path / "run",
        tmp_path / "seen.jsonl",
    )
    cache, built, build = tmp_path / "cache", [], store._build
    monkeypatch.setenv("LLM2COMP_CACHE", str(cache))

    def counted(folder, fill):
        built.append(folder.name.split("-")[0])
        return build(folder, fill)

    monkeypatch.setattr(store, "_build", counted)
    reference = train_until(recipe, tmp_path / "reference", ("never", 0), stop, tmp_path / "unused")
    assert built == ["tokens", "texts"]
    for place in (("pretext", 3), ("ucl", 4), None):
        if deleted:
            shutil.rmtree(cache)
        if place is None:
            train_until(recipe, run, ("never", 0), stop, seen)
        else:
            with pytest.raises(StoppedError):
                train_until(recipe, run, place, stop, seen)
    steps = [("pretext", n) for n in (1, 2, 3, 3, 4)] + [("ucl", n) for n in (1, 2, 3, 4, 3, 4)]
    assert trained(seen) == steps
    assert built == ["tokens", "texts"] + (
        ["tokens", "tokens", "texts", "texts"] if deleted else []
    )
    assert weights(run) == weights(reference)
