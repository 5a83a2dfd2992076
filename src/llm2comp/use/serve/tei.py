"""Routes of text-embeddings-inference's protocol."""

from __future__ import annotations

import asyncio

import orjson
from fastapi import APIRouter, Request, Response

from llm2comp import __version__
from llm2comp.use.serve.engine import ROLES
from llm2comp.use.serve.refusals import INVALID, RefusedError, TeiError, documented
from llm2comp.use.serve.schemas import EmbedRequest, IndexInfo, Info
from llm2comp.use.serve.server import Server, finished

REFUSED = documented(TeiError, 401, 408, 413, INVALID, 424, 429, 500, 503, 504)


def tei_routes(server: Server) -> APIRouter:
    """`/embed`, also at `/` as Hugging Face's clients call it, and `/info`."""
    router = APIRouter(tags=["text-embeddings-inference"])
    engine = server.engine

    @router.post("/", response_model=list[list[float]], responses=REFUSED, operation_id="root")
    @router.post("/embed", response_model=list[list[float]], responses=REFUSED)
    async def embed(body: EmbedRequest, request: Request) -> Response:
        """Embeddings of texts, in their order."""
        name = body.prompt_name
        role = name if name in ROLES else None
        try:
            prompt = engine.prompt(role, None if role else name)
        except KeyError:
            known = ", ".join(engine.prompts) or "none"
            raise RefusedError(INVALID, f"prompt_name: there is {known}") from None
        server.check_dimensions(body.dimensions)
        truncate = body.truncate is not False
        texts = await server.read(body.inputs, role, prompt, truncate, "inputs")
        found = await server.vectors(request, texts)
        rows_ND = finished(found, body.dimensions, body.normalize)
        content = orjson.dumps(rows_ND, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(content, media_type="application/json")

    @router.get("/info", responses=documented(TeiError, 401, 503))
    async def info() -> Info:
        """What is served."""
        batcher, settings = server.batcher, server.settings
        index = (
            IndexInfo(**await asyncio.to_thread(lambda: searched.info))
            if (searched := server.index)
            else None
        )
        return Info(
            model_id=engine.name,
            model_sha=engine.revision,
            model_dtype=engine.precision,
            model_type={"embedding": {"pooling": "memory" if engine.states else "other"}},
            max_concurrent_requests=settings.max_connections,
            max_input_length=engine.limit,
            max_batch_tokens=batcher.budget.tokens,
            max_client_batch_size=settings.max_texts,
            auto_truncate=True,
            tokenization_workers=1,
            version=__version__,
            dimensions=engine.width,
            memory_tokens=engine.states,
            prompts=engine.prompts,
            backend=engine.backend,
            index=index,
        )

    return router
