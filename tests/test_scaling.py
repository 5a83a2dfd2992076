"""The cost model against hand computation, real models' bytes, the FLOPs that torch counts, and its own documentation."""

import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scaling, scaling_check
from benchmarks.inputs import adapter_parameters, config_of, make_compressor, make_lm, make_texts
from benchmarks.scaling_costs import (
    Load,
    Way,
    limits,
    loads,
    memory_bytes,
    place,
    sample_flops,
    text_tokens,
    traffic_bytes,
)
from benchmarks.scaling_inputs import GPUS, Assumed, Gpu, model_of, read_model
from benchmarks.settings import CPU, Shape
from benchmarks.training import UNUSED
from benchmarks.work import contrastive_flops

from llm2comp.data.pretext import PretextCollator
from llm2comp.encoder import as_sentence_transformer
from llm2comp.errors import BackboneError
from llm2comp.recipe import PretextStage, SclStage, UclStage, load_recipe
from llm2comp.training.contrastive import contrastive_loss
from llm2comp.training.trainers import PretextModel
from measuring import counted

ROOT = Path(__file__).resolve().parents[1]
SMALL = Shape("llama", 2, 32, 48, 4, 2, 8, 120)
SETTING = replace(CPU, shape=SMALL, memory_tokens=3, ucl_texts=4, ucl_lengths=(4, 9))
ASSUMED = Assumed()
PRETEXT = PretextStage.model_validate({"data": UNUSED})
UCL = UclStage.model_validate({"data": UNUSED})
WAY = Way("bf16", "DDP", 1, False, 1)


@pytest.fixture(scope="module")
def small():
    with torch.device("meta"):
        return model_of("small", SMALL, transformers.AutoModelForCausalLM.from_config(config_of(SMALL)))


@pytest.fixture(scope="module")
def large():
    return read_model("70b")


@pytest.fixture(scope="module")
def work():
    return loads(load_recipe(scaling.RECIPE), ASSUMED)


def test_weights_are_a_real_models_bytes(small):
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # q and o, k and v, the MLP; two layers
    rest = 2 * 120 * 32 + (2 * 2 + 1) * 32  # embeddings and head, norms
    assert small.base == {"float32": 4 * (linear + rest), "bf16": 2 * (linear + rest), "nf4": 2 * rest + int(0.5625 * linear)}
    real = make_lm(SETTING, "sdpa")
    assert small.base["float32"] == sum(p.numel() * p.element_size() for p in real.parameters())
    assert small.root == 2 * 2 * 120 * 32
    learning = adapter_parameters(make_compressor(SETTING))
    assert small.adapter == sum(p.numel() for p in learning) == 2 * 16 * (64 + 48 + 64 + 3 * 80)


def test_pretext_flops_by_hand():
    """20 tokens, one site possible, 10: encoder 13 places, teacher 20, decoder 14, head 11."""
    load = Load(PRETEXT, (20,), 20, 1, 1)
    products, lora = 2 * 15_360, 2 * 16 * 416 * 2
    scores = 4 * 2 * 32  # per pair of places: two layers, all heads 32 wide

    def forward(places, learns):
        return places * (products + lora * learns) + scores * places**2

    encoder = 2 * 13 * products + 3 * (13 * lora + scores * 13**2)
    decoder = 2 * 14 * products + 3 * scores * 14**2
    model = encoder + forward(20, False) + decoder + 3 * 2 * 11 * 32 * 120
    again = forward(13, True) + forward(14, False) - 14 * 2 * 2 * 48 * 32
    assert sample_flops(SMALL, load, WAY, 3) == (model, model)
    assert sample_flops(SMALL, load, replace(WAY, checkpointing=True), 3) == (model, model + again)


def test_site_is_every_site_alike():
    load = Load(PRETEXT, (22,), 22, 1, 1)
    one = [Load(PRETEXT.model_copy(update={"site_margin_tokens": m}), (22,), 22, 1, 1) for m in (10, 11)]
    three, middle = (sample_flops(SMALL, x, WAY, 3)[0] for x in one)
    assert sample_flops(SMALL, load, WAY, 3)[0] == three > middle  # sites 10, 11, 12 against 11


def plain_compressor(monkeypatch, checkpointing, memory):
    """Eager attention, which the counter sees into, and every place computed in the last layer, as the formula has it."""
    eager = make_lm(SETTING, "eager")
    monkeypatch.setattr("benchmarks.inputs.make_lm", lambda *_: eager)
    compressor = make_compressor(SETTING)
    compressor.backbone.__dict__["savings"] = frozenset()
    compressor.learn(memory=memory)
    compressor.backbone.set_checkpointing(checkpointing)
    return compressor


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pretext_flops_are_those_that_torch_counts(monkeypatch, checkpointing):
    model = PretextModel(plain_compressor(monkeypatch, checkpointing, True), PRETEXT).train()
    batch = PretextCollator(0)([{"ids": list(range(20)), "site": 10}] * 3)
    found = counted(lambda: model(items=model.items(batch), **batch).backward())
    load = Load(PRETEXT, (20,), 20, 1, 3)
    assert found == pytest.approx(3 * sample_flops(SMALL, load, replace(WAY, checkpointing=checkpointing), 3)[1], rel=1e-3)


@pytest.mark.parametrize("mini_batch", [None, 2])
def test_contrastive_flops_are_those_that_torch_counts(monkeypatch, mini_batch):
    """Under checkpointing, where the first layer's input gets the gradient that the formula counts."""
    stage = UCL.model_copy(update={"mini_batch_size": mini_batch, "batch_size": 4})
    model = as_sentence_transformer(plain_compressor(monkeypatch, True, False), 512)
    objective, text = contrastive_loss(model, stage), make_texts([12] * 4, SMALL, 5)
    model.train()
    found = counted(lambda: objective([model.preprocess(text), model.preprocess(text)], None).backward())
    load = Load(stage, (12, 12), 12, 1, 4)
    assert found == pytest.approx(4 * sample_flops(SMALL, load, replace(WAY, checkpointing=True), 3)[1], rel=1e-3)


def test_samples_are_the_papers(work):
    assert {name: (load.batch, load.samples) for name, load in work.items() if load.stage} == {
        "pretext": (4, 32_000),
        "ucl": (128, 128_000),
        "scl": (1024, 204_800),
    }


def test_memory_by_hand(small):
    load = Load(UCL, (12, 12), 30, 1, 8, older=1)
    per_place = 2 * (20 * 32 + 6 * 48)
    ddp = memory_bytes(small, load, replace(WAY, at_once=4), ASSUMED)
    assert ddp == pytest.approx(small.base["bf16"] + 20 * small.adapter + 1.1 * 4 * 38 * 2 * per_place)
    again = memory_bytes(small, load, replace(WAY, at_once=4, checkpointing=True), ASSUMED)
    assert again == pytest.approx(small.base["bf16"] + 20 * small.adapter + 1.1 * 4 * 38 * (2 * 2 * 32 + per_place))
    spread = memory_bytes(small, load, Way("bf16", "FSDP2", 4, False, 4), ASSUMED)
    whole = min(small.base["bf16"], small.layers / 4 + small.root + small.layers)  # both layers
    assert spread == pytest.approx(int(whole) + 5 * small.adapter + 1.1 * 4 * 38 * 2 * per_place)


def test_traffic_by_hand(small):
    load = Load(UCL.model_copy(update={"mini_batch_size": 2}), (12, 12), 30, 1, 8, older=1)
    gathered = 2 * 2 * 8 * 32 * 4  # both columns, there and back
    ddp = Way("bf16", "DDP", 2, False, 2)
    assert traffic_bytes(small, load, ddp) == 0.5 * (gathered + 2 * 4 * small.adapter)
    # 4 texts a GPU, 2 columns, 2 at once: 4 encodings, each forward twice and backward once
    expected = gathered + 12 * (small.layers + 8 * small.adapter) + small.root + 4 * 4 * small.adapter
    assert traffic_bytes(small, load, replace(ddp, sharding="FSDP2")) == 0.5 * expected
    pretext = Load(PRETEXT, (20,), 20, 1, 2)
    assert traffic_bytes(small, pretext, Way("bf16", "FSDP2", 2, True, 1)) == 0.5 * (
        5 * (small.layers + 4 * small.adapter) + small.root + 4 * small.adapter
    )
    assert traffic_bytes(small, load, WAY) == 0.0


def test_a_step_takes_what_its_resources_take(small):
    gpu, load = Gpu(1, 2, 3, 4, 1, 1), Load(UCL, (12, 12), 30, 1, 8)
    found = limits(small, load, Way("bf16", "DDP", 16, False, 1), gpu, ASSUMED)
    assert found["compute"] == pytest.approx(contrastive_flops(SMALL, [12, 12], 8) / (2e12 * 0.4))
    assert found["memory"] == pytest.approx(2 * 2 * small.layers / (3e9 * 0.8))
    assert found["link"] == pytest.approx(15 / 16 * (2 * 2 * 16 * 128 + 8 * small.adapter) / (1e9 * 0.7))  # between nodes
    assert found["host"] == pytest.approx(2 * 2 * 2 * 0.5e-3)
    assert text_tokens(load, Way("bf16", "DDP", 16, False, 1)) == 16 * 24


def test_more_of_anything_is_never_cheaper(large, work):
    scl = work["scl"]
    way = Way("bf16", "FSDP2", 8, True, 4)

    def held(load=scl, **changes):
        return memory_bytes(large, load, replace(way, **changes), ASSUMED)

    assert held() > held(gpus=64) > held(gpus=64, at_once=1)
    assert held(checkpointing=False) > held()
    assert held(sharding="DDP") > held(sharding="DDP", form="nf4") > held()
    assert held(replace(scl, longest=2000)) > held()
    slow, fast = (limits(large, scl, way, GPUS["h100"], replace(ASSUMED, hfu=hfu)) for hfu in (0.2, 0.4))
    assert slow["compute"] == 2 * fast["compute"]
    assert limits(large, scl, replace(way, gpus=64), GPUS["l40s"], ASSUMED)["link"] > 0


def test_70b_does_not_fit_a_24_gb_card_and_7b_does(large, work):
    assert place(large, work, 1, GPUS["rtx4090"], ASSUMED) == {}
    assert place(large, work, 64, GPUS["rtx4090"], ASSUMED) == {}, "every process loads the base whole"
    assert place(large, work, 1, replace(GPUS["rtx4090"], memory=10**4), ASSUMED)["scl"].form == "bf16"
    seven = place(read_model("7b"), work, 1, GPUS["rtx4090"], ASSUMED)
    assert seven.keys() == work.keys()
    for name, way in seven.items():
        assert memory_bytes(read_model("7b"), work[name], way, ASSUMED) <= 0.9 * 24e9
    text = scaling.report([large], scaling.Asked([1], "rtx4090", GPUS["rtx4090"], ASSUMED))
    assert "| 70b | 1 | does not fit |" in text
    assert "| rtx4090 (24 GB) | does not fit |" in text


def test_a_config_file_is_a_shape(tmp_path, small):
    config_of(SMALL).save_pretrained(tmp_path)
    for name in (str(tmp_path), str(tmp_path / "config.json")):
        found = read_model(name)
        assert (found.shape, found.base, found.adapter) == (SMALL, small.base, small.adapter)
        assert found.name == tmp_path.name
    wide = replace(SMALL, family="qwen3", head_dim=16, tied=True)
    config_of(wide).save_pretrained(tmp_path)
    assert read_model(str(tmp_path)).shape == wide
    transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=120).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="no llama-like layers"):
        read_model(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--hfu", "1.5"], "--hfu: expected a number over 0 up to 1, found '1.5'"),
        (["--gpus", "1", "0"], "--gpus: expected a whole number over 0, found '0'"),
        (["--price", "nan"], "--price: expected a number over 0, found 'nan'"),
        (["--texts", "1e6"], "--texts: expected a whole number over 0"),
        (["--gpu", "h1"], "'h100'"),
        (["--pretext-tokens", "19"], "expected at least 20"),
        (["--model", "/nowhere/config.json"], "/nowhere/config.json: cannot be loaded"),
    ],
)
def test_wrong_options_are_explained(capsys, arguments, expected):
    with pytest.raises(SystemExit) as stop:
        scaling.main(arguments)
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


def test_every_number_is_an_option(tmp_path, capsys):
    config_of(SMALL).save_pretrained(tmp_path)
    given = {f.name: 0.5 if f.name in scaling.SHARES else 33 for kind in (Gpu, Assumed) for f in fields(kind)}
    assert len(given) > 20
    options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    scaling.main(["--model", str(tmp_path), "--gpus", "1", *options])
    head = capsys.readouterr().out.split("\n\n")[0]
    assert all(f"{name} {value}" in head for name, value in given.items())


def test_document_holds_the_tables_that_the_command_prints(capsys):
    """To renew them: `python -m benchmarks.scaling`, and paste."""
    scaling.main([])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) > 30
    lines = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in printed if line not in lines] == []
    assert len(lines) <= 120


@pytest.mark.parametrize("case", scaling_check.CASES)
def test_check_predicts_its_own_step(monkeypatch, case):
    """At a rate of 1 GFLOP/s: seconds are the step's FLOPs, those done again included."""
    monkeypatch.setattr(scaling_check, "ROUNDS", 1)
    monkeypatch.setattr(scaling_check.Gemm, "rate", lambda _: 1e9)
    setting = replace(SETTING, pretext_steps=1, pretext_texts=2, pretext_lengths=(24, 24), scl_triples=4)
    setting = replace(setting, scl_query=(6, 6), scl_passage=(9, 9), ucl_lengths=(8, 8), encode_texts=(0, 0, 1))
    found = scaling_check.measure(case, setting)
    side, load = scaling_check.CASES[case][0](setting, "," in case)
    _, model = side.run()
    counted, done = sample_flops(SMALL, load, replace(WAY, checkpointing="checkpointing" in case), 3)
    assert (done > counted) == ("," in case)
    assert found.predicted_seconds == pytest.approx(model * done / counted / 1e9, rel=0.02)
    assert found.seconds > 0
    assert found.predicted_bytes > model_of("", SMALL, make_lm(SETTING, "sdpa")).base["float32"]
    if case in ("ucl", "scl"):
        assert model == pytest.approx(load.batch * counted)
    stage = load.stage
    assert isinstance(stage, {"p": PretextStage, "u": UclStage, "s": SclStage, "e": type(None)}[case[0]])
