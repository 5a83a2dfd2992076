"""Folders that engines without WordWeights can read: the last memory state, in both schemas."""

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer

import llm2comp
from families import TEXTS, make_compressor, relative_error
from llm2comp.errors import ModelFolderError
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.recipe import EncoderSettings
from llm2comp.storage.engines import OLD_KEYS
from oracles import embed_texts
from test_nested import make_nested, padded
from tiny_run import assert_refused, cli

READ = [*TEXTS, ""]


def live(compressor):
    return as_sentence_transformer(compressor, 40)


def kinds(folder):
    modules = json.loads((folder / "modules.json").read_text())
    return [module["type"].split(".")[-1] for module in modules]


def pooling_config(folder):
    (file,) = folder.glob("*_Pooling/config.json")
    return json.loads(file.read_text())


def states(compressor):
    """Memory states of READ, memory_NKD."""
    with torch.no_grad():
        return compressor.memory_states(padded(compressor, READ))


@pytest.mark.parametrize("pooling", [None, "last", "mean"])
def test_a_nested_encoder_is_exported_by_its_last_state(pooling, tmp_path):
    compressor = make_nested(nested=(1,))
    memory, weights = states(compressor), compressor.get_buffer("weights_K").clone()
    model = live(compressor)
    before = embed_texts(model, READ)
    llm2comp.export(model, tmp_path / "model", pooling=pooling)
    assert torch.equal(compressor.get_buffer("weights_K"), weights)
    assert torch.equal(embed_texts(model, READ), before), "the live encoder is as it was"
    found = embed_texts(SentenceTransformer(str(tmp_path / "model"), device="cpu"), READ)
    whole = pooling == "mean"
    assert (relative_error(found, memory[:, -1]) < 1e-5) == (not whole)
    assert (relative_error(found, memory.mean(1)) < 1e-5) == whole
    assert kinds(tmp_path / "model") == ["Transformer", *["WordWeights"] * whole, "Pooling"]
    assert llm2comp.verify(tmp_path / "model") > 0.99999
    card = (tmp_path / "model" / "README.md").read_text()
    assert ("plain last-token pooling" in card) == (not whole)
    assert ("`model[1].requires_grad_(False)`" in card) == whole
    assert ("memory states are trained" in card) == whole


def test_other_weights_than_the_mean_are_kept(tmp_path):
    """They were chosen: `load(num_memory=2)`, `reweight`."""
    compressor = make_nested()
    compressor.use_prefix(2)
    llm2comp.export(live(compressor), tmp_path / "model")
    found = embed_texts(SentenceTransformer(str(tmp_path / "model"), device="cpu"), READ)
    assert relative_error(found, states(compressor)[:, -2:].mean(1)) < 1e-5


UNFIT = {
    "not nested": make_compressor,
    "other sizes": lambda: make_nested(nested=(2,)),
    "nested from the first": lambda: make_nested(order="first"),
    "no memory": lambda: make_compressor(encoder=EncoderSettings(pooling="mean")),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_a_last_state_that_was_not_trained_alone_is_refused(unfit, tmp_path):
    compressor = UNFIT[unfit]()
    weights = compressor.get_buffer("weights_K").clone()
    with pytest.raises(ModelFolderError, match="was not trained to be an embedding"):
        llm2comp.export(live(compressor), tmp_path / "model", pooling="last")
    assert torch.equal(compressor.get_buffer("weights_K"), weights)
    assert not list(tmp_path.iterdir())
    llm2comp.export(live(compressor), tmp_path / "model")
    expected = embed_texts(live(compressor), READ)
    found = embed_texts(SentenceTransformer(str(tmp_path / "model"), device="cpu"), READ)
    assert relative_error(found, expected) < 1e-5, "by default what it was"


def test_one_memory_token_needs_no_nesting(tmp_path):
    compressor = make_compressor(memory=1)
    llm2comp.export(live(compressor), tmp_path / "model", pooling="last")
    found = embed_texts(SentenceTransformer(str(tmp_path / "model"), device="cpu"), READ)
    assert relative_error(found, states(compressor)[:, -1]) < 1e-5


@pytest.mark.parametrize(
    ("made", "mode"),
    [
        (make_nested, "lasttoken"),
        (lambda: make_compressor("qwen3", encoder=EncoderSettings(pooling="mean")), "mean"),
    ],
)
def test_the_pooling_is_written_in_both_schemas(made, mode, tmp_path):
    """Each alone is enough for sentence-transformers; text-embeddings-inference reads the older."""
    folder = tmp_path / "model"
    llm2comp.export(live(made()), folder)
    config = pooling_config(folder)
    assert config["pooling_mode"] == mode
    assert [key for key in OLD_KEYS.values() if config[key]] == [OLD_KEYS[mode]]
    assert OLD_KEYS["lasttoken"] == "pooling_mode_lasttoken"
    expected = embed_texts(SentenceTransformer(str(folder), device="cpu"), READ)
    older = {key: value for key, value in config.items() if key != "pooling_mode"}
    newer = {key: value for key, value in config.items() if key not in OLD_KEYS.values()}
    assert len(older) > len(OLD_KEYS) > 0
    assert len(newer) > 1
    for schema in (older, newer):
        (file,) = folder.glob("*_Pooling/config.json")
        file.write_text(json.dumps(schema))
        found = embed_texts(SentenceTransformer(str(folder), device="cpu"), READ)
        assert torch.equal(found, expected)


def test_weighed_memory_has_no_old_keys(tmp_path):
    """An engine that reads them knows no WordWeights: it would average all tokens, silently."""
    llm2comp.export(live(make_compressor()), tmp_path / "model")
    assert "WordWeights" in kinds(tmp_path / "model")
    assert set(pooling_config(tmp_path / "model")).isdisjoint(OLD_KEYS.values())


@pytest.mark.thorough
def test_pooling_on_the_command_line(tmp_path):
    """The tiny encoder is not nested."""
    out, tiny = tmp_path / "m", "builtin:general-tiny"
    said = cli("export", out, "--multi-vector", "--pooling", "last")
    assert_refused(said, "keeps every memory state", "leave --pooling and --for out")
    said = cli("export", out, "-m", tiny, "--pooling", "last")
    assert_refused(said, "was not trained to be an embedding", "to do: pooling mean")
    assert cli("export", out, "-m", tiny, "--pooling", "mean").code == 0
    expected = llm2comp.load(tiny, "cpu").encode(READ, convert_to_tensor=True)
    found = embed_texts(SentenceTransformer(str(out), device="cpu"), READ)
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("engine", ["tei", "vllm"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_servers_of_folders_read_the_last_token_and_the_flags(engine, attention, tmp_path):
    compressor = make_compressor("qwen3", memory=1, attention=attention)
    llm2comp.export(live(compressor), tmp_path / "m", engine=engine)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    both_ways = attention == "bidirectional"
    assert (config.get("is_causal") is False) == both_ways
    assert (config.get("use_bidirectional_attention") is True) == both_ways
    assert pooling_config(tmp_path / "m")[OLD_KEYS["lasttoken"]] is True
    found = embed_texts(SentenceTransformer(str(tmp_path / "m"), device="cpu"), READ)
    assert relative_error(found, states(compressor)[:, -1]) < 1e-5


UNCOMPUTABLE = {
    "a weighted mean of 3 states": make_compressor,
    "the family 'gpt2'": lambda: make_compressor("gpt2", memory=1),
    "a window of 8 positions, and texts of 41": lambda: make_compressor("mistral-window", memory=1),
    "positions of kind llama3": lambda: make_compressor("llama3", memory=1),
}


@pytest.mark.parametrize("reason", UNCOMPUTABLE)
def test_what_an_engine_cannot_compute_exactly_is_refused(reason, tmp_path):
    with pytest.raises(ModelFolderError, match="cannot be computed exactly by tei") as caught:
        llm2comp.export(live(UNCOMPUTABLE[reason]()), tmp_path / "m", engine="tei")
    assert reason in str(caught.value)
    assert not list(tmp_path.iterdir())
    llm2comp.export(live(UNCOMPUTABLE[reason]()), tmp_path / "m")


def test_weights_that_were_chosen_are_not_given_up_for_an_engine(tmp_path):
    compressor = make_nested()
    compressor.use_prefix(2)
    with pytest.raises(ModelFolderError, match="cannot be computed exactly by vllm"):
        llm2comp.export(live(compressor), tmp_path / "m", engine="vllm")
    compressor.use_prefix(1)
    llm2comp.export(live(compressor), tmp_path / "m", engine="vllm")
    assert kinds(tmp_path / "m") == ["Transformer", "Pooling"]
