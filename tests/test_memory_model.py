"""The plan's estimate of memory against what autograd really keeps, and how it must move with the
settings.
"""

import pytest
import torch
import transformers

from families import GROUPED, lm_from
from llm2comp.recipe import parse_recipe
from llm2comp.training import trainers
from llm2comp.training.plan import plan
from llm2comp.training.run import train
from tiny_run import make_tree, save_backbone

STAGES = ("pretext", "ucl", "scl")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A recipe on a backbone of proportions like those of real ones."""
    folder = tmp_path_factory.mktemp("memory")
    tree = make_tree(folder)
    wide = GROUPED | {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4}
    save_backbone(folder / "backbone", lm=lm_from(transformers.LlamaConfig(**wide)))
    return tree


def with_all(tree, **settings):
    return parse_recipe(tree | {stage: tree[stage] | settings for stage in STAGES})


def peaks(recipe):
    return {p.name: p.peak for p in plan(recipe)[0]}


def kept_by_autograd(recipe, run, monkeypatch):
    """Per stage: most bytes that one training step keeps for its backward passes, the model's own
    weights not counted.
    """
    found = dict.fromkeys(STAGES, 0)
    real = trainers.StageMixin.training_step

    def training_step(self, *args, **kwargs):
        own = {p.untyped_storage().data_ptr() for p in self.compressor.parameters()}
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = real(self, *args, **kwargs)
        found[self.stage_name] = max(found[self.stage_name], sum(sizes.values()))
        return loss

    monkeypatch.setattr(trainers.StageMixin, "training_step", training_step)
    train(recipe, run)
    return found


@pytest.mark.thorough
def test_estimate_is_about_what_a_step_keeps(tree, tmp_path, monkeypatch):
    recipe = parse_recipe(tree)
    plans, base = plan(recipe)
    kept = kept_by_autograd(recipe, tmp_path / "run", monkeypatch)
    for p in plans:
        held = base + 16 * p.trainable
        assert held < p.peak
        assert 0.6 < p.peak / (held + kept[p.name]) < 1.6, p.name


@pytest.mark.thorough
@pytest.mark.parametrize("stage", STAGES)
def test_how_it_moves(tree, stage):
    plain = peaks(parse_recipe(tree))[stage]
    assert peaks(with_all(tree, batch_size=8))[stage] > 1.5 * plain
    assert peaks(with_all(tree, gradient_checkpointing=True))[stage] < 0.6 * plain
    assert peaks(with_all(tree, precision="bfloat16"))[stage] < plain
    assert (
        peaks(parse_recipe(tree | {"model": tree["model"] | {"dtype": "bfloat16"}}))[stage] < plain
    )
    assert peaks(parse_recipe(tree | {"memory": {"tokens": 24}}))[stage] > plain
    if stage != "pretext":
        cached = tree | {stage: tree[stage] | {"mini_batch_size": 1}}
        assert peaks(parse_recipe(cached))[stage] < 0.7 * plain


def test_older_adapters_stay(tree):
    plans, _ = plan(parse_recipe(tree))
    alone, _ = plan(
        parse_recipe({key: value for key, value in tree.items() if key not in ("pretext", "scl")})
    )
    assert {p.name: p.peak for p in plans}["ucl"] - alone[0].peak == 4 * alone[0].trainable
