"""The projection behind the pooled embedding: by hand, in training, in stages and runs, in exported
folders and graphs.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import llm2comp
from families import MEMORY, SENTENCES, TEXTS, make_compressor, relative_error, untouched
from llm2comp.errors import ModelFolderError, RecipeError
from llm2comp.model.backbone.frozen import Frozen
from llm2comp.model.compressor import STATE_FILE
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.memory import MemoryTokens, new_projection
from llm2comp.model.tokens import Tokens
from llm2comp.model.vectors import memory_vectors
from llm2comp.objectives.alignment import MAP_FILE, map_to_teacher
from llm2comp.recipe import (
    EncoderSettings,
    MemorySettings,
    SclStage,
    UclStage,
    load_recipe,
    parse_recipe,
)
from llm2comp.runs.folder import FOLDERS
from llm2comp.storage.compiled import compile_folder, load_compiled
from llm2comp.storage.export import export
from llm2comp.storage.golden import verify
from llm2comp.storage.reweighting import reweight
from llm2comp.storage.runtimes import RUNTIMES
from llm2comp.training.contrastive import contrastive_loss
from llm2comp.training.generate import generate_responses
from llm2comp.training.pretext_model import PretextModel
from llm2comp.training.responder import ResponseOptions
from llm2comp.training.run import train
from oracles import embed_texts
from test_contrastive import columns_of, embeddings, features_of, naive
from test_export import LIMIT, PROMPT, PROMPTS, READ, USER
from test_response import answers, batch_of, gradients, make_stage, response_tree
from test_response import naive as naive_pretext
from test_resume import StoppedError, train_until
from tiny_run import make_tree, sentences, write_rows

WIDTH = 32
SIZES = {"same": WIDTH, 20: 20, 48: 48}
sizes = pytest.mark.parametrize("size", SIZES)
DATA = {"data": [{"source": "unused"}]}


def moved(compressor, seed=9):
    """With a projection that is neither the identity nor without bias."""
    with torch.no_grad():
        for parameter in compressor.projection.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.add_(0.3 * noise)
    return compressor


def make(size="same", family="llama", **settings):
    encoder = settings.pop("encoder", EncoderSettings()).model_copy(update={"projection": size})
    return make_compressor(family, encoder=encoder, **settings)


def padded(compressor, texts=TEXTS):
    return Tokens.pad(compressor.backbone.tokenise(texts), "left", compressor.backbone.pad_id)


# ---- settings


def test_settings():
    assert EncoderSettings().projection is None
    tree = {
        "format_version": 1,
        "name": "x",
        "model": {"name": "builtin:tiny"},
        "ucl": {"data": [{"source": "x.txt"}]},
    }
    for value in (None, "same", 20):
        recipe = parse_recipe(tree | {"encoder": {"projection": value}})
        assert recipe.encoder.projection == value
        assert parse_recipe(json.loads(recipe.model_dump_json())) == recipe
    for value in (0, -3, True, "wide", 2.5):
        with pytest.raises(RecipeError, match="encoder.projection"):
            parse_recipe(tree | {"encoder": {"projection": value}})


# ---- by hand


@pytest.mark.parametrize("pooling", ["memory", "mean", "last_token"])
@pytest.mark.parametrize("size", ["same", WIDTH])
def test_at_first_it_is_the_identity(size, pooling):
    settings = EncoderSettings(pooling=pooling)
    plain, compressor = make_compressor(encoder=settings), make(size, encoder=settings)
    with torch.no_grad():
        expected = plain(padded(plain))
        assert torch.equal(compressor(padded(compressor)), expected)
        assert not torch.allclose(moved(compressor)(padded(compressor)), expected, atol=0.1), (
            "vacuous: it does nothing"
        )


@pytest.mark.parametrize(("inside", "outside"), [(32, 20), (32, 48)])
def test_to_another_width_it_begins_as_a_random_rotation(inside, outside):
    first, again, other = (new_projection(inside, outside, seed) for seed in (1, 1, 2))
    assert torch.equal(first.weight, again.weight)
    assert not torch.allclose(first.weight, other.weight, atol=0.1)
    assert not first.bias.any()
    weight = first.weight.detach()
    square = weight @ weight.T if outside < inside else weight.T @ weight
    assert torch.allclose(square, torch.eye(min(inside, outside)), atol=1e-5)


@sizes
def test_it_is_a_linear_map_of_the_mean_and_so_of_each_state(size):
    compressor = moved(make(size))
    compressor.get_buffer("weights_K").copy_(torch.tensor([0.5, 0.2, 0.3]))
    weight, bias = compressor.projection.weight, compressor.projection.bias
    assert weight.shape == (SIZES[size], WIDTH)
    with torch.no_grad():
        states = compressor.memory_states(padded(compressor))
        found = compressor(padded(compressor))
        mean = 0.5 * states[:, 0] + 0.2 * states[:, 1] + 0.3 * states[:, 2]
        each = states @ weight.T + bias
        assert torch.allclose(found, mean @ weight.T + bias, atol=1e-5)
        assert torch.allclose(
            found, 0.5 * each[:, 0] + 0.2 * each[:, 1] + 0.3 * each[:, 2], atol=1e-5
        )
        assert torch.equal(states, (plain := make_compressor()).memory_states(padded(plain))), (
            "the states are before it"
        )


@sizes
def test_each_prefix_of_nested_memory_is_projected(size):
    compressor = moved(make(size, memory=MemorySettings(tokens=4, nested=(1, 2))))
    model = as_sentence_transformer(compressor, LIMIT)
    model[0].prefixes = compressor.prefixes
    tokens = padded(compressor)
    with torch.no_grad():
        found = model[0]({"input_ids": tokens.ids_BT, "attention_mask": tokens.mask_BT})[
            "sentence_embedding"
        ]
        assert found.shape == (len(TEXTS), 3, SIZES[size])
        for place, first in enumerate((1, 2, 4)):
            compressor.use_prefix(first)
            assert torch.allclose(found[:, place], compressor(tokens), atol=1e-6)


@sizes
def test_all_know_the_width(size):
    model = as_sentence_transformer(make(size), LIMIT)
    width = SIZES[size]
    assert model[0].compressor.width == width
    assert model[0].get_embedding_dimension() == model.get_embedding_dimension() == width
    assert embed_texts(model, TEXTS).shape == (len(TEXTS), width)
    loss = contrastive_loss(model, SclStage(**DATA, matryoshka_dims=[8, width]))
    assert list(loss.matryoshka_dims) == [width, 8]
    with pytest.raises(RecipeError, match="more dimensions") as caught:
        contrastive_loss(model, SclStage(**DATA, matryoshka_dims=[8, width + 1]))
    assert f"up to {width}" in str(caught.value)


# ---- training


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        ({"alignment": 1.0}, "mse"),
        ({"response": 1.0, "alignment": 0.5}, "mse"),
        ({"response": 0.3, "alignment": 1.0}, "cosine"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@sizes
def test_stage_1_is_the_naive_loss_and_gradient(size, family, weights, kind):
    """The decoder reads states before the projection; the teacher meets the embedding behind it."""
    compressor = moved(make(size, family))
    compressor.learn(memory=True)
    batch = batch_of(compressor, SIZES[size])
    expected, theirs = naive_pretext(
        family, compressor, batch, weights, kind, compressor.projection
    )
    model = PretextModel(compressor, make_stage(weights, alignment_loss=kind))
    loss = model(model.items(batch), **batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    mine = gradients(compressor, compressor.projection)
    learned = {name for name in theirs if "lora" in name or "map" in name or name == "memory"}
    assert {"map.weight", "map.bias", "memory"} < learned <= mine.keys()
    assert all(relative_error(mine[name], theirs[name]) < 2e-3 for name in learned)


def test_the_gradient_of_the_projection_written_out():
    """mse: dL/dW = 2/(B P) Σ_b (W m_b + c − t_b) m_bᵀ, dL/dc the same without m_bᵀ."""
    compressor = moved(make(20))
    compressor.learn(memory=True)
    batch = batch_of(compressor, 20)
    model = PretextModel(compressor, make_stage({"alignment": 1.0}))
    model(model.items(batch), **batch).backward()
    weight, bias = compressor.projection.weight, compressor.projection.bias
    with torch.no_grad():
        context = Tokens(batch["context_ids"], batch["context_mask"])
        mean_BD = compressor.memory_states(context).mean(1)
        error_BP = mean_BD @ weight.T + bias - batch["teacher"]
        scale = 2 / error_BP.numel()
        assert relative_error(weight.grad, scale * error_BP.T @ mean_BD) < 1e-4
        assert relative_error(bias.grad, scale * error_BP.sum(0)) < 1e-4


def test_the_decoder_does_not_see_it():
    found = []
    for compressor in (make_compressor(), moved(make(20))):
        compressor.learn(memory=True)
        model, batch = (
            PretextModel(compressor, make_stage({"response": 1.0})),
            batch_of(compressor, 20),
        )
        loss = model(model.items(batch), **batch)
        loss.backward()
        found.append((loss.item(), compressor.memory.vectors_KD.grad))
        assert compressor.projection is None or compressor.projection.weight.grad is None
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_ucl_runs_through_it(mini_batch_size):
    compressor = moved(make(20)).train()
    compressor.learn(memory=True)
    model = as_sentence_transformer(compressor, 60).train()
    columns = columns_of(0)
    stage = UclStage(**DATA, temperature=0.5, mini_batch_size=mini_batch_size)
    loss = contrastive_loss(model, stage)(features_of(model, columns), None)
    loss.backward()
    named = {
        **dict(compressor.projection.named_parameters()),
        "memory": compressor.memory.vectors_KD,
    }
    found = {name: parameter.grad.clone() for name, parameter in named.items()}
    compressor.zero_grad()
    expected = naive(*embeddings(compressor, columns), 0.5)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(relative_error(found[name], named[name].grad) < 1e-4 for name in named)


def test_it_learns_where_the_memory_does():
    compressor = make(20)
    for memory in (True, False, True):
        compressor.learn(memory=memory)
        assert [p.requires_grad for p in compressor.projection.parameters()] == [memory] * 2
    text = make(20, encoder=EncoderSettings(pooling="mean"))
    text.learn(memory=True)
    assert text.projection.weight.requires_grad
    assert not text.memory.vectors_KD.requires_grad


# ---- stage folders


@sizes
def test_saved_and_loaded(size, tmp_path):
    compressor = moved(make(size))
    for name in ("pretext", "ucl"):
        compressor.save(tmp_path / name, name)
    other = moved(make(size), seed=10)
    other.load(tmp_path / "pretext", "pretext")
    other.load(tmp_path / "ucl", "ucl")
    with torch.no_grad():
        assert torch.equal(other(padded(other)), compressor(padded(compressor)))
    stored = load_file(tmp_path / "ucl" / STATE_FILE)
    assert torch.equal(stored["projection.weight"], compressor.projection.weight)
    assert torch.equal(stored["projection.bias"], compressor.projection.bias)
    assert "projection.weight" not in _saved(make_compressor(), tmp_path / "plain")


def _saved(compressor, folder):
    compressor.save(folder, "pretext")
    return load_file(folder / STATE_FILE)


def test_a_folder_with_another_projection_or_none(tmp_path):
    _saved(make(20), tmp_path / "narrow")
    _saved(make_compressor(), tmp_path / "none")
    compressor = make(48)
    with pytest.raises(ModelFolderError, match="of another shape") as caught:
        compressor.load(tmp_path / "narrow", "pretext")
    assert "(20, 32)" in str(caught.value)
    assert "(48, 32)" in str(caught.value)
    with pytest.raises(ModelFolderError, match="projection.weight"):
        compressor.load(tmp_path / "none", "pretext")
    tensors = load_file(tmp_path / "narrow" / STATE_FILE)
    save_file(tensors | {"projection.bias": torch.zeros(21)}, tmp_path / "narrow" / STATE_FILE)
    with pytest.raises(ModelFolderError, match="of another shape"):
        make(20).load(tmp_path / "narrow", "pretext")


# ---- exported folders

VARIANTS = {
    "same": ("same", "llama", {}),
    "narrow": (20, "qwen3", {}),
    "wide": (48, "llama", {}),
    "one-memory-token": (20, "llama", {"memory": 1}),
    "mean": (20, "llama", {"encoder": EncoderSettings(pooling="mean")}),
    "last-token": (20, "qwen3", {"encoder": PROMPT}),
    "bfloat16": (20, "llama", {"dtype": torch.bfloat16}),
    "bfloat16-one-memory-token": (20, "llama", {"dtype": torch.bfloat16, "memory": 1}),
}

# Last-token pooling, then Dense: other servers know these, too.
PLAIN = {"one-memory-token", "last-token", "bfloat16-one-memory-token"}


def make_model(variant):
    size, family, settings = VARIANTS[variant]
    return as_sentence_transformer(moved(make(size, family, **settings)), LIMIT, prompts=PROMPTS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder per variant, and what a process that cannot import this package makes of it."""
    root = tmp_path_factory.mktemp("projected")
    for variant in VARIANTS:
        export(make_model(variant), root / variant)
    command = [sys.executable, "-c", USER, *(str(root / variant) for variant in VARIANTS)]
    user = subprocess.run(
        command, input=json.dumps(READ), capture_output=True, text=True, check=False, cwd=root
    )
    assert user.returncode == 0, user.stderr[-3000:]
    found = json.loads(user.stdout)
    return root, {variant: found[str(root / variant)] for variant in VARIANTS}


@pytest.mark.thorough
@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_equals_live_without_this_package(exported, variant):
    folder, model = exported[0] / variant, make_model(variant)
    for role, encode in (("plain", model.encode), ("query", model.encode_query)):
        expected, found = (
            torch.as_tensor(encode(READ)).float(),
            torch.tensor(exported[1][variant][role]),
        )
        assert found.shape == (len(READ), model.get_embedding_dimension())
        assert (expected[:3] - expected[1:4]).norm(dim=1).min() > 0.05, (
            "vacuous: all embeddings alike"
        )
        if "bfloat16" in variant:
            assert torch.cosine_similarity(found, expected).min() > 0.99
        else:
            assert torch.cosine_similarity(found.double(), expected.double()).min() > 1 - 1e-6
            assert ((found - expected).abs().amax(1) / expected.norm(dim=1)).max() < 1e-6
    assert verify(folder) > (0.999 if "bfloat16" in variant else 0.99999)
    kinds = [
        module["type"].rsplit(".", 1)[1]
        for module in json.loads((folder / "modules.json").read_text())
    ]
    weighed = ["Transformer", "Dense", "WordWeights", "Pooling"]
    assert kinds == (["Transformer", "Pooling", "Dense"] if variant in PLAIN else weighed)
    assert (
        f"| embedding dimension | {model.get_embedding_dimension()} |"
        in (folder / "README.md").read_text()
    )
    assert "| projection |" in (folder / "README.md").read_text()


def test_without_a_projection_there_is_no_dense(tmp_path):
    export(as_sentence_transformer(make_compressor(), LIMIT), tmp_path / "model")
    assert "Dense" not in (tmp_path / "model" / "modules.json").read_text()
    assert "| projection |" not in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.thorough
def test_verify_finds_another_projection(exported, tmp_path):
    folder = shutil.copytree(exported[0] / "narrow", tmp_path / "model")
    (file,) = folder.glob("*_Dense/model.safetensors")
    tensors = load_file(file)
    save_file(tensors | {"linear.weight": tensors["linear.weight"].flip(0)}, file)
    with pytest.raises(ModelFolderError, match="gives other embeddings"):
        verify(folder)


@pytest.mark.thorough
@pytest.mark.parametrize("first", [1, 2, MEMORY])
def test_num_memory_and_other_weights_stand_before_it(exported, first, tmp_path):
    model = make_model("narrow")
    compressor = model[0].compressor
    compressor.use_prefix(first)
    expected = embed_texts(model, READ)
    found = embed_texts(llm2comp.load(exported[0] / "narrow", "cpu", num_memory=first), READ)
    assert relative_error(found, expected) < 1e-5
    folder = shutil.copytree(exported[0] / "narrow", tmp_path / "model")
    reweight(folder, compressor.get_buffer("weights_K").tolist())
    assert relative_error(embed_texts(llm2comp.load(folder, "cpu"), READ), expected) < 1e-5
    assert verify(folder) > 0.99999


@pytest.mark.thorough
@pytest.mark.parametrize("backend", RUNTIMES)
@pytest.mark.parametrize("variant", ["narrow", "mean", "bfloat16-one-memory-token"])
def test_a_compiled_graph_embeds_as_torch_does(exported, variant, backend, tmp_path):
    if missing := RUNTIMES[backend].missing():
        pytest.skip(f"{', '.join(missing)} not installed (extra `{backend}`)")
    folder = shutil.copytree(exported[0] / variant, tmp_path / "model")
    assert compile_folder(folder, backend) > 0.9999
    expected = embed_texts(llm2comp.load(folder, "cpu").float(), READ)
    model = load_compiled(folder, backend)
    found = embed_texts(model, READ)
    assert found.shape[1] == model.get_embedding_dimension() == 20
    assert relative_error(found, expected) < 1e-5


def test_as_many_vectors_it_has_no_place(tmp_path):
    model = make_model("narrow")
    for ask in (
        lambda: memory_vectors(model, TEXTS),
        lambda: export(model, tmp_path / "many", multi_vector=True),
    ):
        with pytest.raises(
            ModelFolderError, match="the projection stands behind the mean"
        ) as caught:
            ask()
        assert "encoder.projection: null" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---- runs


def test_the_teacher_must_have_its_width():
    device, projection = torch.device("cpu"), new_projection(WIDTH, 20, 0)
    assert map_to_teacher(WIDTH, 20, 0, device, projection) is None, "the projection is the map"
    assert map_to_teacher(WIDTH, 20, 0, device).out_features == 20
    with pytest.raises(RecipeError, match="not as wide as the teacher") as caught:
        map_to_teacher(WIDTH, 24, 0, device, projection)
    assert "encoder.projection: 24" in str(caught.value)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(folder with a backbone, file of responses with a teacher of width 20)."""
    folder = tmp_path_factory.mktemp("run")
    make_tree(folder)
    rows = [
        {"text": a.text, "response": a.response, "teacher": a.teacher_D.tolist()}
        for a in answers(20)
    ]
    return folder, write_rows(folder / "answers.jsonl", rows)


def test_memory_and_projection_alone_learn_over_a_frozen_lm(sources, tmp_path):
    folder, source = sources
    tree = make_tree(folder, adapter={"kind": "none"}, encoder={"projection": 20}) | {"watch": None}
    tree["pretext"] = response_tree(folder, source)["pretext"]
    tree["ucl"] |= {"train_memory": True}
    tree["scl"] |= {"train_memory": True, "matryoshka_dims": [8]}
    recipe = parse_recipe(tree)
    before = {file: file.read_bytes() for file in (folder / "backbone").iterdir()}
    run = train(recipe, tmp_path / "run")
    stages = [load_file(run / place / STATE_FILE) for place in FOLDERS.values()]
    assert set(stages[0]) == {"memory", "weights", "projection.weight", "projection.bias"}
    start = {"projection.weight": new_projection(WIDTH, 20, recipe.seed).weight}
    for one, other in zip([start, *stages], stages, strict=False):
        for name in one.keys() - {"weights"}:
            assert not torch.equal(one[name], other[name]), name
    assert not list(run.rglob(MAP_FILE)), "the projection is the map to the teacher"
    assert before == {file: file.read_bytes() for file in (folder / "backbone").iterdir()}
    live, model = llm2comp.load(run / "3-scl", "cpu"), llm2comp.load(run, "cpu")
    backbone = live[0].compressor.backbone
    assert isinstance(backbone.adapters, Frozen)
    base, exported = (
        load_file(folder / "backbone" / "model.safetensors"),
        load_file(run / "model" / "model.safetensors"),
    )
    layers = {
        name.removeprefix("model."): tensor for name, tensor in base.items() if "layers." in name
    }
    assert len(layers) > 10
    assert all(torch.equal(exported[name], tensor) for name, tensor in layers.items())
    found = embed_texts(model, SENTENCES)
    assert found.shape == (len(SENTENCES), 20)
    assert relative_error(found, embed_texts(live, SENTENCES)) < 1e-5
    assert verify(run / "model") > 0.99999


@pytest.mark.parametrize("train_memory", [False, True])
def test_later_stages_leave_it_unless_the_memory_learns(sources, tmp_path, train_memory):
    tree = make_tree(sources[0], encoder={"projection": 20}, pretext=None, scl=None) | {
        "watch": None
    }
    tree["ucl"] |= {"train_memory": train_memory}
    recipe = parse_recipe(tree)
    run = train(recipe, tmp_path / "run")
    learned = load_file(run / "2-ucl" / STATE_FILE)["projection.weight"]
    assert torch.equal(learned, new_projection(WIDTH, 20, recipe.seed).weight) != train_memory


def test_a_stopped_run_goes_on_with_its_projection(sources, tmp_path):
    folder, source = sources
    recipe = parse_recipe(response_tree(folder, source, encoder={"projection": 20}))
    whole = train(recipe, tmp_path / "whole")

    def stop():
        raise StoppedError

    with pytest.raises(StoppedError):
        train_until(recipe, tmp_path / "parts", ("pretext", 3), stop, tmp_path / "seen")
    (checkpoint,) = (tmp_path / "parts" / "1-pretext").glob("checkpoint-2")
    halfway = load_file(checkpoint / STATE_FILE)
    parts = train_until(recipe, tmp_path / "parts", ("pretext", 99), stop, tmp_path / "after")
    assert [json.loads(line)[1] for line in (tmp_path / "after").read_text().splitlines()] == [3, 4]
    one, other = (load_file(run / "1-pretext" / STATE_FILE) for run in (whole, parts))
    assert one.keys() == other.keys() == halfway.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["projection.weight"], halfway["projection.weight"])


def test_another_teacher_than_the_projection_was_made_for(sources, tmp_path):
    recipe = parse_recipe(response_tree(*sources, encoder={"projection": 24}))
    with pytest.raises(RecipeError, match="encoder.projection"):
        train(recipe, tmp_path / "run")


def test_the_shipped_recipe_trains(sources, tmp_path):
    """recipes/llm2vec-gen.yaml with another LM, its responses and few steps."""
    lm = sources[0] / "backbone"
    options = ResponseOptions(max_new_tokens=8, shard_size=8, teacher=f"mean:{lm}", device="cpu")
    generate_responses(str(lm), sentences(16, 5), tmp_path / "responses", options)
    changes = [
        "pretext.steps=2",
        "pretext.batch_size=4",
        "pretext.precision=float32",
        "watch=null",
        "memory.tokens=3",
    ]
    changes += [
        f"model.name={lm}",
        "model.device=cpu",
        f"pretext.data.0.source={tmp_path / 'responses'}",
    ]
    recipe = load_recipe("llm2vec-gen", changes)
    assert (recipe.adapter.kind, recipe.encoder.projection, recipe.model.attention) == (
        "none",
        "same",
        "causal",
    )
    assert recipe.pretext.objectives == {"alignment": 1.0, "response": 1.0}
    run = train(recipe, tmp_path / "run")
    learned = load_file(run / "1-pretext" / STATE_FILE)
    assert not torch.equal(learned["projection.weight"], torch.eye(WIDTH))
    start = MemoryTokens.like(untouched("llama").get_input_embeddings().weight, 3, recipe.seed)
    assert not torch.equal(learned["memory"], start.vectors_KD)
    assert embed_texts(llm2comp.load(run, "cpu"), SENTENCES).shape == (len(SENTENCES), WIDTH)
