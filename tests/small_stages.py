"""One stage of a tiny encoder, run by itself: its gradients at every optimiser step, its weights,
what it computed at once.
"""

from dataclasses import dataclass, field

import torch

from families import make_compressor, snapshot
from llm2comp.recipe import PretextStage, SclStage, UclStage
from llm2comp.training import memory_limits, trainers
from llm2comp.training.progress import ProgressCallback
from llm2comp.training.stages import RUNNERS, RunOptions
from tiny_run import SCHEDULE, sentences, write_pairs, write_rows

STAGES = {"pretext": PretextStage, "ucl": UclStage, "scl": SclStage}


def make_stage(folder, name, **settings):
    """Settings over texts of 10 to 40 tokens in `folder`."""
    folder.mkdir(exist_ok=True)
    if name == "scl":
        write_pairs(folder / "pairs.jsonl", [1] * 24)
        data = {"source": str(folder / "pairs.jsonl"), "negatives": ["negatives"]}
    else:
        rows = [{"text": sentences(1, 4 + number % 9, seed=number)[0]} for number in range(24)]
        data = {"source": str(write_rows(folder / "texts.jsonl", rows))}
    limits = {
        "min_characters": 1,
        "max_tokens": 48,
        "long_texts": "truncate",
        "site_margin_tokens": 3,
    }
    own = {
        "pretext": limits,
        "ucl": {"min_characters": 1, "attention_dropout": 0.0, "train_memory": True},
    }
    common = {
        "data": [data],
        "steps": 2,
        "batch_size": 4,
        "schedule": SCHEDULE,
        "log_every_steps": 1,
        "max_grad_norm": None,
    }
    return STAGES[name].model_validate(common | own.get(name, {"train_memory": True}) | settings)


@dataclass
class Seen:
    """What a stage did."""

    gradients: list = field(default_factory=list)  # per optimiser step: name → gradient
    # masks of all encoder passes that are to be learned from
    encoded: list = field(default_factory=list)
    batches: list = field(default_factory=list)  # text ids per batch
    said: list = field(default_factory=list)
    weights: dict = field(default_factory=dict)


def run_stage(name, stage, folder, monkeypatch, dropout=0.0, before_encoding=None):
    """Run a stage on a fresh encoder; `before_encoding(compressor, mask_BT)` may raise."""
    compressor, seen = make_compressor("llama", stages=(name,), dropout=dropout), Seen()
    compressor.learn(memory=True)
    encode, step = compressor.memory_states, trainers.StageMixin.training_step

    def watched_encode(tokens):
        if compressor.training and torch.is_grad_enabled():
            seen.encoded.append(tokens.mask_BT)
        if before_encoding is not None:
            before_encoding(compressor, tokens.mask_BT)
        return encode(tokens)

    def watched_step(self, model, inputs, *args, **kwargs):
        seen.batches.append(
            [
                ids.clone()
                for key, ids in inputs.items()
                if key.endswith("input_ids") or key == "text_ids"
            ]
        )
        return step(self, model, inputs, *args, **kwargs)

    def before_optimizer(self, args, state, control, **kwargs):
        named = compressor.named_parameters()
        seen.gradients.append({key: p.grad.clone() for key, p in named if p.grad is not None})

    with monkeypatch.context() as patch:
        patch.setattr(compressor, "memory_states", watched_encode)
        patch.setattr(trainers.StageMixin, "training_step", watched_step)
        patch.setattr(memory_limits, "say", seen.said.append)
        patch.setattr(ProgressCallback, "on_pre_optimizer_step", before_optimizer)
        RUNNERS[name](compressor, stage, folder, 7, RunOptions())
    seen.weights = snapshot(compressor)
    assert len(seen.gradients) == stage.steps
    assert all(gradient.any() for gradients in seen.gradients for gradient in gradients.values()), (
        "vacuous: a zero gradient"
    )
    return seen


def same(found, expected):
    """Bit for bit."""
    assert found.keys() == expected.keys()
    assert len(expected) > 5
    return all(torch.equal(found[key], expected[key]) for key in expected)
