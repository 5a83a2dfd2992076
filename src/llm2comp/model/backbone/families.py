"""What differs between model families, as tables and small look-ups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm2comp.errors import BackboneError
from llm2comp.recipe import nearest

# LoRA targets by `model_type`: q, v, o, gate, up, down as in the release (not k), where the family
# keeps them apart.
_ATTENTION = ("q_proj", "v_proj", "o_proj")
# parameters (E, out, in) over all E experts, not modules
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "mixtral": (*_ATTENTION, *_EXPERTS),
    "qwen3_moe": (*_ATTENTION, *_EXPERTS),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "opt": ("q_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "starcoder2": ("q_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
}
DEFAULT_LORA_TARGETS = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
_RATE_NAMES = ("attention_dropout", "attn_dropout", "dropout")


def lora_targets(model_type: str) -> tuple[str, ...]:
    """Names of the modules and expert weights that the default adapter of a family changes."""
    return LORA_TARGETS.get(model_type, DEFAULT_LORA_TARGETS)


def starting_token(tokenizer: Any, bos: str, where: str) -> int | None:
    """Id of the token that starts every text; None: no such token.

    Args:
        tokenizer: the LM's.
        bos: `auto`: BOS if the tokenizer itself puts it before a text; `none`; or a special token.
        where: the model's name, for messages.

    Raises:
        BackboneError: not a special token of this tokenizer.
    """
    if bos == "none":
        return None
    if bos == "auto":
        start: int | None = tokenizer.bos_token_id
        return (
            start
            if start is not None and tokenizer("x", verbose=False)["input_ids"][:1] == [start]
            else None
        )
    special = dict.fromkeys(
        (
            *tokenizer.all_special_tokens,
            *(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special),
        )
    )
    if bos not in special:
        expected = f"auto, none, or one of {', '.join(list(special)[:8])}"
        fix = nearest(bos, special)
        raise BackboneError(
            "no such special token",
            where=f"model.bos, {where}",
            expected=expected,
            found=bos,
            fix=fix,
        )
    return int(tokenizer.convert_tokens_to_ids(bos))


def split_targets(
    lm: nn.Module, targets: tuple[str, ...]
) -> tuple[list[str], list[str], list[str]]:
    """Sort target names: modules, experts' fused weights (3-D parameters), unknown ones."""
    modules = [f".{path}" for path, _ in lm.named_modules()]
    # adapters that are there already put `.base_layer` into the names of what they wrap
    experts = [
        f".{path}".replace(".base_layer", "")
        for path, weight in lm.named_parameters()
        if weight.ndim == 3
    ]
    found: tuple[list[str], list[str], list[str]] = ([], [], [])
    for name in targets:
        kind = next(
            (
                i
                for i, paths in enumerate((modules, experts))
                if any(p.endswith(f".{name}") for p in paths)
            ),
            2,
        )
        found[kind].append(name)
    return found


def scale_logits(logits_NV: Tensor, config: Any) -> Tensor:
    """What stands between a family's head and the softmax: scale (Cohere) or softcap (Gemma 2)."""
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits_NV = logits_NV * scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        logits_NV = logits_NV / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits_NV = torch.tanh(logits_NV / cap) * cap
    return logits_NV


@dataclass(frozen=True)
class AttentionDropout:
    """One attention module's dropout: where its rate is kept, and what it asks for `training`."""

    holder: Any
    attribute: str
    switches: tuple[nn.Module, ...]

    def set_rate(self, p: float) -> None:
        """Set the rate; it acts only where `training` is on."""
        setattr(self.holder, self.attribute, p)

    def switch(self, on: bool) -> None:
        """Let the rate act or not."""
        for module in self.switches:
            module.training = on


def silence_dropout(lm: nn.Module) -> None:
    """Set to 0 every dropout rate that a module applies by function (OPT, Starcoder-2).

    Such a rate would act whenever the module is switched to training, which checkpointing and
    `AttentionDropout` do. Dropout modules need nothing: they stay in eval mode. The config keeps
    its values.
    """
    for module in lm.modules():
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def attention_dropouts(lm: nn.Module) -> list[AttentionDropout]:
    """One entry per attention module of a model; empty for a family that has no such dropout."""
    found = []
    for module in lm.modules():
        if "Attention" not in type(module).__name__:
            continue
        for name in _RATE_NAMES:
            rate = getattr(module, name, None)
            if isinstance(rate, nn.Dropout):
                found.append(AttentionDropout(rate, "p", (module, rate)))
                break
            if isinstance(rate, float | int):
                found.append(AttentionDropout(module, name, (module,)))
                break
    return found
