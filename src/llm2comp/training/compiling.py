"""`torch.compile` for a stage: the parts of the LM's layers that gain, and plain ones after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from llm2comp.system.console import say


@contextlib.contextmanager
def compiled(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Inside, norms and MLPs of all layers are compiled; attention stays as it is.

    Attention's masks and kernels differ between the three passes and from batch to batch, which
    would be compiled again and again. Dropout is drawn as it is without: GradCache needs the same
    in two passes, of which one has no gradient.
    """
    parts = parts_to_compile(model) if on else []
    if parts:
        say("compiling: the first steps are slow")
    for part in parts:
        part.compile(dynamic=True, options={"fallback_random": True})
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None


def parts_to_compile(model: nn.Module) -> list[nn.Module]:
    """The layers' direct children but their attention."""
    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    return [
        part
        for layer in layers
        for part in layer.children()
        if "Attention" not in type(part).__name__
    ]
