"""`python -m benchmarks.serving [MODEL] [--only PART] [--minutes M] [--requests N]`: a server in a
process of its own, clients in this one.

load        texts/s at 64 clients with 16 texts a request, beside `embed` of them; p50, p99
one-by-one  the same, with batches of one text
overhead    one short text over HTTP, and through the bare model, in turns
checked     20,000 requests of 32 clients, every answer held against the model's own
overload    ten times as many clients as the queue takes, who ask again at once, for two minutes;
            beside them honest ones, who wait as they are told: who is answered, and memory

Wall time and processor time; on a busy machine only the latter compares.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import psutil

import llm2comp
from llm2comp.system.console import GENERAL_TINY, say

WORDS = [
    "the",
    "a",
    "of",
    "memory",
    "context",
    "text",
    "model",
    "small",
    "large",
    "reads",
    "writes",
    "keeps",
    "fox",
    "lazy",
    "quick",
    "over",
]
CLIENTS, TEXTS = 64, 16


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 4 to 120 words, most of them short."""
    rng = random.Random(seed)
    lengths = [min(120, max(4, int(rng.lognormvariate(3, 0.8)))) for _ in range(count)]
    return [" ".join(rng.choices(WORDS, k=length)) for length in lengths]


@contextlib.contextmanager
def server(model: str, *options: str) -> Iterator[tuple[str, psutil.Process, float]]:
    """Its address, its process, and the seconds from start to ready."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "llm2comp", "serve", model, "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        while "Ctrl-C ends" not in line:
            assert line, "no server"
            line = process.stderr.readline()
        port = re.search(r":(\d+):", line)
        assert port is not None
        url = f"http://127.0.0.1:{port[1]}"
        while True:
            with contextlib.suppress(httpx.ConnectError):
                assert httpx.get(f"{url}/ready").status_code == 200
                break
        try:
            yield url, psutil.Process(process.pid), time.perf_counter() - begin
        finally:
            process.terminate()


def client(url: str, most: int = 1000) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
    return httpx.AsyncClient(base_url=url, timeout=120, limits=limits)


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def ask_all(url: str, model: str, requests: list[list[str]], clients: int) -> list[float]:
    """Milliseconds of each request; so many clients, each of which asks one after the other."""
    left, seconds = list(requests), []
    async with client(url) as http:

        async def one() -> None:
            while left:
                body = {"model": model, "input": left.pop(), "encoding_format": "base64"}
                begin = time.perf_counter()
                answer = await http.post("/v1/embeddings", json=body)
                assert answer.status_code == 200, answer.text
                seconds.append(1000 * (time.perf_counter() - begin))

        await asyncio.gather(*(one() for _ in range(clients)))
    return seconds


def load(model: str, *options: str, count: int = 2 * CLIENTS * TEXTS) -> float:
    """Texts per second of the server's processor time."""
    asked = texts(count)
    requests = [asked[i : i + TEXTS] for i in range(0, count, TEXTS)]
    with server(model, *options) as (url, process, ready):
        asyncio.run(ask_all(url, model, requests[:CLIENTS], CLIENTS))
        begin, used = time.perf_counter(), cpu(process)
        found = asyncio.run(ask_all(url, model, requests, CLIENTS))
        wall, used = time.perf_counter() - begin, cpu(process) - used
    p50, p99 = np.percentile(found, [50, 99])
    say(
        f"{' '.join(options) or 'load'}: {count / wall:.1f} texts/s, {count / used:.1f} per second "
        f"of processor time; p50 {p50:.0f} ms, p99 {p99:.0f} ms; ready after {ready:.1f} s"
    )
    return count / used


def in_batch(model: str, count: int = 2 * CLIENTS * TEXTS) -> float:
    """Texts per second of processor time of `embed` in this process."""
    encoder, asked = llm2comp.load(model, "cpu", merged=True), texts(count)
    llm2comp.embed_texts(encoder, asked[:200])
    begin, used = time.perf_counter(), time.process_time()
    llm2comp.embed_texts(encoder, asked)
    wall, used = time.perf_counter() - begin, time.process_time() - used
    say(f"embed: {count / wall:.1f} texts/s, {count / used:.1f} per second of processor time")
    return count / used


def overhead(model: str, rounds: int = 200) -> None:
    """Wall time and processor time of one short text, over HTTP and through the bare model."""
    import torch

    encoder, text = llm2comp.load(model, "cpu", merged=True), "a short text about foxes"
    wall: dict[str, list[float]] = {"bare": [], "http": []}
    used = dict.fromkeys(wall, 0.0)
    with server(model) as (url, process, _), httpx.Client(base_url=url) as http:
        body = {"model": model, "input": text, "encoding_format": "base64"}

        def bare() -> None:
            with torch.inference_mode():
                features = encoder.preprocess([text])
                encoder(features)["sentence_embedding"].numpy()

        def over_http() -> None:
            assert http.post("/v1/embeddings", json=body).status_code == 200

        for number in range(rounds + 20):
            for name, work, timed in (
                ("bare", bare, time.process_time),
                ("http", over_http, lambda: cpu(process)),
            ):
                begin, before = time.perf_counter(), timed()
                work()
                if number >= 20:
                    wall[name].append(1000 * (time.perf_counter() - begin))
                    used[name] += 1000 * (timed() - before) / rounds
    for name, found in wall.items():
        low, p50, p99 = np.percentile(found, [1, 50, 99])
        say(f"{name}: p1 {low:.1f}, p50 {p50:.1f}, p99 {p99:.1f} ms; processor {used[name]:.1f} ms")


def checked(model: str, count: int, clients: int = 32) -> None:
    """Every answer of many concurrent requests against the model's own vector of its text."""
    pool = [*(text[:60] for text in texts(120, seed=1)), "", "Ünicode 記憶 🧠"]
    encoder = llm2comp.load(model, "cpu", merged=True)
    own = llm2comp.embed_texts(encoder, pool).numpy()
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    assert (own @ own.T - np.eye(len(own))).max() < 0.9999, "texts that are told apart"
    rng, wrong, begin = random.Random(0), 0, time.perf_counter()

    async def run(url: str) -> float:
        nonlocal wrong
        left, lowest = count, 1.0
        async with client(url) as http:

            async def one() -> None:
                nonlocal left, lowest, wrong
                while left > 0:
                    left -= 1
                    places = rng.choices(range(len(pool)), k=rng.randint(1, 3))
                    body = {"model": model, "input": [pool[i] for i in places]}
                    answer = await http.post("/v1/embeddings", json=body)
                    data = answer.json()["data"]
                    found = np.array([item["embedding"] for item in data], dtype=np.float32)
                    cosines = (found * own[places]).sum(1)
                    lowest = min(lowest, float(cosines.min()))
                    wrong += len(data) != len(places) or bool((cosines < 0.99999).any())

            await asyncio.gather(*(one() for _ in range(clients)))
        return lowest

    with server(model) as (url, _, _):
        lowest = asyncio.run(run(url))
    seconds = time.perf_counter() - begin
    say(f"checked: {count:,} requests, {wrong} wrong, lowest cosine {lowest:.7f}; {seconds:.0f} s")
    assert wrong == 0


def overload(model: str, minutes: float) -> None:
    """Clients who ask again at once, and honest ones among them."""
    body = {"model": model, "input": texts(8, seed=2), "encoding_format": "base64"}
    short = {"model": model, "input": "a short text", "encoding_format": "base64"}
    told: Counter[int] = Counter()
    honest: list[float] = []
    given_up, memory = 0, []

    async def run(url: str, process: psutil.Process) -> None:
        nonlocal given_up
        until = time.perf_counter() + 60 * minutes
        async with client(url) as http:

            async def rude() -> None:
                while time.perf_counter() < until:
                    told[(await http.post("/v1/embeddings", json=body)).status_code] += 1

            async def patient() -> None:
                nonlocal given_up
                while time.perf_counter() < until:
                    begin = time.perf_counter()
                    for _ in range(20):
                        answer = await http.post("/v1/embeddings", json=short)
                        if answer.status_code == 200:
                            honest.append(time.perf_counter() - begin)
                            break
                        await asyncio.sleep(float(answer.headers["retry-after"]))
                    else:
                        given_up += 1
                    await asyncio.sleep(1)

            async def watch() -> None:
                while time.perf_counter() < until:
                    memory.append(process.memory_info().rss / 2**20)
                    await asyncio.sleep(1)

            clients = [rude() for _ in range(100)] + [patient() for _ in range(4)]
            await asyncio.gather(*clients, watch())

    # ten clients' texts fill this queue
    with server(model, "--max-waiting-tokens", "3000") as (url, process, _):
        asyncio.run(run(url, process))
    tenth = max(1, len(memory) // 10)
    p50, p99 = np.percentile(honest, [50, 99]) if honest else (np.nan, np.nan)
    early, late = np.mean(memory[tenth : 2 * tenth]), np.mean(memory[-tenth:])
    say(
        f"overload, {minutes:g} min: {told[200]:,} answered, {told[429]:,} refused, "
        f"{sum(told.values()) - told[200] - told[429]:,} other; honest clients: {len(honest):,} "
        f"answered (p50 {p50:.1f} s, p99 {p99:.1f} s), {given_up} gave up after 20 tries; memory "
        f"{early:.0f} MiB in the second tenth, {late:.0f} in the last, {max(memory):.0f} at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", nargs="?", default=GENERAL_TINY)
    parser.add_argument("--only", choices=("load", "overhead", "checked", "overload"))
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--requests", type=int, default=20_000)
    asked: Any = parser.parse_args()
    if asked.only in (None, "load"):
        batch, together = in_batch(asked.model), load(asked.model)
        alone = load(asked.model, "--max-tokens-per-batch", "1", "--max-waiting-tokens", "1000000")
        say(
            f"processor time: {together / batch:.2f} of embed; batching gains "
            f"{together / alone:.2f} over one by one"
        )
    if asked.only in (None, "overhead"):
        overhead(asked.model)
    if asked.only in (None, "checked"):
        checked(asked.model, asked.requests)
    if asked.only in (None, "overload"):
        overload(asked.model, asked.minutes)


if __name__ == "__main__":
    main()
