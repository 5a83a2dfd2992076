"""Pre-train the embedded backbone (`model: builtin:tiny`): a small Llama and its own BPE tokenizer.

    python tools/train_tiny_backbone.py --corpus DIR --out src/llm2comp/assets/tiny

1. read the corpora (jsonl.zst), drop repeated paragraphs, keep each source's share of the character budget
2. train a byte-level BPE tokenizer; write all documents as one uint16 stream, BOS before each document
3. next-token prediction on rows of `--context` tokens that start with BOS; Muon on matrices, AdamW on the rest,
   warm-up then linear decay over the *CPU-time* budget, so that the budget is kept whatever the machine's speed
4. held-out perplexity per word by source; model (bfloat16 safetensors), tokenizer, model card written to `--out`

It runs on a CPU (bfloat16 autocast and torch.compile help twofold). Seeded; not bit-reproducible, as the budget
is time.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARES = {  # part of the character budget that each corpus gets, at most all of it
    "encyclopaedia-core": 0.30,
    "encyclopaedia-wide": 0.12,
    "textbooks": 0.22,
    "technical": 0.20,
    "mixed": 0.10,
    "books": 0.06,
}
LICENCES = {
    "encyclopaedia-core": "English Wikipedia 2015, CC-BY-SA 3.0",
    "encyclopaedia-wide": "English Wikipedia, CC-BY-SA 3.0",
    "textbooks": "OpenStax books, CC-BY 4.0",
    "technical": "Python PEPs (public domain/CC0), Rust RFCs and book (MIT/Apache-2.0), Dive into Deep Learning (CC-BY-SA 4.0)",
    "mixed": "US government prose (public domain), MASC and OneStopEnglish (CC-BY-SA 4.0), arXiv abstracts (CC0)",
    "books": "classic books, public domain",
}


def read_corpus(path: Path) -> Iterator[dict[str, str]]:
    """Rows of one `.jsonl` or `.jsonl.zst` file."""
    with path.open("rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            yield json.loads(line)


def collect(corpus: Path, characters: int, seen: set[bytes]) -> dict[str, list[str]]:
    """Documents per source up to its share; a paragraph already seen anywhere is dropped."""
    documents: dict[str, list[str]] = {}
    for source, share in SHARES.items():
        budget, kept = int(characters * share), []
        for row in read_corpus(corpus / f"{source}.jsonl.zst"):
            paragraphs = []
            for paragraph in row["text"].split("\n\n"):
                key = hashlib.blake2b(" ".join(paragraph.lower().split()).encode(), digest_size=8).digest()
                if key not in seen:
                    seen.add(key)
                    paragraphs.append(paragraph)
            text = "\n\n".join(paragraphs)
            if len(text) >= 200:
                kept.append(text)
                budget -= len(text)
            if budget <= 0:
                break
        documents[source] = kept
        print(f"{source}: {len(kept):,} documents, {sum(map(len, kept)) / 1e6:.1f} M characters")
    return documents


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits split; `<s>` put before every text by the template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        padding_side="right",
    )


def tokenise(tokenizer: PreTrainedTokenizerFast, documents: dict[str, list[str]], path: Path, seed: int) -> int:
    """All documents, shuffled, as one uint16 stream on disk. Returns its length in tokens."""
    texts = [text for part in documents.values() for text in part]
    order = np.random.default_rng(seed).permutation(len(texts))
    total = 0
    with path.open("wb") as out:
        for start in range(0, len(order), 512):
            encoded = tokenizer([texts[i] for i in order[start : start + 512]], verbose=False)["input_ids"]
            ids = np.concatenate([np.asarray(row, dtype=np.uint16) for row in encoded])
            ids.tofile(out)
            total += len(ids)
    return total


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over 2 % of the budget, then linear decay to 2 % of the peak."""
    return peak * min(progress / 0.02, 1.0) * (0.02 + 0.98 * (1 - progress))


@torch.no_grad()
def perplexity_per_word(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> dict[str, float]:
    """exp(total negative log-likelihood / whitespace words) by source, on rows of one context length."""
    model.eval()
    context, bos = model.config.max_position_embeddings, tokenizer.bos_token_id
    nll: dict[str, float] = {}
    words: dict[str, int] = {}
    for row in read_corpus(path):
        ids = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
        total = 0.0
        for start in range(0, len(ids), context - 1):
            chunk = torch.tensor([[bos, *ids[start : start + context - 1]]])
            logits = model(input_ids=chunk).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, chunk[0, 1:], reduction="sum").item()
        for key in (row["source"], "all"):
            nll[key] = nll.get(key, 0.0) + total
            words[key] = words.get(key, 0) + len(row["text"].split())
    return {key: math.exp(nll[key] / words[key]) for key in sorted(nll)}


def train(model: LlamaForCausalLM, stream: np.ndarray, args: argparse.Namespace, bos: int) -> dict[str, Any]:
    """Train until `args.cpu_minutes` of this process's CPU time are spent. Returns the figures for the card."""
    rng = np.random.default_rng(args.seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    forward = torch.compile(model) if args.compile else model
    row_tokens, rows = args.context - 1, args.batch
    starts = rng.permutation(len(stream) // row_tokens - 1)
    begin_cpu, begin, step, epoch, curve = time.process_time(), time.time(), 0, 0, []
    model.train()
    while (spent := (time.process_time() - begin_cpu) / 60) < args.cpu_minutes:
        at = (step * rows) % (len(starts) - rows)
        if at < rows:
            epoch += 1
            starts = rng.permutation(starts)
        batch = [[bos, *stream[s * row_tokens : (s + 1) * row_tokens]] for s in starts[at : at + rows]]
        ids = torch.from_numpy(np.asarray(batch, dtype=np.int64))
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(spent / args.cpu_minutes, args.lr)
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            curve.append((step, round(loss.item(), 4)))
            rate = step * rows * args.context / (time.time() - begin)
            print(f"step {step} loss {loss.item():.3f} {spent:.1f}/{args.cpu_minutes} CPU min {rate:,.0f} tokens/s", flush=True)
    return {
        "steps": step,
        "epochs_started": epoch,
        "tokens": step * rows * args.context,
        "cpu_minutes": round((time.process_time() - begin_cpu) / 60, 1),
        "wall_minutes": round((time.time() - begin) / 60, 1),
        "final_loss": round(float(np.mean([value for _, value in curve[-10:]])), 3),
        "curve": curve,
    }


def model_card(args: argparse.Namespace, figures: dict[str, Any], parameters: int) -> str:
    """The README.md of the packaged backbone."""
    sources = "\n".join(f"- {name}: {LICENCES[name]}" for name in SHARES)
    perplexity = "\n".join(f"| {key} | {value:.1f} |" for key, value in figures["perplexity_per_word"].items())
    return f"""---
language: en
license: cc-by-sa-4.0
library_name: transformers
---
# llm2comp tiny backbone

A Llama-architecture causal language model with {parameters / 1e6:.1f} M parameters and its own byte-level BPE tokenizer
({args.vocab:,} tokens), made to try LLM2Comp without a download. It is no chat model and knows little.

Made by `tools/train_tiny_backbone.py`, seed {args.seed}: {figures["tokens"]:,} tokens in {figures["steps"]:,} steps,
{figures["cpu_minutes"]} CPU minutes, hidden {args.hidden}, {args.layers} layers, context {args.context};
weights stored in bfloat16.

## Data and licences
{sources}

As part of the data is CC-BY-SA, the weights are offered under CC-BY-SA 4.0.

## Held-out perplexity per word (300 documents never trained on)
| source | perplexity |
|---|---|
{perplexity}

Loss over training, one value each 20 steps: `training.json`.
"""


def main() -> None:
    """Parse the arguments and run the four steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the jsonl.zst corpora and heldout.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder to write model, tokenizer and card to")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-backbone"), help="folder for the token stream")
    parser.add_argument("--cpu-minutes", type=float, default=90.0, help="CPU time to spend on training, all cores counted")
    parser.add_argument("--characters", type=int, default=60_000_000, help="characters of text to draw from the corpora")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=512, help="tokens per row")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    heldout = {
        hashlib.blake2b(" ".join(p.lower().split()).encode(), digest_size=8).digest()
        for row in read_corpus(args.corpus / "heldout.jsonl")
        for p in row["text"].split("\n\n")
    }
    documents = collect(args.corpus, args.characters, heldout)
    sample = (text for part in documents.values() for text in part[::4])
    tokenizer = train_tokenizer(sample, args.vocab)
    total = tokenise(tokenizer, documents, args.work / "tokens.bin", args.seed)
    print(f"{total:,} tokens, {args.characters / total:.2f} characters a token")
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model: Any = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters")
    stream = np.memmap(args.work / "tokens.bin", dtype=np.uint16, mode="r")
    figures = train(model, stream, args, tokenizer.bos_token_id)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(args.out)
    figures["perplexity_per_word"] = perplexity_per_word(model, tokenizer, args.corpus / "heldout.jsonl")
    print(json.dumps({key: value for key, value in figures.items() if key != "curve"}, indent=1))
    (args.out / "training.json").write_text(json.dumps(figures) + "\n")
    (args.out / "README.md").write_text(model_card(args, figures, parameters))


if __name__ == "__main__":
    main()
