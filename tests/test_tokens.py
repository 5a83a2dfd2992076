"""Batches, split sites, and the rows of stage 1: fixed by (seed, row), whatever is asked for
first.
"""

from collections import Counter

import numpy as np
import pytest
import torch

from families import SENTENCES, TEXTS, make_backbone
from llm2comp.data.pretext import PretextCollator, PretextRows, token_rows
from llm2comp.errors import DataError
from llm2comp.model.tokens import SplitTexts, Tokens, position_ids, split_site
from llm2comp.recipe import PretextStage

ROWS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [15, 16]]
SITES = [1, 4, 1]


def test_pad():
    left, right = Tokens.pad(ROWS, "left", pad_id=3), Tokens.pad(ROWS, "right", pad_id=3)
    assert left.ids_BT.tolist() == [
        [3, 3, 5, 6, 7, 8],
        [9, 10, 11, 12, 13, 14],
        [3, 3, 3, 3, 15, 16],
    ]
    assert left.mask_BT.tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 1, 1]]
    assert right.ids_BT.tolist() == [
        [5, 6, 7, 8, 3, 3],
        [9, 10, 11, 12, 13, 14],
        [15, 16, 3, 3, 3, 3],
    ]
    assert left.lengths_B.tolist() == right.lengths_B.tolist() == [4, 6, 2]
    assert position_ids(left.mask_BT).tolist() == [
        [0, 0, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5],
        [0, 0, 0, 0, 0, 1],
    ]
    assert position_ids(right.mask_BT)[:, :2].tolist() == [[0, 1]] * 3
    for i, row in enumerate(ROWS):
        assert (
            left.ids_BT[i][left.mask_BT[i].bool()].tolist()
            == right.ids_BT[i][right.mask_BT[i].bool()].tolist()
            == row
        )


def test_a_text_may_be_empty():
    tokens = Tokens.pad([[], [4]], "left")
    assert tokens.lengths_B.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("ids", "mask"),
    [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((6,), (6,)), ((2, 3, 1), (2, 3, 1)), ((2, 3), (2,))],
)
def test_tokens_refuse_other_shapes(ids, mask):
    with pytest.raises(ValueError, match="expected ids and mask of one shape"):
        Tokens(torch.zeros(ids, dtype=torch.int64), torch.zeros(mask, dtype=torch.int64))


def test_split_texts():
    split = SplitTexts.from_rows(ROWS, SITES, pad_id=3)
    assert split.context.ids_BT.tolist() == [[3, 3, 3, 5], [9, 10, 11, 12], [3, 3, 3, 15]]
    assert split.continuation.ids_BT.tolist() == [[6, 7, 8], [13, 14, 3], [16, 3, 3]]
    assert split.text.ids_BT.tolist() == Tokens.pad(ROWS, "right", 3).ids_BT.tolist()
    assert (
        split.context.lengths_B + split.continuation.lengths_B
    ).tolist() == split.text.lengths_B.tolist()


def test_split_texts_round_trip():
    split = SplitTexts.from_rows(ROWS, SITES, pad_id=3)
    tensors = split.to_tensors()
    assert set(tensors) == {
        f"{part}_{kind}" for part in ("text", "context", "continuation") for kind in ("ids", "mask")
    }
    again = SplitTexts.from_tensors(tensors)
    for part in ("text", "context", "continuation"):
        assert torch.equal(getattr(again, part).ids_BT, getattr(split, part).ids_BT)
        assert torch.equal(getattr(again, part).mask_BT, getattr(split, part).mask_BT)
    with pytest.raises(KeyError):
        SplitTexts.from_tensors(
            {name: tensor for name, tensor in tensors.items() if name != "context_mask"}
        )


@pytest.mark.parametrize("site", [0, 4, 5, -1])
def test_a_site_must_leave_both_parts(site):
    with pytest.raises(ValueError, match="expected a site within 1 and 3"):
        SplitTexts.from_rows(ROWS[:1], [site])


@pytest.mark.parametrize(("length", "margin"), [(20, 10), (29, 10), (12, 1), (7, 3)])
def test_split_sites_are_uniform_with_both_ends(length, margin):
    sites = range(margin, length - margin + 1)
    draws = 400 * len(sites)
    counts = Counter(split_site(length, margin, seed=3, row=row) for row in range(draws))
    assert set(counts) == set(sites)
    chi_square = sum((counts[site] - 400) ** 2 / 400 for site in sites)
    assert chi_square < len(sites) - 1 + 4 * (2 * max(1, len(sites) - 1)) ** 0.5


def test_split_sites_are_fixed_by_seed_and_row():
    def sites(seed):
        return [split_site(100, 10, seed, row) for row in range(50)]

    torch.manual_seed(0)
    first = sites(1)
    torch.manual_seed(99)
    assert sites(1) == first
    assert sites(2) != first
    assert len(set(first)) > 20


def test_too_short_to_split():
    assert split_site(19, 10, 0, 0) is None
    assert split_site(20, 10, 0, 0) == 10


def rows_of(count, length=lambda i: 8 + i % 5):
    return [np.arange(100 * i, 100 * i + length(i), dtype=np.int32) for i in range(count)]


def test_pretext_rows_do_not_depend_on_the_order_of_access():
    def rows():
        return PretextRows(rows_of(7), samples=30, margin=2, seed=4)

    forward = [rows()[i] for i in range(30)]
    one = rows()
    assert [one[i] for i in reversed(range(30))] == forward[::-1]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    assert [one[i] for i in order] == [forward[i] for i in order]
    workers = torch.utils.data.DataLoader(rows(), batch_size=4, num_workers=2, collate_fn=list)
    assert [sample for batch in workers for sample in batch] == forward


def test_pretext_rows_see_each_text_once_per_epoch_in_another_order_and_site():
    rows = PretextRows(rows_of(40), samples=95, margin=2, seed=4)
    assert len(rows) == 95
    firsts = [rows[i]["ids"][0] for i in range(95)]
    assert sorted(firsts[:40]) == sorted(firsts[40:80]) == [100 * i for i in range(40)]
    assert len(set(firsts[80:])) == 15
    assert firsts[:40] != firsts[40:80]
    assert firsts[:40] != sorted(firsts[:40])
    sites = [
        {rows[i]["ids"][0]: rows[i]["site"] for i in range(start, start + 40)} for start in (0, 40)
    ]
    assert sites[0] != sites[1]
    other = PretextRows(rows_of(40), samples=95, margin=2, seed=5)
    assert [other[i]["ids"][0] for i in range(40)] != firsts[:40]
    for i in range(95):
        assert 2 <= rows[i]["site"] <= len(rows[i]["ids"]) - 2


def test_collator_pads_and_splits():
    samples = [{"ids": row, "site": site} for row, site in zip(ROWS, SITES, strict=True)]
    found, expected = PretextCollator(3)(samples), SplitTexts.from_rows(ROWS, SITES, 3).to_tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


LONG = " ".join(SENTENCES * 4)


def stage(**settings):
    return PretextStage(
        **{"data": [{"source": "unused"}], "min_characters": 15, "site_margin_tokens": 4} | settings
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("policy", ["skip", "truncate", "chunk"])
def test_long_texts(family, policy):
    backbone = make_backbone(family)
    bos = [] if backbone.bos_id is None else [backbone.bos_id]
    short, whole = backbone.tokenise([TEXTS[1], LONG])
    assert len(whole) > 3 * 48
    texts = [TEXTS[1], LONG, "brief", "x y z x y z x y"]
    rows, left_out = token_rows(
        texts, stage(long_texts=policy), backbone.tokenise, 48, backbone.bos_id
    )
    rows = [row.tolist() for row in rows]
    assert all(len(row) <= 48 and row[: len(bos)] == bos for row in rows)
    assert rows[0] == short
    assert left_out["under 15 characters"] == 1
    if policy == "skip":
        assert left_out["over 48 tokens"] == 1
        pieces = []
    elif policy == "truncate":
        pieces = [whole[:48]]
    else:
        text, room = whole[len(bos) :], 48 - len(bos)
        pieces = [bos + text[i : i + room] for i in range(0, len(text), room)]
        assert sum((piece[len(bos) :] for piece in pieces), []) == text
        pieces = [piece for piece in pieces if len(piece) >= 8]
    assert rows[1 : 1 + len(pieces)] == pieces
    assert len(rows) == len(pieces) + 2


def test_pieces_too_short_to_split_are_counted():
    backbone = make_backbone("llama")
    (whole,) = backbone.tokenise([LONG])
    room = len(whole) - 3  # leaves a rest of three tokens behind a BOS
    rows, left_out = token_rows(
        [LONG], stage(long_texts="chunk"), backbone.tokenise, room, backbone.bos_id
    )
    assert [len(row) for row in rows] == [room]
    assert left_out == {"under 8 tokens": 1}


def test_no_fit_text_is_an_error_that_counts():
    backbone = make_backbone("llama")
    with pytest.raises(DataError, match="no text is fit") as error:
        token_rows(["brief", LONG, LONG], stage(), backbone.tokenise, 48, backbone.bos_id)
    assert "1 under 15 characters, 2 over 48 tokens" in str(error.value)


def test_batches_of_like_length_cover_each_epoch_once():
    rows = [
        np.full(length, index)
        for index, length in enumerate(np.random.default_rng(3).integers(8, 200, size=70))
    ]
    grouped, plain = (
        PretextRows(rows, samples=192, margin=2, seed=4, batch_size=size) for size in (8, 1)
    )
    samples = [grouped[i] for i in range(192)]
    drawn = [sample["ids"][0] for sample in samples]
    for epoch in (drawn[:64], drawn[64:128], drawn[128:]):  # 70 texts fill 8 batches of 8
        assert len(set(epoch)) == 64
    assert set(drawn[:64]) != set(drawn[64:128]), "the texts that wait are not always the same"
    assert drawn[:64] != drawn[64:128]
    again = PretextRows(rows, samples=192, margin=2, seed=4, batch_size=8)
    assert [again[i] for i in reversed(range(192))] == samples[::-1]

    def padding(lengths):
        batches = np.array(lengths).reshape(-1, 8)
        return 1 - batches.sum() / (8 * batches.max(1).sum())

    assert padding([len(s["ids"]) for s in samples]) < 0.5 * padding(
        [len(plain[i]["ids"]) for i in range(192)]
    )
