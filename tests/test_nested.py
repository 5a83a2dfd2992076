"""Nested memory: losses over its prefixes, the mask that cuts it, fewer states at encode time."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

import llm2comp
from families import (
    FAMILIES,
    MEMORY,
    TEXTS,
    make_backbone,
    make_compressor,
    push_adapter,
    relative_error,
    stage_1,
)
from llm2comp.errors import ModelFolderError, RecipeError
from llm2comp.model.compressor import STATE_FILE, Compressor
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.memory import (
    MemoryTokens,
    maxsim,
    mean_weights,
    prefix_embeddings,
    prefix_of,
    prefix_weights,
)
from llm2comp.model.tokens import SplitTexts, Tokens
from llm2comp.objectives import stage_loss
from llm2comp.recipe import EncoderSettings, MemorySettings, SclStage, UclStage, parse_recipe
from llm2comp.storage.export import export
from llm2comp.storage.identity import identity
from llm2comp.storage.reweighting import reweight
from llm2comp.storage.weights import memory_weights
from llm2comp.training.contrastive import contrastive_loss
from oracles import embed_texts
from test_contrastive import columns_of, features_of, lora_gradients, naive
from tiny_run import assert_refused, cli, finished, make_tree, write_rows

DATA = {"data": [{"source": "unused"}]}
K = 4


orders = pytest.mark.parametrize("order", ["last", "first"])


def make_nested(family="llama", nested=(1, 2), tokens=K, order="last"):
    memory = MemorySettings(tokens=tokens, nested=nested)
    compressor = Compressor.fresh(make_backbone(family), memory, 3)
    assert compressor.order == "last"
    compressor.order = order
    push_adapter(compressor.backbone, "pretext")
    return compressor.eval()


def padded(compressor, texts=TEXTS):
    return Tokens.pad(compressor.backbone.tokenise(texts), "left", compressor.backbone.pad_id)


# --- settings


def test_settings():
    assert MemorySettings().prefixes == (8,)
    assert MemorySettings(tokens=8, nested=(4, 1, 8)).prefixes == (1, 4, 8)
    tree = {
        "format_version": 1,
        "name": "x",
        "model": {"name": "builtin:tiny"},
        "ucl": {"data": [{"source": "x.txt"}]},
    }
    assert parse_recipe(
        tree | {"memory": {"tokens": 64, "nested": [1, 2, 4, 8]}}
    ).memory.prefixes == (1, 2, 4, 8, 64)
    for memory, told in [
        ({"tokens": 4, "nested": [1, 8]}, "nested [8] is more than the 4 memory tokens"),
        ({"nested": [0]}, "greater than or equal to 1"),
        ({"start_as": ""}, "at least 1 character"),
        ({"start_as": "{text} means:"}, "start_as holds {text}: give only the words that follow"),
        ({"attention": "causal"}, "unknown key"),
        ({"attention": "separate"}, "attention: separate is gone"),
    ]:
        with pytest.raises(RecipeError, match="memory") as caught:
            parse_recipe(tree | {"memory": memory})
        assert told in str(caught.value)
    mean = {"pooling": "mean"}
    for memory in ({"nested": [1]}, {"start_as": " in short"}):
        with pytest.raises(
            RecipeError, match=f"memory.{next(iter(memory))} is for encoder.pooling"
        ):
            parse_recipe(tree | {"memory": memory, "encoder": mean})
    of_before = parse_recipe(tree | {"memory": {"tokens": 4, "attention": "full"}})
    assert of_before == parse_recipe(tree | {"memory": {"tokens": 4}}), (
        "recipes of earlier runs are read"
    )


def test_nothing_nests_without_memory_tokens():
    with pytest.raises(RecipeError, match="without memory tokens") as caught:
        Compressor.fresh(
            make_backbone(), MemorySettings(nested=(1,)), 0, EncoderSettings(pooling="mean")
        )
    assert "encoder.pooling: memory" in str(caught.value)


# --- maths


def test_prefix_embeddings_and_weights():
    memory = torch.randn(5, K, 7, generator=torch.Generator().manual_seed(0))
    for order, begin in (("first", lambda size: 0), ("last", lambda size: K - size)):
        found = prefix_embeddings(memory, (1, 3, K), order)
        for place, size in enumerate((1, 3, K)):
            part = memory[:, begin(size) : begin(size) + size]
            assert torch.equal(prefix_of(memory, size, order), part)
            assert torch.allclose(found[:, place], part.mean(1), atol=1e-6)
        assert torch.equal(prefix_weights(3, 3, order), mean_weights(3))
    assert prefix_weights(4, 2, "first").tolist() == [0.5, 0.5, 0.0, 0.0]
    assert prefix_weights(4, 2, "last").tolist() == [0.0, 0.0, 0.5, 0.5]


def test_maxsim_is_the_naive_double_loop():
    draw = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(2, 3, 5, generator=draw), torch.randn(4, 6, 5, generator=draw)
    found = maxsim(queries, documents)
    assert found.shape == (2, 4)
    for b, query in enumerate(queries):
        for c, document in enumerate(documents):
            assert found[b, c].item() == pytest.approx(
                sum(max((q @ d).item() for d in document) for q in query), rel=1e-5
            )


# --- stage 1


def batch_of(compressor):
    rows = [[*row, *row, *row] for row in compressor.backbone.tokenise(TEXTS)]
    return SplitTexts.from_rows(rows, [len(row) // 2 for row in rows], compressor.backbone.pad_id)


def all_gradients(compressor):
    found = {
        n: p.grad.clone()
        for n, p in compressor.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    compressor.zero_grad()
    assert "memory.vectors_KD" in found
    assert len(found) > 10
    return found


def assert_gradients(found, expected, tolerance=1e-4):
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < tolerance, name


@pytest.mark.parametrize(
    "objectives", [{"ctkd": 1.0}, {"ctkd": 1.0, "continuation": 0.3, "reconstruction": 0.1}]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@orders
def test_stage_1_is_the_mean_over_prefixes_and_encodes_once(order, family, objectives, monkeypatch):
    """Against the same encoder cut to one prefix at a time: the decoder reads its states alone."""
    compressor = make_nested(family, order=order).train()
    compressor.learn(memory=True)
    batch, stage = batch_of(compressor), stage_1(objectives)
    encode, decode, calls = compressor.memory_states, compressor.backbone.decoder_pass, []
    monkeypatch.setattr(
        compressor, "memory_states", lambda tokens: calls.append("encoder") or encode(tokens)
    )
    counted = lambda *given: calls.append("frozen LM") or decode(*given)  # noqa: E731
    monkeypatch.setattr(compressor.backbone, "decoder_pass", counted)
    loss = stage_loss(compressor, batch, stage)
    texts = 2 if "reconstruction" in objectives else 1  # that the decoder goes on with
    assert Counter(calls) == {"encoder": 1, "frozen LM": 1 + 3 * texts}, "one teacher for all"
    loss.backward()
    found = all_gradients(compressor)
    compressor.prefixes = (K,)
    singles = []
    for first in (1, 2, K):
        part = slice(0, first) if order == "first" else slice(K - first, K)
        monkeypatch.setattr(
            compressor, "memory_states", lambda tokens, part=part: encode(tokens)[:, part]
        )
        singles.append(stage_loss(compressor, batch, stage))
    assert max(singles) - min(singles) > 1e-3, "vacuous: all prefixes alike"
    expected = torch.stack(singles).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    assert_gradients(found, all_gradients(compressor))


@pytest.mark.parametrize("tokens", [1, 2, 64])
def test_any_number_of_memory_tokens_learns(tokens):
    compressor = make_nested(tokens=tokens, nested=()).train()
    compressor.learn(memory=True)
    batch = batch_of(compressor)
    stage_loss(compressor, batch, stage_1("ctkd"), {"ctkd": len(TEXTS)}).backward()
    assert compressor.memory.vectors_KD.shape[0] == tokens
    assert (compressor.memory.vectors_KD.grad.norm(dim=1) > 0).all()


# --- stages 2 and 3


def naive_nested(compressor, stage, columns, prefixes, dims):
    """Mean over prefixes of the sum over dimensions of the published formula, each text alone."""
    both, total = getattr(stage, "denominator", "") == "both_views", []
    rows = [compressor.backbone.tokenise(column) for column in columns]
    states = [
        torch.cat([compressor.memory_states(Tokens.pad([ids], "left")) for ids in column])
        for column in rows
    ]
    for first in prefixes:
        begin = 0 if compressor.order == "first" else K - first
        part = slice(begin, begin + first)
        anchors, *candidates = (states_BKD[:, part].mean(1) for states_BKD in states)
        for dim in dims:
            cut = anchors[:, :dim], torch.cat(candidates)[:, :dim]
            total.append(naive(*cut, stage.temperature, cut[0] if both else None))
    return torch.stack(total).sum() / len(prefixes), total


@pytest.mark.thorough
@pytest.mark.parametrize("dims", [(), (8,)])
@pytest.mark.parametrize("mini_batch_size", [None, 2])
@pytest.mark.parametrize(
    ("stage", "negatives"),
    [
        (UclStage(**DATA), 0),
        (UclStage(**DATA, denominator="both_views"), 0),
        (SclStage(**DATA), 0),
        (SclStage(**DATA), 2),
    ],
)
@orders
def test_contrastive_loss_is_the_mean_over_prefixes(order, stage, negatives, mini_batch_size, dims):
    compressor = make_nested(order=order).train()
    model = as_sentence_transformer(compressor, 64).train()
    stage = stage.model_copy(
        update={"mini_batch_size": mini_batch_size, "matryoshka_dims": dims, "temperature": 0.2}
    )
    columns = columns_of(negatives)
    loss = contrastive_loss(model, stage)(features_of(model, columns), None)
    loss.backward()
    found = lora_gradients(compressor)
    expected, parts = naive_nested(compressor, stage, columns, (1, 2, K), sorted({*dims, 32}))
    assert max(parts) - min(parts) > 1e-2, "vacuous: all prefixes alike"
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    assert_gradients(found, lora_gradients(compressor))


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_contrastive_loss_encodes_each_text_once_per_pass(mini_batch_size, monkeypatch):
    """Once, or twice under GradCache, however many prefixes there are."""
    texts = []
    for nested in ((), (1, 2)):
        compressor = make_nested(nested=nested).train()
        model = as_sentence_transformer(compressor, 64).train()
        encode, seen = compressor.memory_states, []
        monkeypatch.setattr(
            compressor,
            "memory_states",
            lambda tokens, e=encode, s=seen: s.append(len(tokens.ids_BT)) or e(tokens),
        )
        stage = SclStage(**DATA, mini_batch_size=mini_batch_size)
        contrastive_loss(model, stage)(features_of(model, columns_of(1)), None).backward()
        texts.append(sum(seen))
    assert texts == [15 if mini_batch_size is None else 30] * 2


def test_gradcache_gives_a_loss_without_gradients_too():
    compressor = make_nested()
    model = as_sentence_transformer(compressor, 64)
    features = features_of(model, columns_of(1))
    values = []
    with torch.no_grad():
        for size in (None, 2):
            loss = contrastive_loss(model, SclStage(**DATA, mini_batch_size=size))
            values.append(loss([dict(f) for f in features], None).item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


# --- prefixes


def prefix_gap(family, **settings):
    """How far the first j states of a K-token encoder are from those of a j-token encoder with the
    same vectors.
    """
    backbone = make_backbone(family, **settings)
    push_adapter(backbone, "pretext")
    whole = Compressor.fresh(backbone, K, 3).eval()
    gaps = []
    for first in (1, 2, K):
        memory = MemoryTokens(whole.memory.vectors_KD[:first])
        part = Compressor(backbone, memory).eval()
        with torch.no_grad():
            states, expected = whole.memory_states(padded(whole)), part.memory_states(padded(whole))
        gaps.append((states[:, :first] - expected).abs().max().item())
    assert (states[:, 0] - states[:, -1]).abs().max() > 0.05, "vacuous: all memory tokens alike"
    assert gaps[-1] < 1e-6
    return max(gaps)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_nest_under_causal_attention_alone(family):
    assert prefix_gap(family, attention="causal") < 1e-5
    assert prefix_gap(family) > 0.05


def test_the_card_names_the_prefixes(tmp_path):
    backbone = make_backbone(attention="causal")
    push_adapter(backbone, "pretext")
    live = as_sentence_transformer(
        Compressor.fresh(backbone, MemorySettings(tokens=K, nested=(1, 2)), 3).eval(), 40
    )
    export(live, tmp_path / "model", pooling="mean")
    assert (
        relative_error(
            embed_texts(llm2comp.load(tmp_path / "model"), TEXTS), embed_texts(live, TEXTS)
        )
        < 1e-5
    )
    assert "last 1, 2 memory states are trained" in (tmp_path / "model" / "README.md").read_text()


# --- j at encode time


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("nested") / "model"
    export(as_sentence_transformer(make_compressor(), 40), place)
    return place


def last_states(size, texts=TEXTS):
    compressor = make_compressor()
    with torch.no_grad():
        return compressor.memory_states(padded(compressor, texts))[:, -size:].mean(1)


@pytest.mark.parametrize("first", [1, 2, MEMORY])
def test_num_memory_is_the_mean_of_the_last_states(folder, first):
    found = embed_texts(llm2comp.load(folder, "cpu", num_memory=first), TEXTS)
    assert relative_error(found, last_states(first)) < 1e-5
    plain = embed_texts(llm2comp.load(folder, "cpu"), TEXTS)
    assert relative_error(plain, last_states(MEMORY)) < 1e-5, "nothing was written"
    assert (relative_error(plain, found) < 1e-5) == (first == MEMORY)


@pytest.mark.thorough
@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("place", [".", "model", "1-pretext", "3-scl"])
def test_num_memory_of_a_run_and_its_stages(place, first):
    run = Path(finished()[1])
    live = llm2comp.load(run / ("3-scl" if place in (".", "model") else place), "cpu")
    compressor = live[0].compressor
    with torch.no_grad():
        expected = compressor.memory_states(padded(compressor))[:, -first:].mean(1)
    assert (
        relative_error(embed_texts(llm2comp.load(run / place, "cpu", first), TEXTS), expected)
        < 1e-5
    )


@pytest.mark.parametrize("place", ["model", "2-ucl"])
def test_num_memory_has_an_identity_of_its_own(place):
    run = Path(finished()[1])
    found = {
        first: identity(run / place, llm2comp.load(run / place, "cpu", first))
        for first in (None, 1, 2, 3)
    }
    assert found[None] == found[3], "all of them, by the mean, is what is stored"
    assert len({who.revision for who in found.values()}) == 3
    assert found[2].name == f"{found[None].name}-last-2"
    assert found[2] == identity(run / place, llm2comp.load(run / place, "cpu", 2))


def test_stored_weights_and_a_choice_over_them_are_told_apart(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    reweight(copy, [0.25, 0.5, 0.25])
    found = [identity(copy, llm2comp.load(copy, "cpu", first)) for first in (None, MEMORY, 1)]
    assert len({who.revision for who in found}) == 3
    assert found[0].name == found[1].name


@pytest.mark.parametrize("first", [0, -1, MEMORY + 1])
def test_more_states_than_there_are(folder, first):
    for place in (folder, finished()[1] / "1-pretext"):
        with pytest.raises(ModelFolderError, match="cannot give so many memory states") as caught:
            llm2comp.load(place, "cpu", num_memory=first)
        assert f"1 to {MEMORY}" in str(caught.value)


def test_a_model_without_memory_tokens_or_with_one(tmp_path):
    export(
        as_sentence_transformer(make_compressor(encoder=EncoderSettings(pooling="mean")), 40),
        tmp_path / "mean",
    )
    for place in (tmp_path / "mean", "mean:builtin:tiny"):
        with pytest.raises(ModelFolderError, match="cannot give so many memory states") as caught:
            llm2comp.load(place, "cpu", num_memory=1)
        assert "a model with memory tokens" in str(caught.value)
    single = as_sentence_transformer(make_compressor(memory=1), 40)
    export(single, tmp_path / "one")
    assert (
        relative_error(
            embed_texts(llm2comp.load(tmp_path / "one", "cpu", 1), TEXTS),
            embed_texts(single, TEXTS),
        )
        < 1e-5
    )
    with pytest.raises(ModelFolderError, match="cannot give so many"):
        llm2comp.load(tmp_path / "one", "cpu", 2)


def test_num_memory_on_the_command_line(tmp_path):
    run = finished()[1]
    file = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    said = cli("embed", file, "-m", run, "-o", tmp_path / "out.npy", "--num-memory", 2)
    assert said.code == 0, said.err
    found = torch.from_numpy(np.load(tmp_path / "out.npy"))
    assert relative_error(found, embed_texts(llm2comp.load(run, "cpu", 2), TEXTS)) < 1e-5
    assert_refused(
        cli("embed", file, "-m", run, "-o", tmp_path / "out.npy", "--num-memory", 4), "1 to 3"
    )


# --- whole runs


@pytest.mark.thorough
def test_a_nested_run_learns_otherwise_and_is_exported(tmp_path):
    tree = make_tree(tmp_path)
    runs = {}
    for name, nested in {"plain": [], "nested": [1, 2]}.items():
        recipe = parse_recipe(tree | {"memory": {"tokens": 3, "nested": nested}})
        runs[name] = llm2comp.train(recipe, tmp_path / name)
    live = llm2comp.load(runs["nested"] / "3-scl")
    assert live[0].compressor.prefixes == (1, 2, 3)
    assert (
        relative_error(embed_texts(live, TEXTS), embed_texts(llm2comp.load(runs["nested"]), TEXTS))
        < 1e-5
    )
    for stage in ("1-pretext", "2-ucl", "3-scl"):
        plain, nested = (embed_texts(llm2comp.load(run / stage), TEXTS) for run in runs.values())
        assert relative_error(nested, plain) > 1e-3, stage


def test_evaluation_of_the_last_states():
    from llm2comp.lab.evaluation.evaluate import EvaluateOptions, _encoder

    run = Path(finished()[1])
    encoder = _encoder(str(run), [], {}, EvaluateOptions(device="cpu", num_memory=2))
    assert encoder.mteb_model_meta.name.endswith("-last-2")
    assert torch.equal(
        embed_texts(encoder.model, TEXTS), embed_texts(llm2comp.load(run, "cpu", 2), TEXTS)
    )


# --- the order


def test_one_state_of_an_exported_encoder_is_last_token_pooling(tmp_path):
    """So are `num_memory=1` of its folder, and a folder exported with it."""
    live = as_sentence_transformer(make_nested(), 40)
    export(live, tmp_path / "model", pooling="mean")
    transformer = SentenceTransformer(str(tmp_path / "model"), device="cpu")[0]
    stock = SentenceTransformer(modules=[transformer, Pooling(32, "lasttoken")], device="cpu")
    expected = embed_texts(stock, TEXTS)
    one = llm2comp.load(tmp_path / "model", "cpu", num_memory=1)
    assert relative_error(embed_texts(one, TEXTS), expected) < 1e-6
    whole = embed_texts(llm2comp.load(tmp_path / "model", "cpu"), TEXTS)
    assert relative_error(whole, expected) > 0.05, "vacuous: all states alike"
    live[0].compressor.use_prefix(1)
    assert relative_error(embed_texts(live, TEXTS), expected) < 1e-5
    export(live, tmp_path / "one")
    modules = json.loads((tmp_path / "one" / "modules.json").read_text())
    assert [module["type"].split(".")[-1] for module in modules] == ["Transformer", "Pooling"]
    assert "plain last-token pooling" in (tmp_path / "one" / "README.md").read_text()
    again = llm2comp.load(tmp_path / "one", "cpu", num_memory=1)
    assert relative_error(embed_texts(again, TEXTS), expected) < 1e-5
    assert memory_weights(again) == [0.0] * (K - 1) + [1.0]
    with pytest.raises(ModelFolderError, match="cannot give so many memory states") as caught:
        llm2comp.load(tmp_path / "one", "cpu", num_memory=2)
    assert "1 to 1" in str(caught.value)


@orders
def test_the_order_goes_with_the_folder(order, tmp_path):
    """Of a stage and of an export; earlier versions wrote none, which means `first`."""
    compressor = make_nested(order=order)
    compressor.save(tmp_path / "stage", "pretext")
    export(as_sentence_transformer(compressor, 40), tmp_path / "model", pooling="mean")
    with torch.no_grad():
        states = compressor.memory_states(padded(compressor))
    means = {"first": states[:, :2].mean(1), "last": states[:, -2:].mean(1)}
    assert relative_error(means["first"], means["last"]) > 0.05, "vacuous: all states alike"

    def check(said):
        again = make_nested(order="first" if order == "last" else "last")
        again.load(tmp_path / "stage", "pretext")
        again.use_prefix(2)
        assert again.order == said
        assert relative_error(again(padded(again)).detach(), means[said]) < 1e-5
        folder = llm2comp.load(tmp_path / "model", "cpu", num_memory=2)
        assert relative_error(embed_texts(folder, TEXTS), means[said]) < 1e-5
        assert identity(tmp_path / "model", folder).name.endswith(f"-{said}-2")

    check(order)
    file, config = tmp_path / "stage" / STATE_FILE, tmp_path / "model" / "config.json"
    save_file(load_file(file), file)
    settings = json.loads(config.read_text())
    assert settings.pop("llm2comp_memory_order") == order
    config.write_text(json.dumps(settings))
    check("first")


def test_other_weights_leave_the_order(tmp_path):
    run = Path(shutil.copytree(finished()[1], tmp_path / "run"))
    reweight(str(run), [0.25, 0.5, 0.25])
    for place in ("3-scl", "model"):
        found = llm2comp.load(run / place, "cpu", num_memory=1)
        assert identity(run / place, found).name.endswith("-last-1")


@pytest.mark.thorough
def test_training_goes_on_in_the_order_of_the_stage_before(tmp_path):
    """A run that an earlier version began: its stage 1 says nothing of an order."""
    tree = make_tree(tmp_path, memory={"tokens": 3, "nested": [1]}, scl=None)
    run = llm2comp.train(parse_recipe(tree), tmp_path / "run")
    assert llm2comp.load(run / "2-ucl")[0].compressor.order == "last"
    shutil.rmtree(run / "2-ucl")
    shutil.rmtree(run / "model")
    file = run / "1-pretext" / STATE_FILE
    save_file(load_file(file), file)
    llm2comp.train(parse_recipe(tree), run)
    assert llm2comp.load(run / "2-ucl")[0].compressor.order == "first"
    assert identity(run, llm2comp.load(run, num_memory=1)).name.endswith("-first-1")
