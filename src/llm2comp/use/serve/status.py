"""Routes that tell how the server is."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from llm2comp.use.serve.refusals import TeiError, documented
from llm2comp.use.serve.schemas import Status
from llm2comp.use.serve.server import Server

PLAIN = {"text/plain": {"schema": {"type": "string"}}}


def status_routes(server: Server) -> APIRouter:
    """`/health`, `/ready`, `/metrics`."""
    router = APIRouter(tags=["status"])

    @router.get("/health")
    async def health() -> Status:
        """The process is there."""
        return Status(status="ok")

    @router.get("/ready", responses={503: {"model": Status, "description": "They will not."}})
    async def ready(response: Response) -> Status:
        """Requests will be answered."""
        response.status_code = 200 if server.batcher.alive else 503
        return Status(status="ok" if server.batcher.alive else "stopping")

    @router.get(
        "/metrics",
        response_class=Response,
        responses=documented(TeiError, 401) | {200: {"content": PLAIN}},
    )
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
