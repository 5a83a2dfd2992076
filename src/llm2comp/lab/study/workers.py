"""Run the jobs of a study: here, or in several processes (`use/workers.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

from llm2comp.lab.study.jobs import Bench, Job, Outcome
from llm2comp.use.workers import in_workers


def outcomes(jobs: Sequence[Job], bench: Bench, workers: int) -> Iterator[Outcome]:
    """Results of all jobs: in order with one worker (this process), otherwise as they finish.

    Raises:
        RunError: a worker died. Llm2CompError: what a job raises.
    """
    if workers == 1 or len(jobs) < 2:
        yield from chain.from_iterable(job.outcomes(bench) for job in jobs)
    else:
        found = in_workers(partial(_all_of, bench=bench), jobs, workers, bench.folder)
        yield from chain.from_iterable(found)


def _all_of(job: Job, bench: Bench) -> list[Outcome]:
    return list(job.outcomes(bench))
