"""A frozen base in 4 or 8 bits (bitsandbytes), adapters over it: QLoRA (arXiv 2305.14314).

Linear layers but the LM head are quantised at load; embeddings, norms and the experts of a mixture
keep the model's dtype.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

from llm2comp.errors import BackboneError, install_extra

_WEIGHTS = ("Params4bit", "Int8Params")
_MARKS = (
    "hf_quantizer",
    "hf_device_map",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "quantization_method",
)


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """What `from_pretrained` wants for `nf4` or `int8`.

    Sums are formed in `dtype` (int8: bitsandbytes' own choice).

    Raises:
        BackboneError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise BackboneError(
            "needs bitsandbytes",
            where="model.quantization",
            found=kind,
            fix=f"{install_extra('quantized')}, or set it to null",
        )
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def quantized_layers(lm: nn.Module) -> dict[str, Any]:
    """Layers whose weights are in 4 or 8 bits, by their path."""
    return {
        path: m
        for path, m in lm.named_modules()
        if type(m._parameters.get("weight")).__name__ in _WEIGHTS
    }


def keep_gradients(lm: nn.Module) -> None:
    """Let gradients pass through quantised layers.

    On a CPU and in eval mode bitsandbytes would cut them, silently.

    The mode changes nothing else, but that on a CPU 8-bit layers then leave their inputs unrounded.
    """
    for layer in quantized_layers(lm).values():
        layer.training = True


def plain_copy(lm: Any) -> tuple[Any, list[nn.Linear]]:
    """A float32 copy of the LM with stock linear layers, and those that were quantised."""
    lm = copy.deepcopy(lm)
    dequantized = []
    for path, layer in quantized_layers(lm).items():
        dequantized.append(_plain(layer))
        lm.set_submodule(path, dequantized[-1])
    if dequantized:
        for mark in _MARKS:
            lm.__dict__.pop(mark, None)
        del lm.config.quantization_config
    return lm, dequantized


def _plain(layer: Any) -> nn.Linear:
    """A quantised layer as a stock one with the same weights, in float32."""
    plain = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
    )
    weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    plain.weight = nn.Parameter(weight.float(), requires_grad=False)
    plain.bias = layer.bias
    return plain


@contextlib.contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Inside, a module computes in float32 on the very weights that it has.

    Those in 4 and 8 bits too; afterwards it is as before.

    In place, as there may be no room for a second copy: half precision to float32 and back changes
    no bit.
    """
    layers = quantized_layers(module)
    for path, layer in layers.items():
        module.set_submodule(path, _plain(layer))
    halves = [
        (p, p.dtype) for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16)
    ]
    try:
        for parameter, _ in halves:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in halves:
            parameter.data = parameter.data.to(dtype)
        for path, layer in layers.items():
            module.set_submodule(path, layer)
