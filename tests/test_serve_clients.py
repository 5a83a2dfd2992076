"""Others' clients, the real ones, against a live server: they get the model's own vectors."""

import json
import shutil
import subprocess
import threading

import numpy as np
import pytest

from families import make_compressor
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.use.serve.settings import Keys
from serving import TINY, serving, tiny

TEXTS = ["one vector", "Ünicode 記憶 🧠", "a text of some more words, for length"]
KEY = "a-secret-key"
EXTRA = "needs the extra clients"


@pytest.fixture(scope="module")
def served():
    with serving(keys=Keys.of([KEY])) as found:
        yield found


@pytest.fixture(scope="module")
def expected():
    return tiny().encode(TEXTS, normalize_embeddings=True)


def same(found, expected):
    np.testing.assert_allclose(np.array(found), expected, atol=2e-6)


def test_openai(served, expected):
    openai = pytest.importorskip("openai", reason=EXTRA)
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)
    for coding in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(model=TINY, input=TEXTS, **coding)
        same([item.embedding for item in answer.data], expected)
        assert answer.usage.prompt_tokens > 10
    short = client.embeddings.create(model=TINY, input=TEXTS[0], dimensions=8)
    assert len(short.data[0].embedding) == 8
    extra = client.embeddings.create(model=TINY, input="a", extra_body={"input_type": "query"})
    assert len(extra.data) == 1
    assert [model.id for model in client.models.list()] == [TINY]
    assert client.models.retrieve(TINY).owned_by == "llm2comp"
    with pytest.raises(openai.NotFoundError, match="builtin:general-tiny"):
        client.embeddings.create(model="text-embedding-3-small", input="a")
    with pytest.raises(openai.BadRequestError, match="another tokenizer"):
        client.embeddings.create(model=TINY, input=[[100_000]])
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="wrong-key").embeddings.create(model=TINY, input="a")


def test_openai_tries_again_when_too_much_waits(served):
    openai = pytest.importorskip("openai", reason=EXTRA)
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)
    batcher = served.server.batcher
    most, batcher.most = batcher.most, 0
    threading.Timer(0.5, lambda: setattr(batcher, "most", most)).start()
    with pytest.raises(openai.RateLimitError) as refused:
        client.embeddings.create(model=TINY, input="a")
    assert refused.value.response.headers["retry-after"] == "1"
    patient = client.with_options(max_retries=2)
    assert patient.embeddings.create(model=TINY, input="a").data, "it waits as it is told"


def test_langchain(served, expected):
    langchain = pytest.importorskip("langchain_openai", reason=EXTRA)
    settings = {"base_url": f"{served.url}/v1", "api_key": KEY, "model": TINY, "max_retries": 0}
    model = langchain.OpenAIEmbeddings(**settings, check_embedding_ctx_length=False)
    same(model.embed_documents(TEXTS), expected)
    same(model.embed_query(TEXTS[0]), expected[0])


def test_llama_index(served, expected):
    module = pytest.importorskip("llama_index.embeddings.openai", reason=EXTRA)
    model = module.OpenAIEmbedding(
        model_name=TINY, api_base=f"{served.url}/v1", api_key=KEY, max_retries=0
    )
    same(model.get_text_embedding_batch(TEXTS), expected)
    same(model.get_query_embedding(TEXTS[1]), expected[1])


def test_hugging_faces_client_of_text_embeddings_inference(served, expected, monkeypatch):
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the tests are; our server is near
    client = InferenceClient(served.url, token=KEY)
    same(client.feature_extraction(TEXTS), expected)
    same(client.feature_extraction(TEXTS[0], normalize=True, truncate=True), expected[:1])


def test_curl(served, expected):
    if not (curl := shutil.which("curl")):
        pytest.skip("no curl")
    body = json.dumps({"model": TINY, "input": TEXTS})
    command = [curl, "-sS", f"{served.url}/v1/embeddings", "-d", body]
    command += ["-H", "content-type: application/json", "-H", f"authorization: Bearer {KEY}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    same([item["embedding"] for item in json.loads(said.stdout)["data"]], expected)


def test_queries_need_their_prompt_said():
    """No client sends `input_type` by itself: what they send is the model's text without a
    prompt.
    """
    openai = pytest.importorskip("openai", reason=EXTRA)
    prompts = {"query": "find the text:", "document": ""}
    model = as_sentence_transformer(make_compressor("llama"), 30, prompts=prompts)
    with serving(model, "mine") as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any")

        def ask(**extra):
            answer = client.embeddings.create(model="mine", input=TEXTS, **extra)
            return [item.embedding for item in answer.data]

        same(ask(), model.encode(TEXTS, normalize_embeddings=True))
        same(
            ask(extra_body={"input_type": "query"}),
            model.encode_query(TEXTS, normalize_embeddings=True),
        )
