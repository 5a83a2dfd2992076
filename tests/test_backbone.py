"""The three passes over one copy of the weights: off = the untouched LM, on = bidirectional or causal; what `probe` refuses."""

import pytest
import torch
import transformers

from families import (
    FAMILIES,
    GROUPED,
    SIZES,
    TEXTS,
    lm_from,
    make_backbone,
    make_compressor,
    make_lm,
    make_tokenizer,
    push_adapter,
    snapshot,
    untouched,
)
from llm2comp.backbone import Backbone, probe
from llm2comp.errors import BackboneError
from llm2comp.tokens import Tokens, position_ids

SMALL = {k: SIZES[k] for k in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}
# Own dropout everywhere in the base, as released GPT-2, OPT and StarCoder2 have it.
WITH_DROPOUT = {
    "gpt2": transformers.GPT2Config(**FAMILIES["gpt2"][1]),
    "gpt_neox": transformers.GPTNeoXConfig(**FAMILIES["gpt_neox"][1]),
    "phi3": transformers.Phi3Config(**GROUPED | {"resid_pdrop": 0.3, "attention_dropout": 0.3}),
    "starcoder2": transformers.Starcoder2Config(
        **GROUPED | {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3}
    ),
    "opt": transformers.OPTConfig(
        vocab_size=320, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=160, dropout=0.3, attention_dropout=0.3, layerdrop=0.0, init_std=0.15, pad_token_id=1,
    ),
}  # fmt: skip


def padded(backbone, side="right"):
    return Tokens.pad(backbone.tokenise(TEXTS), side, backbone.pad_id)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_off_is_the_untouched_lm_bit_for_bit(family, training):
    compressor, reference = make_compressor(family, dropout=0.3), untouched(family)
    backbone = compressor.train(training).backbone
    tokens = padded(backbone)
    x_BTD = backbone.embed(tokens.ids_BT)
    with torch.no_grad():
        found = backbone.decode(x_BTD, tokens.mask_BT)
        embedded = reference.get_input_embeddings()(tokens.ids_BT)
        places = position_ids(tokens.mask_BT)
        expected = reference.base_model(inputs_embeds=embedded, attention_mask=tokens.mask_BT, position_ids=places)
        assert torch.equal(found, expected.last_hidden_state)
        with backbone.adapters.switched(off=False):
            assert not torch.allclose(backbone._run(x_BTD, tokens.mask_BT), found, atol=1e-2), "vacuous: adapters do nothing"
        ids = tokens.ids_BT[1:2]
        assert tokens.mask_BT[1].all(), "the longest text has no padding"
        logits = backbone.project(backbone.decode(backbone.embed(ids), torch.ones_like(ids)))
        assert torch.equal(logits, reference(input_ids=ids).logits)
        with backbone.base_only():
            assert torch.equal(backbone.lm(input_ids=ids).logits, reference(input_ids=ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_adding_adapters_and_training_leave_the_base_as_it_was(family):
    compressor = make_compressor(family).train()
    optimizer = torch.optim.SGD([p for p in compressor.parameters() if p.requires_grad], lr=1.0)
    compressor(padded(compressor.backbone, "left")).square().sum().backward()
    optimizer.step()
    state, moved = snapshot(compressor.backbone.lm), 0
    for name, tensor in snapshot(untouched(family)).items():
        found = state.get(name)
        if found is None:  # a layer with adapters keeps its own weight one level deeper
            module, weight = name.rsplit(".", 1)
            found, moved = state[f"{module}.base_layer.{weight}"], moved + 1
        assert torch.equal(found, tensor), name
    assert moved


@pytest.mark.parametrize("family", WITH_DROPOUT)
def test_dropout_of_the_base_itself_never_acts(family):
    """The frozen LM is in eval mode while the adapters train: in the decoder, and in the encoder with all our rates at 0."""
    lm = lm_from(WITH_DROPOUT[family])
    reference = lm_from(WITH_DROPOUT[family])
    backbone = Backbone(lm, make_tokenizer(), name=family)
    push_adapter(backbone, "pretext")
    tokens = padded(backbone)
    x = backbone.embed(tokens.ids_BT)
    arguments = {"inputs_embeds": x, "attention_mask": tokens.mask_BT, "position_ids": position_ids(tokens.mask_BT)}
    with torch.no_grad():
        assert not torch.equal(reference.train().base_model(**arguments)[0], reference.base_model(**arguments)[0]), (
            "vacuous: this base has no dropout"
        )
        quiet = backbone.eval().read(x, tokens.mask_BT)
        expected = reference.eval().base_model(**arguments)[0]
        backbone.train()
        assert torch.equal(backbone.read(x, tokens.mask_BT), quiet)
        assert torch.equal(backbone.decode(x, tokens.mask_BT), expected)
        backbone.set_checkpointing(True)
    x.requires_grad_()
    assert torch.equal(backbone.read(x, tokens.mask_BT), quiet)
    assert torch.equal(backbone.decode(x, tokens.mask_BT), expected)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_state_sees_the_last_token_if_and_only_if_bidirectional(family, attention):
    backbone = make_compressor(family, attention=attention).backbone
    ids = torch.tensor([backbone.tokenise(TEXTS)[3]])
    other = ids.clone()
    other[0, -1] += 7
    mask = torch.ones_like(ids)
    with torch.no_grad():
        first, second = (backbone.read(backbone.embed(x), mask)[0, 0] for x in (ids, other))
        decoded = [backbone.decode(backbone.embed(x), mask)[0] for x in (ids, other)]
    assert ((first - second).abs().max() > 1e-2) == (attention == "bidirectional")
    assert attention == "bidirectional" or torch.equal(first, second)
    assert torch.equal(decoded[0][:-1], decoded[1][:-1]), "teacher and decoder are always causal"
    assert not torch.allclose(decoded[0][-1], decoded[1][-1], atol=1e-2)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_probe_accepts(family, attention):
    probe(make_backbone(family, attention))


@pytest.mark.parametrize(
    "config",
    [
        transformers.Gemma2Config(
            **GROUPED | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}
        ),
        transformers.GraniteConfig(**GROUPED | {"logits_scaling": 4.0}),
        transformers.CohereConfig(**GROUPED | {"logit_scale": 0.3}),
    ],
    ids=["softcap", "divided", "scaled"],
)
def test_project_knows_heads_with_a_scale_or_a_cap(config):
    backbone = Backbone(lm_from(config), make_tokenizer())
    probe(backbone)
    tokens = padded(backbone)
    states = backbone.decode(backbone.embed(tokens.ids_BT), tokens.mask_BT)
    expected = lm_from(config)(tokens.ids_BT, attention_mask=tokens.mask_BT, position_ids=position_ids(tokens.mask_BT)).logits
    assert torch.equal(backbone.project(states), expected)
    plain = backbone.lm.get_output_embeddings()(states)
    assert (plain - expected).abs().max() > 0.1, "vacuous: the head is plain"


STAY_CAUSAL = {
    "falcon": transformers.FalconConfig(**SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False),
    "bloom": transformers.BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4),
    "gptj": transformers.GPTJConfig(**SMALL, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
}


@pytest.mark.parametrize("family", STAY_CAUSAL)
def test_probe_refuses_a_backbone_that_stays_causal(family):
    lm = lm_from(STAY_CAUSAL[family])
    with pytest.raises(BackboneError, match=rf"model_type {family}\): cannot encode with bidirectional attention") as error:
        probe(Backbone(lm, make_tokenizer(), "bidirectional"))
    assert "model.attention: causal" in str(error.value)
    probe(Backbone(lm, make_tokenizer(), "causal"))


def test_probe_refuses_a_backbone_that_is_asked_to_be_causal_and_is_not():
    backbone = make_backbone("llama", "causal")
    backbone.config.is_causal = False
    with pytest.raises(BackboneError, match="cannot encode with causal attention"):
        probe(backbone)


def test_a_model_that_says_it_is_not_causal_is_refused():
    with pytest.raises(BackboneError, match="not a causal LM"):
        Backbone(make_lm("llama", is_causal=False), make_tokenizer())


def test_probe_refuses_an_unknown_head():
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 2 * out.logits
            return out

    backbone = Backbone(Doubled(transformers.LlamaConfig(**GROUPED)), make_tokenizer())
    with pytest.raises(BackboneError, match="head does more"):
        probe(backbone)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_side_moves_no_state(family):
    """Both passes, either side: each text's states are those that it has alone."""
    backbone = make_compressor(family).backbone
    rows = backbone.tokenise(TEXTS)
    for run in (backbone.read, backbone.decode):
        for side in ("left", "right"):
            tokens = Tokens.pad(rows, side, backbone.pad_id)
            with torch.no_grad():
                states = run(backbone.embed(tokens.ids_BT), tokens.mask_BT)
                for i, row in enumerate(rows):
                    ids = torch.tensor([row])
                    alone = run(backbone.embed(ids), torch.ones_like(ids))[0]
                    assert (states[i][tokens.mask_BT[i].bool()] - alone).abs().max() < 1e-5


def test_tokens_start_with_bos_once_and_are_cut():
    with_bos, without = make_backbone("llama"), make_backbone("qwen3")
    assert with_bos.bos_id == 0
    rows = with_bos.tokenise(TEXTS)
    assert [row[0] for row in rows] == [0] * len(TEXTS)
    assert all(0 not in row[1:] for row in rows)
    assert with_bos.tokenise(TEXTS, 5) == [row[:5] for row in rows]
    assert without.bos_id is None
    assert without.pad_id == 0
    assert without.tokenizer.pad_token_id is None
    for text, row in zip(TEXTS, without.tokenise(TEXTS), strict=True):
        assert without.tokenizer.decode(row) == text
    assert with_bos.tokenise([""]) == [[0]]
