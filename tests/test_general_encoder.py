"""The encoder that comes with the package: it fits its backbone, and every command takes it unless told otherwise."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import llm2comp
from llm2comp.lab.evaluation.evaluate import EvaluateOptions, evaluate
from llm2comp.model.backbone import weights_digest
from llm2comp.recipe import load_recipe
from llm2comp.storage.loading import BUILTIN_ENCODERS, identity
from llm2comp.system.console import GENERAL
from tiny_run import assert_refused, cli, write_rows

FOLDER = BUILTIN_ENCODERS[GENERAL]
GOLDEN = json.loads((FOLDER / "golden.json").read_text())


@pytest.fixture(scope="module")
def model():
    return llm2comp.load()


def test_it_fits_the_packaged_backbone(model):
    """A new backbone without a new encoder would still load, and mean nothing."""
    assert weights_digest(load_recipe(FOLDER / "recipe.yaml").model) == GOLDEN["backbone"]
    found = model.encode(GOLDEN["texts"])
    expected = np.array(GOLDEN["embeddings"])
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_it_knows_what_is_alike(model):
    question, answer, other = model.encode(GOLDEN["texts"], normalize_embeddings=True)
    assert question @ answer > question @ other + 0.2


def test_its_recipe_is_the_shipped_one():
    def learned(recipe):
        tree = recipe.model_dump(mode="json")
        return {key: tree[key] for key in ("model", "memory", "encoder", "adapter", "seed", "pretext", "ucl", "scl")}

    assert learned(load_recipe(FOLDER / "recipe.yaml")) == learned(load_recipe("tiny-general"))


def test_it_is_small_and_tells_its_licence():
    card = (FOLDER / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card
    assert "| **average** |" in card
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 32 * 2**20


def test_one_line_in_another_process(model):
    program = "import llm2comp; print(llm2comp.load().encode(['a']).shape)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.stdout.strip() == f"(1, {model.get_embedding_dimension()})", done.stderr[-2000:]


def test_commands_take_it_unless_told_otherwise(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = GOLDEN["texts"]
    said = cli("similarity", *texts)
    assert said.code == 0, said.err
    vectors = model.encode(texts, normalize_embeddings=True)
    assert f"{vectors[0] @ vectors[1]:6.3f}" in said.out
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    assert cli("embed", "texts.txt", "--out", "out.npy").code == 0
    assert np.abs(np.load("out.npy") - model.encode(texts)).max() < 1e-4
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


def test_exported_it_needs_this_package_no_more(model, tmp_path):
    said = cli("export", tmp_path / "folder")
    assert said.code == 0, said.err
    found = SentenceTransformer(str(tmp_path / "folder")).encode(GOLDEN["texts"])
    assert np.abs(found - model.encode(GOLDEN["texts"])).max() < 1e-4
    assert cli("verify", tmp_path / "folder").code == 0
    assert "cc-by-sa" in (tmp_path / "folder" / "README.md").read_text()
    two = cli("export", tmp_path / "two", "--num-memory", "2")
    assert two.code == 0, two.err
    found = SentenceTransformer(str(tmp_path / "two")).encode(GOLDEN["texts"])
    assert np.abs(found - llm2comp.load(num_memory=2).encode(GOLDEN["texts"])).max() < 1e-4
    assert np.abs(found - model.encode(GOLDEN["texts"])).max() > 1e-2


def test_a_mistyped_name_is_told(tmp_path):
    assert_refused(cli("similarity", "a", "b", "--model", "builtin:generl"), "did you mean 'builtin:general'")
    assert_refused(cli("export", tmp_path / "x", "--model", "mean:builtin:tiny"), "a live memory encoder")
    assert not (tmp_path / "x").exists()
