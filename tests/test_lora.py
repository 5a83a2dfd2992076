"""LoRA as one operation equals peft's layer; older adapters folded into the weights equal the
stack; the bare LM stays.
"""

import pytest
import torch
from peft.tuners import lora
from torch import nn

from families import TEXTS, make_backbone, make_compressor, push_adapter, relative_error, snapshot
from llm2comp.model.backbone.lora import LoraLinear
from llm2comp.model.tokens import Tokens


def tokens_of(backbone):
    return Tokens.pad(backbone.tokenise(TEXTS), "left", backbone.pad_id)


def lora_layers(compressor):
    return [m for m in compressor.modules() if isinstance(m, lora.Linear)]


def as_peft(compressor):
    """The same encoder through peft's own forward passes."""
    for layer in lora_layers(compressor):
        layer.__class__ = lora.Linear
    return compressor


def step(compressor):
    """Embeddings, and the gradient of all that learns as one vector."""
    found = compressor(tokens_of(compressor.backbone))
    found.square().sum().backward()
    learned = [p for p in compressor.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in learned)
    return found.detach(), torch.cat([p.grad.flatten() for p in learned])


def encoder(family="llama", dropout=0.0, stages=("pretext", "ucl", "scl"), checkpointing=False):
    compressor = make_compressor(family, stages=list(stages))
    for layer in lora_layers(compressor):
        layer.lora_dropout[stages[-1]] = nn.Dropout(dropout)
    compressor.learn(memory=True)
    compressor.backbone.set_checkpointing(checkpointing)
    return compressor.train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stages", [("pretext",), ("pretext", "ucl", "scl")])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "qwen2"])
def test_one_operation_equals_pefts_layer(family, stages, checkpointing):
    ours, theirs = (encoder(family, stages=stages, checkpointing=checkpointing) for _ in range(2))
    assert lora_layers(ours)
    assert {type(layer) for layer in lora_layers(ours)} == {LoraLinear}
    for found, expected in zip(step(ours), step(as_peft(theirs)), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_dropout_is_drawn_as_peft_draws_it():
    found = []
    for compressor in (
        encoder(dropout=0.5, stages=("pretext",)),
        as_peft(encoder(dropout=0.5, stages=("pretext",))),
    ):
        torch.manual_seed(0)
        found.append(step(compressor))
    still = step(encoder(stages=("pretext",)))
    for ours, theirs, without in zip(*found, still, strict=True):
        assert relative_error(ours, theirs) < 1e-5
        assert relative_error(ours, without) > 1e-2, "vacuous: no dropout"


def test_autocast_goes_through_pefts_layer():
    tokens = tokens_of(make_backbone())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, expected = encoder()(tokens), as_peft(encoder())(tokens)
    assert torch.equal(found, expected)


def in_bfloat16(compressor):
    """Base weights in bfloat16, adapters in float32, as peft keeps them."""
    for name, weight in compressor.backbone.lm.named_parameters():
        if "lora_" not in name:
            weight.data = weight.data.bfloat16()
    return compressor


def test_over_a_bfloat16_lm_the_adapters_stay_float32_and_the_error_is_no_larger_than_pefts():
    """Both against float32 throughout, over the same rounded weights."""
    exact = in_bfloat16(encoder())
    for weight in exact.backbone.lm.parameters():
        weight.data = weight.data.float()
    exact_value, exact_gradient = step(exact)
    ours, theirs = (step(build(in_bfloat16(encoder()))) for build in (lambda c: c, as_peft))
    assert ours[1].dtype == torch.float32
    for found, other, expected in zip(ours, theirs, (exact_value, exact_gradient), strict=True):
        error, of_peft = relative_error(found, expected), relative_error(other, expected)
        assert 0 < error < max(0.03, 1.5 * of_peft), "vacuous without rounding"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_folded_adapters_give_the_same_states_and_gradients(family, checkpointing):
    stacked, folded = (encoder(family, checkpointing=checkpointing) for _ in range(2))
    expected = step(stacked)
    with folded.backbone.adapters.folded():
        assert {tuple(layer.active_adapters) for layer in lora_layers(folded)} == {("scl",)}
        found = step(folded)
    assert relative_error(found[0], expected[0]) < 1e-5
    assert relative_error(found[1], expected[1]) < 1e-4


def test_the_bare_lm_is_what_decodes_while_adapters_are_folded_and_nothing_is_left_behind():
    compressor = encoder()
    backbone, tokens = compressor.backbone, tokens_of(compressor.backbone)
    x_BTD, before = backbone.embed(tokens.ids_BT), snapshot(backbone.lm)
    compressor.eval()
    with torch.no_grad():
        bare, stacked, merged = (
            backbone.decoder_pass(x_BTD, tokens.mask_BT),
            compressor(tokens),
            backbone.adapters.merged(),
        )
        with backbone.adapters.folded():
            assert torch.equal(backbone.decoder_pass(x_BTD, tokens.mask_BT), bare)
            assert not torch.equal(compressor(tokens), stacked), "vacuous: nothing was folded"
            again = backbone.adapters.merged()
        assert torch.equal(compressor(tokens), stacked)
    after = backbone.lm.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for found, expected in zip(again.parameters(), merged.parameters(), strict=True):
        assert torch.equal(found, expected)
    learning = [name for name, p in backbone.lm.named_parameters() if p.requires_grad]
    assert learning
    assert all(".scl." in name for name in learning)


def test_a_graph_made_before_a_switch_keeps_its_weights():
    """Backward after the decoder has run, and the decoder's backward after the encoder has: both as
    without folding.
    """

    def gradients(folded):
        compressor = encoder()
        backbone, tokens = compressor.backbone, tokens_of(compressor.backbone)
        x_BTD = backbone.embed(tokens.ids_BT).detach().requires_grad_()
        with backbone.adapters.folded() if folded else torch.enable_grad():
            encoded = compressor(tokens).square().sum()
            decoded = backbone.decoder_pass(x_BTD, tokens.mask_BT).square().sum()
            encoded.backward()
            decoded.backward()
        learned = [p for p in compressor.parameters() if p.requires_grad]
        return torch.cat([p.grad.flatten() for p in learned]), x_BTD.grad

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert expected.any()
        assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_layers_that_are_no_plain_linear_ones_stay_stacked(family):
    compressor = make_compressor(family)
    with compressor.backbone.adapters.folded():
        assert not compressor.backbone.adapters._folds
        assert "pretext" in compressor.backbone.adapters._layers[0].active_adapters


def test_a_single_adapter_is_not_folded():
    backbone = make_backbone()
    push_adapter(backbone, "pretext", seed=1)
    with backbone.adapters.folded():
        assert not backbone.adapters._folds
