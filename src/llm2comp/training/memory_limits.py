"""What is computed at once in training: a batch cut into pieces of so many tokens.

Pieces get smaller once memory runs out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from llm2comp.errors import RunError
from llm2comp.model.tokens import longest_first
from llm2comp.model.vectors import is_out_of_memory
from llm2comp.system.console import say

_SIDES = {"text": "right", "context": "left", "continuation": "right"}


def masks_of(inputs: dict[str, Any]) -> list[Tensor]:
    """The masks of whole texts, one per column of texts."""
    return [
        value
        for name, value in inputs.items()
        if name.endswith("attention_mask") or name == "text_mask"
    ]


def pieces_of(batch: dict[str, Tensor], max_tokens: int | None) -> list[dict[str, Tensor]]:
    """A batch of `SplitTexts.to_tensors` in pieces of like length, the longest first.

    None: all of it in one piece.

    Each piece holds as many texts as fit into `max_tokens` when all are as long as its longest, one
    at least; padding that its own texts do not need is cut off.
    """
    if max_tokens is None:
        return [batch]
    lengths = batch["text_mask"].sum(1).tolist()
    return [
        _some_rows(batch, places)
        for places in longest_first(lengths, lambda longest: max_tokens // longest)
    ]


def _some_rows(batch: dict[str, Tensor], places: Sequence[int]) -> dict[str, Tensor]:
    index = torch.tensor(places, device=batch["text_mask"].device)
    rows = {name: tensor[index] for name, tensor in batch.items()}
    for part, side in _SIDES.items():
        width = int(rows[f"{part}_mask"].sum(1).max())
        for name in (
            f"{part}_ids",
            f"{part}_mask",
            *(["replaced"] if part == "text" and "replaced" in rows else []),
        ):
            rows[name] = rows[name][:, -width:] if side == "left" else rows[name][:, :width]
    return rows


class FittingMixin:
    """Put before a trainer class: each batch goes through in pieces.

    They get smaller for good once memory runs out.

    A stage's gradients, random state and result are then those of a stage with the smaller limit
    from the start.
    """

    stage_name: str
    piece: dict[str, Any]  # what is computed at the moment
    limit_name: str  # setting for the tokens that are computed at once

    def pieces(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """What of a batch goes forward and backward at once; the losses add up to the batch's."""
        return [inputs]

    def at_once(self, inputs: dict[str, Any]) -> tuple[int, bool]:
        """How many tokens were computed when memory ran out, and whether of several texts."""
        raise NotImplementedError

    def set_limit(self, tokens: int) -> None:
        """Compute at most so many tokens at once from here on."""
        raise NotImplementedError

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Forward and backward passes over one batch.

        Raises RunError when memory is too small for a single text.
        """
        trainer: Any = self
        # ranks must not choose each for itself
        alone = trainer.accelerator.distributed_type == DistributedType.NO
        return until_it_fits(
            lambda: self._attempt(model, inputs, *args, **kwargs),
            lambda error: self._make_room(inputs, alone, error),
            [parameter for parameter in model.parameters() if parameter.requires_grad]
            if alone
            else [],
            trainer.args.device,
        )

    def _attempt(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Forward and backward over all pieces of a batch; devices join gradients once."""
        trainer: Any = self
        pieces, losses = self.pieces(inputs), []
        for number, self.piece in enumerate(pieces):
            last = number + 1 == len(pieces)
            with contextlib.nullcontext() if last else trainer.accelerator.no_sync(model):
                losses.append(super().training_step(model, dict(self.piece), *args, **kwargs))  # type: ignore[misc]
        return torch.stack(losses).sum()

    def _make_room(self, inputs: dict[str, Any], alone: bool, error: RuntimeError) -> None:
        """Halve the tokens that are computed at once for the rest of the stage.

        Raises RunError where that cannot be.
        """
        trainer: Any = self
        setting = f"{self.stage_name}.{self.limit_name}"
        tokens, several = self.at_once(inputs)
        if not (alone and several):
            lower = (
                f"set {setting}, or lower {self.stage_name}.batch_size"
                if several
                else "lower the limit of a text's length"
            )
            raise RunError(
                "out of memory",
                where=f"{self.stage_name}, step {trainer.state.global_step + 1}",
                found=f"no room for {tokens:,} "
                f"tokens{' of several texts' if several else ', one text,'} at once",
                fix=f"{lower}, or set gradient_checkpointing: true or precision: bfloat16",
            ) from error
        self.set_limit(tokens // 2)
        say(
            f"{self.stage_name}: out of memory; going on with {tokens // 2:,} tokens at "
            f"once ({setting})"
        )


def until_it_fits(
    attempt: Callable[[], Tensor],
    make_room: Callable[[RuntimeError], None],
    parameters: Iterable[nn.Parameter],
    device: torch.device,
) -> Tensor:
    """Call `attempt`, which adds to gradients; out of memory: `make_room`, then again.

    Gradients and random state are put back first: what counts is one attempt that went through from
    its beginning.

    Args:
        attempt: forward and backward passes; its value is returned.
        make_room: must lead to a smaller attempt, or raise.
        parameters: all that `attempt` gives gradients to.
        device: whose random state `attempt` draws from, beside the CPU's.
    """
    held = [(parameter, parameter.grad) for parameter in parameters]
    on_cuda = device.type == "cuda"
    states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_cuda else None
    while True:
        for parameter, _ in held:
            parameter.grad = None
        try:
            value = attempt()
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            make_room(error)
        # here nothing refers to the failed attempt any more
        clear_device_cache(garbage_collection=True)
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], device)
    for parameter, before in held:
        if before is not None:
            parameter.grad = before if parameter.grad is None else parameter.grad.add_(before)
    return value
