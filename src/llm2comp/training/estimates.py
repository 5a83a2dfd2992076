"""What training needs of a device's memory, estimated, and so what is computed at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from llm2comp.model.backbone import Backbone
from llm2comp.objectives.kl import CHUNK, CHUNK_ON_GPU
from llm2comp.recipe import ContrastiveStage, PretextStage, SclStage, Stage
from llm2comp.system.console import say
from llm2comp.training.ranks import ranks

# Of the memory that is free when a stage begins, what its activations may take.
SHARE = 0.6
# A batch that must be cut is cut into parts of so many tokens at most: more at once are no faster.
MOST = {"cpu": 8192}
MOST_ON_GPU = 65536
# Of a control group, by version 2 and 1: its limit, what it uses, and what the kernel gives back of
# this first (page cache: as in the working set of Kubernetes).
_GROUP = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
AnyStage = TypeVar("AnyStage", bound=Stage)


def fitted(name: str, stage: AnyStage, backbone: Backbone, full_copy: bool) -> AnyStage:
    """A stage with all that its model and device decide: learning rate, what is computed at once.

    The optimiser steps stay those of the recipe. Says what was chosen. Among several processes
    batches stay whole.
    """
    width, device = int(backbone.input_table.shape[1]), backbone.input_table.device
    chosen = stage.at_width(width, full_copy)
    if stage.schedule.learning_rate == "auto":
        say(f"{name}: learning rate {chosen.schedule.peak:.2g} (auto, {width} wide)")
    full = backbone.input_table.dtype == torch.float32
    tokens = None if ranks() > 1 else tokens_at_once(stage, backbone.config, full, device)
    if tokens is None:
        return chosen
    limit = "max_tokens_per_batch" if isinstance(stage, PretextStage) else "mini_batch_tokens"
    say(
        f"{name}: {tokens:,} tokens at once, as a whole batch may not fit the memory of "
        f"{device} ({name}.{limit})"
    )
    return chosen.model_copy(update={limit: tokens})


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now; on a CPU those that system and container can give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(min(psutil.virtual_memory().available, free_in_groups()))


def free_in_groups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """Bytes that a container or a job leaves this process: the least of its control groups."""
    free = [math.inf]
    for line in own.read_text(encoding="utf-8").splitlines() if own.is_file() else ():
        _, controller, place = line.split(":", maxsplit=2)
        if (names := _GROUP.get(controller)) is not None:
            top = root / controller
            group = top / place.lstrip("/")  # a container may see `top` alone, as its own
            free += [_free(g, *names) for g in (group, *group.parents) if g.is_relative_to(top)]
    return min(free)


def _free(group: Path, limit: str, used: str, cache: str) -> float:
    try:
        most, now = (int((group / name).read_text(encoding="ascii")) for name in (limit, used))
        stat = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        back = int(dict(line.split() for line in stat).get(cache, 0))
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return math.inf
    return max(0, most - max(0, now - back))


def tokens_at_once(
    stage: Stage, config: Any, full: bool, device: torch.device, free: int | None = None
) -> int | None:
    """Tokens that fit into what is free, a power of two.

    `free` says how many bytes that are; None: as many as the device has free now. The result is
    None where whole batches fit, or where the recipe says itself how many tokens.
    """
    if isinstance(stage, ContrastiveStage):
        if stage.mini_batch_size is not None or stage.mini_batch_tokens is not None:
            return None
        scl = stage if isinstance(stage, SclStage) else None
        texts = 2 + max((len(spec.negatives) for spec in scl.data), default=0) if scl else 2
        longest = scl.document_max_tokens if scl else stage.max_tokens  # type: ignore[attr-defined]
    else:
        assert isinstance(stage, PretextStage)
        if stage.max_tokens_per_batch is not None:
            return None
        texts, longest = 1, stage.max_tokens
    longest = min(longest, getattr(config, "max_position_embeddings", None) or longest)
    room = SHARE * (free_memory(device) if free is None else free) - logits(
        config, stage, stage.batch_size * longest, full
    )
    fit = max(1.0, room / activations(config, stage, 1, 1, full))
    most = MOST.get(device.type, MOST_ON_GPU)
    return (
        None if stage.batch_size * texts * longest <= fit else min(most, 2 ** int(math.log2(fit)))
    )


def base_bytes(lm: Any, size: int, quantization: str | None) -> int:
    """Bytes of the frozen base, `size` per weight.

    In 4 or 8 bits linear layers but the head take less (scales counted).
    """
    head = lm.get_output_embeddings()
    linear = sum(
        m.weight.numel() for m in lm.modules() if isinstance(m, torch.nn.Linear) and m is not head
    )
    rest = sum(p.numel() for p in lm.parameters()) - linear
    return int(
        size * rest + {"nf4": 0.5625, "int8": 1.0}.get(quantization or "", float(size)) * linear
    )


def texts_at_once(stage: Stage, per_sample: int, mean: float) -> float:
    """Texts of mean length whose graphs stand in memory together."""
    if isinstance(stage, ContrastiveStage):
        size, limit = stage.mini_batch_size, stage.mini_batch_tokens
        batch = stage.batch_size if size or limit else stage.batch_size * per_sample
        batch = min(batch, size) if size and not limit else batch
    else:
        assert isinstance(stage, PretextStage)
        limit, batch = stage.max_tokens_per_batch, stage.batch_size
        batch = batch * stage.gradient_accumulation_steps if limit else batch
    return min(batch, max(1.0, limit / mean)) if limit else batch


def embedding_weights(lm: Any) -> int:
    """Weights of input embeddings and head, counted once where they are tied."""
    modules = (lm.get_input_embeddings(), lm.get_output_embeddings())
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def trained_embeddings(
    stage: Stage, lm: Any, memory_tokens: int, projection: int | str | None = None
) -> int:
    """Trained weights beside the adapter: memory, the whole embedding table, the projection."""
    rows, width = (int(n) for n in lm.get_input_embeddings().weight.shape)
    mapped = (
        0
        if projection is None
        else (width + 1) * (width if projection == "same" else int(projection))
    )
    if isinstance(stage, ContrastiveStage):
        memory, table = stage.train_memory, stage.train_embeddings
    else:
        memory, table = True, isinstance(stage, PretextStage) and stage.train_embeddings == "all"
    return (memory_tokens * width + mapped) * memory + rows * width * table


def activations(config: Any, stage: Stage, texts: float, tokens: float, full: bool) -> int:
    """Estimate of what the backward pass keeps: states per token and layer.

    Per token and layer about 20 D + 6 F numbers (projections, LoRA's inputs and dropout, norms; F =
    width of the MLP); checkpointing keeps D. In stage 1 the encoder sees half of a text; of the
    rest the decoder, without LoRA, keeps half.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    f = getattr(config, "intermediate_size", None) or 4 * d
    size = 4 if full and stage.precision == "float32" else 2
    per_layer = d if stage.gradient_checkpointing else 20 * d + 6 * f
    return int(
        texts
        * tokens
        * layers
        * per_layer
        * size
        * (0.75 if isinstance(stage, PretextStage) else 1.0)
    )


def logits(config: Any, stage: Stage | None, positions: float, full: bool) -> int:
    """Estimate of one chunk of float32 logits, teacher's and student's with their logarithms.

    Only stage 1 has any.
    """
    at_once = (
        min(CHUNK if full else CHUNK_ON_GPU, positions) if isinstance(stage, PretextStage) else 0
    )
    return int(4 * at_once * config.vocab_size * 4)
