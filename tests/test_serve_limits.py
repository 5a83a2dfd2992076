"""What is too much, too slow or gone: told as documented, and never a stuck worker."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from serving import TINY, serving


@pytest.fixture(scope="module")
def served():
    with serving(
        max_body_bytes=5000, deadline_seconds=1.0, max_waiting_tokens=50, budget=16
    ) as found:
        yield found


@contextlib.contextmanager
def held(served):
    """The model computes nothing until the block ends."""
    go, compute = threading.Event(), served.server.batcher.compute
    served.server.batcher.compute = lambda texts: go.wait(20) and compute(texts)
    try:
        yield
    finally:
        go.set()
        served.server.batcher.compute = compute


def until(what):
    for _ in range(500):
        if what():
            return
        time.sleep(0.01)
    raise AssertionError("never")


def waiting(served):
    return len(served.server.batcher._waiting)


@contextlib.contextmanager
def connection(served):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as found:
        yield found


def head(length):
    return (
        "POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


def works(served):
    until(lambda: not waiting(served))
    assert served.post("/embed", {"inputs": "a"}).status_code == 200


def test_a_body_that_is_too_long(served):
    told = served.post("/embed", {"inputs": "a" * 5000})
    assert (told.status_code, told.json()["error_type"]) == (413, "Validation")

    def chunks():
        for _ in range(100):
            yield b"x" * 1000

    untold = served.client.post("/v1/embeddings", content=chunks())
    assert (untold.status_code, untold.json()["error"]["code"]) == (413, "too_large")
    with connection(served) as raw:
        raw.sendall(head(10**12))
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    works(served)


def test_a_body_that_does_not_arrive(served):
    with connection(served) as raw:
        raw.sendall(head(100) + b'{"inputs": ')
        works(served)
        assert raw.recv(1000).startswith(b"HTTP/1.1 408")
    works(served)


def test_headers_that_are_a_bomb(served):
    with connection(served) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 100_000)
        with contextlib.suppress(ConnectionError):
            assert raw.recv(100).startswith(b"HTTP/1.1 400")
    works(served)


def test_a_client_that_leaves_is_computed_nothing_for(served):
    body = json.dumps({"inputs": ["gone " * 5] * 3}).encode()
    with held(served), ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.post, "/embed", {"inputs": "a"})
        until(lambda: served.server.batcher.tokens == 0 and not first.done())
        with connection(served) as raw:
            raw.sendall(head(len(body)) + body)
            until(lambda: waiting(served) == 3)
        until(lambda: waiting(served) == 0)
    works(served)


def test_no_answer_within_the_deadline(served):
    with held(served):
        begin = time.monotonic()
        late = served.embeddings(["a", "b " * 12])
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline")
        assert 0.9 < time.monotonic() - begin < 5
        until(lambda: waiting(served) == 0)
    works(served)


def test_too_much_waits(served):
    with held(served), ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(served.post, "/embed", {"inputs": ["a " * 8] * 2}) for _ in range(6)]
        until(lambda: served.server.batcher.tokens >= 50)
        refused = served.embeddings("one more")
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert served.client.get("/health").status_code == 200, "the loop is free"
    assert {200, 429, 504} >= {answer.result().status_code for answer in asked}
    works(served)


def test_a_model_that_gives_no_finite_answer(served):
    compute = served.server.batcher.compute
    served.server.batcher.compute = lambda texts: compute(texts) * torch.nan
    try:
        assert served.embeddings("a").status_code == 424
    finally:
        served.server.batcher.compute = compute
    works(served)


def test_a_model_that_fails(served, caplog):
    def fail(_):
        raise RuntimeError("secret detail")

    compute, served.server.batcher.compute = served.server.batcher.compute, fail
    try:
        answer = served.embeddings("a")
    finally:
        served.server.batcher.compute = compute
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "the model failed")
    assert "secret detail" in caplog.text
    works(served)


def test_many_clients_at_once_get_their_own_answers():
    words = ["fox", "memory", "a longer text of some words", "ü", ""]
    with serving(budget=64) as served:
        alone = {word: served.embeddings(word).json()["data"][0]["embedding"] for word in words}

        async def run():
            async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:

                async def one(number):
                    texts = [words[(number + i) % 5] for i in range(1 + number % 4)]
                    body = {"model": TINY, "input": texts}
                    return texts, (await client.post("/v1/embeddings", json=body)).json()["data"]

                return await asyncio.gather(*(one(number) for number in range(150)))

        for texts, data in asyncio.run(run()):
            assert len(texts) == len(data)
            for word, item in zip(texts, data, strict=True):
                assert item["embedding"] == pytest.approx(alone[word], abs=1e-5)
