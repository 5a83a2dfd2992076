"""Teacher and guide of SCL: finished, frozen encoders that say how alike the texts of a batch are.

They read the plain text, without our instruction and memory tokens, by their own tokenizer and
prompts, in evaluation mode and the dtype of their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize

from llm2comp.errors import RecipeError, one_line
from llm2comp.model.backbone.digest import FILES, file_digest, hub_commit
from llm2comp.recipe import JudgeSettings, SclStage, expanded, is_local, missing_path
from llm2comp.system.files import to_json

PACKAGE = "package:"
MODULES_FILE = "modules.json"
AT_ONCE = 128  # texts
# What a library raises over files that are not there, damaged, or of another kind.
FOREIGN_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    SafetensorError,
)


@dataclass(frozen=True)
class Targets:
    """What teacher and guide say of a batch of B queries and N documents, as cosines.

    Documents stand column by column: the B positives, then the first hard negatives, and so on.
    """

    teacher_BN: Tensor | None
    guide_BN: Tensor | None

    def ordered(self, order_B: Tensor) -> Targets:
        """The same of a batch whose rows are in another order."""

        def change(x_BN: Tensor | None) -> Tensor | None:
            if x_BN is None:
                return None
            rows = len(order_B)
            order_N = torch.cat([order_B + first for first in range(0, x_BN.shape[1], rows)])
            return x_BN[order_B][:, order_N]

        return Targets(change(self.teacher_BN), change(self.guide_BN))


@dataclass(frozen=True)
class Judges:
    """Teacher and guide of a stage, and what stands around the texts of its queries."""

    teacher: SentenceTransformer | None
    guide: SentenceTransformer | None
    prompts: tuple[str, ...] = ()
    suffix: str = ""

    def plain(self, query: str) -> str:
        """A query without its instruction."""
        for prompt in self.prompts:
            if query.startswith(prompt):
                return query[len(prompt) :].removesuffix(self.suffix)
        return query

    def targets(self, columns: Sequence[Sequence[str]], device: torch.device) -> Targets:
        """Cosines of each query (first column) to all documents (the other columns)."""
        queries = [self.plain(query) for query in columns[0]]
        documents = [text for column in columns[1:] for text in column]
        by_model: dict[int, Tensor] = {}
        for model in (self.teacher, self.guide):
            if model is not None and id(model) not in by_model:
                by_model[id(model)] = cosines(model, queries, documents).to(device)
        return Targets(by_model.get(id(self.teacher)), by_model.get(id(self.guide)))


def cosines(model: SentenceTransformer, queries: list[str], documents: list[str]) -> Tensor:
    """Cosine of each query to each document, cos_BN in float32, without gradient.

    The model's own prompts for queries and documents are used where it has any.
    """
    settings: dict[str, Any] = {
        "batch_size": AT_ONCE,
        "convert_to_tensor": True,
        "show_progress_bar": False,
    }
    with torch.autocast(model.device.type, enabled=False), torch.no_grad():
        queries_BD = normalize(model.encode_query(queries, **settings).float(), dim=-1)
        documents_ND = normalize(model.encode_document(documents, **settings).float(), dim=-1)
        return queries_BD @ documents_ND.T


def load_judges(stage: SclStage, device: torch.device | str) -> Judges | None:
    """The stage's teacher and guide, one model if they are the same; None if it has neither.

    Raises:
        RecipeError: one that cannot be loaded, or gives no embeddings.
    """
    if not stage.judges:
        return None
    loaded: dict[tuple[str, str | None], SentenceTransformer] = {}
    for where, judge in stage.judges.items():
        if (key := (judge.name, judge.revision)) not in loaded:
            loaded[key] = _load(judge, where, device)
    teacher, guide = (
        None if judge is None else loaded[judge.name, judge.revision]
        for judge in (stage.teacher, stage.guide)
    )
    prompts = {prompt for spec in stage.data if (prompt := stage.prompt_of(spec))}
    return Judges(teacher, guide, tuple(sorted(prompts, key=len, reverse=True)), stage.query_suffix)


def judge_digest(judge: JudgeSettings) -> str:
    """Digest of all files that make a judge what it is; of a Hub id, the commit.

    Raises:
        RecipeError: an installed package that is not there.
    """
    place = Path(judge_source(judge.name))
    if not place.is_dir():
        return hub_commit(judge.name, judge.revision)
    patterns = (*FILES, "*.bin", "*.json")
    files = sorted({file for pattern in patterns for file in place.rglob(pattern)})
    return to_json([[str(file.relative_to(place)), file_digest(file)] for file in files])


def judge_source(name: str, where: str = "teacher or guide") -> str:
    """Folder or Hub id. Raises RecipeError for an installed package without a model in it."""
    if not name.startswith(PACKAGE):
        return name
    package = name.removeprefix(PACKAGE).replace("-", "_")
    spec = find_spec(package) if package.isidentifier() else None
    for folder in spec.submodule_search_locations or () if spec else ():
        if found := sorted(Path(folder).rglob(MODULES_FILE), key=lambda file: len(file.parts)):
            return str(found[0].parent)
    expected = f"an installed package with {MODULES_FILE} in it"
    raise RecipeError(
        "no such model", where=where, expected=expected, found=name, fix="pip install it"
    )


def _load(judge: JudgeSettings, where: str, device: torch.device | str) -> SentenceTransformer:
    source = judge_source(judge.name, where)
    nearest = missing_path(source)
    if nearest is not None:
        raise RecipeError(
            "no such folder", where=where, found=source, fix=f"the nearest is {nearest}"
        )
    if is_local(source) and not (expanded(source) / MODULES_FILE).is_file():
        expected = f"a folder with {MODULES_FILE}, as SentenceTransformer.save_pretrained writes it"
        raise RecipeError(
            "is no sentence-transformers model", where=where, expected=expected, found=source
        )
    try:
        model = SentenceTransformer(
            source, device=str(device), revision=judge.revision, trust_remote_code=False
        )
        trial_BN = cosines(model, ["a query", "another"], ["a text", "another"])
    except FOREIGN_ERRORS as error:
        raise RecipeError(
            f"cannot be used: {one_line(error)}", where=where, found=judge.name
        ) from error
    if not trial_BN.isfinite().all():
        raise RecipeError("gives embeddings that are not finite", where=where, found=judge.name)
    model.eval().requires_grad_(False)
    return model
