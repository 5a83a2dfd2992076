"""`compile: true`: the same loss and gradients, dropout included; no graph for every batch; plain
modules again afterwards.
"""

import shutil

import pytest
from torch._dynamo.utils import counters

from families import FAMILIES, make_backbone, make_lm, relative_error
from llm2comp.training import compiling
from llm2comp.training.compiling import compiled, parts_to_compile
from llm2comp.training.progress import ProgressCallback
from small_stages import make_stage, run_stage


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_norms_and_mlps_of_every_layer(family):
    backbone = make_backbone(family)
    names = {type(part).__name__ for part in parts_to_compile(backbone)}
    assert any("Norm" in name for name in names), names
    assert any("MLP" in name or "Sparse" in name or name == "Linear" for name in names), names
    assert not any("Attention" in name for name in names), names
    assert len(parts_to_compile(backbone)) >= 3 * make_lm(family).config.num_hidden_layers


def test_modules_are_plain_again_whatever_happens(monkeypatch):
    said, backbone = [], make_backbone()
    monkeypatch.setattr(compiling, "say", said.append)

    def on():
        return [part._compiled_call_impl is not None for part in parts_to_compile(backbone)]

    with compiled(backbone, on=False):
        assert not any(on())
    assert said == []
    with compiled(backbone):
        inside = on()
    assert len(inside) > 2
    assert all(inside)
    assert not any(on())
    with pytest.raises(ZeroDivisionError), compiled(backbone):
        1 / 0  # noqa: B018
    assert not any(on())
    assert said == ["compiling: the first steps are slow"] * 2


CASES = {
    "pretext": {"objective": {"ctkd": 1.0, "mntp": 0.5}},
    "scl": {"mini_batch_tokens": 50, "gradient_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for the CPU needs g++")
@pytest.mark.parametrize("name", CASES)
def test_compiled_stage_equals_the_plain_one(tmp_path, monkeypatch, name):
    """Teacher, decoder and encoder pass, adapters off and on; for SCL also GradCache, whose two
    passes drop alike.
    """
    stage = make_stage(tmp_path / "data", name, steps=12, attention_dropout=0.2, **CASES[name])
    expected, graphs = run_stage(name, stage, tmp_path / "plain", monkeypatch, 0.2), []
    monkeypatch.setattr(
        ProgressCallback,
        "on_step_end",
        lambda *_, **__: graphs.append(counters["stats"]["unique_graphs"]),
    )
    counters.clear()
    found = run_stage(
        name, stage.model_copy(update={"compile": True}), tmp_path / "compiled", monkeypatch, 0.2
    )
    assert graphs[0] >= 2, "vacuous: nothing was compiled"
    assert graphs[8] == graphs[11], "compiled again and again"
    first, reference = found.gradients[0], expected.gradients[0]
    assert first.keys() == reference.keys()
    for key, gradient in reference.items():
        assert relative_error(first[key], gradient) < 1e-5, key
    for key, weight in expected.weights.items():
        assert (found.weights[key] - weight).abs().max() < 5e-3, key
