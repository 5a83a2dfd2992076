"""The page at `/`, and what it alone asks for: the memory of a text."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response

from llm2comp.measures.clusters import memory_correlation
from llm2comp.measures.readout import read_out
from llm2comp.use.serve.refusals import RefusedError, TeiError, documented
from llm2comp.use.serve.schemas import MemoryMap, MemoryRequest
from llm2comp.use.serve.server import Server
from llm2comp.use.serve.tei import REFUSED

PAGE = Path(__file__).with_name("page.html")
# Its own script and style alone, and no address but ours.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Words that are shown of each memory token, and tokens of each continuation.
WORDS, CONTINUED = 4, 16


def page_routes(server: Server) -> APIRouter:
    """`/`, `/memory`."""
    router, engine, page = APIRouter(tags=["page"]), server.engine, PAGE.read_bytes()

    @router.get("/", include_in_schema=False)
    async def root() -> Response:
        headers = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
        return Response(page, media_type="text/html", headers=headers)

    @router.post("/memory", responses=REFUSED | documented(TeiError, 404))
    async def memory(body: MemoryRequest, request: Request) -> MemoryMap:
        """What the memory tokens of a text hold: how like each other they are and, of a server
        with the frozen LM, the words nearest to each and what the LM continues with.
        """
        if not engine.states:
            raise RefusedError(404, "the model has no memory tokens", code="no_memory")
        texts = await server.read(body.text, None, field="text")
        states_NKD = (await server.vectors(request, texts))[:, 1:]
        found = MemoryMap(
            tokens=texts[0].tokens, correlation=memory_correlation(states_NKD).tolist()
        )
        if (compressor := server.lens) is None:
            return found
        # each token of a continuation is a pass over all before it
        cost = 3 * CONTINUED * texts[0].length
        seen = await server.within(
            request,
            server.batcher.call(
                lambda: read_out(compressor, body.text, engine.limit, WORDS, CONTINUED), cost
            ),
        )
        return found.model_copy(
            update={
                "words": [[word.strip() for word in words] for words in seen.words],
                "from_text": seen.from_text,
                "from_memory": seen.from_memory,
                "from_nothing": seen.from_nothing,
            }
        )

    return router
