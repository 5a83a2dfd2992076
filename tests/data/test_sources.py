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
import yaml
import zstandard

from llm2comp.data import python_docs
from llm2comp.data.loaded import Pair
from llm2comp.data.sources import (
    check_sources,
    iterate_sources,
    read_pairs,
    read_responses,
    read_texts,
    source_key,
)
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
    writer = csv.DictWriter(
        type("Sink", (), {"write": lines.append}),
        list(rows[0]),
        delimiter="\t" if kind == ".tsv" else ",",
    )
    writer.writeheader()
    writer.writerows(rows)
    return "".join(lines).encode()


def compress(content, compression):
    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[
        compression
    ](content)


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
    assert (
        loaded.fingerprint
        == hashlib.sha256("".join(json.dumps([text]) + "\n" for text in TEXTS).encode()).hexdigest()
    )
    assert loaded.summary() == f"docs.v2{kind}{compression}: 3 rows"


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_every_format_gives_the_same_pairs(write, kind):
    loaded = pairs(write(f"pairs{kind}", encode(kind, PAIRS)))
    assert loaded.rows == [
        Pair("first query", "first answer"),
        Pair("second query", "second answer"),
    ]


def test_parquet_reads_texts_lists_and_counts_nulls_and_bad_bytes(tmp_path):
    path = tmp_path / "pairs.parquet"
    answers = pa.Array.from_buffers(
        pa.string(), 4, pa.array([b"one", b"\xff\xfe", b"three", b"four"], pa.binary()).buffers()
    )
    negatives = [["wrong", "", "one"], [], None, ["x", None]]
    pq.write_table(
        pa.table({"q": ["a", "b", None, "d"], "d": answers, "n": negatives, "other": [1, 2, 3, 4]}),
        path,
    )
    loaded = pairs(str(path), negatives=("n",))
    assert loaded.rows == [Pair("a", "one", ("wrong",)), Pair("d", "four", ("x",))]
    assert loaded.skipped == {"not UTF-8": 1, "empty": 1}
    assert loaded.places["not UTF-8"] == ["row 2"]
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
        "docs.jsonl: 3 rows; left out: 3 empty (line 2, line 3, line 4), 2 not UTF-8 (line 5, "
        "line 6), 2 malformed JSON (line 7, line 8), 1 not a JSON object (line 9), 2 'text' is "
        "not a string (line 10, line 11), 1 no column 'text' (line 12)"
    )


def test_bad_table_rows_are_counted(write):
    content = (
        b'id,text\n\n1,kept\n2,one,too many\n3,"said "so" twice"\n4,\xff\n5,"two\nlines"\n6,\n7,x\n'
    )
    loaded = texts(write("docs.csv", content))
    assert loaded.rows == ["kept", "two\nlines", "x"]
    assert dict(loaded.skipped) == {
        "empty": 2,
        "wrong number of columns": 1,
        "malformed CSV": 1,
        "not UTF-8": 1,
    }
    assert loaded.places["malformed CSV"] == ["line 5"]


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
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"no archive at all" + data]
)
def test_damaged_archives_are_errors(write, compression, damage):
    content = "".join(
        json.dumps({"text": hashlib.sha256(bytes([n % 251, n // 251])).hexdigest()}) + "\n"
        for n in range(5000)
    )
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
    with pytest.raises(DataError, match="no column 'boddy'") as caught:
        texts(source, column="boddy")
    assert caught.value.found == "columns title, body"
    assert caught.value.fix == f"name the file's own columns: {{source: {source}, column: body}}"


def test_missing_column_of_negatives_is_an_error(write):
    source = write("pairs.jsonl", encode(".jsonl", PAIRS))
    with pytest.raises(DataError, match="no column 'n'"):
        pairs(source, negatives=("n",))


@pytest.mark.parametrize(
    ("name", "fix"),
    [("dcos.jsonl", "did you mean 'docs.jsonl'?"), ("docs.jsonl.gz", "did you mean 'docs.jsonl'?")],
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
    ("content", "found"),
    [
        ("", "nothing in it"),
        ("\n\n", "nothing in it"),
        ("{\n\n", "1 malformed JSON (line 1)"),
        ('\n{"text": ""}', "2 empty (line 1, line 2)"),
    ],
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
    assert dict(loaded.skipped) == {
        "positive equals query": 1,
        "empty": 2,
        "'n2' is not a string": 1,
    }


def test_fingerprint_follows_content_only(write):
    first = pairs(write("a.jsonl", encode(".jsonl", PAIRS)))
    assert (
        pairs(write("b.csv.gz", gzip.compress(encode(".csv", PAIRS)))).fingerprint
        == first.fingerprint
    )
    assert pairs(write("c.jsonl", encode(".jsonl", PAIRS[::-1]))).fingerprint != first.fingerprint
    moved = [
        {"q": "first query", "d": "first answer", "n": "x"},
        {"q": "second query", "d": "second answer", "n": ""},
    ]
    assert (
        pairs(write("d.jsonl", encode(".jsonl", moved)), negatives=("n",)).fingerprint
        != first.fingerprint
    )


def test_txt_has_no_pairs(write):
    with pytest.raises(DataError, match="no columns"):
        pairs(write("docs.txt", "a\n"))


@pytest.mark.thorough
def test_builtin_python_docs():
    assert texts("builtin:python-docs", limit=20).rows == python_docs.passages()[:20]
    loaded = pairs("builtin:python-docs")
    assert [(pair.anchor, pair.positive) for pair in loaded.rows] == [
        (a.strip(), b.strip()) for a, b in python_docs.pairs(heldout=False)
    ]
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
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("owner/no-such-set: not a file, nor a loadable Hub data set: ")
    assert "hf auth login" in done.stdout
    assert "HF_HUB_OFFLINE" in done.stdout


def test_hub_set_from_the_cache(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names, **settings):
        asked.append((names, settings))
        return datasets.Dataset.from_list(
            [{"text": "a", "other": 1}, {"text": None, "other": 2}, {"text": "b", "other": 3}]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = texts("owner/name", subset="en", split="test", revision="abc")
    assert loaded.rows == ["a", "b"]
    assert loaded.summary() == "owner/name: 2 rows; left out: 1 empty (row 2)"
    assert asked == [(("owner/name", "en"), {"split": "test", "revision": "abc"})]
    with pytest.raises(DataError, match="no column 'txt'"):
        texts("owner/name", column="txt")


@pytest.mark.parametrize("offline", [False, True])
def test_a_limit_streams_a_hub_set(monkeypatch, offline):
    """Read no further than the limit asks, with the same rows; offline the copy that `datasets`
    keeps is read.
    """
    datasets = pytest.importorskip("datasets")
    asked, drawn = [], []

    def rows():
        for number in range(1000):
            drawn.append(number)
            yield {"text": f"text {number}" if number else "", "other": number}

    def load_dataset(*names, streaming=False, **settings):
        asked.append(streaming)
        return (
            datasets.IterableDataset.from_generator(rows)
            if streaming
            else datasets.Dataset.from_list(list(rows()))
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    loaded = texts("owner/name", limit=3)
    assert loaded.rows == ["text 1", "text 2", "text 3"]
    assert loaded.summary() == "owner/name: 3 rows; left out: 1 empty (row 1)"
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

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows)
    )
    with pytest.raises(DataError, match="owner/name: .*RuntimeError: connection lost"):
        texts("owner/name", limit=3)


def test_sources_one_after_the_other(write):
    specs = [
        TextData(source=write(name, encode(".jsonl", [{"text": text} for text in TEXTS])))
        for name in ("a.jsonl", "b.jsonl")
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
    assert (
        source_key(
            TextData(source=write("folder/docs.jsonl", (tmp_path / "docs.jsonl").read_bytes()))
        )
        == key
    )
    assert source_key(TextData(source=source, response="other")) == key
    others = [
        TextData(source=source, limit=2),
        TextData(source=source, column="x"),
        TextData(source=write("b.jsonl", b"{}")),
    ]
    write("docs.jsonl", encode(".jsonl", [{"text": text} for text in TEXTS[::-1]]))
    others += [TextData(source=source), TextData(source="builtin:python-docs")]

    def builder(name, subset, revision):
        return type(
            "Builder",
            (),
            {"config": type("Config", (), {"name": subset}), "hash": f"commit of {revision}"},
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    others += [
        TextData(source="owner/name", subset=subset, revision=revision)
        for subset in "ab"
        for revision in "cd"
    ]
    assert len({json.dumps(source_key(spec)) for spec in others} - {json.dumps(key)}) == 9
    with pytest.raises(DataError, match="no such file"):
        source_key(TextData(source=str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="no such builtin"):
        source_key(TextData(source="builtin:pyton-docs"))


# ---- encodings and line ends

MARKED = ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"]
MARKS = {"utf-16-be": b"\xfe\xff", "utf-32-be": b"\x00\x00\xfe\xff"}


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
@pytest.mark.parametrize("encoding", MARKED)
def test_a_byte_order_mark_says_the_encoding(write, kind, encoding, compression):
    plain = encode(kind, [{"text": text} for text in TEXTS]).decode()
    content = MARKS.get(encoding, b"") + plain.encode(encoding)
    assert texts(write(f"docs{kind}{compression}", compress(content, compression))).rows == TEXTS


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt", ".json"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_without_a_mark_the_command_that_converts_is_told(write, tmp_path, kind, encoding):
    rows = [{"text": text} for text in TEXTS]
    source = write(f"my docs{kind}", encode(kind, rows).decode().encode(encoding))
    with pytest.raises(DataError, match="NUL bytes") as caught:
        texts(source)
    command = caught.value.fix
    assert command.startswith(
        f"iconv -f {encoding.upper().replace('-LE', 'LE').replace('-BE', 'BE')} -t UTF-8 "
    )
    subprocess.run(command, shell=True, check=True)
    assert texts(str(tmp_path / f"my docs.utf-8{kind}")).rows == TEXTS


def test_nul_bytes_are_refused_wherever_they_stand(write):
    good = b"".join(b"a line of a text file in UTF-8\n" for _ in range(50))
    with pytest.raises(
        DataError, match=r"line 51: not a text file in UTF-8: NUL bytes(?s:.*)tr -d"
    ):
        texts(write("docs.txt", good + b"odd\0\n"))
    with pytest.raises(
        DataError,
        match=r"(?s)NUL bytes.*gzip -dc .*docs\.txt\.gz \| iconv -f UTF-16LE -t UTF-8 > "
        r".*docs\.utf-8\.txt",
    ):
        texts(write("docs.txt.gz", gzip.compress("a line".encode("utf-16-le"))))
    with pytest.raises(DataError, match="byte order mark of UTF-16, but is not in it"):
        texts(write("docs.txt", "cut in the middle of a character".encode("utf-16")[:-1]))
    with pytest.raises(
        DataError, match=r"(?s)no usable row.*not UTF-8.*iconv -f WINDOWS-1252 -t UTF-8 .*docs\.txt"
    ):
        texts(write("docs.txt", "Übergröße\n".encode("cp1252")))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".txt"])
def test_every_line_end_ends_a_line(write, kind, end):
    content = (
        encode(kind, [{"text": text} for text in TEXTS])
        .replace(b"\r\n", b"\n")
        .replace(b"\n", end.encode())
    )
    for tail in (b"", b"\n\n", end.encode()):
        loaded = texts(write(f"docs{kind}", content + tail))
        assert (loaded.rows, loaded.there) == (TEXTS, 3)


def test_line_ends_within_a_quoted_cell_are_the_texts(write):
    assert texts(write("docs.csv", 'text\r\n"a\r\n\r\nb\rc"\r\n')).rows == ["a\r\n\r\nb\rc"]


# ---- columns


@pytest.mark.parametrize(
    ("name", "content"), [("d.csv", "text,n,text\na,1,b\n"), ("d.tsv", "text\tn\ttext\na\t1\tb\n")]
)
def test_a_column_that_is_there_twice_is_refused(write, tmp_path, name, content):
    found = "columns 1 and 3 of 3"
    with pytest.raises(DataError, match=f"(?s)2 columns are called 'text'.*{found}"):
        texts(write(name, content))
    assert texts(str(tmp_path / name), column="n").rows == ["1"], "others are not in the way"
    table = pa.table([["a"], ["1"], ["b"]], names=["text", "n", "text"])
    pq.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match=f"(?s)2 columns are called 'text'.*{found}"):
        texts(str(tmp_path / "d.parquet"))
    assert texts(str(tmp_path / "d.parquet"), column="n").rows == ["1"]
    with pytest.raises(DataError, match="2 columns are called 'd'"):
        pairs(write(name, content.replace("text", "d").replace("n", "q")))


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_key_that_is_there_twice_makes_a_row_unusable(write, kind):
    rows = (
        '{"text": "a", "text": "b"}',
        '{"text": "c", "n": 1, "n": 2}',
        '{"text": "d", "n": {"text": 1, "text": 2}}',
    )
    content = "\n".join(rows) if kind == ".jsonl" else f"[{', '.join(rows)}]"
    loaded = texts(write(f"docs{kind}", content))
    assert loaded.rows == ["c", "d"]
    assert loaded.skipped == {"key 'text' twice": 1}


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["question", "answer"], "anchor: question, positive: answer}"),
        (["id", "Answer", "Question"], "anchor: Question, positive: Answer}"),
        (["query", "pos", "neg"], "anchor: query, positive: pos, negatives: [neg]}"),
        (["sentence1", "sentence2", "score"], "anchor: sentence1, positive: sentence2}"),
        (["Frage", "Antwort"], "anchor: Frage, positive: Antwort}"),
        (["anchor", "document"], "anchor: anchor, positive: document}"),
        (["achnor", "positive"], "anchor: achnor, positive: positive}"),
    ],
)
def test_missing_columns_of_pairs_are_told_as_a_recipe_names_them(write, names, advice):
    """What is told is a source that can be read."""
    source = write(
        "qa.jsonl",
        encode(".jsonl", [{name: f"{name} {row}" for name in names} for row in range(2)]),
    )
    with pytest.raises(DataError, match="no column") as caught:
        read_pairs(PairData(source=source, negatives=("neg",) if "neg" in names else ()))
    told = caught.value.fix.removeprefix("name the file's own columns: ")
    assert told == f"{{source: {source}, {advice}"
    loaded = read_pairs(PairData(**yaml.safe_load(told)))
    assert loaded.used == 2
    assert loaded.rows[0].anchor.lower().startswith(yaml.safe_load(told)["anchor"].lower())


def test_negatives_and_responses_that_are_missing_too(write):
    source = write("qa.csv", "q,d,neg_1\na,b,c\n")
    with pytest.raises(DataError, match="no column 'n'") as caught:
        pairs(source, negatives=("neg_1", "n"))
    assert caught.value.fix.endswith("anchor: q, positive: d, negatives: [neg_1]}")
    with pytest.raises(DataError, match="no column 'reply'") as caught:
        read_responses(TextData(source=write("r.csv", "text,response\na,b\n"), response="reply"))
    assert caught.value.fix.endswith("column: text, response: response}")
    with pytest.raises(DataError, match="no column 'anchor'") as caught:
        read_pairs(PairData(source=write("t.csv", "text\na\n")))
    assert caught.value.fix is None


@pytest.mark.parametrize(
    ("name", "mark"), [("d.csv", ";"), ("d.csv", "\t"), ("d.tsv", ","), ("d.csv", "|")]
)
def test_tables_that_are_parted_otherwise(write, name, mark):
    with pytest.raises(DataError, match="its columns are parted by"):
        texts(write(name, f"text{mark}n\na{mark}b\n"))


# ---- rows keep their places; others' formats


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".txt", ".parquet"])
def test_rows_keep_their_numbers(write, tmp_path, kind):
    cells = ["a", "", "b", " ", "c"]
    if kind == ".parquet":
        pq.write_table(pa.table({"text": [*cells[:3], None, "c"]}), tmp_path / "d.parquet")
    else:
        write(f"d{kind}", encode(kind, [{"text": cell} for cell in cells]))
    loaded = texts(str(tmp_path / f"d{kind}"))
    assert (loaded.rows, loaded.numbers, loaded.there) == (["a", "b", "c"], [0, 2, 4], 5)
    assert loaded.skipped == {"empty": 2}
    assert len(loaded.places["empty"]) == 2


def test_only_some_of_many_bad_rows_are_named(write):
    loaded = texts(write("d.txt", "a\n" + "\n" * 9 + "b"))
    assert loaded.left_out() == "9 empty (line 2, line 3, line 4, line 5, line 6, ...)"
    assert loaded.numbers == [0, 10]


def test_lists_of_positives_give_a_pair_each(write):
    rows = [
        {"q": " query", "d": ["one", "two ", "one\n", "", None], "n": ["wrong", "two", "wrong "]},
        {"q": "same", "d": ["same", "other"], "n": []},
        {"q": "same", "d": ["same "], "n": []},
        {"q": "query", "d": [], "n": ["wrong"]},
        {"q": "plain", "d": "text", "n": "wrong"},
    ]
    loaded = pairs(write("flag.jsonl", encode(".jsonl", rows)), negatives=("n",))
    assert loaded.rows == [
        Pair("query", "one", ("wrong",)),
        Pair("query", "two", ("wrong",)),
        Pair("same", "other"),
        Pair("plain", "text", ("wrong",)),
    ]
    assert loaded.numbers == [0, 0, 1, 4]
    assert dict(loaded.skipped) == {"positive equals query": 1, "empty": 1}
    assert loaded.summary().startswith("flag.jsonl: 3 rows; left out: ")
    assert loaded.summary().endswith("; 4 pairs")
    assert (
        len(pairs(write("flag.jsonl", encode(".jsonl", rows)), negatives=("n",), limit=2).rows) == 3
    ), "rows are limited"


@pytest.mark.parametrize("column", ["n", "d"])
@pytest.mark.parametrize(
    "cell", ["['a', 'b']", '["a", "b"]', "['a' 'b']", "['it''s']", '["a", null]']
)
def test_a_list_in_a_string_is_refused_with_advice(write, column, cell):
    row = {"q": "query", "d": "answer", "n": "wrong"}
    source = write("p.jsonl", encode(".jsonl", [row, row | {column: cell}]))
    with pytest.raises(
        DataError, match=r"p\.jsonl, line 2: a list written as a string is no text"
    ) as caught:
        pairs(source, negatives=("n",))
    assert "JSON lines with a real list" in caught.value.fix


@pytest.mark.parametrize(
    "cell",
    ["[1]", "[a]", "[]", "[citation needed]", "x['a', 'b']", "[['a']]", "[" * 5000 + "]" * 5000],
)
def test_texts_in_brackets_are_texts(write, cell):
    assert pairs(write("p.jsonl", encode(".jsonl", [{"q": "query", "d": cell}]))).rows == [
        Pair("query", cell)
    ]


def test_an_array_that_is_called_lines(write):
    rows = [{"text": text} for text in TEXTS]
    assert texts(write("docs.jsonl", json.dumps(rows))).rows == TEXTS
    assert texts(write("docs.jsonl", json.dumps(rows, indent=2))).rows == TEXTS
    loaded = texts(write("docs.jsonl", '["not", "an array of rows"]\n{"text": "a"}\n'))
    assert (loaded.rows, loaded.skipped) == (["a"], {"not a JSON object": 1})


def test_sources_are_checked_by_name_alone(write, tmp_path):
    there = write("docs.txt", "")
    check_sources(
        [
            TextData(source=there),
            PairData(source="owner/name"),
            TextData(source="builtin:python-docs"),
        ]
    )
    for missing in (tmp_path / "dcos.txt", tmp_path / "deep" / "docs.csv"):
        with pytest.raises(DataError, match="no such file"):
            check_sources([TextData(source=there), TextData(source=str(missing))])
