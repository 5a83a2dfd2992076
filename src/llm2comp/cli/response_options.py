"""The options of `generate-responses`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ResponderOption = Annotated[
    str, typer.Option("--model", "-m", help="Causal LM: Hub id, folder or GGUF file.", metavar="LM")
]
PromptedTextsOption = Annotated[
    str, typer.Option(help="File of texts, or a Hub data set (its split train).", metavar="FILE")
]
ResponsesOption = Annotated[
    Path, typer.Option("--out", "-o", help="Folder to write; run again to resume.", metavar="DIR")
]
FirstTextsOption = Annotated[
    int | None, typer.Option(min=1, help="Use the first N texts.", metavar="N")
]
MaxNewTokensOption = Annotated[
    int, typer.Option(min=1, help="Longest response, in tokens.", metavar="N")
]
PromptTokensOption = Annotated[
    int, typer.Option(min=2, help="Longest prompt, in tokens; longer texts are cut.", metavar="N")
]
PromptOption = Annotated[
    str, typer.Option(help="Prompt for the LM; {text} is the text.", metavar="TEXT")
]
ChatTemplateOption = Annotated[
    bool | None,
    typer.Option(
        "--chat-template/--no-chat-template",
        help="Use the tokenizer's chat template; default: if it has one.",
    ),
]
TemperatureOption = Annotated[
    float, typer.Option(min=0, help="0: greedy decoding; above 0: sampling.", metavar="X")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the sampling.", metavar="N")]
TeacherOption = Annotated[
    str | None,
    typer.Option(help="Encoder; its embeddings of the responses are stored, too.", metavar="MODEL"),
]
ShardSizeOption = Annotated[
    int | None,
    typer.Option(min=1, help="Texts per file; default: as the folder has, or 200.", metavar="N"),
]
ShardsOption = Annotated[
    str,
    typer.Option(
        help="2/8: work on the second of eight shares of the texts (several machines).",
        metavar="I/N",
    ),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Texts at once.", metavar="N")]
RevisionOption = Annotated[
    str | None, typer.Option(help="Hub branch, tag or commit of the model.", metavar="NAME")
]
