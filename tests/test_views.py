"""Crops as views of stage 2: spans of a text's words, and what the trainer encodes of them."""

import random

import pytest
import torch

from families import SENTENCES, make_compressor
from llm2comp.errors import RecipeError
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.tokens import Tokens
from llm2comp.recipe import parse_recipe
from llm2comp.training.run import train
from llm2comp.training.views import CropCollator, crop, two_crops
from small_stages import make_stage, run_stage
from test_resume import StoppedError, make_recipe, steps_of, stop, train_until, trained, weights
from tiny_run import make_tree, sentences

SHARE = (0.3, 0.7)
LONG = sentences(20, words=20, seed=3)


def spans(text, least, most):
    """Naively: all spans of a text with single spaces, by their number of words."""
    words = text.split(" ")
    fewest, greatest = (max(1, round(share * len(words))) for share in (least, most))
    counts = range(fewest, greatest + 1)
    return {n: {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)} for n in counts}


@pytest.mark.parametrize("share", [SHARE, (0.05, 0.05), (1.0, 1.0), (0.01, 1.0)])
@pytest.mark.parametrize("text", ["one", "two words", SENTENCES[0], LONG[0]])
def test_crops_are_the_spans_of_a_text(text, share):
    """All of them and nothing else; none empty."""
    draw = random.Random(0)
    found = {crop(text, share, draw) for _ in range(3000)}
    expected = spans(text, *share)
    assert all(n >= 1 and parts for n, parts in expected.items())
    assert found == set().union(*expected.values())


def test_lengths_are_uniform_in_the_share():
    draw, text = random.Random(0), " ".join(map(str, range(1000)))
    counts = [len(crop(text, SHARE, draw).split()) for _ in range(2000)]
    assert (min(counts), max(counts)) == pytest.approx((300, 700), abs=3)
    assert sum(counts) / len(counts) == pytest.approx(500, abs=10)


ODD = ["  a\tb\n\nc  d ", "記憶" * 40, "x" * 70, "Ünicode 記憶 too?", "e\u0301 " * 9]


@pytest.mark.parametrize("text", ODD)
def test_crops_are_substrings_whatever_the_white_space(text):
    draw = random.Random(1)
    found = {crop(text, SHARE, draw) for _ in range(50)}
    assert len(found) > 1
    for part in found:
        assert part in text
        assert part == part.strip() != ""


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_text_without_words_stays(text):
    assert crop(text, SHARE, random.Random(0)) == text


def test_views_are_fixed_by_seed_epoch_and_text_alone():
    views = {text: two_crops(text, SHARE, 5, 2) for text in LONG}
    random.seed(99)
    assert {text: two_crops(text, SHARE, 5, 2) for text in reversed(LONG)} == views
    assert all(first != second for first, second in views.values())
    for other in ((5, 3), (6, 2)):
        assert all(two_crops(text, SHARE, *other) != views[text] for text in LONG)


@pytest.mark.parametrize("share", [[0.7, 0.3], [0.0, 0.5], [0.5, 1.1], [0.5]])
def test_shares_that_are_none(tmp_path, share):
    tree = make_tree(tmp_path)
    with pytest.raises(RecipeError, match="ucl"):
        parse_recipe(tree | {"ucl": tree["ucl"] | {"crop_share": share}})


def test_the_collator_tokenises_the_views():
    compressor = make_compressor()
    model = as_sentence_transformer(compressor, 12)

    class Sampler:
        epoch = 4

    collate = CropCollator(model.preprocess, seed=3, share=SHARE, sampler=Sampler())
    batch = collate([{"anchor": text, "positive": text} for text in LONG])
    assert len(batch) == 4
    for place, column in enumerate(("anchor", "positive")):
        views = [two_crops(text, SHARE, 3, 4)[place] for text in LONG]
        rows = [ids[:12] for ids in compressor.backbone.tokenise(views)]
        expected = Tokens.pad(rows, "left", compressor.backbone.pad_id)
        assert torch.equal(batch[f"{column}_input_ids"], expected.ids_BT)
        assert torch.equal(batch[f"{column}_attention_mask"], expected.mask_BT)


def rows_of(ids_BT):
    """Texts of a batch, by a tokenizer that loses nothing."""
    tokenizer = make_compressor("llama").backbone.tokenizer
    return tokenizer.batch_decode(ids_BT, skip_special_tokens=True)


@pytest.mark.thorough
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stage_encodes_the_views_of_each_epoch(tmp_path, monkeypatch, workers):
    """24 texts in batches of 4, so that the 8th step is in the second epoch.

    The order of texts is that of `views: dropout`.
    """
    stage = make_stage(tmp_path / "data", "ucl", steps=8, crop_share=SHARE, max_tokens=64)
    plain = run_stage("ucl", stage, tmp_path / "plain", monkeypatch, dropout=0.1)
    cropped = stage.model_copy(update={"views": "crop", "workers": workers})
    found = run_stage("ucl", cropped, tmp_path / "cropped", monkeypatch, dropout=0.1)
    pairs = list(zip(plain.batches, found.batches, strict=True))
    assert len(pairs) >= 8
    for step, (whole, views) in enumerate(pairs):
        texts = rows_of(whole[0])
        assert texts == rows_of(whole[1])
        expected = [two_crops(text, SHARE, 7, step // 6) for text in texts]
        for place, ids in enumerate(views):
            assert rows_of(ids) == [pair[place] for pair in expected]


@pytest.mark.thorough
def test_a_resumed_stage_draws_the_same_views(tmp_path):
    """Stopped and resumed within the second epoch."""
    recipe = make_recipe(tmp_path, steps=13, scl=None)
    ucl = recipe.ucl.model_copy(update={"views": "crop", "steps": 13})
    recipe = recipe.model_copy(update={"pretext": None, "ucl": ucl})
    run, seen = tmp_path / "run", tmp_path / "seen.jsonl"
    reference = train(recipe, tmp_path / "reference")
    with pytest.raises(StoppedError):
        train_until(recipe, run, ("ucl", 13), stop, seen)
    trained(seen)
    train_until(recipe, run, ("never", 0), stop, seen)
    assert trained(seen) == steps_of("ucl", 13, 13)
    assert weights(run) == weights(reference)
    other = recipe.model_copy(update={"ucl": ucl.model_copy(update={"views": "dropout"})})
    plain = train(other, tmp_path / "dropout")
    assert weights(plain) != weights(reference), "vacuous: the views do not matter"
