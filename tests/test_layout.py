"""Packed texts and a last layer for the needed rows alone: the same states, loss and gradients as
padded batches in full.

The oracles of tests/test_pretext.py, text by text and unpadded, run over packed batches too; here
is shown that they do.
"""

import pytest
import torch

from families import FAMILIES, make_backbone, make_compressor, relative_error, stage_1
from llm2comp.model.backbone import layout, probes
from llm2comp.model.compressor import Compressor
from llm2comp.model.memory import mean_weights
from llm2comp.model.tokens import SplitTexts, Tokens
from llm2comp.objectives import stage_loss
from llm2comp.recipe import AdapterSettings

UNPACKED = {"gemma2"}  # its attention is eager for the softcap
LENGTHS = (4, 17, 9, 23)
NOTHING = frozenset()
ALL = frozenset(probes.SAVINGS)


def rows(seed=7, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 300, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def packed_passes(monkeypatch):
    """Lengths of the texts of every pass that was packed."""
    seen = []
    whole = layout.Layout.of

    def of(mask_BS, packed, needed_BS=None):
        made = whole(mask_BS, packed, needed_BS)
        seen.append(made.lengths)
        return made

    monkeypatch.setattr(layout.Layout, "of", of)
    return seen


def step(compressor, objective="ctkd", checkpointing=False):
    """Loss, and the gradient of adapters and memory as one vector."""
    compressor.learn(memory=True)
    compressor.backbone.set_checkpointing(checkpointing)
    compressor.train()
    batch = SplitTexts.from_rows(rows(lengths=(17, 9, 23, 12)), (14, 4, 5, 6))
    loss = stage_loss(compressor, batch, stage_1(objective, "sample_mean"))
    loss.backward()
    learned = [p for p in compressor.parameters() if p.grad is not None]
    return loss.detach(), torch.cat([p.grad.flatten() for p in learned])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_but_one_can_be_packed_and_every_one_skips_in_its_last_layer(family):
    expected = ALL - {"packing"} if family in UNPACKED else ALL
    assert make_backbone(family).savings == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_states_are_those_of_the_padded_batch_in_full(family, packed_passes):
    compressor = make_compressor(family)
    tokens = Tokens.pad(rows(), "left")
    found = compressor.memory_states(tokens)
    # longer texts than half the window stay padded
    windowed = family in ("mistral-window", "gemma2", "gemma3")
    assert [tuple(n + 3 for n in LENGTHS)] * (not windowed) == [
        lengths for lengths in packed_passes if lengths
    ][1:]
    compressor.backbone.savings = NOTHING
    assert relative_error(found, compressor.memory_states(tokens)) < 1e-6


@pytest.mark.thorough
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_loss_and_gradients_are_the_same(family, kind, checkpointing, packed_passes):
    def make():
        if kind == "lora":
            return make_compressor(family)
        backbone = make_backbone(family)
        backbone.add_adapter("pretext", AdapterSettings(kind="full"))
        return Compressor.fresh(backbone, 3, seed=3)

    found = step(make(), checkpointing=checkpointing)
    # encoder, teacher and decoder
    assert sum(lengths is not None for lengths in packed_passes) >= 3
    padded = make()
    padded.backbone.savings = NOTHING
    expected = step(padded, checkpointing=checkpointing)
    assert relative_error(found[0], expected[0]) < 1e-5
    assert relative_error(found[1], expected[1]) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_moe", "opt"])
def test_no_text_sees_another(family):
    compressor = make_compressor(family)
    first, second = rows(seed=7), rows(seed=8)
    mixed = [*first[:2], *second[2:]]
    one, other = (compressor.memory_states(Tokens.pad(texts, "left")) for texts in (first, mixed))
    # experts compute the tokens that chose them together
    tolerance = 1e-6 if family == "qwen3_moe" else 0.0
    assert (one[:2] - other[:2]).abs().max() <= tolerance
    assert (one[2:] - other[2:]).abs().max() > 1e-3


def test_the_last_layer_computes_the_needed_rows_alone():
    compressor = make_compressor("llama")
    seen = {}
    for number, layer in enumerate(compressor.backbone.lm.base_model.layers):
        for name in ("q_proj", "k_proj", "o_proj"):
            module = getattr(layer.self_attn, name)
            module.register_forward_hook(
                lambda m, args, _, key=(number, name): seen.__setitem__(key, args[0].shape[1])
            )
        layer.mlp.register_forward_hook(
            lambda m, args, _, key=(number, "mlp"): seen.__setitem__(key, args[0].shape[1])
        )
    assert compressor.backbone.savings == ALL
    compressor.memory_states(Tokens.pad(rows(), "left"))
    every, memory = sum(LENGTHS) + 3 * len(LENGTHS), 3 * len(LENGTHS)
    assert {key: n for key, n in seen.items() if key[0] == 0} == {
        (0, n): every for n in ("q_proj", "k_proj", "o_proj", "mlp")
    }
    # our hooks come and go behind these, so the query's sees what came in
    assert seen[1, "k_proj"] == every
    assert seen[1, "o_proj"] == seen[1, "mlp"] == memory


def test_dropout_of_the_attention_acts_on_packed_texts(packed_passes):
    compressor = make_compressor("llama")
    tokens = Tokens.pad(rows(), "left")
    calm = compressor.memory_states(tokens)
    compressor.backbone.set_attention_dropout(0.4)
    compressor.train()
    one, other = compressor.memory_states(tokens), compressor.memory_states(tokens)
    assert packed_passes[-1] is not None
    assert (one - other).abs().max() > 1e-3
    compressor.eval()
    assert torch.equal(compressor.memory_states(tokens), calm)


def test_eager_attention_and_equal_lengths_stay_padded(packed_passes):
    compressor = make_compressor("llama", attn_implementation="eager")
    assert compressor.backbone.savings == {"last layer"}
    compressor = make_compressor("llama")
    assert compressor.backbone.savings == ALL
    packed_passes.clear()
    compressor.memory_states(Tokens.pad(rows(lengths=(9, 9, 9)), "left"))
    assert packed_passes == [None]


def test_attention_that_changes_scores_in_a_way_not_known_here_is_refused():
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="softcap"):
        layout.packed_attention(torch.nn.Module(), q, q, q, None, softcap=3.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_one_kernel_for_all_texts_gives_the_padded_states(family, packed_passes):
    compressor = make_compressor(family, head_dim=32, hidden_size=128).to("cuda", torch.bfloat16)
    compressor.register_buffer("weights_K", mean_weights(3).cuda())
    tokens = Tokens.pad(rows(), "left").to("cuda")
    found = compressor.memory_states(tokens).float()
    assert packed_passes[-1] is not None
    compressor.backbone.savings = NOTHING
    assert (
        torch.cosine_similarity(found, compressor.memory_states(tokens).float(), dim=-1).min()
        > 0.999
    )
