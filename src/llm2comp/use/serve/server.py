"""From a request's texts to their vectors: limits, deadlines, clients that left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi import Request
from numpy.typing import NDArray

from llm2comp.errors import DataError, RunError
from llm2comp.model.compressor import Compressor
from llm2comp.model.vectors import unit_length
from llm2comp.system.files import is_unicode
from llm2comp.use.serve.batcher import Batcher
from llm2comp.use.serve.engine import Engine, Text
from llm2comp.use.serve.metrics import Metrics
from llm2comp.use.serve.refusals import INVALID, RefusedError
from llm2comp.use.serve.settings import Settings

if TYPE_CHECKING:
    from llm2comp.use.index.index import Index

# Characters that are tokenised in the loop's own thread, in less than a millisecond or so.
AT_ONCE = 10_000
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Server:
    """What the routes need."""

    engine: Engine
    batcher: Batcher
    settings: Settings
    metrics: Metrics
    started: int
    index: Index | None = None
    lens: Compressor | None = None

    async def read(
        self,
        given: Any,
        role: str | None,
        prompt: str | None = None,
        truncate: bool = True,
        field: str = "input",
    ) -> list[Text]:
        """Texts of a field of a request, or token ids, as the model will read them.

        Raises:
            RefusedError: too many, ids that are of no text, no Unicode, one that is or may be too
                long and must not be cut.
        """
        several = isinstance(given, list) and not isinstance(given[0], int)
        inputs = given if several else [given]
        if len(inputs) > (most := self.settings.max_texts):
            raise RefusedError(
                413, f"{len(inputs):,} texts; {most:,} at most", param=field, code="too_many_texts"
            )
        if any(not isinstance(text, str) for text in inputs):
            inputs = [self._decoded(ids, field) for ids in inputs]
        if any(not is_unicode(text) for text in inputs):
            raise RefusedError(INVALID, "not a Unicode text", param=field)
        arguments = inputs, role, self.engine.prompt(role) if prompt is None else prompt
        texts = (
            self.engine.read(*arguments)
            if sum(map(len, inputs)) <= AT_ONCE
            else await asyncio.to_thread(self.engine.read, *arguments)
        )
        if not truncate and any(text.cut is None for text in texts):
            problem = "truncate: false: the tokens of this model cannot be counted"
            raise RefusedError(INVALID, problem, param=field)
        if not truncate and any(text.cut for text in texts):
            raise RefusedError(
                413,
                f"a text has more than {self.engine.limit_of(role):,} tokens",
                param=field,
                code="context_length_exceeded",
            )
        return texts

    def _decoded(self, ids: Sequence[int], field: str) -> str:
        text = self.engine.decode(ids)
        if text is None:
            raise RefusedError(
                INVALID,
                "token ids of another tokenizer: send text (LangChain's OpenAIEmbeddings: "
                "check_embedding_ctx_length=False)",
                param=field,
                code="invalid_token_ids",
            )
        return text

    async def vectors(self, request: Request, texts: Sequence[Text]) -> NDArray[np.float32]:
        """Vectors (N, 1 + K, D) for a request.

        Raises:
            RefusedError: too much waits, the deadline has passed, the client left, or the vectors
                are not finite; the model failed.
        """
        found = await self.within(request, self.batcher.vectors(texts))
        if not np.isfinite(found).all():
            raise RefusedError(424, "an embedding is not finite", code="not_finite")
        self.metrics.read(texts)
        return found

    async def within(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """What some work gives, as long as the client waits and the deadline has not passed.

        Raises:
            RefusedError: as `vectors`. RunError: the work's own, of an index that cannot be read.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_gone(request))
        left = request.scope["state"]["deadline"] - asyncio.get_running_loop().time()
        try:
            await asyncio.wait({task, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise RefusedError(499, "the client left")
            problem = "no answer within the deadline: ask for less at once"
            raise RefusedError(504, problem, code="deadline")
        except (RefusedError, RunError):
            raise
        except DataError as error:
            raise RefusedError(INVALID, error.problem) from error
        except Exception as error:
            log.exception("the model failed")
            raise RefusedError(500, "the model failed") from error
        finally:
            task.cancel()
            gone.cancel()

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raise RefusedError where more are asked for than there are."""
        if dimensions is not None and dimensions > (most := self.engine.width):
            raise RefusedError(INVALID, f"dimensions: {most} at most", param="dimensions")


def finished(
    vectors_NVD: NDArray[np.float32], dimensions: int | None, normalize: bool
) -> NDArray[np.float32]:
    """Embeddings (N, dimensions) of the first vectors, contiguous."""
    embeddings_ND = np.ascontiguousarray(vectors_NVD[:, 0, :dimensions])
    return unit_length(embeddings_ND) if normalize else embeddings_ND


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection; its request is read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
