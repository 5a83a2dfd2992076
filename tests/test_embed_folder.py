"""`embed` into a folder: shards equal what memory gives, kills lose and repeat nothing, and what
does not fit is refused.
"""

import gzip
import hashlib
import json
import os
import random
import signal
import time
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from sentence_transformers.util.quantization import quantize_embeddings

import llm2comp
from llm2comp.data.streams import Stream, sources_of
from llm2comp.errors import DataError, RunError
from llm2comp.use import bulk, making
from llm2comp.use.embed import embed
from tiny_run import assert_refused, cli, finished, no_file_over, sentences, write_rows

TEXTS = [*sentences(30, words=5), *sentences(15, words=3, seed=1)]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".parquet"}


def states(folder):
    """What tells a file that was written again from one that stayed."""
    found = {path.name: path.stat() for path in folder.glob("*.parquet")}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in found.items()}


def manifest(folder):
    return json.loads((folder / "_manifest.json").read_text())


def column(table, name="embedding"):
    return np.array(table[name].to_pylist())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"id": n, "text": text, "more": ["a", n]} for n, text in enumerate(TEXTS)]
    return write_rows(folder / "in.jsonl", rows)


@pytest.fixture(scope="module")
def expected():
    """Embeddings of TEXTS at once, in memory."""
    return embed(llm2comp.load(finished()[1], "cpu"), TEXTS).embeddings_ND


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """A folder of the source that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(source, out)
    return out


def run(source, out, **options):
    chosen = llm2comp.EmbedOptions(**{"shard_rows": 7, "keep": ("id", "more")} | options)
    return llm2comp.embed([source], out, finished()[1], chosen, device="cpu")


def test_shards_hold_what_memory_gives(whole, expected):
    table = pq.read_table(whole)
    assert table.column_names == ["row", "id", "more", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert table["row"].to_pylist() == list(range(len(TEXTS)))
    assert table["id"].to_pylist() == [str(n) for n in range(len(TEXTS))]
    assert table["more"][3].as_py() == '["a", 3]'
    np.testing.assert_allclose(column(table), expected, atol=2e-6)
    said = manifest(whole)
    assert {name: said["files"][name]["sha256"] for name in said["files"]} == {
        name: hashlib.sha256(content).hexdigest() for name, content in files(whole).items()
    }
    assert [file["rows"] for file in said["files"].values()] == [7] * 6 + [3]
    facts = json.loads(pq.read_schema(whole / "shard-00002.parquet").metadata[b"llm2comp"])
    assert facts["model"] == said["model"] == "llm2comp/run"
    for name in ("revision", "prompt", "normalise", "precision", "dimensions"):
        assert facts[name] == said[name]
    assert facts["dimensions"] == 32


def test_the_command_reads_patterns_of_all_formats(tmp_path, expected):
    half, rest = TEXTS[:20], [{"body": text, "id": f"c{n}"} for n, text in enumerate(TEXTS[20:])]
    packed = "".join(json.dumps({"body": text, "id": None}) + "\n" for text in half)
    (tmp_path / "1.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    pq.write_table(pa.Table.from_pylist(rest[:10]), tmp_path / "2.parquet")
    lines = ["body,id", *(f"{row['body']},{row['id']}" for row in rest[10:])]
    (tmp_path / "3.csv").write_text("\n".join(lines))
    arguments = ("-m", finished()[1], "--device", "cpu", "--column", "body", "--keep", "id")
    pattern, out = tmp_path / "[0-9].*", tmp_path / "out"
    said = cli("embed", pattern, "-o", f"{out}/", *arguments, "--role", "query", "--normalise")
    assert said.code == 0, said
    assert "3 sources: 45 rows\n" in said.err
    assert f"{out}: 45 embeddings of 32 dimensions, float32, in 1 shards\n" in said.err
    assert "rows/s" in said.err
    table = pq.read_table(out)
    assert table["id"].to_pylist() == [None] * 20 + [row["id"] for row in rest]
    query = embed(llm2comp.load(finished()[1], "cpu"), TEXTS, role="query", normalise=True)
    np.testing.assert_allclose(column(table), query.embeddings_ND, atol=2e-6)
    assert np.abs(query.embeddings_ND - expected).max() > 1e-2
    assert manifest(out)["prompt"] == llm2comp.load(finished()[1], "cpu").prompts["query"] != ""


def killed(source, out, shards, seconds):
    """Embed in a process that is killed so long after it has made so many shards; whether it was
    still at work.
    """
    there = len(states(out)) if out.exists() else 0
    child = os.fork()
    if not child:
        try:
            run(source, out, shard_rows=1)
        finally:
            os._exit(0)
    ended = 0
    while not ended and (len(states(out)) if out.exists() else 0) < there + shards:
        ended = os.waitpid(child, os.WNOHANG)[0]
    if not ended:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)[1]
    return ended == signal.SIGKILL


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_lose_and_repeat_nothing(tmp_path, kills):
    """Killed at any moment, it goes on: what was there stays, and in the end all is the same."""
    rows = [{"text": text, "id": 1, "more": 2} for text in sentences(150, words=4)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    whole, out, draw, parts = tmp_path / "whole", tmp_path / "out", random.Random(kills), 0
    run(source, whole, shard_rows=1)
    before = {}
    for _ in range(kills):
        was_killed = killed(source, out, draw.randrange(4), draw.uniform(0, 0.02))
        after = states(out) if out.exists() else {}
        assert before.items() <= after.items(), "a shard that was there was written again"
        parts += was_killed and len(before) < len(after) < 150
        before = after
    assert parts > kills // 2, "most kills came while shards were made"
    run(source, out, shard_rows=1)
    assert before.items() <= states(out).items()
    assert len(files(out)) == 150
    assert files(out) == files(whole)
    assert manifest(out) == manifest(whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_run_stopped_between_shards_goes_on(source, whole, tmp_path, monkeypatch):
    from llm2comp.use import making

    out, made = tmp_path / "out", []

    def stops(*args):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(args[2])
        write(*args)

    write = making.write_shard
    monkeypatch.setattr(making, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        run(source, out)
    assert manifest(out)["files"] == {}
    before = states(out)
    assert sorted(before) == [f"shard-0000{i}.parquet" for i in range(3)]
    monkeypatch.setattr(making, "write_shard", lambda *args: made.append(args[2]) or write(*args))
    # a shard that is not whole does not count; what a killed process left goes
    (out / "shard-00001.parquet").write_bytes((out / "shard-00001.parquet").read_bytes()[:-9])
    (out / ".shard-00005.parquet.1.part").write_text("half")
    run(source, out)
    assert made == [0, 1, 2, 1, 3, 4, 5, 6]
    assert states(out)["shard-00000.parquet"] == before["shard-00000.parquet"]
    assert files(out) == files(whole)
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize("precision", ["float16", "int8", "uint8", "binary", "ubinary"])
def test_precisions_are_those_of_sentence_transformers(source, whole, tmp_path, precision):
    run(source, tmp_path / "out", precision=precision)
    stored, floats = column(pq.read_table(tmp_path / "out")), column(pq.read_table(whole))
    floats = floats.astype(np.float32)
    if precision == "float16":
        np.testing.assert_array_equal(stored, floats.astype(np.float16))
        return
    ranges = np.array(manifest(tmp_path / "out")["ranges"] or [[], []], np.float32)
    if precision.endswith("int8"):  # fewer texts than a sample: the ranges of all
        np.testing.assert_allclose(ranges, [floats.min(0), floats.max(0)], atol=2e-6)
    wanted = quantize_embeddings(floats, precision, ranges)
    difference = np.abs(stored.astype(int) - wanted.astype(int))
    assert difference.max() <= (precision in ("int8", "uint8"))
    assert (difference > 0).mean() < 0.01
    width = 32 if precision.endswith("int8") else 4
    kind = pa.int8() if precision in ("int8", "binary") else pa.uint8()
    assert pq.read_schema(tmp_path / "out" / "shard-00000.parquet").field("embedding").type == (
        pa.list_(kind, width)
    )


def test_rows_without_a_text(source, expected, tmp_path):
    for name, cells in (("a", [TEXTS[0], "", TEXTS[1]]), ("b", [" ", TEXTS[2]])):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": cell, "id": cell} for cell in cells])
    arguments = ("embed", tmp_path / "?.jsonl", "-m", finished()[1], "--shard-rows", 2)
    said = cli(*arguments, "-o", f"{tmp_path}/stop/")
    assert_refused(
        said,
        "2 sources: 2 of 5 rows cannot be embedded",
        "2 empty (a.jsonl line 2, b.jsonl line 1)",
        "--bad-rows skip",
    )
    assert not (tmp_path / "stop").exists()
    for policy in ("skip", "zero"):
        out = tmp_path / policy
        said = cli(*arguments, "-o", f"{out}/", "--bad-rows", policy, "--keep", "id")
        assert said.code == 0, said
    skip, zero = (pq.read_table(tmp_path / policy) for policy in ("skip", "zero"))
    assert skip["row"].to_pylist() == [0, 2, 4]
    assert skip["id"].to_pylist() == TEXTS[:3]
    np.testing.assert_allclose(column(skip), expected[:3], atol=2e-6)
    assert zero["row"].to_pylist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(column(zero)[[0, 2, 4]], column(skip))
    assert not column(zero)[[1, 3]].any()
    assert zero["id"].to_pylist() == [TEXTS[0], None, TEXTS[1], None, TEXTS[2]]


@pytest.mark.slow
def test_two_workers_make_the_same_shards(source, whole, tmp_path):
    out, bad = tmp_path / "out", tmp_path / "bad"
    arguments = ("-m", finished()[1], "--device", "cpu", "--shard-rows", 7, "--workers", 2)
    said = cli("embed", source, "-o", f"{out}/", "--keep", "id", "--keep", "more", *arguments)
    assert said.code == 0, said
    assert files(out) == files(whole)
    assert pq.read_table(out).num_rows == len(TEXTS)
    write_rows(tmp_path / "long.jsonl", [{"text": " ".join(sentences(30))}] * 20)
    said = cli(
        *("embed", tmp_path / "long.jsonl", "-o", f"{bad}/", "--long-texts", "error", *arguments)
    )
    assert_refused(said, "texts are longer than the model reads", "(from 0)")


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_the_first_process_holds_no_model_while_workers_embed(
    engine, source, tmp_path, monkeypatch
):
    """It would lie on the GPU of the first worker."""
    loaded = []

    def load_as(*arguments):
        model = making.load_as(*arguments)
        loaded.append(weakref.ref(model))
        return model

    def ended(*_):
        raise RunError("here workers begin")

    monkeypatch.setattr(bulk, "load_as", load_as)
    monkeypatch.setattr(bulk, {"local": "in_workers", "ray": "on_ray"}[engine], ended)
    monkeypatch.setattr(bulk, "find_spec", lambda name: True)
    job = bulk.prepare([source], tmp_path / "out", bulk.EmbedOptions())
    with pytest.raises(RunError, match="here workers begin"):
        bulk.embed_job(job, str(finished()[1]), "cpu", workers=2, engine=engine)
    assert [model() for model in loaded] == [None]


def test_errors_in_the_middle_name_the_row(tmp_path):
    rows = [{"text": text} for text in ["", *TEXTS[:3], " ".join(sentences(30))]]
    source = write_rows(tmp_path / "in.jsonl", rows)
    with pytest.raises(DataError, match=r"row 4 \(from 0\): 1 texts are longer") as caught:
        run(source, tmp_path / "out", long_texts="error", bad_rows="skip", shard_rows=2, keep=())
    assert "truncate or chunk-mean" in str(caught.value)
    assert len(files(tmp_path / "out")) == 2
    said = run(source, tmp_path / "b", long_texts="chunk-mean", bad_rows="skip", keep=())
    assert said.endswith(
        "4 embeddings of 32 dimensions, float32, in 1 shards; 1 over the model's limit"
    )


def test_a_folder_of_other_embeddings_is_refused(source, whole, tmp_path):
    before = states(whole)
    for options, told in (
        ({"normalise": True}, "normalise: 'False' there, 'True' asked for"),
        ({"shard_rows": 8, "keep": ("id",)}, "keep: .*; shard_rows: '7' there, '8' asked for"),
        ({"num_memory": 1}, "num_memory: 'None' there, '1'"),
    ):
        with pytest.raises(RunError, match=f"embeddings made otherwise(.|\n)*{told}"):
            run(source, whole, **options)
    other = write_rows(tmp_path / "o.jsonl", [{"text": text, "id": 1, "more": 2} for text in TEXTS])
    with pytest.raises(RunError, match="found: digest: "):
        run(other, whole)
    with pytest.raises(RunError, match="model: 'llm2comp/run' there, 'llm2comp/general-tiny"):
        llm2comp.embed(
            [source],
            whole,
            "builtin:general-tiny",
            llm2comp.EmbedOptions(shard_rows=7, keep=("id", "more")),
            device="cpu",
        )
    assert states(whole) == before
    with FileLock(whole / ".lock"), pytest.raises(RunError, match="another process is embedding"):
        run(source, whole)


def test_shards_without_their_manifest_are_not_taken_for_done(source, tmp_path):
    out, options = tmp_path / "v", llm2comp.EmbedOptions(shard_rows=16)
    llm2comp.embed([source], out, "mean:builtin:tiny", options, "cpu")
    (out / "_manifest.json").unlink()
    before = files(out)
    with pytest.raises(RunError, match=r"without their manifest.*\n.*shard-00000.parquet"):
        llm2comp.embed([source], out, finished()[1], options, "cpu")
    assert files(out) == before


@pytest.mark.parametrize("bad_rows", ["stop", "zero"])
def test_a_source_that_grows_meanwhile_gives_the_rows_that_were_counted(tmp_path, bad_rows):
    source = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS[:5]])
    options = llm2comp.EmbedOptions(shard_rows=4, bad_rows=bad_rows)
    job = bulk.prepare([source], tmp_path / "v", options)
    with source.open("a") as lines:
        lines.write('{"text": "one more"}\n')
    bulk.embed_job(job, "mean:builtin:tiny", "cpu")
    assert column(pq.read_table(tmp_path / "v"), "row").tolist() == [0, 1, 2, 3, 4]


def test_full_disk_in_the_middle(source, whole, tmp_path):
    out = tmp_path / "out"
    size = (whole / "shard-00000.parquet").stat().st_size - 1
    with pytest.raises(RunError, match="cannot write: File too large"), no_file_over(size):
        run(source, out)
    assert files(out) == {}
    assert not list(out.glob(".*.part"))
    run(source, out)
    assert files(out) == files(whole)


def test_what_cannot_be_is_refused_before_anything_is_written(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "shard-1.parquet").write_text("mine")
    model = ("-m", finished()[1])
    for arguments, parts in (
        ([source, source, "-o", tmp_path / "x.npy"], ["several inputs cannot go", "--out DIR/"]),
        ([source, "-o", tmp_path / "x.npy", "--keep", "id"], ["--keep cannot go into one file"]),
        ([source, "-o", tmp_path / "x.npy", "--engine", "ray"], ["--engine cannot go"]),
        ([source, "-o", f"{tmp_path}/x/", "--workers", 2, "--device", "cuda:1"], ["is one device"]),
        (["-", "-o", f"{tmp_path}/x/"], ["standard input: cannot be read again"]),
        ([tmp_path / "*.no", "-o", f"{tmp_path}/x/"], ["no file matches"]),
        ([tmp_path / "no.txt", "-o", f"{tmp_path}/x/"], ["no such file"]),
        ([source, "-o", f"{tmp_path}/x/", "--keep", "idd"], ["no column 'idd'", "'id'"]),
        ([source, "-o", f"{tmp_path}/x/", "--column", "txt"], ["no column", "--column text"]),
        ([source, "-o", f"{tmp_path}/x/", "--keep", "row"], ["cannot be kept: row"]),
        ([source, "-o", f"{tmp_path}/file/"], ["no folder can be written there"]),
        ([source, "-o", f"{tmp_path}/mine/"], ["would replace what is not its own"]),
        ([source, "-o", f"{source.parent}/"], ["would replace what is not", "in.jsonl"]),
    ):
        assert_refused(cli("embed", *arguments, *model), *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "_manifest.json").write_text("{}")
    (tmp_path / "old" / ".llm2comp.json").write_text('{"a folder of embeddings": []}')
    said = cli("embed", source, "-o", f"{tmp_path}/old/", *model)
    assert_refused(said, "_manifest.json: not a manifest", "delete the folder")


def test_shards_of_a_stream_in_any_order(source):
    stream = Stream(sources_of([source, source]))
    shards, found = stream.shards(8), {}
    for shard in (0, 1, 5, 11, 3, 4, 20):
        found[shard] = [row.number for row in shards[shard]]
    expected = {s: list(range(s * 8, min(s * 8 + 8, 90))) for s in (0, 1, 5, 11, 3, 4)} | {20: []}
    assert found == expected
    survey = stream.survey(sample=10)
    assert (survey.rows, survey.texts, len(survey.sample)) == (90, 90, 10)
    assert survey.sample != tuple(TEXTS[:10])
    assert survey.digest != Stream(sources_of([source])).survey().digest
