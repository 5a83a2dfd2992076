"""`llm2comp.load` on whatever a run leaves, and `llm2comp.train` on whatever a recipe can be."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer

import llm2comp
from llm2comp.errors import BackboneError, ModelFolderError, RecipeError, RunError
from llm2comp.model.encoder import MemoryEncoder
from llm2comp.recipe import load_recipe, parse_recipe
from llm2comp.runs.folder import Run
from oracles import embed_texts
from tiny_run import finished, make_tree, write_recipe

TEXTS = ["the fox reads", "memory tokens hold what the text said", "Ünicode 記憶", ""]
STAGES = {"pretext": "1-pretext", "ucl": "2-ucl", "scl": "3-scl"}


def same(a, b, tolerance=1e-5):
    return (embed_texts(a, TEXTS) - embed_texts(b, TEXTS)).abs().max() < tolerance


@pytest.mark.parametrize("place", ["run/model", "run", "run/3-scl"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_run_its_model_and_its_last_stage_are_one_encoder(place, kind):
    folder, run = finished()
    model = llm2comp.load(kind(folder / place))
    assert isinstance(model, SentenceTransformer)
    assert not model.training
    assert same(model, SentenceTransformer(str(run / "model"), device="cpu"))
    assert model.prompts["query"] == "find the text:"
    assert model.get_embedding_dimension() == 32
    for role in (model.encode_query, model.encode_document):
        assert torch.as_tensor(role(TEXTS)).isfinite().all()


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["pretext", "ucl"])
def test_an_earlier_stage_is_what_a_run_that_ends_there_exports(tmp_path, stage):
    """Also: same seed, same stages, same result."""
    folder, run = finished()
    tree = make_tree(folder)
    later = list(STAGES)[list(STAGES).index(stage) + 1 :]
    shorter = llm2comp.train(
        parse_recipe({key: value for key, value in tree.items() if key not in later}),
        tmp_path / "run",
    )
    live = llm2comp.load(run / STAGES[stage])
    assert isinstance(live[0], MemoryEncoder)
    assert same(live, llm2comp.load(shorter))
    assert same(live, Run(run).encoder(stage), 1e-7)
    assert not live.prompts.get("query"), "this stage never saw the query prompt"
    assert not same(live, llm2comp.load(run), 1e-2), "the stages differ"


def test_relative_paths_and_a_moved_run(tmp_path, monkeypatch):
    run = Path(shutil.copytree(finished()[1], tmp_path / "elsewhere"))
    whole = llm2comp.load(finished()[1])
    monkeypatch.chdir(run)
    for place in (".", "model", "3-scl", "3-scl/", "../elsewhere"):
        assert same(llm2comp.load(place), whole)
    monkeypatch.chdir(run / "2-ucl")
    assert same(llm2comp.load("."), llm2comp.load(run / "2-ucl"), 1e-7)


def test_device(tmp_path):
    run = Path(shutil.copytree(finished()[1], tmp_path / "run"))
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    tree["model"]["device"] = "cuda:99"  # trained on another machine
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))
    for place in (run, run / "model", run / "1-pretext"):
        assert llm2comp.load(place, "cpu").device.type == "cpu"
        with pytest.raises(BackboneError, match="no such device here"):
            llm2comp.load(place, "warp")
    with pytest.raises(BackboneError, match="no such device here"):
        llm2comp.load(run / "1-pretext")


def test_what_is_not_loadable(tmp_path):
    run = Path(shutil.copytree(finished()[1], tmp_path / "run"))
    with pytest.raises(ModelFolderError, match="no such folder"):
        llm2comp.load(tmp_path / "nothing")
    with pytest.raises(ModelFolderError, match="no such folder"):
        llm2comp.load(run / "recipe.yaml")
    with pytest.raises(ModelFolderError, match="not a sentence-transformers folder"):
        llm2comp.load(run / "1-pretext" / "adapter")
    shutil.rmtree(run / "model")
    with pytest.raises(ModelFolderError, match="the run is not finished"):
        llm2comp.load(run)
    (run / "2-ucl" / "done.json").unlink()
    for place in ("2-ucl", "3-scl"):
        with pytest.raises(RunError, match="the stage is not finished") as caught:
            llm2comp.load(run / place)
        assert caught.value.where == str(run / "2-ucl")
    assert llm2comp.load(run / "1-pretext")
    (run / "recipe.yaml").unlink()
    with pytest.raises(ModelFolderError, match="not a sentence-transformers folder"):
        llm2comp.load(run / "1-pretext")


@pytest.mark.thorough
def test_train_takes_a_recipe_a_path_and_overrides(tmp_path, monkeypatch):
    file = write_recipe(tmp_path, pretext=None, scl=None)
    monkeypatch.chdir(tmp_path)
    few = ["ucl.steps=2"]
    runs = [
        llm2comp.train(file, tmp_path / "a", few),
        llm2comp.train(str(file), out=str(tmp_path / "b"), overrides=few),
        llm2comp.train(load_recipe(file, few), tmp_path / "c"),
        llm2comp.train(load_recipe(file), overrides=few),
    ]
    assert runs[:3] == [tmp_path / name for name in "abc"]
    assert runs[3] == Path("runs/tiny-run"), "the default place"
    weights = [
        (run / "2-ucl" / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs
    ]
    assert len(set(weights)) == 1
    assert len({(run / "recipe.yaml").read_bytes() for run in runs}) == 1
    with pytest.raises(RecipeError, match=r"did you mean 'steps'\?"):
        llm2comp.train(load_recipe(file), tmp_path / "d", ["ucl.stepz=2"])
    assert not (tmp_path / "d").exists()


def test_the_package_loads_nothing_heavy_until_asked():
    program = (
        "import sys, llm2comp; assert llm2comp.__version__; heavy = {'torch', 'transformers', "
        "'numpy', 'pydantic'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        llm2comp.lode  # noqa: B018
