"""All measures of a sample at once are the single measures, and say when there are too few texts
for the rank figures.
"""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from llm2comp.errors import DataError
from llm2comp.measures.clusters import memory_correlation
from llm2comp.measures.collapse import collapse
from llm2comp.measures.geometry import anisotropy, uniformity
from llm2comp.measures.spectrum import count_above, effective_rank, participation_ratio, spectrum

D, K = 16, 3


def sample(texts, seed=0):
    """Embeddings that lean one way, with a falling spectrum, and the memory states that they are
    the mean of.
    """
    rng = np.random.default_rng(seed)
    memory = rng.standard_normal((texts, K, D)) * np.geomspace(1, 0.05, D) + 0.3
    return memory.mean(1), memory


@pytest.mark.parametrize("texts", [2, 5, D, D + 1, 60])
def test_each_field_is_the_single_measure(texts):
    embeddings, memory = sample(texts)
    found = collapse(embeddings, memory)
    values = spectrum(embeddings)
    assert (found.texts, found.dimensions) == (texts, D)
    assert found.effective_rank == effective_rank(values)
    assert found.participation_ratio == participation_ratio(values)
    assert found.above_one_percent == count_above(values)
    assert found.uniformity == uniformity(embeddings)
    assert found.anisotropy == anisotropy(embeddings)
    np.testing.assert_allclose(found.memory_correlation, memory_correlation(memory), atol=5.1e-6)
    assert len(
        {found.effective_rank, found.participation_ratio, found.uniformity, found.anisotropy}
    ) == (4 if texts > 2 else 3)
    assert collapse(embeddings).memory_correlation is None
    assert collapse(embeddings.tolist(), memory.tolist()) == found


@pytest.mark.parametrize("texts", [2, 5, D - 1, D, D + 1, 60])
def test_spectrum_holds_the_values_that_so_many_texts_can_have(texts):
    """Against the eigenvalues of the covariance, written out."""
    embeddings, _ = sample(texts)
    centred = embeddings - embeddings.mean(0)
    expected = np.linalg.eigvalsh(centred.T @ centred / texts)[::-1]
    found = collapse(embeddings)
    assert len(found.spectrum) == min(D, texts - 1)
    np.testing.assert_allclose(found.spectrum, expected[: len(found.spectrum)], rtol=6e-5)
    assert (np.abs(expected[len(found.spectrum) :]) < 1e-12).all(), "what was cut is zero"
    assert min(found.spectrum) > 1e-6, "what was kept is not"
    assert found.enough_texts is (texts > D)
    assert found.effective_rank <= min(D, texts - 1) + 1e-9


def test_full_collapse():
    found = collapse(np.ones((5, 4)), np.ones((5, K, 4)))
    assert (found.effective_rank, found.participation_ratio, found.above_one_percent) == (1, 1, 0)
    assert (found.uniformity, found.anisotropy) == (pytest.approx(0), pytest.approx(1))
    assert found.spectrum == [0, 0, 0, 0]
    assert found.memory_correlation == np.ones((K, K)).tolist()


def test_no_collapse():
    """The 2·D points of a cross: every direction used alike; cosines −1 for D of the pairs, 0 for
    the others.
    """
    found = collapse(np.concatenate([np.eye(D), -np.eye(D)]))
    assert found.effective_rank == pytest.approx(D)
    assert found.participation_ratio == pytest.approx(D)
    assert found.above_one_percent == D
    assert found.spectrum == pytest.approx([1 / D] * D)
    pairs = D * (2 * D - 1)
    assert found.anisotropy == pytest.approx(-D / pairs)
    assert found.uniformity == pytest.approx(
        math.log((D * math.exp(-8) + (pairs - D) * math.exp(-4)) / pairs)
    )


def test_it_can_be_written_as_json():
    found = collapse(*sample(20))
    assert json.loads(json.dumps(asdict(found), allow_nan=False)) == asdict(found)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_named(value):
    embeddings, memory = sample(20)
    embeddings[7, 3] = value
    with pytest.raises(DataError, match="not finite") as caught:
        collapse(embeddings, memory)
    assert "row 7" in str(caught.value)


def test_zero_and_missing_vectors_are_refused():
    embeddings, memory = sample(20)
    with pytest.raises(DataError, match="N ≥ 2"):
        collapse(embeddings[:1])
    memory[4, 2] = 0
    with pytest.raises(DataError, match="zero") as caught:
        collapse(embeddings, memory)
    assert "row 4, memory token 2" in str(caught.value)
    embeddings[9] = 0
    with pytest.raises(DataError, match="zero") as caught:
        collapse(embeddings)
    assert "row 9" in str(caught.value)
