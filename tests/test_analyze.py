"""`llm2comp analyze` on a tiny run, its stage, its folder, and models without memory: figures,
files, weights, bad input.
"""

import atexit
import copy
import functools
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoTokenizer

import llm2comp
from families import MEMORY
from llm2comp.data.loaded import Pair
from llm2comp.errors import DataError, ModelFolderError, RunError
from llm2comp.lab import analysis_table
from llm2comp.lab import analyze as analysis
from llm2comp.lab.analyze import NEED_MORE_TEXTS, analyze, write_analysis
from llm2comp.measures.context import context_recovered, split_sample
from llm2comp.measures.geometry import alignment, anisotropy, uniformity
from llm2comp.measures.spectrum import effective_rank, participation_ratio, spectrum
from llm2comp.model.backbone import Base
from llm2comp.model.tokens import Tokens
from llm2comp.recipe import ModelSettings, parse_recipe
from llm2comp.storage.golden import verify
from llm2comp.storage.reweighting import reweight
from llm2comp.training.run import train
from oracles import embed_texts
from tiny_run import assert_refused, cli, finished, make_tree, no_file_over, sentences, write_rows

TEXTS = sentences(60)
PAIRS = [Pair(*pair) for pair in zip(sentences(30, 4, seed=8), sentences(30, seed=9), strict=True)]
RANKS = set(NEED_MORE_TEXTS)
FIGURES = [*NEED_MORE_TEXTS, "uniformity", "anisotropy", "alignment", "context_recovered"]
LIVE, WITHOUT_MEMORY = ("run", "run/3-scl"), ("mean", "plain")
PLACES = (*LIVE, "run/model", *WITHOUT_MEMORY)


@functools.cache
def plain_folder():
    """A sentence-transformers folder of another origin: the tiny LM's body and mean pooling."""
    folder = Path(tempfile.mkdtemp(prefix="llm2comp-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(finished()[0] / "backbone")
    tokenizer.pad_token = tokenizer.eos_token
    shutil.copytree(finished()[0] / "backbone", folder / "body")
    tokenizer.save_pretrained(folder / "body")
    body = Transformer(str(folder / "body"), max_seq_length=40)
    SentenceTransformer(modules=[body, Pooling(32, "mean")], device="cpu").save(str(folder / "st"))
    return folder / "st"


def path_of(place):
    """What is asked for on the command line."""
    folder = finished()[0]
    return {"mean": f"mean:{folder / 'backbone'}", "plain": str(plain_folder())}.get(place) or str(
        folder / place
    )


@functools.cache
def found(place, texts=60, pairs=False):
    return analyze(path_of(place), TEXTS[:texts], PAIRS if pairs else (), device="cpu")


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(finished()[1], tmp_path / "run"))


@pytest.fixture
def no_plots(monkeypatch):
    """For what has nothing to do with plots, which take most of the time."""
    monkeypatch.setattr(analysis, "save_figure", lambda figure, stem: None)


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory):
    return write_rows(
        tmp_path_factory.mktemp("texts") / "texts.jsonl", [{"text": text} for text in TEXTS]
    )


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@functools.cache
@torch.no_grad()
def memory_by_hand(stage="3-scl"):
    """Memory states of a stage, text by text, (N, K, D)."""
    compressor = llm2comp.load(path_of(f"run/{stage}"), "cpu")[0].compressor
    rows = compressor.backbone.tokenise(TEXTS, 40)
    return torch.cat([compressor.memory_states(Tokens.pad([row], "left")) for row in rows])


# ---- figures


def test_figures_are_those_of_the_models_embeddings():
    measured = found("run", pairs=True)
    model = llm2comp.load(path_of("run"), "cpu")
    embeddings = embed_texts(model, TEXTS).numpy()
    expected = {
        "effective_rank": effective_rank(spectrum(embeddings)),
        "participation_ratio": participation_ratio(spectrum(embeddings)),
        "uniformity": uniformity(embeddings),
        "anisotropy": anisotropy(embeddings),
        "alignment": alignment(
            model.encode_query([pair.anchor for pair in PAIRS]),
            model.encode_document([pair.positive for pair in PAIRS]),
        ),
    }
    for name, value in expected.items():
        assert measured.figures[name] == pytest.approx(value, rel=1e-4), name
    plain = [
        embed_texts(model, texts)
        for texts in zip(*((p.anchor, p.positive) for p in PAIRS), strict=True)
    ]
    assert abs(alignment(*plain) - expected["alignment"]) > 1e-3, (
        "vacuous: the query prompt does nothing"
    )
    assert set(measured.figures) == set(FIGURES)
    assert measured.withheld == {}
    assert (measured.collapse.texts, measured.collapse.dimensions) == (len(TEXTS), 32)


def test_context_recovered_reads_texts_longer_than_the_encoder_does():
    texts = [" ".join(TEXTS[i : i + 4]) for i in range(20)]
    compressor = llm2comp.load(path_of("run/3-scl"), "cpu")[0].compressor
    rows = compressor.backbone.tokenise(texts)
    assert min(map(len, rows)) > 80, "over the encoder's limit of 40, below the LM's of 157"
    whole, cut = (
        context_recovered(compressor, split_sample([row[:n] for row in rows], 0)) for n in (157, 40)
    )
    measured = analyze(path_of("run"), texts, device="cpu")
    assert measured.figures["context_recovered"] == pytest.approx(whole, abs=1e-5)
    assert abs(whole - cut) > 1e-3, "vacuous: the limit makes no difference"


@pytest.mark.parametrize("place", ["run/3-scl", "run/model"])
def test_a_run_its_stage_and_its_folder_have_the_same_figures(place):
    whole, part = found("run", pairs=True), found(place, pairs=True)
    for name in set(FIGURES) - {"context_recovered"}:
        assert part.figures[name] == pytest.approx(whole.figures[name], abs=1e-4, rel=1e-4), name
    np.testing.assert_allclose(part.collapse.spectrum, whole.collapse.spectrum, rtol=2e-4)
    np.testing.assert_allclose(part.random_cosines, whole.random_cosines, atol=2e-4)
    np.testing.assert_allclose(part.related_cosines, whole.related_cosines, atol=2e-4)
    for kind in ("random", "related"):
        assert part.scores[kind] == pytest.approx(whole.scores[kind], abs=1e-4)
    assert part.scores["roc_auc"] == pytest.approx(whole.scores["roc_auc"], abs=1e-3)
    assert part.clusters == whole.clusters
    if place == "run/3-scl":
        assert part.figures["context_recovered"] == whole.figures["context_recovered"] > 0
        assert part.readouts == whole.readouts
        assert len(part.readouts) == 3


def assert_memory_as_in_the_run():
    expected = memory_by_hand()
    model = llm2comp.load(path_of("run/model"), "cpu")
    states = analysis._memory(model, None, TEXTS)
    assert (expected[:, 0] - expected[:, 1]).norm(dim=1).min() > 0.1, (
        "vacuous: memory tokens are alike"
    )
    assert (states - expected).abs().max() < 1e-4


def test_memory_states_of_a_folder_are_those_of_the_run(monkeypatch):
    monkeypatch.setattr("llm2comp.model.vectors.AT_ONCE_ON_CPU", 1)
    assert_memory_as_in_the_run()


def test_memory_states_of_a_folder_ignore_padding():
    """An exported folder whose base has no pad token is padded with its last memory token, behind
    the mask.
    """
    assert_memory_as_in_the_run()


def test_memory_correlation_of_a_folder_is_that_of_the_run():
    expected = np.array(found("run").collapse.memory_correlation)
    np.testing.assert_allclose(found("run/model").collapse.memory_correlation, expected, atol=1e-4)


def test_memory_correlation_by_hand():
    memory = torch.nn.functional.normalize(memory_by_hand().double(), dim=-1)
    expected = (memory @ memory.mT).mean(0)
    assert expected.triu(1).max() < 0.9, "vacuous: memory tokens are copies"
    for place in LIVE:
        np.testing.assert_allclose(found(place).collapse.memory_correlation, expected, atol=2e-5)


def test_names_and_revisions():
    assert {place: found(place).name for place in PLACES} == {
        "run": "llm2comp/run",
        "run/3-scl": "llm2comp/run-3-scl",
        "run/model": "llm2comp/run",
        "mean": found("mean").name,
        "plain": "local/st",
    }
    assert found("mean").name.startswith("llm2comp/mean-")
    assert [found(place).model for place in PLACES] == [path_of(place) for place in PLACES]
    assert len({found(place).revision for place in PLACES}) == 4, (
        "a run and its folder are one model"
    )


# ---- what is withheld


@pytest.mark.thorough
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("texts", [20, 60])
def test_what_is_withheld_and_why(place, texts):
    measured = found(place, texts)
    missing = (
        {"alignment"}
        | (RANKS if texts == 20 else set())
        | (set() if place in LIVE else {"context_recovered"})
    )
    assert (
        set(measured.withheld)
        == {name for name in FIGURES if measured.figures[name] is None}
        == missing
    )
    assert "--pairs" in measured.withheld["alignment"]
    if texts == 20:
        for name in NEED_MORE_TEXTS:
            assert "20 texts for 32 dimensions" in measured.withheld[name]
    if place not in LIVE:
        assert "frozen LM" in measured.withheld["context_recovered"]
    for name in set(FIGURES) - missing:
        assert np.isfinite(measured.figures[name])
    assert (
        (measured.clusters is None) is (measured.merge_weights is None) is (place in WITHOUT_MEMORY)
    )
    assert (measured.collapse.memory_correlation is None) is (place in WITHOUT_MEMORY)
    assert len(measured.readouts) == (3 if place in LIVE else 0)


@pytest.mark.parametrize(("texts", "withheld"), [(32, True), (33, False)])
def test_more_texts_than_dimensions(texts, withheld):
    assert (set(found("plain", texts).withheld) >= RANKS) is withheld


def test_texts_too_short_to_be_split():
    short = [text[:12] for text in TEXTS]
    measured = analyze(path_of("run"), short, device="cpu", examples=0)
    assert measured.figures["context_recovered"] is None
    assert "20 tokens" in measured.withheld["context_recovered"]
    assert measured.readouts == ()


def test_every_figure_is_in_the_table():
    for measured in (found("run", pairs=True), found("mean", 20)):
        columns = [list(column.cells) for column in analysis_table.table(measured).columns]
        rows = dict(zip(columns[0], zip(*columns[1:], strict=True), strict=True))
        for name in FIGURES:
            value, told = rows[name.replace("_", " ")]
            expected = measured.figures[name]
            assert value == ("withheld" if expected is None else f"{expected:.4g}")
            assert told == measured.withheld[name] if expected is None else told
        assert ("related pairs" in rows) is (measured.related_cosines is not None)
        assert ("memory clusters" in rows) is (measured.clusters is not None)


def test_readout_lines_are_lines():
    measured = copy.copy(found("run"))
    readout = measured.readouts[0]
    object.__setattr__(
        measured, "readouts", (type(readout)(**asdict(readout) | {"words": [["\n", "fox"]]}),)
    )
    assert not [line for line in analysis_table.readout_lines(measured) if "\n" in line]


# ---- what is not finite


def spoil(weights, token):
    """NaN in a token's embedding row."""
    tensors = load_file(weights)
    (name,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name][token] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.thorough
@pytest.mark.parametrize("place", ["run", "run/3-scl", "run/model"])
def test_nan_in_a_weight_stops_with_the_text_that_made_it(place, run, tmp_path):
    texts = [*TEXTS[:17], "J " + TEXTS[17], *TEXTS[18:40]]
    # not one that loading tries the LM with
    token = AutoTokenizer.from_pretrained(run / "model").convert_tokens_to_ids("J")
    spoil(run / "model" / "model.safetensors", token)
    backbone = Path(shutil.copytree(finished()[0] / "backbone", tmp_path / "backbone"))
    spoil(backbone / "model.safetensors", token)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["name"] = str(backbone)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    spoiled = Base.of(ModelSettings(name=str(backbone))).model_dump()
    for done in run.glob("*/done.json"):  # as if it had been trained over it
        done.write_text(json.dumps(json.loads(done.read_text()) | {"base": spoiled}))
    path = str(run.parent / place)
    with pytest.raises(DataError, match="not finite") as caught:
        analyze(path, texts, device="cpu")
    assert caught.value.where == "text 18"
    assert texts[17] in caught.value.found
    assert analyze(path, TEXTS[:40], PAIRS, device="cpu").figures["uniformity"] < 0, (
        "other texts are measured"
    )
    file = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    said = cli("analyze", path, "--texts", file, "--device", "cpu", "--out", tmp_path / "out")
    assert_refused(said, "text 18", "not finite", "J ")
    assert not (tmp_path / "out").exists()


# ---- files


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def assert_plots(folder, names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [
            ".llm2comp.json",
            "analysis.json",
            *(f"{name}.{ending}" for name in names for ending in ("png", "svg")),
        ]
    )
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        with Image.open(folder / f"{name}.png") as image:
            pixels = np.asarray(image.convert("L"), dtype=float)
        assert min(pixels.shape) > 300
        assert 0.005 < (pixels < 200).mean() < 0.9, "something is drawn, on white"
        assert pixels[0, 0] == 255
        root = ElementTree.fromstring((folder / f"{name}.svg").read_text(encoding="utf-8"))
        assert root.tag.endswith("svg")
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 5


@pytest.mark.thorough
@pytest.mark.parametrize("place", ["run", "run/model", "mean"])
def test_the_folder_holds_valid_json_and_plots(place, tmp_path):
    measured = found(place, pairs=True)
    write_analysis(measured, tmp_path / "deep" / "out")
    assert_plots(
        tmp_path / "deep" / "out",
        ["scores", "spectrum", *(["memory"] if place not in WITHOUT_MEMORY else [])],
    )
    text = (tmp_path / "deep" / "out" / "analysis.json").read_text(encoding="utf-8")
    tree = json.loads(text, parse_constant=refuse_constant)
    assert tree == json.loads(json.dumps(asdict(measured)))
    assert tree["figures"]["uniformity"] == measured.figures["uniformity"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"], (
        "nothing is left beside it"
    )


@pytest.mark.thorough
def test_a_new_analysis_takes_the_place_of_an_earlier_one(tmp_path):
    write_analysis(found("run", pairs=True), tmp_path / "out")
    before = files_of(tmp_path / "out")
    write_analysis(found("mean", 20), tmp_path / "out")
    after = files_of(tmp_path / "out")
    assert set(before) - set(after) == {"memory.png", "memory.svg"}, (
        "no plot of another model stays"
    )
    assert json.loads(after["analysis.json"])["model"] == path_of("mean")
    assert after["spectrum.png"] != before["spectrum.png"]
    write_analysis(found("run", pairs=True), tmp_path / "out")
    assert files_of(tmp_path / "out") == before, "the same analysis gives the same bytes"


def test_where_it_goes_unless_told(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert (
        analysis.default_folder("run") == analysis.default_folder("run/model") == run / "analysis"
    )
    assert analysis.default_folder("run/2-ucl") == run / "analysis" / "2-ucl"
    for elsewhere in (path_of("mean"), path_of("plain"), "nobody/nothing"):
        assert analysis.default_folder(elsewhere) == Path("llm2comp-analysis")


@pytest.mark.usefixtures("no_plots")
def test_the_analysis_of_a_run_leaves_those_of_its_stages(run):
    write_analysis(found("run/3-scl"), analysis.default_folder(str(run / "3-scl")))
    write_analysis(found("run"), analysis.default_folder(str(run)))
    assert (run / "analysis" / "analysis.json").is_file()
    assert (run / "analysis" / "3-scl" / "analysis.json").is_file()


@pytest.mark.usefixtures("no_plots")
def test_out_with_things_of_ones_own_in_it(texts_file, tmp_path):
    """Whether it is refused or written beside them: they stay."""
    (tmp_path / "notes.txt").write_text("mine")
    cli("analyze", path_of("mean"), "--texts", texts_file, "--device", "cpu", "--out", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# ---- weights


def parting_threshold():
    """A threshold at which exactly the two memory tokens that are most alike become one cluster,
    and the weights then.
    """
    correlation = np.array(found("run").collapse.memory_correlation)
    (i, j), values = (
        np.argwhere(correlation == np.triu(correlation, 1).max())[0],
        np.sort(correlation[np.triu_indices(3, 1)]),
    )
    assert values[2] - values[:2].mean() > 0.02
    weights = np.full(MEMORY, 0.5)
    weights[[i, j]] = 0.25
    return float((values[2] + values[:2].mean()) / 2), weights


def assert_embeds(path, expected):
    assert (embed_texts(llm2comp.load(path, "cpu"), TEXTS) - expected).abs().max() < 1e-5, path


def weighed(stage, weights):
    """Embeddings of the untouched run's stage under other weights, and a guard that they are
    others.
    """
    memory = memory_by_hand(stage)
    expected = sum(float(weight) * memory[:, i] for i, weight in enumerate(weights))
    assert (expected - memory.mean(1)).abs().max() > 1e-2, "vacuous: the weights change nothing"
    return expected, memory.mean(1)


def analyze_and_write(path, texts_file, threshold, *options):
    said = cli(
        "analyze",
        path,
        "--texts",
        texts_file,
        "--device",
        "cpu",
        "--threshold",
        threshold,
        "--write-weights",
        *options,
    )
    assert (said.code, said.out) == (0, ""), said
    return said


@pytest.mark.thorough
@pytest.mark.usefixtures("no_plots")
def test_weights_of_a_run(run, texts_file, capsys):
    threshold, weights = parting_threshold()
    before = files_of(run)
    said = analyze_and_write(run, texts_file, threshold)
    assert said.err.count("memory tokens now weigh") == 2
    assert json.loads((run / "analysis" / "analysis.json").read_text())[
        "merge_weights"
    ] == pytest.approx(weights.tolist())
    expected, _ = weighed("3-scl", weights)
    for place in (run, run / "model", run / "3-scl"):
        assert_embeds(place, expected)
    after = files_of(run)
    changed = {name for name in before if after.get(name) != before[name]}
    assert {name.removeprefix("model/1_WordWeights/") for name in changed} == {
        *("3-scl/memory.safetensors", "model/golden.json", "config.json", "model.safetensors")
    }
    assert {name.split("/")[0] for name in set(after) - set(before)} <= {"analysis"}
    assert json.loads(after["model/done.json"]) == json.loads(before["model/done.json"])
    checked = cli("verify", run / "model")
    assert checked.code == 0
    assert "sound" in checked.err
    capsys.readouterr()
    train(parse_recipe(make_tree(finished()[0])), run)
    told = capsys.readouterr().err
    assert [f"{stage}: done before" in told for stage in ("1-pretext", "2-ucl", "3-scl")] == [
        True
    ] * 3
    assert {name: content for name, content in files_of(run).items() if name in changed} == {
        n: after[n] for n in changed
    }
    again = analyze(str(run), TEXTS, device="cpu", threshold=threshold)
    assert again.merge_weights == pytest.approx(weights.tolist()), (
        "weights do not change what the memory tokens say"
    )
    assert again.figures["uniformity"] == pytest.approx(uniformity(expected.numpy()), rel=1e-4)


@pytest.mark.thorough
@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("stage", ["3-scl", "2-ucl"])
def test_weights_of_a_stage(stage, run, texts_file):
    correlation = np.array(found(f"run/{stage}").collapse.memory_correlation)
    pair = np.sort(correlation[np.triu_indices(3, 1)])
    threshold = float((pair[2] + pair[:2].mean()) / 2)
    before = files_of(run)
    said = analyze_and_write(run / stage, texts_file, threshold)
    assert said.err.count("memory tokens now weigh") == 1
    after = files_of(run)
    assert {name for name in before if after.get(name) != before[name]} == {
        f"{stage}/memory.safetensors"
    }
    assert {
        name for name in set(after) - set(before) if not name.startswith(f"analysis/{stage}/")
    } == set()
    old, new = (load_file(place / stage / "memory.safetensors") for place in (finished()[1], run))
    assert set(old) == set(new)
    assert torch.equal(old["memory"], new["memory"])
    assert sorted(new["weights"].tolist()) == [0.25, 0.25, 0.5]
    expected, unweighted = weighed(stage, new["weights"])
    assert_embeds(run / stage, expected)
    assert_embeds(run / "3-scl", expected if stage == "3-scl" else memory_by_hand().mean(1))
    assert_embeds(run / "model", memory_by_hand().mean(1))
    assert verify(run / "model") > 0.99999


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("place", ["run/model", "moved"])
def test_weights_of_a_model_folder(place, run, texts_file, tmp_path, monkeypatch):
    threshold, weights = parting_threshold()
    if place == "moved":
        shutil.copytree(run / "model", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    before = files_of(tmp_path)
    said = analyze_and_write(place, texts_file, threshold)
    assert said.err.count("memory tokens now weigh") == 1
    after = files_of(tmp_path)
    changed = {name for name in before if after.get(name) != before[name]}
    assert f"{place}/golden.json" in changed
    assert {name.rsplit("/", 1)[0] for name in changed - {f"{place}/golden.json"}} == {
        f"{place}/1_WordWeights"
    }
    assert (
        tmp_path / ("llm2comp-analysis" if place == "moved" else "run/analysis") / "analysis.json"
    ).is_file()
    assert_embeds(tmp_path / place, weighed("3-scl", weights)[0])
    assert_embeds(run / "3-scl", weighed("3-scl", weights)[1])
    assert verify(tmp_path / place) > 0.99999


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("place", WITHOUT_MEMORY)
def test_a_model_without_memory_tokens_takes_no_weights(place, texts_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(path_of(place).removeprefix("mean:"))
    before = files_of(folder)
    said = cli(
        "analyze", path_of(place), "--texts", texts_file, "--device", "cpu", "--write-weights"
    )
    assert said.code == 1
    assert said.out == ""
    assert said.err.count("error: ") == 1
    assert "no memory tokens" in said.err.split("error: ")[1]
    assert "Traceback" not in said.err
    assert files_of(folder) == before
    assert found(place).merge_weights is None


@pytest.mark.usefixtures("no_plots")
def test_a_model_without_memory_tokens_is_refused_before_anything_is_written(texts_file, tmp_path):
    out = tmp_path / "out"
    said = cli(
        "analyze",
        path_of("mean"),
        "--texts",
        texts_file,
        "--device",
        "cpu",
        "--write-weights",
        "--out",
        out,
    )
    assert_refused(said, "no memory tokens")
    assert not out.exists()


@pytest.mark.thorough
@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(("threshold", "clusters"), [(-1.0, [0, 0, 0]), (1.0, [0, 1, 2])])
def test_a_threshold_that_merges_all_or_nothing(threshold, clusters, run, texts_file):
    """Both are the plain mean."""
    analyze_and_write(run / "3-scl", texts_file, threshold, "--out", run.parent / "out")
    tree = json.loads((run.parent / "out" / "analysis.json").read_text())
    assert tree["clusters"] == clusters
    assert tree["merge_weights"] == pytest.approx([1 / 3] * 3)
    assert load_file(run / "3-scl" / "memory.safetensors")["weights"].tolist() == pytest.approx(
        [1 / 3] * 3
    )
    assert_embeds(run / "3-scl", memory_by_hand().mean(1))


def test_a_full_disk_leaves_the_stage_as_it_was(run):
    before = files_of(run)
    with no_file_over(100), pytest.raises(RunError, match="cannot write"):
        reweight(str(run / "3-scl"), [0.5, 0.25, 0.25])
    assert files_of(run) == before


def test_a_damaged_folder_leaves_the_whole_run_as_it_was(run):
    """Else the last stage and the model that came of it are no longer one encoder."""
    tensors = load_file(run / "model" / "model.safetensors")
    tensors["layers.1.mlp.down_proj.weight"] += 0.5
    save_file(tensors, run / "model" / "model.safetensors", metadata={"format": "pt"})
    before = files_of(run)
    with pytest.raises(ModelFolderError, match="gives other embeddings"):
        reweight(str(run), [0.5, 0.25, 0.25])
    assert files_of(run) == before


# ---- command line


@pytest.mark.thorough
def test_all_is_said_on_standard_error(texts_file, tmp_path):
    pairs = write_rows(
        tmp_path / "pairs.jsonl",
        [{"anchor": pair.anchor, "positive": pair.positive} for pair in PAIRS],
    )
    out = tmp_path / "out"
    said = cli(
        "analyze",
        path_of("run"),
        "--texts",
        texts_file,
        "--pairs",
        pairs,
        "--out",
        out,
        "--device",
        "cpu",
    )
    assert (said.code, said.out) == (0, "")
    for name in (*FIGURES, "related pairs", "memory clusters"):
        assert name.replace("_", " ") in said.err
    assert "withheld" not in said.err
    assert said.err.count("\ntext: ") == said.err.count("  from the memory alone: ") == 3
    for i in range(MEMORY):
        assert said.err.count(f"  memory token {i}: ") == 3
    for readout in found("run", pairs=True).readouts:
        assert f"text: {readout.text}" in said.err
    assert f"{out}: analysis.json and plots" in said.err
    tree = json.loads((out / "analysis.json").read_text())
    assert tree == json.loads(json.dumps(asdict(found("run", pairs=True))))


@pytest.mark.usefixtures("no_plots")
def test_column_and_limit(tmp_path):
    file = write_rows(tmp_path / "texts.jsonl", [{"body": text} for text in TEXTS])
    out = tmp_path / "out"
    said = cli(
        "analyze",
        path_of("plain"),
        "--texts",
        file,
        "--column",
        "body",
        "--limit",
        40,
        "--out",
        out,
        "--device",
        "cpu",
    )
    assert (said.code, said.out) == (0, "")
    tree = json.loads((out / "analysis.json").read_text())
    expected = found("plain", 40)
    assert tree["collapse"] == json.loads(json.dumps(asdict(expected.collapse)))
    assert tree["figures"] == expected.figures
    assert tree["collapse"]["texts"] == 40


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run/model", "--texts", "nothing.jsonl"], ["nothing.jsonl"]),
        (["run/model", "--texts", "texts.jsonl", "--column", "body"], ["body", "text"]),
        (["run/model", "--texts", "one.jsonl"], ["too few texts", "2 or more"]),
        (
            ["run/model", "--texts", "texts.jsonl", "--pairs", "wrong.jsonl"],
            ["wrong.jsonl", "positive"],
        ),
        (["run/model", "--texts", "texts.jsonl", "--pairs", "nothing.jsonl"], ["nothing.jsonl"]),
        (["no-such-model", "--texts", "texts.jsonl"], ["no-such-model", "no such folder"]),
        (["nobody/nothing", "--texts", "texts.jsonl"], ["nobody/nothing", "no such folder"]),
        (
            ["run/1-pretext/adapter", "--texts", "texts.jsonl"],
            ["not a sentence-transformers folder"],
        ),
        (["run/model", "--texts", "texts.jsonl", "--device", "warp"], ["no such device"]),
    ],
    ids=lambda value: None if isinstance(value[0], str) and len(value) < 3 else " ".join(value),
)
def test_bad_input_is_one_clear_message(arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS[:5]])
    write_rows(tmp_path / "one.jsonl", [{"text": TEXTS[0]}])
    write_rows(tmp_path / "wrong.jsonl", [{"anchor": "a", "found": "b"}])
    place = path_of(arguments[0]) if arguments[0].startswith("run") else arguments[0]
    before = files_of(finished()[0])
    assert_refused(cli("analyze", place, *arguments[1:], "--out", "out"), *parts)
    assert not (tmp_path / "out").exists()
    assert files_of(finished()[0]) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [("--threshold", "2"), ("--threshold", "-1.1"), ("--threshold", "high"), ("--limit", "1")],
)
def test_a_setting_out_of_its_range(option, value, texts_file, tmp_path):
    said = cli(
        "analyze", path_of("run"), "--texts", texts_file, option, value, "--out", tmp_path / "out"
    )
    assert said.code == 2
    assert said.out == ""
    assert option in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "out").exists()


def test_a_stage_that_is_not_finished(run, texts_file):
    (run / "3-scl" / "done.json").unlink()
    for path in (run, run / "3-scl"):
        said = cli("analyze", path, "--texts", texts_file, "--device", "cpu")
        assert_refused(said, "the stage is not finished", "3-scl")
    assert not (run / "analysis").exists()
