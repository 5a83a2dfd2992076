"""EBAE and EBAR (Llama2Vec): bags of tokens, the loss over them, and the prompts around a text.

Loss and gradients of the whole objective against the naive form, for every family: test_pretext.py.
"""

import random

import pytest
import torch
from torch.nn import functional

from families import make_compressor, relative_error, stage_1
from llm2comp.errors import BackboneError, RecipeError
from llm2comp.model.tokens import SplitTexts, Tokens
from llm2comp.objectives import stage_loss
from llm2comp.objectives.ebae_ebar import bag_ids
from llm2comp.objectives.kl import chunked_bag_entropy
from llm2comp.recipe import EncoderSettings, PretextStage, parse_recipe
from llm2comp.recipe.pretext_stage import BagPrompts
from llm2comp.training.stages import RunOptions, run_pretext
from tiny_run import make_tree


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_bag_is_the_set_of_a_texts_tokens(side, start):
    draw = random.Random(1)
    repeated = 0
    for _ in range(50):
        rows = [[draw.randint(0, 5) for _ in range(draw.randint(1, 9))] for _ in range(4)]
        bags_BT = bag_ids(Tokens.pad(rows, side, pad_id=4), start)
        for row, bag in zip(rows, bags_BT.tolist(), strict=True):
            assert sorted(token for token in bag if token >= 0) == sorted(set(row[start:]))
            repeated += len(row[start:]) - len(set(row[start:]))
    assert repeated > 100, "vacuous: no token came twice"


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_loss_and_gradient_are_the_naive_ones(chunk):
    generator = torch.Generator().manual_seed(0)
    states, head = (
        torch.randn(7, 5, generator=generator).double(),
        torch.randn(5, 11, generator=generator).double(),
    )
    bags = [[3], [0, 10, 4], [], [1, 2], [5, 6, 7, 8], [0], [9, 1]]
    targets = torch.tensor([bag + [-1] * (4 - len(bag)) for bag in bags])
    weights = torch.rand(7, generator=generator).double()

    def results(loss_of):
        leaf = states.clone().requires_grad_()
        loss = 3 * loss_of(leaf)
        loss.backward()
        return loss.item(), leaf.grad

    def naive(leaf):
        logs = functional.log_softmax(leaf @ head, -1)
        return sum(-weights[i] * logs[i, token] for i, bag in enumerate(bags) for token in bag)

    found = results(
        lambda leaf: chunked_bag_entropy(leaf, targets, lambda x: x @ head, weights, chunk)
    )
    expected = results(naive)
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    assert relative_error(found[1], expected[1]) < 1e-12
    assert not found[1][2].any(), "an empty bag pulls nothing"


def test_logits_of_few_rows_exist_at_once():
    seen = []

    def project(states):
        seen.append(len(states))
        return states @ torch.ones(4, 6)

    chunk = 2
    chunked_bag_entropy(
        torch.ones(5, 4), torch.zeros(5, 1, dtype=torch.int64), project, torch.ones(5), chunk
    )
    assert seen == [2, 2, 1]


def loss_of(compressor, rows, sites, prompts=None):
    batch = SplitTexts.from_rows(rows, sites, compressor.backbone.pad_id)
    stage = stage_1("ebae_ebar", bag_prompts=prompts or BagPrompts())
    with torch.no_grad():
        return stage_loss(compressor, batch, stage).item()


def test_both_prompts_and_both_targets_count():
    compressor = make_compressor()
    rows = [[0, 20, 30, 20, 40, 50, 60]]
    default = loss_of(compressor, rows, [4])
    assert loss_of(compressor, rows, [4], BagPrompts()) == default
    others = [
        loss_of(compressor, rows, [4], BagPrompts(itself="{text} again:")),
        loss_of(compressor, rows, [4], BagPrompts(next="{text} again:")),
        loss_of(compressor, [[0, 20, 30, 20, 40, 50, 61]], [4]),
        loss_of(compressor, [[0, 20, 31, 20, 40, 50, 60]], [4]),
    ]
    assert all(abs(other - default) > 1e-4 for other in others), others
    assert loss_of(compressor, [[0, 20, 30, 20, 60, 40, 50]], [4]) == pytest.approx(
        default, rel=1e-6
    ), "a bag has no order"
    assert loss_of(compressor, [[0, 20, 30, 20, 40, 50, 60, 50]], [4]) == pytest.approx(
        default, rel=1e-6
    ), "nor counts"


def test_a_context_of_bos_alone_has_no_bag():
    compressor = make_compressor()
    empty, same = (
        loss_of(compressor, [[0, 20, 30]], [1]),
        loss_of(compressor, [[0, 20, 30]], [1], BagPrompts(itself="x {text}")),
    )
    assert empty == same > 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_prompts_are_those_of_the_encoder(family):
    """Trained by `bag_prompts.itself`, read by `encoder.prompt`: the same tokens, so the same
    state.
    """
    prompt = BagPrompts().itself
    compressor = make_compressor(
        family, encoder=EncoderSettings(pooling="last_token", prompt=prompt)
    )
    assert compressor.backbone.around(prompt) == (compressor.before, compressor.behind)
    assert compressor.backbone.tokenizer.decode(compressor.behind) == " The original sentence:"


@pytest.mark.parametrize("prompt", ["no text", "{text} and {text}"])
@pytest.mark.parametrize("which", ["itself", "next"])
def test_recipe_refuses_a_prompt(tmp_path, which, prompt):
    tree = make_tree(tmp_path)
    with pytest.raises(RecipeError, match=rf"pretext\.bag_prompts\.{which}(.|\n)*text"):
        parse_recipe(tree | {"pretext": tree["pretext"] | {"bag_prompts": {which: prompt}}})


def test_the_prompt_has_room(tmp_path, capsys):
    """160 positions: a prompt takes its own of them, whatever the pooling; one that leaves none is
    refused.
    """
    file = tmp_path / "texts.txt"
    file.write_text("the lazy dog holds what the text said\n" * 8)

    def run(prompt):
        compressor = make_compressor("gpt2", stages=("pretext",))
        stage = PretextStage(
            data=[{"source": str(file)}],
            objective="ebae_ebar",
            bag_prompts={"next": prompt},
            steps=1,
            batch_size=2,
            min_characters=0,
            site_margin_tokens=4,
            schedule={"learning_rate": 1e-2, "warmup_steps": 1},
        )
        tokens = sum(len(part) for part in compressor.backbone.around(prompt))
        folder = tmp_path / str(tokens)
        folder.mkdir()
        run_pretext(compressor, stage, folder, seed=0, options=RunOptions())
        return tokens

    tokens = run("{text}" + " #" * 30)
    assert tokens > 30
    assert f"up to {160 - tokens} tokens" in (said := "".join(capsys.readouterr()))
    assert "does not train the memory tokens" in said
    with pytest.raises(BackboneError, match="no room for a text"):
        run("{text}" + " #" * 90)
