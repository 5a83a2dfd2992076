"""Batches by tokens: the same optimiser step, computed in parts; the same samples whoever prepares
them.
"""

from types import SimpleNamespace

import pytest
import torch

from families import make_compressor, relative_error
from llm2comp.data.pretext import PretextCollator
from llm2comp.errors import RunError
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.recipe import PretextStage, SclStage, UclStage, parse_recipe
from llm2comp.runs.keys import stage_keys
from llm2comp.training import trainers
from llm2comp.training.contrastive import contrastive_loss
from llm2comp.training.memory_limits import pieces_of
from llm2comp.training.plan import texts_at_once
from llm2comp.training.run import train
from small_stages import make_stage, run_stage
from test_contrastive import DATA, assert_same, columns_of, embeddings, features_of, naive
from test_nested import make_nested
from test_resume import StoppedError, make_recipe, stop, train_until
from tiny_run import make_tree

# texts, and where they are split
LENGTHS = [(5, 2), (31, 30), (12, 4), (12, 11), (6, 1), (20, 7), (19, 3)]


def samples():
    found = []
    for number, (length, site) in enumerate(LENGTHS):
        ids = list(range(number * 40 + 2, number * 40 + 2 + length))
        found.append(
            {
                "ids": ids,
                "site": site,
                "replaced": [-1, *ids[1:]],
                "teacher": torch.full((3,), float(number)).numpy(),
            }
        )
    return found


SIZES = {1: [1] * 7, 24: [1, 1, 1, 2, 2], 40: [1, 2, 3, 1], 62: [2, 3, 2], 10**6: [7]}


@pytest.mark.parametrize(("budget", "sizes"), SIZES.items())
def test_pieces_are_the_batch(budget, sizes):
    rows, collate = samples(), PretextCollator(0)
    pieces = pieces_of(collate(rows), budget)
    found = []
    for piece in pieces:
        places = [int(number) for number in piece["teacher"][:, 0]]
        found += places
        expected = collate([rows[place] for place in places])
        assert piece.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(piece[name], tensor), name
        assert len(places) == 1 or piece["text_ids"].numel() <= budget
    assert sorted(found) == list(range(len(rows)))
    longest = [piece["text_ids"].shape[1] for piece in pieces]
    assert longest == sorted(longest, reverse=True)
    assert [len(piece["text_ids"]) for piece in pieces] == sizes


def test_no_budget_leaves_a_batch_as_it_is():
    batch = PretextCollator(0)(samples())
    (piece,) = pieces_of(batch, None)
    assert piece is batch


OBJECTIVES = [{"ctkd": 1.0}, {"ctkd": 1.0, "reconstruction": 0.3, "mntp": 0.5, "ebae_ebar": 0.2}]


@pytest.mark.thorough
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["one", "four"])
def test_an_optimiser_step_is_the_same_under_any_budget(tmp_path, monkeypatch, objective):
    settings = {"objective": objective, "gradient_accumulation_steps": 2, "steps": 1}
    stage = make_stage(tmp_path / "data", "pretext", **settings)
    reference = run_stage("pretext", stage, tmp_path / "reference", monkeypatch)
    assert [len(mask) for mask in reference.encoded] == [4, 4]
    for budget in (1, 90, 10**6):
        limited = stage.model_copy(update={"max_tokens_per_batch": budget})
        seen = run_stage("pretext", limited, tmp_path / str(budget), monkeypatch)
        sizes = [len(mask) for mask in seen.encoded]
        assert sum(sizes) == 8
        assert {
            1: sizes == [1] * 8,
            90: 1 < max(sizes) < 8 and 2 < len(sizes) < 8,
            10**6: sizes == [8],
        }[budget], sizes
        (found,), (expected,) = seen.gradients, reference.gradients
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert relative_error(found[name], gradient) < 1e-4, name
        texts = [
            [row[row > 0].tolist() for (ids,) in s.batches for row in ids]
            for s in (seen, reference)
        ]
        assert texts[0] == texts[1]
        assert len(texts[0]) == 8


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings", [*({"mini_batch_tokens": n} for n in (1, 40, 999)), {"mini_batch_size": 2}], ids=str
)
@pytest.mark.parametrize(
    "stage", [UclStage(**DATA, denominator="both_views"), SclStage(**DATA)], ids=["ucl", "scl"]
)
def test_gradcache_by_tokens_equals_the_formula(stage, settings, monkeypatch):
    """Texts of several lengths, padded in front; the formula encodes each alone."""
    compressor = make_compressor("llama").train()
    model = as_sentence_transformer(compressor, 64).train()
    columns, seen, encode = (
        columns_of(0 if isinstance(stage, UclStage) else 2),
        [],
        compressor.memory_states,
    )
    features = features_of(model, columns)
    assert any((f["attention_mask"][:, 0] == 0).any() for f in features)
    monkeypatch.setattr(
        compressor, "memory_states", lambda tokens: seen.append(tokens.mask_BT) or encode(tokens)
    )
    loss = contrastive_loss(model, stage.model_copy(update=settings | {"temperature": 0.3}))(
        features, None
    )
    for mask_BT in seen:
        assert mask_BT[:, 0].any(), "a column of padding alone"
        assert len(mask_BT) == 1 or mask_BT.sum() <= settings.get("mini_batch_tokens", 10**6)
    assert sum(len(mask_BT) for mask_BT in seen) == 5 * len(columns)
    expected = {1: 5, 999: 1, None: 3}  # mini-batches per column
    if (tokens := settings.get("mini_batch_tokens")) in expected:
        assert len(seen) == expected[tokens] * len(columns)
    anchors, *candidates = embeddings(compressor, columns)
    others = anchors if isinstance(stage, UclStage) else None
    assert_same(loss, naive(anchors, torch.cat(candidates), 0.3, others), compressor)


@pytest.mark.parametrize("dims", [(), (8,)])
def test_gradcache_by_tokens_under_nested_memory(dims):
    compressor = make_nested().train()
    model = as_sentence_transformer(compressor, 64).train()
    stage = SclStage(**DATA, temperature=0.2, matryoshka_dims=dims)
    losses = []
    for tokens in (30, None):
        part = contrastive_loss(model, stage.model_copy(update={"mini_batch_tokens": tokens}))
        losses.append(part(features_of(model, columns_of(1)), None))
    assert_same(*losses, compressor)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["pretext", "ucl", "scl"])
def test_workers_change_nothing(tmp_path, monkeypatch, name):
    """Several epochs: 24 rows, 8 steps of 4."""
    runs = []
    for workers in (0, 2):
        stage = make_stage(tmp_path / "data", name, steps=8, workers=workers, attention_dropout=0.2)
        runs.append(run_stage(name, stage, tmp_path / str(workers), monkeypatch))
    one, other = runs
    assert len(one.batches) == len(other.batches) == 8
    for columns, same in zip(one.batches, other.batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(columns, same, strict=True))
    assert all(torch.equal(one.weights[key], other.weights[key]) for key in one.weights)


@pytest.mark.thorough
def test_a_stopped_run_goes_on_under_another_budget(tmp_path):
    """As one does whose memory ran out: the setting makes no other training of it."""
    recipe = make_recipe(
        tmp_path, steps=4, adapter_dropout=0.0, attention_dropout=0.0, ucl=None, scl=None
    )
    stage = recipe.pretext.model_copy(update={"max_tokens_per_batch": 60})
    smaller = recipe.model_copy(update={"pretext": stage})
    assert stage_keys(smaller) == stage_keys(recipe)
    assert stage_keys(
        recipe.model_copy(update={"pretext": stage.model_copy(update={"steps": 5})})
    ) != stage_keys(recipe)
    reference, seen = train(recipe, tmp_path / "reference"), tmp_path / "seen.jsonl"
    with pytest.raises(StoppedError):
        train_until(recipe, tmp_path / "run", ("pretext", 3), stop, seen)
    run = train_until(smaller, tmp_path / "run", ("never", 0), stop, seen)
    assert [line.split()[-1] for line in seen.read_text().splitlines()] == [
        "1]",
        "2]",
        "3]",
        "3]",
        "4]",
    ]
    from safetensors.torch import load_file

    found, expected = (
        load_file(path / "1-pretext" / "memory.safetensors")["memory"] for path in (run, reference)
    )
    assert relative_error(found, expected) < 1e-3
    assert not torch.equal(found, expected), "vacuous: the budget was not used"


def test_texts_that_stand_in_memory_together(tmp_path):
    tree = make_tree(tmp_path)

    def pretext(**settings):
        return texts_at_once(
            parse_recipe(tree | {"pretext": tree["pretext"] | settings}).pretext, 1, 30.0
        )

    def scl(**settings):
        return texts_at_once(parse_recipe(tree | {"scl": tree["scl"] | settings}).scl, 3, 30.0)

    assert pretext() == pretext(gradient_accumulation_steps=8) == 4
    assert pretext(max_tokens_per_batch=90) == 3
    assert pretext(max_tokens_per_batch=9) == 1
    assert pretext(max_tokens_per_batch=900, gradient_accumulation_steps=3) == 12
    assert scl() == 12
    assert scl(mini_batch_size=2) == 2
    assert scl(mini_batch_size=9) == scl(mini_batch_tokens=900) == 4
    assert scl(mini_batch_tokens=90, mini_batch_size=2) == 3


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="max_tokens_per_batch"):
        PretextStage(**DATA, max_tokens_per_batch=0)


def test_a_budget_over_sharded_weights_is_refused(tmp_path, monkeypatch):
    """Ranks with unequal numbers of parts would wait for each other for ever."""
    plain = trainers.DistributedType.NO
    monkeypatch.setattr(trainers, "DistributedType", SimpleNamespace(FSDP=plain, DEEPSPEED=plain))
    stage = make_stage(tmp_path / "data", "pretext", steps=1)
    run_stage("pretext", stage, tmp_path / "without", monkeypatch)
    with pytest.raises(RunError, match="do not go with sharded weights"):
        run_stage(
            "pretext",
            stage.model_copy(update={"max_tokens_per_batch": 90}),
            tmp_path / "with",
            monkeypatch,
        )
