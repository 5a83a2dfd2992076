"""What can be known before training is told before training: by `train` and `--dry-run` alike, in
one line.
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import constants

import llm2comp
from families import make_compressor
from llm2comp.errors import BackboneError, DataError, ModelFolderError, RecipeError
from llm2comp.lab.evaluation.evaluate import EvaluateOptions, evaluate
from llm2comp.lab.evaluation.mteb_encoder import MtebEncoder
from llm2comp.lab.evaluation.running import TaskFailedError, run_task
from llm2comp.lab.evaluation.tasks import local_tasks
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.recipe import Schedule, SclStage, UclStage, load_recipe, parse_recipe
from llm2comp.runs.folder import Run
from llm2comp.storage.export import export
from llm2comp.system import hub
from llm2comp.training import checks, estimates
from llm2comp.training import plan as plan_module
from llm2comp.training import run as run_module
from llm2comp.training.checks import check
from llm2comp.training.estimates import fitted
from tiny_run import (
    assert_refused,
    cli,
    finished,
    make_tree,
    save_backbone,
    sentences,
    write_recipe,
    write_rows,
)

LONG = "words " * 40


def changed(folder, stage, **settings):
    tree = make_tree(folder)
    return tree | {stage: tree[stage] | settings}


def pairs(folder, **settings):
    return [{"source": str(folder / "pairs.jsonl"), **settings}]


LATE = {
    "dimensions": (
        lambda f: changed(f, "ucl", matryoshka_dims=[9999]),
        RecipeError,
        r"ucl\.matryoshka_dims.*\n.*up to 32",
    ),
    "dimensions of scl": (
        lambda f: changed(f, "scl", matryoshka_dims=[8, 33]),
        RecipeError,
        "found: \\[33\\]",
    ),
    "long instruction": (
        lambda f: changed(f, "scl", data=pairs(f, instruction=LONG)),
        RecipeError,
        "leaves no room",
    ),
    "mask token": (
        lambda f: changed(f, "pretext", objective="mntp", mask_token="two tokens"),
        BackboneError,
        "not one token",
    ),
    "bag prompts": (
        lambda f: changed(
            f, "pretext", objective="ebae_ebar", bag_prompts={"itself": LONG * 4 + "{text}"}
        ),
        BackboneError,
        "no room",
    ),
    "loggers": (lambda f: make_tree(f, report_to=["no_such_logger"]), RecipeError, "report_to"),
    "adapter": (lambda f: make_tree(f, adapter={"targets": ["no_such"]}), BackboneError, "no_such"),
}


@pytest.mark.parametrize(("tree", "kind", "part"), LATE.values(), ids=LATE)
def test_settings_that_a_later_stage_would_stumble_over(tmp_path, tree, kind, part):
    check(parse_recipe(make_tree(tmp_path)))
    with pytest.raises(kind, match=part):
        check(parse_recipe(tree(tmp_path)))


@pytest.mark.parametrize("stage", ["pretext", "ucl", "scl", "watch"])
def test_one_usable_row_is_none_to_learn_from(tmp_path, stage):
    tree = make_tree(tmp_path)
    (text,) = sentences(1)
    write_rows(
        tmp_path / "one.jsonl", [{"text": text, "anchor": "who reads", "positive": text}] * 9
    )
    data = [{"source": str(tmp_path / "one.jsonl")}]
    tree[stage] = tree.get(stage, {}) | {"data": data}
    with pytest.raises(DataError, match="too few usable rows(.*\n)*.*found: 1"):
        check(parse_recipe(tree))


def test_train_and_dry_run_ask_the_same(tmp_path, monkeypatch):
    """Both refuse, with no folder made, what `check` refuses."""
    assert plan_module.check is run_module.check is checks.check
    recipe = write_recipe(tmp_path, **changed(tmp_path, "scl", matryoshka_dims=[9999]))
    for more in (("--dry-run",), ()):
        assert_refused(
            cli("train", recipe, "--out", tmp_path / "run", *more), "scl.matryoshka_dims", "9999"
        )
    assert not (tmp_path / "run").exists()


# ---- batches


@pytest.mark.thorough
@pytest.mark.parametrize(("stage", "size", "rows"), [("ucl", 41, 40), ("scl", 1000, 24)])
def test_batches_are_no_larger_than_the_data(tmp_path, stage, size, rows):
    said = cli("train", write_recipe(tmp_path), f"{stage}.batch_size={size}", "--dry-run")
    assert said.code == 0, said
    assert f"{stage}: batches of {rows}, as there are no more different rows" in said.err
    planned = plan_module.plan(
        load_recipe(tmp_path / "recipe.yaml", [f"{stage}.batch_size={size}"])
    )[0]
    assert {p.name: p.samples for p in planned}[stage] == 4 * rows


def test_what_is_computed_at_once_follows_the_memory(monkeypatch):
    backbone, stage = (
        make_compressor().backbone,
        UclStage(data=[{"source": "x"}], batch_size=64, max_tokens=64),
    )
    cut = {}
    for free in (2**40, 2**26, 2**24):
        monkeypatch.setattr(estimates, "free_memory", lambda _, free=free: free)
        cut[free] = fitted("ucl", stage, backbone, False).mini_batch_tokens
    assert cut[2**40] is None, "the whole batch"
    assert 64 <= cut[2**24] < cut[2**26] <= 8192
    assert estimates.activations(backbone.config, stage, 1, cut[2**26], True) <= 2**26
    for own in ({"mini_batch_size": 7}, {"mini_batch_tokens": 9}):
        assert fitted(
            "ucl", stage.model_copy(update=own), backbone, False
        ).mini_batch_size == own.get("mini_batch_size")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
GROUPS = {
    "container": ("0::/", {".": (V2, 1000, 700, 100)}, 400),
    "container, v1": ("4:memory:/docker/abc", {"memory": (V1, 1000, 700, 100)}, 400),
    "v1 without a limit": ("4:memory:/", {"memory": (V1, 2**63 - 4096, 700, 0)}, 2**63 - 4796),
    "no limit": ("0::/", {".": (V2, "max", 700, 100)}, math.inf),
    "a job's parent": ("0::/a/b", {"a/b": (V2, "max", 5, 0), "a": (V2, 90, 80, 0)}, 10),
    "another's": ("0::/a", {"b": (V2, 90, 80, 0)}, math.inf),
    "full": ("0::/", {".": (V2, 1000, 1100, 0)}, 0),
    "host": ("9:name=systemd:/\n0::/", {}, math.inf),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_container_s_limit_is_a_limit(tmp_path, name, monkeypatch):
    line, groups, expected = GROUPS[name]
    (tmp_path / "own").write_text(f"{line}\n")
    for place, ((limit, used, cache), most, now, back) in groups.items():
        folder = tmp_path / "groups" / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text(f"{now}\n")
        (folder / "memory.stat").write_text(f"anon 3\n{cache} {back}\n")
    found = estimates.free_in_groups(tmp_path / "groups", tmp_path / "own")
    assert found == expected
    monkeypatch.setattr(estimates, "free_in_groups", lambda: found)
    if expected <= 400:
        assert estimates.free_memory(torch.device("cpu")) == expected
    assert estimates.free_memory(torch.device("cpu")) < 2**60


# ---- learning rates


def test_auto_is_the_release_s_rate_at_its_width_and_goes_with_the_inverse_width():
    stage = UclStage(data=[{"source": "x"}], schedule=Schedule(warmup_steps=3))
    release, tiny, full = (
        stage.at_width(4096).schedule,
        stage.at_width(256).schedule,
        stage.at_width(256, full=True).schedule,
    )
    assert (release.peak, release.floor_learning_rate, release.warmup_steps) == (3e-5, 1e-5, 3)
    assert (tiny.peak, tiny.floor_learning_rate) == (16 * 3e-5, 16 * 1e-5)
    assert full.peak == pytest.approx(tiny.peak / 10)
    assert SclStage(data=[{"source": "x"}]).at_width(4096).schedule.peak == 1e-4
    given = Schedule(learning_rate=0.5)
    assert stage.model_copy(update={"schedule": given}).at_width(256).schedule == given
    with pytest.raises(ValueError, match="auto"):
        _ = stage.schedule.peak


# ---- prompts without room


def test_a_prompt_without_room_is_refused_wherever_it_is_used(tmp_path):
    model = as_sentence_transformer(make_compressor(), 40, {"query": 24, "document": 40})
    prompt = "words " * 5
    tokens = len(model[0].compressor.backbone.tokenise([prompt])[0])
    assert 24 - 4 < tokens <= 40 - 4, "too long for a query, not for a document"
    assert model.encode_document(["a text"], prompt=prompt).shape == (1, 32)
    with pytest.raises(RecipeError, match="leaves no room"):
        model.encode_query(["a text"], prompt=prompt)
    model.prompts = {"query": prompt, "document": ""}
    with pytest.raises(RecipeError, match=r"prompts\.query"):
        export(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def sts_set(folder):
    home = folder / "sets" / "sts" / "One"
    home.mkdir(parents=True)
    texts = sentences(40)
    rows = [
        {"sentence1": a, "sentence2": b, "score": i % 5}
        for i, (a, b) in enumerate(zip(texts, texts[1:], strict=False))
    ]
    write_rows(home / "test.jsonl", rows)
    return folder / "sets"


@pytest.mark.parametrize("place", ["model", "3-scl"])
def test_a_long_instruction_is_refused_by_evaluate(tmp_path, place):
    (tmp_path / "told.yaml").write_text(f"Local-One: {LONG}\n")
    options = EvaluateOptions(
        local=(sts_set(tmp_path),), device="cpu", instructions=str(tmp_path / "told.yaml")
    )
    with pytest.raises(RecipeError, match="instruction of Local-One"):
        evaluate([str(finished()[1] / place)], options, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_score_that_is_no_number_is_no_score(tmp_path):
    """One embedding for all texts: Spearman's correlation is NaN."""
    task = local_tasks(sts_set(tmp_path))[0]
    encoder = MtebEncoder(as_sentence_transformer(make_compressor(), 40), "x/y", "z")
    encoder.encode = lambda inputs, **_: np.ones(
        (sum(len(batch["text"]) for batch in inputs), 4), dtype=np.float32
    )
    with pytest.raises(TaskFailedError, match="not a number"):
        run_task(encoder, task, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("Local-One.json")), "no file with NaN in it"


# ---- names


@pytest.mark.parametrize("place", ["model", "3-scl", ""])
def test_an_encoder_is_no_model_to_train(tmp_path, place):
    folder, run = finished()
    with pytest.raises(
        BackboneError,
        match=f"is an encoder(.*\n)*.*{folder / 'backbone'}(.*\n)*.*start_from={run / place}",
    ):
        check(parse_recipe(make_tree(tmp_path) | {"model": {"name": str(run / place)}}))
    for name, base in (
        ("builtin:general-tiny", "builtin:tiny"),
        ("builtin:general", "builtin:smollm2"),
    ):
        with pytest.raises(BackboneError, match=f"model.name={base}"):
            check(parse_recipe(make_tree(tmp_path) | {"model": {"name": name}}))


def test_a_name_that_looks_like_a_path_is_answered_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "answers", lambda: pytest.fail("the Hub was asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    for name in ("runs/dmeo", "./runs/dmeo", str(tmp_path / "runs" / "dmeo"), "runs/dmeo/3-scl"):
        with pytest.raises(
            ModelFolderError, match=f"no such folder(.*\n)*.*{tmp_path / 'runs' / 'demo'}"
        ):
            llm2comp.load(name)
        with pytest.raises(
            BackboneError, match=f"no such folder(.*\n)*.*{tmp_path / 'runs' / 'demo'}"
        ):
            check(parse_recipe(make_tree(tmp_path) | {"model": {"name": name}}))
    with pytest.raises(DataError, match="no such file"):
        check(parse_recipe(changed(tmp_path, "ucl", data=[{"source": "runs/texts"}])))


def test_the_hub_is_asked_once_and_never_offline(tmp_path, monkeypatch):
    asked = []

    class Silent:
        def head(self, url, timeout):
            asked.append((url, timeout))
            raise ConnectionError("no route")

    monkeypatch.setattr(hub.huggingface_hub, "get_session", Silent)
    monkeypatch.setattr(hub, "_silent_at", [])
    for name in ("owner/no-such-model", "mean:owner/no-such-model"):
        with pytest.raises((ModelFolderError, BackboneError), match="HF_HUB_OFFLINE is set"):
            llm2comp.load(name)
    assert not asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("owner/no-such-model", "mean:owner/no-such-model"):
        with pytest.raises((ModelFolderError, BackboneError), match="does not answer"):
            llm2comp.load(name)
    assert len(asked) == 1
    assert asked[0][1] <= 5
    assert constants.HF_HUB_OFFLINE is False, "as it was"


# ---- paths


def project(folder):
    """A run of one stage over data and a model with relative names, in a folder of its own."""
    folder.mkdir()
    tree = make_tree(folder)
    ucl = tree["ucl"] | {"steps": 1, "data": [{"source": "texts.jsonl"}]}
    changes = {
        "model": {"name": "backbone", "device": "cpu"},
        "ucl": ucl,
        "pretext": None,
        "scl": None,
        "watch": None,
    }
    return write_recipe(folder, **changes)


@pytest.mark.thorough
def test_a_moved_or_copied_project_does_not_train_again(tmp_path, monkeypatch):
    recipe = project(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert cli("train", recipe, "--out", "runs/x").code == 0
    kept = Run(tmp_path / "here" / "runs" / "x").recipe
    assert kept.model.name == str(tmp_path / "here" / "backbone")
    assert kept.ucl.data[0].source == str(tmp_path / "here" / "texts.jsonl")
    monkeypatch.chdir(tmp_path)
    assert llm2comp.load("here/runs/x/2-ucl").encode(["a text"]).shape == (1, 32), (
        "from another working directory"
    )
    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    names = [Run(tmp_path / place / "runs" / "x").recipe.model.name for place in ("here", "copy")]
    assert names == [str(tmp_path / place / "backbone") for place in ("here", "copy")], (
        "each its own"
    )
    (tmp_path / "here").rename(tmp_path / "there")
    assert llm2comp.load("there/runs/x/2-ucl").encode(["a text"]).shape == (1, 32), (
        "found beside the moved run"
    )
    monkeypatch.chdir(tmp_path / "there")
    said = cli("train", "recipe.yaml", "--out", "runs/x")
    assert said.code == 0, said
    assert "2-ucl: done before" in said.err
    shutil.move(tmp_path / "there" / "runs" / "x", tmp_path / "x")
    said = cli("train", "recipe.yaml", "--out", tmp_path / "x")
    assert "2-ucl: done before" in said.err, (
        "the run alone was moved: the absolute names still hold"
    )


def test_home_is_expanded_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_backbone(tmp_path / "lm")
    tree = make_tree(tmp_path) | {
        "watch": {"tasks": ["~/sets"], "data": [{"source": "~/texts.jsonl"}]}
    }
    tree |= {"model": {"name": "~/lm"}}
    tree["scl"]["data"] = [{"source": "~/pairs.jsonl"}]
    recipe = parse_recipe(tree)
    names = (
        recipe.model.name,
        recipe.watch.tasks[0],
        recipe.watch.data[0].source,
        recipe.scl.data[0].source,
    )
    assert names == tuple(
        str(tmp_path / name) for name in ("lm", "sets", "texts.jsonl", "pairs.jsonl")
    )
    assert llm2comp.load("mean:~/lm", "cpu").encode(["a text"]).shape == (1, 32)
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    assert load_recipe("~/recipe.yaml") == recipe
    nobody = parse_recipe(make_tree(tmp_path) | {"model": {"name": "~no-such-user/lm"}})
    with pytest.raises(BackboneError, match="no such folder"):
        check(nobody)


@pytest.mark.parametrize("name", ["owner/model", "gpt2", "builtin:tiny", "builtin:general"])
def test_names_that_are_no_paths_stay(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert parse_recipe(make_tree(tmp_path) | {"model": {"name": name}}).model.name == name
