"""Chunked losses over the vocabulary equal the plain ones, in value and gradient, whatever the
chunk and the head.
"""

import pytest
import torch
from torch.nn import functional

from llm2comp.objectives.kl import chunked_cross_entropy, chunked_kl

N, D, V = 7, 5, 11
CHUNKS = [1, 2, 3, N - 1, N, N + 5, 256]


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


HEAD = draw(V, D, seed=0)
BIAS = draw(V, seed=1)
HEADS = {
    "plain": lambda states: states @ HEAD.to(states).T,
    "bias": lambda states: states @ HEAD.to(states).T + BIAS.to(states),
    "softcap": lambda states: torch.tanh(states @ HEAD.to(states).T / 1.5) * 1.5,
    "scaled": lambda states: states @ HEAD.to(states).T * 0.3,
}


def case(dtype=torch.float64):
    student, teacher = (
        draw(N, D, seed=2, dtype=dtype).requires_grad_(),
        draw(N, D, seed=3, dtype=dtype),
    )
    weights = draw(N, seed=4).abs().to(torch.promote_types(dtype, torch.float32))
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(5))
    return student, teacher, targets, weights


def naive_kl(student, teacher, project, weights, temperature=1.0):
    logs = [
        functional.log_softmax(project(states) / temperature, -1) for states in (student, teacher)
    ]
    return (functional.kl_div(*logs, reduction="none", log_target=True).sum(-1) * weights).sum()


def naive_cross_entropy(student, targets, project, weights):
    return (functional.cross_entropy(project(student), targets, reduction="none") * weights).sum()


def value_and_gradient(loss, states):
    (gradient,) = torch.autograd.grad(loss, states)
    assert loss.abs() > 1e-3
    assert (gradient.abs().amax(1) > 1e-4).all(), "vacuous: a position has no gradient"
    return loss.detach(), gradient


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("head", HEADS)
def test_kl_equals_naive(head, temperature, chunk):
    student, teacher, _, weights = case()
    expected = value_and_gradient(
        naive_kl(student, teacher, HEADS[head], weights, temperature), student
    )
    found = value_and_gradient(
        chunked_kl(student, teacher, HEADS[head], weights, temperature, chunk), student
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_cross_entropy_equals_naive(head, chunk):
    student, _, targets, weights = case()
    expected = value_and_gradient(
        naive_cross_entropy(student, targets, HEADS[head], weights), student
    )
    found = value_and_gradient(
        chunked_cross_entropy(student, targets, HEADS[head], weights, chunk), student
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_gradcheck(head, chunk):
    student, teacher, targets, weights = case()
    project = HEADS[head]
    assert torch.autograd.gradcheck(
        lambda s: chunked_kl(s, teacher, project, weights, 1.0, chunk), student
    )
    assert torch.autograd.gradcheck(
        lambda s: chunked_kl(s, teacher, project, weights, 1.7, chunk), student
    )
    assert torch.autograd.gradcheck(
        lambda s: chunked_cross_entropy(s, targets, project, weights, chunk), student
    )


def test_incoming_gradient_is_multiplied_in():
    student, teacher, targets, weights = case()
    for loss in (
        lambda: chunked_kl(student, teacher, HEADS["plain"], weights),
        lambda: chunked_cross_entropy(student, targets, HEADS["plain"], weights),
    ):
        (once,) = torch.autograd.grad(loss(), student)
        (scaled,) = torch.autograd.grad(-3.0 * loss(), student)
        torch.testing.assert_close(scaled, -3.0 * once, rtol=1e-12, atol=1e-13)


def test_kl_of_a_distribution_with_itself_is_zero():
    student, _, _, weights = case()
    loss = chunked_kl(student, student.detach().clone(), HEADS["plain"], weights)
    assert loss == 0
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-15


def test_direction_is_teacher_to_student():
    """The forward KL: where the teacher gives no probability, the student's does not matter."""
    teacher, student = torch.tensor([[20.0, 0.0, -1000.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    forward = chunked_kl(student, teacher, lambda states: states, torch.ones(1))
    assert forward.item() == pytest.approx(torch.tensor(3.0).log().item(), rel=1e-6)


def test_no_more_than_a_chunk_is_projected_at_once():
    student, teacher, targets, weights = case()
    sizes = []

    def project(states):
        sizes.append(len(states))
        return HEADS["plain"](states)

    chunked_kl(student, teacher, project, weights, chunk=3)
    assert sizes == [3, 3, 3, 3, 1, 1]
    sizes.clear()
    chunked_cross_entropy(student, targets, project, weights, chunk=3)
    assert sizes == [3, 3, 1]


def test_head_and_teacher_get_no_gradient():
    student, teacher, _, weights = case()
    teacher.requires_grad_()
    head = HEAD.clone().requires_grad_()
    chunked_kl(student, teacher, lambda states: states @ head.T, weights).backward()
    assert student.grad.abs().max() > 1e-3
    assert teacher.grad is None
    assert head.grad is None


@pytest.mark.parametrize("chunk", [2, 256])
def test_half_precision_states_are_compared_in_float32(chunk):
    """Against the plain loss on the same bf16 logits in float32: no error of our own beyond one
    rounding of the gradient.
    """
    student, teacher, targets, weights = case(torch.bfloat16)
    project = HEADS["plain"]

    def upcast(states):
        return project(states).float()

    found = [
        chunked_kl(student, teacher, project, weights, chunk=chunk),
        chunked_cross_entropy(student, targets, project, weights, chunk),
    ]
    expected = [
        naive_kl(student, teacher, upcast, weights),
        naive_cross_entropy(student, targets, upcast, weights),
    ]
    for pair in zip(found, expected, strict=True):
        assert pair[0].dtype == torch.float32
        assert pair[0].item() == pytest.approx(pair[1].item(), rel=1e-6)
        gradients = [torch.autograd.grad(loss, student)[0].float() for loss in pair]
        assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 2e-2


def test_no_positions_no_loss():
    student, teacher, _, weights = case()
    loss = chunked_kl(student[:0], teacher[:0], HEADS["plain"], weights[:0])
    loss.backward()
    assert loss == 0
    assert not student.grad.any()
