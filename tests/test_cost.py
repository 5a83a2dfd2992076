"""`train --dry-run --gpu`: FLOPs by hand and as torch counts them, hours, price, what is
printed.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from measuring import counted
from tiny_run import assert_refused, cli, write_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.inputs import adapter_parameters, make_compressor, make_lm, make_texts
from benchmarks.settings import CPU, Shape
from benchmarks.work import contrastive_flops, pretext_flops

from llm2comp.data.pretext import PretextCollator
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.recipe import PretextStage, UclStage
from llm2comp.training.contrastive import contrastive_loss
from llm2comp.training.cost import GPUS, Size, gpu_named, hours, layer_passes, sample_flops
from llm2comp.training.pretext_model import PretextModel

SMALL = Shape("llama", 2, 32, 48, 4, 2, 8, 120)
SETTING = replace(CPU, shape=SMALL, memory_tokens=3)
UNUSED = [{"source": "unused"}]
PRETEXT = PretextStage(data=UNUSED)
UCL = UclStage(data=UNUSED, batch_size=4)


@pytest.fixture(scope="module")
def size():
    learning = sum(p.numel() for p in adapter_parameters(make_compressor(SETTING)))
    return replace(Size.of(make_lm(SETTING, "sdpa")), adapter=learning)


def test_sizes_by_hand(size):
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # q and o, k and v, the MLP
    lora = 16 * (64 + 48 + 64 + 3 * 80)  # not on k
    assert size == Size(2, 2 * layer, 2 * 32 * 48, 4 * 2 * 32, 32 * 120, 2 * lora)


def test_of_experts_the_chosen_count():
    from families import make_lm as family

    lm = family("qwen3_moe")
    experts = sum(p.numel() for p in lm.parameters() if p.ndim == 3)
    assert experts > 0
    share = lm.config.num_experts_per_tok / lm.config.num_experts
    dense = sum(p.numel() for n, p in lm.named_parameters() if p.ndim == 2 and "embed" not in n)
    head = 0 if lm.config.tie_word_embeddings else lm.get_output_embeddings().weight.numel()
    assert Size.of(lm).weights == pytest.approx(dense - head + share * experts)


def test_stage_1_is_the_mean_over_all_sites(size):
    """20 tokens have one site, 22 three. The benchmarks' formula counts product by product."""
    for length, sites in ((20, [10]), (22, [10, 11, 12])):
        expected = pretext_flops(SMALL, [length] * len(sites), sites, 3) / len(sites)
        assert sample_flops(PRETEXT, size, length, 1, 3) == pytest.approx(expected)
    assert sample_flops(UCL, size, 12, 2, 3) == pytest.approx(contrastive_flops(SMALL, [12, 12], 3))


def plain_compressor(monkeypatch, checkpointing, memory):
    """Eager attention, which the counter sees into, and every position computed in the last
    layer.
    """
    eager = make_lm(SETTING, "eager")
    monkeypatch.setattr("benchmarks.inputs.make_lm", lambda *_: eager)
    compressor = make_compressor(SETTING)
    compressor.backbone.__dict__["savings"] = frozenset()
    compressor.learn(memory=memory)
    compressor.backbone.set_checkpointing(checkpointing)
    return compressor


@pytest.mark.parametrize("objective", ["ctkd", "continuation", "reconstruction"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_stage_1_is_what_torch_counts(monkeypatch, size, checkpointing, objective):
    changes = {"gradient_checkpointing": checkpointing, "objective": objective}
    stage = PRETEXT.model_copy(update=changes)
    model = PretextModel(plain_compressor(monkeypatch, checkpointing, True), stage).train()
    batch = PretextCollator(0)([{"ids": list(range(20)), "site": 10}] * 3)
    found = counted(lambda: model(items=model.items(batch), **batch).backward())
    assert found == pytest.approx(3 * sample_flops(stage, size, 20, 1, 3), rel=1e-3)


@pytest.mark.parametrize("mini_batch", [None, 2])
def test_stages_2_and_3_are_what_torch_counts(monkeypatch, size, mini_batch):
    """Under checkpointing, where the first layer's input gets the gradient that is counted."""
    stage = UCL.model_copy(update={"mini_batch_size": mini_batch, "gradient_checkpointing": True})
    model = as_sentence_transformer(plain_compressor(monkeypatch, True, False), 512)
    objective, text = contrastive_loss(model, stage), make_texts([12] * 4, SMALL, 5)
    model.train()
    found = counted(lambda: objective([model.preprocess(text) for _ in "ab"], None).backward())
    assert found == pytest.approx(4 * sample_flops(stage, size, 12, 2, 3), rel=1e-3)


def test_objectives_share_the_encoder_and_each_costs(size):
    def of(*names):
        stage = PRETEXT.model_copy(update={"objective": dict.fromkeys(names, 1.0)})
        return sample_flops(stage, size, 40, 1, 3)

    both, encoder = of("continuation", "reconstruction"), of("alignment")
    assert both == pytest.approx(of("continuation") + of("reconstruction") - encoder)
    assert 0 < of("mntp") < of("mntp", "ctkd")
    assert of("ebae_ebar") > 0


def test_a_whole_copy_learns_at_the_price_of_its_weights(size):
    bare = replace(size, adapter=0)
    both = [sample_flops(UCL, one, 12, 2, 3) for one in (replace(bare, whole=True), bare)]
    assert both[0] - both[1] == pytest.approx(2 * 15 * 2 * size.weights)


def test_passes_of_a_stage(size):
    """Stage 1: five passes a batch.

    Stage 2: each view there and back, under GradCache once more.
    """
    stage = PRETEXT.model_copy(update={"steps": 10, "batch_size": 4})
    assert layer_passes(stage, 2, 1, 4) == 10 * 5 * 2
    assert layer_passes(stage, 2, 1, 1) == 10 * 4 * 5 * 2
    assert layer_passes(UCL, 2, 2, 8) == 1000 * 2 * 2 * 2
    assert layer_passes(UCL.model_copy(update={"mini_batch_size": 2}), 2, 2, 2) == 1000 * 4 * 3 * 2


def test_hours_are_those_of_the_slower_of_chip_and_host():
    gpu = gpu_named("h100", 2.5)
    assert (gpu.price, GPUS["h100"].price) == (2.5, 3.0)
    assert hours(989e12 * 0.4 * 3600, 0, gpu) == pytest.approx(1.0)
    assert hours(0.0, 7200 * 1000, gpu) == pytest.approx(1.0)


def test_dry_run_prints_hours_memory_and_price(tmp_path):
    said = cli("train", write_recipe(tmp_path), "--dry-run", "--gpu", "h100", "--price", "2.5")
    assert said.code == 0, said
    memory = r"^h100: 74\.5 GiB in all, base model 0\.0 GiB, needs about 0\.\d GiB: will fit$"
    time = r"^time: about .* on one h100 \(pretext .*, ucl .*, scl .*\), price \d+\.\d\d at 2\.5 an"
    assert re.search(memory, said.err, re.M)
    assert re.search(time, said.err, re.M)
    assert "on this cpu" not in said.err, "nothing is tried here"


ALONE = [["--gpu", "h100"], ["--dry-run", "--price", "2"], ["--dry-run", "--gpu", "h10"]]
TOLD = ["--dry-run beside it", "--dry-run --gpu NAME beside it", "did you mean 'h100'?"]


@pytest.mark.parametrize(("arguments", "told"), [*zip(ALONE, TOLD, strict=True)])
def test_options_that_say_nothing_are_refused(tmp_path, arguments, told):
    assert_refused(cli("train", write_recipe(tmp_path), *arguments), told)
