"""Stage 1's loss as a module of torch: by itself, and beside a later stage's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm2comp.data.pretext import PretextCollator, PretextRows
from llm2comp.model.backbone.sharded import fill, save_whole
from llm2comp.model.compressor import Compressor
from llm2comp.model.tokens import SplitTexts
from llm2comp.objectives import count_items, stage_loss
from llm2comp.objectives.alignment import MAP_FILE
from llm2comp.recipe import PretextStage


class PretextModel(nn.Module):
    """Stage 1 as one module, batch → loss: all three passes under one wrapper (DDP, FSDP).

    `to_teacher`: for `alignment` to a teacher of another width without a projection; saved with the
    stage, not exported.
    """

    def __init__(
        self, compressor: Compressor, stage: PretextStage, to_teacher: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.compressor = compressor
        self.stage = stage
        self.to_teacher = to_teacher

    def items(self, batch: dict[str, Tensor]) -> list[int]:
        """What the mean of each objective runs over in one batch."""
        bos = self.compressor.backbone.bos_id is not None
        return list(count_items(self.stage, SplitTexts.from_tensors(batch), bos).values())

    def forward(self, items: Sequence[float], **batch: Tensor) -> Tensor:
        """Loss of one micro-batch; `items` counts the whole optimiser step, per objective."""
        by_name = dict(zip(self.stage.objectives, items, strict=True))
        split = SplitTexts.from_tensors(batch)
        return stage_loss(self.compressor, split, self.stage, by_name, self.to_teacher)

    def save_map(self, folder: Path) -> None:
        """Write the map to the teacher, if there is one."""
        if self.to_teacher is not None:
            save_whole(self.to_teacher.state_dict(), folder / MAP_FILE)

    def load_map(self, folder: Path) -> None:
        """Read what `save_map` wrote."""
        if self.to_teacher is not None:
            tensors = load_file(folder / MAP_FILE)
            for name, tensor in self.to_teacher.state_dict().items():
                fill(tensor, tensors[name])


@dataclass(frozen=True)
class KeptPretext:
    """Stage 1's loss beside another one, on samples that the number of the step decides."""

    model: PretextModel
    rows: PretextRows
    collate: PretextCollator
    batch_size: int
    weight: float

    def loss(self, step: int, device: torch.device) -> Tensor:
        """Weight times the loss of samples step · batch_size and following."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        batch = self.collate([self.rows[place] for place in places])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        loss: Tensor = self.model(items=self.model.items(batch), **batch)
        return self.weight * loss
