"""Weights spread over several devices (FSDP2, DeepSpeed's ZeRO-3).

What is saved is whole, what is loaded is spread again.

Every rank must call these functions, for each lends its part; rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llm2comp.system.files import open_to_others


def writes() -> bool:
    """Whether this rank writes files: rank 0, or a process without others."""
    return (
        not (distributed.is_available() and distributed.is_initialized())
        or distributed.get_rank() == 0
    )


Facts = dict[str, str]


def save_whole(tensors: Mapping[str, Tensor], file: Path, facts: Facts | None = None) -> None:
    """Write tensors, each whole, as safetensors; `facts` go into its header."""
    found = {name: _whole(tensor).cpu().contiguous() for name, tensor in tensors.items()}
    if writes():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(found, file, facts)
        open_to_others(file)


def header_of(file: Path) -> Facts:
    """The `facts` that `save_whole` wrote."""
    with safe_open(file, "pt") as content:
        return content.metadata() or {}


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Copy whole values into a tensor, of which each rank may hold a part."""
    if isinstance(target, DTensor):
        values = distribute_tensor(
            values.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(values)


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has spread are whole on every rank; rank 0's changes stay."""
    spread = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with (
        import_module("deepspeed").zero.GatheredParameters(spread, modifier_rank=0)
        if spread
        else contextlib.nullcontext()
    ):
        yield
