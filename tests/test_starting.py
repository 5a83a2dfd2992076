"""`start_from`: a run over an encoder begins as that encoder, adds to it, and needs it no more."""

import json
import shutil

import numpy as np
import pytest
import torch

from families import make_lm
from llm2comp.errors import Llm2CompError, RecipeError, RunError
from llm2comp.model.tokens import Tokens
from llm2comp.model.vectors import embed_texts
from llm2comp.recipe import change_recipe, load_recipe, parse_recipe
from llm2comp.runs.folder import Run, add_adapter, begin
from llm2comp.runs.keys import stage_keys
from llm2comp.runs.starting import start_of
from llm2comp.storage.golden import verify
from llm2comp.storage.identity import identity
from llm2comp.storage.loading import load
from llm2comp.training.checks import check
from llm2comp.training.progress import ProgressCallback
from llm2comp.training.run import train
from tiny_run import assert_refused, cli, finished, make_tree, save_backbone, sentences, write_pairs

TEXTS = sentences(6, 9, seed=5)
INHERITED = ("model", "memory")


def make_start(folder, start, stages=("scl",), **changes):
    """A recipe that starts from an encoder; LM and memory are inherited."""
    tree = make_tree(folder, **changes)
    own = {k: v for k, v in tree.items() if k not in ("pretext", "ucl", "scl", *INHERITED)}
    return (
        own
        | {"start_from": str(start), "watch": None}
        | {stage: tree[stage] for stage in stages}
        | {k: v for k, v in changes.items() if k in INHERITED}
    )


@pytest.fixture(scope="module")
def further(tmp_path_factory):
    """(folder, its start, the run): SCL on other pairs, over a run of three stages."""
    folder, start = tmp_path_factory.mktemp("further"), finished()[1]
    tree = make_start(folder, start)
    write_pairs(folder / "pairs.jsonl", [1] * 24, seed=40)
    for spec in tree["scl"]["data"]:
        del spec["instruction"]
    tree["scl"]["train_memory"] = True
    return folder, start, train(parse_recipe(tree), folder / "run")


def test_a_start_given_as_a_change_is_inherited_from():
    """A default of the recipe is not its own word: as in a system of a study."""
    own = load_recipe("smollm2-short")
    given = ["start_from=builtin:general", "pretext=null"]
    theirs = load_recipe("smollm2-general")
    found = change_recipe(own, given)
    assert own.model.attention != found.model.attention == theirs.model.attention
    assert own.memory != found.memory
    assert found.ucl == own.ucl
    assert found.max_tokens == own.max_tokens


def test_what_it_does_not_say_is_inherited():
    _, start = finished()
    theirs = load_recipe(start / "recipe.yaml")
    asked = [{"source": "pairs.jsonl"}, {"source": "more.jsonl", "instruction": None}]
    base = {"format_version": 1, "name": "x", "start_from": str(start)}
    recipe = parse_recipe(base | {"scl": {"data": asked}, "model": {"dtype": "float32"}})
    assert recipe.memory == theirs.memory
    assert recipe.memory.tokens == 3
    assert (recipe.model.name, recipe.model.dtype) == (theirs.model.name, "float32")
    assert recipe.model.device == "auto", "of the machine, not of the encoder"
    assert [spec.instruction for spec in recipe.scl.data] == ["find the text", None]
    packaged = parse_recipe(base | {"start_from": "builtin:general", "scl": {"data": asked}})
    assert (packaged.model.name, packaged.model.attention) == ("builtin:smollm2", "causal")
    assert (packaged.memory.nested, packaged.max_tokens) == ((1,), 504)


@pytest.mark.parametrize("place", ["", "model", "2-ucl", "1-pretext"])
def test_step_0_is_the_encoder_that_it_starts_from(tmp_path, place):
    """Over a fresh adapter, too, whose B is 0; the frozen LM is the bare one."""
    _, start = finished()
    recipe = parse_recipe(make_start(tmp_path, start / place, stages=("scl",)))
    compressor = begin(recipe, start_of(recipe)).eval()
    stage = place if place[:1].isdigit() else "3-scl"
    theirs = Run(start).compressor(stage[2:]).eval()
    tokens = theirs.backbone.tokenise(TEXTS)
    padded = Tokens.pad(tokens, "left", theirs.backbone.pad_id)
    with torch.no_grad():
        expected_BD = theirs(padded)
        assert torch.equal(compressor(padded), expected_BD)
        add_adapter(compressor, recipe, "scl")
        assert torch.allclose(compressor.eval()(padded), expected_BD, atol=1e-5)
        x_BTD = compressor.backbone.embed(padded.ids_BT)
        bare = begin(parse_recipe(make_tree(tmp_path, model={"name": recipe.model.name})), None)
        decoded = compressor.backbone.decoder_pass(x_BTD, padded.mask_BT)
        assert torch.equal(decoded, bare.backbone.decoder_pass(x_BTD, padded.mask_BT))
        assert not torch.equal(decoded, compressor.backbone.encoder_pass(x_BTD, padded.mask_BT))
    assert len(compressor.backbone.adapters.names) == 2 + ["1-pretext", "2-ucl", "3-scl"].index(
        stage
    )


def test_it_adds_to_the_encoder_and_leaves_it_as_it_is(further):
    _, start, run = further
    for stage in ("1-pretext", "2-ucl", "3-scl"):
        for file in ("adapter/adapter_model.safetensors", "memory.safetensors"):
            assert (run / "start" / stage / file).read_bytes() == (
                start / stage / file
            ).read_bytes()
    before, after = (embed_texts(load(place), TEXTS) for place in (start / "3-scl", run / "3-scl"))
    assert np.abs(np.asarray(after) - np.asarray(before)).max() > 1e-3, "vacuous: nothing learned"
    compressor = Run(run).compressor("scl")
    assert compressor.backbone.adapters.names == ["start00", "start01", "start02", "scl"]
    newest = compressor.backbone.adapters.state("scl")
    assert any(tensor.any() for key, tensor in newest.items() if "lora_B" in key)


def test_it_is_loaded_exported_verified_as_any_other(further):
    """Its stored folder embeds as its stages do, with the start's query prompt."""
    _, start, run = further
    live, stock = load(run / "3-scl"), load(run)
    assert np.allclose(embed_texts(live, TEXTS), embed_texts(stock, TEXTS), atol=1e-5)
    assert verify(run / "model") > 0.99999
    assert live.prompts["query"] == load(start).prompts["query"] == stock.prompts["query"] != ""
    assert "| start | run |" in (run / "model" / "README.md").read_text()


def test_another_encoder_may_start_from_it(further, tmp_path):
    """Twice removed, without the one in the middle."""
    _, _, run = further
    middle = shutil.copytree(run, tmp_path / "middle")
    second = train(parse_recipe(make_start(tmp_path, middle, stages=("ucl",))), tmp_path / "second")
    shutil.rmtree(middle)
    found = load(second / "2-ucl")
    assert len(found[0].compressor.backbone.adapters.names) == 5
    assert found.prompts["query"] == load(run).prompts["query"], "UCL trains no prompt of its own"
    assert np.allclose(embed_texts(found, TEXTS), embed_texts(load(second), TEXTS), atol=1e-5)
    assert identity(second / "2-ucl", found) != identity(run / "3-scl", load(run / "3-scl"))


@pytest.mark.thorough
def test_it_goes_on_after_a_stop_without_its_start(tmp_path):
    """As one that was not stopped, though what it starts from is gone by then."""
    start = shutil.copytree(finished()[1], tmp_path / "start-run")
    tree = make_start(tmp_path, start)
    tree["scl"] |= {"steps": 5, "save_every_steps": 2}
    recipe = parse_recipe(tree)
    whole = train(recipe, tmp_path / "whole")
    on_step_end = ProgressCallback.on_step_end

    def stop_at_4(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_end", stop_at_4)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run")
    shutil.rmtree(start)
    run = train(load_recipe(tmp_path / "run" / "recipe.yaml"), tmp_path / "run")
    rows = (run / "3-scl" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5]
    for file in ("3-scl/adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    with pytest.raises(RecipeError, match="no encoder to start from"):
        check(recipe)


def test_other_weights_to_start_from_are_another_training(tmp_path):
    folder, start = finished()
    recipe = parse_recipe(make_start(tmp_path, start))
    plain = parse_recipe(make_tree(folder, pretext=None, ucl=None))
    keys = {
        stage_keys(r)["scl"]
        for r in (
            recipe,
            parse_recipe(make_start(tmp_path, start / "2-ucl")),
            plain,
        )
    }
    assert len(keys) == 3
    other = shutil.copytree(start, tmp_path / "elsewhere")
    assert stage_keys(parse_recipe(make_start(tmp_path, other))) == stage_keys(recipe)
    shutil.copy(start / "1-pretext" / "memory.safetensors", other / "3-scl" / "memory.safetensors")
    shutil.copy(
        start / "2-ucl" / "adapter" / "adapter_model.safetensors", other / "3-scl" / "adapter"
    )
    assert stage_keys(parse_recipe(make_start(tmp_path, other))) != stage_keys(recipe)


def test_what_cannot_be_started_from_is_refused(tmp_path):
    _, start = finished()

    def refused(kind, match, place=start, **changes):
        with pytest.raises(kind, match=match):
            check(parse_recipe(make_start(tmp_path, place, **changes)))

    base = {"model": {"name": str(tmp_path / "backbone")}}
    refused(RecipeError, "memory.tokens(.*\n)*.*3, as in", memory={"tokens": 5})
    refused(RecipeError, "model.attention", model={"attention": "causal"})
    refused(RecipeError, "adapter.kind", adapter={"kind": "full"})
    refused(RecipeError, "language model", place=tmp_path / "backbone", **base)
    exported = shutil.copytree(start / "model", tmp_path / "exported")
    refused(RecipeError, "exported folder(.*\n)*.*name the run", place=exported, **base)
    refused(RecipeError, "no such folder; there is", place=start.parent / "rnu", **base)
    refused(RecipeError, "no encoder to start from", place="someone/encoder", **base)
    refused(RecipeError, "no encoder to start from", place="someone/encoder")
    other = save_backbone(tmp_path / "other", lm=make_lm("llama", seed=9))
    refused(Llm2CompError, "another base", model={"name": str(other)})
    begun = shutil.copytree(start, tmp_path / "begun")
    (begun / "3-scl" / "done.json").unlink()
    refused(RunError, "not finished", place=begun)
    check(parse_recipe(make_start(tmp_path, begun / "2-ucl")))
    full = shutil.copytree(start, tmp_path / "full")
    text = (full / "recipe.yaml").read_text()
    (full / "recipe.yaml").write_text(text.replace("kind: lora", "kind: full"))
    refused(RecipeError, "whole trained copy", place=full)
    recipe = parse_recipe(make_start(tmp_path, begun / "2-ucl"))
    with pytest.raises(RecipeError, match="from itself"):
        check(recipe, run=begun)
    with pytest.raises(RunError, match="belongs to another recipe"):
        train(recipe, begun)


def test_the_command_line_says_it_in_one_line(tmp_path):
    recipe = tmp_path / "further.yaml"
    recipe.write_text("format_version: 1\nname: x\nstart_from: nowhere/at/all\nscl: {data: []}\n")
    said = cli("train", recipe, "--out", tmp_path / "run")
    assert_refused(
        said, "start_from: no encoder to start from", "builtin:general", "nowhere/at/all"
    )
