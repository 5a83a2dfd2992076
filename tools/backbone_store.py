"""What the two steps of making the embedded backbone share: the data folder, whole files, plain
errors.

A data folder, written by `backbone_data.py` and read by `train_tiny_backbone.py`, holds
    tokens.bin       all documents as one uint16 stream, `<s>` before each document
    tokens.xz.NNN    the same, if packed: one xz stream cut into shards small enough to carry
    heldout.json     [{"source", "words", "ids"}]: the held-out documents, tokenised without `<s>`
    tokenizer/       the tokenizer's files
    data.json        counts, licences, seed, special ids, and the sha256 of each file above
Standard library and numpy only, so that it runs where little is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

MIB = 2**20
BLOCK = 4 * MIB
# lp, pb: values of two bytes
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lp": 1, "lc": 3, "pb": 1}]


class Parser(argparse.ArgumentParser):
    """Arguments from the command line; a bad one ends the tool with one line and exit code 1."""

    def error(self, message: str) -> NoReturn:
        """Raises SystemExit with the message."""
        raise SystemExit(f"{self.prog}: {message}")


def positive(text: str) -> float:
    """An argument that must be a finite number above 0. Raises ArgumentTypeError."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def positive_int(text: str) -> int:
    """An argument that must be a whole number above 0. Raises ArgumentTypeError."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text}")
    return value


def command(tool: str, parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command line that these arguments stand for: options that are not at their default, paths
    as DIR or FILES.
    """
    words = ["python", f"tools/{tool}"]
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if value == parser.get_default(name):
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, list):
            shown = ["=".join(map(str, part)) for part in value if isinstance(part, tuple)]
            words += [option, *(shown or ["FILES"])]
        else:
            words += [option, "DIR" if isinstance(value, Path) else str(value)]
    return " ".join(words)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file in one step: under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as out:
        out.write(json.dumps(value, ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


def refuse_foreign(folder: Path, marker: str) -> None:
    """Raises SystemExit if `folder` holds something that we did not write, as the file `marker`
    would show.
    """
    if folder.is_file() or (
        folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file()
    ):
        raise SystemExit(
            f"{folder}: holds something else (no {marker} in it); name another folder or empty it"
        )


@contextlib.contextmanager
def new_folder(folder: Path, marker: str) -> Iterator[Path]:
    """A folder to fill; on leaving without error it takes the place of `folder`, otherwise nothing
    changes there.
    """
    folder = folder.resolve()
    refuse_foreign(folder, marker)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def pack(tokens: Path, mebibytes: float) -> list[str]:
    """Compress `tokens` into shards of at most `mebibytes` beside it.

    Returns their names in order.
    """
    limit, names, pending = max(1, int(mebibytes * MIB)), list[str](), bytearray()
    compressor = lzma.LZMACompressor(filters=XZ)

    def write_shard() -> None:
        names.append(f"tokens.xz.{len(names):03d}")
        (tokens.parent / names[-1]).write_bytes(pending[:limit])
        del pending[:limit]

    with tokens.open("rb") as stream:
        while block := stream.read(BLOCK):
            pending += compressor.compress(block)
            while len(pending) > limit:
                write_shard()
    pending += compressor.flush()
    while pending:
        write_shard()
    return names


def unpack(folder: Path, names: list[str], digest: str) -> None:
    """Write tokens.bin from its shards, in one step.

    Raises:
        SystemExit: shards are missing, or what comes out has another sha256 than `digest`.
    """
    if not names:
        raise SystemExit(
            f"{folder}: no tokens.bin, and data.json names no shards; bring tokens.bin or pack it"
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise SystemExit(
            f"{folder}: no tokens.bin, and of {len(names)} shards these are missing: "
            f"{', '.join(missing)}"
        )
    part = folder / ".tokens.bin.part"
    decompressor = lzma.LZMADecompressor()
    try:
        with part.open("wb") as out:
            for name in names:
                out.write(decompressor.decompress((folder / name).read_bytes()))
    except (lzma.LZMAError, EOFError) as error:
        raise SystemExit(f"{folder}: the shards are damaged ({error}); bring them again") from error
    if sha256(part) != digest:
        raise SystemExit(
            f"{folder}: the shards are damaged or of another data.json; bring them again"
        )
    part.replace(folder / "tokens.bin")


@dataclass(frozen=True)
class Data:
    """A data folder that was checked against its data.json."""

    about: dict[str, Any]
    tokens_N: npt.NDArray[np.uint16]
    heldout: list[dict[str, Any]]
    tokenizer: Path


def open_data(folder: Path) -> Data:
    """Read a data folder, unpacking its shards if there is no tokens.bin.

    Raises:
        SystemExit: no such folder, or a file that is missing or not the one that data.json tells
            of.
    """
    if not (folder / "data.json").is_file():
        raise SystemExit(
            f"{folder}: no data.json there; make the folder with tools/backbone_data.py"
        )
    about = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    if not (folder / "tokens.bin").is_file():
        unpack(folder, about["shards"], about["sha256"]["tokens.bin"])
    for name, digest in about["sha256"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise SystemExit(
                f"{folder / name}: missing, or not the file that data.json tells of; make "
                "the data again"
            )
    tokens_N = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")
    heldout = json.loads((folder / "heldout.json").read_text(encoding="utf-8"))
    return Data(about, tokens_N, heldout, folder / "tokenizer")
