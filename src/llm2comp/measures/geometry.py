"""How embeddings lie on the unit sphere, and what a cosine means there.

Embeddings come raw, (N, D), and are scaled to length 1 here. Every function raises a DataError that
names the row for a zero vector or one that is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

from llm2comp.errors import DataError
from llm2comp.measures.spectrum import finite_vectors, refuse

CHUNK = 1024  # rows, or pairs, at once
PERCENTS = (1, 5, 25, 50, 75, 95, 99)


def alignment(anchors_ND: ArrayLike, positives_ND: ArrayLike) -> float:
    """Mean ‖x − y‖² of related unit vectors, 0 (same) to 4 (arXiv 2005.10242, α = 2)."""
    x, y = _unit_pairs(anchors_ND, positives_ND)
    return float(((x - y) ** 2).sum(1).mean())


def uniformity(embeddings_ND: ArrayLike, t: float = 2.0) -> float:
    """Log of the mean of exp(−t ‖x_i − x_j‖²) over pairs i < j of unit vectors.

    Wang & Isola, arXiv 2005.10242.

    0 when all are the same; the lower, the more evenly spread. Needs two embeddings; O(N²D) time,
    O(ND) memory.
    """
    x = unit_vectors(embeddings_ND, least=2)
    total = 0.0
    for i in range(0, len(x), CHUNK):
        for j in range(i, len(x), CHUNK):
            kernel = np.exp(-t * (2 - 2 * x[i : i + CHUNK] @ x[j : j + CHUNK].T))
            total += float((np.triu(kernel, 1) if i == j else kernel).sum())
    return float(np.log(total / _pairs(len(x))))


def anisotropy(embeddings_ND: ArrayLike) -> float:
    """Mean cosine over all pairs i < j: 0 without a common direction, 1 when all are one.

    Ethayarajh 2019, arXiv 1909.00512.

    Exact in O(ND): ‖Σx‖² is the sum over all ordered pairs, i = j among them. Needs two embeddings.
    """
    x = unit_vectors(embeddings_ND, least=2)
    return float(((x.sum(0) ** 2).sum() - (x**2).sum()) / (2 * _pairs(len(x))))


def random_pair_cosines(
    embeddings_ND: ArrayLike, pairs: int = 10_000, seed: int = 0
) -> NDArray[np.float64]:
    """Cosines of random pairs i ≠ j, none drawn twice, (pairs,); of all pairs if there are no more.

    Needs two embeddings.

    Raises:
        DataError: fewer than one pair asked for.
    """
    x = unit_vectors(embeddings_ND, least=2)
    if pairs < 1:
        raise DataError("no pairs to draw", expected="pairs ≥ 1", found=pairs)
    numbers = np.random.default_rng(seed).choice(
        _pairs(len(x)), min(pairs, _pairs(len(x))), replace=False
    )
    # pair number n: rows i and i + step of a circle of N rows; steps up to N / 2 meet each pair
    # once
    step, i = np.divmod(numbers, len(x))
    j = (i + step + 1) % len(x)
    cuts = range(CHUNK, len(numbers), CHUNK)
    parts = zip(np.split(i, cuts), np.split(j, cuts), strict=True)
    return np.concatenate([_cosines(x[some], x[others]) for some, others in parts])


def related_pair_cosines(anchors_ND: ArrayLike, positives_ND: ArrayLike) -> NDArray[np.float64]:
    """Cosine of each anchor with its positive, (N,)."""
    return _cosines(*_unit_pairs(anchors_ND, positives_ND))


@dataclass(frozen=True)
class ScoreSummary:
    """What counts as similar for a model.

    Attributes:
        random: percent → cosine that so many percent of the random pairs stay below. related: the
        same for related pairs. threshold: cosine that 1 % of the random pairs pass. related_above:
        share of the related pairs that pass it, 0 to 1. roc_auc: chance that a related pair scores
        higher than a random one, ties half; 0.5 = no better than drawing lots.
    """

    random: dict[int, float]
    related: dict[int, float] | None = None
    threshold: float | None = None
    related_above: float | None = None
    roc_auc: float | None = None


def score_summary(
    random_cosines: ArrayLike, related_cosines: ArrayLike | None = None
) -> ScoreSummary:
    """Quantiles of both kinds of cosines and how well they part.

    Without related pairs, the random quantiles alone.

    Raises:
        DataError: no cosines of a kind, or one that is not finite.
    """
    random = _checked_cosines(random_cosines, "random pairs")
    if related_cosines is None:
        return ScoreSummary(_quantiles(random))
    related = _checked_cosines(related_cosines, "related pairs")
    threshold = float(np.quantile(random, 0.99))
    is_related = np.repeat([False, True], [len(random), len(related)])
    return ScoreSummary(
        random=_quantiles(random),
        related=_quantiles(related),
        threshold=threshold,
        related_above=float((related > threshold).mean()),
        roc_auc=float(roc_auc_score(is_related, np.concatenate([random, related]))),
    )


def unit_vectors(
    vectors: ArrayLike, shape: str = "(N, D)", least: int = 1, where: str | None = None
) -> NDArray[np.float64]:
    """The vectors, float64, each of length 1; checked by `finite_vectors`, and none may be zero."""
    x = finite_vectors(vectors, shape, least, where)
    largest = np.abs(x).max(-1, keepdims=True)
    refuse(largest[..., 0] == 0, "a vector is zero and has no direction", where)
    x = x / largest  # or the squares of very large and very small numbers would be lost
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


def _unit_pairs(
    anchors_ND: ArrayLike, positives_ND: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = unit_vectors(anchors_ND, where="anchors"), unit_vectors(positives_ND, where="positives")
    if x.shape != y.shape:
        raise DataError(
            "anchors and positives do not pair up",
            expected=f"positives of shape {x.shape}",
            found=y.shape,
        )
    return x, y


def _pairs(count: int) -> int:
    return count * (count - 1) // 2


def _cosines(x_ND: NDArray[np.float64], y_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.clip(np.einsum("nd,nd->n", x_ND, y_ND), -1.0, 1.0))


def _checked_cosines(cosines_N: ArrayLike, where: str) -> NDArray[np.float64]:
    cosines = np.asarray(cosines_N, dtype=np.float64)
    if cosines.ndim != 1 or len(cosines) == 0:
        raise DataError(
            "no cosines",
            where=where,
            expected="shape (N,) with N ≥ 1",
            found=f"shape {cosines.shape}",
        )
    refuse(~np.isfinite(cosines), "a cosine is not finite", where)
    return cosines


def _quantiles(cosines_N: NDArray[np.float64]) -> dict[int, float]:
    values = np.percentile(cosines_N, PERCENTS)
    return dict(zip(PERCENTS, values.tolist(), strict=True))
