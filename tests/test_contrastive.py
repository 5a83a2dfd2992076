"""Stages 2 and 3: dropout where it belongs and only there, and losses equal to the published
formula written out naively.
"""

import pytest
import torch
from torch.nn import functional

from families import FAMILIES, SENTENCES, TEXTS, make_compressor, relative_error, untouched
from llm2comp.data.loaded import Pair
from llm2comp.errors import BackboneError
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.tokens import Tokens, position_ids
from llm2comp.recipe import SclStage, UclStage
from llm2comp.training.contrastive import contrastive_loss
from llm2comp.training.stages import pair_datasets

DATA = {"data": [{"source": "unused"}]}


def padded(compressor, side="left"):
    return Tokens.pad(compressor.backbone.tokenise(TEXTS), side)


def gap(compressor):
    """Largest difference between two encodings of the same batch."""
    with torch.no_grad():
        tokens = padded(compressor)
        return (compressor(tokens) - compressor(tokens)).abs().max().item()


@pytest.mark.parametrize("source", ["adapter", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_views_differ_in_training_alone(family, source):
    compressor = make_compressor(family, dropout=0.3 if source == "adapter" else 0.0)
    if source == "attention":
        compressor.train()
        assert gap(compressor) == 0.0, "the base's own rate must not act"
        compressor.backbone.set_attention_dropout(0.3)
    assert gap(compressor.eval()) == 0.0
    assert gap(compressor.train()) > 1e-2
    torch.manual_seed(5)
    first = gap(compressor)
    torch.manual_seed(5)
    assert gap(compressor) == first
    compressor.backbone.set_attention_dropout(0.0)
    assert (gap(compressor) > 0) == (source == "adapter")


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_acts_in_the_encoder_pass_alone(family):
    """Teacher and decoder stay the untouched LM, before and after an encoder pass, in training,
    with all dropout on.
    """
    compressor = make_compressor(family, dropout=0.3).train()
    backbone = compressor.backbone
    backbone.savings = frozenset()  # bits are compared, at padding too
    backbone.set_attention_dropout(0.3)
    tokens = padded(compressor, "right")
    x = backbone.embed(tokens.ids_BT)
    places = position_ids(tokens.mask_BT)
    reference = untouched(family).base_model
    with torch.no_grad():
        expected = reference(
            inputs_embeds=x, attention_mask=tokens.mask_BT, position_ids=places
        ).last_hidden_state
        for _ in range(2):
            assert torch.equal(backbone.decoder_pass(x, tokens.mask_BT), expected)
            assert gap(compressor) > 1e-2
        with backbone.base_only():
            assert torch.equal(backbone._run(x, places, tokens.mask_BT), expected)
            with backbone.base_only(off=False):
                assert gap(compressor) > 1e-2
            assert torch.equal(backbone._run(x, places, tokens.mask_BT), expected)
        backbone.eval()
        assert gap(compressor) == 0.0


def test_attention_dropout_drops_attention_weights_at_its_rate():
    """Values of ones: an attention output is then the sum of the kept weights, 1 on average, with
    the spread of the rate.
    """
    compressor = make_compressor("llama").train()
    backbone = compressor.backbone
    backbone.savings = frozenset()  # one shape for all batches
    backbone.set_attention_dropout(0.25)
    attention = backbone.lm.model.layers[0].self_attn
    assert attention.training
    sums = []
    attention.o_proj.register_forward_pre_hook(lambda _, args: sums.append(args[0]))
    attention.v_proj.forward = lambda x: torch.ones(*x.shape[:-1], 16)
    with torch.no_grad():
        for _ in range(40):
            compressor(padded(compressor))
    found = torch.stack(sums)[:, 1]  # the longest text has no padding
    assert found.mean().item() == pytest.approx(1.0, abs=0.02)
    assert found.std().item() > 0.05


def test_a_family_without_attention_dropout_is_an_error_only_if_it_is_wanted():
    backbone = make_compressor().backbone
    backbone._dropouts = []
    backbone.set_attention_dropout(0.0)
    with pytest.raises(BackboneError, match="no attention dropout") as error:
        backbone.set_attention_dropout(0.1)
    assert "attention_dropout: 0" in str(error.value)


ANCHORS = ["who reads", "what is kept", "a lazy animal", "left to right", "one vector"]


def columns_of(negatives):
    """anchor, positive and so many hard negatives per row."""
    positives = [SENTENCES[i] for i in (1, 3, 0, 1, 4)]
    positives[3] = "from the left"
    return [
        ANCHORS,
        positives,
        *[[f"{text} not {number}" for text in reversed(SENTENCES)] for number in range(negatives)],
    ]


def features_of(model, columns):
    return [model.preprocess(column) for column in columns]


def embeddings(compressor, columns):
    """Each text alone, unpadded."""
    rows = [[compressor.backbone.tokenise([text])[0] for text in column] for column in columns]
    return [torch.cat([compressor(Tokens.pad([ids], "left")) for ids in column]) for column in rows]


def naive(anchors, candidates, temperature, others=None):
    """−log exp(s(a_i, c_i)/τ) / (Σ_j exp(s(a_i, c_j)/τ) + Σ_{j≠i} exp(s(a_i, o_j)/τ)), mean over i,
    in double precision.
    """
    losses = []
    for i, anchor in enumerate(anchors.double()):

        def score(x):
            return functional.cosine_similarity(anchor, x.double(), dim=0) / temperature  # noqa: B023

        terms = [score(candidate) for candidate in candidates]
        terms += [
            score(other) for j, other in enumerate(others if others is not None else []) if j != i
        ]
        losses.append(-torch.log(terms[i].exp() / torch.stack(terms).exp().sum()))
    return torch.stack(losses).mean()


def lora_gradients(compressor):
    found = {
        n: p.grad.clone()
        for n, p in compressor.backbone.lm.named_parameters()
        if p.grad is not None
    }
    compressor.zero_grad()
    assert found
    return found


def assert_same(loss, expected, compressor, tolerance=1e-4):
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() > 0.05
    loss.backward()
    found = lora_gradients(compressor)
    expected.backward()
    reference = lora_gradients(compressor)
    assert set(found) == set(reference)
    for name, gradient in reference.items():
        assert relative_error(found[name], gradient) < tolerance, name


@pytest.mark.parametrize("mini_batch_size", [None, 2, 64])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("denominator", ["second_views", "both_views"])
def test_ucl_equals_the_formula(denominator, temperature, mini_batch_size):
    """Two different texts stand for the two views, so that first and second view cannot be taken
    for each other.
    """
    compressor = make_compressor("llama").train()
    model = as_sentence_transformer(compressor, 64).train()
    stage = UclStage(
        **DATA, denominator=denominator, temperature=temperature, mini_batch_size=mini_batch_size
    )
    columns = columns_of(0)
    loss = contrastive_loss(model, stage)(features_of(model, columns), None)
    first, second = embeddings(compressor, columns)
    others = first if denominator == "both_views" else None
    assert_same(loss, naive(first, second, temperature, others), compressor)


@pytest.mark.parametrize("mini_batch_size", [None, 2, 64])
@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scl_equals_the_formula(family, negatives, mini_batch_size):
    compressor = make_compressor(family).train()
    model = as_sentence_transformer(compressor, 64).train()
    stage = SclStage(**DATA, mini_batch_size=mini_batch_size)
    columns = columns_of(negatives)
    loss = contrastive_loss(model, stage)(features_of(model, columns), None)
    anchors, *candidates = embeddings(compressor, columns)
    assert_same(loss, naive(anchors, torch.cat(candidates), stage.temperature), compressor)


def test_denominators_differ():
    model = as_sentence_transformer(make_compressor("llama"), 64)
    features = features_of(model, columns_of(0))
    losses = [
        contrastive_loss(model, UclStage(**DATA, denominator=name))(
            [dict(f) for f in features], None
        ).item()
        for name in ("second_views", "both_views")
    ]
    assert losses[1] > losses[0] + 1e-3


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_a_small_loss_keeps_its_digits(mini_batch_size):
    """Both views alike: scores of 1 / temperature cancel, in float32 all but the first digit if
    taken as they are.
    """
    compressor = make_compressor("llama")
    model = as_sentence_transformer(compressor, 64)
    stage = UclStage(**DATA, temperature=0.02, mini_batch_size=mini_batch_size)
    columns = [ANCHORS, ANCHORS]
    with torch.no_grad():
        first, second = (x.double() for x in embeddings(compressor, columns))
    loss = contrastive_loss(model, stage)(features_of(model, columns), None).item()
    expected = naive(first, second, stage.temperature).item()
    assert 1e-9 < expected < 1e-3
    assert loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradcache_draws_the_same_dropout_twice(checkpointing):
    """With dropout on, the second encoding of a mini-batch must drop what the first one dropped: a
    small step along the gradient then lowers the loss, under the same draw, by step · |gradient|².
    """
    compressor = make_compressor("llama", dropout=0.3).train()
    compressor.backbone.set_attention_dropout(0.2)
    compressor.backbone.set_checkpointing(checkpointing)
    model = as_sentence_transformer(compressor, 64).train()
    loss_function = contrastive_loss(model, SclStage(**DATA, mini_batch_size=2, temperature=0.5))
    features = features_of(model, columns_of(1))

    def loss():
        torch.manual_seed(3)
        return loss_function([dict(f) for f in features], None)

    before = loss()
    before.backward()
    learning = [p for p in compressor.parameters() if p.grad is not None and p.grad.any()]
    squared = sum(p.grad.square().sum() for p in learning).item()
    step = 2e-3 * before.item() / squared
    with torch.no_grad():
        values = []
        for sign in (1, -2):
            for parameter in learning:
                parameter.add_(parameter.grad, alpha=sign * step)
            values.append(loss().item())
    assert values[0] - values[1] == pytest.approx(2 * step * squared, rel=0.02)


def test_pairs_are_grouped_by_their_number_of_hard_negatives():
    pairs = [
        Pair("a", "b", ("c", "d")),
        Pair("e", "f"),
        Pair("g", "h", ("i", "j")),
        Pair("k", "l", ("m",)),
    ]
    two = {
        "anchor": ["a", "g"],
        "positive": ["b", "h"],
        "negative_1": ["c", "i"],
        "negative_2": ["d", "j"],
    }
    assert [table.to_dict() for table in pair_datasets(pairs, batch_size=1).values()] == [
        {"anchor": ["e"], "positive": ["f"]},
        {"anchor": ["k"], "positive": ["l"], "negative_1": ["m"]},
        two,
    ]
    fewer = [table.to_dict() for table in pair_datasets(pairs, batch_size=2).values()]
    assert fewer == [{"anchor": ["e", "k"], "positive": ["f", "l"]}, two], (
        "one pair with one negative fills no batch"
    )
