"""`python -m benchmarks.scaling`: what training and encoding need and cost, predicted, as the tables of docs/scaling.md.

`--check` runs small steps on this machine and holds the formulas against them. All else is arithmetic.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.scaling_costs import (
    GB,
    Load,
    Way,
    activation_bytes,
    limits,
    loads,
    logit_bytes,
    memory_bytes,
    place,
    sample_flops,
    text_tokens,
    traffic_bytes,
)
from benchmarks.scaling_inputs import GPUS, SHAPES, Assumed, Gpu, Model, read_model
from llm2comp.backbone.quiet import quiet_libraries
from llm2comp.errors import Llm2CompError
from llm2comp.recipe import load_recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "llama2-7b-paper.yaml"
NONE = "does not fit"
SHORTEST = 20  # twice the margin of the split


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def gigabytes(size: float) -> str:
    """Two digits that count."""
    return f"{size / GB:,.0f}" if size >= 9.95 * GB else f"{size / GB:.2g}"


def flops_table(models: Sequence[Model], work: Mapping[str, Load], assumed: Assumed) -> str:
    """GFLOPs per text token: model's, and with what the recipe's settings compute again."""
    lines = []
    for model in models:
        cells = []
        for load in work.values():
            checkpointing = load.stage is not None and load.stage.gradient_checkpointing
            way = Way("bf16", "DDP", 1, checkpointing, 1)
            per_token = [
                f"{x / sum(load.columns) / 1e9:,.1f}" for x in sample_flops(model.shape, load, way, assumed.memory_tokens)
            ]
            cells.append(" → ".join(dict.fromkeys(per_token)))
        lines.append([model.name, *cells])
    return table(["GFLOP per text token", *work], lines)


def memory_table(models: Sequence[Model], work: Mapping[str, Load], assumed: Assumed, gpus: int) -> str:
    """GB on one GPU, part by part."""

    def row(about: str, of: Any) -> list[str]:
        return [about, *(gigabytes(of(model)) for model in models)]

    lines = [row(f"base, {form}", lambda m, form=form: m.base[form]) for form in ("bf16", "nf4")]
    lines.append(row("adapter, its gradient, AdamW (16 bytes a weight)", lambda m: 16 * m.adapter))
    none = Way("bf16", "DDP", 1, False, 0)
    lines.append(row("logits of one chunk in stage 1", lambda m: logit_bytes(m.shape, work["pretext"], none)))
    for name, load in work.items():
        own = Way("bf16", "DDP", 8, False, min(load.batch, getattr(load.stage, "mini_batch_size", None) or load.batch))
        tokens = load.longest + assumed.memory_tokens
        about = f"activations, {name}: {own.at_once} texts of {tokens} positions{' and logits' * (name == 'pretext')}"
        both = [own] if load.stage is None else [own, replace(own, checkpointing=True)]
        cells = [" → ".join(gigabytes(activation_bytes(m.shape, load, way, assumed, tokens)) for way in both) for m in models]
        lines.append([about, *cells])
    scl = work["scl"]
    for sharding in ("DDP", "FSDP2", "ZeRO-3"):
        way = Way("bf16", sharding, gpus, True, 1)
        about = f"scl in all, bf16, checkpointing, a text at once, {sharding} on {gpus}"
        lines.append(row(about, lambda m, way=way: memory_bytes(m, scl, way, assumed)))
    return table(["GB per GPU", *(m.name for m in models)], lines)


def traffic_table(models: Sequence[Model], work: Mapping[str, Load], gpus: int) -> str:
    """GB that a GPU sends per step under the recipe's settings."""
    lines = []
    for name, load in work.items():
        if load.stage is None:
            continue
        for sharding in ("DDP", "FSDP2"):
            way = Way("bf16", sharding, gpus, load.stage.gradient_checkpointing, 1)
            share = way.share(load)
            way = replace(way, at_once=min(share, getattr(load.stage, "mini_batch_size", None) or share))
            lines.append([f"{name}, {share} per GPU, {sharding}", *(gigabytes(traffic_bytes(m, load, way)) for m in models)])
    return table([f"GB sent per step and GPU, {gpus} GPUs", *(m.name for m in models)], lines)


def placed(ways: Mapping[str, Way]) -> str:
    """`nf4; recomputed: scl 4`: under checkpointing, so many texts at once."""
    if not ways:
        return NONE
    extra = [f"{name} {way.at_once}" for name, way in ways.items() if way.checkpointing]
    return kind_of(ways) + (f"; recomputed: {', '.join(extra)}" if extra else "")


def kind_of(ways: Mapping[str, Way]) -> str:
    """`bf16`, on several GPUs `bf16, FSDP2`."""
    first = next(iter(ways.values()))
    return first.form if first.gpus == 1 else f"{first.form}, {first.sharding}"


def fits_table(models: Sequence[Model], work: Mapping[str, Load], assumed: Assumed, cards: Mapping[str, Gpu]) -> str:
    """How all three stages and encoding fit one card of each kind."""
    lines = [
        [f"{name} ({gpu.memory:g} GB)", *(placed(place(m, work, 1, gpu, assumed)) for m in models)]
        for name, gpu in cards.items()
    ]
    return table(["one card", *(m.name for m in models)], lines)


@dataclass(frozen=True)
class Asked:
    """What the table of costs is for."""

    counts: Sequence[int]  # numbers of GPUs
    card: str
    gpu: Gpu
    assumed: Assumed
    sharding: str | None = None


def cost_rows(model: Model, work: Mapping[str, Load], asked: Asked) -> Iterator[list[str]]:
    """A line per number of GPUs: tokens/s with the limit that binds, hours, price."""
    for gpus in asked.counts:
        ways = place(model, work, gpus, asked.gpu, asked.assumed, asked.sharding)
        if not ways:
            yield [model.name, str(gpus), NONE, *[""] * (len(work) + 3)]
            continue
        cells, hours = [], {}
        for name, way in ways.items():
            load, seconds = work[name], limits(model, work[name], way, asked.gpu, asked.assumed)
            bound = max(seconds, key=lambda kind: seconds[kind])
            mark = "" if bound == "compute" else f" {bound}"
            cells.append(f"{text_tokens(load, way) / seconds[bound]:,.0f}{mark}")
            hours[name] = math.ceil(load.samples / (way.share(load) * gpus)) * seconds[bound] / 3600
        training = sum(hours[name] for name in work if work[name].stage is not None)
        prices = [f"{x * gpus * asked.gpu.price:,.2f}" for x in (training, hours["encode"])]
        yield [model.name, str(gpus), kind_of(ways), *cells, f"{training:,.2f}", *prices]


def report(models: Sequence[Model], asked: Asked) -> str:
    """All tables."""
    assumed, gpu = asked.assumed, asked.gpu
    work = loads(load_recipe(RECIPE), assumed)
    cards = GPUS if GPUS.get(asked.card) == gpu else {asked.card: gpu}
    values = ", ".join(f"{f.name} {getattr(gpu, f.name):g}" for f in fields(gpu))
    others = ", ".join(f"{f.name} {getattr(assumed, f.name):,}" for f in fields(assumed))
    most = max((n for n in asked.counts if n <= assumed.node), default=asked.counts[0])
    head = ["model", "GPUs", "base", *(f"{name} tokens/s" for name in work), "hours", "price", "price, encode"]
    tables = [
        flops_table(models, work, assumed),
        memory_table(models, work, assumed, most),
        traffic_table(models, work, most),
        fits_table(models, work, assumed, cards),
        table(head, [row for model in models for row in cost_rows(model, work, asked)]),
    ]
    return "\n\n".join([f"Assumed, not measured. {asked.card}: {values}.\n{others}.", *tables])


def positive(kind: type, most: float = math.inf) -> Any:
    """A parser of numbers over 0."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not 0 < value <= most or math.isinf(value):
            limit = f" up to {most:g}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(
                f"expected {'a whole number' if kind is int else 'a number'} over 0{limit}, found {text!r}"
            )
        return value

    return parse


SHARES = ("hfu", "usable", "link_share", "bandwidth_share")


def make_parser() -> argparse.ArgumentParser:
    """Every number of `Gpu` and `Assumed` is an option of its name."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description="Predicted cost: docs/scaling.md", allow_abbrev=False
    )
    parser.add_argument(
        "--model", action="append", help=f"{', '.join(SHAPES)}, a folder, a config.json or a Hub id; several times"
    )
    parser.add_argument(
        "--gpu", choices=tuple(GPUS), default="h100", help="card of the table of costs; options below change it"
    )
    parser.add_argument("--gpus", nargs="+", type=positive(int), default=[1, 8, 64], help="how many")
    parser.add_argument("--sharding", choices=("DDP", "FSDP2", "ZeRO-3"), help="of bf16 weights; else what fits first")
    parser.add_argument("--check", action="store_true", help="measure small steps here and compare; takes minutes")
    for group, kind in (("the card", Gpu), ("other assumptions", Assumed)):
        options = parser.add_argument_group(group)
        for f in fields(kind):
            default = "" if kind is Gpu else f" ({f.default})"
            parse = positive(int if f.type == "int" else float, 1.0 if f.name in SHARES else math.inf)
            options.add_argument(f"--{f.name.replace('_', '-')}", type=parse, help=f"{f.metadata['about']}{default}")
    return parser


def changed(kind: Any, asked: argparse.Namespace) -> Any:
    """A dataclass with the options that were given."""
    given = {f.name: getattr(asked, f.name) for f in fields(kind)}
    return replace(kind, **{name: value for name, value in given.items() if value is not None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line."""
    quiet_libraries()
    parser = make_parser()
    asked = parser.parse_args(arguments)
    if asked.check:
        from benchmarks.scaling_check import check

        check()
        return
    gpu, assumed = changed(GPUS[asked.gpu], asked), changed(Assumed(), asked)
    if assumed.pretext_tokens < SHORTEST:
        parser.error(
            f"argument --pretext-tokens: expected at least {SHORTEST}, which can be split, found {assumed.pretext_tokens}"
        )
    name = asked.gpu if gpu == GPUS[asked.gpu] else f"{asked.gpu}, changed"
    try:
        models = [read_model(model) for model in asked.model or SHAPES]
    except Llm2CompError as error:
        parser.exit(2, f"error: {error}\n")
    print(report(models, Asked(asked.gpus, name, gpu, assumed, asked.sharding)))


if __name__ == "__main__":
    main()
