"""Memory that runs out in the middle of a step costs time, not the gradient: the step is done again
with less at once.
"""

import re
from types import SimpleNamespace

import pytest
import torch

from families import relative_error
from llm2comp.errors import RunError
from llm2comp.training import memory_limits
from llm2comp.training.memory_limits import is_out_of_memory
from small_stages import make_stage, run_stage, same

ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"
    ),
}
SETTINGS = {
    "pretext": "max_tokens_per_batch",
    "ucl": "mini_batch_tokens",
    "scl": "mini_batch_tokens",
}


class Memory:
    """Runs out at the given encoder passes (numbered from 0), or at all: in the pass itself, or
    late in its backward pass.
    """

    def __init__(self, fails, where="forward", error="cuda"):
        self.fails, self.where, self.error = fails, where, ERRORS[error]
        self.passes, self.failed, self.partial, self._due = 0, 0, 0, False

    def __call__(self, compressor, mask_BT):
        if not (compressor.training and torch.is_grad_enabled()):
            return
        if not self.passes:
            compressor.memory.vectors_KD.register_hook(
                lambda gradient_KD: self._backward(compressor)
            )
        self._due |= self.fails is None or self.passes in self.fails
        self.passes += 1
        if self._due and self.where == "forward":
            self._fail()

    def _backward(self, compressor):
        """The memory's gradient comes after those of all layers behind it, which are added up
        already.
        """
        if self._due and self.where == "backward":
            self.partial += any(p.grad is not None for p in compressor.backbone.parameters())
            self._fail()

    def _fail(self):
        self.failed, self._due = self.failed + 1, False
        raise self.error()


def limit_of(said, name):
    """The one line that was said, and the size it names."""
    (line,) = [line for line in said if "memory" in line]
    found = re.fullmatch(
        rf"{name}: out of memory; going on with ([\d,]+) tokens at once "
        rf"\({name}.{SETTINGS[name]}\)",
        line,
    )
    assert found, line
    return int(found[1].replace(",", ""))


CASES = [
    ("pretext", "forward", "cuda", {}),
    ("pretext", "backward", "cpu", {}),
    ("pretext", "backward", "cuda", {"max_tokens_per_batch": 100}),
    ("ucl", "backward", "cuda", {}),
    ("scl", "forward", "cpu", {}),
    ("scl", "backward", "cuda", {"mini_batch_size": 2}),
    ("scl", "backward", "cuda", {"mini_batch_tokens": 60}),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "where", "error", "settings"), CASES)
def test_the_run_is_that_of_the_smaller_size(tmp_path, monkeypatch, name, where, error, settings):
    """Bit for bit, dropout included: the failed attempt leaves no gradient and draws nothing; the
    size stays.
    """
    stage = make_stage(tmp_path / "data", name, attention_dropout=0.2, **settings)
    memory = Memory({0}, where, error)
    seen = run_stage(name, stage, tmp_path / "run", monkeypatch, 0.2, memory)
    assert memory.failed == 1
    assert memory.partial == (where == "backward")
    limit = limit_of(seen.said, name)
    smaller = stage.model_copy(update={SETTINGS[name]: limit})
    expected = run_stage(name, smaller, tmp_path / "expected", monkeypatch, 0.2)
    assert expected.said == []
    for found, reference in zip(seen.gradients, expected.gradients, strict=True):
        assert same(found, reference)
    assert same(seen.weights, expected.weights)
    sizes = [len(mask) for mask in seen.encoded]
    assert sizes[-len(expected.encoded) :] == [len(mask) for mask in expected.encoded]
    assert len(sizes) > len(expected.encoded), "vacuous: nothing was tried twice"
    undisturbed = run_stage(name, stage, tmp_path / "undisturbed", monkeypatch, 0.2)
    assert not same(seen.gradients[0], undisturbed.gradients[0]), (
        "vacuous: the limit changed nothing"
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "fails"), [("pretext", {1}), ("pretext", {1, 3}), ("ucl", {0, 2}), ("scl", {0, 3})]
)
def test_the_gradient_is_that_of_the_whole_batch(tmp_path, monkeypatch, name, fails):
    """Failures late in a step, again at the smaller size, and under accumulation: what was there
    before the step stays.
    """
    settings = {"gradient_accumulation_steps": 2} if name == "pretext" else {}
    stage = make_stage(tmp_path / "data", name, steps=1, **settings)
    memory = Memory(fails, "backward")
    seen = run_stage(name, stage, tmp_path / "run", monkeypatch, before_encoding=memory)
    assert memory.failed == memory.partial == len(fails) == len(seen.said), (
        memory.passes,
        seen.encoded,
    )
    expected = run_stage(name, stage, tmp_path / "expected", monkeypatch)
    (found,), (reference,) = seen.gradients, expected.gradients
    assert found.keys() == reference.keys()
    for key, gradient in reference.items():
        assert relative_error(found[key], gradient) < 1e-4, key


@pytest.mark.parametrize(("name", "error"), [("pretext", "cuda"), ("ucl", "cpu"), ("scl", "cuda")])
def test_one_text_that_does_not_fit(tmp_path, monkeypatch, name, error):
    stage, memory = make_stage(tmp_path / "data", name), Memory(None, error=error)
    with pytest.raises(RunError, match="out of memory") as raised:
        run_stage(name, stage, tmp_path / "run", monkeypatch, before_encoding=memory)
    assert f"{name}, step 1" in str(raised.value)
    assert "one text" in str(raised.value)
    assert is_out_of_memory(raised.value.__cause__)
    assert 2 < memory.failed < 9, "halved each time"


@pytest.mark.parametrize("name", ["pretext", "scl"])
def test_several_processes_do_not_choose_each_for_itself(tmp_path, monkeypatch, name):
    monkeypatch.setattr(
        memory_limits, "DistributedType", SimpleNamespace(NO="as if it were another")
    )
    stage, memory = make_stage(tmp_path / "data", name), Memory({0})
    with pytest.raises(RunError, match=rf"set {name}.{SETTINGS[name]}, or lower {name}.batch_size"):
        run_stage(name, stage, tmp_path / "run", monkeypatch, before_encoding=memory)
    assert memory.failed == 1


def test_other_errors_are_not_for_memory(tmp_path, monkeypatch):
    def fail(compressor, mask_BT):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_stage(
            "pretext",
            make_stage(tmp_path / "data", "pretext"),
            tmp_path / "run",
            monkeypatch,
            before_encoding=fail,
        )
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
