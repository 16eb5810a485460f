"""Bad steps: dropped, rolled back or the end, and the same after a kill."""

import math

import pytest

from tests.support import tiny_tower as tower
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.core.errors import UserError
from vlfoundry.infra.launch.launcher import RankError
from vlfoundry.infra.train.anomalies import TrainerState, find_anomaly
from vlfoundry.infra.train.config import TrainConfig

pytestmark = pytest.mark.slow

BASE = {
    "steps": 7, "batch_samples": tower.BATCH, "lr": 1e-2, "warmup_steps": 2, "save_every_steps": 2,
}  # fmt: skip
SKIP = TrainConfig(**BASE, on_bad_step="skip")
ROLLBACK = TrainConfig(**BASE, on_bad_step="rollback")
NAN = {(1, 3): math.nan}


@pytest.fixture(scope="module")
def skipped(run_ranks, tmp_path_factory):
    work = tmp_path_factory.mktemp("skip")
    return run_ranks(lambda: tower.train(work, SKIP, poison=NAN), ranks=2)


@pytest.fixture(scope="module")
def rolled_back(run_ranks, tmp_path_factory):
    work = tmp_path_factory.mktemp("rollback")
    return run_ranks(lambda: tower.train(work, ROLLBACK, poison=NAN), ranks=2)


def test_skip_drops_the_update_on_every_rank(skipped):
    first, second = skipped
    assert [row["step"] for row in first[0].history] == [0, 1, 2, 4, 5, 6]
    assert first[0].bad_steps == [
        {"step": 3, "batch": 3, "reason": "the loss is nan", "action": "skip"}
    ]
    assert first[3] == [0, *range(7)]  # the first is run dry
    assert (first[0].history, first[0].bad_steps) == (second[0].history, second[0].bad_steps)
    assert math.isfinite(first[0].history[-1]["loss"])
    assert "the loss is nan at step 3 (batch 3): skip" in first[2]


def test_rollback_goes_on_with_new_batches(rolled_back):
    result, _, _, batches = rolled_back[0]
    assert [row["step"] for row in result.history] == list(range(7))
    assert batches == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]  # after step 2's checkpoint: batches 4 ...
    assert result.bad_steps[0]["action"] == "rollback"
    assert result.steps == 7


def test_rollback_is_a_run_that_never_saw_the_batches(run_ranks, tmp_path, rolled_back):
    """Weights, moments and random states of the checkpoint, all three: else a bit would differ."""

    def shifted():
        from tests.support.tiny_tower import data_batch_at

        def jump(number):
            return data_batch_at(number if number < 2 else number + 2)

        tower_batch_at, tower.data_batch_at = tower.data_batch_at, jump
        try:
            return tower.train(tmp_path, SKIP)
        finally:
            tower.data_batch_at = tower_batch_at

    expected = run_ranks(shifted, ranks=2)[0]
    assert rolled_back[0][0].history == expected[0].history


@pytest.mark.parametrize(("config", "batch"), [(SKIP, 3), (ROLLBACK, 6)], ids=["skip", "rollback"])
def test_killed_it_decides_alike(run_ranks, tmp_path, skipped, rolled_back, config, batch):
    def crash():
        return tower.train(tmp_path, config, poison=NAN, kill=(1, batch))

    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(crash, ranks=2)
    resumed = run_ranks(lambda: tower.train(tmp_path, config, poison=NAN), ranks=2)
    expected = skipped if config is SKIP else rolled_back
    tower.assert_same(resumed[0], expected[0])


def test_stopped_before_it_rolls_back_as_far(run_ranks, tmp_path, rolled_back):
    """The checkpoint of the request is no target: the run that nobody stopped has none there."""

    def stopped():
        return tower.train(tmp_path, ROLLBACK, poison=NAN, stop=(0, 2))

    assert run_ranks(stopped, ranks=2)[0][0].steps == 3
    resumed = run_ranks(lambda: tower.train(tmp_path, ROLLBACK, poison=NAN), ranks=2)
    assert resumed[0][0].resumed_from == 3
    tower.assert_same(resumed[0], rolled_back[0])


def test_rollback_before_the_first_checkpoint_begins_anew(run_ranks, tmp_path):
    def early():
        return tower.train(tmp_path, ROLLBACK, poison={(0, 1): math.inf})

    result, _, _, batches = run_ranks(early, ranks=2)[0]
    assert batches == [0, 0, 1, *range(2, 9)]
    assert [row["step"] for row in result.history] == list(range(7))


def test_enough_bad_steps_are_an_error(run_ranks, tmp_path):
    config = TrainConfig(**BASE, on_bad_step="skip", max_bad_steps=2)
    poison = {(0, batch): math.nan for batch in range(7)}

    def bad():
        return tower.train(tmp_path, config, layout=Layout(), poison=poison)

    with pytest.raises(UserError, match=r"at step 2 \(batch 2\), after 2 bad steps"):
        run_ranks(bad, ranks=1)


def test_a_spike_is_passed_over(run_ranks, tmp_path):
    config = TrainConfig(**BASE, on_bad_step="skip", spike_factor=3.0, spike_steps=3)
    # The first comes before there is a median.
    poison = {(0, 1): 30.0, (0, 5): 30.0}
    result = run_ranks(lambda: tower.train(tmp_path, config, poison=poison), ranks=2)[0][0]
    assert [bad["step"] for bad in result.bad_steps] == [5]
    assert "times the median" in result.bad_steps[0]["reason"]


def test_what_is_bad():
    config = TrainConfig(**BASE, spike_factor=2.0, spike_steps=3)
    account = TrainerState(
        step=3, history=[{"step": i, "loss": x} for i, x in enumerate((1, 9, 2))]
    )
    assert find_anomaly({"loss": 4.0}, 1.0, account, config) is None
    assert find_anomaly({"loss": 4.1}, 1.0, account, config) is not None
    assert find_anomaly({"loss": 4.1}, 1.0, TrainerState(), config) is None
    assert find_anomaly({"loss": 1.0}, math.inf, account, config) == "the gradient norm is inf"
