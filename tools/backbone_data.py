"""Turn text corpora into the token stream and the tokenizer that the embedded backbone is trained
on.

    python tools/backbone_data.py --corpus DIR --out DIR [--characters N] [--vocab 8192] [--pack
    MIB]

1. read NAME.jsonl.zst of each corpus ({"source", "license", "text"}), paragraphs being joined by
   blank lines
2. drop a paragraph that was seen before, that is in heldout.jsonl, or that contains a text of an
   `--exclude` file (any string of more than 30 characters in it; compared by words, without regard
   to case and punctuation)
3. stop at each corpus's share of `--characters`; a corpus gives at most all of it
4. train a byte-level BPE tokenizer on every fourth document
5. write all documents, shuffled, as one uint16 stream with `<s>` before each; tokenise the held-out
   documents
6. with `--pack`, compress the stream into shards of at most so many mebibytes
The folder (its layout: `backbone_store.py`) appears whole or not at all, and is the same for the
same arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from backbone_store import (
    Parser,
    command,
    new_folder,
    pack,
    positive,
    positive_int,
    refuse_foreign,
    sha256,
    write_json,
)
from backbone_text import Excluded, Sieve, fingerprint, read_corpus, read_excluded

SHARES = {  # part of `--characters` that each corpus may fill
    "encyclopaedia-core": 0.30,
    "encyclopaedia-wide": 0.12,
    "textbooks": 0.22,
    "technical": 0.20,
    "mixed": 0.10,
    "books": 0.06,
}
SPECIALS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}
MIN_CHARACTERS = 200  # of a document, after paragraphs were dropped


@dataclass
class Corpus:
    """What was kept of one corpus."""

    name: str
    texts: list[str] = field(default_factory=list)
    licences: dict[str, str] = field(default_factory=dict)  # source → licence, as the rows tell
    tokens: int = 0

    @property
    def characters(self) -> int:
        """Length of all texts."""
        return sum(map(len, self.texts))


def collect(
    folder: Path, shares: list[tuple[str, float]], characters: int, sieve: Sieve
) -> list[Corpus]:
    """The documents of each corpus up to its share of `characters`, without the paragraphs that the
    sieve holds back.
    """
    corpora = []
    for name, share in shares:
        corpus, budget = Corpus(name), int(characters * share)
        for row in read_corpus(folder / f"{name}.jsonl.zst"):
            if budget <= 0:
                break
            text = "\n\n".join(filter(sieve.passes, row["text"].split("\n\n")))
            if len(text) >= MIN_CHARACTERS:
                corpus.texts.append(text)
                corpus.licences[row["source"]] = row["license"]
                budget -= len(text)
        print(
            f"{name}: {len(corpus.texts):,} documents, {corpus.characters / 1e6:.1f} M characters",
            flush=True,
        )
        corpora.append(corpus)
    return corpora


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits split; `<s>` put before every text by the template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokens = {f"{name}_token": token for name, token in SPECIALS.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, padding_side="right", **tokens
    )


def tokenise(
    tokenizer: PreTrainedTokenizerFast, corpora: list[Corpus], path: Path, seed: int
) -> None:
    """All documents, shuffled, as one uint16 stream on disk; adds each document's tokens to its
    corpus.
    """
    documents = [(corpus, text) for corpus in corpora for text in corpus.texts]
    order = np.random.default_rng(seed).permutation(len(documents))
    with path.open("wb") as out:
        for start in range(0, len(order), 512):
            batch = [documents[i] for i in order[start : start + 512]]
            encoded = tokenizer([text for _, text in batch], verbose=False)["input_ids"]
            for (corpus, _), ids in zip(batch, encoded, strict=True):
                corpus.tokens += len(ids)
                np.asarray(ids, dtype=np.uint16).tofile(out)


def tokenise_heldout(tokenizer: PreTrainedTokenizerFast, rows: list[Any]) -> list[dict[str, Any]]:
    """Source, number of whitespace words and token ids (without `<s>`) of each held-out
    document.
    """
    encoded = tokenizer([row["text"] for row in rows], add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return [
        {"source": row["source"], "words": len(row["text"].split()), "ids": ids}
        for row, ids in zip(rows, encoded, strict=True)
    ]


def describe(
    args: argparse.Namespace, corpora: list[Corpus], sieve: Sieve, folder: Path
) -> dict[str, Any]:
    """The content of data.json; `hash` changes with anything that training reads."""
    files = [
        "tokens.bin",
        "heldout.json",
        *sorted(f"tokenizer/{file.name}" for file in (folder / "tokenizer").iterdir()),
    ]
    digests = {name: sha256(folder / name) for name in files}
    sources = {
        corpus.name: {
            "documents": len(corpus.texts),
            "characters": corpus.characters,
            "tokens": corpus.tokens,
            "licences": dict(sorted(corpus.licences.items())),
        }
        for corpus in corpora
    }
    return {
        "seed": args.seed,
        "sources": sources,
        "tokens": sum(corpus.tokens for corpus in corpora),
        "dropped_paragraphs": dict(sieve.dropped),
        "excluded_texts": len(sieve.excluded),
        "sha256": digests,
        "hash": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(),
    }


def share(text: str) -> tuple[str, float]:
    """NAME=SHARE, such as books=0.06. Raises ArgumentTypeError."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"expected NAME=SHARE such as books=0.06, found {text}")
    return name, positive(value)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus",
        type=Path,
        required=True,
        help="folder with the jsonl.zst corpora and heldout.jsonl",
    )
    parser.add_argument("--out", type=Path, required=True, help="data folder to write")
    parser.add_argument(
        "--characters", type=positive_int, default=60_000_000, help="characters to draw in all"
    )
    about = "corpora to read, and the part of --characters that each may fill; 1 each and many "
    parser.add_argument(
        "--shares",
        type=share,
        nargs="+",
        default=list(SHARES.items()),
        metavar="NAME=SHARE",
        help=f"{about}--characters take all",
    )
    parser.add_argument(
        "--exclude",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of evaluation sets",
    )
    parser.add_argument(
        "--vocab", type=positive_int, default=8192, help="tokens of the tokenizer, 259 to 65536"
    )
    parser.add_argument(
        "--pack",
        type=positive,
        metavar="MIB",
        help="also write compressed shards of at most so many MiB",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def build(args: argparse.Namespace, words: str, folder: Path) -> dict[str, Any]:
    """Fill a new data folder. Returns the content of its data.json."""
    heldout = list(read_corpus(args.corpus / "heldout.jsonl"))
    excluded = Excluded(text for path in args.exclude for text in read_excluded(path))
    sieve = Sieve({fingerprint(p) for row in heldout for p in row["text"].split("\n\n")}, excluded)
    corpora = collect(args.corpus, args.shares, args.characters, sieve)
    print(
        "paragraphs dropped:",
        ", ".join(f"{n:,} {reason}" for reason, n in sieve.dropped.items()),
        flush=True,
    )
    if not any(corpus.texts for corpus in corpora):
        raise SystemExit(f"{args.corpus}: no document of {MIN_CHARACTERS} characters is left")
    tokenizer = train_tokenizer(
        (text for corpus in corpora for text in corpus.texts[::4]), args.vocab
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenise(tokenizer, corpora, folder / "tokens.bin", args.seed)
    write_json(folder / "heldout.json", tokenise_heldout(tokenizer, heldout))
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIALS.items()}
    about = {
        "command": words,
        "vocab": len(tokenizer),
        "ids": ids,
        **describe(args, corpora, sieve, folder),
    }
    about["shards"] = pack(folder / "tokens.bin", args.pack) if args.pack else []
    write_json(folder / "data.json", about)
    return about


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments and write the data folder.

    Raises SystemExit with one line on a bad argument or file.
    """
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not 259 <= args.vocab <= 65536:
        raise SystemExit(
            "--vocab: expected 259 (bytes and special tokens) to 65536 (two bytes a "
            f"token), found {args.vocab}"
        )
    try:
        refuse_foreign(args.out, "data.json")
        with new_folder(args.out, "data.json") as folder:
            about = build(args, command("backbone_data.py", parser, args), folder)
    except OSError as error:
        raise SystemExit(f"{error.filename or args.out}: {error.strerror or error}") from error
    characters = sum(source["characters"] for source in about["sources"].values())
    print(
        f"{about['tokens']:,} tokens, {characters / about['tokens']:.2f} characters a "
        f"token, {len(about['shards'])} shards"
    )


if __name__ == "__main__":
    main()
