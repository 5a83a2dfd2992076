"""Texts → memory states: the same alone, padded on either side, in any company and order; what
learns; saved = loaded.
"""

import pytest
import torch
from tokenizers import normalizers

from families import (
    FAMILIES,
    MEMORY,
    TEXTS,
    make_backbone,
    make_compressor,
    relative_error,
    untouched,
)
from llm2comp.errors import RecipeError
from llm2comp.model.compressor import Compressor
from llm2comp.model.memory import MemoryTokens, embedding_from_memory, mean_weights
from llm2comp.model.tokens import Tokens
from llm2comp.recipe import MemorySettings

WINDOWED = {"mistral-window", "gemma2", "gemma3"}


def ids_of(compressor):
    return compressor.backbone.tokenise(TEXTS)


@torch.no_grad()
def alone(compressor, row):
    """One text, no padding, no mask to speak of, the LM called by hand."""
    backbone = compressor.backbone
    x = torch.cat(
        [
            backbone.embed(torch.tensor([row], dtype=torch.int64)),
            compressor.memory.vectors_KD[None],
        ],
        1,
    )
    attention = {"is_causal": False} if backbone.attention == "bidirectional" else {}
    return backbone.lm.base_model(inputs_embeds=x, use_cache=False, **attention).last_hidden_state[
        0, -MEMORY:
    ]


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_states_do_not_depend_on_padding_mates_or_order(family, attention):
    compressor = make_compressor(family, attention=attention)
    rows = ids_of(compressor)
    expected = torch.stack([alone(compressor, row) for row in rows])
    assert expected.abs().max() > 0.5
    assert (expected[0] - expected[1]).abs().max() > 0.1, (
        "vacuous: all texts are the same to this encoder"
    )
    with torch.no_grad():
        together = compressor.memory_states(Tokens.pad(rows, "left", pad_id=7))
        assert (together - expected).abs().max() < 1e-5
        backwards = compressor.memory_states(Tokens.pad(rows[::-1], "left"))
        assert (backwards.flip(0) - expected).abs().max() < 1e-5
        longer = [*rows, list(range(2, 90))]
        assert (
            compressor.memory_states(Tokens.pad(longer, "left"))[:-1] - expected
        ).abs().max() < 1e-5
        # padding in the middle pushes the text out of a window that counts places
        if family not in WINDOWED:
            right = compressor.memory_states(Tokens.pad(rows, "right", pad_id=7))
            assert (right - expected).abs().max() < 1e-5
        means = compressor(Tokens.pad(rows, "left"))
        assert (means - expected.mean(1)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_content_of_padding_never_matters(family):
    compressor = make_compressor(family)
    rows = ids_of(compressor)
    with torch.no_grad():
        zero, nine = (compressor(Tokens.pad(rows, "left", pad_id=pad)) for pad in (0, 9))
    assert (zero - nine).abs().max() < 1e-6


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_text_states_see_the_memory_only_if_bidirectional(attention):
    """And the memory sees the text either way."""
    compressor = make_compressor("llama", attention=attention)
    tokens = Tokens.pad([ids_of(compressor)[0]], "left")
    with torch.no_grad():
        x, mask = compressor.memory.append(compressor.backbone.embed(tokens.ids_BT), tokens.mask_BT)
        first = compressor.backbone.encoder_pass(x, mask)
        x[:, -1] += 1.0
        second = compressor.backbone.encoder_pass(x, mask)
    assert ((first[0, 0] - second[0, 0]).abs().max() > 1e-3) == (attention == "bidirectional")
    assert (first[0, -1] - second[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_empty_text_has_an_embedding(family):
    compressor = make_compressor(family)
    empty, other = compressor.backbone.tokenise(["", TEXTS[1]])
    assert len(empty) == (family == "llama")
    with torch.no_grad():
        single = compressor(Tokens.pad([empty], "left"))
        batched = compressor(Tokens.pad([empty, other], "left"))
    assert single.isfinite().all()
    assert (batched[:1] - single).abs().max() < 1e-5


def test_append_and_gather():
    memory = MemoryTokens(torch.arange(6.0).view(2, 3))
    x, mask = (
        torch.full((4, 5, 3), -1.0, dtype=torch.bfloat16),
        torch.zeros(4, 5, dtype=torch.int64),
    )
    x_BSD, mask_BS = memory.append(x, mask)
    assert x_BSD.dtype == torch.bfloat16
    assert torch.equal(x_BSD[:, -2:], memory.vectors_KD.bfloat16().expand(4, 2, 3))
    assert torch.equal(x_BSD[:, :5], x)
    assert mask_BS.tolist() == [[0] * 5 + [1] * 2] * 4
    assert memory.vectors_KD.dtype == torch.float32


def test_weighted_mean():
    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.5, 0.0, 0.5])
    assert torch.allclose(embedding_from_memory(states, weights), (states[:, 0] + states[:, 2]) / 2)
    assert torch.allclose(embedding_from_memory(states, mean_weights(3)), states.mean(1))


@pytest.mark.parametrize("memory", [False, True])
def test_what_learns(memory):
    compressor = make_compressor(stages=["pretext", "ucl"]).train()
    compressor.learn(memory=memory)
    assert compressor.input_table is None
    compressor(Tokens.pad(ids_of(compressor), "left")).square().sum().backward()
    learned = {
        name
        for name, parameter in compressor.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    assert learned == {
        name for name, parameter in compressor.named_parameters() if parameter.requires_grad
    }
    assert ("memory.vectors_KD" in learned) == memory
    assert any(".ucl." in name for name in learned)
    assert all(".ucl." in name for name in learned - {"memory.vectors_KD"})


def test_own_embeddings_rest_in_later_stages_but_are_still_used():
    compressor = make_compressor()
    tokens = Tokens.pad(ids_of(compressor), "left")
    compressor.learn(memory=True, embeddings=True)
    assert compressor.input_table.weight.dtype == torch.float32
    assert compressor.input_table.weight.requires_grad
    with torch.no_grad():
        plain = compressor(tokens)
        compressor.input_table.weight += 0.1
        moved = compressor(tokens)
    assert (plain - moved).abs().max() > 1e-2
    compressor.learn(memory=False)
    assert not compressor.input_table.weight.requires_grad
    with torch.no_grad():
        assert torch.equal(compressor(tokens), moved)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_saved_stage_gives_the_same_states(family, embeddings, tmp_path):
    compressor = make_compressor(family)
    compressor.learn(memory=True, embeddings=embeddings)
    with torch.no_grad():
        compressor.memory.vectors_KD += 0.2
        compressor.get_buffer("weights_K").copy_(torch.tensor([0.2, 0.3, 0.5]))
        if embeddings:
            compressor.input_table.weight += 0.05
    for name in ("pretext", "ucl"):
        compressor.save(tmp_path / name, name)
    other = Compressor.fresh(make_backbone(family), MEMORY, seed=99)
    for name in ("pretext", "ucl"):
        other.backbone.adapters.add(name, make_settings(), seed=50)
        other.load(tmp_path / name, name)
    tokens = Tokens.pad(ids_of(compressor), "left")
    with torch.no_grad():
        assert torch.equal(
            other.eval().memory_states(tokens), compressor.eval().memory_states(tokens)
        )
        assert torch.equal(other(tokens), compressor(tokens))
    assert (other.input_table is not None) == embeddings


def make_settings():
    from llm2comp.recipe import AdapterSettings

    return AdapterSettings(rank=4, alpha=8, dropout=0.0)


def test_length_limit_leaves_room_for_the_memory():
    compressor = make_compressor()
    assert compressor.backbone.max_positions == 160
    assert compressor.max_tokens(512) == 157
    assert compressor.max_tokens(100) == 100
    tokens = Tokens.pad([[2] * 157], "left")
    assert compressor(tokens).isfinite().all()
    # its learned positions end at 160: one more would be out of the table
    gpt2 = make_compressor("gpt2")
    assert gpt2(Tokens.pad([[2] * gpt2.max_tokens(512)], "left")).isfinite().all()


def test_fixed_seed_fixes_the_memory():
    backbone = make_backbone()
    first, same, other = (
        Compressor.fresh(backbone, 4, seed).memory.vectors_KD for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert relative_error(first, other) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_memory_has_the_scale_of_token_inputs(family):
    """Gemma's embedding module multiplies its rows by the root of their width."""
    backbone = make_backbone(family)
    vectors = Compressor.fresh(backbone, 512, seed=1).memory.vectors_KD
    rows = backbone.embed(torch.arange(len(backbone.input_table)))
    assert torch.allclose(vectors.std(0), rows.std(0), rtol=0.2)
    assert torch.allclose(vectors.mean(0), rows.mean(0), atol=0.2 * rows.std().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_that_begins_as_words_reads_like_the_prompt(family):
    """Untrained and causal, the last state is the LM's own after a text and these words."""
    words = " the dog sleeps"
    backbone = make_backbone(family, attention="causal")
    (ids,) = backbone.tokenise([words])
    ids = ids[int(backbone.bos_id is not None) :]
    settings = MemorySettings(tokens=len(ids), start_as=words)
    compressor = Compressor.fresh(backbone, settings, seed=3)
    rows = backbone.tokenise(TEXTS)
    states = compressor.memory_states(Tokens.pad(rows, "left"))[:, -1]
    lm = untouched(family).base_model
    for row, state in zip(rows, states, strict=True):
        expected = lm(torch.tensor([row + ids]), use_cache=False).last_hidden_state[0, -1]
        assert relative_error(state, expected) < 1e-4


def test_words_fewer_or_more_than_memory_tokens():
    backbone = make_backbone("gemma3")
    (ids,) = backbone.tokenise(["the dog sleeps"])
    rows = backbone.embed(torch.tensor(ids[1:]))
    assert len(rows) > 2

    def begun(count, words="the dog sleeps"):
        settings = MemorySettings(tokens=count, start_as=words)
        return Compressor.fresh(backbone, settings, seed=3).memory.vectors_KD

    more = len(rows) + 2
    random = Compressor.fresh(backbone, more, seed=3).memory.vectors_KD
    assert torch.equal(begun(2), rows[-2:])
    assert torch.equal(begun(more), torch.cat([random[:2], rows]))
    assert relative_error(random[2:], rows) > 0.1
    backbone.tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(RecipeError, match="no token to begin as"):
        begun(2, words=" ")


def test_bfloat16_base_with_float32_memory():
    compressor = make_compressor("llama", dtype=torch.bfloat16).train()
    reference = make_compressor("llama").train()
    tokens = Tokens.pad(ids_of(compressor), "left")
    compressor.learn(memory=True)
    states = compressor.memory_states(tokens)
    assert states.dtype == torch.bfloat16
    states.float().square().sum().backward()
    assert compressor.memory.vectors_KD.grad.dtype == torch.float32
    assert compressor.memory.vectors_KD.grad.norm() > 0
    with torch.no_grad():
        assert torch.cosine_similarity(compressor(tokens).float(), reference(tokens)).min() > 0.98
