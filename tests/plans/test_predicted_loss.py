"""Steps of a width."""

from selfpruner_hub.plans.predicted_loss import STEP, step_channels


def test_a_step_is_a_twentieth_and_at_least_one_channel():
    assert STEP == 0.05
    assert [step_channels(n) for n in (1536, 40, 3)] == [77, 2, 1]
