"""What the finished backbone is written with: held-out perplexity, model card, folder."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from backbone_store import MIB, Data, new_folder, write_json


@torch.no_grad()
def perplexity_per_word(model: Any, data: Data, context: int, rows: int) -> dict[str, float]:
    """exp(total negative log-likelihood / whitespace words) of the held-out documents by source,
    and of `all`.

    Documents are cut into pieces of context - 1 tokens, each read after BOS; `rows` pieces at a
    time, longest first.
    """
    model.eval()
    bos, pieces = data.about["ids"]["bos"], []
    nll, words = defaultdict[str, float](float), defaultdict[str, int](int)
    for document in data.heldout:
        ids = document["ids"]
        pieces += [
            (document["source"], ids[at : at + context - 1])
            for at in range(0, len(ids), context - 1)
        ]
        for key in (document["source"], "all"):
            words[key] += document["words"]
    pieces.sort(key=lambda piece: len(piece[1]), reverse=True)
    for start in range(0, len(pieces), rows):
        batch = pieces[start : start + rows]
        width = len(batch[0][1])
        ids_BT = torch.tensor(
            [[bos, *ids, *[bos] * (width - len(ids))] for _, ids in batch], device=model.device
        )
        logits_BTV = model(input_ids=ids_BT).logits[:, :-1].float()
        nll_BT = torch.nn.functional.cross_entropy(
            logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none"
        ).cpu()
        for (source, ids), nll_T in zip(batch, nll_BT, strict=True):
            for key in (source, "all"):
                nll[key] += nll_T[: len(ids)].double().sum().item()
    return {key: math.exp(nll[key] / words[key]) for key in sorted(nll)}


def model_card(data: Data, figures: dict[str, Any]) -> str:
    """The README.md of the packaged backbone."""
    parameters = figures["parameters"] / 1e6
    settings, about = figures["settings"], data.about
    licences = {
        licence for source in about["sources"].values() for licence in source["licences"].values()
    }
    share_alike = any("BY-SA" in licence for licence in licences)
    why = "As part of the data is CC-BY-SA, the weights are" if share_alike else "The weights are"
    sources = "\n".join(
        f"| {name} | {source['documents']:,} | {source['characters'] / 1e6:.1f} | "
        f"{source['tokens'] / 1e6:.2f} "
        f"| {'; '.join(f'{part}: {licence}' for part, licence in source['licences'].items())} |"
        for name, source in about["sources"].items()
    )
    dropped = ", ".join(
        f"{count:,} {reason}" for reason, count in about["dropped_paragraphs"].items()
    )
    perplexity = "\n".join(
        f"| {key} | {value:.1f} |" for key, value in figures["perplexity_per_word"].items()
    )
    return f"""---
language: en
license: {"cc-by-sa-4.0" if share_alike else "cc-by-4.0"}
library_name: transformers
---
# llm2comp tiny backbone

A Llama-architecture causal language model with {parameters:.1f} M parameters and its own
byte-level BPE tokenizer ({about["vocab"]:,} tokens), made to try LLM2Comp without a download.
It is no chat model and knows little.

Hidden {settings["hidden_size"]}, intermediate {settings["intermediate_size"]},
{settings["num_hidden_layers"]} layers, {settings["num_attention_heads"]} heads,
context {settings["context"]}; weights stored in bfloat16, {figures["mebibytes"]:.1f} MiB.
Trained on {figures["tokens"]:,} tokens in {figures["steps"]:,} steps,
{figures["epochs"]:.2f} epochs, seed {settings["seed"]};
{figures["cpu_minutes"]} CPU minutes, {figures["wall_minutes"]} minutes of wall time on
{figures["device"]};
final loss {figures["final_loss"]}.

    {about["command"]}
    {figures["command"]}

## Data and licences
| corpus | documents | M characters | M tokens | licences |
|---|---|---|---|---|
{sources}

Paragraphs left out: {dropped}. {why} offered under CC-BY{"-SA" if share_alike else ""} 4.0.

## Held-out perplexity per word ({len(data.heldout)} documents never trained on)
| source | perplexity |
|---|---|
{perplexity}

Loss over training: `training.json`.
"""


def write_model(
    out: Path, model: Any, data: Data, figures: dict[str, Any], max_mib: float
) -> float:
    """Write the folder `out`: bfloat16 weights, tokenizer, README.md, training.json.

    Returns the weights' size in MiB.

    Raises:
        SystemExit: the weights' file is larger than `max_mib`; nothing is written then.
    """
    with new_folder(out, "training.json") as folder:
        copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(folder)
        shutil.copytree(data.tokenizer, folder, dirs_exist_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        write_json(
            folder / "tokenizer_config.json",
            {**config, "model_max_length": figures["settings"]["context"]},
        )
        size = (folder / "model.safetensors").stat().st_size / MIB
        check_size(size, max_mib)
        figures = {**figures, "mebibytes": round(size, 2)}
        write_json(folder / "training.json", figures)
        (folder / "README.md").write_text(model_card(data, figures), encoding="utf-8")
    return size


def check_size(mebibytes: float, max_mib: float) -> None:
    """Raises SystemExit if the weights' file is, or would be, too large to be shipped."""
    if mebibytes > max_mib:
        raise SystemExit(
            f"model.safetensors: {mebibytes:.1f} MiB, over --max-mib {max_mib:g}; make "
            "the model smaller"
        )
