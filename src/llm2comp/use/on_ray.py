"""Shards on Ray: a pool of actors on one machine or many takes their numbers.

An actor reads the sources by itself and writes its shards into the folder, so both must lie where
every machine finds them; no text goes through Ray. A shard whose actor died is given to another.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llm2comp.errors import Llm2CompError, RunError, one_line
from llm2comp.use.making import Bench, make_shard

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of a cluster that we start: nothing large goes through its store.
OBJECT_STORE_BYTES = 2**27
# How often an actor that died is started again, before that is an error.
RESTARTS = 8


def on_ray(shards: Sequence[int], bench: Bench, workers: int) -> Iterator[int]:
    """Make shards by so many actors; gives rows done as they finish.

    The cluster is that of $RAY_ADDRESS, or of this process, else one is started here.

    Raises:
        RunError: an actor fails, or dies again and again. ModuleNotFoundError: no Ray.
    """
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if not ray.is_initialized():
        store = None if "RAY_ADDRESS" in os.environ else OBJECT_STORE_BYTES
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
            object_store_memory=store,
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    there = ray.cluster_resources()
    numbers = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
    )
    made = numbers.map_batches(
        ShardActor,
        fn_constructor_args=(bench.everywhere(),),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(shards))),
        num_cpus=min(1.0, there.get("CPU", 1.0) / workers),
        num_gpus=int(there.get("GPU", 0) >= workers and bench.device != "cpu"),
        ray_remote_args_fn=lambda: {"max_restarts": RESTARTS, "max_task_retries": RESTARTS},
    )
    try:
        for batch in made.iter_batches(batch_size=None, batch_format="numpy"):
            if error := "".join(batch["error"]):
                raise RunError(error)
            yield int(batch["rows"].sum())
    except ray.exceptions.RayError as error:
        fix = "if memory ran out, fewer --workers; then run it again"
        raise RunError(f"Ray stopped: {one_line(error)}", where=str(bench.out), fix=fix) from error


class ShardActor:
    """A process on Ray that makes shards; what goes wrong is told by value."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """Shard numbers → rows done, and an error or nothing."""
        try:
            rows = [make_shard(int(shard), self.bench) for shard in batch["shard"]]
        except Llm2CompError as error:
            return {"rows": [0], "error": [str(error)]}
        return {"rows": rows, "error": [""] * len(rows)}
