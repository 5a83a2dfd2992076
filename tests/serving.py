"""A real server on a real socket, in a thread of this process."""

import contextlib
import functools
import threading
import time
from dataclasses import dataclass

import httpx
import uvicorn

import llm2comp
from llm2comp.use.serve.app import configured, make_server
from llm2comp.use.serve.server import Server
from llm2comp.use.serve.settings import Settings, listen

TINY = "builtin:general-tiny"


@dataclass(frozen=True)
class Served:
    """Where a server is, the server itself, and a client for it."""

    url: str
    server: Server
    client: httpx.Client

    def post(self, path, body, **headers):
        return self.client.post(path, json=body, headers=headers)

    def embeddings(self, given, **fields):
        return self.post(
            "/v1/embeddings", {"input": given, "model": self.server.engine.name, **fields}
        )


@functools.cache
def tiny():
    """The packaged tiny encoder, once per process."""
    return llm2comp.load(TINY, "cpu", merged=True)


@contextlib.contextmanager
def serving(model=None, path=TINY, name=None, budget=None, index=None, lens=False, **settings):
    """Serve a model (default: the tiny one) under these settings; yields a `Served`."""
    server = make_server(model or tiny(), path, Settings(**settings), name, budget, index, lens)
    place = listen("127.0.0.1", 0)
    running = uvicorn.Server(configured(server))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [place]})
    thread.start()
    url = f"http://127.0.0.1:{place.getsockname()[1]}"
    try:
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.01)
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Served(url, server, client)
    finally:
        running.should_exit = True
        thread.join()
