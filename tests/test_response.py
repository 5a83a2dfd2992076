"""LLM2Vec-Gen: rows of texts and responses, both losses against naive forms, a run, a frozen
backbone.
"""

import copy
import functools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import llm2comp
from families import SENTENCES, make_backbone, make_compressor, relative_error, snapshot, untouched
from llm2comp.data.loaded import Response
from llm2comp.data.pretext import PretextCollator
from llm2comp.data.response_rows import ResponseRows, response_rows
from llm2comp.data.sources import read_responses
from llm2comp.errors import BackboneError, DataError, RecipeError
from llm2comp.model.backbone.frozen import Frozen
from llm2comp.model.compressor import Compressor
from llm2comp.model.tokens import SplitTexts
from llm2comp.objectives.alignment import MAP_FILE, alignment_loss, map_to_teacher
from llm2comp.recipe import AdapterSettings, PretextStage, TextData, parse_recipe
from llm2comp.runs.folder import FOLDERS
from llm2comp.runs.keys import stage_keys
from llm2comp.storage.golden import verify
from llm2comp.training.generate import generate_responses
from llm2comp.training.plan import plan
from llm2comp.training.pretext_model import PretextModel
from llm2comp.training.responder import ResponseOptions
from llm2comp.training.run import train
from oracles import embed_texts
from test_resume import StoppedError, train_until
from tiny_run import assert_refused, cli, make_tree, sentences, write_recipe, write_rows

WIDTH, OTHER_WIDTH = 32, 20
PAIRS = list(zip(sentences(9, 4), sentences(9, 9, seed=5), strict=True))


def answers(width=WIDTH, pairs=PAIRS):
    vectors_ND = np.random.default_rng(1).normal(size=(len(pairs), width)).astype(np.float32)
    return [
        Response(text, response, vector_D)
        for (text, response), vector_D in zip(pairs, vectors_ND, strict=True)
    ]


def make_stage(objective=None, **settings):
    tree = {
        "data": [{"source": "x", "response": "response"}],
        "objective": objective or {"response": 1.0, "alignment": 0.5},
    }
    return PretextStage.model_validate(
        tree | {"min_characters": 0, "batch_size": 3, "max_tokens": 60} | settings
    )


def rows_of(backbone, width=WIDTH, stage=None, **settings):
    stage = stage or make_stage(**settings)
    return response_rows(
        answers(width), stage, backbone.tokenise, stage.max_tokens, backbone.bos_id
    )[0]


# ---- rows


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_response_is_the_continuation_whatever_the_sample(family):
    backbone = make_backbone(family)
    rows = ResponseRows(rows_of(backbone), samples=45, seed=4, batch_size=2)
    drawn = [rows[i] for i in range(45)]
    seen = {}
    for sample in drawn:
        context = backbone.tokenizer.decode(
            sample["ids"][: sample["site"]], skip_special_tokens=True
        )
        seen.setdefault(context, []).append(sample)
        assert (sample["ids"][0] == backbone.bos_id) == (backbone.bos_id is not None)
        assert sample["ids"].count(backbone.bos_id) == (backbone.bos_id is not None)
    assert seen.keys() == {text for text, _ in PAIRS}
    for text, response, vector_D in ((a.text, a.response, a.teacher_D) for a in answers()):
        assert len(seen[text]) >= 3
        for sample in seen[text]:
            assert backbone.tokenizer.decode(sample["ids"][sample["site"] :]) == response
            assert np.array_equal(sample["teacher"], vector_D)
    batch = PretextCollator(backbone.pad_id)(drawn[:4])
    assert batch["teacher"].shape == (4, WIDTH)
    split = SplitTexts.from_tensors(batch)
    assert split.context.lengths_B.tolist() == [sample["site"] for sample in drawn[:4]]


def test_long_rows_are_left_out_or_cut_and_all_reasons_counted():
    backbone = make_backbone()

    def length(text):
        return len(backbone.tokenise([text])[0])

    long, short = " ".join(sentences(4)), "the fox reads"
    assert length(long) > 80
    assert length(short) < 20
    given = [
        Response(short, long),
        Response(long, short),
        Response(long, long),
        Response(short, short),
        Response("a", short),
    ]

    def made(policy):
        stage = make_stage("response", long_texts=policy, min_characters=2, max_tokens=40)
        return response_rows(given, stage, backbone.tokenise, 40, backbone.bos_id)

    rows, left_out = made("skip")
    assert left_out == {"under 2 characters": 1, "over 40 tokens with their response": 3}
    assert [(len(row.ids), row.site) for row in rows] == [(2 * length(short) - 1, length(short))]
    rows, left_out = made("truncate")
    assert left_out == {"under 2 characters": 1}
    said = length(short) - 1
    assert [(row.site, len(row.ids)) for row in rows] == [
        (length(short), 40),
        (40 - said, 40),
        (20, 40),
        (length(short), length(short) + said),
    ]
    text, response = backbone.tokenise([short, long])
    assert rows[0].ids.tolist() == (text + response[1:])[:40]
    with pytest.raises(DataError, match="no text is fit for stage 1"):
        response_rows(
            given[-1:],
            make_stage("response", min_characters=2),
            backbone.tokenise,
            40,
            backbone.bos_id,
        )


# ---- losses


def batch_of(compressor, width=WIDTH, count=4):
    rows = ResponseRows(rows_of(compressor.backbone, width), samples=count, seed=4)
    return PretextCollator(compressor.backbone.pad_id)([rows[i] for i in range(count)])


def naive(family, compressor, batch, weights, kind="mse", to_teacher=None):
    """Each text alone and unpadded, LM and encoder as two models, full logits, one ordinary
    backward pass.
    """
    encoder, frozen = copy.deepcopy(compressor), untouched(family)
    to_teacher, bos = copy.deepcopy(to_teacher), encoder.backbone.bos_id
    lm, table = encoder.backbone.lm, frozen.get_input_embeddings()
    split, nll, distances = SplitTexts.from_tensors(batch), [], []
    for i in range(len(batch["teacher"])):
        context, said = (
            t.ids_BT[i][t.mask_BT[i].bool()][None] for t in (split.context, split.continuation)
        )
        read = torch.cat([lm.get_input_embeddings()(context), encoder.memory.vectors_KD[None]], 1)
        states = lm.base_model(
            inputs_embeds=read, use_cache=False, is_causal=False
        ).last_hidden_state[:, context.shape[1] :]
        start = [] if bos is None else [table(torch.tensor([[bos]]))]
        logits = frozen(
            inputs_embeds=torch.cat([*start, states, table(said)], 1), use_cache=False
        ).logits[0]
        nll += functional.cross_entropy(
            logits[-said.shape[1] - 1 : -1], said[0], reduction="none"
        ).unbind()
        embedding = states[0].mean(0) if to_teacher is None else to_teacher(states[0].mean(0))
        target = batch["teacher"][i]
        cosine = embedding @ target / (embedding.norm() * target.norm())
        distances.append(
            ((embedding - target) ** 2).sum() / len(target) if kind == "mse" else 1 - cosine
        )
    losses = {"response": torch.stack(nll).mean(), "alignment": torch.stack(distances).mean()}
    loss = sum(weight * losses[name] for name, weight in weights.items())
    loss.backward()
    return loss.item(), gradients(encoder, to_teacher)


def gradients(compressor, to_teacher=None):
    found = {
        name: p.grad for name, p in compressor.backbone.lm.named_parameters() if p.grad is not None
    }
    found |= {
        f"map.{name}": p.grad for name, p in (to_teacher or torch.nn.Module()).named_parameters()
    }
    return found | {"memory": compressor.memory.vectors_KD.grad}


CASES = [
    ({"response": 1.0}, "mse", WIDTH),
    ({"alignment": 1.0}, "mse", WIDTH),
    ({"alignment": 2.0}, "cosine", WIDTH),
    ({"response": 1.0, "alignment": 0.5}, "mse", WIDTH),
    ({"response": 0.3, "alignment": 1.0}, "cosine", OTHER_WIDTH),
]


@pytest.mark.parametrize(("weights", "kind", "width"), CASES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_loss_and_gradient_are_the_naive_ones(family, weights, kind, width):
    compressor = make_compressor(family)
    compressor.learn(memory=True)
    stage = make_stage(weights, alignment_loss=kind)
    to_teacher = map_to_teacher(WIDTH, width, 3, torch.device("cpu"))
    assert (to_teacher is None) == (width == WIDTH)
    batch = batch_of(compressor, width)
    expected, theirs = naive(family, compressor, batch, weights, kind, to_teacher)
    model = PretextModel(compressor, stage, to_teacher)
    loss = model(model.items(batch), **batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    mine = gradients(compressor, to_teacher)
    learned = {name for name in theirs if "lora" in name or "map" in name or name == "memory"}
    assert learned <= mine.keys()
    assert len(learned) > 10
    assert all(relative_error(mine[name], theirs[name]) < 2e-3 for name in learned)
    assert not any(
        p.grad is not None for n, p in compressor.backbone.lm.named_parameters() if "lora" not in n
    )


def test_micro_batches_add_up_to_the_batch():
    compressor = make_compressor("llama")
    compressor.learn(memory=True)
    model = PretextModel(compressor, make_stage({"response": 1.0, "alignment": 3.0}))
    rows = ResponseRows(rows_of(compressor.backbone), samples=6, seed=4)
    collate = PretextCollator(compressor.backbone.pad_id)
    parts = [collate([rows[i] for i in places]) for places in ((0,), (1, 2, 3), (4, 5))]
    items = np.sum([model.items(part) for part in parts], axis=0).tolist()
    whole = collate([rows[i] for i in range(6)])
    assert items == model.items(whole)
    assert items[0] == 6  # objectives are sorted by name: alignment first
    sums = sum(model(items, **part).item() for part in parts)
    assert sums == pytest.approx(model(items, **whole).item(), rel=1e-5)


def test_alignment_formula():
    embedding_BD = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    teacher_BD = torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    assert alignment_loss(embedding_BD, teacher_BD, 2, "mse").item() == pytest.approx(
        (1.0 + 2.5) / 2
    )
    assert alignment_loss(embedding_BD, teacher_BD, 2, "cosine").item() == pytest.approx(
        (1 - 0.96 + 1) / 2
    )
    double = torch.nn.Linear(2, 2)
    with torch.no_grad():
        double.weight.copy_(2 * torch.eye(2))
        double.bias.zero_()
    assert alignment_loss(embedding_BD, teacher_BD, 2, "mse", double).item() == pytest.approx(
        (14.5 + 4.0) / 2
    )


# ---- runs


def vectors_file(folder, width):
    rows = [
        {"text": a.text, "response": a.response, "teacher": a.teacher_D.tolist()}
        for a in answers(width)
    ]
    return write_rows(folder / f"answers-{width}.jsonl", rows)


def response_tree(folder, source, **changes):
    tree = make_tree(folder, ucl=None, scl=None)
    stage = {
        "data": [{"source": str(source), "response": "response"}],
        "objective": {"response": 1.0, "alignment": 1.0},
    }
    tree["pretext"] |= stage | {"min_characters": 0, "save_every_steps": 1}
    return tree | {"watch": None} | changes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, folder of responses that the tiny backbone gave, with a teacher's embeddings)."""
    folder = tmp_path_factory.mktemp("run")
    lm = make_tree(folder)["model"]["name"]
    options = ResponseOptions(max_new_tokens=8, shard_size=7, teacher=f"mean:{lm}", device="cpu")
    generate_responses(lm, sentences(20, 5), folder / "responses", options)
    return folder, folder / "responses"


def test_a_run_over_generated_responses(made, tmp_path):
    folder, source = made
    run = train(parse_recipe(response_tree(folder, source)), tmp_path / "run")
    steps = [
        json.loads(line) for line in (run / "1-pretext" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) >= 4
    assert losses[-1] < losses[0]
    assert not (run / "1-pretext" / MAP_FILE).exists(), "the widths are the same"
    model = llm2comp.load(run, "cpu")
    plain = tmp_path / "plain"
    other = train(parse_recipe(response_tree(folder, source, name="plain") | {"seed": 1}), plain)
    assert not torch.allclose(
        embed_texts(model, SENTENCES),
        embed_texts(llm2comp.load(other, "cpu"), SENTENCES),
        atol=1e-3,
    )
    assert plan(parse_recipe(response_tree(folder, source)))[0][0].rows == len(
        read_responses(TextData(source=str(source), response="response")).rows
    )


def test_a_stopped_run_goes_on_with_its_map(made, tmp_path):
    """Teacher of another width: the map is trained, saved with checkpoints and with the stage, and
    not exported.
    """
    source = vectors_file(tmp_path, OTHER_WIDTH)
    recipe = parse_recipe(response_tree(made[0], source))
    whole = train(recipe, tmp_path / "whole")

    def stop():
        raise StoppedError

    with pytest.raises(StoppedError):
        train_until(recipe, tmp_path / "parts", ("pretext", 3), stop, tmp_path / "seen")
    fresh = map_to_teacher(WIDTH, OTHER_WIDTH, recipe.seed, torch.device("cpu")).state_dict()
    halfway = load_file(next((tmp_path / "parts" / "1-pretext").glob("checkpoint-2")) / MAP_FILE)
    parts = train_until(recipe, tmp_path / "parts", ("pretext", 99), stop, tmp_path / "after")
    assert [json.loads(line)[1] for line in (tmp_path / "after").read_text().splitlines()] == [3, 4]
    for file in (MAP_FILE, "memory.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(run / "1-pretext" / file) for run in (whole, parts))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), file
    maps = [fresh, halfway, load_file(whole / "1-pretext" / MAP_FILE)]
    assert all(tuple(found["weight"].shape) == (OTHER_WIDTH, WIDTH) for found in maps)
    assert not torch.equal(maps[0]["weight"], maps[1]["weight"])
    assert not torch.equal(maps[1]["weight"], maps[2]["weight"])
    assert not list((whole / "model").rglob(MAP_FILE))
    assert embed_texts(llm2comp.load(whole, "cpu"), SENTENCES).shape[1] == WIDTH


def test_other_responses_are_other_inputs(made, tmp_path):
    folder, _ = made
    lm = str(folder / "backbone")
    keys = []
    for count in (6, 8, 6):
        out = tmp_path / "r"
        for path in out.glob("*"):
            path.unlink()
        generate_responses(
            lm, sentences(3), out, ResponseOptions(max_new_tokens=count, device="cpu")
        )
        tree = response_tree(folder, out)
        tree["pretext"]["objective"] = "response"
        keys.append(stage_keys(parse_recipe(tree))["pretext"])
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize(
    "objective", ["ctkd", "continuation", "response", {"mntp": 1.0, "response": 1.0}]
)
def test_other_objectives_learn_on_responses(made, tmp_path, objective):
    folder, source = made
    tree = response_tree(folder, source)
    tree["pretext"] |= {"objective": objective, "steps": 1}
    run = train(parse_recipe(tree), tmp_path / "run")
    assert (run / "model").is_dir()


# ---- bad input


def test_recipes_that_cannot_be(made, tmp_path):
    folder, source = made

    def refused(match, **changes):
        tree = response_tree(folder, source)
        tree["pretext"] |= changes
        with pytest.raises(RecipeError, match=match):
            parse_recipe(tree)

    plain = {"source": str(folder / "texts.jsonl")}
    refused("objective alignment and response needs responses", data=[plain])
    refused("cannot be mixed", data=[plain, {"source": str(source), "response": "response"}])
    refused("a text with a response has one piece", long_texts="chunk")
    tree = response_tree(folder, source)
    tree["pretext"]["data"][0]["response"] = "reply"
    file = write_recipe(tmp_path, **tree)
    assert_refused(
        cli("train", file, "--out", tmp_path / "run"),
        "no column 'reply'",
        "column: text, response: response}",
    )
    tree["pretext"]["data"][0] = {"source": str(folder / "texts.jsonl"), "response": "response"}
    file = write_recipe(tmp_path, **tree)
    assert_refused(cli("train", file, "--out", tmp_path / "run"), "no column 'response'")


def test_rows_with_bad_vectors_are_left_out(tmp_path):
    good, bad = [1.0, 2], [None, [], "x", 3, [1, None], [float("nan"), 1], [[1.0, 2.0]]]
    rows = [{"text": "t", "response": "r", "teacher": vector} for vector in (good, *bad)]
    loaded = read_responses(
        TextData(source=str(write_rows(tmp_path / "a.jsonl", rows)), response="response"),
        teacher=True,
    )
    assert [answer.teacher_D.tolist() for answer in loaded.rows] == [[1.0, 2.0]]
    assert loaded.skipped == {"'teacher' is not a list of numbers": len(bad)}


def test_teachers_of_several_widths(made, tmp_path):
    tree = response_tree(made[0], vectors_file(tmp_path, 8))
    tree["pretext"]["data"].append(
        {"source": str(vectors_file(tmp_path, 9)), "response": "response"}
    )
    with pytest.raises(DataError, match="teachers of several widths"):
        train(parse_recipe(tree), tmp_path / "run")


# ---- a frozen backbone

NONE = AdapterSettings(kind="none")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_frozen_leaves_every_base_weight_and_trains_the_memory(family, checkpointing):
    compressor = Compressor.fresh(make_backbone(family), 3, seed=3)
    backbone = compressor.backbone
    backbone.add_adapter("pretext", NONE)
    assert isinstance(backbone.adapters, Frozen)
    compressor.learn(memory=True)
    backbone.set_checkpointing(checkpointing)
    before, memory = snapshot(backbone), compressor.memory.vectors_KD.detach().clone()
    compressor.train()
    learning = [name for name, p in compressor.named_parameters() if p.requires_grad]
    assert learning == ["memory.vectors_KD"]
    model = PretextModel(compressor, make_stage({"response": 1.0, "alignment": 0.1, "ctkd": 1.0}))
    optimizer = torch.optim.SGD([compressor.memory.vectors_KD], lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        batch = batch_of(compressor)
        loss = model(model.items(batch), **batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = snapshot(backbone)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not torch.equal(memory, compressor.memory.vectors_KD)


def test_frozen_run_from_end_to_end(made, tmp_path):
    folder, source = made
    tree = make_tree(folder, adapter={"kind": "none"}, watch=None)
    tree["pretext"] = response_tree(folder, source)["pretext"]
    tree["ucl"] |= {"train_memory": True, "attention_dropout": 0.2}
    tree["scl"] |= {"train_memory": True}
    recipe = parse_recipe(tree)
    run = train(recipe, tmp_path / "run")
    memories = [
        load_file(run / place / "memory.safetensors")["memory"] for place in FOLDERS.values()
    ]
    assert all(
        not torch.equal(one, other) for one, other in zip(memories, memories[1:], strict=False)
    )
    assert verify(run / "model") > 0.9999
    live, model = llm2comp.load(run / "3-scl", "cpu"), llm2comp.load(run, "cpu")
    assert torch.allclose(embed_texts(live, SENTENCES), embed_texts(model, SENTENCES), atol=1e-4)
    frozen, exported = (
        load_file(folder / "backbone" / "model.safetensors"),
        load_file(next((run / "model").rglob("model.safetensors"))),
    )
    layers = [name for name in exported if "layers." in name]
    base = {name.removeprefix("model."): tensor for name, tensor in frozen.items()}
    assert len(layers) > 10
    assert all(torch.equal(exported[name], base[name.removeprefix("model.")]) for name in layers)
    assert [p.trainable for p in plan(recipe)[0]] == [3 * WIDTH] * 3


def test_kinds_do_not_mix_with_none():
    backbone = make_backbone()
    backbone.add_adapter("pretext", AdapterSettings(rank=2))
    with pytest.raises(BackboneError, match="cannot mix"):
        backbone.add_adapter("ucl", NONE)
    for kind in ("lora", "full"):
        other = make_backbone()
        other.add_adapter("pretext", NONE)
        with pytest.raises(BackboneError, match="cannot mix"):
            other.add_adapter("ucl", AdapterSettings(kind=kind))
        other = make_backbone()
        other.add_adapter("pretext", AdapterSettings(kind=kind))
        with pytest.raises(BackboneError, match="cannot mix"):
            other.add_adapter("ucl", NONE)


def test_nothing_would_learn(made):
    folder, source = made
    refused = functools.partial(pytest.raises, RecipeError)
    with refused(
        match=r"nothing learns in ucl, as adapter.kind is none: set ucl.train_memory: true"
    ):
        parse_recipe(make_tree(folder, adapter={"kind": "none"}, scl=None))
    tree = response_tree(folder, source, adapter={"kind": "none"})
    parse_recipe(tree)
    with refused(match="nothing learns in pretext"):
        parse_recipe(tree | {"encoder": {"pooling": "mean"}})
    tree["pretext"]["objective"] = "mntp"
    with refused(match="nothing learns in pretext"):
        parse_recipe(tree)
    tree["pretext"]["train_embeddings"] = "all"
    parse_recipe(tree)
