"""The options of `analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AnalysedTextsOption = Annotated[
    str,
    typer.Option(
        help="File of texts; use more texts than the embedding has dimensions.", metavar="FILE"
    ),
]
RelatedPairsOption = Annotated[
    str | None,
    typer.Option(help="File of related texts, columns anchor and positive.", metavar="FILE"),
]
FirstRowsOption = Annotated[
    int, typer.Option(min=2, help="Use the first N texts and pairs.", metavar="N")
]
AnalysisOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder to write; default: analysis/ in the model's run, else llm2comp-analysis/.",
        metavar="DIR",
    ),
]
ThresholdOption = Annotated[
    float,
    typer.Option(min=-1, max=1, help="Merge memory tokens above this mean cosine.", metavar="X"),
]
WriteWeightsOption = Annotated[
    bool, typer.Option("--write-weights", help="Write the merged weights into the model.")
]
