import csv
import gzip
import hashlib
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llm2comp.data import python_docs
from llm2comp.data.sources import Pair, iterate_sources, read_pairs, read_texts, source_key
from llm2comp.errors import DataError
from llm2comp.recipe import PairData, TextData

TEXTS = ["a plain text", "zweite Zeile: Übergröße", 'with "quotes", a comma\tand a tab']
PAIRS = [{"q": "first query", "d": "first answer"}, {"q": "second query", "d": "second answer"}]


def encode(kind, rows):
    """The file content of some rows ({column: value}) in each format."""
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == ".json":
        return json.dumps(rows, indent=1).encode()
    if kind == ".txt":
        return "".join(row["text"] + "\n" for row in rows).encode()
    lines = []
    writer = csv.DictWriter(type("Sink", (), {"write": lines.append}), list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return "".join(lines).encode()


def compress(content, compression):
    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[compression](content)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def texts(source, **settings):
    return read_texts(TextData(source=source, **settings))


def pairs(source, **settings):
    return read_pairs(PairData(source=source, anchor="q", positive="d", **settings))


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
def test_every_format_gives_the_same_texts(write, kind, compression):
    content = encode(kind, [{"text": text} for text in TEXTS])
    loaded = texts(write(f"docs.v2{kind}{compression}", compress(content, compression)))
    assert loaded.rows == TEXTS
    assert not loaded.skipped
    assert loaded.fingerprint == hashlib.sha256("".join(json.dumps([text]) + "\n" for text in TEXTS).encode()).hexdigest()
    assert loaded.summary() == f"docs.v2{kind}{compression}: 3 rows"


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_every_format_gives_the_same_pairs(write, kind):
    loaded = pairs(write(f"pairs{kind}", encode(kind, PAIRS)))
    assert loaded.rows == [Pair("first query", "first answer"), Pair("second query", "second answer")]


def test_parquet_reads_texts_lists_and_counts_nulls_and_bad_bytes(tmp_path):
    path = tmp_path / "pairs.parquet"
    answers = pa.Array.from_buffers(pa.string(), 4, pa.array([b"one", b"\xff\xfe", b"three", b"four"], pa.binary()).buffers())
    negatives = [["wrong", "", "one"], [], None, ["x", None]]
    pq.write_table(pa.table({"q": ["a", "b", None, "d"], "d": answers, "n": negatives, "other": [1, 2, 3, 4]}), path)
    loaded = pairs(str(path), negatives=("n",))
    assert loaded.rows == [Pair("a", "one", ("wrong",)), Pair("d", "four", ("x",))]
    assert loaded.skipped == {"not UTF-8": 1, "empty": 1}
    assert loaded.first_at["not UTF-8"] == "row 2"
    assert texts(str(path), column="q", limit=1).rows == ["a"]


def test_bad_json_lines_are_counted_by_reason_and_place(write):
    lines = [
        b'\xef\xbb\xbf{"text": "kept, after a byte order mark"}',
        b"",
        b'  {"text": "   "}',
        b'{"text": null}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": "cut off',
        b"[" * 100_000,
        b'["text"]',
        b'{"text": 3}',
        b'{"text": ["a list"]}',
        b'{"title": "no text"}',
        '{"text": "kept, line\u2028separator inside"}'.encode(),
        b'{"text": "kept, no line feed at the end"}',
    ]
    loaded = texts(write("docs.jsonl", b"\r\n".join(lines)))
    assert [text[:5] for text in loaded.rows] == ["kept,"] * 3
    assert dict(loaded.skipped) == {
        "empty": 3,
        "not UTF-8": 2,
        "malformed JSON": 2,
        "not a JSON object": 1,
        "'text' is not a string": 2,
        "no column 'text'": 1,
    }
    assert loaded.summary() == (
        "docs.jsonl: 3 rows; left out: 3 empty, 2 not UTF-8 (first at line 5), 2 malformed JSON (first at line 7), 1 not a "
        "JSON object (first at line 9), 2 'text' is not a string (first at line 10), 1 no column 'text' (first at line 12)"
    )


def test_bad_table_rows_are_counted(write):
    content = b'id,text\n\n1,kept\n2,one,too many\n3,"said "so" twice"\n4,\xff\n5,"two\nlines"\n6,\n7,x\n'
    loaded = texts(write("docs.csv", content))
    assert loaded.rows == ["kept", "two\nlines", "x"]
    assert dict(loaded.skipped) == {"empty": 2, "wrong number of columns": 1, "malformed CSV": 1, "not UTF-8": 1}
    assert loaded.first_at["malformed CSV"] == "line 5"


def test_a_quote_that_swallows_the_file_is_an_error_not_one_bad_row(write):
    source = write("docs.tsv", "text\tid\nkept\t1\n" + '"never closed\t2\n' + "swallowed\t3\n" * 50)
    with pytest.raises(DataError, match="from line 3 on"):
        texts(source)


def test_fields_longer_than_the_csv_module_allows_by_default(write):
    long = "word " * 100_000
    assert texts(write("docs.csv", f"text\n{long}\n")).rows == [long]


def test_json_that_is_lines(write):
    assert texts(write("docs.json", '\n{"text": "a"}\n{"text": "b"}\n')).rows == ["a", "b"]


def test_array_items_that_are_not_objects_are_counted(write):
    loaded = texts(write("docs.json", '[{"text": "a"}, "b", {"text": 1}]'))
    assert loaded.rows == ["a"]
    assert dict(loaded.skipped) == {"not a JSON object": 1, "'text' is not a string": 1}
    with pytest.raises(DataError, match="not a JSON array"):
        texts(write("cut.json", '[{"text": "a"}, {"te'))


def test_limit_stops_reading(write):
    source = write("docs.jsonl.gz", gzip.compress(b"broken\n" + b'{"text": "a"}\n' * 20_000)[:-20])
    loaded = texts(source, limit=5)
    assert len(loaded.rows) == 5
    assert loaded.skipped == {"malformed JSON": 1}
    with pytest.raises(DataError):
        texts(source)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no archive at all" + data])
def test_damaged_archives_are_errors(write, compression, damage):
    content = "".join(json.dumps({"text": hashlib.sha256(bytes([n % 251, n // 251])).hexdigest()}) + "\n" for n in range(5000))
    with pytest.raises(DataError, match="cannot be read"):
        texts(write(f"docs.jsonl{compression}", damage(compress(content.encode(), compression))))


def test_damaged_parquet_is_an_error(write):
    with pytest.raises(DataError, match="cannot be read"):
        texts(write("docs.parquet", b"PAR1 not really PAR1"))


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_missing_column_lists_what_there_is(tmp_path, write, kind):
    if kind == ".parquet":
        pq.write_table(pa.table({"title": ["a"], "body": ["b"]}), tmp_path / "docs.parquet")
        source = str(tmp_path / "docs.parquet")
    else:
        source = write(f"docs{kind}", encode(kind, [{"title": "a", "body": "b"}]))
    with pytest.raises(DataError) as caught:
        texts(source, column="boddy")
    assert caught.value.found == "columns title, body"
    assert caught.value.fix == "did you mean 'body'?"


def test_missing_column_of_negatives_is_an_error(write):
    source = write("pairs.jsonl", encode(".jsonl", PAIRS))
    with pytest.raises(DataError, match="no column 'n'"):
        pairs(source, negatives=("n",))


@pytest.mark.parametrize(
    ("name", "fix"), [("dcos.jsonl", "did you mean 'docs.jsonl'?"), ("docs.jsonl.gz", "did you mean 'docs.jsonl'?")]
)
def test_missing_file_names_the_nearest(write, tmp_path, name, fix):
    write("docs.jsonl", "")
    write("other.txt", "")
    with pytest.raises(DataError, match="no such file") as caught:
        texts(str(tmp_path / name))
    assert caught.value.fix == fix


def test_missing_folder_says_how_far_the_path_goes(tmp_path):
    with pytest.raises(DataError, match="the path exists up to") as caught:
        texts(str(tmp_path / "no" / "docs.txt"))
    assert str(caught.value.found).endswith(str(tmp_path))


@pytest.mark.parametrize("name", ["docs.pkl", "docs", "docs.parquet.gz", "docs.txt.bz2"])
def test_unknown_kinds_of_file(write, name):
    with pytest.raises(DataError, match="kind of file") as caught:
        texts(write(name, "text"))
    assert ".parquet" in str(caught.value.expected)


def test_folders_are_not_read(tmp_path):
    with pytest.raises(DataError, match="a folder"):
        texts(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "found"), [("", "nothing in it"), ("\n\n", "2 empty"), ("{\n", "1 malformed JSON (first at line 1)")]
)
def test_no_usable_row_is_an_error_with_counts(write, content, found):
    with pytest.raises(DataError, match="no usable row") as caught:
        texts(write("docs.jsonl", content))
    assert caught.value.found == found


def test_pairs_leave_out_and_drop(write):
    rows = [
        {"q": "query", "d": "answer", "n1": "wrong", "n2": ["bad", "", "answer ", None]},
        {"q": "query", "d": "answer", "n1": ""},
        {"q": " same", "d": "same ", "n1": "wrong"},
        {"q": "", "d": "answer"},
        {"q": "query", "d": "\n"},
        {"q": "query", "d": "answer", "n2": ["bad", 3]},
    ]
    loaded = pairs(write("pairs.jsonl", encode(".jsonl", rows)), negatives=("n1", "n2"))
    assert loaded.rows == [Pair("query", "answer", ("wrong", "bad")), Pair("query", "answer")]
    assert dict(loaded.skipped) == {"positive equals query": 1, "empty": 2, "'n2' is not a string": 1}


def test_fingerprint_follows_content_only(write):
    first = pairs(write("a.jsonl", encode(".jsonl", PAIRS)))
    assert pairs(write("b.csv.gz", gzip.compress(encode(".csv", PAIRS)))).fingerprint == first.fingerprint
    assert pairs(write("c.jsonl", encode(".jsonl", PAIRS[::-1]))).fingerprint != first.fingerprint
    moved = [{"q": "first query", "d": "first answer", "n": "x"}, {"q": "second query", "d": "second answer", "n": ""}]
    assert pairs(write("d.jsonl", encode(".jsonl", moved)), negatives=("n",)).fingerprint != first.fingerprint


def test_txt_has_no_pairs(write):
    with pytest.raises(DataError, match="no columns"):
        pairs(write("docs.txt", "a\n"))


def test_builtin_python_docs():
    assert texts("builtin:python-docs", limit=20).rows == python_docs.passages()[:20]
    loaded = pairs("builtin:python-docs")
    assert [(pair.anchor, pair.positive) for pair in loaded.rows] == python_docs.pairs(heldout=False)
    assert texts("builtin:python-docs", limit=20).summary() == "builtin:python-docs: 20 rows"


def test_unknown_builtin_names_the_valid_one():
    with pytest.raises(DataError, match="no such builtin") as caught:
        texts("builtin:pyton-docs")
    assert caught.value.expected == "builtin:python-docs"


def test_hub_failure_is_explained_offline(tmp_path):
    program = (
        "from llm2comp.data.sources import read_texts; from llm2comp.recipe import TextData\n"
        "from llm2comp.errors import DataError\n"
        "try: read_texts(TextData(source='owner/no-such-set'))\n"
        "except DataError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("owner/no-such-set: not a file, nor a loadable Hub data set: ")
    assert "hf auth login" in done.stdout
    assert "HF_HUB_OFFLINE" in done.stdout


def test_hub_set_from_the_cache(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names, **settings):
        asked.append((names, settings))
        return datasets.Dataset.from_list([{"text": "a", "other": 1}, {"text": None, "other": 2}, {"text": "b", "other": 3}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = texts("owner/name", subset="en", split="test", revision="abc")
    assert loaded.rows == ["a", "b"]
    assert loaded.summary() == "owner/name: 2 rows; left out: 1 empty"
    assert asked == [(("owner/name", "en"), {"split": "test", "revision": "abc"})]
    with pytest.raises(DataError, match="no column 'txt'"):
        texts("owner/name", column="txt")


@pytest.mark.parametrize("offline", [False, True])
def test_a_limit_streams_a_hub_set(monkeypatch, offline):
    """Read no further than the limit asks, with the same rows; offline the copy that `datasets` keeps is read."""
    datasets = pytest.importorskip("datasets")
    asked, drawn = [], []

    def rows():
        for number in range(1000):
            drawn.append(number)
            yield {"text": f"text {number}" if number else "", "other": number}

    def load_dataset(*names, streaming=False, **settings):
        asked.append(streaming)
        return datasets.IterableDataset.from_generator(rows) if streaming else datasets.Dataset.from_list(list(rows()))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    loaded = texts("owner/name", limit=3)
    assert loaded.rows == ["text 1", "text 2", "text 3"]
    assert loaded.summary() == "owner/name: 3 rows; left out: 1 empty"
    assert asked == [not offline]
    assert len(drawn) == (1000 if offline else 4)
    with pytest.raises(DataError, match="no column 'txt'"):
        texts("owner/name", column="txt", limit=3)
    assert len(texts("owner/name").rows) == 999
    assert asked[-1] is False, "the whole set is kept on disk"


def test_a_stream_that_breaks_is_an_error(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def rows():
        yield {"text": "first"}
        raise RuntimeError("connection\nlost")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(DataError, match="owner/name: .*RuntimeError: connection lost"):
        texts("owner/name", limit=3)


def test_sources_one_after_the_other(write):
    specs = [
        TextData(source=write(name, encode(".jsonl", [{"text": text} for text in TEXTS]))) for name in ("a.jsonl", "b.jsonl")
    ]
    told = []
    found = iterate_sources(specs, told.append)
    assert next(found) == TEXTS[0]
    assert told == []
    assert [*found] == TEXTS[1:] + TEXTS
    assert told == ["a.jsonl: 3 rows", "b.jsonl: 3 rows"]


def test_key_of_a_source_follows_content_and_rows_asked_for(write, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "folder").mkdir()
    source = write("docs.jsonl", encode(".jsonl", [{"text": text} for text in TEXTS]))
    key = source_key(TextData(source=source))
    assert source_key(TextData(source=write("folder/docs.jsonl", (tmp_path / "docs.jsonl").read_bytes()))) == key
    assert source_key(TextData(source=source, response="other")) == key
    others = [TextData(source=source, limit=2), TextData(source=source, column="x"), TextData(source=write("b.jsonl", b"{}"))]
    write("docs.jsonl", encode(".jsonl", [{"text": text} for text in TEXTS[::-1]]))
    others += [TextData(source=source), TextData(source="builtin:python-docs")]

    def builder(name, subset, revision):
        return type("Builder", (), {"config": type("Config", (), {"name": subset}), "hash": f"commit of {revision}"})

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    others += [TextData(source="owner/name", subset=subset, revision=revision) for subset in "ab" for revision in "cd"]
    assert len({json.dumps(source_key(spec)) for spec in others} - {json.dumps(key)}) == 9
    with pytest.raises(DataError, match="no such file"):
        source_key(TextData(source=str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="no such builtin"):
        source_key(TextData(source="builtin:pyton-docs"))
