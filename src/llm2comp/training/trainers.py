"""The ecosystem's trainers, with what all stages share.

Schedule, adapter checkpoints, token count, safe resume.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer

from llm2comp.errors import RunError
from llm2comp.model.compressor import Compressor
from llm2comp.model.judges import Judges
from llm2comp.recipe import ContrastiveStage, Stage
from llm2comp.system.files import whole_or_gone
from llm2comp.training.contrastive import contrastive_loss
from llm2comp.training.memory_limits import FittingMixin, masks_of, pieces_of
from llm2comp.training.pretext_model import KeptPretext, PretextModel
from llm2comp.training.progress import TokenCounter
from llm2comp.training.ranks import RanksMixin, joint_batches, root_stays_whole
from llm2comp.training.schedule import scheduler
from llm2comp.training.views import CropCollator

COMPLETE_FILE = "complete"


class StageMixin(RanksMixin, FittingMixin):
    """Put before a trainer class. `begin_stage` must be called before `train`."""

    compressor: Compressor
    stage_name: str
    stage: Stage
    counter: TokenCounter

    def begin_stage(
        self, compressor: Compressor, stage_name: str, stage: Stage, counter: TokenCounter
    ) -> None:
        """What this trainer trains."""
        self.compressor, self.stage_name, self.stage, self.counter = (
            compressor,
            stage_name,
            stage,
            counter,
        )
        self.shard_by_layer(compressor.backbone.lm)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """The recipe's schedule."""
        trainer: Any = self
        trainer.lr_scheduler = scheduler(
            optimizer or trainer.optimizer, self.stage.schedule, self.stage.steps
        )
        lr_scheduler: LambdaLR = trainer.lr_scheduler
        return lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Count text tokens, then the trainer's own step.

        Raises RunError when the loss has run away.
        """
        trainer: Any = self
        self.counter.tokens += sum(int(mask.sum()) for mask in masks_of(inputs))
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not loss.isfinite():
            raise RunError(
                "the loss is not finite",
                where=f"{self.stage_name}, step {trainer.state.global_step + 1}",
                fix=f"lower {self.stage_name}.schedule.learning_rate or set precision: "
                "float32, in a new run directory",
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The newest adapter and the memory, nothing of the base.

        All ranks call it: each may hold a part of the weights.
        """
        trainer: Any = self
        self.compressor.save(Path(output_dir or trainer.args.output_dir), self.stage_name)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        self.compressor.load(Path(checkpoint), self.stage_name)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Mark a checkpoint once it is complete; an unmarked one is not resumed from."""
        trainer: Any = self
        folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        with whole_or_gone(folder):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
            trainer.accelerator.wait_for_everyone()  # each rank writes its random state
            if trainer.args.should_save:
                (folder / COMPLETE_FILE).touch()


def last_checkpoint(folder: Path) -> str | None:
    """Newest complete checkpoint in a stage folder; incomplete ones (a kill) are removed."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE_FILE).exists():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)  # another rank may be at it
    return max(map(str, complete), key=step_of) if complete else None


def step_of(checkpoint: str) -> int:
    """The step after which a checkpoint was written."""
    return int(Path(checkpoint).name.split("-")[1])


class PretextTrainer(StageMixin, Trainer):
    """transformers' Trainer over a PretextModel.

    Samples in their fixed order, means over the whole optimiser step.
    """

    loss_is_scaled_for_ga = True
    limit_name = "max_tokens_per_batch"
    max_tokens: int | None = None

    def begin_stage(
        self, compressor: Compressor, stage_name: str, stage: Stage, counter: TokenCounter
    ) -> None:
        """As for all trainers.

        Raises RunError for a limit over sharded weights: ranks with fewer pieces would wait.
        """
        super().begin_stage(compressor, stage_name, stage, counter)
        self.set_limit(getattr(stage, self.limit_name))
        sharded = self.accelerator.distributed_type in (
            DistributedType.FSDP,
            DistributedType.DEEPSPEED,
        )
        if sharded and self.max_tokens is not None:
            where, fix = f"{stage_name}.{self.limit_name}", "set it to null and lower batch_size"
            raise RunError("batches by tokens do not go with sharded weights", where=where, fix=fix)

    def pieces(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Texts of like length, as many as the limit allows."""
        return pieces_of(inputs, self.max_tokens)

    def at_once(self, inputs: dict[str, Any]) -> tuple[int, bool]:
        """The piece that failed, padding counted."""
        mask_BT: Tensor = self.piece["text_mask"]
        return mask_BT.numel(), len(mask_BT) > 1

    def set_limit(self, tokens: int | None) -> None:
        """None: a batch is one piece."""
        self.max_tokens = tokens

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self._stage_model().save_map(Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(checkpoint, model)
        self._stage_model().load_map(Path(checkpoint))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(rows)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Micro-batches of one optimiser step, and the items in them, over all devices."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = torch.tensor(
            [self._stage_model().items(batch) for batch in batches], device=device
        ).sum(0)
        return batches, self.accelerator.reduce(items) if self.args.world_size > 1 else items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss scaled so that the gradients' mean over devices is the mean over all items."""
        items = (
            self._stage_model().items(inputs)
            if num_items_in_batch is None
            else num_items_in_batch.tolist()
        )
        with root_stays_whole(model):
            loss = model(items=items, **inputs) * self.args.world_size
        return (loss, {}) if return_outputs else loss

    def _stage_model(self) -> PretextModel:
        model: PretextModel = self.accelerator.unwrap_model(self.model)
        return model


class ContrastiveTrainer(StageMixin, SentenceTransformerTrainer):
    """sentence-transformers' trainer over a memory encoder, its loss and its samplers."""

    stage: ContrastiveStage
    limit_name = "mini_batch_tokens"
    judges: Judges | None = None
    kept: KeptPretext | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The contrastive loss, and stage 1's where it is kept."""
        loss: Any = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)  # type: ignore[arg-type]
        if self.kept is not None:
            with self.accelerator.autocast():  # as the encoder is, by `precision`, when prepared
                loss = loss + self.kept.loss(self.state.global_step, loss.device)
        return (loss, {}) if return_outputs else loss

    def get_train_dataloader(self) -> Any:
        """Batches of this device; of several devices' together, each has its part."""
        return joint_batches(self) if self.args.world_size > 1 else super().get_train_dataloader()

    def get_batch_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """The stock sampler; crops are drawn by its epoch."""
        sampler = super().get_batch_sampler(*args, **kwargs)
        if isinstance(self.data_collator, CropCollator):
            self.data_collator.sampler = sampler
        return sampler

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: the exported folder gets a card of its own."""

    def at_once(self, inputs: dict[str, Any]) -> tuple[int, bool]:
        """Most text tokens that the loss may encode at once, and whether of several texts.

        A limit under twice the shortest text leaves each alone.
        """
        columns = [mask.sum(1).sort(descending=True).values for mask in masks_of(inputs)]
        size, limit = self.stage.mini_batch_size, self.stage.mini_batch_tokens
        if size is None and limit is None:
            return sum(int(lengths_B.sum()) for lengths_B in columns), True
        most = max(int(lengths_B[: None if limit else size].sum()) for lengths_B in columns)
        longest = max(int(lengths_B[0]) for lengths_B in columns)
        shortest = min(int(lengths_B[-1]) for lengths_B in columns)
        tokens = most if limit is None else min(limit, most)
        several = tokens >= 2 * shortest and (limit is not None or size != 1)
        return (tokens if several else longest), several

    def set_limit(self, tokens: int) -> None:
        """Another loss, equal in value and gradient."""
        self.stage = self.stage.model_copy(update={self.limit_name: tokens})
        loss: Any = self.prepare_loss(
            contrastive_loss(self.model, self.stage, self.judges), self.model
        )
        self.loss = loss
