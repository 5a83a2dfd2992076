"""Before any route: who calls, how much is sent, how long it takes to arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Container, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm2comp.use.serve.refusals import RefusedError
from llm2comp.use.serve.settings import Settings

# What anyone may ask for: a page without data, and how the server is.
OPEN = {("GET", "/"), ("GET", "/health"), ("GET", "/ready")}


class Gate:
    """Lets a request through once its key is right and its body is here, whole.

    Args:
        app: what is behind it.
        settings: keys and limits.
        seen: is told of every request: its route, status, seconds.
        routes: those that are told apart; all others are one.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        seen: Callable[[str, int, float], None],
        routes: Container[str],
    ) -> None:
        self.app, self.settings, self.seen, self.routes = app, settings, seen, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin = time.perf_counter()
        route = scope["path"] if scope["path"] in self.routes else "other"

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.seen(route, message["status"], time.perf_counter() - begin)
            await send(message)

        try:
            await self.app(scope, await self._received(scope, receive), watched)
        except RefusedError as error:
            answer = error.told(scope["path"])
            if error.status in (408, 413):  # what else comes of the body is not read
                answer.headers["connection"] = "close"
            await answer(scope, receive, watched)

    async def _received(self, scope: Scope, receive: Receive) -> Receive:
        """The body, and then whatever else comes. Raises RefusedError."""
        deadline = asyncio.get_running_loop().time() + self.settings.deadline_seconds
        scope.setdefault("state", {})["deadline"] = deadline
        if (scope["method"], scope["path"]) not in OPEN:
            self._check_key(scope["headers"])
        try:
            async with asyncio.timeout_at(deadline):
                body = await self._body(scope["headers"], receive)
        except TimeoutError:
            raise RefusedError(408, "the body did not arrive", code="timeout") from None
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        return again

    def _check_key(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        given = dict(headers).get(b"authorization", b"").decode("latin-1")
        scheme, _, key = given.partition(" ")
        if not self.settings.keys.allow(key.strip() if scheme.lower() == "bearer" else ""):
            raise RefusedError(401, "no API key, or a wrong one", code="invalid_api_key")

    async def _body(self, headers: Iterable[tuple[bytes, bytes]], receive: Receive) -> bytes:
        most = self.settings.max_body_bytes
        said = dict(headers).get(b"content-length", b"0")
        body, more = bytearray(), True
        while more and len(body) <= most and (not said.isdigit() or int(said) <= most):
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RefusedError(499, "the client left")
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if more or len(body) > most:
            raise RefusedError(413, f"a body of more than {most:,} bytes", code="too_large")
        return bytes(body)
