"""Memory states in bulk equal each text read alone, in the order given, whatever the budget of
tokens.
"""

import pytest
import torch

from families import MEMORY, make_compressor
from llm2comp.model.tokens import Tokens
from llm2comp.model.vectors import memory_states

LENGTHS = (7, 31, 2, 7, 19, 1, 44, 12, 30)
BUDGETS = (1, 50, 10_000)


def rows_of(compressor, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(2, 300, (length,), generator=generator).tolist() for length in lengths]
    bos = compressor.backbone.bos_id
    return rows if bos is None else [[bos, *row[1:]] for row in rows]


@torch.no_grad()
def one_by_one(compressor, rows):
    ids = [torch.tensor([row]) for row in rows]
    return torch.cat([compressor.memory_states(Tokens(x, torch.ones_like(x))) for x in ids])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
def test_states_are_those_of_each_text_alone_in_order(family, budget):
    compressor = make_compressor(family)
    rows = rows_of(compressor)
    expected = one_by_one(compressor, rows)
    assert torch.cdist(expected.flatten(1), expected.flatten(1)).fill_diagonal_(9).min() > 0.5, (
        "vacuous: texts are alike"
    )
    found = memory_states(compressor, rows, budget)
    assert found.shape == (len(rows), MEMORY, 32)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert (found - expected).abs().max() < 1e-5
    backwards = memory_states(compressor, rows[::-1], budget)
    assert (backwards.flip(0) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_text_is_read_once_within_the_budget(budget, monkeypatch):
    compressor = make_compressor()
    rows, seen, batches = rows_of(compressor), [], []
    encode = compressor.memory_states

    def spy(tokens):
        size = len(tokens.ids_BT) * (tokens.ids_BT.shape[1] + MEMORY)
        assert size <= budget or len(tokens.ids_BT) == 1, "padding and memory count"
        batches.append(len(tokens.ids_BT))
        seen.extend(
            ids[mask.bool()].tolist()
            for ids, mask in zip(tokens.ids_BT, tokens.mask_BT, strict=True)
        )
        return encode(tokens)

    monkeypatch.setattr(compressor, "memory_states", spy)
    memory_states(compressor, rows, budget)
    assert sorted(seen) == sorted(rows)
    assert {1: max(batches) == 1, 50: 1 < max(batches) < len(rows), 10_000: batches == [len(rows)]}[
        budget
    ], batches


def test_no_texts_give_no_states():
    assert memory_states(make_compressor(), []).shape == (0, MEMORY, 32)


def test_half_precision_comes_as_float32():
    compressor = make_compressor(dtype=torch.bfloat16)
    rows = rows_of(compressor)
    found = memory_states(compressor, rows, 1)
    assert found.dtype == torch.float32
    assert torch.equal(found, one_by_one(compressor, rows).float())
