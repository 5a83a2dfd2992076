"""`--dry-run`: what it promises is what the run does, and it writes nothing."""

import re
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from families import make_lm
from llm2comp.errors import BackboneError, DataError
from llm2comp.model.backbone import load_backbone
from llm2comp.recipe import ModelSettings, parse_recipe
from llm2comp.training import estimates, trainers
from llm2comp.training.cost import GPUS
from llm2comp.training.plan import FITS, GIB, TRAINED, plan, show_plan
from llm2comp.training.run import train
from tiny_run import assert_refused, cli, make_tree, save_backbone, write_pairs, write_recipe

SETTINGS = {
    "default": {},
    "all embeddings, other memory": {
        "pretext": {"train_embeddings": "all", "batch_size": 2, "gradient_accumulation_steps": 3},
        "memory": {"tokens": 5},
    },
    "memory goes on learning": {
        "ucl": {"train_memory": True},
        "scl": {"train_memory": True, "mini_batch_size": 2},
    },
    "all linear, rank 3": {"adapter": {"rank": 3, "targets": "all-linear"}},
    "named targets": {"adapter": {"rank": 1, "targets": ["q_proj", "layers.1.mlp.up_proj"]}},
}


def merged(tree, changes):
    return {
        key: value | changes.get(key, {}) if isinstance(value, dict) else value
        for key, value in tree.items()
    }


def truth(recipe, run, monkeypatch):
    """Per stage of a real run: weights that its optimiser holds, samples and text tokens that it
    read.
    """
    found = {}
    real_scheduler, real_step = (
        trainers.StageMixin.create_scheduler,
        trainers.StageMixin.training_step,
    )

    def create_scheduler(self, *args, **kwargs):
        optimizer = kwargs.get("optimizer") or next(
            (a for a in args if isinstance(a, torch.optim.Optimizer)), self.optimizer
        )
        trainable = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        found[self.stage_name] = {"trainable": trainable, "samples": 0}
        return real_scheduler(self, *args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        ids = next(
            value for key, value in inputs.items() if key.endswith("input_ids") or key == "text_ids"
        )
        found[self.stage_name]["samples"] += len(ids)
        loss = real_step(self, model, inputs, *args, **kwargs)
        found[self.stage_name]["tokens"] = self.counter.tokens
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(trainers.StageMixin, "create_scheduler", create_scheduler)
        patch.setattr(trainers.StageMixin, "training_step", training_step)
        train(recipe, run)
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_plan_equals_the_run(tmp_path, monkeypatch, changes):
    recipe = parse_recipe(merged(make_tree(tmp_path), changes))
    plans, _ = plan(recipe)
    found = truth(recipe, tmp_path / "run", monkeypatch)
    assert [p.name for p in plans] == list(found) == ["pretext", "ucl", "scl"]
    for p in plans:
        assert p.trainable == found[p.name]["trainable"] > 0, p.name
        assert p.samples == found[p.name]["samples"]
        assert p.tokens == pytest.approx(found[p.name]["tokens"], rel=0.25), p.name


def test_base_is_what_the_loaded_model_holds(tmp_path):
    make_tree(tmp_path)
    for dtype, size in (("auto", 4), ("bfloat16", 2)):
        settings = ModelSettings(name=str(tmp_path / "backbone"), device="cpu", dtype=dtype)
        _, base = plan(parse_recipe(make_tree(tmp_path) | {"model": settings.model_dump()}))
        held = load_backbone(settings).lm.parameters()
        assert (
            base
            == sum(p.numel() * p.element_size() for p in held)
            == sum(p.numel() for p in make_lm().parameters()) * size
        )


def test_rows_that_the_stage_will_have(tmp_path):
    tree = make_tree(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", [1] * 30 + [0] * 10)
    with (tmp_path / "texts.jsonl").open("a") as out:
        out.write('{"text": ""}\n{"text": "short"}\nbroken\n')
    rows = {p.name: p.rows for p in plan(parse_recipe(tree))[0]}
    assert rows == {"pretext": 40, "ucl": 40, "scl": 40}


def test_dry_run_prints_and_writes_nothing(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(path.as_posix() for path in tmp_path.rglob("*"))
    said = cli(
        "train", recipe, "pretext.steps=7", "--dry-run", "--verbose", "--out", tmp_path / "run"
    )
    assert said.code == 0, said
    assert sorted(path.as_posix() for path in tmp_path.rglob("*")) == before
    assert said.err.index("│ pretext ") < said.err.index("steps: 7"), (
        "the plan, then the recipe, overrides included"
    )
    assert re.search(
        r"^time: about (under a minute|\d+ min) on this cpu \(pretext .*, ucl .*, scl ",
        said.err,
        re.MULTILINE,
    )
    assert "weight_decay: 1.0e-05" in said.err, "defaults too"
    table = {
        line.split()[1]: line
        for line in said.err.splitlines()
        if re.match(r"│ (pretext|ucl|scl) ", line)
    }
    (first, *_) = plan(parse_recipe(make_tree(tmp_path)))[0]
    assert f"│ {first.trainable:,} " in table["pretext"]
    assert "│ 28 " in table["pretext"], "7 steps of 4 samples"
    assert set(table) == {"pretext", "ucl", "scl"}
    assert re.search(
        r"^cpu: [\d.]+ GiB free, base model 0\.0 GiB, libraries 1\.5 GiB, "
        r"needs about 1\.5 GiB: will fit$",
        said.err,
        re.MULTILINE,
    )


def test_verdict_when_it_will_not_fit(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)
    monkeypatch.setattr(
        estimates.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1_000_000})
    )
    said = cli("train", recipe, "--dry-run")
    assert said.code == 0, said
    assert "will probably NOT fit: lower batch_size, or set gradient_checkpointing" in said.err
    assert psutil.virtual_memory().available == 1_000_000


def test_batches_are_cut_by_what_the_base_and_the_optimiser_leave(tmp_path, capsys):
    """As the run cuts them, so that it fits: what they hold is half of this card."""
    tree = make_tree(tmp_path, model={"name": "builtin:tiny"}, pretext=None, scl=None)
    tree["ucl"] |= {"batch_size": 40}
    recipe, card = parse_recipe(tree), GPUS["h100"]
    (whole,), base = plan(recipe, card)
    fixed = base + TRAINED * whole.trainable
    small = replace(card, memory=2 * fixed / 1e9)
    (cut,), _ = plan(recipe, small)
    assert fixed < cut.peak < 1.6 * fixed < whole.peak, "vacuous: whole batches fit"
    show_plan(recipe, gpu=small)
    assert f": {FITS}\n" in capsys.readouterr().err


def test_brackets_in_a_recipe_are_printed_as_they_are(tmp_path):
    said = cli(
        "train",
        write_recipe(tmp_path),
        "scl.query_prompt='[INST] {instruction} [/INST]'",
        "scl.query_max_tokens=40",
        "--dry-run",
        "--verbose",
    )
    assert said.code == 0, said
    assert "query_prompt: '[INST] {instruction} [/INST]'" in said.err


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.name=/nowhere", "cannot be loaded"),
        ("model.name=builtin:huge", "no such builtin model"),
        ("pretext.data.0.source=/nowhere.txt", "no such file"),
        ("scl.data.0.positive=answer", "no column 'answer'"),
        ("adapter.targets=[no_such]", "LoRA targets match no module"),
        ("ucl.min_characters=5000", "too few usable rows"),
        ("scl.matryoshka_dims=[9999]", "more dimensions than the model has"),
        ("memory.tokens=159", "no room for a text"),
    ],
)
def test_dry_run_refuses_what_the_run_would_refuse(tmp_path, override, part):
    recipe = write_recipe(tmp_path)
    assert_refused(cli("train", recipe, override, "--dry-run"), part)
    assert_refused(cli("train", recipe, override, "--out", tmp_path / "run"), part)
    assert not Path("runs/tiny-run").exists()


def test_a_config_that_is_no_causal_lm(tmp_path):
    tree = make_tree(tmp_path)
    file = tmp_path / "backbone" / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"vit"'))
    with pytest.raises(BackboneError, match="cannot be loaded"):
        plan(parse_recipe(tree))
    save_backbone(tmp_path / "backbone")
    (tmp_path / "texts.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no usable row"):
        plan(parse_recipe(tree))


def test_gib():
    assert GIB == 1024**3
