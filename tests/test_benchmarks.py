"""The benchmark compares like with like: equal loss and gradients, FLOPs as counted, verdicts and
peaks that can fail.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from families import relative_error
from measuring import counted

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import release_shaped, training
from benchmarks.contrastive import scl, ucl
from benchmarks.encoding import lengths_of
from benchmarks.inputs import (
    adapter_parameters,
    draw_lengths,
    fill_adapters,
    make_compressor,
    make_lm,
    make_texts,
    token_rows,
)
from benchmarks.parts import data_side, kl_side, naive_kl, store_side
from benchmarks.release_shaped import ReleaseShaped
from benchmarks.rows import ROWS
from benchmarks.settings import CPU, QUICK, SETTINGS, Shape
from benchmarks.sides import Row, Side, Target, cosine_gap
from benchmarks.sides import relative_error as side_error
from benchmarks.table import COLUMNS, cells, figures, markdown, verdict
from benchmarks.training import BATCHES, pretext_units
from benchmarks.work import Gemm, contrastive_flops, encode_flops, pretext_flops
from benchmarks.worker import differences, measure_times

from llm2comp.data.pretext import PretextCollator
from llm2comp.data.store import TokenStore
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.tokens import Tokens
from llm2comp.recipe import PretextStage
from llm2comp.training.contrastive import contrastive_loss
from llm2comp.training.pretext_model import PretextModel

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "llama": Shape("llama", 2, 32, 48, 4, 4, 8, 120),
    # grouped keys, heads wider than the hidden states
    "qwen3": Shape("qwen3", 2, 32, 48, 4, 2, 16, 120, tied=True),
}
BARE = QUICK.__class__(
    "bare",
    SHAPES["llama"],
    pairs=2,
    memory_tokens=3,
    pretext_texts=3,
    pretext_lengths=(22, 30),
    ucl_texts=5,
    ucl_lengths=(4, 9),
    scl_triples=5,
    scl_query=(4, 6),
    scl_passage=(5, 12),
    kl_positions=40,
    data_rows=30,
    data_batches=4,
    encode_texts=(4, 3, 1),
)


def bare(family):
    return replace(BARE, shape=SHAPES[family])


def gradients(model):
    found = {"adapters": [p.grad for p in adapter_parameters(model)]}
    found["memory"] = [
        p.grad
        for name, p in model.named_parameters()
        if name.endswith("vectors_KD") and p.grad is not None
    ]
    return {name: torch.cat([g.flatten() for g in group]) for name, group in found.items() if group}


def assert_equal_learning(ours, our_loss, theirs, their_loss):
    """Value and all gradients, adapters' B matrices not zero."""
    for model, loss in ((ours, our_loss), (theirs, their_loss)):
        fill_adapters(model)
        model.eval()
        loss().backward()
    assert our_loss().item() == pytest.approx(their_loss().item(), rel=1e-5)
    found, expected = gradients(ours), gradients(theirs)
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-4, name
    return found


@pytest.mark.parametrize("family", SHAPES)
def test_release_shaped_pretext_is_ours_in_loss_and_gradients(family):
    setting = bare(family)
    samples = next(pretext_units(setting, grouped=False))[0]
    assert len({len(s["ids"]) for s in samples}) > 1, "vacuous: no padding"
    compressor = make_compressor(setting)
    compressor.learn(memory=True)
    stage = PretextStage.model_validate(
        {"data": training.UNUSED, "schedule": {"learning_rate": 1e-4}}
    )
    ours, batch = PretextModel(compressor, stage), PretextCollator(0)(samples)
    theirs = ReleaseShaped(setting, decoder=True)
    found = assert_equal_learning(
        ours,
        lambda: ours(items=ours.items(batch), **batch),
        theirs,
        lambda: theirs.pretext_loss([s["ids"] for s in samples], [s["site"] for s in samples]),
    )
    assert found.keys() == {"adapters", "memory"}


@pytest.mark.parametrize("mini_batch", [None, 2])
@pytest.mark.parametrize("stage_of", [ucl, scl])
def test_release_shaped_contrastive_is_ours_in_loss_and_gradients(stage_of, mini_batch):
    setting = bare("llama")
    stage, columns = (
        ucl(setting) if stage_of is ucl else scl(setting, setting.scl_triples, mini_batch)
    )
    if stage_of is ucl:
        # without dropout two views of one text would be the same
        columns = [columns[0], columns[0][1:] + columns[0][:1]]
        stage = stage.model_copy(update={"mini_batch_size": mini_batch})
    compressor = make_compressor(setting)
    compressor.learn(memory=False)
    ours = as_sentence_transformer(compressor, 512)
    objective = contrastive_loss(ours, stage)
    theirs = ReleaseShaped(setting, decoder=False)
    found = assert_equal_learning(
        ours,
        lambda: objective([ours.preprocess(column) for column in columns], None),
        theirs,
        lambda: theirs.contrastive_loss(columns),
    )
    assert found.keys() == {"adapters"}


def test_release_shaped_has_the_cost_structure_that_it_claims(monkeypatch):
    setting = bare("llama")
    theirs = ReleaseShaped(setting, decoder=True, attention_dropout=0.2).train()
    copies = [theirs.encoder.get_base_model(), theirs.frozen]
    pointers = [
        {p.data_ptr() for name, p in lm.named_parameters() if "lora_" not in name} for lm in copies
    ]
    assert not pointers[0] & pointers[1]
    assert all(lm.config._attn_implementation == "eager" for lm in copies)
    logits = []
    for lm in copies:
        lm.get_output_embeddings().register_forward_hook(
            lambda _, args, out: logits.append(tuple(out.shape[:2]))
        )
    unit = next(pretext_units(setting, grouped=False))[0]
    theirs.pretext_loss([s["ids"] for s in unit], [s["site"] for s in unit])
    longest = max(len(s["ids"]) for s in unit)
    assert len(logits) == 3, "logits in all three passes"
    assert logits[1] == (setting.pretext_texts, longest)
    sizes, reentrant = [], []
    body = copies[0].model
    body.register_forward_hook(
        lambda _, args, kwargs, out: sizes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    plain = release_shaped.checkpoint
    monkeypatch.setattr(
        release_shaped,
        "checkpoint",
        lambda *args, use_reentrant: (
            reentrant.append(use_reentrant) or plain(*args, use_reentrant=use_reentrant)
        ),
    )
    theirs.contrastive_loss(ucl(setting)[1]).backward()
    assert sizes[:6] == [2, 2, 1] * 2  # two views
    assert sorted(sizes[6:]) == sorted(sizes[:6]), "each again in the backward pass"
    assert set(reentrant) == {True}
    views = theirs.embed_in_twos(ucl(setting)[1][0]), theirs.embed_in_twos(ucl(setting)[1][0])
    assert (views[0] - views[1]).abs().max() > 1e-3, "dropout is on"


def test_both_sides_of_a_unit_read_the_same_texts():
    setting = replace(BARE, pretext_steps=4, pretext_lengths=(22, 60))
    ours, theirs = (pretext_units(setting, grouped) for grouped in (True, False))
    padding = {True: 0, False: 0}
    for _ in range(BATCHES // 4):
        units = {True: next(ours), False: next(theirs)}
        flat = [
            sorted((s["ids"], s["site"]) for batch in unit for s in batch)
            for unit in units.values()
        ]
        assert flat[0] == flat[1]
        assert all(len(batch) == setting.pretext_texts for unit in units.values() for batch in unit)
        for grouped, unit in units.items():
            padding[grouped] += sum(
                max(len(s["ids"]) for s in batch) - len(s["ids"]) for batch in unit for s in batch
            )
    assert padding[True] < 0.5 * padding[False]


def eager_compressor(setting, monkeypatch):
    """The flop counter does not see inside sdpa on a CPU."""
    monkeypatch.setattr(
        "benchmarks.inputs.make_lm",
        lambda setting, attention, dtype=None: make_lm(setting, "eager", dtype),
    )
    return make_compressor(setting)


@pytest.mark.parametrize("family", SHAPES)
def test_pretext_flops_are_those_that_torch_counts(family, monkeypatch):
    """Without padding; rotary angles, which the formula leaves out, are the rest."""
    setting = replace(bare(family), pretext_lengths=(40, 40))
    compressor = eager_compressor(setting, monkeypatch)
    compressor.backbone.savings = frozenset()  # what they save counts as done in a model's FLOPs
    compressor.learn(memory=True)
    stage = PretextStage.model_validate(
        {"data": training.UNUSED, "schedule": {"learning_rate": 1e-4}}
    )
    model = PretextModel(compressor, stage).train()
    ids = [s["ids"] for s in next(pretext_units(setting, grouped=True))[0]]
    batch = PretextCollator(0)([{"ids": row, "site": 25} for row in ids])
    found = counted(lambda: model(items=model.items(batch), **batch).backward())
    assert found == pytest.approx(
        pretext_flops(setting.shape, [40] * 3, [25] * 3, setting.memory_tokens), rel=3e-3
    )


@pytest.mark.parametrize("family", SHAPES)
def test_encoder_flops_are_those_that_torch_counts(family, monkeypatch):
    setting = bare(family)
    compressor = eager_compressor(setting, monkeypatch)
    compressor.backbone.savings = frozenset()  # what they save counts as done in a model's FLOPs
    compressor.learn(memory=True)
    tokens = Tokens.pad(
        compressor.backbone.tokenise(make_texts([12] * 4, setting.shape, 5)), "left"
    )
    step = counted(lambda: compressor.train()(tokens).sum().backward())
    assert step == pytest.approx(
        contrastive_flops(setting.shape, [12] * 4, setting.memory_tokens), rel=5e-3
    )
    with torch.no_grad(), compressor.backbone.adapters.switched(off=True):
        alone = counted(lambda: compressor.eval()(tokens))
    assert alone == pytest.approx(
        encode_flops(setting.shape, [12] * 4, setting.memory_tokens), rel=5e-3
    )


def test_gemm_rate_counts_the_products_that_it_runs(monkeypatch):
    shape = SHAPES["qwen3"]
    gemm = Gemm(shape, 16, torch.float32, "cpu")
    clock = iter(range(100))
    monkeypatch.setattr("benchmarks.work.time.perf_counter", lambda: float(next(clock)))
    found = counted(lambda: setattr(gemm, "found", gemm.rate()))
    head = 2 * 16 * shape.hidden * shape.vocabulary
    layer = found - head
    assert layer > 0
    # each product takes one tick: seven of a layer, L times, and the head's
    assert gemm.found == pytest.approx((shape.layers * layer + head) / (7 * shape.layers + 1))


def test_kl_sides_compute_the_same():
    sides = [kl_side(BARE, kl) for kl in (training_kl(), naive_kl)]
    assert side_error(*(side.check() for side in sides)) < 1e-5
    assert sides[0].run() == (BARE.kl_positions, 0.0)


def training_kl():
    from llm2comp.objectives.kl import chunked_kl

    return lambda *args: chunked_kl(*args, chunk=7)


def test_data_counts_tokens_without_padding(tmp_path):
    tokens, flops = data_side(replace(BARE, pretext_lengths=(24, 24)), 2, tmp_path).run()
    assert (tokens, flops) == (BARE.data_batches * BARE.pretext_texts * 24, 0.0)


def test_store_makes_every_text_anew_in_each_unit(tmp_path):
    side, lengths = (
        store_side(BARE, 2, tmp_path),
        draw_lengths(2 * BARE.data_rows, BARE.pretext_lengths, 20),
    )
    times = set()
    for _ in range(2):
        assert side.run() == (sum(lengths), 0.0)
        (folder,) = [path for path in (tmp_path / "made-2").iterdir() if path.is_dir()]
        assert [row.tolist() for row in TokenStore(folder)] == [
            row.tolist() for row in token_rows(lengths, BARE.shape, 20)
        ]
        times.add((folder / "stored.json").stat().st_mtime_ns)
    assert len(times) == 2


def test_lengths_of_encode_texts():
    assert set(lengths_of(CPU, "short")) == {20}
    assert set(lengths_of(CPU, "long")) == {512}
    mixed = lengths_of(replace(CPU, encode_texts=(0, 2000, 0)), "mixed")
    assert (min(mixed), max(mixed)) == (20, 512)
    assert sorted(mixed)[1000] == pytest.approx(110, rel=0.1)
    tokens = make_compressor(BARE).backbone.tokenise(make_texts([5, 12], BARE.shape, 1))
    assert [len(row) for row in tokens] == [5, 12]


def row_of(rates, differ=None, **settings):
    """A row whose sides' clocks are under control: (tokens, flops) by side."""
    sides = {
        name: (
            lambda *_, name=name: Side(
                lambda: rates[name], lambda: [torch.tensor([rates[name][0] * 1.0])]
            )
        )
        for name in rates
    }
    return Row("a row", sides, "base", differ=differ, **settings)


def test_sides_that_differ_are_not_compared():
    row = row_of({"ours": (3, 0.0), "base": (3, 0.0)}, side_error, limits=(1e-3, 0.1))
    sides = {name: build(BARE, Path()) for name, build in row.sides.items()}
    assert differences(row, sides) == {"ours": 0.0}
    sides["ours"] = Side(sides["ours"].run, lambda: [torch.tensor([3.1])])
    with pytest.raises(SystemExit, match="ours does not compute what base does"):
        differences(row, sides)
    sides["ours"] = replace(sides["ours"], dtype=torch.bfloat16)
    assert differences(row, sides)["ours"] == pytest.approx(0.1 / 3, rel=1e-3)
    sides["ours"] = Side(sides["ours"].run, lambda: [torch.tensor([float("nan")])], torch.bfloat16)
    with pytest.raises(SystemExit):
        differences(row, sides)


def test_errors_of_checks():
    assert side_error([torch.ones(3)], [torch.zeros(3)]) == float("inf")
    assert side_error([torch.ones(3)], [torch.ones(3), torch.ones(3)]) == float("inf")
    turned = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert cosine_gap([turned], [torch.tensor([[2.0, 0.0], [1.0, 0.0]])]) == pytest.approx(
        1 - 0.5**0.5
    )


def test_rounds_are_interleaved_and_warmed_up():
    ran = []
    sides = {
        name: (lambda *_, name=name: Side(lambda: (ran.append(name), (7, 0.0))[1]))
        for name in ("a", "b", "base")
    }
    found = measure_times(Row("a row", sides, "base"), replace(BARE, pairs=4), Path())
    assert [ran[i : i + 3] for i in range(0, len(ran), 3)] == [
        ["a", "b", "base"],
        ["a", "b", "base"],
        ["b", "base", "a"],
        ["base", "a", "b"],
        ["a", "b", "base"],
    ]
    assert {name: len(rates) for name, rates in found["tokens_per_second"].items()} == {
        "a": 4,
        "b": 4,
        "base": 4,
    }


def test_figures_are_medians_of_ratios_within_rounds():
    row = row_of({"ours": (1, 0.0), "base": (1, 0.0)})
    times = {
        "tokens_per_second": {"ours": [10.0, 40.0, 90.0], "base": [10.0, 20.0, 10.0]},
        "mfu": {"ours": [0.1, 0.2, 0.6], "base": []},
    }
    found = figures(row, times, {"ours": 30, "base": 60})
    assert found["ours"]["ratio"] == 2.0
    assert found["ours"]["tokens_per_second"] == 40.0
    assert found["ours"]["ms"] == 25.0
    assert found["ours"]["mfu"] == 0.2
    assert found["ours"]["memory"] == 0.5
    assert "mfu" not in found["base"]
    (ours, base) = cells("x", row, found, "cpu", "cpu")
    assert ours == ["x", "ours", "40", "2.00", "0.0", "0.50", "20%", ""]
    assert base[1:4] == ["base (base)", "10", ""]
    table = markdown([ours, base]).splitlines()
    assert len(table) == 4
    assert {len(line) for line in table} == {len(table[0])}
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == list(COLUMNS)


@pytest.mark.parametrize(
    ("sense", "value", "expected"),
    [(">=", 1.8, "met"), (">=", 1.79, "missed"), ("<=", 1.8, "met"), ("<=", 1.81, "missed")],
)
def test_verdicts(sense, value, expected):
    target = Target("cpu", "ours", "ratio", sense, 1.8)
    assert (
        verdict(target, {"ratio": value}, "cpu")
        == f"ratio {'≥' if sense == '>=' else '≤'} 1.8: {expected}"
    )
    assert verdict(target, {"ratio": value}, "quick").endswith("(cpu): not judged")
    assert verdict(target, {}, "cpu").endswith("not measured")


def test_rows_name_sides_and_settings_that_exist():
    assert len(ROWS) >= 9
    for name, row in ROWS.items():
        assert row.base in row.sides, name
        assert set(row.memory) <= set(row.sides), name
        for target in row.targets:
            assert target.side in row.sides, name
            assert target.setting in SETTINGS, name
            assert target.figure != "memory" or target.side in row.memory, name
    assert CPU.pairs >= 5
    small, large = CPU.memory_batches
    assert large == 16 * small


@pytest.mark.thorough
def test_command_writes_json_and_table(tmp_path):
    """The whole way through processes of its own: times, peaks, environment; the naive KL holds
    memory that ours does not.
    """
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--quick",
        "--only",
        "kl",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "quick.json").read_text(encoding="utf-8"))
    assert content["environment"]["torch"] == torch.__version__
    kl = content["rows"]["kl"]
    assert {
        name: len(rates) for name, rates in kl["times"]["tokens_per_second"].items()
    } == dict.fromkeys(("chunked", "naive"), QUICK.pairs)
    assert 0 <= kl["times"]["difference"]["chunked"] < 1e-4
    logits = 4 * QUICK.kl_positions * QUICK.shape.vocabulary
    assert kl["peaks"]["naive"] > 2 * logits
    assert kl["peaks"]["chunked"] < kl["peaks"]["naive"]
    assert (tmp_path / "quick.md").read_text(encoding="utf-8") in done.stdout
    assert "| kl " in done.stdout
    refused = subprocess.run(
        [*command[:-2], "--only", "nonsense"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "pretext" in refused.stderr
