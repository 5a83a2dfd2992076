"""Measures on the unit sphere against double loops and closed forms."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from llm2comp.errors import DataError
from llm2comp.measures import geometry
from llm2comp.measures.geometry import (
    alignment,
    anisotropy,
    random_pair_cosines,
    related_pair_cosines,
    score_summary,
    uniformity,
)
from measuring import peak_bytes

D = 6


def draw(rows, width=D, seed=0, shift=0.0, lengths=True):
    """Embeddings of many lengths around a common direction; read-only, since no measure may change
    its input.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width)) + shift
    x *= rng.uniform(0.1, 10, (rows, 1)) if lengths else 1
    x.setflags(write=False)
    return x


def power_law(rows, exponent, seed=0):
    """Embeddings whose covariance has the eigenvalues i^-a in a random basis."""
    rng = np.random.default_rng(seed)
    columns = rng.standard_normal((rows, D))
    columns, _ = np.linalg.qr(columns - columns.mean(0))
    basis, _ = np.linalg.qr(rng.standard_normal((D, D)))
    return columns * np.sqrt(rows * np.arange(1, D + 1) ** -exponent) @ basis


def unit(x):
    return [
        [v / math.sqrt(sum(w * w for w in row)) for v in row]
        for row in np.asarray(x, dtype=float).tolist()
    ]


def squared_distances(x):
    return [
        sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
        for p, q in itertools.combinations(unit(x), 2)
    ]


def cosines(x):
    return [
        sum(a * b for a, b in zip(p, q, strict=True)) for p, q in itertools.combinations(unit(x), 2)
    ]


def naive_uniformity(x, t=2.0):
    kernel = [math.exp(-t * d) for d in squared_distances(x)]
    return math.log(sum(kernel) / len(kernel))


def naive_anisotropy(x):
    return sum(cosines(x)) / len(cosines(x))


SETS = {
    "plain": draw(23),
    "narrow cone": draw(20, shift=3.0),
    "odd": draw(7, seed=1),
    "two rows": draw(2, seed=2),
    "one dimension": draw(5, width=1, seed=5),
    "isotropic": power_law(16, 0.0),
    "power law": power_law(16, 1.5),
    "rank one": np.outer([1.0, -2.0, 3.0, 0.5, -1.5], np.arange(1, D + 1)),
}


@pytest.fixture(params=[1, 3, 7, 1024])
def chunk(request, monkeypatch):
    monkeypatch.setattr(geometry, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("name", SETS)
def test_uniformity_is_the_double_loop(name):
    x = SETS[name]
    assert uniformity(x) == pytest.approx(naive_uniformity(x), rel=1e-10)
    assert uniformity(x, t=0.7) == pytest.approx(naive_uniformity(x, 0.7), rel=1e-10)


@pytest.mark.parametrize("name", SETS)
def test_anisotropy_is_the_double_loop(name):
    assert anisotropy(SETS[name]) == pytest.approx(naive_anisotropy(SETS[name]), abs=1e-12)


def test_sets_differ_in_what_is_measured():
    cone, plain = SETS["narrow cone"], SETS["plain"]
    assert naive_anisotropy(cone) > 0.8
    assert abs(naive_anisotropy(plain)) < 0.3
    assert naive_uniformity(cone) > -1
    assert naive_uniformity(plain) < -2
    assert {np.sign(v) for v in SETS["one dimension"].ravel()} == {1.0, -1.0}


def test_orthonormal_rows():
    """Identity-like: every distance is 2, every cosine 0."""
    rows, _ = np.linalg.qr(draw(D))
    assert uniformity(5.0 * rows) == pytest.approx(-4.0)
    assert anisotropy(5.0 * rows) == pytest.approx(0.0, abs=1e-12)


def test_both_ends_of_orthonormal_axes():
    """The covariance is exactly isotropic; D of the pairs are opposite (distance 4), the others at
    a right angle (2).
    """
    rows, _ = np.linalg.qr(draw(D))
    x = np.concatenate([rows, -rows])
    np.testing.assert_allclose(np.cov(x, rowvar=False, bias=True), np.eye(D) / D, atol=1e-12)
    pairs = D * (2 * D - 1)
    assert anisotropy(x) == pytest.approx(-1 / (2 * D - 1))
    assert uniformity(x) == pytest.approx(
        math.log((D * math.exp(-8) + (pairs - D) * math.exp(-4)) / pairs)
    )


def test_one_direction_is_the_worst():
    x = np.outer([0.5, 1.0, 7.0], np.arange(1, D + 1))
    assert uniformity(x) == pytest.approx(0.0, abs=1e-12)
    assert anisotropy(x) == pytest.approx(1.0)


def test_two_rows_by_hand():
    assert uniformity([[2.0, 0.0], [0.0, 3.0]]) == pytest.approx(-4.0)
    assert uniformity([[2.0], [-1.0]]) == pytest.approx(-8.0)
    assert uniformity([[2.0], [-1.0]], t=1) == pytest.approx(-4.0)
    assert anisotropy([[2.0], [-1.0]]) == pytest.approx(-1.0)
    assert anisotropy([[1.0, 0.0], [1.0, 1.0]]) == pytest.approx(math.sqrt(0.5))


def test_uniformity_never_holds_all_pairs(monkeypatch):
    monkeypatch.setattr(geometry, "CHUNK", 64)
    x = draw(1500, width=2)
    assert peak_bytes(lambda: uniformity(x)) < 1500**2 * 8 / 10


def test_random_pairs_never_holds_all_pairs():
    x = draw(20_000, width=2)
    assert peak_bytes(lambda: random_pair_cosines(x, 1000)) < 20_000 * 8 * 20, (
        "a few copies of the embeddings, no more"
    )


def test_alignment_by_hand():
    anchors = [[3.0, 0.0], [0.0, 2.0], [1.0, 0.0], [1.0, 1.0]]
    positives = [[5.0, 0.0], [4.0, 0.0], [-1.0, 0.0], [2.0, 0.0]]
    # same, right angle, opposite, 45 degrees
    assert alignment(anchors, positives) == pytest.approx((0 + 2 + 4 + (2 - math.sqrt(2))) / 4)
    assert alignment(anchors[2:3], positives[2:3]) == pytest.approx(4.0), "one pair"
    assert alignment([[2.0]], [[9.0]]) == 0.0, "one pair, one dimension"


def test_related_cosines_are_in_order_and_give_the_alignment():
    anchors, positives = draw(9, seed=3), draw(9, seed=4, shift=0.5)
    found = related_pair_cosines(anchors, positives)
    expected = [
        sum(a * b for a, b in zip(p, q, strict=True))
        for p, q in zip(unit(anchors), unit(positives), strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert len(set(np.round(found, 6))) == 9
    assert alignment(anchors, positives) == pytest.approx(2 - 2 * found.mean())


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 8, 9])
def test_every_pair_once_when_there_are_no_more(rows):
    x = draw(rows, seed=rows)
    for pairs in (rows * (rows - 1) // 2, 10_000):
        found = random_pair_cosines(x, pairs)
        np.testing.assert_allclose(np.sort(found), np.sort(cosines(x)), atol=1e-12)


def test_random_pairs_are_distinct_and_never_of_a_row_with_itself():
    """Rows on a circle at angles whose differences are all different: a cosine tells which pair it
    came from.
    """
    angles = np.pi * 2.0 ** -np.arange(1, 12)
    x = np.stack([np.cos(angles), np.sin(angles)], 1)
    known = np.sort(cosines(x))
    assert np.diff(known).min() > 1e-7, "else the test could not tell"
    for seed in range(20):
        found = np.sort(random_pair_cosines(x, 40, seed))
        places = np.abs(known[None] - found[:, None]).argmin(1)
        assert len(set(places)) == len(found) == 40
        np.testing.assert_allclose(found, known[places], atol=1e-12)


def test_all_pairs_are_equally_likely():
    x = draw(6, seed=8)
    known = np.array(cosines(x))
    assert np.diff(np.sort(known)).min() > 1e-4
    counts = np.zeros(15)
    for seed in range(1500):
        found = random_pair_cosines(x, 3, seed)
        counts[np.abs(known[None] - found[:, None]).argmin(1)] += 1
    assert counts.sum() == 4500
    assert np.abs(counts - 300).max() < 5 * math.sqrt(300 * 0.8), counts


def test_seed_fixes_the_pairs():
    x = draw(50)
    first, again, other = (random_pair_cosines(x, 100, seed) for seed in (3, 3, 4))
    assert first.shape == (100,)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert random_pair_cosines(draw(400)).shape == (10_000,)


def test_random_pairs_average_to_the_anisotropy():
    x = draw(40, shift=1.0)
    assert random_pair_cosines(x, 10_000).mean() == pytest.approx(anisotropy(x), abs=1e-12)


@pytest.mark.parametrize(
    "measure", [uniformity, anisotropy, random_pair_cosines, lambda x: alignment(x[:5], x[5:10])]
)
def test_scale_and_rotation_change_nothing(measure):
    x = draw(12, shift=0.3)
    turn, _ = np.linalg.qr(np.random.default_rng(9).standard_normal((D, D)))
    lengths = np.geomspace(1e-200, 1e200, 12)[:, None]
    plain = measure(x)
    for other in (x @ turn, 3.0 * x, lengths * x):
        np.testing.assert_allclose(measure(other), plain, atol=1e-10)
    assert np.abs(np.asarray(measure(x + 5.0)) - plain).max() > 0.1, "a shift does change it"


def test_small_floats_are_summed_in_double():
    x = draw(30, shift=0.5).astype(np.float16)
    assert uniformity(x) == pytest.approx(naive_uniformity(x), rel=1e-12)
    assert anisotropy(x) == pytest.approx(naive_anisotropy(x), abs=1e-12)


RANDOM = np.random.default_rng(1).normal(0.3, 0.1, 333)
RELATED = np.random.default_rng(2).normal(0.5, 0.1, 77)


def naive_quantile(values, percent):
    """Linear between the two values around place (n − 1) · percent / 100."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def naive_auc(random, related):
    return sum((r > x) + 0.5 * (r == x) for r in related for x in random) / (
        len(random) * len(related)
    )


def test_score_summary():
    found = score_summary(RANDOM, RELATED)
    assert list(found.random) == [1, 5, 25, 50, 75, 95, 99] == list(found.related)
    assert found.random == pytest.approx({p: naive_quantile(RANDOM, p) for p in found.random})
    assert found.related == pytest.approx({p: naive_quantile(RELATED, p) for p in found.related})
    assert found.threshold == found.random[99]
    assert sum(c > found.threshold for c in RANDOM) == 4, "1 % of 333"
    assert found.related_above == sum(c > found.threshold for c in RELATED) / 77
    assert 0.1 < found.related_above < 0.9
    assert found.roc_auc == pytest.approx(naive_auc(RANDOM, RELATED))
    assert 0.8 < found.roc_auc < 0.99


def test_score_summary_with_ties():
    random, related = np.round(RANDOM, 1), np.round(RELATED, 1)
    assert set(random) & set(related)
    assert score_summary(random, related).roc_auc == pytest.approx(naive_auc(random, related))


def test_score_summary_at_the_ends():
    apart = score_summary([0.0, 0.1], [0.8, 0.9, 1.0])
    assert (apart.related_above, apart.roc_auc) == (1.0, 1.0)
    collapsed = score_summary([1.0, 1.0], [1.0])
    assert (collapsed.threshold, collapsed.related_above, collapsed.roc_auc) == (1.0, 0.0, 0.5)
    assert score_summary([0.2], [0.1]).roc_auc == 0.0


def test_score_summary_without_related_pairs():
    found = score_summary(RANDOM)
    assert found.random == score_summary(RANDOM, RELATED).random
    assert (found.related, found.threshold, found.related_above, found.roc_auc) == (None,) * 4


def test_score_summary_is_frozen_and_fits_into_json():
    found = score_summary(RANDOM, RELATED)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["random"]["99"] == found.threshold
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.threshold = 0.0


ONE_SET = {"uniformity": uniformity, "anisotropy": anisotropy, "random": random_pair_cosines}
TWO_SETS = {"alignment": alignment, "related": related_pair_cosines}


def with_row(value, row=3, column=slice(None)):
    x = draw(6).copy()
    x[row, column] = value
    return x


BAD_ROWS = [
    (with_row(0.0), "is zero"),
    (with_row(np.nan, column=1), "not finite"),
    (with_row(-np.inf, column=5), "not finite"),
]


@pytest.mark.parametrize(("bad", "problem"), BAD_ROWS)
@pytest.mark.parametrize("measure", ONE_SET.values(), ids=ONE_SET)
def test_bad_row_is_named(measure, bad, problem):
    with pytest.raises(DataError, match=rf"(?s){problem}.*row 3, 1 in all"):
        measure(bad)


@pytest.mark.parametrize(("bad", "problem"), BAD_ROWS)
@pytest.mark.parametrize("measure", TWO_SETS.values(), ids=TWO_SETS)
def test_bad_row_of_a_pair_is_named(measure, bad, problem):
    with pytest.raises(DataError, match=rf"(?s)^anchors: .*{problem}.*row 3, 1 in all"):
        measure(bad, draw(6))
    with pytest.raises(DataError, match=rf"(?s)^positives: .*{problem}.*row 3, 1 in all"):
        measure(draw(6), bad)


def test_first_of_several_bad_rows_is_named():
    x = with_row(0.0)
    x[5] = 0
    with pytest.raises(DataError, match="row 3, 2 in all"):
        anisotropy(x)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (3, 0), (2, 3, 4), ()])
@pytest.mark.parametrize(
    "measure", [*ONE_SET.values(), lambda x: alignment(x, x)], ids=[*ONE_SET, "alignment"]
)
def test_wrong_shape(measure, shape):
    with pytest.raises(DataError, match="shape") as error:
        measure(np.ones(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("measure", ONE_SET.values(), ids=ONE_SET)
def test_one_embedding_makes_no_pair(measure):
    with pytest.raises(DataError, match="N ≥ 2"):
        measure(np.ones((1, 4)))
    measure(np.ones((2, 4)))


@pytest.mark.parametrize("measure", TWO_SETS.values(), ids=TWO_SETS)
@pytest.mark.parametrize("shape", [(5, D), (6, D - 1), (1, D)])
def test_sets_that_do_not_pair_up(measure, shape):
    with pytest.raises(DataError, match="pair up"):
        measure(draw(6), np.ones(shape))


def test_no_pairs_to_draw():
    with pytest.raises(DataError, match="pairs ≥ 1"):
        random_pair_cosines(draw(4), 0)


def test_bad_cosines():
    for bad in ([], 0.5, [[0.5]]):
        with pytest.raises(DataError, match="random pairs: no cosines"):
            score_summary(bad, RELATED)
        with pytest.raises(DataError, match="related pairs: no cosines"):
            score_summary(RANDOM, bad)
    with pytest.raises(DataError, match=r"(?s)related pairs: .*row 1, 1 in all"):
        score_summary(RANDOM, [0.1, np.nan])
