"""golden.json: texts with the embeddings that an exported folder must reproduce.

Also how such folders are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from torch import Tensor

from llm2comp.errors import ModelFolderError

FORMAT_VERSION = 1
GOLDEN_FILE = "golden.json"
CONFIG_FILE = "config_sentence_transformers.json"
GOLDEN_TEXTS = (
    "Compression keeps what matters.",
    "Mémoire 記憶 ذاكرة 🧠 — a line of many scripts, 12,345.678 numbers\nand a second line.",
    "A long text that is cut at the model's limit. " * 200,
)
# Lowest cosine of a golden text between two float32 computations of one encoder.
MIN_COSINE = 0.9999
# Lowest cosine of half precision to float32 that nobody need be told of; how much further than at
# export verify lets it go.
TOLD_BELOW, MARGIN = 0.99, 4.0


@dataclass(frozen=True)
class Precision:
    """What half precision does to a folder's golden embeddings: lowest cosines.

    Args:
        dtype: of the weights that are stored.
        weights: the folder's in float32 to the native encoder's: what rounding the weights did.
        computing: in `dtype` to float32, both on the folder's weights: what computing in it does,
            on a CPU; 0: not finite.
    """

    dtype: str
    weights: float
    computing: float

    @classmethod
    def of(
        cls,
        folder: Path,
        kind: type[Any],
        found: Tensor,
        texts: Sequence[str],
        dtype: str,
        weights: float,
    ) -> Precision:
        """Of a folder whose golden vectors in float32 are `found`."""
        own = found if dtype == "float32" else golden_vectors(load_as(folder, "cpu", kind), texts)
        return cls(dtype, round(weights, 7), round(lowest_cosine(found, own), 7))

    def record(self) -> dict[str, Any]:
        """For golden.json.

        With `minimum`, the bound of `verify` on `computing`, as processors round in other orders.
        """
        return asdict(self) | {"minimum": round(1 - MARGIN * (1 - self.computing) - 1e-3, 6)}

    def told(self) -> str:
        """For the card."""
        if self.dtype == "float32":
            return self.dtype
        return (
            f"{self.dtype}; lowest cosine to the trained encoder {self.weights:.5f} when computed "
            f"in float32, and from there to {self.dtype} {self.computing:.5f}"
        )


def golden_vectors(
    model: SentenceTransformer | MultiVectorEncoder, texts: Sequence[str] = GOLDEN_TEXTS
) -> Tensor:
    """What the golden file holds, a row per text: its embedding, or its vectors in a row.

    By the stock library's own `encode`: that is what is verified.
    """
    if isinstance(model, SentenceTransformer):
        with torch.no_grad():
            embeddings_ND = model.encode(
                list(texts), convert_to_tensor=True, show_progress_bar=False
            )
        return embeddings_ND.float().cpu()
    found = model.encode(list(texts), show_progress_bar=False)
    rows: list[Tensor] = [vectors_KD.float().cpu().flatten() for vectors_KD in found]
    # of a damaged folder, some are longer than others
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def rounded(embeddings_ND: Tensor) -> list[list[float]]:
    """For golden.json."""
    return [[round(value, 7) for value in row] for row in embeddings_ND.tolist()]


def verify(folder: Path) -> float:
    """Recompute the golden embeddings of an exported folder in float32.

    Returns the lowest cosine to the stored ones.

    In half precision the folder must reach the cosine that `export` measured.

    Raises:
        ModelFolderError: no such folder, no golden.json, a file missing or truncated, or embeddings
            that differ.
    """
    golden_file = folder / GOLDEN_FILE
    try:
        golden: dict[str, Any] = json.loads(golden_file.read_text(encoding="utf-8"))
        expected = torch.tensor(golden["embeddings"])
        minimum = float(golden["minimum_cosine"])
        texts = [str(text) for text in golden["texts"]]
        half = golden.get("precision") or {"dtype": "float32"}  # earlier versions did not store it
        half_minimum = None if half["dtype"] == "float32" else float(half["minimum"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_golden(folder, error) from error
    if golden.get("format_version") != FORMAT_VERSION:
        raise ModelFolderError(
            "unknown format",
            where=str(golden_file),
            expected=FORMAT_VERSION,
            found=golden.get("format_version"),
        )
    if engine := golden.get("engine"):
        raise ModelFolderError(
            f"is for {engine}, which alone can run it",
            where=str(folder),
            fix=f"start a server on it as its README says, then llm2comp verify {folder} --url URL",
        )
    kind = MultiVectorEncoder if is_multi_vector(folder) else SentenceTransformer
    changed, again = (
        "gives other embeddings than when it was saved",
        "a file was changed or damaged: copy the folder again",
    )
    full = golden_vectors(load_as(folder, "cpu", kind, "float32"), texts)
    lowest = hold(folder, expected, full, changed, minimum, fix=again)
    if half_minimum is not None:
        rounded_too = golden_vectors(load_as(folder, "cpu", kind), texts)
        hold(folder, expected, rounded_too, changed, half_minimum, half["dtype"], again)
    return lowest


def hold(
    folder: Path,
    expected: Tensor,
    found: Tensor,
    problem: str,
    minimum: float = MIN_COSINE,
    dtype: str = "float32",
    fix: str | None = None,
) -> float:
    """The lowest cosine of golden embeddings to those expected.

    Raises ModelFolderError with `problem` below `minimum`.
    """
    if found.shape != expected.shape:
        raise ModelFolderError(
            "embeddings of another shape",
            where=str(folder),
            expected=expected.shape,
            found=found.shape,
        )
    lowest = lowest_cosine(expected, found)
    if lowest < minimum:
        raise ModelFolderError(
            problem,
            where=str(folder),
            expected=f"cosine ≥ {minimum} in {dtype}",
            found=f"{lowest:.6f}",
            fix=fix,
        )
    return lowest


def _no_golden(folder: Path, error: Exception) -> ModelFolderError:
    """The error for a folder without a readable golden.json."""
    expected, where = "a model/ folder written by llm2comp", str(folder / GOLDEN_FILE)
    if isinstance(error, FileNotFoundError) and (folder / "modules.json").is_file():
        fix = (
            "sentence-transformers saved it, which keeps no golden.json; `verify` checks "
            "what `export` wrote"
        )
        return ModelFolderError(
            "is not there: nothing to hold the folder against",
            where=where,
            expected=expected,
            fix=fix,
        )
    if isinstance(error, FileNotFoundError):
        return ModelFolderError(
            "cannot be checked: there is no such file", where=where, expected=expected
        )
    return ModelFolderError(f"cannot be checked: {error}", where=where, expected=expected)


def lowest_cosine(expected: Tensor, found: Tensor) -> float:
    """Lowest cosine of a text; 0 where an embedding is not finite."""
    return torch.cosine_similarity(expected, found).nan_to_num(0.0).min().item()


def _precision(
    folder: Path, kind: type[Any], native: Tensor, exported: Tensor, dtype: str
) -> Precision:
    own = exported if dtype == "float32" else golden_vectors(load_as(folder, "cpu", kind))
    return Precision(
        dtype, round(lowest_cosine(native, exported), 7), round(lowest_cosine(exported, own), 7)
    )


def load_folder(folder: Path, device: str | None = None) -> SentenceTransformer:
    """`SentenceTransformer(folder)` with one clear error for whatever is wrong with the folder.

    Raises:
        ModelFolderError: missing, incomplete, truncated, or in need of code that is not installed.
    """
    if is_multi_vector(folder):
        raise ModelFolderError(
            "holds several vectors per text",
            where=str(folder),
            fix="load it with sentence_transformers.MultiVectorEncoder",
        )
    model: SentenceTransformer = load_as(folder, device, SentenceTransformer)
    return model


def is_multi_vector(folder: Path) -> bool:
    """Whether a folder's model gives several vectors per text."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return bool(config["model_type"] == MultiVectorEncoder.model_type)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # another kind of folder, or one that cannot be loaded


def load_as(folder: Path, device: str | None, kind: type[Any], dtype: str = "auto") -> Any:
    """A folder's model, of sentence-transformers' class `kind`, once it has embedded a text.

    It is in `dtype`, or as it is stored.
    """
    if not (folder / "modules.json").is_file():
        raise ModelFolderError(
            "not a sentence-transformers folder", where=str(folder), expected="modules.json in it"
        )
    try:
        how = {"use_safetensors": True, "dtype": dtype}
        model = kind(str(folder), device=device, local_files_only=True, model_kwargs=how)
        golden_vectors(model, ["a trial: some damage shows only here"])
        return model
    except Exception as error:  # what libraries raise on a broken file has no common base
        raise cannot_be_loaded(
            folder, (str(error).strip() or type(error).__name__).splitlines()[0]
        ) from error


def cannot_be_loaded(folder: Path, reason: str) -> ModelFolderError:
    """The error for a folder that a library could not load."""
    fix = "a file is missing or damaged: copy the folder again or export anew"
    return ModelFolderError(f"cannot be loaded: {reason}", where=str(folder), fix=fix)
