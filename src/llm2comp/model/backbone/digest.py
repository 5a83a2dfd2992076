"""Which weights are these? A digest of a model's files, or its commit on the Hub.

The digest costs nothing the second time.

CACHE/digests/<key>   the digest of one file; the key is of its place, size, times and inode

A stage's result holds the digest of the base that it was trained over (`Base`), and is refused over
another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path
from typing import Any

import huggingface_hub
from pydantic import BaseModel

from llm2comp.errors import Llm2CompError, ModelFolderError
from llm2comp.model.backbone.gguf import manifest
from llm2comp.model.backbone.sources import model_source
from llm2comp.recipe import ModelSettings
from llm2comp.system.cache import cache_folder
from llm2comp.system.files import sha256, write_text

DIGESTS = "digests"
# What changes what a model makes of a text. A model's other files (cards, settings of generation,
# logs) may come and go.
FILES = (
    "*.safetensors",
    "*.gguf",
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "spiece.model",
)
# A file changed less than so many seconds ago may change again without another time: its digest is
# not kept.
SETTLED = 2.0


class Base(BaseModel):
    """The base that something was trained over: the name that it had then, and `weights_digest`."""

    name: str
    digest: str

    @classmethod
    def of(cls, settings: ModelSettings) -> Base:
        """The base that these settings load now."""
        return cls(name=settings.name, digest=weights_digest(settings))


def weights_digest(settings: ModelSettings) -> str:
    """Digest of a model's weights, configuration and tokenizer; of a Hub id, the commit.

    Of a GGUF, whoever converted it: that file's, and the version of the conversion. Empty for a Hub
    id of which nothing is in the Hub's cache: what it will be shows when it has been loaded.
    """
    place = Path(model_source(settings))
    if not place.exists():
        return hub_commit(settings.name, settings.revision)
    # The libraries write their version, and how they were called, into what they convert: the GGUF
    # is what stays the same.
    if (converted := manifest(place)) is not None:
        return hashlib.sha256(f"{converted.format_version}:{converted.gguf}".encode()).hexdigest()
    files = (
        [place]
        if place.is_file()
        else sorted({file for pattern in FILES for file in place.glob(pattern)})
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{file_digest(file)}".encode())
    return digest.hexdigest()


def hub_commit(name: str, revision: str | None = None) -> str:
    """Commit of a Hub id as it was last loaded; empty where the Hub's cache has nothing of it."""
    for file in ("config.json", "modules.json"):
        try:
            found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        except ValueError:  # not a name that the Hub can have
            return ""
        if isinstance(found, str):
            return Path(found).parent.name
    return ""


def file_digest(file: Path) -> str:
    """Hex digest of a file's content, from the cache if the file is the one that it was."""
    before = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{_state(before)}".encode()).hexdigest()[:32]
    kept = cache_folder() / DIGESTS / key
    try:
        if len(found := kept.read_text(encoding="ascii")) == 64:
            return found
    except (OSError, ValueError):
        pass
    found = sha256(file)
    if (
        _state(file.stat()) == _state(before)
        and time.time() - max(before.st_mtime, before.st_ctime) > SETTLED
    ):
        # a cache that cannot be written: the digest is made again next time
        with contextlib.suppress(Llm2CompError):
            write_text(kept, found)
    return found


def _state(stat: Any) -> tuple[int, ...]:
    """ctime, too: nobody sets it back, as copies and unpacking do with mtime."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino


def check_base(trained: Base, settings: ModelSettings, where: Path) -> None:
    """Raise ModelFolderError unless these settings load the base that was trained over."""
    now = Base.of(settings)
    if now.digest == trained.digest:
        return
    local = Path(model_source(settings)).exists()
    again = "train into another --out"
    fix = (
        f"put the base's files back, or {again}"
        if local
        else f"set model.revision: {trained.digest}, or {again}"
    )
    raise ModelFolderError(
        "was trained over another base: over this one its embeddings mean nothing",
        where=str(where),
        expected=f"{trained.name}, digest {trained.digest[:12]}",
        found=f"{now.name}, digest {now.digest[:12] or 'unknown'}",
        fix=fix,
    )
