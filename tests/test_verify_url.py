"""`verify --url`: servers that are right, and servers that are wrong in one way each."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

import llm2comp
from families import make_compressor
from llm2comp.errors import ModelFolderError
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.storage.golden import load_folder
from llm2comp.storage.probes import probes
from serving import serving as serve_model
from test_nested import make_nested
from tiny_run import assert_refused, cli

PROMPTS = {"query": "find the text: ", "document": ""}
LIMIT = 100
MODELS = {
    "weighed": lambda: make_compressor(),  # noqa: PLW0108
    "last": lambda: make_nested(nested=(1,)),
    "causal": lambda: make_compressor(memory=1, attention="causal"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for name, made in MODELS.items():
        llm2comp.export(as_sentence_transformer(made(), LIMIT, prompts=PROMPTS), root / name)
    return root


class Server:
    """Both protocols over a function (texts, role) → rows, in a thread.

    `page`: an HTML page at every other place, also where models are listed. `broken`: answers end
    before their length.
    """

    def __init__(
        self, encode, paths=("/v1/embeddings", "/embed"), key=None, page=None, broken=False
    ):
        self.asked, outer = [], self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(200, page or {"data": [{"id": "the-model"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body))
                if key and self.headers.get("Authorization") != f"Bearer {key}":
                    return self.reply(401, {"error": "who are you?"})
                if self.path not in paths and page:
                    return self.reply(200, page)
                if self.path not in paths:
                    return self.reply(404, {"error": "nothing here"})
                openai = self.path == "/v1/embeddings"
                texts = body["input" if openai else "inputs"]
                role = body.get("input_type" if openai else "prompt_name")
                try:
                    rows = encode(texts, role)
                except ValueError as error:
                    return self.reply(422, {"error": str(error)})
                data = [{"index": i, "embedding": row} for i, row in enumerate(rows)]
                return self.reply(200, {"data": data[::-1]} if openai else rows)

            def reply(self, status, content):
                text = (content if content == page else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text) + broken))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


@contextlib.contextmanager
def serving(encode, **settings):
    server = Server(encode, **settings)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()


def right(folder, change=None):
    """What a server of a folder does; `change` may spoil the model."""
    model = SentenceTransformer(str(folder), device="cpu")
    model = (change(model) if change else None) or model

    def encode(texts, role):
        prompt = model.prompts.get(role or "") or ""
        return model.encode(texts, prompt=prompt).tolist()

    return encode


def certificate(folder, encode, **settings):
    with serving(encode) as server:
        return llm2comp.verify_url(folder, server.url, **settings)


@pytest.mark.parametrize(
    ("name", "path"),
    [("weighed", "/v1/embeddings"), ("last", "/embed"), ("causal", "/v1/embeddings")],
)
def test_a_right_server(folders, name, path):
    with serving(right(folders / name), paths=(path,)) as server:
        found = llm2comp.verify_url(folders / name, server.url)
        assert found.sound
        assert found.lowest > 0.99999
        assert found.causes == []
        assert [row.case for row in found.rows] == [
            *("short", "Unicode", "decomposed", "special tokens", "long", "empty", "query")
        ]
        sent = [body for at, body in server.asked if at == path]
        texts = {text for body in sent for text in body.get("input") or body.get("inputs")}
        assert {probe.text for probe in probes(PROMPTS)} <= texts
        assert any("query" in (body.get("input_type"), body.get("prompt_name")) for body in sent)
        full = llm2comp.verify_url(folders / name, server.url + path)
    assert full.lowest == found.lowest
    assert "not normalised" in found.lengths


def normalised(folder):
    encode = right(folder)
    return lambda texts, role: torch.nn.functional.normalize(
        torch.tensor(encode(texts, role)), dim=1
    ).tolist()


def test_lengths_of_one_are_sound_and_other_lengths_are_told(folders):
    found = certificate(folders / "last", normalised(folders / "last"))
    assert found.sound
    assert found.lengths == "lengths: 1 (normalised)"
    unit = normalised(folders / "last")
    scaled = certificate(folders / "last", lambda *a: (7 * torch.tensor(unit(*a))).tolist())
    assert not scaled.sound
    assert scaled.lowest > 0.99999
    assert "another normalisation" in scaled.lengths
    assert scaled.lengths in scaled.causes


def only_pooling(mode):
    def change(model):
        width = model[0].auto_model.config.hidden_size
        return SentenceTransformer(
            modules=[model[0], Pooling(width, mode)], prompts=model.prompts, device="cpu"
        )

    return change


def causal(model):
    model[0].auto_model.config.is_causal = True
    model[0].auto_model.config.use_bidirectional_attention = False


def both_ways(model):
    model[0].auto_model.config.is_causal = False


def cut(model):
    model.max_seq_length = 64


def forgetful(folder):
    encode = right(folder)
    return lambda texts, role: encode(texts, None)


def always_asking(folder):
    encode = right(folder)
    return lambda texts, role: encode(texts, "query")


def mixed_up(folder):
    encode = right(folder)
    return lambda texts, role: encode(texts, role)[::-1]


def shorter(folder):
    encode = right(folder)
    return lambda texts, role: [row[:16] for row in encode(texts, role)]


# name → folder, server, cases that it gets wrong, words of the cause
WRONG = {
    "no prompt": ("weighed", forgetful, {"query"}, "no prompt"),
    "always a prompt": ("last", always_asking, None, "the query's prompt before every text"),
    "mean instead of memory": (
        "weighed",
        lambda folder: right(folder, only_pooling("mean")),
        None,
        "the mean of all tokens, where the memory tokens' are meant",
    ),
    "mean instead of last": (
        "last",
        lambda folder: right(folder, only_pooling("mean")),
        None,
        "the mean of all tokens",
    ),
    "last instead of mean": (
        "weighed",
        lambda folder: right(folder, only_pooling("lasttoken")),
        None,
        "the last token's state alone",
    ),
    "causal": ("weighed", lambda folder: right(folder, causal), None, "causal attention"),
    "both ways": (
        "causal",
        lambda folder: right(folder, both_ways),
        None,
        "attention both ways, of a causal encoder",
    ),
    "truncation": ("last", lambda folder: right(folder, cut), None, "cut at 64 tokens"),
    "order": ("last", mixed_up, None, "another order"),
    "dimensions": ("last", shorter, None, "16 dimensions, where the folder has 32"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", WRONG)
def test_what_a_wrong_server_does_is_named(folders, name):
    folder, made, cases, cause = WRONG[name]
    found = certificate(folders / folder, made(folders / folder))
    assert not found.sound
    wrong = {row.case: row.note for row in found.rows if row.lowest < 0.999}
    assert wrong
    assert cases is None or set(wrong) == cases
    assert all(cause in note for note in wrong.values()), wrong
    assert all(row.note == "" for row in found.rows if row.case not in wrong)
    assert cause in found.told()


def test_two_faults_at_once(folders):
    encode = right(folders / "weighed", only_pooling("mean"))
    found = certificate(folders / "weighed", lambda texts, role: encode(texts, None))
    notes = {row.case: row.note for row in found.rows}
    assert notes["query"].startswith("no prompt, and the mean of all tokens")
    assert notes["short"].startswith("the mean of all tokens")


def test_memory_weighed_otherwise(folders):
    """As `llm2comp.load` reads the encoder whose folder has its last state alone."""
    live = as_sentence_transformer(MODELS["last"](), LIMIT, prompts=PROMPTS)
    encode = lambda texts, role: live.encode(  # noqa: E731
        texts, prompt=PROMPTS.get(role or "", "")
    ).tolist()
    found = certificate(folders / "last", encode)
    assert {row.note for row in found.rows} == {
        "the mean of all 4 memory states, other weights than the folder's"
    }


def test_noise_has_no_known_cause(folders):
    encode = right(folders / "last")
    noise = torch.Generator().manual_seed(0)
    found = certificate(
        folders / "last",
        lambda *a: [torch.randn(len(row), generator=noise).tolist() for row in encode(*a)],
    )
    assert not found.sound
    assert {row.note for row in found.rows} == {"none of the known causes"}


def test_prompts_by_the_client(folders):
    """A server that knows no roles is right, if its clients put the prompts before the texts."""
    encode = right(folders / "last")
    served = lambda texts, role: encode(texts, None)  # noqa: E731
    assert not certificate(folders / "last", served).sound
    assert certificate(folders / "last", served, prompts="client").sound


def test_refusals_are_told_and_are_no_wrong_vectors(folders):
    encode = right(folders / "last")

    def picky(texts, role):
        if not all(texts):
            raise ValueError("empty input")
        return encode(texts, role)

    found = certificate(folders / "last", picky)
    assert found.sound
    assert [row.case for row in found.rows if row.lowest is None] == ["empty"]
    assert 'HTTP 422: {"error": "empty input"}' in found.told()


def test_a_key_and_a_name(folders):
    with serving(right(folders / "last"), key="secret") as server:
        with pytest.raises(ModelFolderError, match="gives no embeddings") as caught:
            llm2comp.verify_url(folders / "last", server.url)
        assert "HTTP 401" in str(caught.value)
        found = llm2comp.verify_url(folders / "last", server.url + "/v1", key="secret")
        assert found.sound
        assert server.asked[-1][1]["model"] == "the-model"
        assert "secret" not in found.told()
        found = llm2comp.verify_url(folders / "last", server.url, model="mine", key="secret")
        assert server.asked[-1][1]["model"] == "mine"


def test_pages_where_json_is_asked_for(folders):
    """As a proxy or a single-page app answers whatever it does not know."""
    page = "<!doctype html>\n<title>welcome</title>"
    for path in ("/v1/embeddings", "/embed"):
        with serving(right(folders / "last"), paths=(path,), page=page) as server:
            assert llm2comp.verify_url(folders / "last", server.url).sound
    with serving(None, paths=(), page=page) as server:
        said = cli("verify", folders / "last", "--url", server.url)
        assert_refused(said, "gives no embeddings", "/embed: HTTP 200: no JSON: <!doctype html>")
        said = cli("search", "a", "--url", server.url)
        assert_refused(said, "refuses: HTTP 200: no JSON: <!doctype html>")


@pytest.mark.parametrize("paths", [("/v1/embeddings", "/embed"), ()], ids=["200", "404"])
def test_an_answer_that_breaks_off(folders, paths):
    with serving(right(folders / "last"), paths=paths, broken=True) as server:
        said = cli("verify", folders / "last", "--url", server.url, "--model-name", "x")
    assert_refused(said, "no answer", "IncompleteRead")


@pytest.mark.parametrize("rows", [[["a"]], [], [[1.0], [1.0, 2.0]], [[None]]], ids=str)
def test_answers_that_are_no_embeddings(folders, rows):
    with pytest.raises(ModelFolderError, match="does not answer with embeddings|gives no emb"):
        certificate(folders / "last", lambda *_: rows)


def test_command_line(folders, tmp_path):
    folder = folders / "weighed"
    with serving(right(folder)) as server:
        said = cli("verify", folder, "--url", server.url)
        assert said.code == 0, said.err
        assert f"{server.url}/v1/embeddings (OpenAI) against {folder}" in said.out
        assert said.out.count("cosine ≥ 1.000000") + said.out.count("cosine ≥ 0.99999") == 7
        assert "gives the folder's embeddings" in said.err
    with serving(right(folder, only_pooling("mean"))) as server:
        said = cli("verify", folder, "--url", server.url)
    assert said.code == 1
    assert "cosine" in said.out, "the certificate, all the same"
    for told in ("other embeddings than the folder's", "likely cause: the mean of all tokens"):
        assert told in said.err
    assert "Traceback" not in said.err
    for url, told in (
        ("127.0.0.1:1", "not an address"),
        ("ftp://x", "not an address"),
        ("http://[::1", "not an address"),
        ("http://127.0.0.1:80a", "not an address"),
        ("http://127.0.0.1:1", "no answer"),
    ):
        assert_refused(cli("verify", folder, "--url", url), told)
    assert_refused(cli("verify", folder, "--model-name", "x"), "belongs to --url")
    assert_refused(cli("verify", tmp_path / "no", "--url", "http://127.0.0.1:1"), "no such folder")


def test_our_own_server_gives_the_folders_vectors(folders):
    """Not of the live encoder behind it, which weighs all of its memory states."""
    with serve_model(load_folder(folders / "last", "cpu"), str(folders / "last")) as ours:
        for path in ("", "/v1", "/embed"):
            found = llm2comp.verify_url(folders / "last", ours.url + path)
            assert found.sound
            assert found.lowest > 0.99999
            assert [row.lowest is None for row in found.rows] == [False] * len(found.rows)
    live = as_sentence_transformer(MODELS["last"](), LIMIT, prompts=PROMPTS)
    with serve_model(live, str(folders / "last")) as ours:
        found = llm2comp.verify_url(folders / "last", ours.url)
    assert found.causes == ["the mean of all 4 memory states, other weights than the folder's"]
