"""Several processes, one per device: what rank 0 does for all, and what sharding asks for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import (
    broadcast_object_list,
    convert_outputs_to_fp32,
    get_mixed_precision_context_manager,
    save_fsdp_optimizer,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers.trainer import SCHEDULER_NAME

from llm2comp.errors import Llm2CompError, RunError, install_extra
from llm2comp.recipe import Recipe
from llm2comp.system.console import say

Found = TypeVar("Found")


def is_main_process() -> bool:
    """Whether this process writes: the only one, or rank 0 under a launcher."""
    return int(os.environ.get("RANK", "0")) == 0


def ranks() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding() -> str | None:
    """How `accelerate launch` spreads the weights over devices; None: each device has them all."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "FSDP"
    if (
        os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    ):
        return "ZeRO-3"
    return None


def check_launch(recipe: Recipe) -> None:
    """Find what the launcher's settings cannot go with before anything is loaded.

    Raises:
        RunError: a GPU of a number; DeepSpeed that is not installed; the first version of FSDP;
            settings of a recipe that need whole weights, or one process; or let ranks pass the
            layers different numbers of times, which would wait for each other for ever.
    """
    device, seen = recipe.model.device, torch.cuda.device_count()
    if seen and device.startswith("cuda:") and (device != "cuda:0" or ranks() > 1):
        raise RunError(
            "training takes the first GPU that it sees, or under a launcher its own",
            where="model.device",
            expected="auto",
            found=device,
            fix=f"CUDA_VISIBLE_DEVICES={device.removeprefix('cuda:')}, and model.device: auto",
        )
    if seen > 1 == ranks() and device != "cpu":
        say(f"{seen} GPUs are seen, one trains: docs/launch.md tells how to train on all")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and find_spec("deepspeed") is None:
        raise RunError(
            "DeepSpeed is not installed",
            where="launch",
            fix=f"{install_extra('deepspeed')}, or launch with FSDP2",
        )
    off = {"teacher": None, "guide": None, "pretext_weight": 0.0}
    for setting in off if ranks() > 1 and recipe.scl is not None else ():
        if getattr(recipe.scl, setting) != off[setting]:
            fix = "launch one process, or leave it out"
            raise RunError("cannot be had with several processes", where=f"scl.{setting}", fix=fix)
    kind = sharding()
    if kind is None:
        return
    if kind == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise RunError(
            "cannot train under this version of FSDP", where="launch", expected="fsdp_version: 2"
        )
    for name, stage in recipe.stages.items():
        for setting in ("keep_best", "max_tokens_per_batch", "mini_batch_tokens"):
            if (value := getattr(stage, setting, None)) is not None:
                problem = f"cannot be had while {kind} spreads the weights"
                raise RunError(
                    problem,
                    where=f"{name}.{setting}",
                    found=value,
                    fix="set it to null, or launch without sharding",
                )


def on_main(work: Callable[[], Found], device: str) -> Found:
    """What `work` returns in rank 0, for all ranks, which wait for it.

    An error of the family is raised in all of them.

    `device`: `cpu` lets the processes talk through gloo though there may be GPUs.
    """
    if ranks() == 1:
        return work()
    found: list[Any] = [None]
    if is_main_process():
        try:
            found = [work()]
        except Llm2CompError as error:
            found = [error]
    PartialState(cpu=device == "cpu")  # joins the processes
    broadcast_object_list(found)
    if isinstance(found[0], Llm2CompError):
        raise found[0]
    value: Found = found[0]
    return value


@contextlib.contextmanager
def root_stays_whole(model: nn.Module) -> Iterator[None]:
    """For a forward pass of an FSDP module with a backward pass inside it, of its layers alone.

    FSDP2 takes the end of any backward pass for the end of the step and spreads the root's weights
    again (embeddings, LM head, memory), which the rest of the forward pass reads. Inside, they stay
    whole.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        model.set_reshard_after_backward(True, recurse=False)


class RanksMixin:
    """Put before a trainer class: one device a process, FSDP2 by the LM's layers, and checkpoints
    without the frozen base.
    """

    def __init__(self, *, args: Any, **kwargs: Any) -> None:
        # transformers would split each batch over all GPUs that one process sees (nn.DataParallel);
        # its replicas of the encoder do not reach the frozen LM
        args._n_gpu = min(1, args.n_gpu)
        super().__init__(args=args, **kwargs)  # type: ignore[call-arg]

    def shard_by_layer(self, lm: Any) -> None:
        """Tell accelerate the layer class of an LM, which a module around it does not.

        And let autocast see to dtypes.

        For bfloat16 accelerate would have FSDP2 cast weights, losses and embeddings, and add
        gradients up in it. Here it is autocast inside the forward pass, float32 outside, as
        accelerate does it without FSDP2.
        """
        trainer: Any = self
        if not trainer.is_fsdp_enabled:
            return
        accelerator, model = trainer.accelerator, trainer.model
        plugin = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = list(lm._no_split_modules)
        plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if accelerator.native_amp:
            autocast = get_mixed_precision_context_manager(True, accelerator.autocast_handler)
            model.forward = convert_outputs_to_fp32(autocast(model.forward))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What `_save` writes. The stock method gathers the whole model first."""
        trainer: Any = self
        trainer._save(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer: Any = self
        if not trainer.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        plugin, accelerator = trainer.accelerator.state.fsdp_plugin, trainer.accelerator
        save_fsdp_optimizer(plugin, accelerator, trainer.optimizer, trainer.model, output_dir)
        if trainer.args.should_save:
            torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)


def joint_batches(trainer: Any) -> Any:
    """A sentence-transformers loader of this rank's part of batches drawn for all ranks.

    So no text is twice in what the loss compares, all ranks work on one table of a kind, and 2
    ranks with b texts see what one process with 2b would. A last batch that is not full for all is
    left out.
    """
    size = trainer.args.train_batch_size * trainer.args.world_size
    trainer.accelerator.dataloader_config.split_batches = True
    trainer.accelerator.even_batches = False
    trainer.args.dataloader_drop_last = True
    loader = trainer._build_dataloader(trainer.train_dataset, size, dataset_kind="train")
    sampler = loader.batch_sampler
    prepared = trainer.accelerator.prepare(loader)
    # a stage that is resumed within a later epoch draws in that epoch's order: the trainer tells
    # the epoch to what stands behind the batches it skips, which accelerate does not pass on
    prepared.batch_sampler.set_epoch = sampler.set_epoch
    return prepared
