"""Rows of single parts, without a model: the KL over the vocabulary, and the loading of stage 1's data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.inputs import SEED, draw_lengths, token_rows
from benchmarks.settings import Setting
from benchmarks.sides import Row, Side, Target, relative_error
from llm2comp.data.pretext import PretextCollator, PretextRows
from llm2comp.pretext.kl import Project, chunked_kl

Kl = Callable[[Tensor, Tensor, Project, Tensor], Tensor]


def naive_kl(student_ND: Tensor, teacher_ND: Tensor, project: Project, weights_N: Tensor) -> Tensor:
    """The same sum with the logits of all positions at once."""
    found = functional.log_softmax(project(student_ND).float(), -1)
    expected = functional.log_softmax(project(teacher_ND).float(), -1)
    losses_N = functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
    return (losses_N * weights_N).sum()


def kl_side(setting: Setting, kl: Kl) -> Side:
    """Value and gradient at `kl_positions` random states of teacher and student."""
    count, width, dtype = setting.kl_positions, setting.shape.hidden, getattr(torch, setting.dtype)
    generator = torch.Generator().manual_seed(SEED)
    sizes = ((count, width), (count, width), (setting.shape.vocabulary, width))
    student, teacher, head = (torch.randn(size, generator=generator).to(setting.device, dtype) for size in sizes)
    head *= width**-0.5
    weights = torch.full((count,), 1.0 / count, device=setting.device)

    def compute() -> list[Tensor]:
        states = student.detach().requires_grad_()
        loss = kl(states, teacher, lambda x: x @ head.T, weights)
        (gradient,) = torch.autograd.grad(loss, states)
        return [loss.detach(), gradient]

    def run() -> tuple[int, float]:
        compute()
        return count, 0.0

    return Side(run, compute, dtype)


def data_side(setting: Setting, times: int) -> Side:
    """PretextRows and its collator over a corpus `times` as large, batches of the pretext row; no model."""
    lengths = draw_lengths(times * setting.data_rows, setting.pretext_lengths, 20)
    size = setting.pretext_texts
    samples = PretextRows(token_rows(lengths, setting.shape, 20), 10**9, 10, SEED, size)
    collate, numbers = PretextCollator(0), itertools.count()

    def run() -> tuple[int, float]:
        tokens = 0
        for _ in range(setting.data_batches):
            first = next(numbers) * size
            tokens += int(collate([samples[i] for i in range(first, first + size)])["text_mask"].sum())
        return tokens, 0.0

    return Side(run)


def _kl(kl: Kl) -> Callable[[Setting, Path], Side]:
    return lambda setting, _: kl_side(setting, kl)


PART_ROWS: dict[str, Row] = {
    "kl": Row(
        "the KL over the vocabulary alone, value and gradient (positions/s)",
        {"chunked": _kl(chunked_kl), "naive": _kl(naive_kl)},
        "naive",
        differ=relative_error,
        limits=(1e-4, 2e-2),
        memory=("chunked", "naive"),
    ),
    "data": Row(
        "stage 1's rows and collator without a model; a corpus ten times as large",
        {"10 x corpus": lambda setting, _: data_side(setting, 10), "corpus": lambda setting, _: data_side(setting, 1)},
        "corpus",
        targets=(Target("cpu", "10 x corpus", "ratio", ">=", 0.98), Target("cuda-7b", "10 x corpus", "ratio", ">=", 0.98)),
        memory=("10 x corpus", "corpus"),
    ),
}
