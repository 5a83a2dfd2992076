"""From a name to a Backbone that has shown it can do what the method needs."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

from llm2comp.errors import BackboneError, Llm2CompError
from llm2comp.model.backbone.families import starting_token
from llm2comp.model.backbone.model import Backbone
from llm2comp.model.backbone.naming import check_name
from llm2comp.model.backbone.probes import multiplies_bfloat16, probe
from llm2comp.model.backbone.quantized import quantization_config
from llm2comp.model.backbone.sources import model_source
from llm2comp.recipe import ModelSettings
from llm2comp.system.hub import hub, not_at_hand

log = logging.getLogger(__name__)


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
            "no such device here",
            where="model.device",
            found=name,
            expected="auto, cpu, cuda, cuda:1 or mps",
        ) from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """What `model.dtype` means on a device.

    A CPU without instructions for bfloat16 emulates them: there float32 is four to five times as
    fast.
    """
    if name not in ("auto", "fastest"):
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    half = device.type != "cpu" or (name == "fastest" and multiplies_bfloat16())
    return torch.bfloat16 if half else torch.float32


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer.

    Raises BackboneError when it cannot be loaded, or has no token that `bos` names.
    """
    with _explained(settings.name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model_source(settings), revision=settings.revision
        )
        tokenizer("a trial: some damage shows only here", verbose=False)
    if not tokenizer.is_fast:
        raise BackboneError(
            "has no fast tokenizer, which the exported encoder needs",
            where=settings.name,
            expected="a tokenizer.json",
        )
    starting_token(tokenizer, settings.bos, settings.name)
    return tokenizer


def load_config(settings: ModelSettings) -> Any:
    """The model's configuration.

    Raises:
        BackboneError: it cannot be loaded, or is that of an encoder, an encoder-decoder or of a
            model that sees or hears.
    """
    check_name(settings.name)
    with _explained(settings.name):
        config = transformers.AutoConfig.from_pretrained(
            model_source(settings), revision=settings.revision
        )
    other = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else None
    if any(hasattr(config, part) for part in ("vision_config", "audio_config")):
        other = "a model of more than text"
    if other:
        raise BackboneError(
            f"is {other}",
            where=f"{settings.name} (model_type {config.model_type})",
            expected="a decoder-only causal LM of texts (docs/backbones.md lists families)",
        )
    return config


def load_skeleton(settings: ModelSettings) -> Any:
    """The model without weights (meta tensors), from its configuration.

    Raises BackboneError when it cannot be made.
    """
    config = load_config(settings)
    with _explained(settings.name), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def base_licence(settings: ModelSettings) -> str:
    """Licence that the model's card names, or `unknown`; it binds an encoder made from it, too."""
    folder = Path(model_source(settings))
    with hub(settings.name):
        return licence_in(folder / "README.md" if folder.is_dir() else settings.name)


def licence_in(card: Path | str) -> str:
    """Licence that a model card names, a file's or a Hub id's; `unknown` where there is none."""
    try:
        found = huggingface_hub.ModelCard.load(card, ignore_metadata_errors=True)
    # no network, no file, a header that is not YAML: nothing to stop a run for
    except Exception as error:
        log.info("%s: no model card (%s)", card, type(error).__name__)
        return "unknown"
    return str(found.data.license or "unknown")


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        with hub(name):
            yield
    except Llm2CompError:
        raise
    # what libraries raise on a broken or foreign file has no common base
    except Exception as error:
        if (why := not_at_hand(name)) is not None:
            raise BackboneError(
                f"cannot be loaded: {why}",
                where=name,
                fix="check the name, or fetch the model first",
            ) from error
        raise BackboneError(
            f"cannot be loaded: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            where=name,
            expected="a causal LM: a Hub id or local folder with safetensors weights, a .gguf "
            "file, or builtin:smollm2",
            fix="check the name; gated models need `hf auth login`; offline, the files must "
            "be in the Hub cache",
        ) from error


def load_backbone(settings: ModelSettings) -> Backbone:
    """Load model and tokenizer, then probe them.

    Raises:
        BackboneError: not found, no safetensors, truncated, not a causal LM, or one that stays
            causal; quantization without bitsandbytes; no such `bos`.
    """
    device = resolve_device(settings.device)
    load_config(settings)
    tokenizer = load_tokenizer(settings)
    dtype = resolve_dtype(settings.dtype, device)
    quantized: dict[str, Any] = {}
    if settings.quantization:
        quantized = {
            "quantization_config": quantization_config(settings.quantization, dtype),
            "device_map": {"": device},
        }
    loaded: Any
    with _explained(settings.name):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model_source(settings),
            revision=settings.revision,
            dtype=dtype,
            attn_implementation=settings.attention_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **quantized,
        )
    lm, told = loaded
    if told["missing_keys"]:  # transformers would fill them with noise
        missing = sorted(told["missing_keys"])
        raise BackboneError(
            "lacks weights",
            where=settings.name,
            found=f"no {', '.join(missing[:3])}, {len(missing)} in all",
        )
    backbone = Backbone(
        lm if quantized else lm.to(device),
        tokenizer,
        settings.attention,
        settings.name,
        settings.bos,
    )
    backbone.settings = settings
    if backbone.bos_id is None:
        log.info(
            "%s: no BOS; texts start with their first token, the decoder with the memory",
            settings.name,
        )
    if tokenizer.pad_token_id is None:
        log.info("%s: the tokenizer has no pad token; id 0 fills masked places", settings.name)
    probe(backbone)
    return backbone
