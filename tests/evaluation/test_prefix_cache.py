"""A candidate that starts from what an earlier one left at a layer boundary scores the same, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny import DISTINCT, tiny_model

import selfpruner_hub.evaluation.prefix_cache as prefix_cache
import selfpruner_hub.models.forward as forward
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.evaluation.prefix_cache import KEPT, PrefixCache
from selfpruner_hub.models.architectures import decoder_layers
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.pruning.prepare import prepared
from selfpruner_hub.settings import PruneSettings

WINDOWS = torch.randint(3, 128, (10, 24), generator=torch.Generator().manual_seed(0))
ONE = Plan.of([30, 40, 20, 25], [2, 4, 3, 4])
"""Four layers; the others share its first 3, 1 and 0."""
OTHERS = [Plan.of([30, 40, 20, 26], [2, 4, 3, 1]), Plan.of([30, 41, 20, 25], [2, 4, 3, 4]), Plan.of([48] * 4, [4] * 4)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(forward, "BATCH_TOKENS", 3 * 24)


@pytest.fixture
def skipped(monkeypatch):
    """How many layers each candidate skipped."""
    depths = []
    start = PrefixCache.start

    def watched(self, *args):
        found = start(self, *args)
        depths.append(found.depth)
        return found

    monkeypatch.setattr(prefix_cache.PrefixCache, "start", watched)
    return depths


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
@pytest.mark.parametrize("name", DISTINCT)
def test_the_score_is_the_same_to_the_bit(name, metric, skipped, monkeypatch):
    model = tiny_model(name).bfloat16()
    with prepared(model, WINDOWS, PruneSettings()) as ready:
        slicer = ready.slicer
        monkeypatch.setattr("selfpruner_hub.evaluation.fitness.PREFIX_MEMORY", 0)
        plain = Fitness(slicer, WINDOWS, metric)
        expected = [plain(plan, share) for share in (0.3, 1.0) for plan in (ONE, *OTHERS)]
        assert set(skipped) == {0}
        skipped.clear()
        monkeypatch.setattr("selfpruner_hub.evaluation.fitness.PREFIX_MEMORY", 1e3)
        sharing = Fitness(slicer, WINDOWS, metric)
        assert [sharing(plan, share) for share in (0.3, 1.0) for plan in (ONE, *OTHERS)] == expected
        assert skipped == [0, 3, 1, 0, 0, 3, 1, 0]  # nothing is shared between shares
        assert sharing(ONE) == expected[4]  # all of its layers but the last are known by now
        assert len(decoder_layers(model)) == 4


def test_only_what_fits_is_kept_at_even_distances():
    dense = Plan.of([48] * 12, [4] * 12)
    assert PrefixCache(0).start(dense, 4, 10)._checkpoints_at == set()
    assert PrefixCache(KEPT * 10 * 3 + 1).start(dense, 4, 10)._checkpoints_at == {3, 6, 9}
    assert PrefixCache(1e9).start(dense, 4, 10)._checkpoints_at == set(range(1, 12))


def test_the_best_are_kept_and_the_deepest_boundary_is_taken():
    known = PrefixCache(1e9)
    plans = [Plan.of([width, width, 3, 4], [1] * 4) for width in range(10, 10 + KEPT + 2)]
    for number, plan in enumerate(plans):
        start = known.start(plan, 4, 1)
        assert start.depth == 0
        start.layers(lambda _: torch.nn.Identity())
        known.keep(start, 4, math.inf if number == 0 else -number)
    for plan in plans[:2]:
        assert known.start(plan, 4, 1).depth == 0  # the worst two went
    for plan in plans[2:]:
        assert known.start(plan, 4, 1).depth == 3
        assert known.start(plan, 5, 1).depth == 0
    near = Plan.of([plans[-1].layers[0].intermediate_size, 9, 3, 4], [1] * 4)
    assert known.start(near, 4, 1).depth == 1
