"""Bulk embedding equals `model.encode`, in order and in batches of so many tokens; long texts are
cut, averaged or refused.
"""

import gzip
import json
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from sentence_transformers import SentenceTransformer

import llm2comp
from families import make_compressor
from llm2comp.errors import BackboneError, DataError, RunError
from llm2comp.model.encoder import MemoryEncoder, as_sentence_transformer, merge_adapters
from llm2comp.model.inputs import frame_of
from llm2comp.storage.export import export
from llm2comp.storage.golden import load_folder
from llm2comp.use.embed import _pieces, embed
from llm2comp.use.writing import Embedded, Places, check_output, rows_file, write_embeddings
from oracles import embed_texts
from tiny_run import assert_refused, cli, finished, no_file_over, sentences, write_rows

TEXTS = [
    "one vector",
    "",
    " the fox ",
    "Ünicode 記憶 🧠\nsecond line",
    "[INST] no {markup} [/INST]",
    *sentences(40, words=5),
]
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
    spans = model.tokenizer(words, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    text = words[: spans[count - 1][1]]
    assert len(tokens(model, text)) == count
    return text


def one(model, text):
    return embed_texts(model, [text]).numpy()[0]


# ---- rows


@pytest.mark.thorough
@pytest.mark.parametrize("tokens_at_once", [1, 40, 10_000])
def test_rows_in_order_equal_encode_whatever_the_batch(model, tokens_at_once, monkeypatch):
    monkeypatch.setattr("llm2comp.model.vectors.FETCH_AT", 100)
    texts = [*TEXTS, *TEXTS[:3]]
    found = embed(model, texts, max_tokens_per_batch=tokens_at_once)
    assert found.embeddings_ND.dtype == np.float32
    assert found.long_texts == 0
    assert len(np.unique(found.embeddings_ND.round(4), axis=0)) == len(TEXTS), (
        "texts are told apart"
    )
    for text, row in zip(texts, found.embeddings_ND, strict=True):
        np.testing.assert_allclose(row, one(model, text), atol=2e-6)
    np.testing.assert_allclose(
        embed(model, texts[:1]).embeddings_ND, found.embeddings_ND[:1], atol=2e-6
    )


def batches_of(model, texts, **settings):
    """(texts, positions of the longest) of each batch that the model computes, memory included."""
    module, seen = model[0], []
    beside = module.compressor.added if isinstance(module, MemoryEncoder) else 0
    handle = model.register_forward_pre_hook(
        lambda _, args: seen.append(
            (args[0]["input_ids"].shape[0], args[0]["input_ids"].shape[1] + beside)
        )
    )
    try:
        embed(model, texts, **settings)
    finally:
        handle.remove()
    return seen


def test_batches_hold_so_many_tokens(model):
    texts = [*TEXTS, text_of(model, 100), *(text_of(model, n) for n in range(1, 25))]
    seen = batches_of(model, texts, max_tokens_per_batch=120)
    assert sum(count for count, _ in seen) == len(texts)
    assert all(count * longest <= 120 for count, longest in seen)
    assert [longest for _, longest in seen] == sorted(
        (longest for _, longest in seen), reverse=True
    )
    for (count, longest), (_, following) in zip(seen, seen[1:], strict=False):
        assert (count + 1) * longest > 120, f"a batch stays small, before {following}"
    assert max(count for count, _ in seen) > min(count for count, _ in seen) > 1
    assert [count for count, _ in batches_of(model, texts, max_tokens_per_batch=1)] == [1] * len(
        texts
    )


def count_tokenised(model, monkeypatch):
    """How often each text is given to the tokenizer from here on."""
    seen, kind = Counter(), type(model.tokenizer)
    call = kind.__call__

    def spy(self, text=None, *args, **kwargs):
        seen.update([text] if isinstance(text, str) else text)
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", spy)
    return seen


@pytest.mark.parametrize("role", [None, "query"])
def test_each_text_is_tokenised_once(model, monkeypatch, role):
    # the tokenizer is asked what it makes of an empty text
    texts = [*TEXTS[2:], text_of(model, 100)]
    seen = count_tokenised(model, monkeypatch)
    embed(model, texts, role=role, max_tokens_per_batch=64)
    assert {seen[(PROMPT if role else "") + text] for text in texts} == {1}
    model.encode(texts[:3])
    assert seen[texts[0]] == (1 if role else 2), "the spy sees what encode tokenises"


def test_a_model_that_reads_texts_in_its_own_way_is_left_to_it(pair, monkeypatch):
    """Ids are used again only where trial texts show that they are what the model itself makes."""
    exported = pair[1]
    assert frame_of(exported) is not None
    exported.truncate_dim = 5
    try:
        found = embed(exported, TEXTS, max_tokens_per_batch=64).embeddings_ND
        np.testing.assert_allclose(found, exported.encode(TEXTS), atol=2e-6)
        assert found.shape == (len(TEXTS), 5)
    finally:
        exported.truncate_dim = None
    preprocess = exported[0].preprocess
    monkeypatch.setattr(
        exported[0],
        "preprocess",
        lambda texts, **kwargs: preprocess([t.upper() for t in texts], **kwargs),
    )
    assert frame_of(exported) is None
    found = embed(exported, TEXTS, max_tokens_per_batch=64).embeddings_ND
    np.testing.assert_allclose(found, exported.encode(TEXTS), atol=2e-6)
    monkeypatch.undo()
    assert np.abs(found - embed(exported, TEXTS).embeddings_ND).max() > 1e-2


def test_live_and_exported_agree_on_everything(pair):
    texts = [*TEXTS, text_of(pair[0], 200), text_of(pair[0], LIMIT), text_of(pair[0], LIMIT - 1)]
    for settings in (
        {},
        {"role": "query"},
        {"long_texts": "chunk-mean"},
        {"long_texts": "chunk-mean", "role": "query"},
    ):
        live, exported = (embed(model, texts, **settings) for model in pair)
        np.testing.assert_allclose(live.embeddings_ND, exported.embeddings_ND, atol=1e-5)
        assert live.long_texts == exported.long_texts > 0


def test_role_puts_the_stored_prompt_before_the_text(model):
    plain, query = embed(model, TEXTS), embed(model, TEXTS, role="query")
    assert np.abs(plain.embeddings_ND - query.embeddings_ND).max() > 1e-2
    np.testing.assert_allclose(query.embeddings_ND, model.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(
        embed(model, TEXTS, role="document").embeddings_ND, plain.embeddings_ND, atol=1e-6
    )


def test_normalise(model):
    plain, unit = (
        embed(model, TEXTS).embeddings_ND,
        embed(model, TEXTS, normalise=True).embeddings_ND,
    )
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        unit * np.linalg.norm(plain, axis=1, keepdims=True), plain, atol=1e-5
    )
    assert not np.allclose(np.linalg.norm(plain, axis=1), 1, atol=0.1)


# ---- long texts


def test_a_text_that_just_fits_is_not_long(model):
    fits, over = text_of(model, room(model)), text_of(model, room(model) + 1)
    assert embed(model, [fits]).long_texts == 0
    assert embed(model, [fits], long_texts="error").long_texts == 0
    assert embed(model, [fits, over, "short", over]).long_texts == 2
    np.testing.assert_allclose(
        embed(model, [fits]).embeddings_ND, embed(model, [over]).embeddings_ND, atol=1e-5
    )


def test_the_prompt_takes_room(model):
    long = text_of(model, room(model))
    cuts = [i for i in range(len(long) + 1) if len(tokens(model, PROMPT + long[:i])) == room(model)]
    assert len(tokens(model, long[: max(cuts)])) < room(model) - 3
    found = embed(model, [long[: max(cuts)], long[: max(cuts) + 2]], role="query")
    assert found.long_texts == 1
    assert embed(model, [long], role="document").long_texts == 0


def test_a_role_with_a_limit_of_its_own_is_cut_there(pair):
    """As a stage of a run has it: `encode_query` and the server cut at the same token."""
    live = as_sentence_transformer(pair[0][0].compressor, LIMIT, {"query": 12})
    text = text_of(live, 20)
    found = embed(live, [text], role="query")
    assert found.long_texts == 1
    np.testing.assert_allclose(found.embeddings_ND, live.encode_query([text]), atol=1e-5)
    assert embed(live, [text], role="document").long_texts == 0


def test_every_byte_may_be_a_token(model):
    """Characters of several tokens each: shorter than the limit in characters, over it in
    tokens.
    """
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
    spans = model.tokenizer(long, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    parts = [
        long[spans[i][0] : spans[min(i + free, len(spans)) - 1][1]]
        for i in range(0, len(spans), free)
    ]
    assert "".join(parts) == long
    counts = [len(tokens(model, part)) for part in parts]
    assert counts == [free, free, 7]
    states = np.stack([one(model, prompt + part) for part in parts])
    expected = (states * np.array(counts)[:, None]).sum(0) / sum(counts)
    found = embed(
        model,
        ["short", long, "short too"],
        role=role,
        long_texts="chunk-mean",
        max_tokens_per_batch=64,
    )
    np.testing.assert_allclose(found.embeddings_ND[1], expected, atol=1e-5)
    np.testing.assert_allclose(found.embeddings_ND[0], one(model, prompt + "short"), atol=1e-5)
    assert found.long_texts == 1
    assert np.abs(expected - states.mean(0)).max() > 1e-3, "the weights matter"


def test_chunks_never_split_a_character_nor_lose_one(model, monkeypatch):
    long = "記憶 ünïcode 🧠🧠🧠🧠🧠🧠🧠 " * 9
    seen = []
    monkeypatch.setattr(
        "llm2comp.use.embed._pieces", lambda *args: seen.extend(_pieces(*args)) or seen
    )
    assert embed(model, [long], long_texts="chunk-mean").long_texts == 1
    assert "".join(seen) == long
    assert all(0 < len(tokens(model, part)) <= room(model) for part in seen)


def test_error_names_the_first_long_text(model):
    long = text_of(model, 64)
    with pytest.raises(DataError, match="2 texts are longer") as caught:
        embed(model, ["short", long, long], long_texts="error")
    assert caught.value.where == "text 2"
    assert (caught.value.expected, caught.value.found) == (
        f"{room(model)} tokens or fewer",
        "64 tokens",
    )


def test_a_prompt_that_leaves_no_room(model):
    model.prompts["query"], before = "memory " * 40, model.prompts["query"]
    try:
        with pytest.raises(DataError, match="prompt leaves no room"):
            embed(model, ["a"], role="query")
    finally:
        model.prompts["query"] = before


@pytest.mark.parametrize(
    ("texts", "says"),
    [([], "nothing to embed"), (["a", "\udcff"], "text 2"), (["a", None], "text 2")],
)
def test_texts_that_are_none(model, texts, says):
    with pytest.raises(DataError, match=says):
        embed(model, texts)


def test_embeddings_that_are_not_finite(model):
    def spoil(_, args, features):
        for row, (ids, mask) in enumerate(
            zip(args[0]["input_ids"], args[0]["attention_mask"], strict=True)
        ):
            if model.tokenizer.decode(ids[mask == 1], skip_special_tokens=True).strip() == "bad":
                features["sentence_embedding"][row] = np.inf

    handle = model.register_forward_hook(spoil)
    try:
        with pytest.raises(DataError, match=r"text 2: the embedding is not finite") as caught:
            embed(model, ["good", "bad", "good", "bad"])
    finally:
        handle.remove()
    assert caught.value.found == "'bad', and 1 more"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_stops_the_model_stops_embedding(model, error):
    def stop(*_):
        raise error("while it computes")

    handle = model.register_forward_hook(stop)
    try:
        with pytest.raises(error, match="while it computes"):
            embed(model, TEXTS)
    finally:
        handle.remove()


def test_the_limit_is_the_one_that_truncation_uses(pair):
    """`embed` and the live module agree on which token is the last one read."""
    live = pair[0]
    module = live[0]
    assert isinstance(module, MemoryEncoder)
    read = module.preprocess([text_of(live, 100)])["input_ids"][0].tolist()
    assert len(read) == LIMIT
    assert read[int(has_bos(live)) :] == tokens(live, text_of(live, room(live)))


# ---- other weights


def lowest_cosine(a_ND, b_ND):
    return torch.cosine_similarity(torch.from_numpy(a_ND), torch.from_numpy(b_ND)).min().item()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("place", ["model", "3-scl"])
def test_half_precision_on_request(dtype, place):
    folder = finished()[1] / place
    plain, half = llm2comp.load(folder, "cpu"), llm2comp.load(folder, "cpu", dtype=dtype)
    found, expected = embed(half, TEXTS).embeddings_ND, embed(plain, TEXTS).embeddings_ND
    assert found.dtype == np.float32
    assert lowest_cosine(found, expected) >= 0.999
    assert np.abs(found - expected).max() > 1e-5
    weights = [
        weight
        for name, weight in half.named_parameters()
        if "layers.0.mlp.up_proj" in name and "lora" not in name
    ]
    assert [weight.dtype for weight in weights] == [getattr(torch, dtype)]
    assert {buffer.dtype for name, buffer in half.named_buffers() if "inv_freq" in name} == {
        torch.float32
    }
    if place == "model":
        stock = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
        np.testing.assert_allclose(found[:5], stock.encode(TEXTS[:5], batch_size=5), atol=3e-2)


def test_dtypes_that_there_are_not():
    folder = finished()[1]
    with pytest.raises(BackboneError, match="no such dtype"):
        llm2comp.load(folder, "cpu", dtype="half")
    with pytest.raises(BackboneError, match="cannot change its dtype"):
        llm2comp.load(folder, "cpu", backend="openvino", dtype="bfloat16")


def test_merged_adapters_give_the_same_embeddings(pair):
    folder = finished()[1] / "3-scl"
    live, merged = llm2comp.load(folder, "cpu"), llm2comp.load(folder, "cpu", merged=True)
    counts = [
        sum("lora_" in name for name, _ in model.named_parameters()) for model in (live, merged)
    ]
    assert counts[0] > counts[1] == 0
    found, expected = (embed(model, TEXTS).embeddings_ND for model in (merged, live))
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
    with live[0].compressor.backbone.base_only():
        without = embed(live, TEXTS).embeddings_ND
    assert np.abs(without - expected).max() > 1e-3, "the adapters matter"
    before = embed(pair[1], TEXTS).embeddings_ND
    merge_adapters(pair[1])
    np.testing.assert_array_equal(embed(pair[1], TEXTS).embeddings_ND, before)


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
    np.testing.assert_array_equal(
        np.array(table["embedding"].to_pylist(), dtype=np.float32), made[0].embeddings_ND
    )


def test_jsonl_reads_back(tmp_path, made):
    write_embeddings(tmp_path / "x.jsonl", *made)
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [row["text"] for row in rows] == made[1]
    np.testing.assert_array_equal(
        np.array([row["embedding"] for row in rows], dtype=np.float32), made[0].embeddings_ND
    )


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".jsonl"])
def test_full_disk_leaves_the_old_file(tmp_path, made, suffix):
    place = tmp_path / f"x{suffix}"
    write_embeddings(place, Embedded(made[0].embeddings_ND[:1], 0), ["old"])
    old = place.read_bytes()
    with pytest.raises(RunError, match="cannot write: File too large"), no_file_over(64):
        write_embeddings(place, *made)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    assert place.read_bytes() == old
    write_embeddings(place, *made)
    assert place.read_bytes() != old


# ---- the command


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The finished run, what its model gives for TEXTS, and those of TEXTS that a file of lines can
    hold.
    """
    texts = [text for text in TEXTS if text.strip() and "\n" not in text]
    folder = finished()[1]
    return folder, texts, load_folder(folder / "model", "cpu").encode(texts)


def compressed(content, suffix):
    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix](
        content
    )


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_command_reads_files(tmp_path, command, suffix):
    folder, texts, expected = command
    source = write_rows(tmp_path / "in.jsonl", [{"body": text} for text in texts])
    packed = tmp_path / f"in.jsonl{suffix}"
    packed.write_bytes(compressed(source.read_bytes(), suffix))
    said = cli(
        "embed",
        packed,
        "-m",
        folder,
        "-o",
        tmp_path / "out.npy",
        "--column",
        "body",
        "--max-tokens-per-batch",
        70,
    )
    assert said.code == 0, said
    assert said.out == ""
    assert f"in.jsonl{suffix}: {len(texts)} rows" in said.err
    assert f"out.npy: {len(texts)} embeddings of 32 dimensions\n" in said.err
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)


def test_command_reads_standard_input_and_says_what_it_left_out(tmp_path, command):
    folder, texts, expected = command
    lines = [
        b"",
        *(text.encode() for text in texts[:3]),
        b"\xff",
        *(text.encode() for text in texts[3:]),
    ]
    arguments = (
        "embed",
        "-",
        "-m",
        folder / "model",
        "-o",
        tmp_path / "x" / "out.jsonl",
        "--bad-rows",
        "skip",
    )
    said = cli(*arguments, stdin=b"\r\n".join(lines))
    assert said.code == 0, said
    assert (
        f"standard-input.txt: {len(texts)} rows; left out: 1 empty (line 1), 1 not UTF-8 (line 5)"
        in said.err
    )
    rows = [
        json.loads(line) for line in (tmp_path / "x" / "out.jsonl").read_text("utf-8").splitlines()
    ]
    assert [row["text"] for row in rows] == texts
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_commands_take_a_dtype_and_merge(tmp_path, command, dtype):
    folder, texts, expected = command
    arguments = ("-m", folder / "3-scl", "--dtype", dtype)
    said = cli(
        "embed", "-", *arguments, "-o", tmp_path / "out.npy", stdin="\n".join(texts).encode()
    )
    assert said.code == 0, said
    rows = np.load(tmp_path / "out.npy")
    assert lowest_cosine(rows, expected) >= 0.999
    assert (np.abs(rows - expected).max() < 1e-5) == (dtype == "auto")
    said = cli("similarity", *texts[:2], *arguments)
    assert said.code == 0, said
    cosine = torch.cosine_similarity(*torch.from_numpy(rows[:2]), dim=0).item()
    assert float(said.out.splitlines()[0].split()[1]) == pytest.approx(cosine, abs=1e-2)


@pytest.mark.parametrize("policy", ["truncate", "chunk-mean"])
def test_command_counts_long_texts(tmp_path, command, policy):
    stdin = b"short\n" + 2 * (" ".join(sentences(30)).encode() + b"\n")
    out = tmp_path / "out.parquet"
    arguments = (
        "embed",
        "-",
        "-m",
        command[0],
        "-o",
        out,
        "--long-texts",
        policy,
        "--role",
        "query",
        "--normalise",
    )
    said = cli(*arguments, stdin=stdin)
    assert said.code == 0, said
    done = {
        "truncate": "cut there: --long-texts chunk-mean reads them whole",
        "chunk-mean": "read in parts",
    }[policy]
    note = rf"; 2 over the model's limit of (\d+) tokens, {done}$"
    (limit,) = re.findall(note, said.err, re.MULTILINE)
    at = arguments.index(policy)
    refused = cli(*arguments[:at], "error", *arguments[at + 1 :], stdin=stdin)
    assert f"expected: {limit} tokens or fewer" in refused.err
    rows = np.array(pq.read_table(out)["embedding"].to_pylist())
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_command_prints_progress_lines_without_control_codes(tmp_path, command):
    said = cli(
        "embed",
        "-",
        "-m",
        command[0],
        "-o",
        tmp_path / "out.npy",
        stdin="\n".join(command[1]).encode(),
    )
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
    assert all(line[0] in " -" and " 1.000" in line for line in lines)


def test_full_disk_at_the_command(tmp_path, command):
    stdin = "\n".join(command[1]).encode()
    arguments = ("embed", "-", "-m", command[0], "-o", tmp_path / "out.npy")
    with no_file_over(2000):
        said = cli(*arguments, stdin=stdin)
    assert_refused(said, "out.npy: cannot write: File too large", "free space")
    assert list(tmp_path.iterdir()) == []
    assert cli(*arguments, stdin=stdin).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]


# ---- rows that have no text; files that are not ours


def gaps(tmp_path, kind, texts):
    """A file of each kind that has no text in rows 1, 3 and 6; the rows that have."""
    cells = [texts[0], "", texts[1], " ", texts[2], texts[3], ""]
    if kind == ".parquet":
        pq.write_table(
            pa.table({"text": [cell or None for cell in cells]}), tmp_path / "in.parquet"
        )
    elif kind == ".csv":
        (tmp_path / "in.csv").write_text(
            "n,text\n" + "".join(f'{n},"{cell}"\n' for n, cell in enumerate(cells))
        )
    else:
        write_rows(tmp_path / "in.jsonl", [{"text": cell} for cell in cells])
    return tmp_path / f"in{kind}", [0, 2, 4, 5]


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_rows_without_a_text_stop_embedding_and_are_named(tmp_path, command, kind):
    source, _ = gaps(tmp_path, kind, command[1])
    said = cli("embed", source, "-m", command[0], "-o", tmp_path / "out.npy")
    shift, word = {".csv": (2, "line"), ".jsonl": (1, "line"), ".parquet": (1, "row")}[kind]
    places = ", ".join(f"{word} {row + shift}" for row in (1, 3, 6))
    assert_refused(
        said,
        f"in{kind}: 3 of 7 rows cannot be embedded",
        f"3 empty ({places})",
        "--bad-rows skip",
        "zero",
    )
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_rows_keep_their_numbers_or_their_places(tmp_path, command, kind):
    """What is left of the others' rows is what these texts have by themselves; zeros are where no
    text is.
    """
    source, rows = gaps(tmp_path, kind, command[1])
    expected = command[2][:4]
    for suffix in (".npy", ".parquet", ".jsonl"):
        outs = {policy: tmp_path / f"{policy}{suffix}" for policy in ("skip", "zero")}
        for policy, out in outs.items():
            said = cli("embed", source, "-m", command[0], "-o", out, "--bad-rows", policy)
            assert said.code == 0, said
            assert "left out: 3 empty (" in said.err
            assert (
                "zeros in the place of 3 rows" if policy == "zero" else "their rows (from 0): "
            ) in said.err
        if suffix == ".npy":
            skipped, zeros, numbers = (
                np.load(outs["skip"]),
                np.load(outs["zero"]),
                np.load(rows_file(outs["skip"])),
            )
            assert not rows_file(outs["zero"]).exists()
        else:
            read = (
                pq.read_table
                if suffix == ".parquet"
                else lambda file: pa.Table.from_pylist(lines(file))
            )
            tables = {policy: read(out) for policy, out in outs.items()}
            skipped, zeros = (np.array(tables[policy]["embedding"].to_pylist()) for policy in outs)
            numbers = tables["skip"]["row"].to_numpy()
            assert tables["zero"].column_names == ["text", "embedding"]
            assert [text is None for text in tables["zero"]["text"].to_pylist()] == [
                n not in rows for n in range(7)
            ]
        assert numbers.tolist() == rows
        assert zeros.shape == (7, 32)
        np.testing.assert_allclose(skipped, expected, atol=1e-5)
        np.testing.assert_array_equal(zeros[numbers], skipped)
        assert not np.delete(zeros, numbers, axis=0).any()
        assert np.delete(zeros, numbers, axis=0).shape == (3, 32)


def lines(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_row_numbers_of_an_earlier_file_do_not_stay_beside_another(tmp_path, made):
    write_embeddings(tmp_path / "x.npy", *made, Places([0, 2, 3], 5))
    assert np.load(tmp_path / "x.rows.npy").tolist() == [0, 2, 3]
    write_embeddings(tmp_path / "x.npy", *made)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
    (tmp_path / "x.rows.npy").write_text("mine")
    with pytest.raises(RunError, match=r"x\.rows\.npy: would replace what is not its own"):
        write_embeddings(tmp_path / "x.npy", *made)


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".jsonl"])
def test_only_embeddings_are_replaced(tmp_path, made, suffix):
    out = tmp_path / f"x{suffix}"
    write_embeddings(out, *made)
    check_output(out)
    others = [b"mine", b'{"text": "mine"}\n', b"[1]"]
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": ["mine"]}), out)
        others.append(out.read_bytes())
    if suffix == ".npy":
        np.save(out, np.array(["mine"]))
        others.append(out.read_bytes())
    for content in others:
        out.write_bytes(content)
        for attempt in (lambda: check_output(out), lambda: write_embeddings(out, *made)):
            with pytest.raises(RunError, match="would replace what is not its own"):
                attempt()
        assert out.read_bytes() == content


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_input_is_not_replaced(tmp_path, command, suffix):
    """Not even by a file that holds embeddings, nor through a link."""
    source = tmp_path / f"in{suffix}"
    write_embeddings(source, Embedded(np.zeros((2, 3), np.float32), 0), ["a", "b"])
    (tmp_path / f"link{suffix}").symlink_to(source)
    before = source.read_bytes()
    for out in (source, tmp_path / f"link{suffix}"):
        said = cli("embed", source, "-m", command[0], "-o", out)
        assert_refused(said, "would replace its own input", str(source))
    assert source.read_bytes() == before


def test_a_column_that_is_not_there_is_told_as_an_option(tmp_path, command):
    write_rows(tmp_path / "in.jsonl", [{"id": "1", "the body": "a"}])
    for column, told in (
        ([], "--column 'the body'"),
        (["--column", "the bdy"], "--column 'the body'"),
    ):
        said = cli(
            "embed", tmp_path / "in.jsonl", "-m", command[0], "-o", tmp_path / "out.npy", *column
        )
        assert_refused(said, "no column", "columns id, the body", f"to do: {told}\n")
