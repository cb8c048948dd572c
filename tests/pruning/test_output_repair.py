"""The repair is the least-squares optimum, for every width, from one factor."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selfpruner_hub.calibration.ridge import RIDGE, RIDGES, choose_ridge
from selfpruner_hub.calibration.statistics import Moments
from selfpruner_hub.errors import ModelError
from selfpruner_hub.pruning.output_repair import Repair

D, OUT, TOKENS = 12, 5, 400


def made(weight, gram, ridge=RIDGE, root=None):
    """The repair of a projection whose columns are in order."""
    module = torch.nn.Linear(*weight.t().shape, bias=False, dtype=weight.dtype)
    module.weight.data = weight
    return Repair.of(0, module, Moments(gram[0], gram, ridge), torch.arange(len(gram)), root=root)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D, D, generator=generator)
    x = torch.randn(TOKENS, D, generator=generator) @ mixing  # correlated inputs: something to repair with
    return torch.randn(OUT, D, generator=generator), x, x.t() @ x / TOKENS


def ridge_solution(weight, gram, kept, ridge):
    """The textbook formula: W_K + W_R H_RK H_KK⁻¹."""
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(D)
    k, r = slice(0, kept), slice(kept, D)
    return weight[:, k] + weight[:, r] @ damped[r, k] @ torch.linalg.inv(damped[k, k])


@pytest.mark.parametrize("kept", range(1, D + 1))
def test_equals_the_formula(problem, kept):
    weight, _, gram = problem
    expected = ridge_solution(weight, gram, kept, 0.01)
    torch.testing.assert_close(made(weight, gram, 0.01).weight(kept), expected, atol=1e-4, rtol=1e-4)


def test_no_perturbation_lowers_the_calibration_error(problem):
    weight, x, gram = problem
    repaired = made(weight, gram, 0.0).weight(7)

    def error(candidate):
        return (x @ weight.t() - x[:, :7] @ candidate.t()).double().square().mean()

    best = error(repaired)
    assert best < 0.9 * error(weight[:, :7])
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 1e-2, 1e-1):
        for _ in range(50):
            assert error(repaired + scale * torch.randn(repaired.shape, generator=generator)) >= best


@pytest.mark.parametrize("root", [None, torch.randn(OUT, OUT, generator=torch.Generator().manual_seed(3)).triu()])
def test_error_curve_is_the_measured_error(problem, root):
    weight, x, gram = problem
    repair = made(weight, gram, 0.0, root=root)
    curve, seen = repair.errors().float(), torch.eye(OUT) if root is None else root.t()
    assert len(curve) == D + 1
    for kept in range(1, D + 1):
        measured = ((x @ weight.t() - x[:, :kept] @ repair.weight(kept).t()) @ seen).square().sum(1).mean()
        torch.testing.assert_close(curve[kept], measured, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(curve[0], (x @ weight.t() @ seen).square().sum(1).mean(), atol=1e-3, rtol=1e-3)


def test_keeps_the_dtype(problem):
    weight, _, gram = problem
    assert made(weight.bfloat16(), gram).weight(3).dtype == torch.bfloat16


def test_statistics_that_are_not_finite_are_refused(problem):
    weight, _, gram = problem
    with pytest.raises(ModelError, match="not finite"):
        made(weight, gram * torch.nan)


def test_the_ridge_is_the_one_that_held_out_text_bears_out(problem):
    """Of few tokens a strong ridge, of many a weak one."""
    weight, x, _ = problem
    generator = torch.Generator().manual_seed(2)
    held = x[200:].t() @ x[200:]
    chosen = []
    for tokens, noise in ((14, 3.0), (200, 0.0)):
        seen = x[:tokens] + noise * torch.randn(tokens, D, generator=generator)
        chosen.append(choose_ridge(weight, seen.t() @ seen, held))
    assert set(chosen) <= set(RIDGES)
    assert chosen[1] == RIDGES[0]
    assert chosen[0] > chosen[1]


def test_a_projection_whose_inputs_are_dead_is_cut_without_a_change_or_an_error(problem):
    weight, _, gram = problem
    assert choose_ridge(weight, 0 * gram, 0 * gram) in RIDGES
    repair = made(weight, 0 * gram)
    torch.testing.assert_close(repair.weight(3), weight[:, :3])
    assert repair.errors().max() < 1e-9  # to cut them costs nothing


def test_a_ridge_is_found_where_half_of_the_inputs_are_dead():
    """Those come first in the order of energy, as all others do, since the weight is nothing."""
    alive = torch.cat([torch.zeros(8), torch.ones(8)])
    assert choose_ridge(torch.zeros(3, 16), alive.diag(), alive.diag()) in RIDGES


class Products(TorchDispatchMode):
    """Sees where the factors of every product lie."""

    def __init__(self):
        super().__init__()
        self.storages = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.storages |= {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def test_where_a_weight_lies_does_not_show_in_its_repair():
    """Loaded weights lie anywhere in memory, and the last bits of a product may depend on it: none is of those."""
    generator = torch.Generator().manual_seed(0)
    x, values = torch.randn(96, 48, generator=generator), torch.randn(32 * 48 + 1, generator=generator)
    weight = values[1:].view(32, 48)
    repair = made(weight, x.t() @ x)
    for kept in range(1, 48):
        with Products() as seen:
            found = repair.weight(kept)
        assert seen.storages
        assert weight.untyped_storage().data_ptr() not in seen.storages
        assert torch.equal(found, made(weight.clone(), x.t() @ x).weight(kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_repaired_weight_lies_as_a_linear_layer_reads_it(problem, dtype):
    """The solver returns columns; candidates run with what it returns, and nothing copies it for them."""
    weight, _, gram = problem
    repair = made(weight.to(dtype), gram)
    assert all(repair.weight(kept).is_contiguous() for kept in range(1, D + 1))
