"""A causal LM in a GGUF file (llama.cpp's format), converted once into the user's cache.

CACHE/models/<name>-<digest>/   model.safetensors, config, tokenizer, README.md (the licence)
                                converted.json, written last: `Converted`

transformers reads the file; what is kept are plain weights, which every other part of this package
takes as any local model.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import ValidationError
from tokenizers import pre_tokenizers, processors

from llm2comp.errors import BackboneError, one_line
from llm2comp.recipe import Section
from llm2comp.system.cache import cache_folder, cached, flush
from llm2comp.system.console import console, say
from llm2comp.system.files import sha256, to_json, write_text
from llm2comp.system.folders import new_folder

MANIFEST_FILE = "converted.json"
# To be raised when the code makes other files of the same GGUF: what an older version left is then
# made anew.
FORMAT_VERSION: Literal[1] = 1
READ = (
    "a GGUF that transformers reads: Llama, Qwen, Gemma, Mistral and others, whole and in one file"
)
_CARD = """---
license: {licence}
---
# {name}

Made by llm2comp from a GGUF file (SHA-256 {digest}), as plain weights in {dtype}.
"""


class Converted(Section):
    """What a converted folder was made from, and the size of each of its files."""

    format_version: Literal[1]
    gguf: str
    files: dict[str, int]


@dataclass(frozen=True)
class _Header:
    """The plain facts at a file's head, and the dtype of most weights (quantised: bfloat16)."""

    facts: dict[str, Any]
    dtype: torch.dtype

    @classmethod
    def of(cls, file: Path) -> _Header:
        """Read it. Raises ValueError, or what the reader raises on a damaged file."""
        from gguf import GGUFReader, GGUFValueType

        reader = GGUFReader(file)
        facts = {
            key: field.contents()
            for key, field in reader.fields.items()
            if field.types[0] != GGUFValueType.ARRAY
        }
        if facts.get("split.count", 0) > 1:
            raise ValueError("one part of several; join them with llama.cpp's gguf-split --merge")
        if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
            say(
                f"{file}: transformers does not read its scaling of positions; for long "
                "texts take the model's own repository"
            )
        kinds: Counter[str] = Counter()
        for tensor in reader.tensors:
            kinds[tensor.tensor_type.name] += int(tensor.n_elements)
        if not kinds:
            raise ValueError("no weights in it")
        return cls(
            facts,
            {"F32": torch.float32, "F16": torch.float16}.get(
                kinds.most_common(1)[0][0], torch.bfloat16
            ),
        )


def converted_folder(name: str, digest: str) -> Path:
    """Where the GGUF of this SHA-256 goes."""
    return cache_folder() / "models" / f"{name}-{digest[:16]}"


def converted_file(file: Path) -> Path:
    """The folder made from a GGUF file, now or before.

    Raises:
        BackboneError: no such file, or none that transformers reads. RunError: the cache cannot be
            written.
    """
    if not file.is_file():
        raise BackboneError("no such file", where=str(file), expected=READ)
    stat = file.stat()
    digest = _digest(file.absolute(), stat.st_size, stat.st_mtime_ns)
    return converted(
        converted_folder(file.stem, digest), digest, str(file), lambda: contextlib.nullcontext(file)
    )


@functools.cache
def _digest(file: Path, size: int, changed: int) -> str:
    return sha256(file)


def converted(
    folder: Path,
    digest: str,
    name: str,
    found: Callable[[], contextlib.AbstractContextManager[Path]],
    bos: str | None = None,
) -> Path:
    """A converted folder: whole from before, else made now, by one process at a time.

    Args:
        folder: where.
        digest: SHA-256 of the GGUF.
        name: of the model, for messages.
        found: gives the GGUF's place, when it is needed.
        bos: a special token that the tokenizer is to put before every text; None: as the file says.

    Raises:
        BackboneError: transformers cannot read the file, or not all of it. RunError: the cache
            cannot be written.
    """

    def build() -> Path:
        if folder.is_dir():
            say(f"{name}: {folder} is damaged or of another version of llm2comp, made anew")
        with found() as file:
            say(f"{name}: converting for {folder}, once")
            with _explained(name):
                header = _Header.of(file)
            with new_folder(folder, None) as new, _quiet():
                _convert(file, header, new, digest, name, bos)
                for path in new.iterdir():
                    flush(path)
                files = {path.name: path.stat().st_size for path in new.iterdir()}
                whole = Converted(format_version=FORMAT_VERSION, gguf=digest, files=files)
                write_text(new / MANIFEST_FILE, whole.model_dump_json(indent=1))
        return folder

    return cached(folder, lambda: folder if is_whole(folder, digest) else None, build)


def is_whole(folder: Path, digest: str) -> bool:
    """Whether a folder is all that this version makes of the GGUF of this SHA-256."""
    told = manifest(folder)
    return told is not None and told.gguf == digest


def manifest(folder: Path) -> Converted | None:
    """What a whole converted folder was made from; None for any other folder."""
    try:
        told = Converted.model_validate_json((folder / MANIFEST_FILE).read_bytes())
        sizes = {name: (folder / name).stat().st_size for name in told.files}
    except (OSError, ValidationError):
        return None
    return told if sizes == told.files else None


def _convert(
    file: Path, header: _Header, folder: Path, digest: str, name: str, bos: str | None
) -> None:
    with _explained(name):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name
        )
        lm = _dense(file, header.dtype, name)
    # transformers knows no such splitting: each digit by itself
    if header.facts.get("tokenizer.ggml.pre") == "smollm":
        splits = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    if bos is not None:
        lm.config.bos_token_id = lm.generation_config.bos_token_id = (
            tokenizer.convert_tokens_to_ids(bos)
        )
        tokenizer.bos_token = bos
        start = (bos, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[start]
        )
    if (positions := getattr(lm.config, "max_position_embeddings", None)) is not None:
        tokenizer.model_max_length = positions
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    licence = to_json(header.facts.get("general.license", "unknown"))
    plain = str(header.dtype).removeprefix("torch.")
    write_text(
        folder / "README.md",
        _CARD.format(licence=licence, name=file.stem, digest=digest, dtype=plain),
    )


def _dense(file: Path, dtype: torch.dtype, name: str) -> Any:
    """The LM with plain weights, free of all that calls it quantised."""
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions may leave weights packed otherwise
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, output_loading_info=True, **dense
    )
    lm, told = loaded
    if told["missing_keys"]:
        missing = sorted(told["missing_keys"])
        raise BackboneError(
            "lacks weights", where=name, found=f"no {', '.join(missing[:3])}, {len(missing)} in all"
        )
    lm.hf_quantizer = None
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
    return lm


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Inside, whatever the libraries say about a file is one clear error."""
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:  # a damaged file ends in many kinds
        reason = one_line(error) or type(error).__name__
        fix = "fetch the file again, or choose another model"
        raise BackboneError(
            f"cannot be read: {reason}", where=name, expected=READ, fix=fix
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the libraries' advice stays off the screen, and bars off what is no terminal."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with (
            contextlib.nullcontext()
            if console.is_terminal
            else contextlib.redirect_stderr(io.StringIO())
        ):
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
