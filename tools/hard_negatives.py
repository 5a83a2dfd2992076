"""Give training pairs hard negatives: texts that an encoder ranks high for an anchor, though below
its positive.

    python tools/hard_negatives.py --model runs/tiny-general data/general/squad.jsonl
    data/general/medquad.jsonl ...

1. read {"anchor", "positive"} rows of each file, `--rows` of them at most (a fixed sample)
2. embed anchors and positives with `--model` (whatever llm2comp.load takes); sentence-transformers'
   `mine_hard_negatives` ranks each file's positives for each anchor, and drops those whose score is
   above (1 − `--margin`) of the positive's: they may well answer the anchor too. From what is left
   it takes the best `--negatives`
3. NAME-hard.jsonl beside each NAME.jsonl: anchor, positive, negative (or negative_1, ...), in one
   step; pairs that found too few negatives are left out, and counted
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives

from backbone_store import Parser, positive_int
from backbone_text import read_corpus
from general_data import write
from llm2comp.errors import Llm2CompError
from llm2comp.storage.loading import load


def mined(
    pairs: list[dict[str, str]], model: Any, args: argparse.Namespace
) -> list[dict[str, str]]:
    """Rows of anchor, positive and negatives."""
    found: Any = mine_hard_negatives(
        Dataset.from_list([{key: pair[key] for key in ("anchor", "positive")} for pair in pairs]),
        model,
        anchor_column_name="anchor",
        positive_column_name="positive",
        range_max=args.candidates,
        relative_margin=args.margin,
        num_negatives=args.negatives,
        output_format="n-tuple",
        batch_size=args.batch_size,
        verbose=False,
    )
    names = found.column_names if args.negatives > 1 else ["anchor", "positive", "negative"]
    return [dict(zip(names, row.values(), strict=True)) for row in found]


def main() -> None:
    """Parse the arguments and run the steps."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="jsonl files of pairs")
    parser.add_argument(
        "--model", required=True, help="encoder that ranks, as llm2comp.load takes it"
    )
    parser.add_argument("--rows", type=positive_int, default=20_000, help="pairs of a file at most")
    parser.add_argument("--negatives", type=positive_int, default=1)
    parser.add_argument(
        "--candidates", type=positive_int, default=50, help="ranks that negatives may come from"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.05,
        help="part of the positive's score that a negative stays below",
    )
    parser.add_argument("--batch-size", type=positive_int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if missing := [str(file) for file in args.files if not file.is_file()]:
        raise SystemExit(f"{', '.join(missing)}: no such file")
    try:
        model = load(args.model)
    except Llm2CompError as error:
        raise SystemExit(f"--model: {error}") from None
    for file in args.files:
        pairs = list(read_corpus(file, ("anchor", "positive")))
        sample = random.Random(args.seed).sample(pairs, min(args.rows, len(pairs)))
        out = file.with_name(f"{file.stem}-hard.jsonl")
        count = write(out, mined(sample, model, args))
        print(
            json.dumps({"file": str(out), "pairs": len(sample), "with hard negatives": count}),
            flush=True,
        )


if __name__ == "__main__":
    main()
