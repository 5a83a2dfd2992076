"""GGUF folders, in the real llama.cpp: its server gives the golden vectors."""

import contextlib
import json
import unicodedata
import urllib.request

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import normalizers, pre_tokenizers

import families
import llm2comp
from families import GROUPED, make_compressor
from llm2comp.errors import ModelFolderError
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.recipe import EncoderSettings
from llm2comp.system.console import GENERAL
from test_nested import make_nested
from tiny_run import assert_refused, cli

LIMIT = 140
PROMPTS = {"query": "find: ", "document": ""}
GEMMA = {"gemma": ("GemmaConfig", GROUPED | {"head_dim": 8, "tie_word_embeddings": True})}


def with_pieces(compressor):
    """As Llama 2's published tokenizer puts spaces before texts."""
    backend = compressor.backbone.tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.pre_tokenizer = None
    return compressor


# name → an encoder that llama.cpp computes exactly
ENCODERS = {
    "llama": lambda: make_compressor("llama", memory=1),
    "llama, causal": lambda: make_compressor("llama", memory=1, attention="causal"),
    "llama, pieces": lambda: with_pieces(make_compressor("llama", memory=1, own=True)),
    "llama, other positions": lambda: make_compressor("llama3", memory=1),
    "llama, nested": make_nested,
    "qwen2": lambda: make_compressor("qwen2", memory=1, own=True),
    "qwen3": lambda: make_compressor("qwen3", memory=1),
    "gemma": lambda: make_compressor("gemma", memory=1),
    "gemma3": lambda: make_compressor("gemma3", memory=1, sliding_window=512),
    "gemma3, its own tokenizer": lambda: make_compressor(
        "gemma3", memory=1, own=True, sliding_window=512
    ),
    "gemma3, a causal window": lambda: make_compressor("gemma3", memory=1, attention="causal"),
}


def export(compressor, folder, **settings):
    model = as_sentence_transformer(compressor, LIMIT, prompts=PROMPTS)
    llm2comp.export(model, folder, engine="llama.cpp", **settings)


@contextlib.contextmanager
def served(folder, length=512):
    """The address of llama.cpp's own server on a folder's file."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp: pip install '.[llamacpp]'")
    asked = xllamacpp.CommonParams()
    asked.model.path = str(folder / "model.gguf")
    asked.embedding, asked.warmup, asked.n_parallel = True, False, 1
    asked.n_ctx = asked.n_batch = asked.n_ubatch = length
    asked.cpuparams.n_threads = 1
    server = xllamacpp.Server(asked)
    yield server.listening_address
    del server


def ask(address, path, body):
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def embeddings(address, texts):
    found = [ask(address, "/v1/embeddings", {"input": text})["data"][0] for text in texts]
    return torch.tensor([row["embedding"] for row in found])


@pytest.mark.thorough
@pytest.mark.parametrize("name", ENCODERS)
def test_llama_cpp_gives_the_golden_vectors(name, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES | GEMMA)
    export(ENCODERS[name](), tmp_path / "gguf")
    golden = json.loads((tmp_path / "gguf" / "golden.json").read_text())
    texts, expected = golden["texts"], torch.tensor(golden["embeddings"])
    near = torch.cosine_similarity(expected[:, None], expected[None], dim=-1)
    assert near.fill_diagonal_(0).min() < 0.95, "vacuous: all embeddings alike"
    assert len(texts) >= 6
    assert "" in texts
    assert any(text.startswith(PROMPTS["query"]) for text in texts)
    with served(tmp_path / "gguf") as address:
        found = embeddings(address, [text + golden["suffix"] for text in texts])
        assert torch.cosine_similarity(found, expected).min() > 0.999
        if golden["suffix"]:
            bare = embeddings(address, texts)
            assert torch.cosine_similarity(bare, expected).min() < 0.99, "the suffix does nothing"
    assert bool(golden["suffix"]) == (name == "llama, nested")


def test_its_golden_vectors_are_the_stock_folders(tmp_path):
    """And the file alone changes with the dtype."""
    model = as_sentence_transformer(make_nested(), LIMIT, prompts=PROMPTS)
    llm2comp.export(model, tmp_path / "stock")
    sizes = []
    for dtype in ("float32", "bfloat16", None):
        llm2comp.export(model, tmp_path / "gguf", engine="llama.cpp", dtype=dtype)
        sizes.append((tmp_path / "gguf" / "model.gguf").stat().st_size)
    assert sizes[0] > sizes[1] == sizes[2]
    golden = json.loads((tmp_path / "gguf" / "golden.json").read_text())
    stock = SentenceTransformer(str(tmp_path / "stock"), device="cpu")
    found = torch.tensor(golden["embeddings"])
    assert torch.allclose(stock.encode(golden["texts"], convert_to_tensor=True), found, atol=1e-5)
    names = {file.name for file in (tmp_path / "gguf").iterdir()}
    assert names == {"model.gguf", "golden.json", "README.md", ".llm2comp.json"}
    card = (tmp_path / "gguf" / "README.md").read_text()
    assert f"--pooling last -c {stock.max_seq_length}" in card
    assert golden["suffix"] in card
    assert "`find: `" in card


def test_its_server_is_certified(tmp_path):
    """By the golden vectors, with the memory tokens behind each text; another model is not."""
    for name, made in {"own": make_nested, "other": lambda: make_nested(nested=(1,))}.items():
        compressor = made()
        if name == "other":
            compressor.memory.vectors_KD.data += 1.0
        export(compressor, tmp_path / name)
    with served(tmp_path / "own") as address:
        found = llm2comp.verify_url(tmp_path / "own", address)
        assert found.sound
        assert found.lowest > 0.999
        assert "golden texts" in found.told()
        other = llm2comp.verify_url(tmp_path / "other", address)
        assert other.causes == ["none of the known causes"]
        assert cli("verify", tmp_path / "own", "--url", address).code == 0
    (tmp_path / "own" / "golden.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="no answer|cannot be read"):
        llm2comp.verify_url(tmp_path / "own", address)


def test_who_must_compose_texts_is_told(tmp_path, capsys):
    """The tokenizer of Qwen composes letters with their accents, llama.cpp does not."""
    told = {}
    for name in ("llama", "qwen2"):
        export(ENCODERS[name](), tmp_path / name)
        told[name] = "Send texts in NFC" in (tmp_path / name / "README.md").read_text()
        assert ("model.gguf: send texts in NFC" in capsys.readouterr().err) == told[name]
        texts = json.loads((tmp_path / name / "golden.json").read_text())["texts"]
        composed = all(unicodedata.is_normalized("NFC", text) for text in texts)
        assert composed == told[name]
        assert len(set(texts)) == len(texts)
    assert told == {"llama": False, "qwen2": True}
    forms = [unicodedata.normalize(form, "Müll für Köche") for form in ("NFC", "NFD")]
    own = as_sentence_transformer(ENCODERS["qwen2"](), LIMIT).encode(forms, convert_to_tensor=True)
    with served(tmp_path / "qwen2") as address:
        composed, decomposed = torch.cosine_similarity(embeddings(address, forms), own).tolist()
    assert composed > 0.999
    assert decomposed < 0.99, "llama.cpp composes now: no need to tell"


UNFIT = {
    "a weighted mean of 3 states": (make_compressor, {}),
    "the family 'phi3'": (lambda: make_compressor("phi3", memory=1), {}),
    "a window of 8 positions": (lambda: make_compressor("gemma3", memory=1), {}),
    "no memory token": (
        lambda: make_compressor("qwen3", encoder=EncoderSettings(pooling="mean")),
        {},
    ),
    "a projection": (
        lambda: make_compressor(memory=1, encoder=EncoderSettings(projection=16)),
        {},
    ),
    "for export": (lambda: make_compressor(memory=1), {"multi_vector": True}),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_what_it_cannot_compute_is_refused(reason, tmp_path):
    made, settings = UNFIT[reason]
    with pytest.raises(ModelFolderError) as caught:
        export(made(), tmp_path / "gguf", **settings)
    assert reason in str(caught.value) or "reads one vector a text" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused(tmp_path):
    compressor = make_compressor(memory=1)
    backend = compressor.backbone.tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ModelFolderError, match="parts texts before BPE"):
        export(compressor, tmp_path / "gguf")
    with pytest.raises(ModelFolderError, match="puts a space before texts in another way"):
        export(make_compressor(memory=1, own=True), tmp_path / "gguf")
    assert not list(tmp_path.iterdir())


def test_verify_says_who_can_check_it(tmp_path):
    export(make_compressor(memory=1), tmp_path / "gguf")
    assert_refused(cli("verify", tmp_path / "gguf"), "is for llama.cpp, which alone can run it")
    export(make_nested(), tmp_path / "gguf")  # its own place


def test_command_line(tmp_path):
    said = cli("export", tmp_path / "x", "--for", "llama.cpp", "-m", "builtin:general-tiny")
    assert_refused(said, "cannot be computed exactly by llama.cpp", "a weighted mean of")
    for other, told in (("--multi-vector", "keeps every"), ("--openvino", "adds a graph")):
        value = ["int8"] * (other == "--openvino")
        assert_refused(cli("export", tmp_path / "x", "--for", "tei", other, *value), told)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_packaged_encoder_in_llama_cpp(smollm2, tmp_path):
    assert cli("export", tmp_path / "gguf", "--for", "llama.cpp", "-m", GENERAL).code == 0
    golden = json.loads((tmp_path / "gguf" / "golden.json").read_text())
    own = llm2comp.load(GENERAL, "cpu", num_memory=1, dtype="float32")
    expected = own.encode(golden["texts"], convert_to_tensor=True)
    assert torch.allclose(expected, torch.tensor(golden["embeddings"]), atol=1e-3)
    with served(tmp_path / "gguf") as address:
        found = embeddings(address, [text + golden["suffix"] for text in golden["texts"]])
    assert torch.cosine_similarity(found, expected).min() > 0.999
