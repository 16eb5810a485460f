"""Runs in FP8: the same after a kill, without FP8 after a bad step, and what they tell."""

import dataclasses
import json
import math

import pytest

from tests.support import tiny_tower as tower
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.launch.launcher import RankError
from vlfoundry.infra.train.config import TrainConfig

pytestmark = pytest.mark.slow

DELAYED = Fp8Config(recipe="delayed", amax_history=3, first_layers=0, last_layers=0)
CONFIG = TrainConfig(
    steps=8, batch_samples=tower.BATCH, lr=1e-2, warmup_steps=2, save_every_steps=2,
    log_every_steps=3, fp8=DELAYED,
)  # fmt: skip
GUARDED = dataclasses.replace(CONFIG, on_bad_step="higher_precision")
POISON = {(1, 5): math.nan}
TENSOR = Layout(tensor=2)


def train(work, config, **options):
    """Without drop path, which goes on with other numbers in another layout."""
    return tower.train(work, config, drop_path=0.0, **options)


@pytest.fixture(scope="module")
def whole(run_ranks, tmp_path_factory):
    work = tmp_path_factory.mktemp("whole")
    return run_ranks(lambda: train(work, CONFIG, sinks=("dvclive",)), ranks=2), work


@pytest.fixture(scope="module")
def fallen_back(run_ranks, tmp_path_factory):
    """The tower's loss is NaN at batch 5, if it computes in FP8."""
    work = tmp_path_factory.mktemp("fallen_back")
    return run_ranks(lambda: train(work, GUARDED, poison_in_fp8=POISON), ranks=2)


def losses(result) -> list[float]:
    return [row["loss"] for row in result[0].history]


def test_killed_it_ends_with_the_same_bits(run_ranks, tmp_path, whole):
    """The delayed scales and their history come from the checkpoint: else the first step after it
    would differ."""
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(lambda: train(tmp_path, CONFIG, kill=(1, 5)), ranks=2)
    resumed = run_ranks(lambda: train(tmp_path, CONFIG), ranks=2)
    assert resumed[0][0].resumed_from in (2, 4)
    tower.assert_same(resumed[0], whole[0][0])


def test_it_goes_on_in_another_layout(run_ranks, tmp_path, whole):
    """Two data-parallel ranks, or two tensor ranks from step 5 on: the scales are as far.

    Steps 5 and 6 are what the scales and their history decide. On a Xeon they agree to 2e-7;
    step 6 is 2.6 % off if the scales are lost, 1.8 % if the history is. At step 7, FP8 rounds in
    each layout's own way (1.1 % there; without FP8 all steps agree).
    """
    run_ranks(lambda: train(tmp_path, CONFIG, stop=(0, 4)), ranks=2)
    moved = run_ranks(lambda: train(tmp_path, CONFIG, layout=TENSOR), ranks=2)[0]
    assert moved[0].resumed_from == 5
    assert losses(moved)[:7] == pytest.approx(losses(whole[0][0])[:7], rel=0.01)


def test_scales_are_no_weights(whole):
    assert not [name for name in whole[0][0][1] if "fp8" in name or "scale" in name]


def test_a_bad_step_ends_fp8(fallen_back):
    """Back to the checkpoint of step 4, and on with the same batches."""
    first, second = fallen_back
    result, _, lines, batches = first
    assert batches == [0, *range(6), *range(4, 8)]
    assert [row["step"] for row in result.history] == list(range(8))
    assert result.left_fp8_at == 4
    assert result.bad_steps == [
        {"step": 5, "batch": 5, "reason": "the loss is nan", "action": "higher_precision"}
    ]
    assert "the loss is nan at step 5 (batch 5): higher_precision" in lines
    assert (second[0].history, second[0].left_fp8_at) == (result.history, 4)


def test_what_follows_is_a_run_in_higher_precision(run_ranks, tmp_path, fallen_back, whole):
    """The four steps before are those of FP8; from there on a run that is told to leave it."""
    assert losses(fallen_back[0])[:4] == losses(whole[0][0])[:4]
    assert losses(fallen_back[0])[4:] != losses(whole[0][0])[4:]

    def leaves():
        from vlfoundry.infra.train import trainer

        leave_at_4, begin_step = [], trainer.Fp8Run.begin_step

        def begin(run, *, watched):
            if len(leave_at_4) == 4:
                run.leave()
            leave_at_4.append(watched)
            begin_step(run, watched=watched)

        trainer.Fp8Run.begin_step = begin
        try:
            return train(tmp_path, CONFIG)
        finally:
            trainer.Fp8Run.begin_step = begin_step

    expected = run_ranks(leaves, ranks=2)[0]
    assert fallen_back[0][0].history == expected[0].history


def test_killed_before_it_decides_alike(run_ranks, tmp_path, fallen_back):
    def run(**options):
        return train(tmp_path, GUARDED, poison_in_fp8=POISON, **options)

    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(lambda: run(kill=(1, 4)), ranks=2)
    resumed = run_ranks(run, ranks=2)[0]
    tower.assert_same(resumed, fallen_back[0])
    assert resumed[0].left_fp8_at == 4


def test_stopped_after_it_remembers(run_ranks, tmp_path, fallen_back):
    def run(**options):
        return train(tmp_path, GUARDED, poison_in_fp8=POISON, **options)

    run_ranks(lambda: run(stop=(0, 6)), ranks=2)
    manifest = json.loads((tmp_path / "checkpoints/step-00000007/train.json").read_text("utf-8"))
    assert manifest["account"]["left_fp8_at"] == 4
    resumed = run_ranks(run, ranks=2)[0]
    assert resumed[0].resumed_from == 7
    tower.assert_same(resumed, fallen_back[0])
    assert resumed[0].left_fp8_at == 4


def test_bad_without_fp8_too_it_is_rolled_back(run_ranks, tmp_path):
    """The batch is at fault: once it is computed in higher precision, then passed over."""
    poison = {(0, 5): math.inf}
    result, _, _, batches = run_ranks(
        lambda: train(tmp_path, GUARDED, poison=poison), ranks=2
    )[0]  # fmt: skip
    assert [bad["action"] for bad in result.bad_steps] == ["higher_precision", "rollback"]
    assert batches == [0, *range(6), 4, 5, 6, 7, 8, 9]
    assert result.left_fp8_at == 4
    assert result.steps == 8


def test_logged_steps_tell_what_was_lost(whole):
    _, work = whole
    rows = [json.loads(line) for line in (work / "steps.jsonl").read_text("utf-8").splitlines()]
    told = {row["step"]: row for row in rows if "fp8_amax" in row}
    assert sorted(told) == [2, 5, 7]
    for row in told.values():
        assert row["fp8_amax"] > 0
        assert 0 <= row["fp8_lost"] <= 1
        assert row["fp8_lost_at"].startswith("decoder.layers.")


def test_sinks_get_its_numbers(whole):
    told = whole[1] / "dvclive/plots/metrics"
    assert len((told / "fp8_lost.tsv").read_text("utf-8").splitlines()) == 1 + 3
    assert not (told / "fp8_lost_at.tsv").exists()
