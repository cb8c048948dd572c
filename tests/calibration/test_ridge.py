"""The ridge: raised where it is lost in rounding, as far as it goes, and chosen on text that is held out."""

from __future__ import annotations

import pytest
import torch

from selfpruner_hub.calibration.ridge import (
    HELD_OUT,
    RIDGES,
    STRONGEST,
    choose_ridge,
    damped_factor,
    rounded_factor,
    split_held_out,
)
from selfpruner_hub.errors import ModelError

D = 12


def gram(least):
    """A symmetric matrix of mean diagonal 1, whose least eigenvalue is below zero, as after rounding."""
    values = torch.cat([torch.tensor([least]), torch.full((D - 1,), (D - least) / (D - 1))])
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]
    return turn @ values.diag() @ turn.t()


def ridge_of(factor, matrix):
    """λ, in units of the mean diagonal: what the factor's product has more than the matrix."""
    more = factor @ factor.t() - matrix
    ridge = (more.diagonal().mean() / matrix.diagonal().mean()).item()
    torch.testing.assert_close(more, ridge * matrix.diagonal().mean() * torch.eye(D), atol=1e-4, rtol=1e-3)
    return ridge


@pytest.mark.parametrize(
    ("least", "asked", "taken"),
    [
        (0.5, 0.0, 0.0),
        (0.5, 1e-3, 1e-3),
        (-5e-4, 0.0, RIDGES[0]),
        (-5e-4, 1e-3, 1e-3),
        (-5e-3, 1e-3, 1e-2),
        (-5e-2, 1e-3, 0.1),
        (-0.5, 1e-3, STRONGEST),
        (-0.5, 0.0, STRONGEST),
    ],
)
def test_a_ridge_that_is_too_weak_is_raised_by_tens(least, asked, taken):
    matrix = gram(least)
    before = matrix.clone()
    assert ridge_of(damped_factor(matrix, asked), matrix) == pytest.approx(taken, abs=1e-5, rel=1e-3)
    assert torch.equal(matrix, before)


def test_its_unit_may_be_that_of_a_greater_matrix():
    matrix = gram(-5e-3)
    factor = damped_factor(matrix, 1e-3, unit=torch.tensor(10.0))
    assert ridge_of(factor, matrix) == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("least", [-1.5, -100.0])
def test_where_the_strongest_does_not_help_it_is_an_error(least):
    with pytest.raises(ModelError, match="degenerate"):
        damped_factor(gram(least), 1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_an_error(value):
    matrix = gram(0.5)
    matrix[2, 2] = value
    with pytest.raises(ModelError, match="not finite"):
        damped_factor(matrix, 1e-3)


def test_a_factor_that_is_not_finite_is_none_though_nothing_failed(monkeypatch):
    """As CUDA's solvers give it."""

    def silent(matrix):
        return torch.full_like(matrix, torch.nan), torch.zeros((), dtype=torch.int32)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", silent)
    for factor in (lambda: damped_factor(gram(0.5), 1e-3), lambda: rounded_factor(gram(0.5))):
        with pytest.raises(ModelError, match="degenerate"):
            factor()


def test_what_rounding_has_spoiled_is_factored_still():
    good, spoiled = gram(0.5), gram(-1e-6)
    assert torch.equal(rounded_factor(good), torch.linalg.cholesky(good))
    for factor, matrix in zip(rounded_factor(torch.stack([good, spoiled])), (good, spoiled), strict=True):
        torch.testing.assert_close(factor @ factor.t(), matrix, atol=2e-4, rtol=1e-3)
    with pytest.raises(ModelError, match="degenerate"):
        rounded_factor(-good)


@pytest.mark.parametrize("batches", [[40], [1] * 40, [7, 1, 20, 12]])
def test_one_window_in_so_many_is_held_out_however_they_come(batches):
    first, held = 0, []
    for count in batches:
        for rows, all_held in split_held_out(first, count):
            held += [all_held] * (rows.stop - rows.start)
        first += count
        assert (rows.stop, len(held)) == (count, first)
    assert held == [(index + 1) % HELD_OUT == 0 for index in range(40)]
    assert sum(held) == 40 // HELD_OUT


@pytest.mark.parametrize("noise", [0.03, 0.3, 3.0])
def test_of_all_ridges_that_of_least_error_on_what_is_held_out_is_chosen(noise):
    """By brute force, in float64: the removed half of the columns is predicted from the half that is kept."""
    generator = torch.Generator().manual_seed(1)
    few, more = (torch.randn(count, 5, generator=generator) for count in (16, 400))
    mixed = torch.randn(5, D, generator=generator)
    scale = torch.linspace(3, 0.2, D)  # the kept columns have a greater mean than all
    x, held = ((each @ mixed + noise * torch.randn(len(each), D, generator=generator)) * scale for each in (few, more))
    weight = torch.randn(4, D, generator=generator)
    order = (x.square().sum(0) * weight.square().sum(0)).argsort(descending=True)
    kept, gone = order[: D // 2], order[D // 2 :]
    unit = x.double().square().sum(0).mean()

    def error(ridge):
        inputs, lost = x.double()[:, kept], x.double()[:, gone] @ weight.double()[:, gone].t()
        damped = inputs.t() @ inputs + ridge * unit * torch.eye(D // 2)
        moved = torch.linalg.solve(damped, inputs.t() @ lost)
        wanted = held.double()[:, gone] @ weight.double()[:, gone].t()
        return (wanted - held.double()[:, kept] @ moved).square().sum().item()

    assert choose_ridge(weight, x.t() @ x, held.t() @ held) == min(RIDGES, key=error)
