"""Shards on a Ray cluster of this machine are those of one process, also if actors are killed."""

import json
import os
import signal
import threading
import time

import psutil
import pytest

import llm2comp
from llm2comp.errors import RunError
from tiny_run import finished, sentences, write_rows

ray = pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = pytest.mark.ray
ROWS = 300


@pytest.fixture(scope="module")
def cluster():
    """Two actors' worth of a cluster, with a store no larger than its least."""
    ray.init(
        num_cpus=2,
        object_store_memory=2**27,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rows = [{"id": n, "text": text} for n, text in enumerate(sentences(ROWS, words=5))]
    return write_rows(tmp_path_factory.mktemp("texts") / "in.jsonl", rows)


def run(source, out, **settings):
    options = {"shard_rows": 3, "keep": ("id",)} | settings.pop("options", {})
    chosen = llm2comp.EmbedOptions(**options)
    return llm2comp.embed([source], out, finished()[1], chosen, device="cpu", **settings)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    run(source, out)
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def actors():
    """Processes of the actors that make shards."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "ShardActor" in " ".join(process.cmdline())]


def test_an_actor_killed_in_the_middle_loses_nothing(cluster, source, whole, tmp_path):
    out, killed = tmp_path / "out", []

    def kill():
        """Both actors, one after the other, while shards are made."""
        for shards in (5, 40):
            while len(list(out.glob("*.parquet"))) < shards:
                time.sleep(0.01)
            victim = actors()[0].pid
            killed.append((victim, len(list(out.glob("*.parquet")))))
            os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    said = run(source, out, workers=2, engine="ray")
    killer.join(timeout=1)
    assert len(killed) == 2
    assert all(there < ROWS // 3 for _, there in killed), "vacuous: it was done before"
    assert f"{ROWS} embeddings of 32 dimensions, float32, in {ROWS // 3} shards" in said
    assert contents(out) == contents(whole)
    manifests = [json.loads((folder / "_manifest.json").read_text()) for folder in (out, whole)]
    assert manifests[0] == manifests[1]


def test_a_folder_is_gone_on_with_on_ray(cluster, source, whole, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    before = {}
    for number, shard in enumerate(sorted(out.glob("*.parquet"))):
        if number % 3:
            shard.unlink()
        else:
            before[shard.name] = shard.stat().st_mtime_ns
    run(source, out, workers=2, engine="ray")
    assert contents(out) == contents(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_an_error_of_an_actor_is_told_as_elsewhere(cluster, tmp_path):
    long = [{"text": text} for text in [*sentences(8, words=4), " ".join(sentences(30))]]
    source = write_rows(tmp_path / "in.jsonl", long)
    options = {"long_texts": "error", "keep": ()}
    with pytest.raises(RunError, match=r"row 8 \(from 0\): 1 texts are longer"):
        run(source, tmp_path / "out", engine="ray", options=options)
