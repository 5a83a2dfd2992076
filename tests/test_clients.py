"""Clients over an exported folder: each with the line of docs/clients.md asks as `encode_query`."""

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import llm2comp
from families import make_compressor
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.storage.clients import client_lines

PROMPTS = {"query": "find the text: ", "document": "text: "}
QUERY, TEXTS = "which memory keeps it?", ["one vector", "Compression keeps what matters."]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "clients.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("clients") / "model"
    llm2comp.export(as_sentence_transformer(make_compressor(memory=1), 60, prompts=PROMPTS), place)
    return str(place)


@pytest.fixture(scope="module")
def expected(folder):
    model = SentenceTransformer(folder, device="cpu")
    query, texts = model.encode_query(QUERY), model.encode_document(TEXTS)
    assert np.abs(query - model.encode(QUERY)).max() > 0.01, "vacuous: the prompt does nothing"
    assert np.abs(texts - model.encode(TEXTS)).max() > 0.01
    return query, texts


def unit(vectors):
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def equal(found, expected):
    """Some clients normalise."""
    for mine, theirs in zip(found, expected, strict=True):
        assert np.abs(unit(mine) - unit(theirs)).max() < 1e-5


def made(name, folder, **names):
    """The names that a client's lines, run as the card and the page have them, bind."""
    exec(client_lines(folder, PROMPTS)[name], names)  # noqa: S102
    return names


def test_langchain(folder, expected):
    pytest.importorskip("langchain_huggingface", reason="pip install '.[clients]'")
    client = made("LangChain", folder)["embeddings"]
    equal((client.embed_query(QUERY), client.embed_documents(TEXTS)), expected)


def test_llama_index(folder, expected):
    pytest.importorskip("llama_index.embeddings.huggingface", reason="pip install '.[clients]'")
    client = made("LlamaIndex", folder)["embeddings"]
    texts = client.get_text_embedding_batch(TEXTS)
    equal((client.get_query_embedding(QUERY), texts), expected)


def test_haystack(folder, expected):
    name = "haystack_integrations.components.embedders.sentence_transformers"
    pytest.importorskip(name, reason="pip install sentence-transformers-haystack")
    from haystack import Document

    client = made("Haystack", folder)
    query, texts = client["queries"], client["texts"]
    query.warm_up()
    texts.warm_up()
    found = texts.run([Document(content=text) for text in TEXTS])["documents"]
    equal((query.run(QUERY)["embedding"], [document.embedding for document in found]), expected)


def test_chroma(folder, expected):
    chromadb = pytest.importorskip("chromadb", reason="pip install chromadb")
    model = SentenceTransformer(folder, device="cpu")
    collection = chromadb.EphemeralClient().create_collection("texts")
    texts = model.encode_document(TEXTS)
    collection.add(ids=["0", "1"], embeddings=texts.tolist())
    asked = {}

    class Spy:
        def query(self, query_embeddings):
            asked["query"] = query_embeddings[0]
            return collection.query(query_embeddings=query_embeddings)

    made("Chroma", folder, collection=Spy(), question=QUERY)
    equal((asked["query"], texts), expected)


@pytest.mark.parametrize("prompts", [PROMPTS, {"query": "find: ", "document": ""}])
def test_the_card_has_the_lines(prompts, tmp_path):
    model = as_sentence_transformer(make_compressor(memory=1), 60, prompts=prompts)
    llm2comp.export(model, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    lines = client_lines("path/to/this/folder", prompts)
    assert len(lines) == 4
    assert all(line in card for code in lines.values() for line in code.splitlines())
    assert ("text_instruction" in card) == bool(prompts["document"])


def test_without_prompts_no_line_is_needed(tmp_path):
    assert client_lines("x", {}) == client_lines("x", {"query": "", "document": None}) == {}
    llm2comp.export(as_sentence_transformer(make_compressor(memory=1), 60), tmp_path / "model")
    assert "LangChain" not in (tmp_path / "model" / "README.md").read_text()


def test_the_page_has_the_lines():
    page = PAGE.read_text()
    for code in client_lines("OUT", {"query": "PROMPT"}).values():
        assert code in page
