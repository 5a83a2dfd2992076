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
from torch import Tensor

from llm2comp.backbone.families import starting_token
from llm2comp.backbone.model import Backbone
from llm2comp.backbone.naming import check_name
from llm2comp.backbone.quantized import quantization_config
from llm2comp.backbone.sources import model_source
from llm2comp.errors import BackboneError, Llm2CompError
from llm2comp.hub import hub, not_at_hand
from llm2comp.recipe import ModelSettings
from llm2comp.tokens import position_ids

log = logging.getLogger(__name__)

PROBE_TOKENS = 6


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


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """What `model.dtype` means on a device.

    A CPU without instructions for bfloat16 emulates them: there float32 is four to five times as fast.
    """
    if name not in ("auto", "fastest"):
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    half = device.type != "cpu" or (name == "fastest" and multiplies_bfloat16())
    return torch.bfloat16 if half else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 matrices, as far as torch can tell."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in asked)


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer. Raises BackboneError when it cannot be loaded, or has no token that `bos` names."""
    with _explained(settings.name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_source(settings), revision=settings.revision)
        tokenizer("a trial: some damage shows only here", verbose=False)
    if not tokenizer.is_fast:
        raise BackboneError(
            "has no fast tokenizer, which the exported encoder needs", where=settings.name, expected="a tokenizer.json"
        )
    starting_token(tokenizer, settings.bos, settings.name)
    return tokenizer


def load_config(settings: ModelSettings) -> Any:
    """The model's configuration.

    Raises:
        BackboneError: it cannot be loaded, or is that of an encoder, an encoder-decoder or of a model that sees or hears.
    """
    check_name(settings.name)
    with _explained(settings.name):
        config = transformers.AutoConfig.from_pretrained(model_source(settings), revision=settings.revision)
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
    """The model without weights (meta tensors), from its configuration. Raises BackboneError when it cannot be made."""
    config = load_config(settings)
    with _explained(settings.name), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def base_licence(settings: ModelSettings) -> str:
    """Licence that the model's card names, or `unknown`; an encoder made from it cannot be freer."""
    folder = Path(model_source(settings))
    try:
        with hub(settings.name):
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
        with hub(name):
            yield
    except Llm2CompError:
        raise
    except Exception as error:  # what libraries raise on a broken or foreign file has no common base
        if (why := not_at_hand(name)) is not None:
            raise BackboneError(
                f"cannot be loaded: {why}", where=name, fix="check the name, or fetch the model first"
            ) from error
        raise BackboneError(
            f"cannot be loaded: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            where=name,
            expected="a causal LM: a Hub id or local folder with safetensors weights, a .gguf file, or builtin:smollm2",
            fix="check the name; gated models need `hf auth login`; offline, the files must be in the Hub cache",
        ) from error


def load_backbone(settings: ModelSettings) -> Backbone:
    """Load model and tokenizer, then probe them.

    Raises:
        BackboneError: not found, no safetensors, truncated, not a causal LM, or one that stays causal; quantization without
            bitsandbytes; no such `bos`.
    """
    device = resolve_device(settings.device)
    load_config(settings)
    tokenizer = load_tokenizer(settings)
    dtype = resolve_dtype(settings.dtype, device)
    quantized: dict[str, Any] = {}
    if settings.quantization:
        quantized = {"quantization_config": quantization_config(settings.quantization, dtype), "device_map": {"": device}}
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
        raise BackboneError("lacks weights", where=settings.name, found=f"no {', '.join(missing[:3])}, {len(missing)} in all")
    backbone = Backbone(lm if quantized else lm.to(device), tokenizer, settings.attention, settings.name, settings.bos)
    if backbone.bos_id is None:
        log.info("%s: no BOS; texts start with their first token, the decoder with the memory", settings.name)
    if tokenizer.pad_token_id is None:
        log.info("%s: the tokenizer has no pad token; id 0 fills masked places", settings.name)
    probe(backbone)
    return backbone


@torch.no_grad()
def probe(backbone: Backbone) -> None:
    """Check on a few random tokens that attention is as asked and masked, and that `project` gives the LM's own logits.

    Raises:
        BackboneError: an LM whose first state sees the last token, a bidirectional encoder whose first state ignores it,
            masked tokens that are not left out, or a head that does more than this package knows.
    """
    table = backbone.embedding_table
    ids = torch.randint(len(table), (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(table.device)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + len(table) // 2) % len(table)
    mask = torch.ones_like(ids)
    kind = f"{backbone.name} (model_type {backbone.config.model_type})"
    try:
        read, decoded = ([run(backbone.embed(x), mask)[0] for x in (ids, other)] for run in (backbone.read, backbone.decode))
    except (TypeError, AttributeError) as error:
        raise BackboneError(
            f"cannot be run as this method needs: {error}", where=kind, expected="a causal LM whose layers take is_causal=False"
        ) from error
    if not all(states.isfinite().all() for states in (*read, *decoded)):
        fix = "set another model.dtype, or fetch the weights again: some are damaged"
        raise BackboneError("gives states that are not finite", where=backbone.name, fix=fix)
    # a mixture of experts groups tokens by what all of them chose, so rounding alone may move the first state a little
    if _first_moves(decoded) > 4 * torch.finfo(decoded[0].dtype).eps:
        raise BackboneError(
            "is not a causal LM", where=kind, expected="a decoder-only model", found="the first state moves with the last token"
        )
    padded = backbone.decode(backbone.embed(torch.cat([other, ids], 1)), torch.cat([0 * mask, mask], 1))[0, PROBE_TOKENS:]
    if torch.cosine_similarity(padded.float(), decoded[0].float(), dim=-1).mean() < 0.9:
        raise BackboneError(
            "does not leave out masked tokens, so texts cannot share a batch", where=kind, fix="choose another backbone"
        )
    if backbone.attention == "bidirectional" and _first_moves(read) <= 1e-6:
        raise BackboneError(
            "cannot encode with bidirectional attention",
            where=kind,
            found="the first state ignores the last token",
            fix="set model.attention: causal, or choose another backbone",
        )
    with backbone.base_only():  # padded, as the LM's own pass is: packed attention rounds otherwise in half precision
        states = backbone._run(backbone.embed(ids), position_ids(mask), mask)[0]
    logits = backbone.project(states).float()
    own = backbone.lm(input_ids=ids, use_cache=False).logits[0].float()
    if logits.shape != own.shape or not torch.allclose(logits, own, rtol=1e-2, atol=1e-2 * own.abs().max().item()):
        raise BackboneError("the LM's head does more than a projection that is known here", where=backbone.name)


def _first_moves(states: list[Tensor]) -> float:
    """How far the first state of two texts differs, relative to its largest number."""
    first, second = (states_TD[0].float() for states_TD in states)
    return ((first - second).abs().max() / first.abs().max()).item()
