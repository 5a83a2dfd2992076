"""All measures of collapse of one sample of texts at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm2comp.measures.clusters import memory_correlation
from llm2comp.measures.geometry import anisotropy, uniformity
from llm2comp.measures.spectrum import count_above, effective_rank, participation_ratio, spectrum


@dataclass(frozen=True)
class Collapse:
    """Figures of N embeddings of D dimensions; each is explained where it is computed.

    `spectrum` holds the min(D, N − 1) singular values that N texts can have above zero. With N ≤ D
    the effective rank, participation ratio and count are bounded by N − 1: comparable between
    models on the same texts, but not the model's own.
    """

    texts: int
    dimensions: int
    effective_rank: float
    participation_ratio: float
    above_one_percent: int
    uniformity: float
    anisotropy: float
    spectrum: list[float]
    memory_correlation: list[list[float]] | None

    @property
    def enough_texts(self) -> bool:
        """Whether there are more texts than dimensions."""
        return self.texts > self.dimensions


def collapse(embeddings_ND: ArrayLike, memory_NKD: ArrayLike | None = None) -> Collapse:
    """Measure a sample of embeddings, and of the memory states that they come from, if known.

    Raises:
        DataError: fewer than two texts, or a vector that is zero or not finite; names the row.
    """
    x_ND: NDArray[np.float64] = np.asarray(embeddings_ND, dtype=np.float64)
    values = spectrum(x_ND)
    return Collapse(
        texts=len(x_ND),
        dimensions=x_ND.shape[1],
        effective_rank=effective_rank(values),
        participation_ratio=participation_ratio(values),
        above_one_percent=count_above(values),
        uniformity=uniformity(x_ND),
        anisotropy=anisotropy(x_ND),
        spectrum=[float(f"{value:.5g}") for value in values[: max(1, len(x_ND) - 1)]],
        memory_correlation=None
        if memory_NKD is None
        else memory_correlation(memory_NKD).round(5).tolist(),
    )
