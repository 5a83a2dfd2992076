"""Bulk embedding equals `model.encode`, in order; long texts are cut, averaged or refused; files read back."""

import gzip
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from families import make_compressor
from llm2comp.embed import Embedded, embed, write_embeddings
from llm2comp.encoder import MemoryEncoder, as_sentence_transformer, embed_texts
from llm2comp.errors import DataError, RunError
from llm2comp.export import export, load_folder
from tiny_run import assert_refused, cli, finished, no_file_over, sentences, write_rows

TEXTS = ["one vector", "", " the fox ", "Ünicode 記憶 🧠\nsecond line", "[INST] no {markup} [/INST]", *sentences(40, words=5)]
LIMIT = 30
PROMPT = "find the text:"


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def pair(request, tmp_path_factory):
    """A live encoder and its exported folder, with and without BOS."""
    prompts = {"query": PROMPT, "document": ""}
    live = as_sentence_transformer(make_compressor(request.param), LIMIT, prompts=prompts)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    export(live, folder)
    return live, load_folder(folder, "cpu")


@pytest.fixture(scope="module", params=["live", "exported"])
def model(request, pair):
    return pair[request.param == "exported"]


def has_bos(model):
    return "<s>" in model.tokenizer.get_vocab()


def tokens(model, text):
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def room(model):
    """Text tokens that fit: the limit less BOS."""
    return LIMIT - has_bos(model)


def text_of(model, count, seed=0):
    """A text of exactly so many tokens."""
    words = " ".join(sentences(20, seed=seed))
    spans = model.tokenizer(words, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    text = words[: spans[count - 1][1]]
    assert len(tokens(model, text)) == count
    return text


def one(model, text):
    return embed_texts(model, [text]).numpy()[0]


# ---- rows


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_rows_in_order_equal_encode_whatever_the_batch(model, batch_size):
    found = embed(model, TEXTS, batch_size=batch_size)
    assert found.embeddings_ND.dtype == np.float32
    assert found.long_texts == 0
    assert len(np.unique(found.embeddings_ND.round(4), axis=0)) == len(TEXTS), "texts are told apart"
    for text, row in zip(TEXTS, found.embeddings_ND, strict=True):
        np.testing.assert_allclose(row, one(model, text), atol=1e-5)


def test_live_and_exported_agree_on_everything(pair):
    texts = [*TEXTS, text_of(pair[0], 200), text_of(pair[0], LIMIT), text_of(pair[0], LIMIT - 1)]
    for settings in ({}, {"role": "query"}, {"long_texts": "chunk-mean"}, {"long_texts": "chunk-mean", "role": "query"}):
        live, exported = (embed(model, texts, **settings) for model in pair)
        np.testing.assert_allclose(live.embeddings_ND, exported.embeddings_ND, atol=1e-5)
        assert live.long_texts == exported.long_texts > 0


def test_role_puts_the_stored_prompt_before_the_text(model):
    plain, query = embed(model, TEXTS), embed(model, TEXTS, role="query")
    assert np.abs(plain.embeddings_ND - query.embeddings_ND).max() > 1e-2
    np.testing.assert_allclose(query.embeddings_ND, model.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(embed(model, TEXTS, role="document").embeddings_ND, plain.embeddings_ND, atol=1e-6)


def test_normalise(model):
    plain, unit = embed(model, TEXTS).embeddings_ND, embed(model, TEXTS, normalise=True).embeddings_ND
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(unit * np.linalg.norm(plain, axis=1, keepdims=True), plain, atol=1e-5)
    assert not np.allclose(np.linalg.norm(plain, axis=1), 1, atol=0.1)


# ---- long texts


def test_a_text_that_just_fits_is_not_long(model):
    fits, over = text_of(model, room(model)), text_of(model, room(model) + 1)
    assert embed(model, [fits]).long_texts == 0
    assert embed(model, [fits], long_texts="error").long_texts == 0
    assert embed(model, [fits, over, "short", over]).long_texts == 2
    np.testing.assert_allclose(embed(model, [fits]).embeddings_ND, embed(model, [over]).embeddings_ND, atol=1e-5)


def test_the_prompt_takes_room(model):
    long = text_of(model, room(model))
    cuts = [i for i in range(len(long) + 1) if len(tokens(model, PROMPT + long[:i])) == room(model)]
    assert len(tokens(model, long[: max(cuts)])) < room(model) - 3
    found = embed(model, [long[: max(cuts)], long[: max(cuts) + 2]], role="query")
    assert found.long_texts == 1
    assert embed(model, [long], role="document").long_texts == 0


def test_every_byte_may_be_a_token(model):
    """Characters of several tokens each: shorter than the limit in characters, over it in tokens."""
    text = "記" * (room(model) // 3 + 1)
    assert len(text) < LIMIT < len(tokens(model, text)) + 3
    assert embed(model, [text]).long_texts == 1


def test_truncation_keeps_the_beginning(model):
    long = text_of(model, 100)
    np.testing.assert_allclose(embed(model, [long]).embeddings_ND[0], one(model, long), atol=1e-6)
    np.testing.assert_allclose(one(model, long), one(model, text_of(model, room(model))), atol=1e-5)


@pytest.mark.parametrize("role", [None, "query"])
def test_chunk_mean_is_the_mean_weighted_by_tokens(model, role):
    prompt = PROMPT if role else ""
    free = room(model) - len(tokens(model, prompt)) if role else room(model)
    long = text_of(model, 2 * free + 7)
    spans = model.tokenizer(long, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    parts = [long[spans[i][0] : spans[min(i + free, len(spans)) - 1][1]] for i in range(0, len(spans), free)]
    assert "".join(parts) == long
    counts = [len(tokens(model, part)) for part in parts]
    assert counts == [free, free, 7]
    states = np.stack([one(model, prompt + part) for part in parts])
    expected = (states * np.array(counts)[:, None]).sum(0) / sum(counts)
    found = embed(model, ["short", long, "short too"], role=role, long_texts="chunk-mean", batch_size=2)
    np.testing.assert_allclose(found.embeddings_ND[1], expected, atol=1e-5)
    np.testing.assert_allclose(found.embeddings_ND[0], one(model, prompt + "short"), atol=1e-5)
    assert found.long_texts == 1
    assert np.abs(expected - states.mean(0)).max() > 1e-3, "the weights matter"


def test_chunks_never_split_a_character_nor_lose_one(model, monkeypatch):
    long = "記憶 ünïcode 🧠🧠🧠🧠🧠🧠🧠 " * 9
    seen = []
    encode = type(model).encode

    def spy(self, texts, **kwargs):
        seen.extend(texts)
        return encode(self, texts, **kwargs)

    monkeypatch.setattr(type(model), "encode", spy)
    assert embed(model, [long], long_texts="chunk-mean").long_texts == 1
    assert sum(map(len, seen)) == len(long)
    assert sorted("".join(seen)) == sorted(long)
    assert all(0 < len(tokens(model, part)) <= room(model) for part in seen)


def test_error_names_the_first_long_text(model):
    long = text_of(model, 64)
    with pytest.raises(DataError, match="2 texts are longer") as caught:
        embed(model, ["short", long, long], long_texts="error")
    assert caught.value.where == "text 2"
    assert (caught.value.expected, caught.value.found) == (f"{room(model)} tokens or fewer", "64 tokens")


def test_a_prompt_that_leaves_no_room(model):
    model.prompts["query"], before = "memory " * 40, model.prompts["query"]
    try:
        with pytest.raises(DataError, match="prompt leaves no room"):
            embed(model, ["a"], role="query")
    finally:
        model.prompts["query"] = before


@pytest.mark.parametrize(("texts", "says"), [([], "nothing to embed"), (["a", "\udcff"], "text 2"), (["a", None], "text 2")])
def test_texts_that_are_none(model, texts, says):
    with pytest.raises(DataError, match=says):
        embed(model, texts)


def test_embeddings_that_are_not_finite(model):
    class Broken:
        """The model, but for one text."""

        def __getattr__(self, name):
            return getattr(model, name)

        def __getitem__(self, place):
            return model[place]

        def encode(self, texts, **kwargs):
            rows = model.encode(texts, **kwargs)
            rows[[text == "bad" for text in texts]] = np.inf
            return rows

    with pytest.raises(DataError, match=r"text 2: the embedding is not finite") as caught:
        embed(Broken(), ["good", "bad", "good", "bad"])
    assert caught.value.found == "'bad', and 1 more"


def test_the_limit_is_the_one_that_truncation_uses(pair):
    """`embed` and the live module agree on which token is the last one read."""
    live = pair[0]
    module = live[0]
    assert isinstance(module, MemoryEncoder)
    read = module.preprocess([text_of(live, 100)])["input_ids"][0].tolist()
    assert len(read) == LIMIT
    assert read[int(has_bos(live)) :] == tokens(live, text_of(live, room(live)))


# ---- files


@pytest.fixture
def made():
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).numpy()
    return Embedded(rows, 0), ["a", 'b "quoted"\n記憶', "c,d"]


def test_npy_reads_back(tmp_path, made):
    write_embeddings(tmp_path / "x.npy", *made)
    found = np.load(tmp_path / "x.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, made[0].embeddings_ND)


def test_parquet_reads_back(tmp_path, made):
    write_embeddings(tmp_path / "x.parquet", *made)
    table = pq.read_table(tmp_path / "x.parquet")
    assert table["text"].to_pylist() == made[1]
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), dtype=np.float32), made[0].embeddings_ND)


def test_jsonl_reads_back(tmp_path, made):
    write_embeddings(tmp_path / "x.jsonl", *made)
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [row["text"] for row in rows] == made[1]
    np.testing.assert_array_equal(np.array([row["embedding"] for row in rows], dtype=np.float32), made[0].embeddings_ND)


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".jsonl"])
def test_full_disk_leaves_the_old_file(tmp_path, made, suffix):
    place = tmp_path / f"x{suffix}"
    place.write_text("old")
    with pytest.raises(RunError, match="cannot write: File too large"), no_file_over(64):
        write_embeddings(place, *made)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    assert place.read_text() == "old"
    write_embeddings(place, *made)
    assert place.stat().st_size > 64


# ---- the command


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The finished run, what its model gives for TEXTS, and those of TEXTS that a file of lines can hold."""
    texts = [text for text in TEXTS if text.strip() and "\n" not in text]
    folder = finished()[1]
    return folder, texts, load_folder(folder / "model", "cpu").encode(texts)


def compressed(content, suffix):
    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix](content)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_command_reads_files(tmp_path, command, suffix):
    folder, texts, expected = command
    source = write_rows(tmp_path / "in.jsonl", [{"body": text} for text in texts])
    packed = tmp_path / f"in.jsonl{suffix}"
    packed.write_bytes(compressed(source.read_bytes(), suffix))
    said = cli("embed", packed, "-m", folder, "-o", tmp_path / "out.npy", "--column", "body", "--batch-size", 7)
    assert said.code == 0, said
    assert said.out == ""
    assert f"in.jsonl{suffix}: {len(texts)} rows" in said.err
    assert f"out.npy: {len(texts)} embeddings of 32 dimensions\n" in said.err
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)


def test_command_reads_standard_input_and_says_what_it_left_out(tmp_path, command):
    folder, texts, expected = command
    lines = [b"", *(text.encode() for text in texts[:3]), b"\xff", *(text.encode() for text in texts[3:])]
    said = cli("embed", "-", "-m", folder / "model", "-o", tmp_path / "x" / "out.jsonl", stdin=b"\r\n".join(lines))
    assert said.code == 0, said
    assert f"standard-input.txt: {len(texts)} rows; left out: 1 empty, 1 not UTF-8 (first at line 5)" in said.err
    rows = [json.loads(line) for line in (tmp_path / "x" / "out.jsonl").read_text("utf-8").splitlines()]
    assert [row["text"] for row in rows] == texts
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-5)


@pytest.mark.parametrize("policy", ["truncate", "chunk-mean"])
def test_command_counts_long_texts(tmp_path, command, policy):
    stdin = b"short\n" + 2 * (" ".join(sentences(30)).encode() + b"\n")
    out = tmp_path / "out.parquet"
    arguments = ("embed", "-", "-m", command[0], "-o", out, "--long-texts", policy, "--role", "query", "--normalise")
    said = cli(*arguments, stdin=stdin)
    assert said.code == 0, said
    assert f"; 2 over the limit ({policy})" in said.err
    rows = np.array(pq.read_table(out)["embedding"].to_pylist())
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_command_prints_progress_lines_without_control_codes(tmp_path, command):
    said = cli("embed", "-", "-m", command[0], "-o", tmp_path / "out.npy", stdin="\n".join(command[1]).encode())
    assert said.err.count("embed ") == 1, "the last state, once"
    assert f"embed {len(command[1])}/{len(command[1])}: 0 s, 0 s left\n" in said.err
    assert "\x1b" not in said.err
    assert "\r" not in said.err


def test_similarity_prints_a_symmetric_matrix(command):
    folder, texts, rows = command
    texts = [*texts[:3], "x" * 80, "two\nlines"]
    said = cli("similarity", *texts, "-m", folder)
    assert said.code == 0, said
    lines = said.out.splitlines()
    matrix = np.array([[float(cell) for cell in line.split()[:5]] for line in lines])
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(np.diag(matrix), 1.0)
    unit = rows[:3] / np.linalg.norm(rows[:3], axis=1, keepdims=True)
    np.testing.assert_allclose(matrix[:3, :3], unit @ unit.T, atol=6e-4)
    for line, text in zip(lines, texts[:3], strict=False):
        assert line.endswith(f"  {text.strip()}")
    assert lines[3].endswith("  " + "x" * 57 + "...")
    assert lines[4].endswith("  two lines")
    assert all(line.startswith(" ") and " 1.000" in line for line in lines)


def test_full_disk_at_the_command(tmp_path, command):
    stdin = "\n".join(command[1]).encode()
    arguments = ("embed", "-", "-m", command[0], "-o", tmp_path / "out.npy")
    with no_file_over(2000):
        said = cli(*arguments, stdin=stdin)
    assert_refused(said, "out.npy: cannot write: File too large", "free space")
    assert list(tmp_path.iterdir()) == []
    assert cli(*arguments, stdin=stdin).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]
