"""Texts that show what a server does otherwise: short, long, empty, in many scripts, as a query."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from llm2comp.storage.golden import GOLDEN_TEXTS
from llm2comp.system.console import Role


@dataclass(frozen=True)
class Probe:
    """A text, what it is there for, and in which role it is sent (None: without a prompt)."""

    case: str
    text: str
    role: Role | None = None


SHORT = (
    GOLDEN_TEXTS[0],
    "tea",
    "The second sentence of this text is longer than its first. So are batches of unlike lengths "
    "padded, and whoever reads padding as text is found out.",
)
LOOK_ALIKES = "<s> </s> <|endoftext|> <mem_0> [CLS] <pad> <bos> is what special tokens look like"
QUESTION = "which memory keeps what a text said?"


def probes(prompts: Mapping[str, str | None]) -> list[Probe]:
    """All probes of an encoder with these stored prompts; roles only where they have one."""
    plain = [Probe("short", text) for text in SHORT]
    plain += [Probe("Unicode", GOLDEN_TEXTS[1])]
    plain += [Probe("decomposed", unicodedata.normalize("NFD", GOLDEN_TEXTS[1]))]
    plain += [
        Probe("special tokens", LOOK_ALIKES),
        Probe("long", GOLDEN_TEXTS[2]),
        Probe("empty", ""),
    ]
    roles: tuple[Role, ...] = ("query", "document")
    asked = [role for role in roles if prompts.get(role)]
    return plain + [Probe(role, text, role) for role in asked for text in (QUESTION, SHORT[0])]
