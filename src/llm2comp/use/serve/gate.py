"""Before any route: who calls, how much is sent, how long it takes to arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm2comp.use.serve.refusals import RefusedError
from llm2comp.use.serve.settings import Settings

# What anyone may ask for: a page without data, and how the server is.
OPEN = {("GET", "/"), ("GET", "/health"), ("GET", "/ready")}


class Gate:
    """Lets a request through once its key is right and its body is here, whole."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self.settings.deadline_seconds
        scope.setdefault("state", {})["deadline"] = deadline
        try:
            if (scope["method"], scope["path"]) not in OPEN:
                self._check_key(scope["headers"])
            async with asyncio.timeout_at(deadline):
                body = await self._body(scope["headers"], receive)
        except TimeoutError:
            await self._refuse(RefusedError(408, "the body did not arrive"), scope, receive, send)
            return
        except RefusedError as error:
            await self._refuse(error, scope, receive, send)
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, again, send)

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

    async def _refuse(
        self, error: RefusedError, scope: Scope, receive: Receive, send: Send
    ) -> None:
        answer = error.told(scope["path"])
        if error.status in (408, 413):  # what else comes of the body is not read
            answer.headers["connection"] = "close"
        await answer(scope, receive, send)
