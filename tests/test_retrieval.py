"""nDCG@10 and MRR@10 against sums done by hand, and BM25 on words that only one document has."""

import math

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule

from llm2comp.lab.evaluation.retrieval import Collection, fuse

ANGLES = {"best": 0.0, "second": 0.1, "third": 0.2, "far": 1.5}


class Compass(InputModule):
    """Embeds a text as the point on the circle at the angle that it names, after an optional
    prompt.
    """

    def __init__(self, angles, prompt_turn=0.0):
        super().__init__()
        self.angles, self.prompt_turn = angles, prompt_turn

    def preprocess(self, inputs, prompt=None, **_):
        turn = self.prompt_turn if prompt else 0.0
        return {"angle": torch.tensor([self.angles[text] + turn for text in inputs])}

    def forward(self, features, **_):
        angle = features["angle"]
        features["sentence_embedding"] = torch.stack([angle.cos(), angle.sin()], 1)
        return features

    def get_embedding_dimension(self):
        return 2

    def save(self, *args, **kwargs):
        raise NotImplementedError


def compass(prompts=None, prompt_turn=0.0):
    module = Compass(ANGLES | {"north": 0.0}, prompt_turn)
    return SentenceTransformer(modules=[module], device="cpu", prompts=prompts)


DOCUMENTS = {name: name for name in ANGLES}


def dcg(*places):
    return sum(1 / math.log2(place + 1) for place in places)


@pytest.mark.parametrize(
    ("relevant", "ndcg", "mrr"),
    [
        ({"best"}, 1.0, 1.0),
        ({"second"}, dcg(2), 1 / 2),
        ({"far"}, dcg(4), 1 / 4),
        ({"second", "far"}, dcg(2, 4) / dcg(1, 2), 1 / 2),
        ({"best", "second", "third", "far"}, 1.0, 1.0),
    ],
)
def test_figures_by_hand(relevant, ndcg, mrr):
    scores = Collection({"q": "north"}, DOCUMENTS, {"q": relevant}).score(compass())
    assert scores.ndcg_at_10 == pytest.approx(ndcg)
    assert scores.mrr_at_10 == pytest.approx(mrr)


def test_mean_over_queries():
    queries = {"a": "north", "b": "far"}
    scores = Collection(queries, DOCUMENTS, {"a": {"second"}, "b": {"third"}}).score(compass())
    assert scores.ndcg_at_10 == pytest.approx((dcg(2) + dcg(2)) / 2)
    assert scores.mrr_at_10 == pytest.approx(0.5)


def test_the_eleventh_place_counts_nothing():
    documents = {str(i): str(i) for i in range(12)}
    module = Compass({"north": 0.0} | {str(i): 0.1 * i for i in range(12)})
    model = SentenceTransformer(modules=[module], device="cpu")
    for place, expected in ((9, 1 / math.log2(11)), (10, 0.0)):
        assert Collection({"q": "north"}, documents, {"q": {str(place)}}).score(
            model
        ).ndcg_at_10 == pytest.approx(expected)


def test_queries_get_the_query_prompt_and_documents_do_not():
    collection = Collection({"q": "north"}, DOCUMENTS, {"q": {"far"}})
    assert (
        collection.score(compass({"query": "to: ", "document": ""}, prompt_turn=1.5)).mrr_at_10
        == 1.0
    )
    assert collection.score(compass(prompt_turn=1.5)).mrr_at_10 == 0.25


LIBRARY = {
    "shutil.copytree": "Recursively copy a directory tree to a destination.",
    "math.gcd": "Greatest common divisor of the integers.",
    "bisect.insort": "Insert an item in a sorted list and keep it sorted.",
    "json.dumps": "Serialize an object to a formatted string.",
}


def test_bm25_finds_shared_words():
    queries = {"q1": "copy a tree", "q2": "divisor of integers", "q3": "sorted list"}
    relevant = {"q1": {"shutil.copytree"}, "q2": {"math.gcd"}, "q3": {"bisect.insort"}}
    scores = Collection(queries, LIBRARY, relevant).score_bm25()
    assert (scores.ndcg_at_10, scores.mrr_at_10) == (1.0, 1.0)


def test_bm25_gives_nothing_for_words_that_no_document_has():
    relevant = {"q": {"json.dumps"}}
    for query in ("zebra", "the of a", ""):
        assert Collection({"q": query}, LIBRARY, relevant).score_bm25().mrr_at_10 == 0.0, (
            "no score is no rank"
        )
    both = Collection(
        {"q": "zebra", "r": "formatted string"}, LIBRARY, relevant | {"r": {"json.dumps"}}
    ).score_bm25()
    assert both.mrr_at_10 == 0.5


def test_bm25_ranks_the_rarer_word_higher():
    documents = {
        "common": "copy copy files",
        "rare": "copy zebra",
        **{str(i): "copy something" for i in range(5)},
    }
    scores = Collection({"q": "copy zebra"}, documents, {"q": {"rare"}}).score_bm25()
    assert scores.mrr_at_10 == 1.0


def test_reciprocal_ranks_by_hand():
    """a: 1/61 + 1/62; b: 1/62 + 1/61, named later; c: 1/63 from one ranking alone."""
    found = fuse([[("a", 0.9), ("b", 0.8), ("c", 0.1)], [("b", 12.0), ("a", 3.0)]])
    assert [name for name, _ in found] == ["a", "b", "c"]
    assert [value for _, value in found] == pytest.approx([1 / 61 + 1 / 62] * 2 + [1 / 63])


def test_fusion_finds_what_either_ranking_has_first():
    """By angle `best` is nearest to the query, by words `far` is alone: fused, both come before all
    others.
    """
    documents = {"d1": "best", "d2": "second", "d3": "third", "d4": "far"}
    collection = Collection({"q": "far"}, documents, {"q": {"d4", "d1"}})
    # the query's angle, 1.5, becomes that of `best`
    turned = compass({"query": "p"}, prompt_turn=-1.5)
    assert collection.score(turned).ndcg_at_10 < 1
    assert collection.score_bm25().ndcg_at_10 < 1
    assert collection.score_fused(turned).ndcg_at_10 == pytest.approx(1)


def test_fusion_takes_documents_that_are_embedded_already():
    documents = {name: name for name in ANGLES}
    collection, model = Collection({"q": "north"}, documents, {"q": {"best"}}), compass()
    # `best` stands opposite
    away_ND = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [1.0, 0.1], [1.0, 0.2]])
    assert collection.score_fused(model).ndcg_at_10 == pytest.approx(1)
    assert collection.score_fused(model, away_ND).ndcg_at_10 < 1
