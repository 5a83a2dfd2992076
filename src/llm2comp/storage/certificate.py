"""Does a running server give a folder's embeddings? A certificate, with the likely cause if not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from llm2comp.errors import ModelFolderError, one_line
from llm2comp.storage.endpoint import Endpoint, RefusedError, find_endpoint
from llm2comp.storage.gguf_file import GGUF_FILE
from llm2comp.storage.golden import GOLDEN_FILE, load_folder, lowest_cosine, verify
from llm2comp.storage.probes import Probe, probes
from llm2comp.storage.variants import embed, variants
from llm2comp.system.console import Prompts

# Lowest cosine of a server's embedding; engines compute in half precision.
MIN_COSINE = 0.999
UNKNOWN = "none of the known causes"


@dataclass(frozen=True)
class Row:
    """What came back for the probes of one case.

    Args:
        case: what they are there for.
        texts: how many.
        lowest: lowest cosine to the folder's own; None: the server refused them.
        note: the likely cause, or the refusal.
    """

    case: str
    texts: int
    lowest: float | None
    note: str = ""


@dataclass(frozen=True)
class Certificate:
    """What a server gives, held against a folder.

    Args:
        endpoint: the server.
        folder: what its embeddings should be.
        rows: by cases.
        lengths: of the server's embeddings, in words; `scaled`: neither 1 nor the folder's.
    """

    endpoint: Endpoint
    folder: Path
    rows: tuple[Row, ...]
    lengths: str
    scaled: bool

    @property
    def lowest(self) -> float:
        """Lowest cosine of all that was answered."""
        return min((row.lowest for row in self.rows if row.lowest is not None), default=0.0)

    @property
    def sound(self) -> bool:
        """Whether all that was answered is the folder's."""
        return self.lowest >= MIN_COSINE and not self.scaled

    @property
    def causes(self) -> list[str]:
        """Likely causes, each once."""
        wrong = [row.note for row in self.rows if row.lowest is not None and row.note]
        return list(dict.fromkeys(wrong + [self.lengths] * self.scaled))

    def told(self) -> str:
        """The certificate as text."""
        lines = [f"{self.endpoint.url} ({self.endpoint.protocol}) against {self.folder}"]
        for row in self.rows:
            cosine = "refused" if row.lowest is None else f"cosine ≥ {row.lowest:.7f}"
            count = f"{row.texts} text{'s' * (row.texts > 1)}"
            lines.append(f"  {row.case:<16}{count:<10}{cosine:<20}{row.note}".rstrip())
        return "\n".join([*lines, f"  {self.lengths}"])


def verify_url(
    folder: str | Path,
    url: str,
    prompts: Prompts = "server",
    model: str | None = None,
    key: str | None = None,
) -> Certificate:
    """Hold what a server gives against a folder that `export` wrote.

    Args:
        folder: the exported folder; `golden.json` alone where a GGUF is in it.
        url: of a server that speaks OpenAI's or text-embeddings-inference's protocol.
        prompts: `server`: it is told the role (`input_type`, `prompt_name`), and must put the
            stored prompt before the text; `client`: we put it there.
        model: name of the model in requests; default: the first that the server lists.
        key: sent as a bearer token.

    Raises:
        ModelFolderError: an unsound folder, no server there, or answers that are no embeddings.
    """
    folder = Path(folder)
    endpoint = find_endpoint(url, model, key)
    if (folder / GGUF_FILE).is_file():
        return _of_golden(folder, endpoint)
    verify(folder)
    own = load_folder(folder, "cpu").float()
    rows, sizes = [], []
    asked = probes(own.prompts)
    for case in dict.fromkeys(probe.case for probe in asked):
        few = [probe for probe in asked if probe.case == case]
        row, pair = _row(case, few, own, endpoint, prompts)
        rows.append(row)
        sizes += pair
    return Certificate(endpoint, folder, tuple(rows), *_lengths(sizes))


def _row(
    case: str,
    few: Sequence[Probe],
    own: SentenceTransformer,
    endpoint: Endpoint,
    prompts: Prompts,
) -> tuple[Row, list[tuple[Tensor, Tensor]]]:
    """The row of a case, and the lengths of the vectors in it: the server's, the folder's."""
    role = few[0].role
    before = (own.prompts.get(role or "") or "") if prompts == "client" else ""
    try:
        told = role if prompts == "server" else None
        found = torch.tensor(endpoint.embed([before + probe.text for probe in few], told))
    except RefusedError as refused:
        return Row(case, len(few), None, str(refused)), []
    expected = embed(own, few)
    lowest = _lowest(expected, found)
    if lowest < MIN_COSINE:  # lengths of other vectors say nothing
        return Row(case, len(few), lowest, _cause(found, expected, few, own)), []
    return Row(case, len(few), lowest), [(found.norm(dim=1), expected.norm(dim=1))]


def _of_golden(folder: Path, endpoint: Endpoint) -> Certificate:
    """Of a folder that this package cannot run: by the vectors that it was written with."""
    try:
        golden: dict[str, Any] = json.loads((folder / GOLDEN_FILE).read_text(encoding="utf-8"))
        expected, suffix = torch.tensor(golden["embeddings"]), str(golden["suffix"])
        found = torch.tensor(endpoint.embed([text + suffix for text in golden["texts"]]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(
            f"cannot be read: {one_line(error)}", where=str(folder / GOLDEN_FILE), fix="export anew"
        ) from error
    except RefusedError as refused:
        raise ModelFolderError(str(refused), where=endpoint.url) from None
    lowest = _lowest(expected, found)
    note = "" if lowest >= MIN_COSINE else UNKNOWN
    row = Row("golden texts", len(expected), lowest, note)
    return Certificate(
        endpoint, folder, (row,), *_lengths([(found.norm(dim=1), expected.norm(dim=1))])
    )


def _cause(found: Tensor, expected: Tensor, few: Sequence[Probe], own: SentenceTransformer) -> str:
    """The likeliest cause of other embeddings."""
    if found.shape != expected.shape:
        return f"{found.shape[1]} dimensions, where the folder has {expected.shape[1]}"
    if not bool(torch.isfinite(found).all()):
        return "not finite"
    if torch.cosine_similarity(found[:, None], expected[None], dim=-1).amax(1).min() >= MIN_COSINE:
        return "another order than that of the texts"
    for variant in variants(own, few):
        if _lowest(variant.embed(own, few), found) >= MIN_COSINE:
            return variant.cause
    return UNKNOWN


def _lowest(expected: Tensor, found: Tensor) -> float:
    """Lowest cosine of a text; 0 where an embedding is not finite, or of another size."""
    if expected.shape != found.shape:
        return 0.0
    return lowest_cosine(expected, found)


def _lengths(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[str, bool]:
    """The lengths of a server's embeddings in words, and whether they are of neither kind."""
    if not pairs:
        return "lengths: not compared", False
    found, own = (torch.cat(part) for part in zip(*pairs, strict=True))
    if torch.allclose(found, torch.ones_like(found), atol=1e-3):
        return "lengths: 1 (normalised)", False
    if torch.allclose(found, own, rtol=2e-2):
        return "lengths: the folder's own (not normalised)", False
    return (
        f"lengths: {found.min():.3g} to {found.max():.3g}, neither 1 nor the folder's own "
        f"({own.min():.3g} to {own.max():.3g}): another normalisation"
    ), True
