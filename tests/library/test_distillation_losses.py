import math

import pytest
import torch

from tritern.distillation import losses
from tritern.distillation.losses import Outputs


def test_cosine_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    assert losses.cosine(a, b) == pytest.approx(0.5)


def test_similarity_by_hand():
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    # cosines to the two others, in order: student (1, 0), (1, 0), (0, 0); teacher (0, 0), (0, 1), (0, 1)
    high, low = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))  # softmax of (1, 0) at temperature 0.5
    half_to = 0.5 * math.log(0.5 / high) + 0.5 * math.log(0.5 / low)
    crossed = low * math.log(low / high) + high * math.log(high / low)
    to_half = low * math.log(low / 0.5) + high * math.log(high / 0.5)
    expected = (half_to + crossed + to_half) / 3
    assert losses.similarity(student, teacher, temperature=0.5) == pytest.approx(expected, rel=1e-5)
    assert losses.similarity(student[:1], teacher[:1]) == 0  # no neighbours


def test_similarity_over_processes_is_that_of_their_union():
    student, teacher = torch.randn(8, 5), torch.randn(8, 7)
    whole = losses.similarity(student, teacher)
    parts = [losses.similarity(student[i : i + 4], teacher[i : i + 4], student, teacher, i) for i in (0, 4)]
    assert torch.allclose(sum(parts) / 2, whole)


def test_hidden_mse_by_hand():
    teacher = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])  # variances 1 and 4
    student = teacher + torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])  # squared errors 1 and 4
    mask = torch.ones(1, 2)
    assert losses.hidden_mse([student], [teacher], mask) == pytest.approx(1.0)
    assert losses.hidden_mse([student, teacher], [teacher, teacher], mask) == pytest.approx(0.5)
    assert losses.last_hidden_mse(student, teacher, mask) == pytest.approx(2.5)


def outputs(B=3, T=6, D=24):
    return Outputs(torch.randn(B, D), [torch.randn(B, T, D) for _ in range(2)])


def test_a_student_equal_to_its_teacher_loses_nothing():
    same, mask = outputs(), torch.ones(3, 6)
    for name, value in losses.terms(same, same, mask, losses.LOSSES).items():
        assert value == pytest.approx(0, abs=1e-6), name
    for name, value in losses.terms(same, outputs(), mask, losses.LOSSES).items():
        assert value > 1e-3, name


@pytest.mark.parametrize("name", ["hidden", "last_hidden"])
def test_padding_never_enters(name):
    student, teacher = outputs(), outputs()
    for tensor in student.hidden:
        tensor.requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    value = losses.terms(student, teacher, mask, [name])[name]
    value.backward()
    grads = [t.grad for t in student.hidden if t.grad is not None]
    assert grads and all((g[mask == 0] == 0).all() and (g[mask == 1] != 0).any() for g in grads)
    student = Outputs(student.pooled, [h.detach() for h in student.hidden])
    with torch.no_grad():
        for tensor in (*student.hidden, *teacher.hidden):
            tensor[mask == 0] = 1e3
    assert losses.terms(student, teacher, mask, [name])[name] == pytest.approx(value.item(), rel=1e-5)
    # as if the padding were not there at all
    alone = [Outputs(o.pooled[1:2], [h[1:2, :2] for h in o.hidden]) for o in (student, teacher)]
    text = [Outputs(o.pooled[1:2], [h[1:2] for h in o.hidden]) for o in (student, teacher)]
    short = losses.terms(*alone, torch.ones(1, 2), [name])[name]
    assert losses.terms(*text, mask[1:2], [name])[name] == pytest.approx(short.item(), rel=1e-5)


def test_matryoshka_dimensions_average_over_the_cuts():
    student, teacher = outputs(), outputs()
    for name, function in (("cosine", losses.cosine), ("similarity", losses.similarity)):
        cuts = [function(student.pooled[:, :d], teacher.pooled[:, :d]) for d in (8, 24)]
        value = losses.terms(student, teacher, None, [name], dims=[8, 24])[name]
        assert torch.allclose(value, sum(cuts) / 2)
    gathered = {"all_student": student.pooled, "all_teacher": teacher.pooled, "first": 0}
    again = losses.terms(student, teacher, None, ["similarity"], dims=[8, 24], gathered=gathered)
    assert torch.allclose(again["similarity"], value)
