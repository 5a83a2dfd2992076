"""The encoders that come with the package: each fits its LM, and every command takes the larger
unless told otherwise.

`builtin:general` needs SmolLM2-135M, which is not part of the package: its tests are skipped where
the cache has none.
"""

import json
import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import llm2comp
from llm2comp.lab.evaluation.evaluate import EvaluateOptions, evaluate
from llm2comp.model.backbone import weights_digest
from llm2comp.recipe import load_recipe
from llm2comp.storage.identity import identity
from llm2comp.storage.loading import BUILTIN_ENCODERS
from llm2comp.system.console import GENERAL, GENERAL_TINY
from tiny_run import assert_refused, cli, write_rows

RECIPES = {GENERAL: "smollm2-general", GENERAL_TINY: "tiny-general"}
both = pytest.mark.parametrize("name", [GENERAL_TINY, GENERAL])


def golden(name):
    return json.loads((BUILTIN_ENCODERS[name] / "golden.json").read_text())


def loaded(name, request):
    """In float32 everywhere, as the golden vectors are."""
    if name == GENERAL:
        request.getfixturevalue("smollm2")
    return loaded_once(name)


@cache
def loaded_once(name):
    return llm2comp.load(name, "cpu", dtype="float32")


@pytest.fixture
def model(request):
    return loaded(GENERAL, request)


@pytest.mark.thorough
@both
def test_it_fits_its_lm(name, request):
    """A new LM without a new encoder would still load, and mean nothing."""
    model, known = loaded(name, request), golden(name)
    assert (
        weights_digest(load_recipe(BUILTIN_ENCODERS[name] / "recipe.yaml").model)
        == known["backbone"]
    )
    found = model.encode(known["texts"])
    expected = np.array(known["embeddings"])
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


@both
def test_it_knows_what_is_alike(name, request):
    question, answer, other = loaded(name, request).encode(
        golden(name)["texts"], normalize_embeddings=True
    )
    assert question @ answer > question @ other + 0.2


def test_like_meaning_is_nearer_than_like_words(model):
    texts = [
        "a cat",
        "a kitten",
        "a tax form",
        "a dog runs in the park",
        "a puppy is running outside",
    ]
    cat, kitten, form, dog, puppy = model.encode(texts, normalize_embeddings=True)
    assert cat @ kitten > cat @ form + 0.3
    assert dog @ puppy > dog @ form + 0.3


@both
def test_its_recipe_is_the_shipped_one(name):
    def learned(recipe):
        tree = recipe.model_dump(mode="json")
        return {
            key: tree[key]
            for key in ("model", "memory", "encoder", "adapter", "seed", "pretext", "ucl", "scl")
        }

    assert learned(load_recipe(BUILTIN_ENCODERS[name] / "recipe.yaml")) == learned(
        load_recipe(RECIPES[name])
    )


@both
def test_it_is_small_and_tells_its_licence(name):
    folder = BUILTIN_ENCODERS[name]
    card = (folder / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card
    assert "| **average** |" in card
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 24 * 2**20


def test_its_embedding_is_its_last_memory_state(model):
    """Nested from the end, and all weight on the last token: stock last-token pooling."""
    texts = golden(GENERAL)["texts"]
    states_NKD = np.asarray(llm2comp.memory_states(model, texts))  # each of length 1
    embeddings = model.encode(texts, normalize_embeddings=True)
    assert states_NKD.shape[1] == 8
    assert np.allclose(embeddings, states_NKD[:, -1], atol=1e-5)
    assert not np.allclose(embeddings, states_NKD[:, -2], atol=1e-2)


@pytest.mark.thorough
def test_one_line_in_another_process(model):
    program = "import llm2comp; print(llm2comp.load().encode(['a']).shape)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.strip() == f"(1, {model.get_embedding_dimension()})", done.stderr[-2000:]


@pytest.mark.thorough
def test_commands_take_it_unless_told_otherwise(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = golden(GENERAL)["texts"]
    said = cli("similarity", *texts)
    assert said.code == 0, said.err
    vectors = model.encode(texts, normalize_embeddings=True)
    assert float(said.out.split()[1]) == pytest.approx(vectors[0] @ vectors[1], abs=1e-3)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    assert cli("embed", "texts.txt", "--out", "out.npy").code == 0
    expected = model.encode(texts)
    assert np.abs(np.load("out.npy") - expected).max() < 1e-4 * np.abs(expected).max()
    sts = tmp_path / "sts" / "Small"
    sts.mkdir(parents=True)
    pairs = [{"sentence1": a, "sentence2": b, "score": float(a == b)} for a in texts for b in texts]
    write_rows(sts / "test.jsonl", pairs)
    said = cli("evaluate", "--local", sts)
    assert said.code == 0, said.err
    (row,) = evaluate([GENERAL], EvaluateOptions(local=(sts,)))
    who = identity(GENERAL, model)
    assert (row.model, row.name) == (GENERAL, who.name)
    assert row.revision.startswith(who.revision)
    assert who.name.startswith("llm2comp/general")


@pytest.mark.thorough
@both
def test_exported_it_needs_this_package_no_more(name, request, tmp_path):
    """And the larger without WordWeights: its last memory state is its embedding."""
    model, texts = loaded(name, request), golden(name)["texts"]
    expected = model.encode(texts)
    near = 1e-4 * np.abs(expected).max()
    said = cli("export", tmp_path / "folder", "--model", name)
    assert said.code == 0, said.err
    found = SentenceTransformer(str(tmp_path / "folder")).encode(texts)
    assert np.abs(found - expected).max() < near
    assert cli("verify", tmp_path / "folder").code == 0
    assert "cc-by-sa" in (tmp_path / "folder" / "README.md").read_text()
    modules = json.loads((tmp_path / "folder" / "modules.json").read_text())
    weighed = [module["path"] for module in modules if module["type"].endswith("WordWeights")]
    assert weighed == ["1_WordWeights"] * (name == GENERAL_TINY)


@pytest.mark.thorough
def test_exported_with_fewer_memory_tokens(tmp_path):
    model, texts = loaded_once(GENERAL_TINY), golden(GENERAL_TINY)["texts"]
    said = cli("export", tmp_path / "two", "--model", GENERAL_TINY, "--num-memory", "2")
    assert said.code == 0, said.err
    found = SentenceTransformer(str(tmp_path / "two")).encode(texts)
    assert np.abs(found - llm2comp.load(GENERAL_TINY, num_memory=2).encode(texts)).max() < 1e-4
    assert np.abs(found - model.encode(texts)).max() > 1e-2


def test_a_mistyped_name_is_told(tmp_path):
    assert_refused(
        cli("similarity", "a", "b", "--model", "builtin:generl"), "did you mean 'builtin:general'"
    )
    assert_refused(
        cli("export", tmp_path / "x", "--model", "mean:builtin:tiny"), "a live memory encoder"
    )
    assert not (tmp_path / "x").exists()
