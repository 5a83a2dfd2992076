"""Routes that rank texts by how well they answer a query."""

from __future__ import annotations

import torch
from fastapi import APIRouter, Request
from torch.nn import functional

from llm2comp.model.memory import maxsim
from llm2comp.use.serve.schemas import Found, Hits, Rank, RerankRequest, SearchRequest
from llm2comp.use.serve.server import Server
from llm2comp.use.serve.tei import REFUSED


def ranking_routes(server: Server) -> APIRouter:
    """`/rerank`, as text-embeddings-inference has it; `/search` where there is an index."""
    router, engine = APIRouter(tags=["ranking"]), server.engine

    @router.post("/rerank", responses=REFUSED, response_model_exclude_none=True)
    async def rerank(body: RerankRequest, request: Request) -> list[Rank]:
        """Texts by how well they answer a query, the best first: MaxSim over memory states, or the
        cosine where a model has none. 1: the same.
        """
        truncate = body.truncate is not False
        query = await server.read(body.query, "query", None, truncate, "query")
        texts = await server.read(body.texts, "document", None, truncate, "texts")
        found = torch.from_numpy(await server.vectors(request, query + texts))
        states = functional.normalize(found[:, 1:] if engine.states else found, dim=-1)
        scores = maxsim(states[:1], states[1:])[0] / (1 if body.raw_scores else states.shape[1])
        order = scores.argsort(descending=True, stable=True).tolist()
        return [
            Rank(index=i, score=float(scores[i]), text=body.texts[i] if body.return_text else None)
            for i in order
        ]

    if (index := server.index) is None:
        return router

    @router.post("/search", responses=REFUSED)
    async def search(body: SearchRequest, request: Request) -> Hits:
        """Passages of the index by words, by meaning, or by both."""
        query = (await server.read(body.query, "query", field="query"))[0]

        def find() -> Hits:
            return Hits(
                hits=[
                    Found(
                        path=hit.path,
                        first=hit.first,
                        last=hit.last,
                        headings=list(hit.headings),
                        heading=hit.heading,
                        text=hit.text,
                        matched=list(hit.matched),
                        snippet=hit.snippet,
                        spans=hit.spans(hit.snippet),
                        score=hit.score,
                    )
                    for hit in index.search(body.query, body.k, mode=body.mode, path=body.path)
                ]
            )

        return await server.within(request, server.batcher.call(find, query.length))

    return router
