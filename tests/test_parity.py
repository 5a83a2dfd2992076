"""Losses, states and gradients equal those that the authors' own code computed
(tests/fixtures/parity/README.md).
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from families import stage_1
from llm2comp.model.backbone import Backbone, probe
from llm2comp.model.compressor import Compressor
from llm2comp.model.encoder import MemoryEncoder
from llm2comp.model.memory import MemoryTokens
from llm2comp.model.tokens import SplitTexts, Tokens
from llm2comp.objectives import stage_loss
from llm2comp.recipe import AdapterSettings, UclStage
from llm2comp.training.contrastive import contrastive_loss

FOLDER = Path(os.environ.get("LLM2COMP_PARITY_DIR", Path(__file__).parent / "fixtures" / "parity"))
CASE = json.loads((FOLDER / "case.json").read_text())


class Numbers:
    """All of a tokenizer that a batch of ids needs."""

    bos_token_id, pad_token_id = 1, None

    def __call__(self, text, verbose=True):
        return {"input_ids": [1, 7]}


@pytest.fixture
def compressor():
    lm = AutoModelForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32)
    backbone = Backbone(lm, Numbers())
    probe(backbone)
    lora = CASE["lora"]
    backbone.adapters.add(
        "pretext", AdapterSettings(rank=lora["r"], alpha=lora["alpha"], dropout=0.0)
    )
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(FOLDER / "lora.safetensors").items()
    }
    parameters = lora_parameters(backbone)
    assert set(weights) == set(parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return Compressor(
        backbone, MemoryTokens(load_file(FOLDER / "memory.safetensors")["memory"])
    ).train()


def lora_parameters(backbone):
    named = backbone.lm.named_parameters()
    return {n.removeprefix("model.").replace(".pretext.", "."): p for n, p in named if "lora_" in n}


def assert_gradients_equal(compressor, file, memory):
    expected = {
        name.removeprefix("model."): tensor for name, tensor in load_file(FOLDER / file).items()
    }
    found = {
        name: parameter.grad for name, parameter in lora_parameters(compressor.backbone).items()
    }
    if memory:
        found["memory"] = compressor.memory.vectors_KD.grad
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert gradient.norm() > 0, f"{name}: the case itself is vacuous"
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


def batch():
    return SplitTexts.from_rows(CASE["texts"], CASE["sites"])


def test_memory_states(compressor):
    states = compressor.memory_states(batch().context)
    expected = load_file(FOLDER / "states.safetensors")["memory_states"]
    assert expected.abs().max() > 1
    assert (states - expected).abs().max() < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("objective", "weighting", "key"),
    [("ctkd", "sample_mean", "kl"), ("continuation", "token_mean", "nll")],
)
def test_pretext_loss_and_gradients(compressor, objective, weighting, key, checkpointing):
    compressor.backbone.set_checkpointing(checkpointing)
    loss = stage_loss(compressor, batch(), stage_1(objective, weighting))
    assert loss.item() == pytest.approx(CASE["loss"][key], rel=1e-6)
    loss.backward()
    assert_gradients_equal(compressor, f"grad_{key}.safetensors", memory=True)


def test_ucl_loss_and_gradients(compressor):
    compressor.learn(memory=False)
    stage = UclStage(data=[{"source": "unused"}], attention_dropout=0.0)
    tokens = Tokens.pad(CASE["texts"], "left")
    features = {"input_ids": tokens.ids_BT, "attention_mask": tokens.mask_BT}
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(modules=[MemoryEncoder(compressor)], device="cpu").train()
    loss = contrastive_loss(model, stage)([dict(features), dict(features)], None)
    assert loss.item() == pytest.approx(CASE["loss"]["ucl"], rel=1e-6)
    loss.backward()
    assert_gradients_equal(compressor, "grad_ucl.safetensors", memory=False)
