"""Memory correlation against loops, clusters against a naive average linkage, merge weights against
means of means.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from llm2comp.errors import DataError
from llm2comp.measures.clusters import clusters, copies, memory_correlation, merge_weights
from llm2comp.model.memory import embedding_from_memory

TEXTS, D = 12, 16
PLANTED = [0, 1, 0, 2, 1, 0, 3, 2]


def planted_memory(labels, noise, seed=0, texts=TEXTS):
    """Memory states (texts, K, D): for each text one direction a cluster, at right angles, plus
    noise, of many lengths.
    """
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((texts, D, D)))[0]
    states = directions[:, labels] + noise * rng.standard_normal(
        (texts, len(labels), D)
    ) / math.sqrt(D)
    return states * rng.uniform(0.1, 10, (texts, len(labels), 1))


def naive_correlation(memory):
    texts, k, _ = memory.shape
    out = np.zeros((k, k))
    for i, j in itertools.product(range(k), repeat=2):
        for n in range(texts):
            a, b = memory[n, i], memory[n, j]
            out[i, j] += sum(a * b) / math.sqrt(sum(a * a)) / math.sqrt(sum(b * b)) / texts
    return out


def naive_clusters(correlation, threshold):
    """Average linkage as defined: join the two groups with the highest mean correlation while that
    is high enough.
    """
    groups = [[i] for i in range(len(correlation))]
    while len(groups) > 1:
        means = {
            (a, b): np.mean([correlation[i, j] for i in groups[a] for j in groups[b]])
            for a, b in itertools.combinations(range(len(groups)), 2)
        }
        (a, b), best = max(means.items(), key=lambda item: item[1])
        if best < threshold:
            break
        groups[a] += groups.pop(b)
    order = sorted(groups, key=min)
    return [
        next(number for number, group in enumerate(order) if i in group)
        for i in range(len(correlation))
    ]


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_memory_correlation_is_the_loop(noise):
    memory = planted_memory(PLANTED, noise)
    found = memory_correlation(memory)
    assert found.dtype == np.float64
    assert found.shape == (8, 8)
    np.testing.assert_allclose(found, naive_correlation(memory), atol=1e-12)
    assert (found.diagonal() == 1).all()
    assert (found == found.T).all()


def test_correlation_of_copies_and_of_right_angles():
    found = memory_correlation(planted_memory(PLANTED, 0.0))
    labels = np.array(PLANTED)
    np.testing.assert_allclose(found, labels[:, None] == labels, atol=1e-12)


def test_correlation_is_of_states_of_the_same_text():
    """Two texts, two tokens: cosines 1 and 0 average to a half, whatever holds between texts."""
    memory = np.array([[[1.0, 0], [5.0, 0]], [[0, 1.0], [2.0, 0]]])
    np.testing.assert_allclose(memory_correlation(memory), [[1, 0.5], [0.5, 1]])


def test_correlation_knows_neither_scale_nor_rotation():
    memory = planted_memory(PLANTED, 1.0)
    plain = memory_correlation(memory)
    turn, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((D, D)))
    lengths = np.geomspace(1e-200, 1e200, TEXTS * 8).reshape(TEXTS, 8, 1)
    for other in (memory @ turn, memory * 7, memory * lengths):
        np.testing.assert_allclose(memory_correlation(other), plain, atol=1e-10)
    assert 0.05 < np.abs(plain - np.eye(8)).max() < 0.95


def test_smallest_memories():
    assert memory_correlation(np.full((1, 1, 1), -3.0)).tolist() == [[1.0]]
    assert memory_correlation([[[2.0], [-1.0], [4.0]]]).tolist() == [
        [1, -1, 1],
        [-1, 1, -1],
        [1, -1, 1],
    ]
    single = memory_correlation(planted_memory([0], 1.0).astype(np.float32))
    assert (single.dtype, single.tolist()) == (np.float64, [[1.0]])


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_planted_clusters_are_recovered(noise):
    correlation = memory_correlation(planted_memory(PLANTED, noise))
    found = clusters(correlation)
    assert found.dtype == np.int64
    assert found.tolist() == PLANTED
    assert copies(correlation, 0.9) == len(PLANTED) - len(set(PLANTED))
    assert clusters(correlation, threshold=-1).tolist() == [0] * 8


def test_first_appearance_gives_the_numbers():
    """The same groups in any order of tokens: numbers rise in the order in which groups are first
    met.
    """
    correlation = memory_correlation(planted_memory(PLANTED, 0.1))
    orders = [np.random.default_rng(seed).permutation(8) for seed in range(10)]
    for order in orders:
        found = clusters(correlation[np.ix_(order, order)]).tolist()
        names = [PLANTED[i] for i in order]
        assert found == [list(dict.fromkeys(names)).index(name) for name in names]


@pytest.mark.parametrize("threshold", [-0.2, 0.0, 0.2, 0.4, 0.6, 0.9])
def test_clusters_are_those_of_naive_average_linkage(threshold):
    sizes = set()
    for seed in range(8):
        labels = np.random.default_rng(seed).integers(0, 4, 9)
        correlation = memory_correlation(planted_memory(labels, 0.9, seed, texts=3))
        found = clusters(correlation, threshold).tolist()
        assert found == naive_clusters(correlation, threshold)
        sizes.add(len(set(found)))
    assert sizes - {9} if threshold < 0.9 else sizes == {9}, (
        "the noise must leave something to decide"
    )


def test_average_linkage_neither_single_nor_complete():
    """A chain 0 – 1 – 2: {0, 1} joins 2 by the mean of 0.8 and 0.5, neither by the nearer nor by
    the farther.
    """
    chain = np.array([[1.0, 0.9, 0.5], [0.9, 1.0, 0.8], [0.5, 0.8, 1.0]])
    assert clusters(chain, 0.64).tolist() == [0, 0, 0], "complete linkage would ask 0.5 to do"
    assert clusters(chain, 0.66).tolist() == [0, 0, 1], "single linkage would take 0.8"
    assert clusters(chain, 0.91).tolist() == [0, 1, 2]


def test_correlation_at_the_threshold_joins():
    assert clusters([[1.0, 0.9], [0.9, 1.0]]).tolist() == [0, 0]
    assert clusters([[1.0, 0.899], [0.899, 1.0]]).tolist() == [0, 1]
    assert copies([[1.0, 0.99], [0.99, 1.0]]) == 1
    assert copies([[1.0, 0.989], [0.989, 1.0]]) == 0


def test_one_memory_token():
    assert clusters([[1.0]]).tolist() == [0]
    assert merge_weights([0]).tolist() == [1.0]
    assert copies([[1.0]]) == 0


@pytest.mark.parametrize(
    "labels", [PLANTED, [0] * 8, list(range(8)), [0, 1, 1, 1, 1, 1, 1, 1], [5, 2, 5, 9]]
)
def test_merge_weights_give_the_mean_of_means(labels):
    weights = merge_weights(labels)
    assert weights.sum() == pytest.approx(1.0)
    memory = np.random.default_rng(4).standard_normal((TEXTS, len(labels), D)).astype(np.float32)
    groups = [[i for i, label in enumerate(labels) if label == group] for group in set(labels)]
    expected = np.mean([memory[:, group].mean(1) for group in groups], 0)
    found = embedding_from_memory(torch.from_numpy(memory), torch.from_numpy(weights))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_merge_weights_by_hand():
    np.testing.assert_allclose(merge_weights([0, 0, 0, 1]), [1 / 6, 1 / 6, 1 / 6, 1 / 2])
    np.testing.assert_allclose(merge_weights(list(range(4))), [0.25] * 4)
    np.testing.assert_allclose(merge_weights([0] * 4), [0.25] * 4)


def test_collapsed_memory_of_which_one_token_is_left():
    """Seven of eight tokens the same, as the paper finds after NLL."""
    labels = [0] * 7 + [1]
    correlation = memory_correlation(planted_memory(labels, 0.01))
    assert copies(correlation) == 6
    assert clusters(correlation).tolist() == labels
    np.testing.assert_allclose(merge_weights(clusters(correlation)), [1 / 14] * 7 + [1 / 2])


def test_copies_is_the_loop():
    correlation = memory_correlation(planted_memory(PLANTED, 0.5))
    off_diagonal = correlation[~np.eye(8, dtype=bool)]
    counts = set()
    for threshold in np.quantile(off_diagonal, np.linspace(0, 1, 9)):
        expected = sum(any(correlation[i, j] >= threshold for i in range(j)) for j in range(8))
        assert copies(correlation, threshold) == expected
        counts.add(expected)
    assert len(counts) >= 4
    assert max(counts) == 7


@pytest.mark.parametrize(
    ("value", "problem"), [(0.0, "zero"), (np.nan, "not finite"), (np.inf, "not finite")]
)
def test_bad_state_is_named_by_text_and_token(value, problem):
    memory = planted_memory(PLANTED, 0.1)
    memory[5, 2] = value
    with pytest.raises(
        DataError, match=rf"(?s)memory states: .*{problem}.*row 5, memory token 2, 1 in all"
    ):
        memory_correlation(memory)


@pytest.mark.parametrize("shape", [(3, 4), (0, 2, 4), (3, 0, 4), (3, 2, 0)])
def test_memory_of_another_shape(shape):
    with pytest.raises(DataError, match=r"\(N, K, D\)"):
        memory_correlation(np.ones(shape))


BAD_MATRICES = {
    "not square": np.ones((2, 3)),
    "empty": np.ones((0, 0)),
    "a vector": np.ones(3),
    "not symmetric": [[1.0, 0.2], [0.7, 1.0]],
    "distances": [[0.0, 0.2], [0.2, 0.0]],
    "not finite": [[1.0, np.nan], [np.nan, 1.0]],
}


@pytest.mark.parametrize("measure", [clusters, copies])
@pytest.mark.parametrize("matrix", BAD_MATRICES.values(), ids=BAD_MATRICES)
def test_what_is_no_correlation_matrix(measure, matrix):
    with pytest.raises(DataError, match="not a correlation matrix"):
        measure(matrix)


@pytest.mark.parametrize("measure", [clusters, copies])
@pytest.mark.parametrize("threshold", [90, -1.1, np.nan])
def test_threshold_outside_of_correlations(measure, threshold):
    with pytest.raises(DataError, match="within −1 and 1"):
        measure(np.eye(2), threshold)


def test_no_labels():
    for bad in ([], [[0, 1]]):
        with pytest.raises(DataError, match="no labels"):
            merge_weights(bad)
