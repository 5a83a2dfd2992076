"""Words and continuations of a readout against the plain LM: its own logits, and transformers' own
`generate`.
"""

import copy

import pytest
import torch

import families
from families import MEMORY, SENTENCES
from llm2comp.measures.readout import continue_greedily, read_out

TEXT = " ".join(SENTENCES)
FAMILIES = ["llama", "qwen2", "gemma2", "gemma3", "granite", "gpt2"]
POSITIONS = 160
# a random LM whose head is its table says one word over and over
OWN_HEAD = {"tie_word_embeddings": False}


def make_compressor(family):
    return families.make_compressor(family, **OWN_HEAD)


def untouched(family):
    return families.untouched(family, **OWN_HEAD)


def row_of(compressor, text=TEXT, limit=None):
    return compressor.backbone.tokenise([text], limit)[0]


def generate(family, tokens, eos, **context):
    """New tokens that transformers puts behind ids (or input embeddings) in an LM that never met an
    adapter; no EOS.
    """
    lm = untouched(family)
    inputs = next(iter(context.values()))
    ids = lm.generate(
        **context,
        attention_mask=torch.ones(inputs.shape[:2], dtype=torch.int64),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=eos,
        pad_token_id=0,
    )[0].tolist()
    new = ids[inputs.shape[1] :] if "input_ids" in context else ids
    return new[:-1] if new and new[-1] == eos else new


@torch.no_grad()
def memory_of(compressor, row):
    """Memory states of one text, the LM called by hand."""
    lm = compressor.backbone.lm
    x = torch.cat(
        [lm.get_input_embeddings()(torch.tensor([row])), compressor.memory.vectors_KD[None]], 1
    )
    return lm.base_model(inputs_embeds=x, use_cache=False, is_causal=False).last_hidden_state[
        :, -MEMORY:
    ]


def started(family, compressor, memory_BKD):
    """BOS, if any, and memory states, as input embeddings."""
    bos = compressor.backbone.bos_id
    ids = torch.tensor([[] if bos is None else [bos]], dtype=torch.int64)
    return torch.cat([untouched(family).get_input_embeddings()(ids), memory_BKD], 1)


def say_any(compressor, eos=None):
    """Make a token the EOS, or none: a random LM may say EOS at once."""
    compressor.backbone.tokenizer = copy.deepcopy(compressor.backbone.tokenizer)
    token = None if eos is None else compressor.backbone.tokenizer.convert_ids_to_tokens(eos)
    compressor.backbone.tokenizer.eos_token = token
    assert compressor.backbone.tokenizer.eos_token_id == eos
    return compressor


# ---- continuations


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuation_is_that_of_generate(family):
    compressor = say_any(make_compressor(family))
    backbone = compressor.backbone
    row = torch.tensor([row_of(compressor)])
    expected = generate(family, 20, None, input_ids=row)
    assert len(expected) == 20
    assert len(set(expected)) > 1, "vacuous: the LM says one thing only"
    assert continue_greedily(backbone, backbone.embed(row), 20) == expected
    assert continue_greedily(backbone, backbone.embed(row), 7) == expected[:7]
    assert continue_greedily(backbone, backbone.embed(row), 0) == []
    memory = memory_of(compressor, row[0].tolist())
    behind = generate(family, 20, None, inputs_embeds=started(family, compressor, memory))
    assert (
        continue_greedily(backbone, started(family, compressor, memory), 20) == behind != expected
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_stops_before_eos(family):
    compressor = say_any(make_compressor(family))
    row = torch.tensor([row_of(compressor)])
    whole = generate(family, 20, None, input_ids=row)
    last = next(token for token in whole[3:] if token < 300 and token not in whole[:3])
    end = whole.index(last)
    compressor = say_any(compressor, eos=last)
    assert generate(family, 20, last, input_ids=row) == whole[:end]
    assert continue_greedily(compressor.backbone, compressor.backbone.embed(row), 20) == whole[:end]
    at_once = torch.tensor([row[0].tolist() + whole[:end]])
    assert continue_greedily(compressor.backbone, compressor.backbone.embed(at_once), 20) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_stops_at_the_last_position(family):
    compressor = say_any(make_compressor(family))
    backbone = compressor.backbone
    assert backbone.max_positions == POSITIONS
    ids = torch.randint(2, 300, (1, POSITIONS + 1), generator=torch.Generator().manual_seed(2))
    for length, tokens in ((150, 8), (150, 10), (150, 30), (159, 30), (160, 30), (161, 30)):
        found = continue_greedily(backbone, backbone.embed(ids[:, :length]), tokens)
        room = max(0, min(tokens, POSITIONS - length))
        assert len(found) == room
        assert found == (generate(family, room, None, input_ids=ids[:, :length]) if room else [])


def test_without_a_limit_of_positions_it_goes_on(monkeypatch):
    compressor = say_any(make_compressor("llama"))
    monkeypatch.setattr(type(compressor.backbone), "max_positions", None)
    ids = torch.randint(2, 300, (1, POSITIONS - 2), generator=torch.Generator().manual_seed(2))
    assert len(continue_greedily(compressor.backbone, compressor.backbone.embed(ids), 6)) == 6


# ---- readouts


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_the_first_of_the_plain_head_and_texts_are_what_generate_says(family):
    compressor = say_any(make_compressor(family))
    tokenizer, row = compressor.backbone.tokenizer, row_of(compressor)
    memory = memory_of(compressor, row)
    lm = untouched(family)
    logits = lm.get_output_embeddings()(memory[0])  # what scale or softcap do to it keeps the order
    ranked = [sorted(range(logits.shape[1]), key=lambda i, of=of: -of[i]) for of in logits.tolist()]
    found = read_out(compressor, TEXT, 512, words=7, continuation_tokens=12)
    assert found.words == [[tokenizer.decode([i]) for i in best[:7]] for best in ranked]
    assert len(set(map(tuple, found.words))) > 1, "vacuous: all memory tokens read alike"
    assert found.text == TEXT

    def decoded(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    assert found.from_text == decoded(generate(family, 12, None, input_ids=torch.tensor([row])))
    start = started(family, compressor, memory)
    assert found.from_memory == decoded(generate(family, 12, None, inputs_embeds=start))
    bos = compressor.backbone.bos_id
    nothing = (
        "" if bos is None else decoded(generate(family, 12, None, input_ids=torch.tensor([[bos]])))
    )
    assert found.from_nothing == nothing
    assert len({found.from_text, found.from_memory, found.from_nothing}) == 3, (
        "vacuous: the context has no effect"
    )
    with compressor.backbone.base_only():
        assert read_out(compressor, TEXT, 512, words=7).words != found.words, (
            "vacuous: adapters do nothing"
        )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_long_text_is_cut(family):
    compressor = make_compressor(family)
    assert len(row_of(compressor)) > 20
    cut = compressor.backbone.tokenizer.decode(
        row_of(compressor, limit=20), skip_special_tokens=True
    )
    found = read_out(compressor, TEXT, 20)
    assert found.text == cut == TEXT[: len(cut)]
    assert row_of(compressor, cut) == row_of(compressor, limit=20), (
        "the cut is a text of the same tokens"
    )
    assert found == read_out(compressor, cut, 512)
    assert found.words != read_out(compressor, TEXT, 512).words
    longest = read_out(compressor, TEXT * 5, 10**6)
    assert len(row_of(compressor, longest.text)) == POSITIONS - MEMORY, "memory has room behind it"
    assert longest.from_memory == read_out(compressor, longest.text, 512).from_memory


@pytest.mark.parametrize("words", [1, 3, 320])
def test_so_many_words_per_memory_token(words):
    found = read_out(make_compressor("llama"), TEXT, 512, words=words)
    assert [len(of_token) for of_token in found.words] == [words] * MEMORY
    assert [of_token[0] for of_token in found.words] == [
        w[0] for w in read_out(make_compressor("llama"), TEXT, 512).words
    ]


def test_an_empty_text_is_bos_alone():
    found = read_out(make_compressor("llama"), "", 512)
    assert found.text == ""
    assert found.from_text == found.from_nothing
    assert found.from_memory != found.from_nothing


def test_an_empty_text_without_bos():
    """`embed` and `memory_states` take such a text; here the LM has nothing to start from, as in
    `from_nothing`.
    """
    found = read_out(make_compressor("qwen2"), "", 512)
    assert (found.text, found.from_text, found.from_nothing) == ("", "", "")
    assert found.from_memory
