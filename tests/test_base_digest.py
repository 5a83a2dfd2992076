"""Other weights under the same name are noticed, wherever they differ; the digest costs nothing the
second time.
"""

import json
import os
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import llm2comp
from families import TEXTS, make_lm
from llm2comp.errors import ModelFolderError
from llm2comp.model.backbone import Base, check_base, digest, hub_commit, weights_digest
from llm2comp.recipe import ModelSettings, load_recipe, parse_recipe
from llm2comp.runs.keys import stage_keys
from llm2comp.storage.identity import identity
from llm2comp.storage.loading import BUILTIN_ENCODERS
from llm2comp.system.console import GENERAL
from oracles import embed_texts
from tiny_run import assert_refused, cli, finished, make_tree, save_backbone

COMMITS = "a" * 40, "b" * 40


def settings(folder, **more):
    return ModelSettings(name=str(folder), **more)


def change(folder, *names, by=0.01):
    """Change tensors in place; the file keeps its size."""
    file = folder / "model.safetensors"
    tensors, size = load_file(file), file.stat().st_size
    for name in names:
        tensors[name] = tensors[name] + by * torch.randn(
            tensors[name].shape, generator=torch.Generator().manual_seed(0)
        )
    save_file(tensors, file, metadata={"format": "pt"})
    assert file.stat().st_size == size


@pytest.fixture
def base(tmp_path):
    return Path(save_backbone(tmp_path / "base"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM2COMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_tensor_weighs(base):
    """Each of them alone, wherever it stands in the file: a digest of its ends would miss most."""
    seen = {weights_digest(settings(base))}
    for name in load_file(base / "model.safetensors"):
        change(base, name)
        found = weights_digest(settings(base))
        assert found not in seen, name
        seen.add(found)
    assert len(seen) > 15


def test_one_bit_in_the_middle_of_a_large_file(tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    file = folder / "model.safetensors"
    file.write_bytes(bytes(9_000_000))
    before = weights_digest(settings(folder))
    with file.open("r+b") as out:
        out.seek(4_500_000)
        out.write(b"\1")
    assert weights_digest(settings(folder)) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_configuration_and_tokenizer_weigh_and_a_card_does_not(base, name):
    before = weights_digest(settings(base))
    (base / "README.md").write_text("a card")
    (base / "notes.json").write_text("{}")
    assert weights_digest(settings(base)) == before
    content = json.loads((base / name).read_text())
    (base / name).write_text(json.dumps(content | {"something": 1}))
    assert weights_digest(settings(base)) != before


def test_the_same_files_elsewhere_are_the_same_base(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "elsewhere")
    assert weights_digest(settings(copy)) == weights_digest(settings(base))


def settle(folder, monkeypatch):
    """As if the files had been there for long."""
    now = time.time()
    monkeypatch.setattr(digest.time, "time", lambda: now + 60)


def test_the_second_time_no_file_is_read(base, cache, monkeypatch):
    settle(base, monkeypatch)
    first, read = weights_digest(settings(base)), []
    sha256 = digest.sha256
    monkeypatch.setattr(digest, "sha256", lambda file: read.append(file.name) or sha256(file))
    assert weights_digest(settings(base)) == first
    assert read == []
    change(base, "model.layers.1.mlp.down_proj.weight")
    changed = weights_digest(settings(base))
    assert changed != first
    assert read == ["model.safetensors"]
    shutil.rmtree(cache)
    assert weights_digest(settings(base)) == changed
    assert len(read) > 3


def test_a_time_that_was_set_back_deceives_nobody(base, cache, monkeypatch):
    """As copying with its times kept does: size, mtime and inode are as before."""
    settle(base, monkeypatch)
    first, before = weights_digest(settings(base)), (base / "model.safetensors").stat()
    content = (base / "model.safetensors").read_bytes()
    with (base / "model.safetensors").open("r+b") as out:
        out.write(content[:-4] + bytes(byte ^ 1 for byte in content[-4:]))
    os.utime(base / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (base / "model.safetensors").stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    assert weights_digest(settings(base)) != first


def test_a_file_that_was_just_written_is_not_kept(base, cache):
    weights_digest(settings(base))
    assert not list(cache.rglob("*")), "it may change again within the same tick of the clock"


def test_a_cache_that_cannot_be_written_stops_nothing(base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLM2COMP_CACHE", str(tmp_path / "file"))
    settle(base, monkeypatch)
    assert len(weights_digest(settings(base))) == 64


# --- the Hub


def hub(folder, model, commits, current):
    """A Hub cache with a model in several commits, the branch main at one of them."""
    place = folder / "models--owner--name"
    for commit in commits:
        shutil.copytree(model, place / "snapshots" / commit)
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(current)
    return place


@pytest.fixture
def on_hub(base, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return hub(tmp_path / "hub", base, COMMITS, COMMITS[0])


def test_a_hub_id_is_its_commit(on_hub):
    first, second = COMMITS
    assert weights_digest(settings("owner/name")) == first == hub_commit("owner/name")
    (on_hub / "refs" / "main").write_text(second)
    assert weights_digest(settings("owner/name")) == second
    assert weights_digest(settings("owner/name", revision=first)) == first
    assert weights_digest(settings("owner/nobody")) == ""
    assert hub_commit("not / a name") == ""


def test_a_branch_that_moved_is_refused_with_the_revision_to_set(on_hub):
    trained = Base.of(settings("owner/name"))
    check_base(trained, settings("owner/name"), on_hub)
    (on_hub / "refs" / "main").write_text(COMMITS[1])
    with pytest.raises(ModelFolderError) as refused:
        check_base(trained, settings("owner/name"), on_hub)
    assert f"set model.revision: {COMMITS[0]}" in str(refused.value)
    assert COMMITS[1][:12] in str(refused.value)
    check_base(trained, settings("owner/name", revision=COMMITS[0]), on_hub)


# --- what holds it against what loads


@pytest.fixture
def run(tmp_path):
    """A finished run of its own, over a base of its own."""
    folder, _ = finished()
    place = Path(shutil.copytree(folder, tmp_path / "place"))
    for file in place.rglob("*.yaml"):
        file.write_text(file.read_text().replace(str(folder), str(place)))
    return place / "run"


def test_a_stage_over_another_base_is_refused(run):
    before = embed_texts(llm2comp.load(run / "2-ucl", "cpu"), TEXTS)
    assert torch.equal(embed_texts(llm2comp.load(run / "2-ucl", "cpu"), TEXTS), before)
    done = json.loads((run / "2-ucl" / "done.json").read_text())
    change(run.parent / "backbone", "model.layers.0.mlp.up_proj.weight", by=0.5)
    for command in (
        ("similarity", "a", "b"),
        ("export", run.parent / "out"),
        ("embed", run.parent / "texts.jsonl", "-o", "x.npy"),
    ):
        said = cli(*command, "--model", run / "2-ucl")
        assert_refused(
            said,
            "another base",
            done["base"]["digest"][:12],
            weights_digest(settings(run.parent / "backbone"))[:12],
        )
    assert not (run.parent / "out").exists()
    assert cli("similarity", "a", "b", "--model", run / "model").code == 0, (
        "an exported folder has its own weights"
    )


def test_training_does_not_say_done_before_nor_replace_what_was_trained(run):
    recipe = load_recipe(run / "recipe.yaml")
    keys, kept = (
        stage_keys(recipe),
        {file: file.read_bytes() for file in run.rglob("*.safetensors")},
    )
    change(run.parent / "backbone", "model.layers.0.mlp.up_proj.weight", by=0.5)
    assert not set(stage_keys(recipe).values()) & set(keys.values())
    assert_refused(cli("train", run / "recipe.yaml", "--out", run), "another base", "another --out")
    assert {file: file.read_bytes() for file in run.rglob("*.safetensors")} == kept


def test_results_of_other_weights_are_other_results(base):
    path = f"mean:{base}"
    first = identity(path, llm2comp.load(path, "cpu"))
    assert identity(path, llm2comp.load(path, "cpu")) == first
    change(base, "model.layers.1.mlp.gate_proj.weight", "model.layers.0.mlp.gate_proj.weight")
    assert identity(path, llm2comp.load(path, "cpu")).revision != first.revision


def test_an_older_stage_is_loaded_with_a_line(run, capsys):
    for file in run.glob("*/done.json"):
        content = json.loads(file.read_text())
        content.pop("base", None)
        file.write_text(json.dumps(content))
    said = cli("similarity", "a", "b", "--model", run / "1-pretext")
    assert said.code == 0
    assert "cannot tell" in said.out + said.err


@pytest.mark.parametrize("content", ["{", "[]", '{"base": {"name": 1}}', '{"base": "x"}'])
def test_a_damaged_note_is_told(run, content):
    (run / "1-pretext" / "done.json").write_text(content)
    assert_refused(
        cli("similarity", "a", "b", "--model", run / "1-pretext"), "done.json", "damaged"
    )


@pytest.mark.parametrize("name", BUILTIN_ENCODERS)
def test_the_packaged_encoder_knows_its_base(name, request):
    if name == GENERAL:
        request.getfixturevalue("smollm2")
    folder = BUILTIN_ENCODERS[name]
    expected = Base.of(load_recipe(folder / "recipe.yaml").model)
    assert (found := list(folder.glob("*/done.json")))
    for file in found:
        assert Base(**json.loads(file.read_text())["base"]) == expected


def test_a_run_notes_its_base():
    folder, run = finished()
    recipe = parse_recipe(make_tree(folder))
    for file in Path(run).glob("[123]-*/done.json"):
        assert Base(**json.loads(file.read_text())["base"]) == Base.of(recipe.model)


def test_a_resharded_copy_is_named_by_its_files(tmp_path):
    """Shards are files, too: all of them weigh."""
    folder = tmp_path / "shards"
    make_lm("llama").save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    before = weights_digest(settings(folder))
    content = bytearray(shards[1].read_bytes())
    content[-1] ^= 1
    shards[1].write_bytes(content)
    assert weights_digest(settings(folder)) != before
