"""The fits of the second repair against the textbook, on problems small enough for it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from selfpruner_hub.calibration.ridge import HELD_OUT
from selfpruner_hub.pruning import least_squares
from selfpruner_hub.pruning.least_squares import Gated, LinearFit, fit_inputs, nearest_minimum

N, W, H, K, F = 80, 16, 5, 2, 7
FITTED = [i for i in range(N) if (i + 1) % HELD_OUT]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_linear_fit_is_ordinary_least_squares_where_the_ridge_is_nothing():
    x, noise = normal(N, W, F), 0.1 * normal(N, W, H, seed=1)
    module = nn.Linear(F, H)
    target = x @ normal(F, H, seed=2) + noise
    fit = LinearFit(module, (1e-9,))
    for windows, wanted in zip(x.split(8), target.split(8), strict=True):
        fit.add(windows, wanted)
    fit.apply()
    solution = torch.linalg.lstsq(x.flatten(0, 1), (target - module.bias).flatten(0, 1)).solution
    torch.testing.assert_close(module.weight.data, solution.t(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("root", [None, torch.tensor([100.0] + [0.1] * (H - 1)).diag()])
@pytest.mark.parametrize(("noise", "strength"), [(0.01, 1.0), (1.0, 1.0), (50.0, 0.001)])
def test_of_all_ridges_it_takes_that_of_least_error_on_what_is_held_out(noise, strength, root):
    ridges = tuple(10.0**exponent for exponent in range(-4, 4))
    x, module = normal(N, 2, F), nn.Linear(F, H, bias=False)
    before = module.weight.copy_(normal(H, F, seed=2)).clone()
    noisy = noise * normal(N, 2, H, seed=1) * torch.linspace(5, 0.1, H)  # so that the first output wants another λ
    target = x @ normal(H, F, seed=2).t() + noisy + strength * x @ normal(F, H, seed=4)

    def solved(windows, ridge):
        inputs, wanted = x[windows].flatten(0, 1), target[windows].flatten(0, 1)
        gram, cross = inputs.t() @ inputs / len(inputs), wanted.t() @ inputs / len(inputs)
        damping = ridge * gram.diagonal().mean()
        return (cross + damping * before) @ torch.linalg.inv(gram + damping * torch.eye(F))

    held = [i for i in range(N) if i not in FITTED]
    seen = torch.eye(H) if root is None else root
    rests = {ridge: (target[held] - x[held] @ solved(FITTED, ridge).t()) @ seen.t() for ridge in ridges}
    best = min(ridges, key=lambda ridge: rests[ridge].square().sum().item())
    fit = LinearFit(module, ridges, root)
    fit.add(x, target)
    fit.apply()
    torch.testing.assert_close(module.weight.data, solved(FITTED, best), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_what_is_held_out_is_not_fitted():
    """Targets of windows that are held out choose λ, and change nothing else."""
    x, module, ridge = normal(N, 2, F), nn.Linear(F, H, bias=False), 0.1
    target = x @ normal(H, F, seed=2).t() + normal(N, 2, H, seed=1)
    other = target.clone()
    other[[i for i in range(N) if i not in FITTED]] *= -3
    before, weights = module.weight.clone(), []
    for wanted in (target, other):
        module.weight.copy_(before)
        fit = LinearFit(module, (ridge, ridge))  # more than one, so that windows are held out; alike, so that it is
        fit.add(x, wanted)
        fit.apply()
        weights.append(module.weight.clone())
    assert torch.equal(*weights)
    assert not torch.allclose(weights[0], before, atol=0.1)


def gated(noise, seed=0):
    """Windows whose outputs another gate and up would give, but for some noise; and the change to those; and down."""
    h, factors, down = normal(N, W, H, seed=seed), normal(N, W, K, F, seed=seed + 1).relu(), normal(H, F, seed=9)
    change = normal(K, F, H, seed=8)
    rest = moved(h, factors, down, change) + noise * normal(N, W, H, seed=seed + 2)
    return [Gated(*parts) for parts in zip(h.split(8), factors.split(8), rest.split(8), strict=True)], change, down


def moved(h, factors, down, change):
    """D Σ_k f_k ∘ (V_k h), written out."""
    return torch.einsum("nwkf,kfi,nwi,of->nwo", factors, change, h, down)


def error(windows, down, change):
    return torch.cat([each.rest - moved(each.h, each.factors, down, change) for each in windows]).square().mean().item()


def test_the_change_is_found_where_it_explains_the_output(monkeypatch):
    monkeypatch.setattr(least_squares, "ITERATIONS", 300)
    windows, change, down = gated(noise=0.0)
    torch.testing.assert_close(fit_inputs(lambda: windows, change.shape, down), change, atol=1e-2, rtol=1e-2)


def test_it_equals_the_direct_solution(monkeypatch):
    """With the design matrix written out, column by column of V, for the windows that are not held out."""
    monkeypatch.setattr(least_squares, "ITERATIONS", 300)
    windows, change, down = gated(noise=0.05)
    found = fit_inputs(lambda: windows, change.shape, down)
    h, factors, rest = (torch.cat(parts)[FITTED].flatten(0, 1) for parts in zip(*windows, strict=True))
    design = torch.einsum("tkf,ti,of->tokfi", factors, h, down).flatten(2).flatten(0, 1)
    direct = torch.linalg.lstsq(design, rest.flatten()[:, None]).solution.view(K, F, H)
    torch.testing.assert_close(found, direct, atol=2e-2, rtol=2e-2)  # early stopping ends a little before


def steps_of(windows, change, down, steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(least_squares, "ITERATIONS", steps)
        return fit_inputs(lambda: windows, change.shape, down)


def held_out_as(windows, change):
    """The same windows, those that are held out with another target."""
    rest = torch.cat([each.rest for each in windows])
    held = [i for i in range(N) if i not in FITTED]
    rest[held] = change(rest[held])
    return [each._replace(rest=part) for each, part in zip(windows, rest.split(8), strict=True)]


def test_what_is_held_out_moves_no_step():
    """It says where the steps end, and nothing of where they lead."""
    windows, change, down = gated(noise=0.5)
    found = steps_of(windows, change, down, 1)
    assert found.any()
    assert torch.equal(steps_of(held_out_as(windows, lambda rest: 2 * rest), change, down, 1), found)
    assert not steps_of(held_out_as(windows, lambda rest: -rest), change, down, 1).any()


def gradient(windows, down, change):
    """Of half the squared error on the windows to fit, by V, `[K, F, H]`."""
    h, factors, rest = (torch.cat(parts)[FITTED] for parts in zip(*windows, strict=True))
    left = rest - moved(h, factors, down, change)
    return -torch.einsum("nwo,of,nwkf,nwi->kfi", left, down, factors, h)


def test_its_steps_are_those_of_conjugate_gradients():
    """After each, no step that was taken can be taken further: the gradient is orthogonal to all of them."""
    windows, change, down = gated(noise=0.5)
    reached = [torch.zeros_like(change)]
    for steps in range(1, 4):
        reached.append(steps_of(windows, change, down, steps))
        slope = gradient(windows, down, reached[-1])
        for before, after in itertools.pairwise(reached):
            step = after - before
            assert step.any()
            assert abs((slope * step).sum()) < 1e-2 * slope.norm() * step.norm()


def test_it_takes_two_steps():
    """Each takes away much of what the one before leaves, on the windows to fit."""
    windows, change, down = gated(noise=0.0)
    reached = [error(windows, down, steps_of(windows, change, down, steps)) for steps in (1, 2)]
    assert torch.equal(fit_inputs(lambda: windows, change.shape, down), steps_of(windows, change, down, 2))
    for before, after in itertools.pairwise([error(windows, down, 0 * change), *reached]):
        assert after < 0.8 * before


def test_a_few_steps_already_help_on_other_windows():
    windows, change, down = gated(noise=0.5)
    unseen, _, _ = gated(noise=0.5, seed=20)
    assert error(unseen, down, fit_inputs(lambda: windows, change.shape, down)) < 0.5 * error(unseen, down, 0 * change)


def test_noise_is_not_fitted():
    """Of it, so little that other windows do not mind."""
    windows, change, down = gated(0.0)
    noise = [each._replace(rest=normal(*each.rest.shape, seed=30 + i)) for i, each in enumerate(windows)]
    other, _, _ = gated(0.0, seed=20)
    unseen = [each._replace(rest=normal(*each.rest.shape, seed=60 + i)) for i, each in enumerate(other)]
    assert error(unseen, down, fit_inputs(lambda: noise, change.shape, down)) < 1.02 * error(unseen, down, 0 * change)


def test_nothing_moves_without_a_window_to_hold_out():
    windows, change, down = gated(0.0)
    few = [Gated(*(part[:3] for part in windows[0]))]
    assert not fit_inputs(lambda: few, change.shape, down).any()


NAN = float("nan")


@pytest.mark.parametrize(
    ("errors", "start", "best", "read"),
    [
        ([5, 4, 3, 4, 5], 2, 2, 3),  # the start and both neighbours
        ([5, 4, 3, 2, 3], 1, 3, 5),
        ([1, 2, 3, 4, 5], 2, 0, 3),  # down, to the end: nothing above is asked for
        ([5, 4, 3, 2, 1], 4, 4, 2),
        ([5, 3, NAN, 4], 2, 1, 3),
        ([NAN, NAN, NAN], 1, 1, 3),
        ([1], 0, 0, 1),
    ],
)
def test_the_walk_ends_where_both_neighbours_are_worse(errors, start, best, read):
    asked = []
    assert nearest_minimum(errors.__getitem__, len(errors), lambda e: asked.append(e) or e, start)[0] == best
    assert len(asked) == read


def test_the_layer_after_starts_from_the_ridge_that_was_taken():
    """And finds the same there, with the neighbours alone."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(2 * HELD_OUT, 5, size, generator=generator) for size in (4, 3))
    target, ridges = x[..., :3] + noise, (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    taken, weights = [], []
    for start in (0, None, 5):
        module = nn.Linear(4, 3, bias=False).requires_grad_(False)
        module.weight.zero_()
        fit = LinearFit(module, ridges)
        fit.add(x, target)
        taken.append(fit.apply(start))
        weights.append(module.weight)
    assert taken[0] == taken[1] == taken[2] not in (0, 3, 5)  # nor where a walk began
    assert torch.equal(weights[0], weights[2])


def test_with_too_few_windows_to_hold_one_out_the_strongest_ridge_is_taken():
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(2, 5, size, generator=generator) for size in (4, 3))
    before = torch.randn(3, 4, generator=generator)

    def fitted(ridges):
        module = nn.Linear(4, 3, bias=False).requires_grad_(False)
        module.weight.copy_(before)
        fit = LinearFit(module, ridges)
        fit.add(x, target)
        fit.apply()
        return module.weight

    assert torch.equal(fitted((0.01, 1.0, 100.0)), fitted((100.0,)))
    assert not torch.allclose(fitted((100.0,)), fitted((0.01,)))


@torch.no_grad()
def test_a_projection_that_reads_nothing_keeps_its_weight():
    """As after an up_proj that was pruned by zeroing; its target is whatever."""
    module = nn.Linear(F, H, bias=False)
    before = module.weight.clone()
    fit = LinearFit(module, (0.01, 1.0))
    fit.add(torch.zeros(16, 2, F), normal(16, 2, H))
    fit.apply()
    torch.testing.assert_close(module.weight, before)


@pytest.mark.parametrize("dead", [[0], [0, 1]])
def test_factors_that_are_zero_move_nothing_of_theirs(dead):
    """With an up_proj of zeros, gate_proj has no effect; with a gate that is closed too, neither has."""
    windows, change, down = gated(noise=0.0)
    zeroed = [each._replace(factors=each.factors.index_fill(-2, torch.tensor(dead), 0)) for each in windows]
    found = fit_inputs(lambda: zeroed, change.shape, down)
    assert not found[dead].any()
    assert found.isfinite().all()
    assert found.any() == (len(dead) < K)


@torch.no_grad()
def test_where_a_batch_ends_does_not_matter():
    x, target = normal(40, 6, F), normal(40, 6, H, seed=1)
    weights = []
    for size in (3, 40):
        module = nn.Linear(F, H, bias=False)
        module.weight.copy_(normal(H, F, seed=2))
        fit = LinearFit(module, (0.01, 1.0, 100.0))
        for windows, wanted in zip(x.split(size), target.split(size), strict=True):
            fit.add(windows, wanted)
        fit.apply()
        weights.append(module.weight)
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_ridge_suits_the_outputs_that_the_loss_minds():
    """The first output is the input times a weight, the others are noise: they want the weakest and the strongest."""
    x, truth = normal(16, 2, F), normal(F, seed=2)
    target = torch.cat([(x @ truth)[..., None], 100 * normal(16, 2, H - 1, seed=1)], -1)

    def first_row(minded):
        module = nn.Linear(F, H, bias=False)
        module.weight.zero_()
        fit = LinearFit(module, (1e-4, 1e3), None if minded is None else torch.tensor(minded).diag())
        fit.add(x, target)
        fit.apply()
        return module.weight[0]

    torch.testing.assert_close(first_row([1e3] + [1e-3] * (H - 1)), truth, atol=1e-2, rtol=1e-2)
    assert first_row(None).abs().max() < 0.1 * truth.abs().max()


@torch.no_grad()
def test_a_factor_that_needs_a_stronger_ridge_leads_to_no_other_weight():
    """Where nothing is to be gained, the weight stays as it is, and is not drawn to zero."""
    module = nn.Linear(F, H, bias=False)
    sums = least_squares._Sums(module)
    sums.add(normal(N, F), normal(N, H))
    sums.add_up(lambda tensor: tensor)
    sums._gram[0, 0] = -0.5  # rounding of sums makes such matrices
    sums._cross = module.weight @ sums._gram
    torch.testing.assert_close(sums.solver(module.weight)(1e-3), module.weight, atol=1e-5, rtol=1e-5)
