r"""Put a trained run into the package: `builtin:general` (recipes/smollm2-general.yaml) or
`builtin:general-tiny`.

    RUN=runs/smollm2-general
    llm2comp evaluate $RUN tfidf --local DIR --out $RUN/scores
    python tools/package_encoder.py $RUN --last --counts data/general/counts.json \
        --out src/llm2comp/assets/general

1. the run's recipe and, of each stage, adapter and memory: the LM itself is not copied
2. golden.json: digest of the LM's weights, a few texts and their embeddings; a test holds both
   against what loads
3. README.md: data with licences and what was left out of it, settings, and the table of the scores
   in the run's summary

Adapters are stored in bfloat16 (`--float32`: as trained); the golden embeddings are those of what
is stored.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from backbone_store import MIB, Parser, new_folder, write_json
from llm2comp.errors import Llm2CompError
from llm2comp.lab.evaluation.summary import SCORES_FOLDER, SUMMARY_FILE, ModelScores, read_summary
from llm2comp.model.backbone import weights_digest
from llm2comp.model.compressor import STATE_FILE
from llm2comp.model.vectors import embed_texts
from llm2comp.recipe import Recipe
from llm2comp.runs.folder import CONFIG_FILE, DONE_FILE, FOLDERS, RECIPE_FILE, Run
from llm2comp.storage.loading import load
from llm2comp.storage.reweighting import reweight

ADAPTER_CONFIG = "adapter_config.json"
LICENCES = {
    "snli": "SNLI dev and test, CC-BY-SA 4.0",
    "squad": "SQuAD questions and sentences, CC-BY-SA 4.0",
    "medquad": "MedQuAD, CC-BY 4.0",
    "arxiv": "arXiv titles and abstracts, CC0",
}
CORPORA = (
    "Wikipedia 2015 (CC-BY-SA 3.0), OpenStax textbooks (CC-BY 4.0), technical documents (CC0, "
    "MIT, Apache, CC-BY-SA), US government texts, speeches, arXiv abstracts (CC0, public domain, "
    "CC-BY-SA 4.0), books (public domain)"
)
GOLDEN_TEXTS = (
    "Which planet has the most moons?",
    "Saturn has more moons than any other planet of the solar system.",
    "The central bank raised its interest rate by a quarter of a point.",
)


def copy_stages(run: Path, recipe: Recipe, out: Path, dtype: torch.dtype) -> None:
    """Recipe, and per stage what `Run.compressor` reads."""
    # Data lay below the current folder; nobody else has it at this machine's place.
    text = (run / RECIPE_FILE).read_text(encoding="utf-8").replace(f"{Path.cwd()}/", "")
    (out / RECIPE_FILE).write_text(text, encoding="utf-8")
    for name in recipe.stages:
        source, target = run / FOLDERS[name], out / FOLDERS[name]
        shutil.copytree(source / "adapter", target / "adapter")
        for file in (DONE_FILE, CONFIG_FILE):
            shutil.copyfile(source / file, target / file)
        shutil.copyfile(source / STATE_FILE, target / STATE_FILE)
        config = json.loads((source / "adapter" / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        write_json(
            target / "adapter" / ADAPTER_CONFIG,
            {**config, "base_model_name_or_path": recipe.model.name},
        )
        for weights in source.glob("adapter/*.safetensors"):
            tensors = {key: value.to(dtype) for key, value in load_file(weights).items()}
            save_file(tensors, target / "adapter" / weights.name)
            (target / "adapter" / weights.name).chmod(0o644)


def card(recipe: Recipe, rows: list[ModelScores], counts: dict[str, Any]) -> str:
    """The README.md of the packaged encoder."""
    sources = [Path(spec.source).stem for spec in recipe.scl.data] if recipe.scl else []
    unlabelled = ("texts, sentences",) if recipe.pretext or recipe.ucl else ()
    licences = {
        name: LICENCES.get(name.removesuffix("-hard"), CORPORA) for name in (*unlabelled, *sources)
    }
    data = "\n".join(f"| {name} | {licence} |" for name, licence in licences.items())
    dropped = "\n".join(f"- {count:,} × {why}" for why, count in counts["dropped"].items())
    stages = "\n".join(
        f"| {name} | {stage.steps:,} | {stage.batch_size} | {stage.schedule.peak:g} |"
        for name, stage in recipe.stages.items()
    )
    judges = recipe.scl.judges if recipe.scl else {}
    told = " and ".join(
        f"{judge.name} as {name.removeprefix('scl.')}" for name, judge in judges.items()
    )
    taught = f"SCL had {told}." if told else "No other encoder had a part in its training."
    models = " ".join(row.model for row in rows[1:])
    own = "general-tiny" if recipe.model.name == "builtin:tiny" else "general"
    return f"""---
language: en
license: cc-by-sa-4.0
library_name: sentence-transformers
pipeline_tag: sentence-similarity
---
# llm2comp general encoder

An English text encoder on `{recipe.model.name}`, trained by recipe `{recipe.name}`
(seed {recipe.seed}): {recipe.memory_tokens} memory tokens, {recipe.model.attention} attention,
LoRA of rank {recipe.adapter.rank}. The LM is not part of it. {taught}

| stage | steps | batch | learning rate |
|---|---|---|---|
{stages}

## Data and licences
| data | licence |
|---|---|
{data}

As part of the data is CC-BY-SA, the weights are offered under CC-BY-SA 4.0. Left out of the data
(`tools/general_data.py`):

{dropped}

## Evaluation
Development sets, in percent: Spearman of cosines (STS), average precision (MRPC), accuracy
(CLINC150, TREC: 16 texts a class), V-measure (StackOverflowTitles), nDCG@10 (CISI, Cranfield),
MAP (TrecQA).

    llm2comp evaluate builtin:{own} {models} --local DIR

{score_table(rows)}
"""


def score_table(rows: list[ModelScores]) -> str:
    """Markdown: a set per line, a model per column, the averages last."""
    columns = [("this encoder", rows[0]), *((row.model, row) for row in rows[1:])]
    sets = [name for name in rows[0].scores if all(name in row.scores for row in rows)]
    percent = {label: [100 * row.scores[name]["score"] for name in sets] for label, row in columns}
    lines = [f"| set | {' | '.join(percent)} |", f"|---|{'---|' * len(percent)}"]
    for place, name in enumerate(sets):
        lines.append(
            f"| {name.removeprefix('Local-')} | "
            f"{' | '.join(f'{column[place]:.1f}' for column in percent.values())} |"
        )
    means = (f"**{sum(column) / len(sets):.1f}**" for column in percent.values())
    return "\n".join([*lines, f"| **average** | {' | '.join(means)} |"])


def main() -> None:
    """Parse the arguments and run the steps."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, help="finished run directory, evaluated (its scores/summary.json)"
    )
    parser.add_argument("--counts", type=Path, required=True, help="counts.json of the data")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--last", action="store_true", help="read the last memory state alone (nested memory of 1)"
    )
    parser.add_argument("--float32", action="store_true", help="store adapters as trained")
    args = parser.parse_args()
    try:
        recipe, rows = Run(args.run).recipe, read_summary(args.run / SCORES_FOLDER / SUMMARY_FILE)
        # its own first
        rows.sort(key=lambda row: row.name != f"llm2comp/{args.run.resolve().name}")
        if not rows or rows[0].name != f"llm2comp/{args.run.resolve().name}":
            raise SystemExit(f"{args.run}: not evaluated; see the first command above")
        counts = json.loads(args.counts.read_text(encoding="utf-8"))
        with new_folder(args.out, RECIPE_FILE) as folder:
            copy_stages(args.run, recipe, folder, torch.float32 if args.float32 else torch.bfloat16)
            stage = folder / FOLDERS[list(recipe.stages)[-1]]
            if args.last:
                reweight(stage, [0.0] * (recipe.memory.tokens - 1) + [1.0])
            model = load(stage, "cpu", dtype="float32")
            embeddings = [
                [round(value, 6) for value in row]
                for row in embed_texts(model, GOLDEN_TEXTS).tolist()
            ]
            golden = {
                "backbone": weights_digest(recipe.model),
                "texts": list(GOLDEN_TEXTS),
                "embeddings": embeddings,
            }
            write_json(folder / "golden.json", golden)
            (folder / "README.md").write_text(card(recipe, rows, counts), encoding="utf-8")
    except (OSError, Llm2CompError) as error:
        raise SystemExit(str(error)) from None
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {size / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
