"""All of it as one application; running it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sentence_transformers import SentenceTransformer
from starlette.exceptions import HTTPException

from llm2comp.errors import RunError
from llm2comp.model.vectors import Budget
from llm2comp.use.serve.batcher import Batcher
from llm2comp.use.serve.engine import Engine
from llm2comp.use.serve.gate import Gate
from llm2comp.use.serve.metrics import Metrics
from llm2comp.use.serve.openai import openai_routes
from llm2comp.use.serve.page import page_routes
from llm2comp.use.serve.ranking import ranking_routes
from llm2comp.use.serve.refusals import INVALID, OPENAI_PREFIX, RefusedError
from llm2comp.use.serve.server import Server
from llm2comp.use.serve.settings import Settings
from llm2comp.use.serve.status import status_routes
from llm2comp.use.serve.tei import tei_routes

if TYPE_CHECKING:
    from llm2comp.use.index.index import Index

log = logging.getLogger(__name__)


def make_server(
    model: SentenceTransformer,
    path: str,
    settings: Settings,
    name: str | None = None,
    max_tokens_per_batch: int | None = None,
    index: Index | None = None,
    lens: bool = False,
) -> Server:
    """A server of a model that was loaded from a path.

    Args:
        model: any sentence-transformers model.
        path: what it was loaded from.
        settings: its limits.
        name: what callers call it; None: its name in results.
        max_tokens_per_batch: tokens at once, padding included; None: what suits the device.
        index: documents to search; None: there is no `/search`.
        lens: show what the model's own frozen LM reads in a text's memory.

    Raises:
        ModelFolderError: a lens, and no frozen LM.
    """
    engine = Engine(model, path, name)
    budget = Budget.of(model.device, max_tokens_per_batch)
    batcher = Batcher(engine.compute, budget, settings.max_waiting_tokens)
    metrics = Metrics(lambda: batcher.tokens)
    batcher.seen = metrics.batch
    compressor = engine.compressor if lens else None
    return Server(engine, batcher, settings, metrics, int(time.time()), index, compressor)


def configured(server: Server) -> uvicorn.Config:
    """How uvicorn runs a server."""
    return uvicorn.Config(
        application(server),
        http="h11",  # bounds the size of headers
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,  # longer than clients keep one: none is shut under a request
        limit_concurrency=server.settings.max_connections,
        timeout_graceful_shutdown=math.ceil(server.settings.drain_seconds),
    )


def run(server: Server, place: socket.socket) -> None:
    """Answer requests until SIGTERM or Ctrl-C; what is under way then is still answered."""
    # uvicorn raises Ctrl-C again once all is answered; it is how a server ends, with nothing left
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(configured(server)).run(sockets=[place])


def application(server: Server) -> FastAPI:
    """The application around a server; starting it starts the model's thread."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        server.batcher.start()
        yield
        await asyncio.to_thread(server.batcher.stop)

    app = FastAPI(
        title="llm2comp",
        version=version("llm2comp"),
        description="Embeddings of an LLM2Comp encoder.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(openai_routes(server))
    app.include_router(tei_routes(server))
    app.include_router(ranking_routes(server))
    app.include_router(page_routes(server))
    app.include_router(status_routes(server))
    described = app.openapi()
    app.add_middleware(
        Gate, settings=server.settings, seen=server.metrics.request, routes=set(described["paths"])
    )

    _tell_errors(app)
    _leave_out_foreign_errors(described)
    return app


def _leave_out_foreign_errors(document: dict[str, Any]) -> None:
    """FastAPI's own shape of errors, which is never sent, out of the OpenAPI document."""
    for path, methods in document["paths"].items():
        if path.startswith(OPENAI_PREFIX):
            for method in methods.values():
                method["responses"].pop(str(INVALID), None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _tell_errors(app: FastAPI) -> None:
    """Every error in the shape of the protocol that was spoken."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        return error.told(request.url.path)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = error.errors()
        places = [str(part) for part in found[0]["loc"][1:2]]
        problem = "not as described in /openapi.json" if len(found) > 1 else found[0]["msg"]
        text = ": ".join([*places, problem])
        return RefusedError(INVALID, text, param=next(iter(places), None)).told(request.url.path)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = INVALID if error.status_code == 400 else error.status_code
        answer = RefusedError(status, str(error.detail)).told(request.url.path)
        answer.headers.update(error.headers or {})
        return answer

    async def unusable(request: Request, error: Exception) -> Response:
        assert isinstance(error, RunError)
        log.error("%s", error)
        return RefusedError(503, f"the index: {error.problem}").told(request.url.path)

    async def failed(request: Request, error: Exception) -> Response:
        return RefusedError(500, "the model failed").told(request.url.path)

    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RunError, unusable)
    app.add_exception_handler(Exception, failed)
