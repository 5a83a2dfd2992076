"""What a server answers: the model's own vectors, in both protocols, and errors in their shapes."""

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

import llm2comp
from families import make_compressor, make_tokenizer
from llm2comp.errors import RunError
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.vectors import memory_vectors
from llm2comp.storage.export import export
from llm2comp.storage.golden import load_folder
from llm2comp.use.serve import app
from llm2comp.use.serve.settings import Keys, listen
from serving import TINY, serving
from tiny_run import assert_refused, cli, sentences

LIMIT = 30
PROMPT = "find the text:"
TEXTS = [
    "one vector",
    "",
    " the fox ",
    "Ünicode 記憶 🧠\nsecond line",
    "[INST] no {markup} </s> <s> [/INST]",
    " ".join(sentences(20)),
    *sentences(20, words=5),
]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def expected(model, texts, role=None):
    """Each text through the model alone."""
    found = [model.encode_query([t]) if role == "query" else model.encode([t]) for t in texts]
    return np.concatenate(found)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A live encoder and its exported folder."""
    prompts = {"query": PROMPT, "document": ""}
    live = as_sentence_transformer(make_compressor("llama"), LIMIT, prompts=prompts)
    folder = tmp_path_factory.mktemp("served") / "model"
    export(live, folder)
    return live, folder


@pytest.fixture(scope="module", params=["live", "exported"])
def served(request, pair):
    live, folder = pair
    model = live if request.param == "live" else load_folder(folder, "cpu")
    with serving(model, str(folder), name="tiny", budget=200, max_texts=64) as found:
        yield found


def model_of(served):
    return served.server.engine.model


def of_openai(answer):
    assert answer.status_code == 200, answer.text
    assert [item["index"] for item in answer.json()["data"]] == list(
        range(len(answer.json()["data"]))
    )
    return np.array([item["embedding"] for item in answer.json()["data"]], dtype=np.float32)


# ---- vectors


def test_openai_gives_the_models_own_vectors(served):
    answer = served.embeddings(TEXTS)
    plain = expected(model_of(served), TEXTS)
    np.testing.assert_allclose(of_openai(answer), unit(plain), atol=2e-6)
    assert answer.json()["model"] == "tiny"
    assert answer.json()["object"] == "list"
    raw = served.embeddings(TEXTS, normalize=False)
    np.testing.assert_allclose(of_openai(raw), plain, atol=2e-6)
    one = served.embeddings(TEXTS[3], encoding_format="float", dimensions=None, user="me")
    np.testing.assert_allclose(of_openai(one), unit(plain[3:4]), atol=2e-6)


def test_base64_is_the_same_bytes(served):
    coded = served.embeddings(TEXTS[:3], encoding_format="base64").json()["data"]
    rows = [np.frombuffer(base64.b64decode(item["embedding"]), dtype="<f4") for item in coded]
    np.testing.assert_array_equal(rows, of_openai(served.embeddings(TEXTS[:3])))


def test_prompts_of_queries(served):
    query = expected(model_of(served), TEXTS, "query")
    found = of_openai(served.embeddings(TEXTS, input_type="query"))
    np.testing.assert_allclose(found, unit(query), atol=2e-6)
    same = served.post("/embed", {"inputs": TEXTS, "prompt_name": "query"})
    np.testing.assert_allclose(same.json(), found, atol=2e-6)
    document = of_openai(served.embeddings(TEXTS, input_type="document"))
    np.testing.assert_allclose(document, unit(expected(model_of(served), TEXTS)), atol=2e-6)
    assert np.abs(found - document).max() > 1e-2, "the prompt tells"


def test_dimensions_are_cut_and_scaled(served):
    whole = expected(model_of(served), TEXTS)
    for answer in (
        of_openai(served.embeddings(TEXTS, dimensions=5)),
        np.array(served.post("/embed", {"inputs": TEXTS, "dimensions": 5}).json()),
    ):
        np.testing.assert_allclose(answer, unit(whole[:, :5]), atol=5e-6)


@pytest.mark.parametrize("path", ["/embed", "/"])
def test_tei_gives_the_models_own_vectors(served, path):
    plain = expected(model_of(served), TEXTS)
    np.testing.assert_allclose(served.post(path, {"inputs": TEXTS}).json(), unit(plain), atol=2e-6)
    raw = served.post(path, {"inputs": TEXTS[0], "normalize": False, "truncate": True})
    np.testing.assert_allclose(raw.json(), plain[:1], atol=2e-6)
    long = served.post(path, {"inputs": TEXTS, "truncate": False})
    assert (long.status_code, long.json()["error_type"]) == (413, "Validation")
    short = TEXTS[:3]
    assert served.post(path, {"inputs": short, "truncate": False}).status_code == 200


def test_token_ids_are_those_of_their_text(served):
    model = model_of(served)
    ids = model.tokenizer(TEXTS[6:9], add_special_tokens=False)["input_ids"]
    plain, one = (of_openai(served.embeddings(texts)) for texts in (TEXTS[6:9], TEXTS[6]))
    np.testing.assert_array_equal(of_openai(served.embeddings(ids)), plain)
    np.testing.assert_array_equal(of_openai(served.embeddings(ids[0])), one)
    with_bos = [[model.tokenizer.bos_token_id, *row] for row in ids]
    np.testing.assert_array_equal(of_openai(served.embeddings(with_bos)), plain)
    query = of_openai(served.embeddings(ids, input_type="query"))
    np.testing.assert_array_equal(
        query, of_openai(served.embeddings(TEXTS[6:9], input_type="query"))
    )
    words = model.tokenizer(TEXTS[6], add_special_tokens=False)["input_ids"]
    letters = [
        i for c in TEXTS[6] for i in model.tokenizer(c, add_special_tokens=False)["input_ids"]
    ]
    assert letters != words
    for foreign in (letters, [10**6], [len(model.tokenizer)]):
        refused = served.embeddings(foreign)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "invalid_token_ids"
        assert "check_embedding_ctx_length=False" in refused.json()["error"]["message"]


def test_usage_counts_what_was_read(served):
    tokens = [
        len(row) for row in model_of(served).tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    ]
    room = served.server.engine.limit
    assert max(tokens) > room
    used = served.embeddings(TEXTS).json()["usage"]
    assert used["prompt_tokens"] == used["total_tokens"] == sum(min(n, room) for n in tokens)


def test_texts_of_a_training_free_encoder_are_counted_and_not_cut_silently():
    """It tokenises for itself, each text within a template."""
    path = "echo:builtin:tiny"
    model = llm2comp.load(path, "cpu")
    model.max_seq_length = 30
    with serving(model, path) as served:
        counts = [len(row) for row in model.tokenizer(TEXTS, add_special_tokens=False)["input_ids"]]
        room = served.server.engine.limit
        assert served.client.get("/info").json()["max_input_length"] == room == 29
        fits = [text for text, count in zip(TEXTS, counts, strict=True) if count <= room]
        longer = next(text for text, count in zip(TEXTS, counts, strict=True) if count > room)
        assert len(fits) > 10
        used = served.embeddings(TEXTS).json()["usage"]
        assert used["prompt_tokens"] == sum(min(count, room) for count in counts)
        assert served.post("/embed", {"inputs": fits, "truncate": False}).status_code == 200
        found = np.array(served.post("/embed", {"inputs": [longer]}).json())
        np.testing.assert_allclose(found, unit(model.encode([longer])), atol=2e-6)
        refused = served.post("/embed", {"inputs": [longer], "truncate": False})
        assert (refused.status_code, "more than 29 tokens" in refused.text) == (413, True)
        asked = {"query": "a fox", "texts": [longer], "truncate": False}
        assert served.post("/rerank", asked).status_code == 413


def test_a_refusal_names_the_limit_of_the_role():
    live = as_sentence_transformer(make_compressor("llama"), LIMIT, {"query": 12}, {"query": "q: "})
    with serving(live, "runs/x/3-scl") as served:
        asked = {"inputs": "a fox " * 20, "truncate": False}
        room = served.server.engine.limit
        assert f"more than {room} tokens" in served.post("/embed", asked).text
        refused = served.post("/embed", asked | {"prompt_name": "query"})
        assert f"more than {room - LIMIT + 12} tokens" in refused.text


@pytest.mark.parametrize(("limit", "status"), [(None, 200), (20, 422)])
def test_a_model_whose_tokens_are_not_known_does_not_promise_to_cut_none(
    limit, status, monkeypatch
):
    """One of static word vectors has no tokenizer of transformers."""
    module = StaticEmbedding(make_tokenizer(), embedding_dim=8)
    model = SentenceTransformer(modules=[module], device="cpu")
    if limit:
        monkeypatch.setattr(StaticEmbedding, "max_seq_length", limit)
    with serving(model, "owner/static") as served:
        assert served.client.get("/info").status_code == 200
        assert served.post("/embed", {"inputs": TEXTS[0]}).status_code == 200
        answer = served.post("/embed", {"inputs": TEXTS[0], "truncate": False})
        assert answer.status_code == status
        assert ("cannot be counted" in answer.text) == (status == 422)


def test_memory_states_are_the_models_own(served, pair):
    engine = served.server.engine
    assert engine.states == 3
    found = torch.cat([engine.compute([text]) for text in engine.read(TEXTS, None, "")])
    together = engine.compute(engine.read(TEXTS, None, ""))
    torch.testing.assert_close(together, found, atol=2e-5, rtol=1e-4)
    states = torch.nn.functional.normalize(found[:, 1:], dim=-1)
    torch.testing.assert_close(states, memory_vectors(pair[0], TEXTS), atol=2e-5, rtol=1e-4)


def test_rerank_is_maxsim_over_memory_states(served, pair):
    query, texts = "vector", TEXTS[:8]
    asked = {"query": query, "texts": texts, "return_text": True}
    found = served.post("/rerank", asked).json()
    states = memory_vectors(pair[0], [query], "query"), memory_vectors(pair[0], texts, "document")
    scores = llm2comp.maxsim(*states)[0] / 3
    assert [rank["index"] for rank in found] == scores.argsort(descending=True).tolist()
    for rank in found:
        assert rank["score"] == pytest.approx(float(scores[rank["index"]]), abs=1e-5)
        assert rank["text"] == texts[rank["index"]]
    raw = served.post("/rerank", {"query": query, "texts": texts, "raw_scores": True}).json()
    assert raw[0] == {"index": found[0]["index"], "score": pytest.approx(found[0]["score"] * 3)}
    assert len({round(rank["score"], 4) for rank in raw}) > 5
    refused = served.post("/rerank", {"query": query, "texts": []})
    assert (refused.status_code, "texts" in refused.json()["error"]) == (422, True)
    long = served.post("/rerank", {"query": query, "texts": [TEXTS[5]], "truncate": False})
    assert long.status_code == 413


# ---- what else is told


def test_metrics_count_what_was_done():
    with serving() as served:
        served.embeddings(["one", "two words"])
        served.post("/embed", {"inputs": "a " * 600})
        served.client.get("/nothing")
        answer = served.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert found["llm2comp_requests_total", "/v1/embeddings", "200"] == 1
    assert found["llm2comp_requests_total", "other", "404"] == 1
    assert found["llm2comp_request_seconds_count", "/embed"] == 1
    assert found["llm2comp_texts_total",] == 3
    assert found["llm2comp_texts_cut_total",] == 1
    assert found["llm2comp_tokens_total",] > 503
    assert found["llm2comp_batch_texts_sum",] == 3
    assert found["llm2comp_model_seconds_total",] > 0
    assert found["llm2comp_waiting_tokens",] == 0


def test_models_and_info(served):
    (model,) = served.client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert served.client.get("/v1/models/tiny").json() == model
    assert served.client.get("/v1/models/huge").json()["error"]["code"] == "model_not_found"
    info = served.client.get("/info").json()
    assert (info["model_id"], info["max_client_batch_size"]) == ("tiny", 64)
    assert info["prompts"] == {"query": PROMPT}
    assert (info["memory_tokens"], info["model_dtype"], info["backend"]) == (3, "float32", "torch")
    assert served.client.get("/health").json() == served.client.get("/ready").json()


# ---- bad requests: the status, and the field or words that are told

INVALID = {
    "empty-list": ({"input": []}, "input"),
    "empty-ids": ({"input": [[]]}, "input"),
    "mixed": ({"input": ["a", 1]}, "input"),
    "number": ({"input": 1}, "input"),
    "null": ({"input": None}, "input"),
    "negative-id": ({"input": [-1]}, "input"),
    "dimensions-0": ({"dimensions": 0}, "dimensions"),
    "dimensions-many": ({"dimensions": 10**9}, "dimensions"),
    "dimensions-words": ({"dimensions": "5"}, "dimensions"),
    "normalize": ({"normalize": "yes"}, "normalize"),
}


@pytest.mark.parametrize("case", INVALID)
def test_fields_that_are_wrong(served, case):
    fields, field = INVALID[case]
    openai = served.post("/v1/embeddings", {"input": "a", "model": "tiny"} | fields)
    assert openai.status_code == 400, openai.text
    assert openai.json()["error"]["type"] == "invalid_request_error"
    assert openai.json()["error"]["param"] == field
    of_tei = {{"input": "inputs"}.get(name, name): value for name, value in fields.items()}
    tei = served.post("/embed", {"inputs": "a"} | of_tei)
    assert (tei.status_code, tei.json()["error_type"]) == (422, "Validation")
    assert field in tei.json()["error"]


BODIES = {
    "not-json": b"{",
    "nan": b'{"input": "a", "inputs": "a", "model": "tiny", "dimensions": NaN}',
    "infinity": b'{"input": "a", "inputs": "a", "model": "tiny", "dimensions": -Infinity}',
    "utf-8": b'{"input": "\xff", "inputs": "\xff", "model": "tiny"}',
    "surrogate": b'{"input": "\\ud800", "inputs": "\\ud800", "model": "tiny"}',
    "deep": b"[" * 100_000,
    "nothing": b"",
    "a-list": b"[]",
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_wrong(served, case):
    headers = {"content-type": "application/json"}
    send = {"content": BODIES[case], "headers": headers}
    openai, tei = served.client.post("/v1/embeddings", **send), served.client.post("/embed", **send)
    assert (openai.status_code, tei.status_code) == (400, 422), openai.text
    assert openai.json()["error"]["message"]
    assert tei.json()["error"]
    assert of_openai(served.embeddings("still here")).shape[0] == 1


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "text-embedding-3-small"}, 404, "model_not_found"),
        ({"input": ["a"] * 65}, 413, "too_many_texts"),
    ],
)
def test_what_there_is_not(served, fields, status, code):
    answer = served.post("/v1/embeddings", {"input": "a", "model": "tiny"} | fields)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_paths_methods_and_prompts_that_there_are_not(served):
    assert served.client.get("/v1/chat").json()["error"]["message"] == "Not Found"
    assert served.client.get("/nothing").status_code == 404
    wrong = served.client.get("/embed")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    prompt = served.post("/embed", {"inputs": "a", "prompt_name": "poem"})
    assert (prompt.status_code, "query" in prompt.json()["error"]) == (422, True)


def test_a_text_of_a_megabyte_is_cut(served):
    long = "memory " * 150_000
    found = of_openai(served.embeddings([long, "short"]))
    np.testing.assert_allclose(
        found, unit(expected(model_of(served), [long[:1000], "short"])), atol=2e-6
    )


def test_openapi_tells_what_is_answered(served):
    document = served.client.get("/openapi.json").json()
    routes = document["paths"]
    openai, tei = (routes[p]["post"]["responses"].keys() for p in ("/v1/embeddings", "/embed"))
    both = {"200", "401", "408", "413", "424", "429", "500", "503", "504"}
    header = routes["/rerank"]["post"]["responses"]["429"]["headers"]
    assert header["Retry-After"]["schema"] == {"type": "integer", "minimum": 1}
    assert (openai, tei) == (both | {"400", "404"}, both | {"422"})
    assert "HTTPValidationError" not in document["components"]["schemas"]
    ids = [m["operationId"] for methods in routes.values() for m in methods.values()]
    assert len(set(ids)) == len(ids) >= 8


# ---- keys


@pytest.mark.parametrize("text", ["first-secret\n", "# ours\nfirst-secret\n"])
def test_keys_behind_a_byte_order_mark(tmp_path, text):
    (tmp_path / "keys").write_text(text, encoding="utf-8-sig")
    assert Keys.read(tmp_path / "keys", None) == Keys.of(["first-secret"])


def test_keys(tmp_path):
    (tmp_path / "keys").write_text("# ours\nfirst-secret\n\nsecond-secret\n")
    keys = Keys.read(tmp_path / "keys", "third-secret")
    assert "secret" not in repr(keys)
    with serving(keys=keys) as served:
        body = {"input": "a", "model": TINY}
        for good in ("first-secret", "second-secret", "third-secret"):
            answer = served.post("/v1/embeddings", body, authorization=f"Bearer {good}")
            assert answer.status_code == 200
        for bad in ("Bearer", "Bearer first-secre", "Basic first-secret", "Bearer # ours", "é"):
            answer = served.client.post(
                "/v1/embeddings", json=body, headers=[(b"authorization", bad.encode("latin-1"))]
            )
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/info", "/openapi.json", "/nothing"):
            assert served.client.get(path).status_code == 401, path
        for path in ("/health", "/ready"):
            assert served.client.get(path).status_code == 200, path
        big = served.client.post("/embed", content=b"x" * 2**21)
        assert big.status_code == 401, "told before the body is read"


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [("# none\n", None, "holds no key"), ("short\n", None, "too short"), ("", "", "too short")],
)
def test_keys_that_are_none(tmp_path, text, key, says):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(RunError, match=says):
        Keys.read(None if key == "" else tmp_path / "keys", key)
    with pytest.raises(RunError, match="cannot be read"):
        Keys.read(tmp_path / "nowhere", None)


# ---- the command


def test_an_address_that_is_taken():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(cli("serve", "--port", port), "cannot listen there", f"127.0.0.1:{port}")
    assert_refused(cli("serve", "--host", "no.such.host.invalid"), "cannot listen there")


def test_without_the_extra_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert_refused(cli("serve", "--port", "0"), "fastapi is not installed", "[serve]")


@pytest.mark.thorough
def test_the_command_starts_answers_and_drains(tmp_path):
    environment = os.environ | {"LLM2COMP_API_KEY": "a-secret-key"}
    command = [sys.executable, "-m", "llm2comp", "serve", TINY, "--port", "0"]
    command += ["--host", "0.0.0.0", "--max-tokens-per-batch", "64"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        line = process.stderr.readline()
        assert f"{TINY}, 256 dimensions; Ctrl-C ends" in line
        port = re.search(r":(\d+):", line)[1]
        url, headers = f"http://127.0.0.1:{port}", {"authorization": "Bearer a-secret-key"}
        transport = httpx.HTTPTransport(retries=5)
        with httpx.Client(base_url=url, headers=headers, transport=transport) as client:
            assert client.get("/ready").status_code == 200
            if curl := shutil.which("curl"):
                header = f"authorization: {headers['authorization']}"
                asked = [curl, "-sS", f"{url}/v1/models", "-H", header]
                said = subprocess.run(asked, capture_output=True, text=True, check=True)
                assert TINY in said.stdout
            body = {"inputs": [f"{i} {'word ' * 60}" for i in range(100)]}
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(client.post, "/embed", json=body, timeout=60)
                time.sleep(0.2)
                assert not asked.done()
                process.send_signal(signal.SIGTERM)
                answer = asked.result()
            assert (answer.status_code, len(answer.json())) == (200, 100)
            with pytest.raises(httpx.ConnectError):
                httpx.get(url)
        _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert "Traceback" not in said
    assert "secret" not in line + said


def test_ctrl_c_is_how_a_server_ends_and_no_failure(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "configured", lambda _: uvicorn.Config("none:none"))
    monkeypatch.setattr(uvicorn.Server, "run", interrupted)
    with socket.socket() as place:
        app.run(None, place)
