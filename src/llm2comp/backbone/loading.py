"""From a name to a Backbone that has shown it can do what the method needs."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

from llm2comp.backbone.families import BUILTIN_MODELS
from llm2comp.backbone.model import Backbone
from llm2comp.errors import BackboneError
from llm2comp.recipe import ModelSettings

log = logging.getLogger(__name__)

PROBE_TOKENS = 6
MIB = 2**20


def resolve_device(name: str) -> torch.device:
    """`auto` = cuda (under a launcher: this process's own), else mps, else cpu.

    Raises:
        BackboneError: no device of that name, or not on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(
            "no such device here", where="model.device", found=name, expected="auto, cpu, cuda, cuda:1 or mps"
        ) from error
    return device


def model_source(settings: ModelSettings) -> str:
    """Folder or Hub id that a model name stands for. Raises BackboneError for an unknown builtin."""
    if settings.name.startswith("builtin:") and settings.name not in BUILTIN_MODELS:
        raise BackboneError(
            "no such builtin model", where="model.name", found=settings.name, expected=", ".join(BUILTIN_MODELS)
        )
    return str(BUILTIN_MODELS.get(settings.name, settings.name))


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer. Raises BackboneError when it cannot be loaded."""
    with _explained(settings.name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_source(settings), revision=settings.revision)
    if not tokenizer.is_fast:
        raise BackboneError(
            "has no fast tokenizer, which the exported encoder needs", where=settings.name, expected="a tokenizer.json"
        )
    return tokenizer


def load_config(settings: ModelSettings) -> Any:
    """The model's configuration. Raises BackboneError when it cannot be loaded."""
    with _explained(settings.name):
        return transformers.AutoConfig.from_pretrained(model_source(settings), revision=settings.revision)


def load_skeleton(settings: ModelSettings) -> Any:
    """The model without weights (meta tensors), from its configuration. Raises BackboneError when it cannot be made."""
    config = load_config(settings)
    with _explained(settings.name), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def weights_digest(settings: ModelSettings) -> str:
    """Hex digest that changes with the files of a local or builtin model: of each, its size and its first and last MiB.

    Empty for a Hub id, which `revision` pins.
    """
    folder = Path(model_source(settings))
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted(path for pattern in ("*.safetensors", "*.json") for path in folder.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(MIB))
            stream.seek(max(0, size - MIB))
            digest.update(stream.read(MIB))
    return digest.hexdigest()


def base_licence(settings: ModelSettings) -> str:
    """Licence that the model's card names, or `unknown`; an encoder made from it cannot be freer."""
    folder = Path(model_source(settings))
    try:
        card = huggingface_hub.ModelCard.load(
            folder / "README.md" if folder.is_dir() else settings.name, ignore_metadata_errors=True
        )
    except Exception as error:  # no network, no file, a header that is not YAML: nothing to stop a run for
        log.info("%s: no model card (%s)", settings.name, type(error).__name__)
        return "unknown"
    return str(card.data.license or "unknown")


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what libraries raise on a broken or foreign file has no common base
        raise BackboneError(
            f"cannot be loaded: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            where=name,
            expected="a causal LM with safetensors weights: a Hub id, a local folder, or builtin:tiny",
            fix="check the name; gated models need `hf auth login`; offline, the files must be in the Hub cache",
        ) from error


def load_backbone(settings: ModelSettings) -> Backbone:
    """Load model and tokenizer, then probe them.

    Raises:
        BackboneError: not found, no safetensors, truncated, not a causal LM, or one that stays causal.
    """
    device = resolve_device(settings.device)
    tokenizer = load_tokenizer(settings)
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    loaded: Any
    with _explained(settings.name):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model_source(settings),
            revision=settings.revision,
            dtype=default if settings.dtype == "auto" else getattr(torch, settings.dtype),
            attn_implementation=settings.attention_implementation,
            use_safetensors=True,
            output_loading_info=True,
        )
    lm, told = loaded
    if told["missing_keys"]:  # transformers would fill them with noise
        missing = sorted(told["missing_keys"])
        raise BackboneError("lacks weights", where=settings.name, found=f"no {', '.join(missing[:3])}, {len(missing)} in all")
    backbone = Backbone(lm.to(device), tokenizer, settings.attention, settings.name)
    if backbone.bos_id is None:
        log.info("%s: the tokenizer has no BOS; texts start with their first token, the decoder with the memory", settings.name)
    if tokenizer.pad_token_id is None:
        log.info("%s: the tokenizer has no pad token; id 0 fills masked places", settings.name)
    probe(backbone)
    return backbone


@torch.no_grad()
def probe(backbone: Backbone) -> None:
    """Check on a few random tokens that attention is as asked and that `project` gives the LM's own logits.

    Raises:
        BackboneError: a bidirectional encoder whose first state ignores the last token, a causal one whose first state
            sees it, or a head that does more than this package knows.
    """
    table = backbone.embedding_table
    ids = torch.randint(len(table), (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(table.device)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + len(table) // 2) % len(table)
    mask = torch.ones_like(ids)
    try:
        first, second = (backbone.read(backbone.embed(x), mask)[0, 0].float() for x in (ids, other))
    except TypeError as error:
        raise BackboneError(f"cannot be run with is_causal=False: {error}", where=backbone.name) from error
    if not (first.isfinite().all() and second.isfinite().all()):
        fix = "set another model.dtype, or fetch the weights again: some are damaged"
        raise BackboneError("gives states that are not finite", where=backbone.name, fix=fix)
    moved = (first - second).abs().max().item() > 1e-6 * first.abs().max().item()
    if moved != (backbone.attention == "bidirectional"):
        raise BackboneError(
            f"cannot encode with {backbone.attention} attention",
            where=f"{backbone.name} (model_type {backbone.config.model_type})",
            found=f"the first state {'moves with' if moved else 'ignores'} the last token",
            fix="choose another backbone" if moved else "set model.attention: causal, or choose another backbone",
        )
    logits = backbone.project(backbone.decode(backbone.embed(ids), mask)[0]).float()
    own = backbone.lm(input_ids=ids, use_cache=False).logits[0].float()
    if logits.shape != own.shape or not torch.allclose(logits, own, rtol=1e-2, atol=1e-2 * own.abs().max().item()):
        raise BackboneError("the LM's head does more than a projection that is known here", where=backbone.name)
