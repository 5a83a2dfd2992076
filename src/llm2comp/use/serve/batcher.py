"""One thread that computes, and a bounded queue before it: continuous batching.

1. a request puts its texts into the queue, or is refused when too many tokens wait
2. the thread takes the oldest text and those nearest to it in length, of whatever request, as many
   as fit into the budget of tokens. It never waits for more to come: what comes alone is computed
   alone, at once
3. a request has its answer when its last text is done; what is left of one whose client went, or
   whose deadline passed, is dropped
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llm2comp.model.vectors import Budget, in_batches
from llm2comp.use.serve.engine import Text
from llm2comp.use.serve.refusals import RefusedError

# How many waiting texts are looked at when a batch is put together.
LOOK_AHEAD = 4096
LONGEST_RETRY_SECONDS = 60
T = TypeVar("T")


@dataclass(eq=False)
class _Job:
    """One request: a result for each of its texts, (1 + K, D), or for its one call."""

    future: asyncio.Future[list[Any]]
    found: list[Any]
    left: int
    error: Exception | None = None

    def put(self, place: int, found: Any) -> None:
        self.found[place] = found
        self.left -= 1

    def settle(self) -> None:
        """Give the answer; in the thread of the loop that waits for it."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.found)


@dataclass(frozen=True, eq=False)
class _Waiting:
    text: Text
    job: _Job
    place: int
    work: Callable[[], Any] | None = None


@dataclass(eq=False)
class Batcher:
    """Computes texts of many requests together.

    Args:
        compute: texts of one reading → (B, 1 + K, D); called in one thread alone.
        budget: tokens at once, padding included.
        most: a request is refused while so many tokens wait; None: 64 times the budget.
        seen: is told of each batch: its texts, its tokens, its seconds.
    """

    compute: Callable[[Sequence[Text]], Tensor]
    budget: Budget
    most: int | None = None
    seen: Callable[[int, int, float], None] = lambda texts, tokens, seconds: None
    tokens: int = field(default=0, init=False)
    rate: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.most = self.most or 64 * self.budget.tokens
        self._waiting: list[_Waiting] = []
        self._more, self._stopped = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> Batcher:
        """Begin to compute."""
        self._thread.start()
        return self

    @property
    def alive(self) -> bool:
        """Whether requests are taken and will be answered."""
        return self._thread.is_alive() and not self._stopped

    def stop(self) -> None:
        """Take nothing more; what waits is still computed."""
        with self._more:
            self._stopped = True
            self._more.notify()
        self._thread.join()

    async def vectors(self, texts: Sequence[Text]) -> NDArray[np.float32]:
        """Vectors (N, 1 + K, D) of one request's texts, N ≥ 1. Cancelled: they are dropped.

        Raises:
            RefusedError: too much waits, or the server is stopping. What `compute` raises.
        """
        return np.stack(await self._done([(text, None) for text in texts]))

    async def call(self, work: Callable[[], T], tokens: int) -> T:
        """Something else that needs the model, in its thread, in its turn; counts as so many
        tokens. Errors as `vectors`.
        """
        found: list[T] = await self._done([(Text(tokens, tokens), work)])
        return found[0]

    async def _done(self, items: Sequence[tuple[Text, Callable[[], Any] | None]]) -> list[Any]:
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        job = _Job(future, [None] * len(items), len(items))
        with self._more:
            if not self.alive:
                raise RefusedError(503, "the server is stopping", code="unavailable")
            if self.tokens >= (self.most or 0):
                wait = self._retry_after()
                problem = "too much waits: try again later"
                raise RefusedError(429, problem, code="overloaded", retry_after=wait)
            self._waiting += [
                _Waiting(text, job, place, work) for place, (text, work) in enumerate(items)
            ]
            self.tokens += sum(text.length for text, _ in items)
            self._more.notify()
        try:
            return await future
        finally:
            if job.left:
                self._drop(job)

    def _retry_after(self) -> int:
        """Seconds until what waits is computed, as far as can be told."""
        seconds = self.tokens / self.rate if self.rate else 1.0
        return max(1, min(LONGEST_RETRY_SECONDS, math.ceil(seconds)))

    def _drop(self, job: _Job) -> None:
        with self._more:
            self._keep([waiting for waiting in self._waiting if waiting.job is not job])

    def _keep(self, waiting: list[_Waiting]) -> None:
        self._waiting, self.tokens = waiting, sum(w.text.length for w in waiting)

    def _work(self) -> None:
        while True:
            with self._more:
                while not self._waiting and not self._stopped:
                    self._more.wait()
                if not self._waiting:
                    return
                batch = self._next()
            begin = time.perf_counter()
            self._compute(batch)
            tokens, seconds = sum(w.text.length for w in batch), time.perf_counter() - begin
            self.rate = 0.9 * self.rate + 0.1 * tokens / seconds if self.rate else tokens / seconds
            # First counted, then answered: who has an answer finds it in the figures.
            self.seen(len(batch), tokens, seconds)
            self._answer(batch)

    def _next(self) -> list[_Waiting]:
        """The oldest text and those nearest to it in length, as many as fit."""
        first = self._waiting[0]
        oldest, seen = first.text, self._waiting[:LOOK_AHEAD]
        alike = [w for w in seen if w.work is None and w.text.reading == oldest.reading]
        near = sorted(
            alike if first.work is None else [first],
            key=lambda w: abs(w.text.length - oldest.length),
        )
        longest, count = 1, 0
        for waiting in near:
            longest = max(longest, waiting.text.length)
            if count and (count + 1) * longest > self.budget.tokens:
                break
            count += 1
        batch = near[:count]
        taken = set(batch)
        self._keep([waiting for waiting in self._waiting if waiting not in taken])
        return batch

    def _compute(self, batch: list[_Waiting]) -> None:
        """Compute a batch; what fails together is tried one by one, so that one text is no other's
        fault.
        """
        texts = [waiting.text for waiting in batch]
        work, lengths = batch[0].work, [text.length for text in texts]
        try:
            found: list[Any] = (
                [work()]
                if work is not None
                else list(
                    in_batches(
                        lengths, lambda at: self.compute([texts[i] for i in at]), self.budget
                    ).numpy()
                )
            )
        except Exception as error:  # a thread that dies would leave all requests waiting
            if len(batch) > 1:
                for waiting in batch:
                    self._compute([waiting])
                return
            batch[0].job.error = error
        else:
            for waiting, result in zip(batch, found, strict=True):
                waiting.job.put(waiting.place, result)

    @staticmethod
    def _answer(batch: list[_Waiting]) -> None:
        """Settle the requests of a batch that failed or whose last text it held."""
        for job in {w.job for w in batch if w.job.error is not None or not w.job.left}:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                job.future.get_loop().call_soon_threadsafe(job.settle)
