"""An index over real LanceDB tables and a real encoder: exact, incremental, whole after every kind
of interruption, and refused where it would mix.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

pytest.importorskip("lancedb", reason="needs the extra search")

import llm2comp
from document_files import pdf_bytes, write_all
from llm2comp.errors import DataError, Llm2CompError, RunError
from llm2comp.system import console
from llm2comp.system.console import GENERAL_TINY
from llm2comp.use.index import filling, store
from llm2comp.use.index.hits import fused
from llm2comp.use.index.info import INFO_FILE, read_info, write_info
from llm2comp.use.index.store import Store
from tiny_run import assert_refused, cli, no_file_over

TINY, OTHER = "mean:builtin:tiny", "last_token:builtin:tiny"
PETS = "# Pets\n\n## Cats\n\nCats purr and sleep.\n\n## Dogs\n\nDogs bark at the postman.\n"
CARS = "# Cars\n\nEngines roar.\nBrakes squeal, and a dog sleeps on the back seat.\n"


def write_docs(folder):
    folder.mkdir()
    (folder / "pets.md").write_text(PETS)
    (folder / "sub").mkdir()
    (folder / "sub" / "cars.md").write_text(CARS)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of documents, index of them): not to be changed."""
    folder = write_docs(tmp_path_factory.mktemp("index") / "docs")
    index = llm2comp.Index(folder.parent / "db", TINY)
    index.add(folder)
    return folder, index


@pytest.fixture
def own(made, tmp_path):
    """The same to be changed. The copy's files are below another folder: all are new to it."""
    shutil.copytree(made[0], tmp_path / "docs")
    shutil.copytree(made[1].db, tmp_path / "db")
    for file in (made[0] / "pets.md", made[0] / "sub" / "cars.md"):
        os.utime(tmp_path / "docs" / file.relative_to(made[0]), ns=(1, 1))
    index = llm2comp.Index(tmp_path / "db")
    index._store = Store(index.db, read_info(index.db).table)
    paths = [str(made[0] / "pets.md"), str(made[0] / "sub" / "cars.md")]
    index._store.remove(paths)
    index.add(tmp_path / "docs")
    return tmp_path / "docs", index


def rows(index):
    """(file name, first line, text) of all passages, in order."""
    table = Store(index.db, read_info(index.db).table).table.to_arrow().to_pylist()
    return sorted((Path(row["path"]).name, row["first"], row["text"]) for row in table)


# ---- what is found


def test_rows_are_the_passages(made):
    assert rows(made[1]) == [
        ("cars.md", 3, "Cars\n" + CARS.partition("\n\n")[2].strip()),
        ("pets.md", 5, "Pets > Cats\nCats purr and sleep."),
        ("pets.md", 9, "Pets > Dogs\nDogs bark at the postman."),
    ]
    assert made[1].info | {"revision": 0} == {
        "model": TINY,
        "revision": 0,
        "dimensions": 256,
        "passage_tokens": 256,
        "files": 2,
        "passages": 3,
        "search": "exact",
    }


def test_vectors_are_those_of_the_encoder(made):
    """Cosines equal those of the stock encode; order likewise."""
    model = llm2comp.load(TINY)
    texts = [text for _, _, text in rows(made[1])]
    question = "who barks?"
    vectors = model.encode([question, *texts], normalize_embeddings=True)
    expected = sorted(zip(vectors[1:] @ vectors[0], texts, strict=True), reverse=True)
    hits = made[1].search(question, mode="vectors")
    assert [hit.score for hit in hits] == pytest.approx([c for c, _ in expected], abs=1e-5)
    assert [f"{hit.heading}\n{hit.text}" for hit in hits] == [text for _, text in expected]


def test_no_passage_is_longer_than_the_model_reads(made, tmp_path):
    """BOS, memory, headings and the prompt of documents take room from the text: a vector holds all
    of its passage. Where a model reads less than the usual passage, its own room is the size.
    """
    model = llm2comp.load(GENERAL_TINY, "cpu")
    model.prompts["document"] = "text: "
    model[0].role_max_tokens = {"document": 64}
    (tmp_path / "docs").mkdir()
    long = " ".join(f"word{n} is followed by more." for n in range(60))
    (tmp_path / "docs" / "long.md").write_text(f"# A title\n\n## A longer heading\n\n{long}\n")

    def index(db, size=None):
        found = llm2comp.Index(tmp_path / db, GENERAL_TINY, passage_tokens=size)
        found.lend(GENERAL_TINY, model)
        return found

    own = index("db")
    own.add(tmp_path / "docs")
    prompt = len(model.tokenizer("text: ", add_special_tokens=False)["input_ids"])
    assert own.info["passage_tokens"] == 64 - 1 - prompt
    table = Store(own.db, read_info(own.db).table).table.to_arrow().to_pylist()
    assert len(table) > 5
    model[0].role_max_tokens = {}
    whole = model.encode_document([row["text"] for row in table], normalize_embeddings=True)
    assert np.vstack([row["vector"] for row in table]) == pytest.approx(whole, abs=1e-5)
    model[0].role_max_tokens = {"document": 64}
    with pytest.raises(DataError, match="longer than the model reads"):
        index("other", 64).add(tmp_path / "docs")
    # of an index whose passages are longer already, new files are cut to what is read
    write_info(own.db, replace(read_info(own.db), passage_tokens=256))
    (tmp_path / "docs" / "new.md").write_text(f"# New\n\n{long}\n")
    assert index("db").add(tmp_path / "docs").unchanged == 1
    counts = [len(model.tokenizer(text)["input_ids"]) for _, _, text in rows(own)]
    assert max(counts) + prompt <= 64
    # the same model at another place: nothing is embedded, whatever the size
    assert index("db").migrate(GENERAL_TINY) == 0
    # of another model's passages, those that this one does not read whole are counted
    moved = llm2comp.Index(tmp_path / "moved", TINY, passage_tokens=32)
    moved.add(tmp_path / "docs")
    model[0].role_max_tokens = {"document": 1 + prompt + 24}
    moved.lend(GENERAL_TINY, model)
    counts = [len(model.tokenizer(text)["input_ids"]) for _, _, text in rows(moved)]
    assert moved.migrate(GENERAL_TINY) == sum(count > 1 + 24 for count in counts) > 0
    assert moved.info["passage_tokens"] == 24, "files to come are cut to what it reads"


def test_words_are_found_by_their_stems(made):
    hits = made[1].search("the barking dog", mode="keywords")
    assert [(Path(h.path).name, h.first, h.headings) for h in hits] == [
        ("pets.md", 9, ("Pets", "Dogs")),
        ("cars.md", 3, ("Cars",)),
    ]
    assert hits[0].matched == ("Dogs", "bark")
    assert hits[1].matched == ("dog",)
    assert hits[0].score > hits[1].score > 0
    assert made[1].search("zebra", mode="keywords") == []


def test_hybrid_fuses_both_rankings(made):
    question, index = "the barking dog", made[1]
    both = {hit.text: hit.score for hit in index.search(question)}
    expected: dict[str, float] = {}
    for mode in ("vectors", "keywords"):
        for rank, hit in enumerate(index.search(question, mode=mode), 1):
            expected[hit.text] = expected.get(hit.text, 0) + 1 / (60 + rank)
    assert both == pytest.approx(expected)
    assert list(both.values()) == sorted(both.values(), reverse=True)
    assert fused([[(1, 9.0), (2, 8.0)], [(2, 1.0)]]) == [(2, 1 / 62 + 1 / 61), (1, 1 / 61)]


@pytest.mark.parametrize("mode", ["hybrid", "vectors", "keywords"])
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("sub", {"cars.md"}),
        ("sub/", {"cars.md"}),
        ("pets.md", {"pets.md"}),
        ("*.md", {"pets.md", "cars.md"}),
        ("p?ts.md", {"pets.md"}),
        ("ets.md", set()),
        ("it's (not) [there]", set()),
        ("/", {"pets.md", "cars.md"}),
    ],
)
def test_filter_by_path(made, mode, pattern, names):
    hits = made[1].search("dogs", mode=mode, path=pattern)
    assert {Path(hit.path).name for hit in hits} == names
    assert made[1].search("dogs", mode=mode, path=str(made[0] / "sub"))[0].headings == ("Cars",)


def test_snippet_is_around_the_words():
    text = "filler " * 100 + "the needle is here " + "more " * 100
    hit = llm2comp.use.index.hits.Hit("f", 1, 1, (), text, 1.0, ("needle",))
    assert len(hit.snippet) < 260
    (span,) = hit.spans(hit.snippet)
    assert hit.snippet[slice(*span)] == "needle"
    assert hit.snippet.startswith("… ")


# ---- what changes


def test_only_what_has_changed_is_embedded_again(own, monkeypatch):
    folder, index = own
    seen = []
    encoder = index._encoder
    whole = type(encoder).vectors
    monkeypatch.setattr(
        type(encoder),
        "vectors",
        lambda self, texts, *a: seen.extend(texts) or whole(self, texts, *a),
    )
    added = index.add(folder)
    assert (added.changed, added.unchanged, added.gone, seen) == (0, 2, 0, [])
    os.utime(folder / "pets.md")  # touched: read, found equal
    assert index.add(folder).unchanged == 2
    assert seen == []
    (folder / "pets.md").write_text(PETS.replace("purr", "hiss"))
    (folder / "new.txt").write_text("Fish swim.")
    (folder / "sub" / "cars.md").unlink()
    (folder / "bad.txt").write_bytes(b"\xff")
    added = index.add(folder)
    assert (added.changed, added.unchanged, added.gone, added.passages) == (2, 0, 1, 3)
    assert len(seen) == 3
    assert [text for _, _, text in rows(index)] == [
        "Fish swim.",
        "Pets > Cats\nCats hiss and sleep.",
        "Pets > Dogs\nDogs bark at the postman.",
    ]
    assert "1 not UTF-8 (line 1) (bad.txt)" in added.summary()
    assert "2 new or changed, 0 unchanged, 1 gone; 3 passages in the index" in added.summary()
    assert index.search("purr", mode="keywords") == []
    assert index.search("fish", k=1)[0].text == "Fish swim."
    # a file that can no longer be read leaves too
    (folder / "new.txt").write_bytes(b"\xff")
    assert index.add(folder).gone == 1
    assert len(rows(index)) == 2


def test_several_folders_and_one_file(own, tmp_path):
    _, index = own
    (tmp_path / "docs 2").mkdir()
    (tmp_path / "docs 2" / "it's\nodd.md").write_text("Odd words.")
    (tmp_path / "single.txt").write_text("Single words.")
    index.add(tmp_path / "docs 2")
    assert index.add(tmp_path / "single.txt").passages == 5
    shutil.rmtree(tmp_path / "docs 2")
    (tmp_path / "docs 2").mkdir()
    added = index.add(tmp_path / "docs 2")
    assert (added.gone, added.passages) == (1, 4), "the other folder's files stay"
    for file in (tmp_path / "single.txt", *sorted((tmp_path / "docs").rglob("*.md"))):
        file.write_text("")
    with pytest.raises(DataError, match="nothing in it can be read"):
        llm2comp.Index(tmp_path / "none", TINY).add(tmp_path / "docs")
    assert index.add(tmp_path / "docs").passages == 1
    assert index.add(tmp_path / "single.txt").passages == 0
    assert index.search("words") == []


def test_documents_that_were_moved_or_removed_leave_when_told(own, tmp_path):
    """A folder that is missing is not an empty one; `--remove` takes it out without a model."""
    folder, index = own
    (tmp_path / "single.txt").write_text("Single words.")
    index.add(tmp_path / "single.txt")
    moved = folder.rename(tmp_path / "documents")
    fix = f"llm2comp index --remove {folder} --db {index.db}"
    for path in (folder, f"{folder}/"):
        with pytest.raises(DataError, match=f"(?s)2 files of it in the index.*{re.escape(fix)}"):
            index.add(path)
    assert_refused(cli("index", moved, folder, "--db", index.db), "no such file or folder", fix)
    assert len(rows(index)) == 4, "nothing was done"
    assert_refused(
        cli("index", "--db", index.db, "--remove", tmp_path / "dosc"),
        f"nothing of it is in the index\n  found: 3 files in {tmp_path}\n",
        f"did you mean {str(folder)!r}?",
    )
    said = cli("index", "--db", index.db, "--remove", folder, "--remove", f"{tmp_path}/single.txt")
    assert (said.code, said.err.count("taken out of the index")) == (0, 2), said.err
    assert f"{folder}: 2 files" in said.err
    assert rows(index) == index.search("dogs") == []
    with pytest.raises(DataError, match="found: 0 files"):
        index.remove(folder)
    assert index.add(moved).passages == 3, "none twice"
    assert (index.remove(moved / "sub"), len(rows(index))) == (1, 2)
    with pytest.raises(DataError, match="no such file"):
        index.add(tmp_path / "no \udcff")


def test_what_was_interrupted_goes_on(own, monkeypatch):
    """Killed after its first batch: the same command stores the others, none twice."""
    folder, index = own
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"Text number {number}.")
    monkeypatch.setattr(filling, "AT_ONCE", 2)
    whole, count = Store.add, []

    def stops(self, new):
        whole(self, new)
        count.append(len(new))
        if len(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        index.add(folder)
    assert len(rows(index)) == 3 + 4
    assert len(index.search("text", mode="keywords")) == 4, "what is there is found"
    monkeypatch.setattr(Store, "add", whole)
    added = index.add(folder)
    assert (added.changed, added.unchanged) == (2, 6)
    assert len(set(rows(index))) == len(rows(index)) == 9


@pytest.mark.parametrize("gone", [False, True])
def test_a_file_that_changes_after_it_was_read_is_read_again(own, monkeypatch, gone):
    """As while the encoder is loaded: the index has the text that was there, and knows it."""
    folder, index = own
    new, begin = folder / "new.txt", llm2comp.Index._begin
    new.write_text("Fish swim.")

    def written_meanwhile(self):
        new.unlink() if gone else new.write_text("Birds fly.")
        monkeypatch.setattr(llm2comp.Index, "_begin", begin)
        return self._begin()

    monkeypatch.setattr(llm2comp.Index, "_begin", written_meanwhile)
    index.add(new)
    assert index.search("swim", mode="keywords")
    index.add(folder)
    assert not index.search("swim", mode="keywords")
    assert bool(index.search("fly", mode="keywords")) is not gone


def test_disk_that_is_full_loses_nothing(own):
    folder, index = own
    before = rows(index)
    (folder / "long.txt").write_text("Long words and more of them. " * 300)
    with no_file_over(4_000), pytest.raises(RunError, match="cannot write"):
        index.add(folder)
    assert rows(index) == before
    assert index.add(folder).changed == 1


@pytest.mark.parametrize("mode", ["hybrid", "keywords"])
def test_what_is_written_during_a_search_is_in_the_next(own, monkeypatch, mode):
    """Rows leave and move between ranking and reading: the search ends on what it ranked."""
    folder, index = own
    before = index.search("dogs bark", mode=mode)
    whole = Store.by_words

    def written_meanwhile(self, *asked):
        found = whole(self, *asked)
        other = Store(index.db, self.name)
        other.remove([str(folder / "pets.md")])
        other.finish()
        return found

    monkeypatch.setattr(Store, "by_words", written_meanwhile)
    assert index.search("dogs bark", mode=mode) == before
    monkeypatch.setattr(Store, "by_words", whole)
    assert {Path(hit.path).name for hit in index.search("dogs bark", mode=mode)} == {"cars.md"}


def test_two_processes_on_one_index(own):
    folder, index = own
    (folder / "new.txt").write_text("Fish swim.")
    with FileLock(index.db / ".lock"):
        with pytest.raises(RunError, match="another process writes to this index"):
            index.add(folder)
        with pytest.raises(RunError, match="another process"):
            index.migrate(OTHER)
        assert index.search("dogs", k=1), "searching goes on"
    assert index.add(folder).changed == 1


# ---- models


def test_other_models_vectors_are_not_mixed(own):
    folder, index = own
    (folder / "new.txt").write_text("Fish swim.")
    other = llm2comp.Index(index.db, OTHER)
    fix = re.escape(f"llm2comp index --migrate {OTHER} --db {index.db}")
    with pytest.raises(RunError, match=f"(?s)of another model.*{fix}"):
        other.add(folder)
    with pytest.raises(RunError, match=fix):
        other.search("dogs")
    assert other.search("dogs", mode="keywords"), "words are no vectors"
    assert len(rows(index)) == 3


def test_migration(own, monkeypatch):
    """Until its end the index answers with the old vectors; interrupted, it goes on; then all
    vectors are the new model's, also for an index that was open.
    """
    folder, index = own
    old = index.search("dogs", mode="vectors")
    reader = llm2comp.Index(index.db)
    assert reader.search("dogs", mode="vectors") == old
    monkeypatch.setattr(filling, "AT_ONCE", 2)
    whole, seen = Store.add, []

    def stops(self, new):
        whole(self, new)
        seen.append(len(new))
        assert reader.search("dogs", mode="vectors") == old
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "add", stops)
    mover = llm2comp.Index(index.db)
    with pytest.raises(KeyboardInterrupt):
        assert mover.migrate(OTHER) == 0, "all are read whole"
    assert seen == [2]
    assert reader.search("dogs", mode="vectors") == old
    monkeypatch.setattr(Store, "add", lambda self, new: (seen.append(len(new)), whole(self, new)))
    assert mover.migrate(OTHER) == 0, "all are read whole"
    assert seen == [2, 1], "what was embedded is not embedded again"
    fresh = llm2comp.Index(folder.parent / "fresh", OTHER)
    fresh.add(folder)
    expected = [(hit.text, hit.score) for hit in fresh.search("dogs", mode="vectors")]
    assert expected != [(hit.text, hit.score) for hit in old]
    for one in (reader, mover, llm2comp.Index(index.db)):
        found = [(hit.text, hit.score) for hit in one.search("dogs", mode="vectors")]
        assert [text for text, _ in found] == [text for text, _ in expected]
        assert [score for _, score in found] == pytest.approx([s for _, s in expected], abs=1e-6)
    assert len([path for path in index.db.iterdir() if path.suffix == ".lance"]) == 1
    assert reader.info["model"] == OTHER


@pytest.mark.parametrize("how", ["migrated", "made anew"])
def test_search_goes_on_where_another_process_replaces_the_table(own, monkeypatch, how):
    """Also between the question's vector and the ranking: the answer is that of the new table."""
    folder, index = own
    reader, whole = llm2comp.Index(index.db), Store.pinned
    assert reader.search("dogs bark")

    def replaced(self):
        monkeypatch.setattr(Store, "pinned", whole)
        if how == "migrated":
            llm2comp.Index(index.db).migrate(OTHER)
        else:
            shutil.rmtree(index.db)
            llm2comp.Index(index.db, TINY).add(folder)
        return self.pinned()

    monkeypatch.setattr(Store, "pinned", replaced)
    found = reader.search("dogs bark")
    assert found == llm2comp.Index(index.db).search("dogs bark")
    assert reader.info == llm2comp.Index(index.db).info


# ---- many passages


@pytest.mark.thorough
def test_approximate_search_above_the_limit(tmp_path, monkeypatch):
    """An index is built above the limit; its recall is measured against exact search, and what is
    told is what a trial of our own finds.
    """
    monkeypatch.setattr(store, "EXACT_UP_TO", 1000)
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(20_000, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    state = {"sha256": "", "size": 1, "mtime": 1, "headings": [], "first": 1, "last": 1}
    new = [
        state | {"path": f"/{n % 7}.md", "number": n, "text": f"word{n}", "vector": vectors[n]}
        for n in range(20_000)
    ]
    table = Store(tmp_path, "passages-x", 8)
    for begin in range(0, 900, 100):
        table.add(new[begin : begin + 100])
    assert table.finish() == (None, None), "exact below"
    for query in vectors[:20]:
        best = np.sort(vectors[:900] @ query)[::-1][:10]
        scores = [score for _, score in table.by_vector(query, 10)]
        assert scores == pytest.approx(best.tolist(), abs=1e-6)
    table.add(new[900:])
    nprobes, recall = table.finish()
    assert recall >= 0.98
    assert table.table.stats()["fragment_stats"]["num_fragments"] <= 2, "of ten"

    def found(probes):
        return [{n for n, _ in table.by_vector(v, 10, None, probes)} for v in vectors[-40:]]

    def told(near):
        return np.mean([len(a & b) / 10 for a, b in zip(found(None), near, strict=True)])

    assert told(found(nprobes)) >= 0.95
    assert told(found(1)) < 0.95, "an approximate index is there"
    condition = store.matching("3.md")
    ids = [n for n, _ in table.by_vector(vectors[0], 5, condition, nprobes)]
    assert {row["path"] for row in table.rows(ids).values()} == {"/3.md"}


# ---- the command line


def test_commands(made, monkeypatch):
    folder, index = made
    db = index.db
    said = cli("index", folder, "--db", db)
    assert said.code == 0, said.err
    assert "0 new or changed, 2 unchanged, 0 gone; 3 passages in the index" in said.err
    said = cli("search", "barking dogs", "--db", db, "-k", 1, "--keywords-only")
    assert said.code == 0, said.err
    assert said.out == f"{folder}/pets.md:9  Pets > Dogs\n    Dogs bark at the postman.\n"
    said = cli("search", "barking dogs", "--db", db, "--json", "--keywords-only", "--path", "sub")
    (hit,) = map(json.loads, said.out.splitlines())
    assert hit.pop("score") > 0
    assert hit == {
        "path": str(folder / "sub" / "cars.md"),
        "first": 3,
        "last": 4,
        "headings": ["Cars"],
        "text": CARS.partition("\n\n")[2].strip(),
        "matched": ["dog"],
    }
    monkeypatch.setenv("HOME", str(db.parent))
    assert cli("index", folder, "--db=~/db").code == 0
    assert cli("index", "--db=~/db", "--migrate", TINY).code == 0
    said = cli("search", "zebra", "--db=~/db", "--keywords-only")
    assert (said.code, said.out) == (0, "")
    assert "nothing found" in said.err


def test_progress_counts_passages_and_tells_how_many_there_will_be(tmp_path, monkeypatch):
    """Four equal files, each embedded by itself: the first one's count gives the total."""
    monkeypatch.setattr(filling, "AT_ONCE", 1)
    monkeypatch.setattr(console, "LINE_EVERY_SECONDS", 0.0)
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.md").write_text(PETS)
    said = cli("index", folder, "--db", tmp_path / "db", "-m", TINY).err
    steps = re.findall(r"index (\d+)/(\d+): .*passages/s", said)
    assert steps == [(str(done), "8") for done in (2, 4, 6, 8, 8)]
    monkeypatch.setattr(filling, "AT_ONCE", 512)
    said = cli("index", "--db", tmp_path / "db", "--migrate", OTHER).err
    assert re.findall(r"migrate (\d+)/(\d+)", said) == [("8", "8")] * 2


def test_formats_through_the_command(tmp_path):
    """A file of each kind, by a model of the package: each is found by its words."""
    folder = write_all(tmp_path / "docs")
    (folder / "scan.pdf").write_bytes(pdf_bytes(""))
    said = cli("index", folder, "--db", tmp_path / "db", "-m", TINY, "--passage-tokens", "32")
    assert said.code == 0, said.err
    assert "no text in its 1 pages" in said.err
    index = llm2comp.Index(tmp_path / "db")
    found = {Path(hit.path).suffix for hit in index.search("words step", 50, mode="keywords")}
    assert found == {path.suffix for path in folder.iterdir()}


def test_what_is_refused(made, tmp_path):
    folder, index = made
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.txt").write_bytes(b"\xff")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    db = tmp_path / "db"
    assert_refused(cli("index", tmp_path / "no", "--db", db), "no such file or folder")
    assert_refused(cli("index", tmp_path / "empty", "--db", db), "no documents in it")
    assert_refused(
        cli("index", tmp_path / "bad", "--db", db), "nothing in it can be read", "not UTF-8"
    )
    assert not db.exists()
    assert_refused(cli("index", "--db", db), "nothing to do")
    assert_refused(cli("index", "--db", db, "--migrate", TINY), "no index", "llm2comp index")
    assert_refused(cli("index", folder, "--db", tmp_path / "thesis"), "thesis.txt")
    assert_refused(cli("search", "x", "--db", db), "no index")
    both = ("--vectors-only", "--keywords-only")
    assert_refused(cli("search", "x", "--db", index.db, *both), "exclude each other")
    assert_refused(cli("search", " ", "--db", index.db), "nothing to search for")
    assert_refused(
        cli("index", folder, "--db", db, "-m", TINY, "--passage-tokens", 99999),
        "passages are longer than the model reads",
    )
    assert not db.exists()


def test_an_index_that_fails_leaves_the_files_of_others(made, tmp_path):
    """Before there is an index, a folder of hidden names alone is as it was."""
    folder, _ = made
    (tmp_path / "home" / ".git").mkdir(parents=True)
    (tmp_path / "home" / ".git" / "HEAD").write_text("years of work")
    (tmp_path / "home" / ".bashrc").write_text("")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for db in ("home", "empty", "new"):
        with pytest.raises(Llm2CompError):
            llm2comp.Index(tmp_path / db, "mean:no-such-model").add(folder)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"format_version": 99}', ("an index of another version", "found: 99")),
        ("{", ("is damaged",)),
        ('{"format_version": 1}', ("is damaged",)),
    ],
)
def test_index_of_another_version(tmp_path, made, content, parts):
    db = tmp_path / "db"
    db.mkdir()
    (db / INFO_FILE).write_text(content)
    assert_refused(cli("search", "x", "--db", db), *parts)
    assert_refused(cli("index", made[0], "--db", db), *parts)
    with pytest.raises(RunError):
        llm2comp.Index(db)


def test_damaged_tables_are_told(own):
    folder, index = own
    (table,) = index.db.glob("*.lance")
    told = "cannot be read", "index the documents"
    for damage in (lambda file: file.write_bytes(b"no such format"), Path.unlink):
        for file in (table / "data").iterdir():
            damage(file)
        assert_refused(cli("search", "dogs", "--db", index.db), *told)
        assert_refused(cli("index", folder, "--db", index.db), *told)
        with pytest.raises(RunError, match="cannot be read"):
            _ = llm2comp.Index(index.db).info
    shutil.rmtree(table)
    assert_refused(cli("search", "dogs", "--db", index.db), "cannot be read", "not found")


def test_question_is_checked(made):
    with pytest.raises(DataError):
        made[1].search("")
    for text in ('a "quoted AND (x', "???", "x" * 5000, "naïve 数据"):
        made[1].search(text, mode="keywords")
    plain, quoted = (
        [(hit.text, hit.score) for hit in made[1].search(text, mode="keywords", path=path)]
        for text, path in (("dogs bark", "*.md"), ('"dogs bark"', "*.md"))
    )
    assert quoted == plain != []
    assert made[1].search('"dogs bark"', mode="keywords")[0].matched == ("Dogs", "bark")
    for mode in ("hybrid", "keywords"):
        for text, path in (("dogs \udcff", None), ("dogs", "\udcff")):
            with pytest.raises(DataError, match=r"not a Unicode text\n  found: .*\\udcff"):
                made[1].search(text, mode=mode, path=path)


@pytest.mark.thorough
def test_words_alone_need_no_torch(made):
    program = f"""
import sys
from llm2comp.cli import main
sys.argv = ["llm2comp", "search", "dogs", "--db", {str(made[1].db)!r}, "--keywords-only"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
heavy = {{"torch", "transformers", "sentence_transformers", "peft"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Dogs bark" in done.stdout
