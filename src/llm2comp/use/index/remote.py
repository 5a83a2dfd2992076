"""Search an index that a server has mounted (`llm2comp serve --db`): no model is loaded here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm2comp.errors import DataError, one_line
from llm2comp.storage.endpoint import RefusedError, ask, require_address
from llm2comp.use.index.hits import Hit

if TYPE_CHECKING:
    from llm2comp.use.index.index import Mode


def search_at(
    url: str, question: str, count: int, mode: Mode, path: str | None, key: str | None
) -> list[Hit]:
    """The passages that the server finds, the best first. `key`: sent as a bearer token.

    Raises:
        DataError: it refuses, or has no index. ModelFolderError: no address, or no answer there.
    """
    require_address(url)
    place = f"{url.rstrip('/')}/search"
    body = {"query": question, "k": count, "mode": mode, "path": path}
    try:
        found = ask(place, body, key)["hits"]
        return [
            Hit(
                path=hit["path"],
                first=hit["first"],
                last=hit["last"],
                headings=tuple(hit["headings"]),
                text=hit["text"],
                score=hit["score"],
                matched=tuple(hit["matched"]),
            )
            for hit in found
        ]
    except RefusedError as refused:
        fix = "serve it with an index: llm2comp serve --db DIR" if refused.status == 404 else ""
        raise DataError(f"refuses: {refused}", where=place, fix=fix) from None
    except (LookupError, TypeError) as error:
        raise DataError(f"does not answer with passages: {one_line(error)}", where=place) from None
