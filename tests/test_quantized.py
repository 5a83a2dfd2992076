"""A base in 4 or 8 bits: every pass and gradient is that of the LM with the dequantised weights,
and so is the merged copy.
"""

import copy
import importlib.util

import pytest
import torch
from torch import nn

import llm2comp
from families import (
    MEMORY,
    SENTENCES,
    TEXTS,
    make_lm,
    make_tokenizer,
    push_adapter,
    relative_error,
    snapshot,
)
from llm2comp.errors import BackboneError
from llm2comp.model.backbone import Backbone, load_backbone, quantized
from llm2comp.model.backbone.quantized import plain_copy, quantized_layers
from llm2comp.model.compressor import Compressor
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.tokens import Tokens
from llm2comp.objectives.loss import two_step
from llm2comp.recipe import AdapterSettings, ModelSettings, parse_recipe
from llm2comp.storage.export import export
from llm2comp.storage.golden import verify
from oracles import embed_texts
from tiny_run import make_tree, save_backbone

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (extra `quantized`)",
)
kinds = pytest.mark.parametrize("kind", ["nf4", "int8"])
WIDE = {"hidden_size": 64, "intermediate_size": 128}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("wide"), lm=make_lm(**WIDE))


def settings_of(folder, kind, **changes):
    return ModelSettings(name=str(folder), device="cpu", quantization=kind, **changes)


def encoder_over(backbone):
    compressor = Compressor.fresh(backbone, MEMORY, seed=3)
    for number, name in enumerate(("pretext", "ucl")):
        push_adapter(backbone, name, seed=number + 1)
    return compressor


def pair(folder, kind):
    """An encoder over the quantised LM, and one over stock layers of the same (dequantised)
    weights.
    """
    backbone = load_backbone(settings_of(folder, kind))
    plain = Backbone(plain_copy(backbone.lm)[0], make_tokenizer(), name="plain")
    return encoder_over(backbone), encoder_over(plain)


def loss_from(backbone, memory_BKD, frozen=None):
    """A decoder's loss on texts behind the memory, through our `decode` or through a copy of the
    LM.
    """
    tokens = Tokens.pad(backbone.tokenise(SENTENCES[: len(memory_BKD)]), "right", 0)
    x_BSD = torch.cat([memory_BKD, backbone.embed(tokens.ids_BT)], 1)
    mask_BS = torch.cat([torch.ones(memory_BKD.shape[:2], dtype=torch.int64), tokens.mask_BT], 1)
    if frozen is None:
        logits_NV = backbone.project(
            backbone.decoder_pass(x_BSD, mask_BS)[:, MEMORY - 1 : -1][tokens.mask_BT.bool()]
        )
    else:
        logits_NV = frozen(inputs_embeds=x_BSD, attention_mask=mask_BS).logits[:, MEMORY - 1 : -1][
            tokens.mask_BT.bool()
        ]
    return nn.functional.cross_entropy(logits_NV, tokens.ids_BT[tokens.mask_BT.bool()])


@needs_bitsandbytes
@kinds
def test_linear_layers_but_the_head_are_quantised(folder, kind):
    backbone = load_backbone(settings_of(folder, kind))
    assert {path.rsplit(".", 1)[-1] for path in quantized_layers(backbone.lm)} == LINEAR
    assert len(quantized_layers(backbone.lm)) == 2 * len(LINEAR)
    assert {
        p.element_size()
        for layer in quantized_layers(backbone.lm).values()
        for p in layer.parameters()
    } == {1}
    packed = sum(layer.weight.numel() for layer in quantized_layers(backbone.lm).values())
    weights = sum(
        layer.in_features * layer.out_features for layer in quantized_layers(backbone.lm).values()
    )
    assert packed == (weights // 2 if kind == "nf4" else weights)
    found = plain_copy(backbone.lm)[0].state_dict()
    for name, exact in make_lm(**WIDE).state_dict().items():
        error = relative_error(found[name], exact)
        quantised = name.rsplit(".", 2)[-2] in LINEAR
        assert (0.001 < error < (0.12 if kind == "nf4" else 0.02)) if quantised else error == 0, (
            name
        )
    assert backbone.input_table.dtype == torch.float32


@needs_bitsandbytes
@kinds
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_passes_and_two_step_gradient_equal_the_oracle(folder, kind, checkpointing):
    """The oracle: dequantised weights, two copies of the LM, one ordinary backward pass."""
    ours, plain = pair(folder, kind)
    tokens = Tokens.pad(ours.backbone.tokenise(TEXTS), "left", 0)
    with torch.no_grad():  # a pass without gradients first: it must not change what follows
        assert (
            relative_error(ours.eval().memory_states(tokens), plain.eval().memory_states(tokens))
            < 1e-5
        )
    ours.train().learn(memory=True)
    plain.learn(memory=True)
    ours.backbone.set_checkpointing(checkpointing)
    loss = two_step(
        ours.memory_states(tokens), lambda memory_BKD: loss_from(ours.backbone, memory_BKD)
    )
    loss.backward()
    frozen = plain_copy(load_backbone(settings_of(folder, kind)).lm)[0]
    expected = loss_from(plain.backbone, plain.memory_states(tokens), frozen)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = dict(ours.named_parameters())
    learning = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert len(learning) == 2 * 2 * 6 + 1, "A and B · layers · targets, memory"
    assert {name for name, p in found.items() if p.grad is not None} == set(learning)
    for name, gradient in learning.items():
        assert relative_error(found[name].grad, gradient) < 1e-4, name


@needs_bitsandbytes
@kinds
def test_switched_off_is_the_quantised_lm_bit_for_bit(folder, kind):
    backbone = load_backbone(settings_of(folder, kind))
    tokens = Tokens.pad(backbone.tokenise(TEXTS), "right", 0)
    x_BTD, before = backbone.embed(tokens.ids_BT), snapshot(backbone.lm)
    with torch.no_grad():
        untouched = backbone.decoder_pass(x_BTD, tokens.mask_BT)
        encoder_over(backbone)
        for mode in (True, False):
            assert torch.equal(backbone.train(mode).decoder_pass(x_BTD, tokens.mask_BT), untouched)
        assert not torch.allclose(
            backbone.encoder_pass(x_BTD, tokens.mask_BT), untouched, atol=1e-2
        )
    after = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in snapshot(backbone.lm).items()
        if "lora_" not in name
    }
    assert before.keys() <= after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) if isinstance(tensor, torch.Tensor) else True, name


@needs_bitsandbytes
@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_is_rounded_once_from_the_dequantised_weights(folder, kind, dtype):
    backbone = load_backbone(settings_of(folder, kind, dtype=dtype))
    base = plain_copy(backbone.lm)[0]
    encoder_over(backbone)
    merged = backbone.adapters.merged()
    assert not quantized_layers(merged)
    assert not hasattr(merged.config, "quantization_config")
    assert {parameter.dtype for parameter in merged.parameters()} == {getattr(torch, dtype)}
    checked = 0
    for path, module in backbone.lm.named_modules():
        if hasattr(module, "lora_A"):
            exact = base.get_submodule(path).weight.double()
            for name in backbone.adapters.names:
                exact = (
                    exact
                    + 2.0
                    * module.lora_B[name].weight.double()
                    @ module.lora_A[name].weight.double()
                )
            found = merged.get_submodule(path).weight
            assert type(merged.get_submodule(path)) is nn.Linear
            assert relative_error(found.double(), exact) < (1e-6 if dtype == "float32" else 3e-3)
            checked += 1
    assert checked == 12
    assert len(quantized_layers(backbone.lm)) == 14, "the base is as it was"


@needs_bitsandbytes
@kinds
def test_exported_folder_is_stock_and_equal(folder, kind, tmp_path):
    model = as_sentence_transformer(encoder_over(load_backbone(settings_of(folder, kind))), 40)
    native = embed_texts(model, TEXTS)
    export(model, tmp_path / "model")
    assert verify(tmp_path / "model") > 0.99999
    assert "quantization_config" not in (tmp_path / "model" / "config.json").read_text()
    exported = llm2comp.load(tmp_path / "model")
    assert not quantized_layers(exported)
    assert relative_error(embed_texts(exported, TEXTS), native) < 1e-5


@needs_bitsandbytes
@kinds
def test_a_base_in_half_precision_is_held_in_float32(folder, kind, tmp_path):
    """Dequantised weights are float32: the comparison needs them unrounded on both sides."""
    model = as_sentence_transformer(
        encoder_over(load_backbone(settings_of(folder, kind, dtype="bfloat16"))), 40
    )
    before, layers = (
        embed_texts(model, TEXTS),
        {path: id(layer) for path, layer in quantized_layers(model[0]).items()},
    )
    with quantized.in_float32(model[0]):
        assert not quantized_layers(model[0])
        exact = embed_texts(model, TEXTS)
    assert {path: id(layer) for path, layer in quantized_layers(model[0]).items()} == layers
    assert torch.equal(embed_texts(model, TEXTS), before)
    export(model, tmp_path / "model", dtype="float32")
    assert verify(tmp_path / "model") > 0.99999
    assert relative_error(embed_texts(llm2comp.load(tmp_path / "model"), TEXTS), exact) < 1e-5
    export(model, tmp_path / "model")
    assert verify(tmp_path / "model") > 0.99999


@needs_bitsandbytes
def test_saved_stage_loads_over_the_quantised_lm(folder, tmp_path):
    ours = encoder_over(load_backbone(settings_of(folder, "nf4"))).eval()
    tokens = Tokens.pad(ours.backbone.tokenise(TEXTS), "left", 0)
    other = encoder_over(load_backbone(settings_of(folder, "nf4"))).eval()
    for name in ("pretext", "ucl"):
        ours.save(tmp_path / name, name)
        for parameter in other.backbone.adapters.parameters(name):
            parameter.data.fill_(0.1)
        other.load(tmp_path / name, name)
    with torch.no_grad():
        assert torch.equal(other.memory_states(tokens), ours.memory_states(tokens))


@needs_bitsandbytes
def test_a_run_trains_over_four_bits(tmp_path):
    tree = make_tree(tmp_path)
    tree["model"] |= {"quantization": "nf4"}
    run = llm2comp.train(
        parse_recipe({key: value for key, value in tree.items() if key not in ("ucl", "scl")}),
        tmp_path / "run",
    )
    assert verify(tmp_path / "run" / "model") > 0.99999
    assert run is not None


@needs_bitsandbytes
def test_full_fine_tuning_is_refused(folder):
    backbone = load_backbone(settings_of(folder, "nf4"))
    with pytest.raises(BackboneError, match="cannot be trained in full over 4 or 8 bits") as error:
        backbone.add_adapter("pretext", AdapterSettings(kind="full"))
    assert "model.quantization: null" in str(error.value)
    assert backbone.adapters.names == []


@kinds
def test_without_bitsandbytes_the_error_names_the_extra(folder, kind, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=r"model\.quantization: needs bitsandbytes") as error:
        load_backbone(settings_of(folder, kind))
    assert "[quantized]'" in str(error.value)
    load_backbone(settings_of(folder, None))


def test_a_plain_lm_has_no_quantised_layer_and_is_copied_as_it_is():
    lm = make_lm()
    found, dequantised = plain_copy(lm)
    assert quantized_layers(lm) == {}
    assert dequantised == []
    assert found is not lm
    assert {name: type(module) for name, module in found.named_modules()} == {
        n: type(m) for n, m in copy.copy(lm).named_modules()
    }


@needs_bitsandbytes
def test_experts_of_a_mixture_keep_their_dtype_and_carry_adapters(tmp_path):
    backbone = load_backbone(settings_of(save_backbone(tmp_path, "mixtral"), "nf4"))
    compressor = encoder_over(backbone).eval()
    assert {path.rsplit(".", 1)[-1] for path in quantized_layers(backbone.lm)} == {
        "base_layer",
        "k_proj",
    }
    experts = [weight for name, weight in backbone.lm.named_parameters() if weight.ndim == 3]
    assert [weight.dtype for weight in experts] == [torch.float32] * 4
    merged = Backbone(backbone.adapters.merged(), make_tokenizer(), name="merged")
    alone = Compressor(merged, compressor.memory)
    tokens = Tokens.pad(backbone.tokenise(TEXTS), "left", 0)
    with torch.no_grad():
        on = compressor.memory_states(tokens)
        with backbone.adapters.switched(off=True):
            assert relative_error(compressor.memory_states(tokens), on) > 0.1, (
                "vacuous: the adapters do little"
            )
        assert relative_error(alone.memory_states(tokens), on) < 1e-5
