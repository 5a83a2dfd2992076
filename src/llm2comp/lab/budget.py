"""What a vector may cost: memory tokens × dimensions × precision × scoring → quality and bytes.

    row            what is stored of a passage
    mean           the mean of the last j memory states, its first d dimensions, of length 1
    maxsim         j states of d dimensions, each of length 1; a query scores by late interaction
    float32 ...    the numbers of it: float32, float16, int8 (a range per dimension), binary (signs)

Queries stay float32; what is stored is turned back into float32 to be scored. All rows come from
one pass of the encoder over the texts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings

from llm2comp.data.loaded import Pair
from llm2comp.data.weak_pairs import Task, opening
from llm2comp.errors import DataError, ModelFolderError
from llm2comp.lab.evaluation.retrieval import DEPTH, Collection
from llm2comp.model.encoder import MemoryEncoder
from llm2comp.model.memory import Order, prefix_of
from llm2comp.model.vectors import embed_texts, memory_states, unit_length
from llm2comp.storage.export import export
from llm2comp.storage.loading import card_facts, load
from llm2comp.storage.places import live_place
from llm2comp.system.console import say

PRECISIONS = ("float32", "float16", "int8", "binary")
LEAST_QUERIES, TIMED = 5, 20
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Choice:
    """A row: what is stored of a passage, and what it gives.

    `ms_per_query`: to score and rank all passages by numpy, on one query; embedding it not counted.
    """

    tokens: int
    dims: int
    precision: str
    scoring: str
    ndcg_at_10: float
    bytes_per_passage: int
    ms_per_query: float


def budget(
    model: str, texts: Sequence[str], pairs: Sequence[Pair] = (), device: str | None = None
) -> list[Choice]:
    """Measure every row on texts, cheapest first.

    Args:
        model: any encoder; of one without memory tokens only dimensions and precision vary.
        texts: passages to be found. Without pairs their first sentences ask for the rest of them.
        pairs: questions and their answers, which join the passages.
        device: `cpu`, `cuda`, `mps`; default: the best there is.

    Raises:
        DataError: too few queries. ModelFolderError: an encoder that projects its memory states.
    """
    task = _task(texts, pairs)
    collection = Collection(task.queries, task.documents, task.relevant)
    say(f"{len(task.queries):,} queries over {len(task.documents):,} passages")
    encoder = load(live_place(model), device)
    queries_QKD = _states(encoder, list(task.queries.values()), "query")
    passages_NKD = _states(encoder, list(task.documents.values()), "document")
    module: Any = encoder[0]
    order = module.compressor.order if isinstance(module, MemoryEncoder) else "last"
    found = []
    for j, d, scoring in _shapes(*passages_NKD.shape[1:]):
        queries_QJD, passages_NJD = (
            _shaped(states, j, d, order, scoring) for states in (queries_QKD, passages_NKD)
        )
        for precision in PRECISIONS:
            stored, back = _stored(passages_NJD, precision)
            ranked, times = [], []
            for number, query_JD in enumerate(queries_QJD):
                begin = time.perf_counter()
                scores_N = np.einsum("jd,nkd->njk", query_JD, back(stored)).max(2).sum(1)
                best = np.argsort(-scores_N, kind="stable")[:DEPTH]
                if number < TIMED:
                    times.append(1000 * (time.perf_counter() - begin))
                ranked.append([(list(task.documents)[i], float(scores_N[i])) for i in best])
            ndcg = float(collection.ndcg_of_each(ranked).mean())
            size = stored.nbytes // len(stored)
            median = statistics.median(times)
            found.append(Choice(j, d, precision, scoring, ndcg, size, round(median, 3)))
    return sorted(found, key=lambda row: (row.bytes_per_passage, -row.ndcg_at_10))


def worth(rows: Sequence[Choice]) -> list[Choice]:
    """Rows that none is better than at the same bytes or fewer."""
    kept: list[Choice] = []
    for row in rows:
        if not kept or row.ndcg_at_10 > kept[-1].ndcg_at_10:
            kept.append(row)
    return kept


def table(rows: Sequence[Choice]) -> Table:
    """Rows as a rich table, numbered as `--export` takes them."""
    shown = Table("row", "tokens", "dims", "precision", "scoring", "nDCG@10", "bytes", "ms/query")
    for number, row in enumerate(rows, 1):
        figures = (f"{100 * row.ndcg_at_10:.1f}", f"{row.bytes_per_passage:,}")
        names = (str(row.tokens), str(row.dims), row.precision, row.scoring)
        shown.add_row(str(number), *names, *figures, f"{row.ms_per_query:.2f}")
    return shown


def export_row(model: str, row: Choice, folder: Path, device: str | None = None) -> str:
    """Write the encoder of a row as a stock folder; returns the call that gives its vectors.

    Raises:
        ModelFolderError: late interaction over fewer states or dimensions than there are; an
            encoder that is exported already.
    """
    encoder = load(live_place(model), device)
    module: Any = encoder[0]
    if not isinstance(module, MemoryEncoder):
        raise ModelFolderError(
            "is exported already", where=model, fix="encode with truncate_dim and precision"
        )
    whole = (row.tokens, row.dims) == (module.compressor.states, module.compressor.width)
    if row.scoring == "maxsim" and not whole:
        raise ModelFolderError(
            "no stock folder scores some of the states",
            where="--export",
            expected="a row of mean, or of maxsim with all tokens and dimensions",
            found=f"maxsim, {row.tokens} tokens, {row.dims} dimensions",
        )
    if row.scoring == "mean":
        module.compressor.use_prefix(row.tokens)
        encoder.truncate_dim = row.dims if row.dims < module.compressor.width else None
    export(encoder, folder, card_facts(model), multi_vector=row.scoring == "maxsim")
    kind = "MultiVectorEncoder" if row.scoring == "maxsim" else "SentenceTransformer"
    precision = {"binary": ', precision="ubinary"', "int8": ', precision="int8"'}
    return f'{kind}("{folder}").encode(texts{precision.get(row.precision, "")})'


def _task(texts: Sequence[str], pairs: Sequence[Pair]) -> Task:
    """Each question once, with all of its answers."""
    task, queries, ids = Task(), dict[str, str](), dict[str, str]()

    def add(text: str) -> str:
        return ids.setdefault(text, f"d{len(ids)}")

    def ask(question: str, answer: str) -> None:
        query = queries.setdefault(question, f"q{len(queries)}")
        task.relevant.setdefault(query, set()).add(add(answer))

    for pair in pairs:
        ask(pair.anchor, pair.positive)
    for text in dict.fromkeys(texts):
        if not pairs and (asked := opening(text)):
            ask(*asked)
        else:
            add(text)
    task.queries.update((name, text) for text, name in queries.items())
    task.documents.update((name, text) for text, name in ids.items())
    if len(task.queries) < LEAST_QUERIES:
        raise DataError(
            "too few queries to measure by",
            expected=f"{LEAST_QUERIES} or more questions, or texts of several sentences",
            found=len(task.queries),
            fix="give --pairs: questions and their answers",
        )
    return task


def _states(model: SentenceTransformer, texts: list[str], role: str) -> Floats:
    """Memory states of texts, (N, K, D); the embedding alone, K = 1, of other encoders."""
    module: Any = model[0]
    if not isinstance(module, MemoryEncoder) or not module.compressor.memory.count:
        return embed_texts(model, texts, role=role).numpy()[:, None]
    if module.compressor.projection is not None:
        raise ModelFolderError(
            "projects the mean of its memory states: they are no vectors of their own",
            where="encoder.projection",
        )
    rows = module.rows(texts, model.prompts.get(role), role)
    return memory_states(module.compressor, rows).numpy()


def _shapes(count: int, width: int) -> Iterator[tuple[int, int, str]]:
    """(tokens, dimensions, scoring) of the rows: halves, from all of them down."""
    tokens = [count // 2**n for n in range(count.bit_length())]
    for j in tokens:
        for d in (width // 2**n for n in range(4) if width % 2**n == 0 and width // 2**n >= 8):
            yield j, d, "mean"
            if j > 1:
                yield j, d, "maxsim"


def _shaped(states_NKD: Floats, j: int, d: int, order: Order, scoring: str) -> Floats:
    kept = prefix_of(torch.from_numpy(states_NKD), j, order).numpy()
    kept = (kept.mean(1, keepdims=True) if scoring == "mean" else kept)[..., :d]
    return unit_length(kept)


def _stored(vectors_NKD: Floats, precision: str) -> tuple[NDArray[Any], Any]:
    """What is kept of vectors, and what makes float32 of it again."""
    flat_MD = vectors_NKD.reshape(-1, vectors_NKD.shape[-1])
    shape = vectors_NKD.shape
    if precision == "int8":
        low, high = flat_MD.min(0), flat_MD.max(0)
        step = np.where(high > low, (high - low) / 255, 1).astype(np.float32)
        kept = np.asarray(
            quantize_embeddings(flat_MD, "int8", ranges=np.stack([low, high]))
        ).reshape(shape)
        return kept, lambda x: (x.astype(np.float32) + 128.5) * step + low
    if precision == "binary":
        kept = np.asarray(quantize_embeddings(flat_MD, "ubinary")).reshape(*shape[:2], -1)
        return kept, lambda x: 2 * np.unpackbits(x, axis=-1, count=shape[-1]).astype(np.float32) - 1
    return vectors_NKD.astype(precision), lambda x: x.astype(np.float32)
