"""LoRA on the fused weights of a mixture's experts: W_e + Σ scale · B_e · A_e, beside q, v and o,
and peft's format on disk.
"""

import peft
import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from families import (
    MIXTURES,
    TEXTS,
    make_backbone,
    make_compressor,
    push_adapter,
    relative_error,
    stock_states,
    untouched,
)
from llm2comp.errors import BackboneError
from llm2comp.model.backbone.families import split_targets
from llm2comp.model.tokens import Tokens
from llm2comp.recipe import AdapterSettings

pytestmark = pytest.mark.parametrize("family", sorted(MIXTURES))
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def states(backbone):
    tokens = Tokens.pad(backbone.tokenise(TEXTS), "left", backbone.pad_id)
    return backbone.encoder_pass(backbone.embed(tokens.ids_BT), tokens.mask_BT)


def wrappers(backbone):
    return {
        path: module
        for path, module in backbone.lm.named_modules()
        if isinstance(module, ParamWrapper)
    }


def stacked(family, **settings):
    """Two adapters, each with a rank and a scale of its own."""
    backbone = make_backbone(family)
    push_adapter(backbone, "pretext", seed=1, rank=4, alpha=8, **settings)
    push_adapter(backbone, "ucl", seed=2, rank=2, alpha=3, **settings)
    return backbone


@torch.no_grad()
def test_experts_deltas_add(family):
    """The published formula, written out expert by expert."""
    backbone, reference = stacked(family), untouched(family)
    backbone.savings = frozenset()  # states at padding are compared too
    number, changed = (
        backbone.config.num_local_experts if family == "mixtral" else backbone.config.num_experts,
        0,
    )
    for path, module in backbone.lm.named_modules():
        layers = [
            (module, name, scale)
            for name, scale in (("pretext", 2.0), ("ucl", 1.5))
            if hasattr(module, "lora_A")
        ]
        for layer, name, scale in layers:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            if not isinstance(layer, ParamWrapper):
                reference.get_submodule(path).weight.add_(scale * b @ a)
                continue
            weight = getattr(
                reference.get_submodule(path.replace(".base_layer", "")), layer.parameter_name
            )
            rank = len(a) // number
            # peft keeps A in blocks of one expert, and B in blocks of one rank
            for expert in range(number):
                weight[expert] += (
                    scale * b[:, expert::number] @ a[expert * rank : (expert + 1) * rank]
                )
                changed += 1
    tokens = Tokens.pad(backbone.tokenise(TEXTS), "left", backbone.pad_id)
    expected = stock_states(reference, backbone, tokens)
    assert changed == number * 2 * 2 * (2 if family == "mixtral" else 1), (
        "experts · weights · adapters · sparse layers"
    )
    assert relative_error(states(backbone), expected) < 1e-5


def test_every_expert_that_is_chosen_learns(family):
    backbone = stacked(family).train()
    states(backbone).square().sum().backward()
    assert len(wrappers(backbone)) == (4 if family == "mixtral" else 2)
    for path, layer in wrappers(backbone).items():
        assert layer.lora_A["ucl"].weight.grad.abs().sum(1).count_nonzero() == len(
            layer.lora_A["ucl"].weight
        ), path
        assert layer.lora_B["ucl"].weight.grad.any(), path
        assert layer.lora_A["pretext"].weight.grad is None
        assert layer.get_param().grad is None


def test_dropout_of_the_newest_adapter_acts_beside_the_experts_alone(family):
    backbone = stacked(family, dropout=0.5).train()
    layers = {path: m for path, m in backbone.lm.named_modules() if hasattr(m, "lora_dropout")}
    for path, layer in layers.items():
        rates = [getattr(layer.lora_dropout[name], "p", None) for name in ("pretext", "ucl")]
        assert rates == ([None, None] if isinstance(layer, ParamWrapper) else [0.5, 0.5]), path
    with torch.no_grad():
        assert not torch.equal(states(backbone), states(backbone))
        for layer in layers.values():
            if not isinstance(layer, ParamWrapper):
                nn.init.zeros_(layer.lora_B["ucl"].weight)
        assert torch.equal(states(backbone), states(backbone)), (
            "an older adapter, an expert or the router's noise is random"
        )
        assert torch.equal(states(backbone), states(backbone.eval()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_experts_are_rounded_once(family, dtype):
    backbone = stacked(family)
    backbone.lm.base_model.to(dtype)
    for name in ("pretext", "ucl"):
        for parameter in backbone.adapters.parameters(name):
            parameter.data = parameter.data.float()
    merged, before = (
        backbone.adapters.merged(),
        {path: m.get_param().clone() for path, m in wrappers(backbone).items()},
    )
    for path, layer in wrappers(backbone).items():
        exact = before[path].double()
        for name, scale in (("pretext", 2.0), ("ucl", 1.5)):
            a, b = (x[name].weight.detach().double() for x in (layer.lora_A, layer.lora_B))
            a, b = a.reshape(len(exact), -1, a.shape[1]), b.reshape(len(b), -1, len(exact))
            exact += scale * torch.einsum("ore,eri->eoi", b, a)
        found = getattr(merged.get_submodule(path.replace(".base_layer", "")), layer.parameter_name)
        assert found.dtype == dtype
        if dtype == torch.float32:
            assert relative_error(found.double(), exact) < 1e-6
        else:
            assert (found == exact.float().to(dtype)).float().mean() > 0.999
        assert torch.equal(layer.get_param(), before[path])


def test_saved_is_peft_s_own_format_and_loads_again(tmp_path, family):
    backbone = stacked(family, dropout=0.3).eval()
    with torch.no_grad():
        before = states(backbone)
    for name in ("pretext", "ucl"):
        backbone.adapters.save(name, tmp_path / name)
    other = stacked(family)
    for name in ("pretext", "ucl"):
        for parameter in other.adapters.parameters(name):
            parameter.data.fill_(0.1)
        other.adapters.load(name, tmp_path / name)
    with torch.no_grad():
        assert torch.equal(states(other), before)
    alone = make_backbone(family)
    push_adapter(alone, "pretext", seed=1, rank=4, alpha=8)
    public = peft.PeftModel.from_pretrained(untouched(family), tmp_path / "pretext")
    ids = torch.tensor(alone.tokenise(TEXTS[:1]))
    with torch.no_grad():
        assert torch.equal(alone.lm(ids).logits, public(ids).logits)
        assert not torch.allclose(public(ids).logits, untouched(family)(ids).logits, atol=1e-2)


def test_the_default_implementation_of_experts_gives_the_same(family):
    """The tests' families loop over the experts; users get one grouped product.

    Also with adapters, and their gradients.
    """
    found = []
    for implementation in ("eager", "grouped_mm"):
        compressor = make_compressor(family, experts_implementation=implementation).train()
        backbone = compressor.backbone
        assert backbone.config._experts_implementation == implementation
        out = states(backbone)
        out.square().sum().backward()
        found.append(
            (
                out.detach(),
                {n: p.grad for n, p in backbone.lm.named_parameters() if p.grad is not None},
            )
        )
    assert relative_error(found[1][0], found[0][0]) < 1e-5
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert relative_error(found[1][1][name], gradient) < 1e-4, name


def test_targets_may_name_experts_alone_or_not_at_all(family):
    backbone = make_backbone(family)
    push_adapter(backbone, "pretext", targets=EXPERTS)
    assert all(
        "experts" in path
        for path, module in backbone.lm.named_modules()
        if hasattr(module, "lora_A")
    )
    assert split_targets(backbone.lm, (*EXPERTS, "q_proj", "w1")) == (
        ["q_proj"],
        list(EXPERTS),
        ["w1"],
    )
    with torch.no_grad(), backbone.adapters.switched(off=True):
        off = states(backbone)
    assert not torch.allclose(states(backbone), off, atol=1e-2)
    attention = make_backbone(family)
    push_adapter(attention, "pretext", targets=("q_proj",))
    assert not wrappers(attention)


def test_adapters_over_other_experts_weights_are_refused(family):
    backbone = make_backbone(family)
    push_adapter(backbone, "pretext")
    with pytest.raises(BackboneError, match="all adapters must target the same set") as error:
        backbone.adapters.add("ucl", AdapterSettings(targets=("q_proj", EXPERTS[0])))
    assert "experts.gate_up_proj" in str(error.value)
    with pytest.raises(BackboneError, match="LoRA targets match no module") as error:
        backbone.adapters.add("ucl", AdapterSettings(targets=("w1",)))
    assert "experts.down_proj" in str(error.value)
