"""Similarity of the memory tokens, and weights that merge redundant ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.hierarchy import fcluster, linkage  # type: ignore[import-untyped, unused-ignore]
from scipy.spatial.distance import squareform  # type: ignore[import-untyped, unused-ignore]

from llm2comp.errors import DataError
from llm2comp.measures.geometry import unit_vectors


def memory_correlation(memory_NKD: ArrayLike) -> NDArray[np.float64]:
    """Mean over N texts of the cosine of memory states i and j of one text, (K, K), diagonal 1.

    Raises:
        DataError: no texts, or a state that is zero or not finite; names text (row) and memory
            token.
    """
    x = unit_vectors(memory_NKD, shape="(N, K, D)", where="memory states")
    correlation = (x @ x.transpose(0, 2, 1)).mean(0)
    np.fill_diagonal(correlation, 1.0)
    return np.asarray(np.clip((correlation + correlation.T) / 2, -1.0, 1.0))


def clusters(correlation_KK: ArrayLike, threshold: float = 0.9) -> NDArray[np.int64]:
    """Cluster of each memory token, (K,), numbered from 0 in order of first appearance.

    The paper clusters memory tokens by correlation and names neither algorithm nor threshold. Ours:
    average-linkage agglomerative clustering on 1 − correlation; two clusters become one while their
    mean correlation is at least `threshold`.

    Raises:
        DataError: not a correlation matrix, or a threshold outside −1 to 1.
    """
    correlation = _checked(correlation_KK, threshold)
    if len(correlation) == 1:
        return np.zeros(1, dtype=np.int64)
    distances = squareform(np.maximum(1 - correlation, 0), checks=False)
    found = fcluster(linkage(distances, "average"), 1 - threshold, "distance").tolist()
    order = list(dict.fromkeys(found))
    return np.array([order.index(label) for label in found], dtype=np.int64)


def merge_weights(labels_K: ArrayLike) -> NDArray[np.float64]:
    """Weights (K,) of cluster-then-merge: w_i = 1 / (clusters × size of i's cluster); sum 1.

    The mean within each cluster, then across clusters. The partition is ours, see `clusters`.

    Raises:
        DataError: no labels.
    """
    labels = np.asarray(labels_K)
    if labels.ndim != 1 or len(labels) == 0:
        raise DataError(
            "no labels to merge by", expected="shape (K,) with K ≥ 1", found=f"shape {labels.shape}"
        )
    _, places, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return np.asarray(1 / (len(sizes) * sizes[places]))


def copies(correlation_KK: ArrayLike, threshold: float = 0.99) -> int:
    """Memory tokens whose correlation with an earlier one is at least `threshold`, 0 to K − 1.

    Raises as `clusters`.
    """
    correlation = _checked(correlation_KK, threshold)
    return int(np.tril(correlation >= threshold, -1).any(1).sum())


def _checked(correlation_KK: ArrayLike, threshold: float) -> NDArray[np.float64]:
    correlation = np.asarray(correlation_KK, dtype=np.float64)
    if (
        correlation.ndim != 2
        or len(correlation) == 0
        or correlation.shape[0] != correlation.shape[1]
    ):
        raise DataError(
            "not a correlation matrix",
            expected="shape (K, K) with K ≥ 1",
            found=f"shape {correlation.shape}",
        )
    if not (np.allclose(correlation, correlation.T) and np.allclose(correlation.diagonal(), 1)):
        raise DataError(
            "not a correlation matrix", expected="finite numbers, symmetric, 1 on the diagonal"
        )
    if not -1 <= threshold <= 1:
        raise DataError("no threshold of correlation", expected="within −1 and 1", found=threshold)
    return correlation
