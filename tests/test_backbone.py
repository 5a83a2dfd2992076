"""The three passes over one copy of the weights: off = the untouched LM, on = bidirectional or
causal; what `probe` refuses.
"""

import pytest
import torch
import transformers

from families import (
    FAMILIES,
    GROUPED,
    MIXTURES,
    SMALL,
    TEXTS,
    config_of,
    lm_from,
    make_backbone,
    make_compressor,
    make_lm,
    make_tokenizer,
    push_adapter,
    snapshot,
    untouched,
)
from llm2comp.errors import BackboneError
from llm2comp.model.backbone import Backbone, load_backbone, probe
from llm2comp.model.backbone.loading import load_skeleton, resolve_dtype
from llm2comp.model.backbone.probes import multiplies_bfloat16
from llm2comp.model.tokens import Tokens, position_ids
from llm2comp.recipe import ModelSettings

# Own dropout everywhere in the base, as released GPT-2, OPT and StarCoder2 have it; noise before
# Mixtral's router.
WITH_DROPOUT = {
    **{
        family: config_of(family) for family in ("gpt2", "gpt_neox", "starcoder2", "opt", "mixtral")
    },
    "phi3": transformers.Phi3Config(**GROUPED | {"resid_pdrop": 0.3, "attention_dropout": 0.3}),
}


def padded(backbone, side="right"):
    return Tokens.pad(backbone.tokenise(TEXTS), side, backbone.pad_id)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_off_is_the_untouched_lm_bit_for_bit(family, training):
    compressor, reference = make_compressor(family, dropout=0.3), untouched(family)
    backbone = compressor.train(training).backbone
    backbone.savings = frozenset()  # these round otherwise (test_layout.py)
    tokens = padded(backbone)
    x_BTD = backbone.embed(tokens.ids_BT)
    with torch.no_grad():
        found = backbone.decoder_pass(x_BTD, tokens.mask_BT)
        embedded = reference.get_input_embeddings()(tokens.ids_BT)
        places = position_ids(tokens.mask_BT)
        expected = reference.base_model(
            inputs_embeds=embedded, attention_mask=tokens.mask_BT, position_ids=places
        )
        assert torch.equal(found, expected.last_hidden_state)
        with backbone.adapters.switched(off=False):
            adapted = backbone._run(x_BTD, places, tokens.mask_BT)
            assert not torch.allclose(adapted, found, atol=1e-2), "vacuous: adapters do nothing"
        ids = tokens.ids_BT[1:2]
        assert tokens.mask_BT[1].all(), "the longest text has no padding"
        logits = backbone.project(backbone.decoder_pass(backbone.embed(ids), torch.ones_like(ids)))
        assert torch.equal(logits, reference(input_ids=ids).logits)
        with backbone.base_only():
            assert torch.equal(backbone.lm(input_ids=ids).logits, reference(input_ids=ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_adding_adapters_and_training_leave_the_base_as_it_was(family):
    compressor = make_compressor(family).train()
    optimizer = torch.optim.SGD([p for p in compressor.parameters() if p.requires_grad], lr=1.0)
    compressor(padded(compressor.backbone, "left")).square().sum().backward()
    optimizer.step()
    state = snapshot(compressor.backbone.lm)
    wrapped = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in state.items()
        if ".base_layer" in name
    }
    assert wrapped, "vacuous: no layer has adapters"
    # what has adapters keeps its own weight one level deeper or two
    for name, tensor in snapshot(untouched(family)).items():
        assert torch.equal((wrapped if name in wrapped else state)[name], tensor), name


@pytest.mark.parametrize("family", WITH_DROPOUT)
def test_dropout_of_the_base_itself_never_acts(family):
    """The frozen LM is in eval mode while the adapters train: in the decoder, and in the encoder
    with all our rates at 0.
    """
    lm = lm_from(WITH_DROPOUT[family])
    reference = lm_from(WITH_DROPOUT[family])
    backbone = Backbone(lm, make_tokenizer(), name=family)
    backbone.savings = frozenset()
    push_adapter(backbone, "pretext")
    tokens = padded(backbone)
    x = backbone.embed(tokens.ids_BT)
    arguments = {
        "inputs_embeds": x,
        "attention_mask": tokens.mask_BT,
        "position_ids": position_ids(tokens.mask_BT),
    }
    with torch.no_grad():
        assert not torch.equal(
            reference.train().base_model(**arguments)[0], reference.base_model(**arguments)[0]
        ), "vacuous: this base has no dropout"
        quiet = backbone.eval().encoder_pass(x, tokens.mask_BT)
        expected = reference.eval().base_model(**arguments)[0]
        backbone.train()
        assert torch.equal(backbone.encoder_pass(x, tokens.mask_BT), quiet)
        assert torch.equal(backbone.decoder_pass(x, tokens.mask_BT), expected)
        backbone.set_checkpointing(True)
    x.requires_grad_()
    assert torch.equal(backbone.encoder_pass(x, tokens.mask_BT), quiet)
    assert torch.equal(backbone.decoder_pass(x, tokens.mask_BT), expected)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_state_sees_the_last_token_if_and_only_if_bidirectional(family, attention):
    backbone = make_compressor(family, attention=attention).backbone
    ids = torch.tensor([backbone.tokenise(TEXTS)[3]])
    other = ids.clone()
    other[0, -1] += 7
    mask = torch.ones_like(ids)
    with torch.no_grad():
        first, second = (backbone.encoder_pass(backbone.embed(x), mask)[0, 0] for x in (ids, other))
        decoded = [backbone.decoder_pass(backbone.embed(x), mask)[0] for x in (ids, other)]
    assert ((first - second).abs().max() > 1e-2) == (attention == "bidirectional")
    assert attention == "bidirectional" or torch.equal(first, second)
    # tokens of one expert are multiplied together, so elsewhere rounding depends on what the last
    # token chose
    rounding = 1e-5 if family in MIXTURES else 0.0
    assert (decoded[0][:-1] - decoded[1][:-1]).abs().max() <= rounding, (
        "teacher and decoder are always causal"
    )
    assert not torch.allclose(decoded[0][-1], decoded[1][-1], atol=1e-2)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_probe_accepts(family, attention):
    probe(make_backbone(family, attention))


@pytest.mark.parametrize(
    "config",
    [
        transformers.Gemma2Config(
            **GROUPED
            | {
                "head_dim": 8,
                "sliding_window": 8,
                "query_pre_attn_scalar": 8,
                "final_logit_softcapping": 3.0,
            }
        ),
        transformers.GraniteConfig(**GROUPED | {"logits_scaling": 4.0}),
        transformers.CohereConfig(**GROUPED | {"logit_scale": 0.3}),
    ],
    ids=["softcap", "divided", "scaled"],
)
def test_project_knows_heads_with_a_scale_or_a_cap(config):
    backbone = Backbone(lm_from(config), make_tokenizer())
    backbone.savings = frozenset()
    probe(backbone)
    tokens = padded(backbone)
    states = backbone.decoder_pass(backbone.embed(tokens.ids_BT), tokens.mask_BT)
    expected = lm_from(config)(
        tokens.ids_BT, attention_mask=tokens.mask_BT, position_ids=position_ids(tokens.mask_BT)
    ).logits
    assert torch.equal(backbone.project(states), expected)
    plain = backbone.lm.get_output_embeddings()(states)
    assert (plain - expected).abs().max() > 0.1, "vacuous: the head is plain"


STAY_CAUSAL = {
    "falcon": transformers.FalconConfig(
        **SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False
    ),
    "bloom": transformers.BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4),
    "gptj": transformers.GPTJConfig(**SMALL, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
}


@pytest.mark.parametrize("family", STAY_CAUSAL)
def test_probe_refuses_a_backbone_that_stays_causal(family):
    lm = lm_from(STAY_CAUSAL[family])
    with pytest.raises(
        BackboneError, match=rf"model_type {family}\): cannot encode with bidirectional attention"
    ) as error:
        probe(Backbone(lm, make_tokenizer(), "bidirectional"))
    assert "model.attention: causal" in str(error.value)
    probe(Backbone(lm, make_tokenizer(), "causal"))


SHAPE = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48}
BART = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
UNFIT = {
    "mamba": (transformers.MambaConfig(**SHAPE, state_size=4), "ignores the last token"),
    "rwkv": (
        transformers.RwkvConfig(**SHAPE, attention_hidden_size=32),
        "does not leave out masked tokens",
    ),
    "bert": (
        transformers.BertConfig(**SHAPE, **HEADS, initializer_range=0.15),
        "is not a causal LM",
    ),
    "bart": (
        transformers.BartConfig(vocab_size=320, d_model=32, **BART),
        "does not leave out masked tokens",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_probe_refuses_recurrent_and_encoder_models(kind):
    config, message = UNFIT[kind]
    with pytest.raises(BackboneError, match=message) as error:
        probe(Backbone(lm_from(config), make_tokenizer(), name="mine"))
    assert f"mine (model_type {kind})" in str(error.value)


FOREIGN = {
    "t5": (transformers.T5Config(vocab_size=320), "is an encoder-decoder"),
    "bart": (transformers.BartConfig(vocab_size=320, d_model=32, **BART), "is an encoder-decoder"),
    "gemma3": (transformers.Gemma3Config(), "is a model of more than text"),
    "qwen2_vl": (transformers.Qwen2VLConfig(), "is a model of more than text"),
    "modernbert": (
        transformers.ModernBertConfig(),
        "cannot be loaded: Unrecognized configuration class",
    ),
    "vit": (transformers.ViTConfig(), "cannot be loaded: Unrecognized configuration class"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("load", [load_backbone, load_skeleton])
def test_another_kind_of_model_is_refused_by_its_configuration(tmp_path, kind, load):
    config, message = FOREIGN[kind]
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=message) as error:
        load(ModelSettings(name=str(tmp_path), device="cpu"))
    assert "causal LM" in str(error.value)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_probe_refuses_a_decoder_that_sees_later_tokens(attention):
    backbone = make_backbone("llama", attention)
    backbone.config.is_causal = False
    with pytest.raises(BackboneError, match="is not a causal LM"):
        probe(backbone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_probe_accepts_half_precision(family, dtype):
    probe(Backbone(make_lm(family).to(dtype), make_tokenizer(), name=family))


WINDOWED = [family for family, (_, settings) in FAMILIES.items() if settings.get("sliding_window")]


@pytest.mark.parametrize("family", WINDOWED)
def test_a_sliding_window_bounds_what_one_layer_sees(family):
    """With one layer, a state moves with the tokens that the window reaches, and with those
    alone.
    """
    layers = (
        {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
        if "gemma" in family
        else {"num_hidden_layers": 1}
    )
    backbone, width = (
        make_compressor(family, **layers).backbone,
        FAMILIES[family][1]["sliding_window"],
    )
    ids = torch.arange(10, 10 + 3 * width)[None]
    middle, mask = ids.shape[1] // 2, torch.ones_like(ids)
    with torch.no_grad():
        for run, reach in (
            (backbone.decoder_pass, (width - 1, 0)),
            (backbone.encoder_pass, (width, width)),
        ):
            moved = []
            for place in range(ids.shape[1]):
                other = ids.clone()
                other[0, place] += 50
                states = (run(backbone.embed(x), mask)[0, middle] for x in (ids, other))
                moved.append(not torch.equal(*states))
            seen = [place - middle for place, moves in enumerate(moved) if moves]
            assert (-seen[0], seen[-1]) == reach
            assert seen == list(range(seen[0], seen[-1] + 1))


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
    for run in (backbone.encoder_pass, backbone.decoder_pass):
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


@pytest.mark.parametrize("native", [True, False])
def test_the_fastest_dtype_is_the_one_that_the_cpu_multiplies(native, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native, raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert multiplies_bfloat16() is native
    assert resolve_dtype("fastest", cpu) == (torch.bfloat16 if native else torch.float32)
    assert resolve_dtype("auto", cpu) == torch.float32
    assert {resolve_dtype(name, gpu) for name in ("auto", "fastest")} == {torch.bfloat16}
    assert resolve_dtype("float16", cpu) == torch.float16
    found = load_backbone(ModelSettings(name="builtin:tiny", dtype="fastest", device="cpu"))
    assert found.input_table.dtype == resolve_dtype("fastest", cpu)
