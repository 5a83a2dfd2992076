"""Local sets for the watch of a training: mteb scores the encoder as it is at some step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm2comp.lab.evaluation.mteb_encoder import MtebEncoder
from llm2comp.lab.evaluation.running import run_task
from llm2comp.lab.evaluation.tasks import local_tasks
from llm2comp.training.sample import unchanged_randomness

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class LocalTasks:
    """The sets below some folders.

    Raises:
        DataError: a folder that holds none, or a malformed set.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        with unchanged_randomness():  # mteb seeds everything when it makes a task
            self.tasks = [task for folder in folders for task in local_tasks(folder)]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sets."""
        return tuple(task.metadata.name for task in self.tasks)

    def __call__(self, model: SentenceTransformer) -> dict[str, float]:
        """Name → main score, 0 to 1."""
        encoder = MtebEncoder(model, "llm2comp/watch", "none", progress=False)
        return {
            name: round(run_task(encoder, task).score, 5)
            for name, task in zip(self.names, self.tasks, strict=True)
        }
