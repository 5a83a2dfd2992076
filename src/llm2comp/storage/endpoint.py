"""A client of servers: OpenAI's `/v1/embeddings`, text-embeddings-inference's `/embed`; and
whatever else answers with JSON.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import Any, Literal
from urllib.parse import urlsplit

from llm2comp.errors import ModelFolderError, one_line
from llm2comp.system.console import Role
from llm2comp.system.files import to_json

Protocol = Literal["OpenAI", "TEI"]
PATHS: dict[str, Protocol] = {"/v1/embeddings": "OpenAI", "/embed": "TEI"}


class RefusedError(Exception):
    """What a server answered instead of embeddings: its status, and its words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"HTTP {status}: {words}")
        self.status = status


@dataclass(frozen=True)
class Endpoint:
    """Where embeddings are asked for.

    Args:
        url: of the one path that gives embeddings.
        protocol: what is spoken there.
        model: name of the model in requests, where the protocol has one.
        key: sent as a bearer token.
        timeout_s: of one request, in seconds.
    """

    url: str
    protocol: Protocol
    model: str = ""
    key: str | None = None
    timeout_s: float = 120.0

    def embed(self, texts: Sequence[str], role: Role | None = None) -> list[list[float]]:
        """Embeddings of texts in a role, by one request: a row for each.

        Raises:
            RefusedError: the server's own. ModelFolderError: no answer, or no embeddings in it.
        """
        if self.protocol == "OpenAI":
            body: dict[str, Any] = {"model": self.model, "input": list(texts)}
            body |= {"encoding_format": "float"} | ({"input_type": role} if role else {})
        else:
            body = {"inputs": list(texts), "truncate": True}
            body |= {"prompt_name": role} if role else {}
        answer = ask(self.url, body, self.key, self.timeout_s)
        try:
            if self.protocol == "OpenAI":
                rows = sorted(answer["data"], key=lambda row: row["index"])
                answer = [row["embedding"] for row in rows]
            found = [[float(value) for value in row] for row in answer]
            if len(found) != len(texts) or len({len(row) for row in found}) != 1:
                raise ValueError(f"rows of {[len(row) for row in found]} for {len(texts)} texts")
        except (ValueError, TypeError, LookupError) as error:
            raise ModelFolderError(
                f"does not answer with embeddings: {one_line(error)}",
                where=self.url,
                expected=f"{self.protocol}'s answer",
                found=one_line(answer, 120),
            ) from error
        return found


def require_address(url: str) -> None:
    """Raise ModelFolderError unless it is an address of a web server."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # an open bracket, a port that is no number
        sound = False
    if not sound:
        raise ModelFolderError(
            "not an address", where="--url", expected="http://HOST:PORT", found=url
        )


def find_endpoint(url: str, model: str | None = None, key: str | None = None) -> Endpoint:
    """The endpoint at a server's address, at `.../v1`, or at the full path of one protocol.

    Raises:
        ModelFolderError: no http address, nobody answers there, or neither protocol.
    """
    require_address(url)
    base = url.split("?", maxsplit=1)[0].rstrip("/")
    given = next((path for path in PATHS if base.endswith(path)), None)
    base = base.removesuffix(given or "/v1").rstrip("/")
    problems = []
    for path in [given] if given else PATHS:
        endpoint = Endpoint(base + path, PATHS[path], model or "", key)
        if PATHS[path] == "OpenAI" and not model:
            endpoint = replace(endpoint, model=_first_model(endpoint, base))
        try:
            endpoint.embed(["a trial"])
            return endpoint
        except RefusedError as refused:
            problems.append(f"{path}: {refused}")
    raise ModelFolderError(
        "gives no embeddings",
        where=url,
        expected="OpenAI's /v1/embeddings or text-embeddings-inference's /embed",
        found="; ".join(problems),
    )


def _first_model(endpoint: Endpoint, base: str) -> str:
    """The first model that the server lists; one that lists none needs no name."""
    try:
        return str(ask(f"{base}/v1/models", None, endpoint.key)["data"][0]["id"])
    except (RefusedError, LookupError, TypeError):
        return "default"


def ask(
    url: str, body: dict[str, Any] | None = None, key: str | None = None, timeout_s: float = 120.0
) -> Any:
    """What a server answers as JSON to a JSON body, or to a GET.

    Raises:
        RefusedError: the server's own, or what is no JSON (a page). ModelFolderError: no answer.
    """
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else to_json(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        try:
            answer = urllib.request.urlopen(request, timeout=timeout_s)
        except urllib.error.HTTPError as refused:
            answer = refused
        with answer:
            status, content = answer.status, answer.read()
    except (OSError, ValueError, HTTPException) as error:
        raise ModelFolderError(
            f"no answer: {one_line(error)}", where=url, fix="is the server running there?"
        ) from error
    if not 200 <= status < 300:
        raise RefusedError(status, one_line(content.decode(errors="replace"), 200))
    try:
        return json.loads(content)
    except ValueError:
        words = one_line(content.decode(errors="replace"), 120)
        raise RefusedError(status, f"no JSON: {words}") from None
