"""A mounted index: the server finds what `llm2comp.Index` finds, with one model in memory."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest

import llm2comp
from llm2comp.cli import serving as command
from llm2comp.use.serve import app
from serving import TINY, serving, tiny
from tiny_run import assert_refused, cli

PAGES = {
    "guide/memory.md": "# Memory\n\nMemory tokens stand behind a text.\n\n## Pooling\n\n"
    "Their states are averaged: the mean is the embedding.\n",
    "guide/serve.md": "# Serving\n\nA server waits at a port. It answers with vectors.\n",
    "notes.txt": "The fox sleeps. Nothing is said of vectors here, nor of ports.\n",
}


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    for name, text in PAGES.items():
        (folder / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "docs" / name).write_text(text)
    index = llm2comp.Index(folder / "db", TINY)
    index.lend(TINY, tiny())
    index.add(folder / "docs")
    return folder / "db"


@pytest.fixture(scope="module")
def served(db):
    index = llm2comp.Index(db)
    index.lend(TINY, tiny())
    with serving(index=index) as found:
        yield found


@pytest.mark.parametrize("mode", ["hybrid", "vectors", "keywords"])
def test_the_server_finds_what_the_index_finds(served, mode):
    asked = {"query": "which vectors does a server answer with?", "k": 2, "mode": mode}
    found = served.post("/search", asked).json()["hits"]
    expected = served.server.index.search(asked["query"], 2, mode=mode)
    assert len(found) == len(expected) == 2
    for hit, own in zip(found, expected, strict=True):
        assert hit["path"] == own.path
        assert (hit["snippet"], hit["text"], hit["heading"]) == (own.snippet, own.text, own.heading)
        assert hit["score"] == pytest.approx(own.score, rel=1e-5)
        words = [hit["snippet"][start:end] for start, end in hit["spans"]]
        assert set(words) <= set(own.matched)
    if mode != "vectors":
        assert found[0]["path"].endswith("serve.md")
        assert "server" in asdict(expected[0])["matched"]
    only = served.post("/search", asked | {"path": "notes.txt"}).json()["hits"]
    assert {hit["path"].rsplit("/")[-1] for hit in only} == {"notes.txt"}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"query": "  "}, "nothing to search for"),
        ({"k": 0}, "k"),
        ({"k": 101}, "k"),
        ({"mode": "guess"}, "mode"),
    ],
)
def test_bad_searches(served, fields, field):
    answer = served.post("/search", {"query": "a"} | fields)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "Validation")
    assert field in answer.json()["error"]
    assert served.post("/search", {"query": "fox"}).json()["hits"]


def test_info_tells_of_the_index(served):
    index = served.client.get("/info").json()["index"]
    assert (index["model"], index["files"]) == (TINY, 3)
    assert index["passages"] >= 3
    assert "/search" in served.client.get("/openapi.json").json()["paths"]


def test_an_index_that_cannot_be_read_is_told(db, tmp_path):
    copied = shutil.copytree(db, tmp_path / "db")
    for file in copied.glob("*.lance/data/*"):
        file.unlink()
    with serving(index=llm2comp.Index(copied)) as found:
        asked = {"query": "a", "mode": "keywords"}
        for answer in (found.client.get("/info"), found.post("/search", asked)):
            assert answer.status_code == 503
            assert answer.json()["error"].startswith("the index: cannot be read: ")


def test_the_command_asks_a_server_as_it_asks_an_index(served, db):
    """The same lines, from a process that has loaded no model."""
    question = "which vectors does a server answer with?"
    here = cli("search", question, "--db", db, "-k", 2, "--device", "cpu")
    there = cli("search", question, "--url", served.url, "-k", 2)
    assert (there.code, there.out) == (0, here.out)
    assert "serve.md:" in there.out
    code = f"""
import sys
from llm2comp.cli import main
sys.argv = ["llm2comp", "search", {question!r}, "--url", {served.url!r}, "--json", "-k", "1"]
try:
    main()
finally:
    assert not {{"torch", "lancedb", "transformers"}} & set(sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["path"].endswith("serve.md")


def test_a_server_that_cannot_search_is_told(served):
    assert_refused(cli("search", "a", "--url", "127.0.0.1:1"), "not an address")
    for url in ("http://[::1", "http://127.0.0.1:port", "http://:8000"):
        assert_refused(cli("search", "a", "--url", url), "not an address")
    assert_refused(cli("search", "a", "--url", "http://127.0.0.1:1"), "no answer")
    assert_refused(cli("search", "a", "--url", "http://local host"), "no answer")
    assert_refused(cli("search", " ", "--url", served.url), "refuses: HTTP 4", "nothing to search")
    assert_refused(cli("search", "a"), "where to search?")
    assert_refused(cli("search", "a", "--url", served.url, "--db", "x"), "where to search?")
    with serving() as plain:
        assert_refused(cli("search", "a", "--url", plain.url), "HTTP 404", "llm2comp serve --db")


def test_without_an_index_there_is_no_search():
    with serving() as plain:
        assert plain.post("/search", {"query": "a"}).status_code == 404
        assert plain.client.get("/info").json()["index"] is None


def test_the_command_serves_the_model_of_the_index_once(db, monkeypatch):
    """Its last step is looked at instead of run."""
    seen = []
    monkeypatch.setattr(app, "run", lambda server, place: seen.append((server, place.close())))
    monkeypatch.setenv("HOME", str(db.parent))
    said = cli("serve", "--db=~/db", "--port", "0")
    assert said.code == 0, said.err
    assert f"{TINY}, 256 dimensions" in said.err
    server = seen[0][0]
    assert server.index._encoder.model is server.engine.model
    assert command.LOOPBACK in said.err


def test_an_index_that_is_none(tmp_path):
    assert_refused(cli("serve", "--db", tmp_path / "nowhere", "--port", "0"), "nowhere")


def test_the_memory_of_a_text_without_the_lm_and_with_it(served):
    found = served.post("/memory", {"text": "the fox sleeps"}).json()
    assert len(found["correlation"]) == 8
    assert found["words"] is found["from_memory"] is None
    with serving(llm2comp.load(TINY, "cpu"), lens=True) as seeing:
        seen = seeing.post("/memory", {"text": "the fox sleeps"}).json()
        assert seen["tokens"] == found["tokens"]
        assert [len(words) for words in seen["words"]] == [4] * 8
        assert seen["from_memory"]
        assert seeing.post("/memory", {"text": 1}).status_code == 422
