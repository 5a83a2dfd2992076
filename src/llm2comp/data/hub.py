"""Data sets on the Hugging Face Hub: their rows, single files, their version."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from llm2comp.data.columns import Columns, check_columns
from llm2comp.data.tables import Rows
from llm2comp.errors import DataError, one_line
from llm2comp.recipe import PairData, TextData
from llm2comp.system.hub import hub, unasked

_ADVICE = (
    "check name and split; `hf auth login` for a gated set; HF_HUB_OFFLINE=1 finds only "
    "sets in the cache"
)


def hub_rows(spec: TextData | PairData, columns: Columns) -> Rows:
    """Rows of a data set. `datasets` downloads all of it, or streams it if there is a `limit`.

    Raises:
        DataError: no such set, split or column, or none that can be had offline.
    """
    import datasets

    streamed = {"streaming": True} if spec.limit and not datasets.config.HF_HUB_OFFLINE else {}
    with _explained(spec.source):
        with hub(spec.source):
            table = datasets.load_dataset(
                spec.source, spec.subset, split=spec.split, revision=spec.revision, **streamed
            )
        if table.column_names is not None:  # a stream may not know them
            check_columns(spec.source, columns, table.column_names)
            table = table.select_columns(list(dict.fromkeys(columns)))
        for number, row in enumerate(table, 1):
            yield f"row {number}", row


def hub_file(spec: TextData | PairData) -> Path:
    """Download one file of a data set's repository. Raises DataError if that fails."""
    import huggingface_hub

    assert spec.file is not None
    with _explained(spec.source), hub(spec.source):
        return Path(
            huggingface_hub.hf_hub_download(
                spec.source, spec.file, repo_type="dataset", revision=spec.revision
            )
        )


def hub_version(spec: TextData | PairData) -> str:
    """Configuration and commit of a set, offline those that `datasets` keeps.

    Raises DataError when there is no such set.
    """
    import datasets

    with _explained(spec.source), hub(spec.source):
        builder = datasets.load_dataset_builder(spec.source, spec.subset, revision=spec.revision)
        return f"{builder.config.name}:{builder.hash}"


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn any error of the Hub's libraries (some twenty kinds) into a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause = "; ".join(filter(None, (unasked(), f"{type(error).__name__}: {one_line(error)}")))
        raise DataError(
            f"not a file, nor a loadable Hub data set: {cause}", where=source, fix=_ADVICE
        ) from error
