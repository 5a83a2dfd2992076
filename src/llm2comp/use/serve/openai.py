"""Routes of OpenAI's protocol."""

from __future__ import annotations

import base64

import orjson
from fastapi import APIRouter, Request, Response

from llm2comp.use.serve.refusals import OpenAIError, RefusedError, documented
from llm2comp.use.serve.schemas import Embeddings, EmbeddingsRequest, Model, Models
from llm2comp.use.serve.server import Server, finished

REFUSED = documented(OpenAIError, 400, 401, 404, 408, 413, 424, 429, 500, 503, 504)
LISTED = documented(OpenAIError, 401)


def openai_routes(server: Server) -> APIRouter:
    """`/v1/embeddings`, `/v1/models`."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    model = Model(id=server.engine.name, created=server.started)

    def check(name: str) -> None:
        if name != model.id:
            raise RefusedError(
                404, f"no model {name[:100]!r}: {model.id!r}", param="model", code="model_not_found"
            )

    @router.post("/embeddings", response_model=Embeddings, responses=REFUSED)
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Embeddings of texts. Texts over the model's limit are cut."""
        check(body.model)
        server.check_dimensions(body.dimensions)
        texts = await server.read(body.input, body.input_type)
        found = await server.vectors(request, texts)
        rows_ND = finished(found, body.dimensions, body.normalize)
        encoded = (
            [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows_ND]
            if body.encoding_format == "base64"
            else rows_ND
        )
        tokens = sum(text.tokens for text in texts)
        answer = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": row}
                for index, row in enumerate(encoded)
            ],
            "model": model.id,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        content = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(content, media_type="application/json")

    @router.get("/models", responses=LISTED)
    async def models() -> Models:
        """The one model that is served."""
        return Models(data=[model])

    @router.get("/models/{name:path}", responses=LISTED | documented(OpenAIError, 404))
    async def one_model(name: str) -> Model:
        """What is known of it."""
        check(name)
        return model

    return router
