"""The queue before the model: batches of like length, nothing mixed up, nothing stuck."""

import asyncio
import contextlib
import threading
import time

import numpy as np
import pytest
import torch

from llm2comp.model.vectors import Budget
from llm2comp.use.serve.batcher import Batcher
from llm2comp.use.serve.engine import Text
from llm2comp.use.serve.refusals import RefusedError


def text(length, text=""):
    return Text(length, length, text=text)


def numbered(texts):
    """A vector that tells which text it is of."""
    return torch.tensor([[[float(t.text or 0), t.length]] for t in texts])


class Held:
    """A compute function that waits until it is let go, and remembers its batches."""

    def __init__(self, compute=numbered):
        self.compute, self.batches, self.go = compute, [], threading.Event()

    def __call__(self, texts):
        self.batches.append([t.length for t in texts])
        self.go.wait(10)
        return self.compute(texts)


@contextlib.asynccontextmanager
async def batching(compute, tokens=100, most=10**6):
    batcher = Batcher(compute, Budget(tokens), most).start()
    try:
        yield batcher
    finally:
        if isinstance(compute, Held):
            compute.go.set()
        await asyncio.to_thread(batcher.stop)


async def asked(batcher, *requests):
    """Tasks of requests, each waiting in the queue when this returns."""
    tasks = [asyncio.ensure_future(batcher.vectors(texts)) for texts in requests]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def until(what):
    for _ in range(500):
        if what():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("never")


def test_a_batch_is_counted_before_its_answers_are_given():
    counted = []

    def seen(texts, tokens, seconds):
        time.sleep(0.05)
        counted.append((texts, tokens))

    async def run():
        async with batching(numbered) as batcher:
            batcher.seen = seen
            await batcher.vectors([text(3), text(4)])
            return list(counted)

    assert asyncio.run(run()) == [(2, 7)]


def test_texts_of_like_length_of_many_requests_are_computed_together():
    async def run():
        held = Held()
        async with batching(held, tokens=100) as batcher:
            first = await asked(batcher, [text(7)])
            await until(lambda: held.batches)
            others = await asked(
                batcher, [text(10), text(50), text(11)], [text(49), text(12)], [text(9)] * 6
            )
            held.go.set()
            await asyncio.gather(*first, *others)
        return held.batches

    alone, oldest, *rest = asyncio.run(run())
    assert alone == [7], "what comes alone is computed at once, alone"
    assert sorted(oldest) == [9] * 6 + [10, 11], "the oldest and its nearest, 88 of 100 tokens"
    assert [sorted(batch) for batch in rest] == [[49, 50], [12]]


def test_batches_keep_to_the_budget_and_no_text_waits_for_ever():
    async def run():
        rng = np.random.default_rng(0)
        held, lengths = Held(), [int(n) for n in rng.integers(1, 40, 200)] + [130]
        async with batching(held, tokens=100) as batcher:
            tasks = await asked(batcher, *([text(n)] for n in lengths))
            held.go.set()
            await asyncio.gather(*tasks)
        return held.batches, lengths

    batches, lengths = asyncio.run(run())
    assert sorted(n for batch in batches for n in batch) == sorted(lengths)
    assert all(len(b) == 1 or len(b) * max(b) <= 100 for b in batches)
    assert max(map(max, batches)) > 100, "a text over the budget goes alone"
    assert np.mean([len(b) for b in batches]) > 3


def test_every_request_gets_its_own():
    async def run():
        async with batching(numbered, tokens=64) as batcher:
            rng = np.random.default_rng(1)

            async def one(number):
                names = [str(number * 10 + i) for i in range(int(rng.integers(1, 8)))]
                await asyncio.sleep(float(rng.random()) * 0.2)
                found = await batcher.vectors([text(int(rng.integers(1, 30)), n) for n in names])
                return found[:, 0, 0].tolist() == [float(n) for n in names]

            return await asyncio.gather(*(one(number) for number in range(300)))

    assert asyncio.run(run()) == [True] * 300


def test_a_full_queue_refuses_and_an_empty_one_takes_all():
    async def run():
        held = Held()
        async with batching(held, most=50) as batcher:
            huge = await asked(batcher, [text(60)] * 5)
            await until(lambda: held.batches)
            assert batcher.tokens == 240, "one is computed, four wait"
            with pytest.raises(RefusedError) as refused:
                await batcher.vectors([text(1)])
            assert (refused.value.status, refused.value.retry_after) == (429, 1)
            held.go.set()
            await asyncio.gather(*huge)
            assert batcher.tokens == 0
            assert (await batcher.vectors([text(1)])).shape == (1, 1, 2)
            batcher.rate, batcher.tokens = 10.0, 95
            with pytest.raises(RefusedError) as refused:
                await batcher.vectors([text(1)])
            assert refused.value.retry_after == 10

    asyncio.run(run())


def test_what_nobody_waits_for_is_dropped():
    async def run():
        held = Held()
        async with batching(held) as batcher:
            (first,) = await asked(batcher, [text(1)])
            await until(lambda: held.batches)
            gone, stays = await asked(batcher, [text(80), text(90)], [text(2, "5")])
            gone.cancel()
            await until(lambda: batcher.tokens == 2)
            held.go.set()
            await first
            assert (await stays)[0, 0, 0] == 5
        return held.batches

    assert asyncio.run(run()) == [[1], [2]]


def test_a_text_that_fails_is_no_others_fault():
    def spoilt(texts):
        if any(t.text == "13" for t in texts):
            raise ValueError("unlucky")
        return numbered(texts)

    async def run():
        held = Held(spoilt)
        async with batching(held) as batcher:
            tasks = await asked(
                batcher, [text(1)], [text(5, "1"), text(5, "13")], [text(5, "2"), text(5, "3")]
            )
            held.go.set()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert batcher.alive
            return found

    _, failed, fine = asyncio.run(run())
    assert isinstance(failed, ValueError)
    assert fine[:, 0, 0].tolist() == [2, 3]


def test_out_of_memory_halves_the_budget(capfd):
    def small(texts):
        if len(texts) > 2:
            raise torch.OutOfMemoryError("too much")
        return numbered(texts)

    async def run():
        async with batching(small, tokens=80) as batcher:
            found = await batcher.vectors([text(10, str(i)) for i in range(8)])
            return found[:, 0, 0].tolist(), batcher.budget.tokens

    assert asyncio.run(run()) == ([0, 1, 2, 3, 4, 5, 6, 7], 20)


def test_stopping_finishes_what_waits_and_takes_no_more():
    async def run():
        held = Held()
        async with batching(held) as batcher:
            (waiting,) = await asked(batcher, [text(90, "1"), text(90, "2")])
            await until(lambda: held.batches)
            stopping = asyncio.ensure_future(asyncio.to_thread(batcher.stop))
            await until(lambda: not batcher.alive)
            with pytest.raises(RefusedError, match="stopping"):
                await batcher.vectors([text(1)])
            held.go.set()
            await stopping
            return (await waiting)[:, 0, 0].tolist()

    assert asyncio.run(run()) == [1, 2]


def test_a_loop_that_is_closed_does_not_stop_the_thread():
    held = Held()
    batcher = Batcher(held, Budget(100), 1000).start()

    async def leave():
        await asked(batcher, [text(1)])
        await until(lambda: held.batches)

    asyncio.run(leave())
    held.go.set()
    time.sleep(0.05)
    assert asyncio.run(batcher.vectors([text(3)]))[0, 0, 1] == 3
    batcher.stop()
