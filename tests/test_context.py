"""Context recovered against full logits of an LM without adapters, text by text, unpadded, in
float64; and its known values.
"""

import copy

import pytest
import torch

from families import (
    FAMILIES,
    MEMORY,
    make_compressor,
    make_lm,
    make_tokenizer,
    push_adapter,
    untouched,
)
from llm2comp.errors import DataError
from llm2comp.measures.context import (
    BATCH,
    SAMPLE,
    SITE_MARGIN,
    context_kl,
    context_recovered,
    split_sample,
)
from llm2comp.model.backbone import Backbone
from llm2comp.model.compressor import Compressor
from llm2comp.model.tokens import SplitTexts, split_site

LENGTHS, SITES = (25, 41, 30, 22), (11, 28, 10, 12)


def compressor_of(family, bos=None):
    """With the family's tokenizer, or with one that has BOS or not, as asked."""
    if bos is None:
        return make_compressor(family)
    compressor = Compressor.fresh(Backbone(make_lm(family), make_tokenizer(bos)), MEMORY, seed=3)
    push_adapter(compressor.backbone, "pretext")
    return compressor.eval()


def rows_of(compressor, lengths=LENGTHS, seed=7):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, 300, (length,), generator=generator).tolist() for length in lengths]
    bos = compressor.backbone.bos_id
    return rows if bos is None else [[bos, *row[1:]] for row in rows]


def batch_of(compressor, rows, sites=SITES):
    return SplitTexts.from_rows(rows, sites, pad_id=5)


@torch.no_grad()
def naive(family, compressor, rows, sites=SITES):
    """Per text: KL to the LM with memory, KL to the LM without context, positions."""
    encoder, frozen = copy.deepcopy(compressor.backbone.lm).double(), untouched(family).double()
    table, bos = frozen.get_input_embeddings(), compressor.backbone.bos_id
    found = []
    for row, site in zip(rows, sites, strict=True):
        context, text = torch.tensor([row[:site]]), torch.tensor([row[site:]])
        read = torch.cat(
            [encoder.get_input_embeddings()(context), compressor.memory.vectors_KD[None].double()],
            1,
        )
        memory = encoder.base_model(
            inputs_embeds=read, use_cache=False, is_causal=False
        ).last_hidden_state[:, site:]
        start = table(torch.tensor([[] if bos is None else [bos]], dtype=torch.int64))
        teacher = frozen(torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
        places = teacher[site - 1 :] if bos is not None else teacher[site:]
        sums = []
        for between in (memory, memory[:, :0]):
            x = torch.cat([start, between, table(text)], 1)
            student = (
                frozen(inputs_embeds=x, use_cache=False).logits[0].log_softmax(-1)[-len(places) :]
            )
            sums.append((places.exp() * (places - student)).sum().item())
        assert len(places) == len(row) - site + (bos is not None)
        found.append((*sums, len(places)))
    return found


CASES = [(family, None) for family in FAMILIES] + [
    ("llama", False),
    ("gpt2", False),
    ("qwen2", True),
    ("gemma2", False),
]


@pytest.mark.parametrize(("family", "bos"), CASES)
def test_kl_equals_full_logits_text_by_text(family, bos):
    compressor = compressor_of(family, bos)
    rows = rows_of(compressor)
    texts = naive(family, compressor, rows)
    with_memory, without, count = (sum(column) for column in zip(*texts, strict=True))
    assert min(with_memory, without) > 0.5, "vacuous: no difference to the teacher"
    assert abs(with_memory - without) > 1e-2, "vacuous: the memory has no effect"
    found = context_kl(compressor, batch_of(compressor, rows))
    assert found[:2] == (pytest.approx(with_memory, rel=2e-4), pytest.approx(without, rel=2e-4))
    assert found[2] == count
    for row, site, expected in zip(rows, SITES, texts, strict=True):
        alone = context_kl(compressor, batch_of(compressor, [row], [site]))
        assert alone == (
            pytest.approx(expected[0], rel=2e-4),
            pytest.approx(expected[1], rel=2e-4),
            expected[2],
        )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_recovered_is_over_the_sums_of_all_batches(family):
    compressor = compressor_of(family)
    rows = rows_of(compressor)
    texts = naive(family, compressor, rows)
    expected = 1 - sum(text[0] for text in texts) / sum(text[1] for text in texts)
    parts = [batch_of(compressor, rows[:1], SITES[:1]), batch_of(compressor, rows[1:], SITES[1:])]
    assert context_recovered(compressor, parts) == pytest.approx(expected, abs=1e-3)
    assert context_recovered(compressor, [batch_of(compressor, rows)]) == pytest.approx(
        expected, abs=1e-3
    )
    means = [1 - text[0] / text[1] for text in texts]
    assert abs(sum(means) / len(means) - expected) > 3e-3, (
        "vacuous: the mean of the texts' shares is the same here"
    )


def test_the_encoder_is_left_as_it_was():
    compressor = compressor_of("llama")
    batch = batch_of(compressor, rows_of(compressor))
    before = compressor.memory_states(batch.context)
    context_kl(compressor, batch)
    assert torch.equal(compressor.memory_states(batch.context), before), "adapters are on again"
    with compressor.backbone.base_only():
        assert (compressor.memory_states(batch.context) - before).abs().max() > 0.1, (
            "vacuous: adapters do nothing"
        )
    assert not any(p.grad is not None for p in compressor.parameters())


# ---- known values


def equal_contexts(compressor, site=13):
    """Texts whose contexts are of one length, as one memory for all needs."""
    rows = rows_of(compressor)
    return batch_of(compressor, rows, [min(site, len(row) - 1) for row in rows])


def memory_is_the_context(compressor, monkeypatch):
    """k = tokens of the context: what the decoder reads is the teacher's text itself."""
    skip = int(compressor.backbone.bos_id is not None)
    monkeypatch.setattr(
        compressor,
        "memory_states",
        lambda tokens: compressor.backbone.embed(tokens.ids_BT[:, skip:]),
    )


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gemma2", "gemma3", "granite", "gpt2", "gpt_neox"]
)
def test_memory_that_is_the_context_recovers_all(family, monkeypatch):
    compressor = compressor_of(family)
    batch = equal_contexts(compressor)
    assert context_recovered(compressor, [batch]) < 0.9
    memory_is_the_context(compressor, monkeypatch)
    with_memory, without, _ = context_kl(compressor, batch)
    assert abs(with_memory) < 1e-4
    assert without > 0.5
    assert context_recovered(compressor, [batch]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_memory_without_states_recovers_nothing(family, monkeypatch):
    compressor = compressor_of(family)
    batch = equal_contexts(compressor)
    monkeypatch.setattr(
        compressor, "memory_states", lambda tokens: compressor.backbone.embed(tokens.ids_BT[:, :0])
    )
    assert context_recovered(compressor, [batch]) == 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_memory_that_says_the_wrong_thing_misleads(family, monkeypatch):
    """A context of one token said over and over, loud: below 0, not cut off there."""
    compressor = compressor_of(family)
    batch = equal_contexts(compressor)

    def shout(tokens):
        return 50 * compressor.backbone.embed(torch.full_like(tokens.ids_BT, 9))

    monkeypatch.setattr(compressor, "memory_states", shout)
    with_memory, without, _ = context_kl(compressor, batch)
    assert with_memory > 1.01 * without
    assert context_recovered(compressor, [batch]) == pytest.approx(1 - with_memory / without)
    assert context_recovered(compressor, [batch]) < 0


def test_no_batch_no_figure():
    assert context_recovered(compressor_of("llama"), []) is None


def test_an_lm_that_heeds_no_context_is_refused():
    compressor = compressor_of("qwen2")
    batch = equal_contexts(compressor)
    assert context_recovered(compressor, [batch]) is not None
    for name, parameter in compressor.backbone.lm.named_parameters():
        if "o_proj" in name:
            parameter.data.zero_()
    with pytest.raises(DataError, match="no effect on the LM"):
        context_recovered(compressor, [batch])


# ---- sample


def texts_in(batches):
    """Rows and sites that a list of batches holds, in its order."""
    found = []
    for batch in batches:
        for i in range(len(batch.text.ids_BT)):
            text, context, rest = (
                part.ids_BT[i][part.mask_BT[i].bool()].tolist()
                for part in (batch.text, batch.context, batch.continuation)
            )
            assert context + rest == text
            found.append((text, len(context)))
    return found


def many_rows(count, seed=1):
    """Rows of 1 to 60 tokens; the first token is the row's number."""
    lengths = torch.randint(1, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[number] * length for number, length in enumerate(lengths)]


def test_sample_is_the_first_long_rows_split_where_the_seed_says():
    rows = many_rows(150)
    long = [i for i, row in enumerate(rows) if len(row) >= 2 * SITE_MARGIN]
    assert len(rows) - len(long) > 20
    assert len(long) > SAMPLE, "both limits are met"
    batches = split_sample(rows, pad_id=0)
    found = texts_in(batches)
    assert sorted(text[0] for text, _ in found) == long[:SAMPLE]
    assert [len(batch.text.ids_BT) for batch in batches] == [BATCH] * (SAMPLE // BATCH)
    for text, site in found:
        assert text == rows[text[0]]
        assert SITE_MARGIN <= site <= len(text) - SITE_MARGIN
        assert site == split_site(len(text), SITE_MARGIN, 0, text[0])
    assert len({site for _, site in found}) > 10
    assert [len(text) for text, _ in found] == sorted(len(text) for text, _ in found), (
        "texts of like length together"
    )


def test_sample_is_the_same_each_time_and_another_for_another_seed():
    rows = many_rows(100)
    assert (
        texts_in(split_sample(rows, 0))
        == texts_in(split_sample(rows, 9))
        == texts_in(split_sample(rows, 0, seed=0))
    )
    first, second = texts_in(split_sample(rows, 0)), texts_in(split_sample(rows, 0, seed=1))
    assert [text for text, _ in first] == [text for text, _ in second]
    assert [site for _, site in first] != [site for _, site in second]


def test_short_rows_are_left_out_and_the_shortest_long_one_has_one_site():
    short, just = [3] * (2 * SITE_MARGIN - 1), [4] * (2 * SITE_MARGIN)
    assert split_sample([], 0) == split_sample([short, [], [1]], 0) == []
    assert texts_in(split_sample([short, just, short], 0)) == [(just, SITE_MARGIN)]
