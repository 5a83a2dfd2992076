"""What of an LM learns in a stage: one face for LoRA adapters, a trained copy, and nothing.

adapters.py: a stack of LoRA adapters · full.py: one copy of the LM's layers · frozen.py: nothing
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm2comp.errors import BackboneError
from llm2comp.model.backbone.sharded import fill, save_whole
from llm2comp.recipe import AdapterSettings


class Trainable(ABC):
    """What the stages of an encoder train over one LM, oldest stage first; the newest learns.

    Not a Module: the LM, or `copy`, owns the weights.

    Args:
        lm: the LM, frozen here.
        model_name: where it came from, for messages and saved settings.

    Raises:
        BackboneError: an LM that cannot be trained in this way.
    """

    file: ClassVar[str]  # of a stage's weights, in its folder

    def __init__(self, lm: Any, model_name: str) -> None:
        self.lm = lm
        self.model_name = model_name
        self.names: list[str] = []
        self.off = False  # whether passes are the bare LM's at this moment
        self.copy: nn.Module | None = None  # a second body, which encodes in place of the LM's own

    @abstractmethod
    def add(
        self, name: str, settings: AdapterSettings, dropout: float | None = None, seed: int = 0
    ) -> None:
        """One more stage; of all weights of the LM its own alone learn from here on."""

    @abstractmethod
    def parameters(self, name: str) -> list[nn.Parameter]:
        """Weights that a stage trains."""

    @abstractmethod
    def state(self, name: str) -> dict[str, Tensor]:
        """The live weights of a stage, by their names in its file; empty: it has no file."""

    @abstractmethod
    def merged(self, dtype: torch.dtype | None = None) -> Any:
        """A copy of the LM with what was learned in its weights, in the base's dtype.

        With a `dtype`, in that one, and on the CPU: beside the LM there may be no room for it.
        """

    @property
    def body(self) -> Any:
        """What runs now: the LM's body, or the trained copy of it in an encoder pass."""
        return self.lm.base_model if self.off or self.copy is None else self.copy

    @property
    def faster_merged(self) -> bool:
        """Whether an encoder pass over `merged` costs less than one over the live LM."""
        return False

    def dropouts(self, name: str) -> Sequence[nn.Module]:
        """Dropout modules of a stage, beside those of the attention."""
        return ()

    def train_dropout(self, on: bool) -> None:
        """Dropout of the newest stage; older ones never have any."""
        for name in self.names:
            for module in self.dropouts(name):
                module.train(on and name == self.names[-1])

    @contextlib.contextmanager
    def switched(self, off: bool) -> Iterator[None]:
        """Inside, passes are the bare LM's, or the encoder's."""
        before, self.off = self.off, off
        try:
            yield
        finally:
            self.off = before

    @contextlib.contextmanager
    def folded(self) -> Iterator[None]:
        """Inside, older stages cost the encoder pass nothing. Here they never do."""
        yield

    def save(self, name: str, folder: Path) -> None:
        """Write the weights of a stage."""
        if state := self.state(name):
            save_whole(state, folder / self.file)

    def load(self, name: str, folder: Path) -> None:
        """Fill a stage with the weights that `save` wrote.

        Raises BackboneError: of other shapes.
        """
        if not (state := self.state(name)):
            return
        tensors = load_file(folder / self.file)
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in state.items()}:
            problem = f"weights in {self.file} do not fit this model and these settings"
            raise BackboneError(problem, where=str(folder))
        for key, tensor in state.items():
            fill(tensor, tensors[key])
