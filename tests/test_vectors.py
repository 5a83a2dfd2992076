"""The one way from texts to vectors: as the stock library's, in order, whatever the batch, and on
after memory runs out.
"""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

import llm2comp
from families import MEMORY, make_compressor
from llm2comp.errors import RecipeError
from llm2comp.model import vectors
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.inputs import Inputs, frame_of
from llm2comp.model.vectors import Budget, embed_texts, in_batches, memory_states, memory_vectors
from oracles import embed_texts as stock
from tiny_run import finished, save_backbone, sentences

LENGTHS = (40, 3, 17, 90, 5, 9, 60)
TEXTS = ["", "one", *(" ".join(sentences(n, 1, seed=n)) for n in LENGTHS), "日本 the end"]
PROMPTS = {"query": "to find: ", "document": "to be found, ", "passage": "unused: "}
BUDGETS = (1, 100, None)


def plain(folder, **pooling):
    """A stock transformer with mean pooling."""
    lm = save_backbone(folder)
    module = Transformer(str(lm), max_seq_length=48)
    if module.tokenizer.pad_token is None:
        module.tokenizer.pad_token = module.tokenizer.eos_token
    pool = Pooling(module.get_embedding_dimension(), **pooling)
    return SentenceTransformer(modules=[module, pool], device="cpu", prompts=dict(PROMPTS)).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, run = tmp_path_factory.mktemp("vectors"), finished()[1]
    live = as_sentence_transformer(make_compressor(), 48, {"query": 24}, dict(PROMPTS))
    return {
        "live": live,
        "exported": llm2comp.load(run / "model", "cpu"),
        "baseline": llm2comp.load("echo:builtin:tiny", "cpu"),
        "plain": plain(folder / "plain"),
        "prompt left out": plain(folder / "left out", include_prompt=False),
    }


KINDS = ("live", "exported", "baseline", "plain", "prompt left out")


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_stock_library_s(models, kind, budget):
    model = models[kind]
    expected = stock(model, TEXTS)
    apart = torch.cdist(expected, expected) + torch.eye(len(TEXTS))
    assert apart.min() > 1e-3, "vacuous: texts are alike"
    found = embed_texts(model, TEXTS, max_tokens_per_batch=budget)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert (found - expected).abs().max() < 1e-5
    assert (
        embed_texts(model, TEXTS[::-1], max_tokens_per_batch=budget).flip(0) - expected
    ).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_roles_are_the_stock_library_s(models, kind):
    model = models[kind]
    expected = [model.encode_query(TEXTS), model.encode_document(TEXTS)]
    found = [embed_texts(model, TEXTS, role=role).numpy() for role in ("query", "document")]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if model.prompts.get("query"):
        assert np.abs(found[0] - found[1]).max() > 1e-2, "vacuous: prompts change nothing"


def test_who_has_a_frame(models):
    assert {kind: frame_of(models[kind]) is not None for kind in KINDS} == {
        "live": True,
        "exported": True,
        "baseline": False,
        "plain": True,
        "prompt left out": False,
    }
    assert frame_of(models["live"], "query").room == 24 - 1
    assert Inputs.of(models["plain"], TEXTS).lengths[5] == 48
    assert Inputs.of(models["baseline"], ["abcdefgh"]).lengths == [3]


@pytest.mark.parametrize("kind", KINDS)
def test_no_texts_give_no_vectors(models, kind):
    width = models[kind].get_embedding_dimension()
    assert embed_texts(models[kind], []).shape == (0, width)


def test_no_texts_give_no_memory(models):
    compressor = models["live"][0].compressor
    assert (
        memory_states(compressor, []).shape
        == memory_vectors(models["live"], []).shape
        == (0, MEMORY, 32)
    )


def test_a_prompt_that_leaves_no_room_is_refused(models):
    with pytest.raises(RecipeError, match="no room"):
        Inputs.of(models["live"], TEXTS, "word " * 40, "query")


# ---- batches, and memory that runs out


def squares(limit=10**9, seen=None):
    """Vectors (n, n²); batches of more than `limit` texts run out of memory."""

    def compute(places):
        if seen is not None:
            seen.append(list(places))
        if len(places) > limit:
            raise torch.OutOfMemoryError("no room")
        return torch.tensor([[n, n * n] for n in places], dtype=torch.float64)

    return compute


def test_batches_are_full_and_the_longest_goes_first():
    lengths, seen = [3, 9, 1, 5, 5, 2, 7], []
    found = in_batches(lengths, squares(seen=seen), Budget(10))
    assert seen == [[1], [6], [3, 4], [0, 5, 2]]
    assert found.tolist() == [[n, n * n] for n in range(7)]
    assert found.dtype == torch.float32


@pytest.mark.parametrize("fetch_at", [1, 5, 10**6])
def test_out_of_memory_halves_the_budget_for_good_and_loses_nothing(fetch_at, monkeypatch):
    said, seen, budget = [], [], Budget(64)
    monkeypatch.setattr(vectors, "say", said.append)
    monkeypatch.setattr(vectors, "FETCH_AT", fetch_at)
    found = in_batches([4] * 20, squares(5, seen), budget)
    assert found.tolist() == [[n, n * n] for n in range(20)]
    assert [len(places) for places in seen] == [16, 8, 4, 4, 4, 4, 4]
    assert budget.tokens == 16
    assert said == [f"out of memory: going on with {n} tokens at once" for n in (32, 16)]
    seen.clear()
    in_batches([4] * 8, squares(5, seen), budget)
    assert [len(places) for places in seen] == [4, 4], "what was learned is kept"


def test_what_never_fits_and_other_errors_come_through(monkeypatch):
    monkeypatch.setattr(vectors, "say", lambda _: None)
    seen = []
    with pytest.raises(torch.OutOfMemoryError):
        in_batches([4] * 20, squares(0, seen), Budget(64))
    assert [len(places) for places in seen] == [16, 8, 4, 2, 1]

    def broken(places):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        in_batches([4] * 20, broken, Budget(64))
