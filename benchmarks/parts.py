"""Rows of single parts, without a model: the KL over the vocabulary, the making and the reading of
stage 1's rows on disk.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.inputs import SEED, draw_lengths, make_texts, make_tokenizer, token_rows
from benchmarks.settings import Setting
from benchmarks.sides import Row, Side, Target, relative_error
from llm2comp.data.pretext import PretextCollator, PretextRows
from llm2comp.data.store import TokenStore, stored_rows, write_rows
from llm2comp.objectives.kl import Project, chunked_kl
from llm2comp.recipe import PretextStage
from llm2comp.system.files import write_text
from llm2comp.system.folders import new_folder

Kl = Callable[[Tensor, Tensor, Project, Tensor], Tensor]

STORE_TEXTS = 1_000  # at most, of the smaller corpus of the row `store`
MARGIN = 10


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
    student, teacher, head = (
        torch.randn(size, generator=generator).to(setting.device, dtype) for size in sizes
    )
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


def store_side(setting: Setting, times: int, folder: Path) -> Side:
    """A file of texts → rows of token ids on disk: read, tokenised and written anew in each
    unit.
    """
    file, root = folder / f"texts-{times}.jsonl", folder / f"made-{times}"
    if not file.exists():
        lengths = draw_lengths(
            times * min(setting.data_rows, STORE_TEXTS), setting.pretext_lengths, 20
        )
        texts = make_texts(lengths, setting.shape, 20)
        write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"min_characters": 0, "long_texts": "truncate", "site_margin_tokens": MARGIN}
    stage = PretextStage.model_validate({"data": [{"source": str(file)}], **settings})
    tokenizer, most = make_tokenizer(setting.shape), setting.pretext_lengths[1]

    def tokenise(texts: Sequence[str]) -> list[list[int]]:
        return [[0, *row] for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def run() -> tuple[int, float]:
        shutil.rmtree(root, ignore_errors=True)
        rows, _ = stored_rows(stage, tokenise, most, 0, tokenizer, lambda _: None, root)
        return int(rows.lengths.sum()), 0.0

    return Side(run)


def data_side(setting: Setting, times: int, folder: Path) -> Side:
    """PretextRows and its collator over a corpus `times` as large on disk, batches of the pretext
    row; no model.
    """
    place, size = folder / f"rows-{times}", setting.pretext_texts
    if not place.exists():
        lengths = draw_lengths(times * setting.data_rows, setting.pretext_lengths, 20)
        with new_folder(place, None) as new:
            write_rows(new, token_rows(lengths, setting.shape, 20))
    samples = PretextRows(TokenStore(place), 10**9, MARGIN, SEED, size)
    collate, numbers = PretextCollator(0), itertools.count()

    def run() -> tuple[int, float]:
        tokens = 0
        for _ in range(setting.data_batches):
            first = next(numbers) * size
            tokens += int(
                collate([samples[i] for i in range(first, first + size)])["text_mask"].sum()
            )
        return tokens, 0.0

    return Side(run)


def _kl(kl: Kl) -> Callable[[Setting, Path], Side]:
    return lambda setting, _: kl_side(setting, kl)


def _corpus(
    side: Callable[[Setting, int, Path], Side], times: int
) -> Callable[[Setting, Path], Side]:
    return lambda setting, folder: side(setting, times, folder)


CORPORA = {"10 x corpus": 10, "corpus": 1}
PART_ROWS: dict[str, Row] = {
    "kl": Row(
        "the KL over the vocabulary alone, value and gradient (positions/s)",
        {"chunked": _kl(chunked_kl), "naive": _kl(naive_kl)},
        "naive",
        differ=relative_error,
        limits=(1e-4, 2e-2),
        memory=("chunked", "naive"),
    ),
    "store": Row(
        "a file of texts → rows of token ids on disk; a corpus ten times as large",
        {name: _corpus(store_side, times) for name, times in CORPORA.items()},
        "corpus",
        memory=tuple(CORPORA),
    ),
    "data": Row(
        "stage 1's rows from the disk and their collator without a model; a corpus ten "
        "times as large",
        {name: _corpus(data_side, times) for name, times in CORPORA.items()},
        "corpus",
        targets=(
            Target("cpu", "10 x corpus", "ratio", ">=", 0.98),
            Target("cuda-7b", "10 x corpus", "ratio", ">=", 0.98),
        ),
        memory=tuple(CORPORA),
    ),
}
