"""Spectra that are known in closed form."""

import numpy as np
import pytest

from llm2comp.errors import DataError
from llm2comp.measures.spectrum import count_above, effective_rank, participation_ratio, spectrum

D, N = 8, 64


def embeddings_with(values, shift=0.0, seed=0):
    """N embeddings whose covariance has exactly these eigenvalues, in a random basis."""
    rng = np.random.default_rng(seed)
    columns = rng.standard_normal((N, len(values)))
    columns, _ = np.linalg.qr(columns - columns.mean(0))  # mean-free, orthonormal
    basis, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    return columns * np.sqrt(N * np.asarray(values)) @ basis + shift


@pytest.mark.parametrize(
    "values", [np.ones(D), [3.0, 2, 1, 0.5, 0.1, 0, 0, 0], 1 / np.arange(1, D + 1) ** 1.5]
)
def test_spectrum_is_that_of_the_covariance(values):
    found = spectrum(embeddings_with(values, shift=5.0))
    assert found.shape == (D,)
    np.testing.assert_allclose(found, values, atol=1e-10)


def test_identity_covariance_has_full_rank():
    assert effective_rank(spectrum(embeddings_with(np.full(D, 0.3)))) == pytest.approx(D, abs=1e-6)


def test_one_direction_has_rank_one():
    line = np.outer(np.linspace(-1, 1, N), np.arange(1, D + 1))
    assert effective_rank(spectrum(line)) == pytest.approx(1.0, abs=1e-6)
    assert effective_rank(spectrum(np.ones((N, D)))) == 1.0, "all the same: no spread at all"


def test_two_equal_directions_have_rank_two_whatever_their_size():
    for size in (1e-6, 1.0, 1e6):
        assert effective_rank([size, size, 0, 0]) == pytest.approx(2.0)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_power_law(exponent):
    sigma = np.arange(1, 101) ** -exponent
    z = sigma.sum()
    # exp(−Σ p ln p) with ln p_i = −a ln i − ln Z
    entropy = sum(s / z * (exponent * np.log(i) + np.log(z)) for i, s in enumerate(sigma, 1))
    assert effective_rank(sigma) == pytest.approx(np.exp(entropy), rel=1e-12)
    assert 1 < effective_rank(sigma) < 100


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_power_law_of_embeddings_in_a_random_basis(exponent):
    sigma = np.arange(1, D + 1) ** -exponent
    found = spectrum(embeddings_with(sigma, shift=2.0))
    ratio = sum(sigma) ** 2 / sum(s * s for s in sigma)
    assert participation_ratio(sigma) == pytest.approx(ratio, rel=1e-12)
    assert participation_ratio(found) == pytest.approx(ratio, rel=1e-9)
    assert 1 < ratio < D
    for share in (0.15, 0.45, 0.9):  # i^-a >= share up to i = share^(-1/a)
        assert count_above(found, share) == min(D, int(share ** (-1 / exponent)))


def test_participation_ratio_and_count_at_the_ends():
    isotropic = spectrum(embeddings_with(np.full(D, 0.3)))
    assert participation_ratio(isotropic) == pytest.approx(D, abs=1e-9)
    assert count_above(isotropic) == D
    line = spectrum(np.outer(np.linspace(-1, 1, N), np.arange(1, D + 1)))
    assert participation_ratio(line) == pytest.approx(1.0, abs=1e-9)
    assert count_above(line) == 1
    nothing = spectrum(np.ones((N, D)))
    assert nothing.max() == 0
    assert participation_ratio(nothing) == 1.0, "as the effective rank"
    assert count_above(nothing) == count_above([]) == 0


def test_participation_ratio_by_hand():
    assert participation_ratio([3.0, 1.0]) == pytest.approx(16 / 10)
    assert participation_ratio([2.0, 2.0, 0.0, 0.0]) == pytest.approx(2.0)
    assert participation_ratio([1e-200, 1e-200]) == pytest.approx(2.0), "squares of these are lost"


@pytest.mark.parametrize(("share", "count"), [(1.0, 2), (0.51, 2), (0.5, 3), (0.01, 4), (0.0, 5)])
def test_count_above_takes_the_value_at_the_bound(share, count):
    assert count_above([2.0, 2.0, 1.0, 0.02, 0.0], share) == count


def test_count_above_asks_for_a_hundredth_by_default():
    assert count_above([1.0, 0.0101, 0.0099]) == 2


@pytest.mark.parametrize("measure", [effective_rank, participation_ratio, count_above])
def test_measures_know_neither_scale_nor_rotation_nor_shift(measure):
    sigma = np.arange(1, D + 1) ** -2.5
    plain = measure(spectrum(embeddings_with(sigma)))
    assert 1 < plain < D
    for other in (
        embeddings_with(sigma, seed=7),
        embeddings_with(sigma, shift=-30.0),
        1e-3 * embeddings_with(sigma),
    ):
        assert measure(spectrum(other)) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("measure", [effective_rank, participation_ratio])
def test_two_embeddings_and_one_dimension(measure):
    assert measure(spectrum([[0.0, 1.0, 2.0], [3.0, -1.0, 5.0]])) == pytest.approx(1.0, abs=1e-6)
    assert measure(spectrum([[1.0], [3.0], [4.0]])) == pytest.approx(1.0)


def test_rank_falls_as_the_spectrum_steepens():
    ranks = [
        effective_rank(spectrum(embeddings_with(np.arange(1, D + 1) ** -a)))
        for a in (0.0, 0.5, 1.0, 2.0, 4.0)
    ]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == pytest.approx(D)


def test_float32_and_one_dimension():
    assert spectrum(np.array([[1.0], [3.0]], dtype=np.float32)) == pytest.approx([1.0])


@pytest.mark.parametrize(
    "bad", [np.zeros((1, 4)), np.zeros(4), np.zeros((3, 0)), [[1.0, np.nan], [0.0, 1.0]]]
)
def test_what_has_no_spectrum(bad):
    with pytest.raises(DataError):
        spectrum(bad)


def test_row_that_is_not_finite_is_named():
    x = np.ones((5, 3))
    x[3, 1] = np.inf
    with pytest.raises(DataError, match=r"row 3, 1 in all"):
        spectrum(x)
