"""The stack of adapters: switched as peft switches, one learns and the older ones rest, merged =
on, saved = loaded.
"""

import json

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from families import (
    FAMILIES,
    TEXTS,
    make_backbone,
    make_compressor,
    push_adapter,
    relative_error,
    snapshot,
    stock_states,
    untouched,
)
from llm2comp.errors import BackboneError, ModelFolderError
from llm2comp.model.backbone.families import LORA_TARGETS
from llm2comp.model.memory import MemoryTokens
from llm2comp.model.tokens import Tokens, position_ids
from llm2comp.recipe import AdapterSettings


def tokens_of(backbone):
    return Tokens.pad(backbone.tokenise(TEXTS), "left", backbone.pad_id)


@torch.no_grad()
def states(backbone):
    tokens = tokens_of(backbone)
    return backbone.encoder_pass(backbone.embed(tokens.ids_BT), tokens.mask_BT)


@pytest.mark.parametrize("family", FAMILIES)
def test_switched_equals_peft_disable_adapter(family):
    backbone = make_compressor(family).backbone
    on = states(backbone)
    flags = [p.requires_grad for p in backbone.lm.parameters()]
    with backbone.adapters._peft.disable_adapter():
        public = states(backbone)
    assert not torch.allclose(public, on, atol=1e-2), "vacuous: the adapters do nothing"
    for parameter, flag in zip(backbone.lm.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)  # the public call turns the frozen adapter's on
    with backbone.adapters.switched(off=True):
        assert backbone.adapters.off
        assert torch.equal(states(backbone), public)
        with backbone.adapters.switched(off=False):
            assert torch.equal(states(backbone), on)
        assert backbone.adapters.off
        assert [p.requires_grad for p in backbone.lm.parameters()] == flags
    assert not backbone.adapters.off
    assert torch.equal(states(backbone), on)


def test_switch_is_put_back_after_an_error():
    backbone = make_compressor().backbone
    with pytest.raises(KeyError), backbone.adapters.switched(off=True):
        raise KeyError
    assert not backbone.adapters.off
    with pytest.raises(RuntimeError):
        backbone.decoder_pass(torch.zeros(1, 2, 5), torch.ones(1, 2, dtype=torch.int64))
    assert not backbone.adapters.off


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_newest_adapter_learns_and_no_base_weight(family):
    compressor = make_compressor(family).train()
    lm = compressor.backbone.lm
    compressor(tokens_of(compressor.backbone)).square().sum().backward()
    learning = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert learning
    assert all("lora_" in name and ".ucl." in name for name in learning)
    for name, parameter in lm.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == (name in learning), name


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_are_all_found(family):
    """Every name in the family's table is a layer that learns; k is left alone where it stands by
    itself.
    """
    backbone = make_compressor(family, stages=["pretext"]).backbone
    model_type = backbone.config.model_type
    expected = set(
        LORA_TARGETS.get(
            model_type, ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        )
    )
    layers = {
        path: module
        for path, module in backbone.lm.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    found = [
        f"experts.{m.parameter_name}" if hasattr(m, "parameter_name") else p.rsplit(".", 1)[-1]
        for p, m in layers.items()
    ]
    assert set(found) == expected
    assert "k_proj" not in found
    sparse = backbone.config.num_hidden_layers - len(
        getattr(backbone.config, "mlp_only_layers", None) or ()
    )
    for name in expected:
        layers_with_it = sparse if name.startswith("experts") else backbone.config.num_hidden_layers
        assert found.count(name) % layers_with_it == 0, name


def test_targets_that_match_nothing_are_an_error():
    backbone = make_backbone()
    with pytest.raises(BackboneError, match="match no module") as error:
        backbone.adapters.add("pretext", AdapterSettings(targets=("query", "value")))
    assert "q_proj" in str(error.value)
    assert "query, value" in str(error.value)


def test_adding_is_fixed_by_its_seed_and_leaves_the_generator_alone():
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(weights))
        before = torch.get_rng_state()
        backbone = make_backbone()
        backbone.adapters.add("pretext", AdapterSettings(), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(
            torch.cat([p.detach().flatten() for p in backbone.adapters.parameters("pretext")])
        )
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_new_adapter_changes_nothing_until_it_learns():
    backbone = make_compressor(stages=["pretext"]).backbone
    before = states(backbone)
    backbone.adapters.add("ucl", AdapterSettings())
    assert (states(backbone) - before).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_deltas_add(family):
    """The stack is W + Σ scale · B · A: the sum written out here, with a rank of its own for each
    stage.
    """
    backbone = make_backbone(family)
    push_adapter(backbone, "pretext", seed=1, rank=4, alpha=8)
    push_adapter(backbone, "ucl", seed=2, rank=2, alpha=3)
    backbone.savings = frozenset()  # states at padding are compared too
    reference = untouched(family)
    with torch.no_grad():
        for path, module in backbone.lm.named_modules():
            if isinstance(module, BaseTunerLayer):
                a, b = module.lora_A, module.lora_B
                delta = (
                    2.0 * b["pretext"].weight @ a["pretext"].weight
                    + 1.5 * b["ucl"].weight @ a["ucl"].weight
                )
                weight = reference.get_submodule(path).weight
                weight += delta if isinstance(reference.get_submodule(path), nn.Linear) else delta.T
        tokens = tokens_of(backbone)
        expected = stock_states(reference, backbone, tokens)
    assert relative_error(states(backbone), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_adapters_on(family):
    compressor = make_compressor(family)
    backbone = compressor.backbone
    tokens = tokens_of(backbone)
    before, on = snapshot(backbone.lm), states(backbone)
    merged = backbone.adapters.merged()
    assert not [
        name
        for name, module in merged.named_modules()
        if isinstance(module, BaseTunerLayer) or "lora" in name
    ]
    reference = untouched(family)
    assert {n: p.shape for n, p in merged.state_dict().items()} == {
        n: p.shape for n, p in reference.state_dict().items()
    }
    assert all(type(m) is type(reference.get_submodule(n)) for n, m in merged.named_modules())
    mask = tokens.mask_BT.bool()
    with torch.no_grad():
        found = stock_states(merged, backbone, tokens)
        off = stock_states(reference, backbone, tokens)
    assert torch.cosine_similarity(off[mask], on[mask]).min() < 0.9, (
        "vacuous: the adapters do little"
    )
    assert torch.cosine_similarity(found[mask], on[mask]).min() > 0.99999
    assert torch.equal(states(backbone), on)
    for name, tensor in snapshot(backbone.lm).items():
        assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert torch.equal(states(backbone), on), "the merged copy shares memory with the base"


@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj"], "all-linear"])
def test_adapters_of_different_targets_fold_and_merge(targets):
    """A run may start from an encoder whose adapters change other layers than its own do."""
    backbone = make_backbone("llama")
    push_adapter(backbone, "start", seed=1)
    backbone.savings = frozenset()  # states at padding are compared too
    below = states(backbone)
    push_adapter(backbone, "scl", seed=2, targets=targets)
    on, tokens = states(backbone), tokens_of(backbone)
    assert relative_error(below, on) > 0.01, "vacuous: the second adapter does nothing"
    with backbone.adapters.folded():
        assert relative_error(states(backbone), on) < 1e-5
    assert torch.equal(states(backbone), on)
    with torch.no_grad():
        merged = stock_states(backbone.adapters.merged(), backbone, tokens)
    assert relative_error(merged, on) < 1e-5


def test_merging_rounds_once():
    """bf16 base: the sum is formed in float32 and cast at the end."""
    backbone = make_compressor(stages=["pretext", "ucl", "scl"]).backbone
    for module in backbone.lm.modules():
        if isinstance(module, BaseTunerLayer):
            module.get_base_layer().to(torch.bfloat16)
    merged = backbone.adapters.merged()
    checked = 0
    for path, module in backbone.lm.named_modules():
        if isinstance(module, BaseTunerLayer):
            exact = module.get_base_layer().weight.double()
            for name in backbone.adapters.names:
                exact = (
                    exact
                    + 2.0
                    * module.lora_B[name].weight.double()
                    @ module.lora_A[name].weight.double()
                )
            weight = merged.get_submodule(path).weight
            assert weight.dtype == torch.bfloat16
            assert (weight == exact.float().bfloat16()).float().mean() > 0.999
            checked += 1
    assert checked


def test_older_adapters_have_no_dropout():
    compressor = make_compressor(stages=["pretext", "ucl"], dropout=0.5)
    dropouts = [
        layer.lora_dropout
        for layer in compressor.backbone.lm.modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    assert dropouts
    assert all(d["pretext"].p == d["ucl"].p == 0.5 for d in dropouts)
    compressor.train()
    assert all(d["ucl"].training and not d["pretext"].training for d in dropouts)
    assert not torch.equal(states(compressor.backbone), states(compressor.backbone))
    for layer in compressor.backbone.lm.modules():
        if isinstance(layer, BaseTunerLayer):
            nn.init.zeros_(layer.lora_B["ucl"].weight)
    assert torch.equal(states(compressor.backbone), states(compressor.backbone)), (
        "the older adapter drops"
    )
    compressor.eval()
    assert not any(module.training for d in dropouts for module in d.values())


def test_saved_stage_is_peft_s_own_format_and_loads_again(tmp_path):
    compressor = make_compressor(stages=["pretext", "ucl"])
    before = states(compressor.backbone)
    for name in ("pretext", "ucl"):
        compressor.save(tmp_path / name, name)
    other = make_compressor(stages=["pretext", "ucl"], memory=3)
    for parameter in (
        *other.backbone.adapters.parameters("pretext"),
        *other.backbone.adapters.parameters("ucl"),
    ):
        parameter.data.fill_(0.1)
    other.memory.vectors_KD.data.zero_()
    assert not torch.allclose(states(other.backbone), before, atol=1e-2)
    for name in ("pretext", "ucl"):
        other.load(tmp_path / name, name)
    assert torch.equal(states(other.backbone), before)
    assert torch.equal(other.memory.vectors_KD, compressor.memory.vectors_KD)
    public = peft.PeftModel.from_pretrained(untouched("llama"), tmp_path / "pretext" / "adapter")
    alone = make_compressor(stages=["pretext"]).backbone
    ids = tokens_of(alone).ids_BT[:1]
    with torch.no_grad():
        assert torch.equal(alone.lm(ids).logits, public(ids).logits)
        assert not torch.allclose(public(ids).logits, untouched("llama")(ids).logits, atol=1e-2)


def test_adapters_of_a_bfloat16_base_are_float32():
    backbone = make_compressor("llama", stages=["pretext", "ucl"], dtype=torch.bfloat16).backbone
    assert backbone.input_table.dtype == torch.bfloat16
    for name in ("pretext", "ucl"):
        assert {p.dtype for p in backbone.adapters.parameters(name)} == {torch.float32}
    assert states(backbone).dtype == torch.bfloat16


def test_stage_of_another_shape_is_refused(tmp_path):
    make_compressor(stages=["pretext"]).save(tmp_path, "pretext")
    with pytest.raises(ModelFolderError, match="memory of another shape"):
        make_compressor(stages=["pretext"], memory=4).load(tmp_path, "pretext")
    with pytest.raises(BackboneError, match="do not fit"):
        make_compressor("gpt2", stages=["pretext"]).load(tmp_path, "pretext")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelFolderError, match="cannot be read"):
        make_compressor(stages=["pretext"]).load(tmp_path, "pretext")
    weights.unlink()
    with pytest.raises(ModelFolderError, match="cannot be read"):
        make_compressor(stages=["pretext"]).load(tmp_path, "pretext")


def test_memory_vectors_are_drawn_like_the_table_and_fixed_by_the_seed():
    table = make_backbone().input_table
    table[:, 0] += 3.0
    vectors = MemoryTokens.like(table, 4000, seed=1).vectors_KD.detach()
    assert (vectors.mean(0) - table.mean(0)).abs().max() < 0.05
    assert (vectors.std(0) / table.std(0) - 1).abs().max() < 0.1
    assert torch.equal(vectors, MemoryTokens.like(table, 4000, seed=1).vectors_KD)
    assert not torch.equal(vectors, MemoryTokens.like(table, 4000, seed=2).vectors_KD)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_peft_alone_reads_what_was_saved(family, tmp_path):
    """`AutoPeftModelForCausalLM` over the folder is the LM with that one adapter on, causal."""
    base = tmp_path / "base"
    untouched(family).save_pretrained(base)
    backbone = make_backbone(family, attention="causal")
    backbone.lm.name_or_path = str(base)  # as it is when loaded from there
    push_adapter(backbone, "pretext")
    backbone.adapters.save("pretext", tmp_path / "adapter")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter")).eval()
    tokens = tokens_of(backbone)
    with torch.no_grad():
        hidden = found.base_model.model.base_model(
            input_ids=tokens.ids_BT,
            attention_mask=tokens.mask_BT,
            position_ids=position_ids(tokens.mask_BT),
        ).last_hidden_state
        plain = backbone.decoder_pass(backbone.embed(tokens.ids_BT), tokens.mask_BT)
    mask = tokens.mask_BT.bool()
    assert relative_error(hidden[mask], states(backbone)[mask]) < 1e-5
    assert relative_error(plain[mask], states(backbone)[mask]) > 1e-3, (
        "vacuous: the adapter does nothing"
    )


def test_adapters_of_earlier_versions_are_read(tmp_path):
    """Their config names no task."""
    backbone = make_compressor().backbone
    expected = states(backbone)
    for name in ("pretext", "ucl"):
        backbone.adapters.save(name, tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        assert (config := json.loads(file.read_text()))["task_type"] == "CAUSAL_LM"
        assert config["target_modules"] == sorted(config["target_modules"]), "the same each time"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": None}))
    other = make_backbone()
    for number, name in enumerate(("pretext", "ucl")):
        push_adapter(other, name, seed=number + 7)
        other.adapters.load(name, tmp_path / name)
    assert relative_error(states(other), expected) < 1e-6
