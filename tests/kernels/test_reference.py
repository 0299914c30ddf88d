import itertools

import pytest
import torch

from tritern_kernels import reference


def test_rules_by_hand():
    weight = torch.tensor([[4.0, -3.0, 0.5, 0.0], [1.0, 1.0, -1.0, 1.0]])
    # mse, row 0: k = 2 gives 49 / 2 = 24.5, k = 1: 16, k = 3: 18.75. Row 1: all four.
    codes, scale = reference.ternarize(weight, "mse")
    assert codes.tolist() == [[1, -1, 0, 0], [1, 1, -1, 1]] and scale.tolist() == [3.5, 1.0]
    # absmean: 11.5 / 8 = 1.4375 everywhere, threshold half of it
    codes, scale = reference.ternarize(weight, "absmean")
    assert codes.tolist() == [[1, -1, 0, 0], [1, 1, -1, 1]] and scale.tolist() == [1.4375, 1.4375]
    # twn, row 0: threshold 0.7 * 7.5 / 4 = 1.3125
    codes, scale = reference.ternarize(weight, "twn")
    assert codes.tolist() == [[1, -1, 0, 0], [1, 1, -1, 1]] and scale.tolist() == [3.5, 1.0]


def test_mse_is_the_optimum_over_all_codes():
    rows = torch.randn(20, 6)
    codes, scale = reference.ternarize(rows, "mse")
    error = ((scale[:, None] * codes - rows) ** 2).sum(1)
    candidates = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6)))
    dot = rows @ candidates.T
    best = (rows**2).sum(1) - (dot.clamp(min=0) ** 2 / candidates.abs().sum(1).clamp(min=1)).amax(1)
    assert torch.allclose(error, best, atol=1e-5)


@pytest.mark.parametrize("rule", reference.RULES)
def test_zero_rows_stay_zero(rule):
    codes, scale = reference.ternarize(torch.zeros(3, 8), rule)
    assert codes.count_nonzero() == 0 and scale.count_nonzero() == 0


def test_unknown_rule():
    with pytest.raises(ValueError, match="one of mse, absmean, twn; received 'sign'"):
        reference.ternarize(torch.ones(2, 2), "sign")


def test_quantize_by_hand():
    x = torch.tensor([[127.0, -63.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    q, scale = reference.quantize_activations(x)
    assert q.tolist() == [[127, -64, 0, 0], [0, 0, 0, 0]]  # halves go to the even neighbour
    assert scale[0] == pytest.approx(1.0) and scale[1] > 0


def test_quantize_extremes():
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [1e-38, 0.0], [3e38, -3e38]])
    q, scale = reference.quantize_activations(x)
    assert q[:2].count_nonzero() == 0 and scale[:2].isnan().all()
    assert q[2:].tolist() == [[0, 0], [127, -127]] and scale[2:].isfinite().all()
