"""Losses over the vocabulary that never hold the logits of all positions at once.

For N positions and V words the logits of teacher and student would be 2·N·V floats, the largest
tensors of a step.
The head is frozen, so only the gradient with respect to the student's states is wanted:

1. take a chunk of positions, project it to logits
2. form the chunk's loss and its gradient with respect to the logits by formula (softmax minus
   target), in float32
3. pull that gradient through the projection to the states at once; keep only it, N·D floats
4. in the backward pass multiply the kept gradient by the incoming one
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Project = Callable[[Tensor], Tensor]
# logits_NV, place → losses_N, gradient_NV
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]

# Positions whose logits exist at once: on a CPU more are no faster, on a GPU fewer leave it idle.
CHUNK, CHUNK_ON_GPU = 128, 1024


def chunked_kl(
    student_ND: Tensor,
    teacher_ND: Tensor,
    project: Project,
    weights_N: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Σ_i w_i KL(p_teacher,i ‖ p_student,i), the loss of `ctkd`.

    Args:
        student_ND: decoder states; the gradient goes here.
        teacher_ND: teacher states; no gradient.
        project: states → logits, frozen (`Backbone.project`).
        weights_N: weight per position, float32.
        temperature: divides the logits of both distributions.
        chunk: positions whose logits exist at once; None = by the device.
    """

    def kl(logits_NV: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        log_student = _log_softmax(logits_NV, temperature)
        log_teacher = _log_softmax(project(teacher_ND[place]), temperature)
        p_teacher = log_teacher.exp()
        # in place: four such matrices, no fifth
        losses = torch.linalg.vecdot(p_teacher, log_teacher.sub_(log_student))
        return losses, log_student.exp_().sub_(p_teacher).div_(temperature)

    return _in_chunks(student_ND, project, kl, weights_N, chunk)


def chunked_cross_entropy(
    student_ND: Tensor,
    targets_N: Tensor,
    project: Project,
    weights_N: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """Σ_i −w_i log p_student,i(target_i), the loss of `continuation` and `reconstruction`.

    Arguments as for `chunked_kl`.
    """
    return chunked_bag_entropy(student_ND, targets_N[:, None], project, weights_N, chunk)


def chunked_bag_entropy(
    student_ND: Tensor,
    targets_NT: Tensor,
    project: Project,
    weights_N: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """Σ_i −w_i Σ_t log p_student,i(target_it): a bag of targets each; a negative id is none.

    Other arguments as for `chunked_kl`.
    """

    def cross_entropy(logits_NV: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        log_student = _log_softmax(logits_NV, 1.0)
        there = targets_NT[place] >= 0
        targets = targets_NT[place].clamp_min(0)
        losses = -log_student.gather(1, targets).masked_fill(~there, 0.0).sum(1)
        gradient = log_student.exp_().mul_(there.sum(1, keepdim=True))
        return losses, gradient.scatter_add_(1, targets, -there.to(gradient.dtype))

    return _in_chunks(student_ND, project, cross_entropy, weights_N, chunk)


def _in_chunks(*given: Any) -> Tensor:
    loss: Tensor = _Chunked.apply(*given)  # type: ignore[no-untyped-call]
    return loss


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    """In float32, or float64 where the states are."""
    logits = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    if temperature != 1.0:
        logits = logits / temperature
    return torch.log_softmax(logits, -1)


class _Chunked(torch.autograd.Function):
    """The four steps of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        project: Project,
        of_chunk: ChunkLoss,
        weights_N: Tensor,
        chunk: int | None,
    ) -> Tensor:
        chunk = chunk or (CHUNK if states_ND.device.type == "cpu" else CHUNK_ON_GPU)
        dtype = torch.promote_types(states_ND.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=states_ND.device)
        gradient_ND = torch.empty_like(states_ND)
        for start in range(0, len(states_ND), chunk):
            place = slice(start, start + chunk)
            with torch.enable_grad():
                states = states_ND[place].detach().requires_grad_()
                logits = project(states)
            with torch.no_grad():
                losses, gradient = of_chunk(logits.detach(), place)
                total += (losses * weights_N[place]).sum()
                gradient.mul_(weights_N[place, None])
            (gradient_ND[place],) = torch.autograd.grad(logits, states, gradient.to(logits.dtype))
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> tuple[Tensor, None, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * incoming[0]).to(gradient_ND.dtype), None, None, None, None
