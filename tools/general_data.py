"""Prepare the data of `recipes/tiny-general.yaml`: texts for stages 1 and 2, pairs for stage 3,
nothing of the evaluation sets.

    python tools/general_data.py --data DIR --out data/general

1. read every text of the local evaluation sets; two texts are the same when their letters and
   digits are
2. corpora (jsonl.zst, {"id", "text"}): drop repeated paragraphs and those that hold an evaluation
   text
3. texts.jsonl: runs of whole paragraphs of 400 to 2,000 characters, for CTKD; sentences.jsonl:
   single sentences, for UCL
4. pairs from the corpora: encyclopaedia title → its first paragraph, sentence → the rest of its
   paragraph, paragraph → the next
5. given pairs (anchor, positive, negative): those whose licence lets a trained model be shipped; a
   repeated positive stays once
6. counts.json: rows, and what was dropped and why

Deterministic for one seed and one set of files. Every file appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from backbone_store import Parser, positive_int
from backbone_text import read_corpus, strings

CORPORA = ("encyclopaedia-core", "encyclopaedia-wide", "textbooks", "technical", "mixed", "books")
ENCYCLOPAEDIAS = ("encyclopaedia-core", "encyclopaedia-wide")
# licence: models may be shipped
GIVEN = ("snli.jsonl", "squad.jsonl", "medquad.jsonl.zst", "arxiv.jsonl.zst")
SHORTEST_LEAK = 25  # letters and digits; shorter evaluation texts stand anywhere
MIN_TEXT, MAX_TEXT, MAX_POSITIVE = 400, 2000, 1500
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


def plain(text: str) -> str:
    """Letters and digits alone, lower-cased: what two copies of a text share whatever their
    tokenisation.
    """
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def evaluation_texts(folder: Path) -> set[str]:
    """Every text of the evaluation sets, plain."""
    files = sorted(folder.rglob("*.jsonl"))
    if not files:
        raise SystemExit(f"{folder}: expected evaluation sets (*.jsonl) below it, found none")
    found = {
        plain(text) for file in files for row in read_corpus(file, ()) for text in strings(row)
    }
    return {text for text in found if len(text) >= SHORTEST_LEAK}


class Leaks:
    """Whether a text holds one of the evaluation texts: as a whole, as a sentence, or as
    neighbouring sentences.
    """

    def __init__(self, texts: set[str]) -> None:
        self.texts = texts

    def within(self, text: str) -> bool:
        """True if the text, a sentence of it, or two or three neighbouring sentences are an
        evaluation text.
        """
        sentences = [plain(sentence) for sentence in SENTENCE_END.split(text)]
        spans = (
            "".join(sentences[i : i + n]) for n in (1, 2, 3) for i in range(len(sentences) - n + 1)
        )
        return plain(text) in self.texts or any(span in self.texts for span in spans)


def documents(
    data: Path, leaks: Leaks, counts: Counter[str]
) -> Iterator[tuple[str, str, list[str]]]:
    """(corpus, id, paragraphs) without repeated or leaking paragraphs."""
    heldout = {
        plain(p)
        for row in read_corpus(data / "corpus" / "heldout.jsonl")
        for p in row["text"].split("\n\n")
    }
    seen = {hash(paragraph) for paragraph in heldout}
    for corpus in CORPORA:
        for row in read_corpus(data / "corpus" / f"{corpus}.jsonl.zst", ("id", "text")):
            kept = []
            for paragraph in row["text"].split("\n\n"):
                key = hash(plain(paragraph))
                if key in seen:
                    counts["paragraphs dropped: repeated or held out"] += 1
                elif leaks.within(paragraph):
                    counts["paragraphs dropped: in an evaluation set"] += 1
                else:
                    kept.append(paragraph.strip())
                seen.add(key)
            if kept:
                yield corpus, row["id"], kept


def texts_of(paragraphs: list[str]) -> Iterator[str]:
    """Whole paragraphs, joined until a text is long enough."""
    text = ""
    for paragraph in paragraphs:
        text = f"{text}\n\n{paragraph}" if text else paragraph
        if len(text) >= MIN_TEXT:
            yield text[:MAX_TEXT]
            text = ""


def weak_pairs(
    corpus: str, name: str, paragraphs: list[str], draw: random.Random
) -> Iterator[tuple[str, str, str]]:
    """(kind, anchor, positive) from one document: at most one of each kind, so that batches mix
    documents.
    """
    long = [p for p in paragraphs if len(p) >= 200]
    title = re.sub(r"#\d+$", "", name.partition(" ")[2])
    if corpus in ENCYCLOPAEDIAS and title and paragraphs:
        yield "title", title, paragraphs[0][:MAX_POSITIVE]
    if long:
        paragraph = draw.choice(long)
        sentences = SENTENCE_END.split(paragraph)
        if len(sentences) >= 3:
            place = draw.randrange(len(sentences))
            rest = " ".join(sentences[:place] + sentences[place + 1 :])
            if 30 <= len(sentences[place]) <= 400:
                yield "sentence", sentences[place], rest[:MAX_POSITIVE]
    neighbours = [
        (a, b)
        for a, b in zip(paragraphs, paragraphs[1:], strict=False)
        if min(len(a), len(b)) >= 150
    ]
    if neighbours:
        first, second = draw.choice(neighbours)
        yield "paragraph", first[:MAX_POSITIVE], second[:MAX_POSITIVE]


def given_pairs(file: Path, leaks: Leaks, counts: Counter[str]) -> Iterator[dict[str, str]]:
    """Pairs of one file without leaks; of those with the same anchor or positive the first."""
    seen: set[str] = set()
    name = file.name.partition(".")[0]
    for row in read_corpus(file, ("anchor", "positive")):
        texts = {
            key: str(row[key]).strip()[:MAX_POSITIVE]
            for key in ("anchor", "positive", "negative")
            if row.get(key)
        }
        keys = {plain(texts["anchor"]), plain(texts["positive"])}
        if any(leaks.within(text) for text in texts.values()):
            counts[f"{name}: dropped, in an evaluation set"] += 1
        elif keys & seen or len(keys) < 2 or "" in keys:
            counts[f"{name}: dropped, repeated anchor or positive"] += 1
        else:
            seen |= keys
            yield texts


def write(path: Path, rows: Iterable[dict[str, str]], most: int | None = None) -> int:
    """Write JSON lines in one step, no text longer than `most` characters. Returns their number."""
    temporary, count = path.with_name(f".{path.name}.part"), 0
    with temporary.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(
                json.dumps({key: text[:most] for key, text in row.items()}, ensure_ascii=False)
                + "\n"
            )
            count += 1
    temporary.replace(path)
    return count


def main() -> None:
    """Parse the arguments and run the steps."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with corpus/, pairs/ and eval/"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--texts",
        type=positive_int,
        default=200_000,
        help="at most so many texts, and as many sentences",
    )
    parser.add_argument(
        "--weak-pairs",
        type=positive_int,
        default=200_000,
        help="pairs of each kind from the corpora at most",
    )
    parser.add_argument(
        "--max-characters",
        type=positive_int,
        help="cut the texts of pairs to so many (default: 1,500)",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for part in ("corpus", "pairs", "eval"):
        if not (args.data / part).is_dir():
            raise SystemExit(
                f"{args.data / part}: no such folder; --data names the one that holds "
                "corpus/, pairs/ and eval/"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    leaks = Leaks(evaluation_texts(args.data / "eval"))
    texts: list[str] = []
    sentences: list[str] = []
    weak: dict[str, list[dict[str, str]]] = {"title": [], "sentence": [], "paragraph": []}
    for corpus, name, paragraphs in documents(args.data, leaks, counts):
        draw = random.Random(f"{args.seed}:{name}")
        texts += texts_of(paragraphs)
        sentences += [
            s for s in SENTENCE_END.split(draw.choice(paragraphs)) if 40 <= len(s) <= 300
        ][:4]
        for kind, anchor, positive in weak_pairs(corpus, name, paragraphs, draw):
            weak[kind].append({"anchor": anchor, "positive": positive})
    shuffle = random.Random(args.seed)
    shuffled: list[list[Any]] = [texts, sentences, *weak.values()]
    for items in shuffled:
        shuffle.shuffle(items)
    rows = {
        "texts": write(args.out / "texts.jsonl", ({"text": text} for text in texts[: args.texts]))
    }
    rows["sentences"] = write(
        args.out / "sentences.jsonl", ({"text": text} for text in sentences[: args.texts])
    )
    for kind, pairs in weak.items():
        rows[f"weak-{kind}"] = write(
            args.out / f"weak-{kind}.jsonl", pairs[: args.weak_pairs], args.max_characters
        )
    for given in GIVEN:
        stem = given.partition(".")[0]
        rows[stem] = write(
            args.out / f"{stem}.jsonl",
            given_pairs(args.data / "pairs" / given, leaks, counts),
            args.max_characters,
        )
    (args.out / "counts.json").write_text(
        json.dumps({"rows": rows, "dropped": dict(sorted(counts.items()))}, indent=1) + "\n"
    )
    print((args.out / "counts.json").read_text())


if __name__ == "__main__":
    main()
