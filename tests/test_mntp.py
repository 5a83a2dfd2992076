"""Masks of MNTP (LLM2Vec): which tokens, what stands in for them, and the stage that trains with
them.

Loss and gradients against the naive form, for every family: test_pretext.py.
"""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from families import FAMILIES, make_backbone, make_compressor, stage_1
from llm2comp.data.pretext import Masking, PretextCollator, PretextRows
from llm2comp.errors import BackboneError, RecipeError
from llm2comp.model.tokens import NOT_MASKED, SplitTexts
from llm2comp.objectives import count_items, stage_loss
from llm2comp.objectives.mntp import mask_token_id
from llm2comp.recipe import parse_recipe
from llm2comp.training.run import train
from test_resume import StoppedError, stop, train_until, trained, weights
from tiny_run import make_tree

MASK, VOCABULARY = 7, 1000
ROW = list(range(100, 201))


def masking(rate=0.2, bert=True, seed=3):
    return Masking(rate, MASK, VOCABULARY, bert, seed)


def places(replaced):
    return [place for place, new in enumerate(replaced) if new != NOT_MASKED]


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.8])
def test_a_share_of_the_tokens_is_masked_and_never_the_first(rate):
    for sample in range(50):
        replaced = masking(rate)(ROW, sample)
        assert len(replaced) == len(ROW)
        assert len(places(replaced)) == round(rate * 100)
        assert places(replaced)[0] > 0
    assert [len(places(masking(0.01)(row, 0))) for row in ([1, 2], ROW)] == [1, 1], "one at least"


def test_every_other_token_is_as_likely():
    counts = Counter(
        place for sample in range(4000) for place in places(masking()(ROW[:11], sample))
    )
    assert set(counts) == set(range(1, 11))
    assert all(abs(count / 4000 - 0.2) < 0.03 for count in counts.values()), counts


def test_of_ten_masked_eight_become_the_mask_token_one_a_random_one_one_stays():
    fates = Counter()
    for sample in range(1000):
        for place, new in enumerate(masking()(ROW, sample)):
            if new != NOT_MASKED:
                assert 0 <= new < VOCABULARY
                fates["mask" if new == MASK else "same" if new == ROW[place] else "random"] += 1
    assert sum(fates.values()) == 20_000
    shares = {fate: count / 20_000 for fate, count in fates.items()}
    assert shares == pytest.approx({"mask": 0.8, "random": 0.1, "same": 0.1}, abs=0.01)


def test_all_become_the_mask_token():
    replaced = [new for sample in range(50) for new in masking(bert=False)(ROW, sample)]
    assert set(replaced) == {MASK, NOT_MASKED}


def test_fixed_by_seed_and_sample():
    first = [masking()(ROW, sample) for sample in range(20)]
    assert [masking()(ROW, sample) for sample in reversed(range(20))] == first[::-1]
    assert len({tuple(places(replaced)) for replaced in first}) > 15, (
        "the same places in each sample"
    )
    assert [masking(seed=4)(ROW, sample) for sample in range(20)] != first


def test_batches_and_workers_change_no_mask():
    rows = [np.arange(10 * i, 10 * i + 12 + i % 5, dtype=np.int32) for i in range(9)]

    def samples(batch_size, workers):
        drawn = PretextRows(rows, samples=24, margin=2, seed=4, masking=masking())
        batches = DataLoader(
            drawn, batch_size=batch_size, num_workers=workers, collate_fn=PretextCollator(0)
        )
        return [
            (ids[mask.bool()].tolist(), new[mask.bool()].tolist(), new[~mask.bool()].tolist())
            for batch in batches
            for ids, mask, new in zip(
                batch["text_ids"], batch["text_mask"], batch["replaced"], strict=True
            )
        ]

    alone = samples(1, 0)
    assert [(ids, new) for ids, new, _ in samples(6, 2)] == [(ids, new) for ids, new, _ in alone]
    assert all(place == NOT_MASKED for _, _, padding in samples(6, 0) for place in padding)
    assert all(len(places(new)) == round(0.2 * (len(ids) - 1)) for ids, new, _ in alone)


def test_masks_go_where_the_batch_goes():
    split = SplitTexts.from_rows([[1, 2, 3], [4, 5]], [1, 1], 0, [[-1, 8, -1], [-1, 0]])
    assert split.replaced_BT.tolist() == [[-1, 8, -1], [-1, 0, -1]]
    again = SplitTexts.from_tensors(split.to("cpu").to_tensors())
    assert torch.equal(again.replaced_BT, split.replaced_BT)
    assert count_items(stage_1("mntp"), split, bos=False) == {"mntp": 2}
    assert (
        SplitTexts.from_tensors(SplitTexts.from_rows([[1, 2]], [1]).to_tensors()).replaced_BT
        is None
    )


def test_without_masks_there_is_no_loss():
    compressor = make_compressor()
    with pytest.raises(ValueError, match="with masks"):
        stage_loss(compressor, SplitTexts.from_rows([[1, 2]], [1]), stage_1("mntp"), {"mntp": 1})


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_token_of_a_family(family):
    """The tests' tokenizers have no mask token."""
    tokenizer = make_backbone(family).tokenizer
    assert mask_token_id(tokenizer, None, family) == tokenizer.get_vocab()["_"]


def test_mask_token_asked_for():
    tokenizer = make_backbone().tokenizer
    vocabulary = tokenizer.get_vocab()
    assert mask_token_id(tokenizer, "</s>", "here") == vocabulary["</s>"]
    assert mask_token_id(tokenizer, "#", "here") == vocabulary["#"]
    told = r"here: the mask token 'two tokens' is not one token(.|\n)*set pretext\.mask_token"
    with pytest.raises(BackboneError, match=told):
        mask_token_id(tokenizer, "two tokens", "here")
    with pytest.raises(BackboneError, match="'' is not one token"):
        mask_token_id(tokenizer, "", "here")
    tokenizer.add_special_tokens({"mask_token": "#"})
    assert mask_token_id(tokenizer, None, "here") == vocabulary["#"]
    assert mask_token_id(tokenizer, "_", "here") == vocabulary["_"]


@pytest.mark.parametrize("rate", [0, 1, -0.1])
def test_recipe_refuses_a_rate(tmp_path, rate):
    tree = make_tree(tmp_path)
    with pytest.raises(RecipeError, match="mask_rate"):
        parse_recipe(tree | {"pretext": tree["pretext"] | {"mask_rate": rate}})


STUDIES = {
    "mntp": ("mntp", {"pooling": "mean"}),
    "ebae_ebar": (
        "ebae_ebar",
        {"pooling": "last_token", "prompt": "{text} The original sentence:"},
    ),
    "both kinds": ({"ctkd": 1.0, "mntp": 0.5, "ebae_ebar": 0.2}, {}),
}


@pytest.mark.thorough
@pytest.mark.parametrize("study", STUDIES)
def test_a_run_stopped_and_run_again_ends_as_if_never_stopped(tmp_path, study):
    """Through `train`, with accumulation and dropout."""
    objective, encoder = STUDIES[study]
    tree = make_tree(tmp_path, encoder=encoder, ucl=None, scl=None) | {"watch": None}
    tree["pretext"] |= {
        "objective": objective,
        "steps": 5,
        "save_every_steps": 2,
        "gradient_accumulation_steps": 2,
    }
    recipe, seen = parse_recipe(tree), tmp_path / "seen.jsonl"
    reference = train(recipe, tmp_path / "reference")
    with pytest.raises(StoppedError):
        train_until(recipe, tmp_path / "run", ("pretext", 3), stop, seen)
    run = train_until(recipe, tmp_path / "run", ("never", 0), stop, seen)
    assert trained(seen) == [("pretext", step) for step in (1, 2, 3, 3, 4, 5)]
    assert weights_of(run) == weights_of(reference)
    losses = [
        json.loads(line)["loss"]
        for line in (run / "1-pretext" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 5
    assert losses[-1] < losses[0], "nothing was learned"


def weights_of(run):
    found = {name: content for name, content in weights(run).items() if "checkpoint" not in name}
    assert any("adapter" in name for name in found)
    return found
