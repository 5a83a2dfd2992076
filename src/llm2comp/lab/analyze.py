"""`llm2comp analyze`: why is a model good or bad?

Collapse, what counts as similar, what the memory tokens hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2comp.data.loaded import Pair
from llm2comp.errors import DataError, ModelFolderError
from llm2comp.lab.plots import heatmap_figure, save_figure, scores_figure, spectrum_figure
from llm2comp.measures.clusters import clusters, merge_weights
from llm2comp.measures.collapse import Collapse, collapse
from llm2comp.measures.context import SITE_MARGIN, context_recovered, split_sample
from llm2comp.measures.geometry import (
    alignment,
    random_pair_cosines,
    related_pair_cosines,
    score_summary,
)
from llm2comp.measures.readout import Readout, read_out
from llm2comp.model.compressor import Compressor
from llm2comp.model.encoder import refuse_not_finite
from llm2comp.model.inputs import Inputs
from llm2comp.model.vectors import Budget, in_batches, memory_states
from llm2comp.runs.folder import Run, stage_of
from llm2comp.storage.identity import identity
from llm2comp.storage.loading import load
from llm2comp.storage.places import live_place
from llm2comp.storage.weights import memory_names
from llm2comp.system.files import explain_disk_errors, to_json, write_text
from llm2comp.system.folders import ANALYSIS, claim
from llm2comp.use.embed import embed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ANALYSIS_FOLDER, ANALYSIS_FILE = "analysis", "analysis.json"
# Where an analysis of a model of no run goes, below the working directory.
ELSEWHERE = Path("llm2comp-analysis")
WITH_MEMORY = "a run, a stage, or a model folder of llm2comp's"
PLOTS = ("spectrum", "scores", "memory")
NEED_MORE_TEXTS = ("effective_rank", "participation_ratio", "above_one_percent")
OF_EMBEDDINGS = (*NEED_MORE_TEXTS, "uniformity", "anisotropy")
# Longest text read for the LM's own part; texts among which those for the split are looked for.
READ_TOKENS, SPLIT_FROM = 512, 512


@dataclass(frozen=True)
class Analysis:
    """What was found; `withheld` says of each figure that is None why it is not given."""

    model: str
    name: str
    revision: str
    collapse: Collapse
    figures: dict[str, float | None]
    withheld: dict[str, str]
    scores: dict[str, Any]
    random_cosines: list[float]
    related_cosines: list[float] | None
    clusters: list[int] | None = None
    merge_weights: list[float] | None = None
    readouts: tuple[Readout, ...] = ()


def analyze(
    path: str,
    texts: Sequence[str],
    pairs: Sequence[Pair] = (),
    *,
    threshold: float = 0.9,
    examples: int = 3,
    needs_memory: bool = False,
    device: str | None = None,
) -> Analysis:
    """Measure a model on texts.

    Args:
        path: whatever `llm2comp.load` takes; a run is looked at through its last stage, where the
            frozen LM is at hand.
        texts: what to embed; more texts than dimensions, or the rank figures are withheld.
        pairs: related texts, for alignment and for what counts as similar.
        threshold: cosine from which memory tokens are merged into one cluster.
        examples: texts to be read out through the LM.
        needs_memory: refuse (ModelFolderError) a model without memory tokens.
        device: None = the best there is.

    Raises:
        DataError: too few texts; an embedding that is zero or not finite, with its text. As `load`
            for the model.
    """
    if len(texts) < 2:
        raise DataError("too few texts to analyze", expected="2 or more", found=len(texts))
    model, compressor = _looked_at(path, device)
    who = identity(path, model)
    if needs_memory and not (compressor.memory.count if compressor else memory_names(model)):
        raise ModelFolderError("has no memory tokens to weigh", where=path, expected=WITH_MEMORY)
    memory_NKD, embeddings_ND = _embeddings(model, compressor, texts)
    refuse_not_finite(embeddings_ND, texts)
    measured = collapse(embeddings_ND, None if memory_NKD is None else memory_NKD.numpy())
    random_cosines, related_cosines = random_pair_cosines(embeddings_ND), None
    figures: dict[str, float | None] = {key: getattr(measured, key) for key in OF_EMBEDDINGS}
    if pairs:
        figures["alignment"], related_cosines = _related(model, pairs)
    readouts: list[Readout] = []
    if compressor is not None:
        figures["context_recovered"] = _context(compressor, texts[:SPLIT_FROM])
        readouts = [read_out(compressor, text, READ_TOKENS) for text in texts[:examples]]
    withheld = _withheld(measured, bool(pairs), compressor is not None, figures)
    likeness = measured.memory_correlation
    labels = None if likeness is None else clusters(likeness, threshold)
    return Analysis(
        model=path,
        name=who.name,
        revision=who.revision,
        collapse=measured,
        figures=figures | dict.fromkeys(withheld),
        withheld=withheld,
        scores=asdict(score_summary(random_cosines, related_cosines)),
        random_cosines=random_cosines.round(4).tolist(),
        related_cosines=None if related_cosines is None else related_cosines.round(4).tolist(),
        clusters=None if labels is None else labels.tolist(),
        merge_weights=None if labels is None else merge_weights(labels).tolist(),
        readouts=tuple(readouts),
    )


def _looked_at(path: str, device: str | None) -> tuple[SentenceTransformer, Compressor | None]:
    """The model, of a run its live last stage, with one limit for both roles as when finished."""
    model = load(live_place(path), device)
    compressor = live_compressor(model)
    if compressor is not None:
        model.max_seq_length = model.max_seq_length  # ends the limits of roles
    return model, compressor


def _related(
    model: SentenceTransformer, pairs: Sequence[Pair]
) -> tuple[float, NDArray[np.float64]]:
    """Alignment of related texts, and the cosine of each pair."""
    anchors_ND = embed(model, [pair.anchor for pair in pairs], role="query").embeddings_ND
    positives = [pair.positive for pair in pairs]
    positives_ND = embed(model, positives, role="document").embeddings_ND
    cosines_N = related_pair_cosines(anchors_ND, positives_ND)
    return alignment(anchors_ND, positives_ND), cosines_N


def _context(compressor: Compressor, texts: Sequence[str]) -> float | None:
    """Context recovered; None where no text is long enough to be split."""
    rows = compressor.backbone.tokenise(texts, compressor.max_tokens(READ_TOKENS))
    return context_recovered(compressor, split_sample(rows, compressor.backbone.pad_id))


def _withheld(
    measured: Collapse, pairs: bool, live: bool, figures: dict[str, float | None]
) -> dict[str, str]:
    """Figures that are not given, and why."""
    reasons: dict[str, str] = {}
    if not measured.enough_texts:
        reason = (
            f"{measured.texts:,} texts for {measured.dimensions:,} dimensions: give more "
            "texts than dimensions"
        )
        reasons |= dict.fromkeys(NEED_MORE_TEXTS, reason)
    if not pairs:
        reasons["alignment"] = "needs related pairs: give --pairs"
    if figures.get("context_recovered") is None:
        short = f"no text of {2 * SITE_MARGIN} tokens or more"
        reasons["context_recovered"] = (
            short if live else "needs the frozen LM: give a run or a stage of one"
        )
    return reasons


def default_folder(path: str) -> Path:
    """Where an analysis goes unless told otherwise: into the model's run, else a folder here."""
    run = Run.of(path)
    if run is None:
        return ELSEWHERE
    folder = Path(path).absolute()
    return run.path / ANALYSIS_FOLDER / (folder.name if stage_of(folder) else "")


def write_analysis(found: Analysis, folder: Path) -> None:
    """The plots (PNG, SVG), then `analysis.json`, over those of an earlier analysis.

    Raises RunError when a write fails.
    """
    claim(folder, ANALYSIS)
    with explain_disk_errors(folder):
        for old in (
            ANALYSIS_FILE,
            *(f"{plot}.{kind}" for plot in PLOTS for kind in ("png", "svg")),
        ):
            (folder / old).unlink(missing_ok=True)
    spectrum, scores, memory = (folder / plot for plot in PLOTS)
    save_figure(spectrum_figure({found.model: found.collapse.spectrum}), spectrum)
    save_figure(scores_figure(found.random_cosines, found.related_cosines), scores)
    if found.collapse.memory_correlation is not None:
        save_figure(heatmap_figure(found.collapse.memory_correlation, "memory tokens"), memory)
    write_text(folder / ANALYSIS_FILE, to_json(asdict(found), indent=1, ensure_ascii=False))


def live_compressor(model: SentenceTransformer) -> Compressor | None:
    """The compressor of a live encoder; None for any other model."""
    found = getattr(model[0], "compressor", None)
    return found if isinstance(found, Compressor) else None


def _memory(
    model: SentenceTransformer, compressor: Compressor | None, texts: Sequence[str]
) -> Tensor | None:
    """Memory states of the texts, memory_NKD; None for a model without memory tokens."""
    if compressor is not None:
        module: Any = model[0]
        return memory_states(compressor, compressor.backbone.tokenise(texts, module.max_tokens))
    names = memory_names(model)
    if names is None:
        return None
    count, inputs = len(names), Inputs.of(model, texts, prompt="")

    def compute(places: list[int]) -> Tensor:
        features = inputs.features(places)
        lengths_B = features["attention_mask"].sum(1)  # padded on the right, memory last
        states_BTD: Tensor = model[0](features)["token_embeddings"]
        places_BK = lengths_B[:, None] - count + torch.arange(count, device=lengths_B.device)
        return states_BTD.gather(1, places_BK[..., None].expand(-1, -1, states_BTD.shape[-1]))

    return in_batches(inputs.lengths, compute, Budget.of(model.device))


def _embeddings(
    model: SentenceTransformer, compressor: Compressor | None, texts: Sequence[str]
) -> tuple[Tensor | None, NDArray[np.float32]]:
    """Memory states, None without memory tokens, and embeddings."""
    states_NKD = _memory(model, compressor, texts)
    if compressor is None or states_NKD is None:
        return states_NKD, embed(model, texts).embeddings_ND
    with torch.no_grad():
        embeddings_ND = np.asarray(compressor.pool(states_NKD).cpu().numpy())
    # a pooled state is no memory token
    return (states_NKD if compressor.memory.count else None, embeddings_ND)
