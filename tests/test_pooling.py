"""Encoders that pool the text's own states: mean over its tokens, last token of a prompt (LLM2Vec,
Llama2Vec).
"""

import random

import pytest
import torch

from families import FAMILIES, make_compressor, relative_error, stage_1
from llm2comp.errors import RecipeError
from llm2comp.model.compressor import BOS_WEIGHT, Compressor
from llm2comp.model.tokens import SplitTexts, Tokens, wrap
from llm2comp.objectives import stage_loss
from llm2comp.recipe import EncoderSettings, parse_recipe

MEAN = EncoderSettings(pooling="mean")
PROMPT = EncoderSettings(pooling="last_token", prompt="the {text} is")
ENCODERS = {"mean": MEAN, "last_token": PROMPT}
WORDS = [
    "a memory",
    "lock is held by the thread",
    "",
    "stack and heap of one process are kept apart",
]


def naive(compressor, row):
    """Embedding of one text by itself, straight from the definition."""
    backbone = compressor.backbone
    start = [] if backbone.bos_id is None else [backbone.bos_id]
    if compressor.settings.pooling == "last_token":
        before, behind = compressor.settings.prompt.split("{text}")
        ids = [
            backbone.tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (before, behind)
        ]
        row = [*start, *ids[0], *row[len(start) :], *ids[1]]
        assert len(ids[0]) > 0
        assert len(ids[1]) > 0
    states_TD = backbone.encoder_pass(
        compressor.embed(torch.tensor([row])), torch.ones(1, len(row), dtype=torch.int64)
    )[0]
    if compressor.settings.pooling == "last_token":
        return states_TD[-1]
    weights = torch.tensor([BOS_WEIGHT if place < len(start) else 1.0 for place in range(len(row))])
    return (states_TD * weights[:, None]).sum(0) / weights.sum()


@pytest.mark.parametrize("pooling", ENCODERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_gives_what_each_text_gives_alone(family, pooling):
    compressor = make_compressor(family, encoder=ENCODERS[pooling])
    rows = [row for row in compressor.backbone.tokenise(WORDS) if row]
    with torch.no_grad():
        found = compressor(Tokens.pad(rows, "left", compressor.backbone.pad_id))
        expected = torch.stack([naive(compressor, row) for row in rows])
    assert (expected[0] - expected[1]).norm() > 0.01 * expected[0].norm(), "vacuous: all alike"
    assert relative_error(found, expected) < 1e-5


def test_mean_forgets_bos_unless_there_is_nothing_else():
    compressor = make_compressor(encoder=MEAN)
    bos = compressor.backbone.bos_id
    with torch.no_grad():
        states_TD = compressor.backbone.encoder_pass(
            compressor.embed(torch.tensor([[bos, 5, 6]])), torch.ones(1, 3, dtype=torch.int64)
        )[0]
        assert (
            relative_error(compressor(Tokens.pad([[bos, 5, 6]], "left"))[0], states_TD[1:].mean(0))
            < 1e-4
        )
        alone = compressor(Tokens.pad([[bos]], "left"))[0]
        state = compressor.backbone.encoder_pass(
            compressor.embed(torch.tensor([[bos]])), torch.ones(1, 1, dtype=torch.int64)
        )[0, 0]
        assert relative_error(alone, state) < 1e-6


@pytest.mark.parametrize("start", [0, 1])
def test_wrap_is_the_naive_list(start):
    draw = random.Random(0)
    for _ in range(20):
        rows = [
            [1] * start + [draw.randint(2, 9) for _ in range(draw.randint(0, 4))] for _ in range(3)
        ]
        before, behind = (
            [draw.randint(10, 99) for _ in range(draw.randint(0, 3))] for _ in range(2)
        )
        if not any(rows):
            continue
        found = wrap(Tokens.pad(rows, "left"), before, behind, start)
        expected = Tokens.pad([row[:start] + before + row[start:] + behind for row in rows], "left")
        assert torch.equal(found.mask_BT[:, -expected.mask_BT.shape[1] :], expected.mask_BT)
        assert torch.equal(found.ids_BT * found.mask_BT, expected.ids_BT * expected.mask_BT)
        assert found.mask_BT.sum() == expected.mask_BT.sum()


@pytest.mark.parametrize("pooling", ENCODERS)
def test_any_objective_trains_them(pooling):
    """The frozen LM goes on from the one pooled state as it would from memory tokens."""
    compressor = make_compressor(encoder=ENCODERS[pooling])
    assert (compressor.states, compressor.memory.count) == (1, 0)
    compressor.learn(memory=True)
    rows = [row for row in compressor.backbone.tokenise(WORDS) if len(row) > 3]
    batch = SplitTexts.from_rows(rows, [2] * len(rows), compressor.backbone.pad_id)
    stage_loss(compressor, batch, stage_1("ctkd")).backward()
    moved = [
        p
        for p in compressor.parameters()
        if p.requires_grad and p.grad is not None and p.grad.any()
    ]
    assert moved
    assert not any(p.requires_grad for p in compressor.memory.parameters())


def test_saved_and_loaded_alike(tmp_path):
    compressor = make_compressor(encoder=PROMPT, stages=("ucl",))
    compressor.save(tmp_path, "ucl")
    other = make_compressor(encoder=PROMPT, stages=())
    other.backbone.adapters.add("ucl", settings(), seed=9)
    other.load(tmp_path, "ucl")
    tokens = Tokens.pad(compressor.backbone.tokenise(WORDS[:2]), "left")
    with torch.no_grad():
        assert torch.equal(other.eval()(tokens), compressor(tokens))


def settings():
    from llm2comp.recipe import AdapterSettings

    return AdapterSettings(rank=4, alpha=8, dropout=0.0)


def test_room_is_left_for_the_prompt():
    compressor = make_compressor("gpt2", encoder=PROMPT)
    room = compressor.max_tokens(512)
    assert room == compressor.backbone.max_positions - len(compressor.before) - len(
        compressor.behind
    )
    assert compressor(Tokens.pad([[2] * room], "left")).isfinite().all()


@pytest.mark.parametrize(
    ("encoder", "told"),
    [
        (
            {"pooling": "mean", "prompt": "x {text}"},
            "a prompt is for pooling last_token, found mean",
        ),
        ({"pooling": "last_token", "prompt": "x"}, "must contain {text} once"),
        ({"pooling": "cls"}, "'last_token'"),
        ({"poolin": "mean"}, "did you mean 'pooling'?"),
    ],
)
def test_wrong_settings(encoder, told):
    tree = {
        "format_version": 1,
        "name": "x",
        "model": {"name": "builtin:tiny"},
        "ucl": {"data": [{"source": "x.txt"}]},
    }
    assert parse_recipe(tree | {"encoder": {"pooling": "mean"}}).memory_tokens == 0
    with pytest.raises(RecipeError, match="encoder") as caught:
        parse_recipe(tree | {"encoder": encoder})
    assert told in str(caught.value)


def test_pooled_encoders_have_no_memory_of_their_own():
    compressor = make_compressor(encoder=MEAN)
    assert compressor.memory.vectors_KD.shape[0] == 0
    assert isinstance(compressor, Compressor)
    assert compressor.get_buffer("weights_K").tolist() == [1.0]
