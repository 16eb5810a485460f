"""Runs in FP8: the same after a kill, without FP8 after a bad step, and what they tell."""

import dataclasses
import json
import math
import shutil

import pytest

from infra.backend import Layout
from infra.backend.ranks import RankError
from infra.fp8 import Fp8Config
from infra.train.config import TrainConfig
from tests import tower

DELAYED = Fp8Config(recipe="delayed", amax_history=3, first_layers=0, last_layers=0)
TENSORWISE = dataclasses.replace(DELAYED, recipe="tensorwise")
CONFIG = TrainConfig(
    steps=7, batch_samples=tower.BATCH, lr=1e-2, warmup_steps=2, save_every_steps=2,
    log_every_steps=3, fp8=DELAYED,
)  # fmt: skip
GUARDED = dataclasses.replace(CONFIG, on_bad_step="higher_precision")
POISON = {(1, 5): math.nan}
TENSOR = Layout(tensor=2)


@pytest.fixture(scope="module")
def whole(run_ranks, tmp_path_factory):
    work = tmp_path_factory.mktemp("whole")
    return run_ranks(lambda: tower.train(work, CONFIG), ranks=2), work


@pytest.fixture(scope="module")
def fallen_back(run_ranks, tmp_path_factory):
    """The tower's loss is NaN at batch 5, if it computes in FP8."""
    work = tmp_path_factory.mktemp("fallen_back")
    return run_ranks(lambda: tower.train(work, GUARDED, poison_in_fp8=POISON), ranks=2)


def losses(result) -> list[float]:
    return [row["loss"] for row in result[0].history]


@pytest.mark.parametrize("batch", [2, 5, 6])
def test_killed_it_ends_with_the_same_bits(run_ranks, tmp_path, whole, batch):
    """The delayed scales and their history come from the checkpoint: else the first step after it
    would differ."""
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(lambda: tower.train(tmp_path, CONFIG, kill=(1, batch)), ranks=2)
    resumed = run_ranks(lambda: tower.train(tmp_path, CONFIG), ranks=2)
    tower.assert_same(resumed[0], whole[0][0])


def test_it_goes_on_in_another_layout(run_ranks, tmp_path):
    """Two data-parallel ranks, or two tensor ranks from step 5 on: the scales are as far."""

    def of(layout, **options):
        return run_ranks(
            lambda: tower.train(tmp_path / "run", CONFIG, layout=layout, drop_path=0.0, **options),
            ranks=2,
        )[0]

    of(Layout(data=2), stop=(0, 4))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    stayed = of(Layout(data=2))
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "copy").rename(tmp_path / "run")
    moved = of(TENSOR)
    assert moved[0].resumed_from == stayed[0].resumed_from == 5
    assert losses(moved) == pytest.approx(losses(stayed), rel=0.01)


def test_scales_are_no_weights(whole):
    assert not [name for name in whole[0][0][1] if "fp8" in name or "scale" in name]


def test_a_bad_step_ends_fp8(fallen_back):
    """Back to the checkpoint of step 4, and on with the same batches."""
    first, second = fallen_back
    result, _, lines, batches = first
    assert batches == [0, *range(6), *range(4, 7)]
    assert [row["step"] for row in result.history] == list(range(7))
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
        from infra.train import loop

        leave_at_4, begin_step = [], loop.Fp8Run.begin_step

        def begin(run, *, watched):
            if len(leave_at_4) == 4:
                run.leave()
            leave_at_4.append(watched)
            begin_step(run, watched=watched)

        loop.Fp8Run.begin_step = begin
        try:
            return tower.train(tmp_path, CONFIG)
        finally:
            loop.Fp8Run.begin_step = begin_step

    expected = run_ranks(leaves, ranks=2)[0]
    assert fallen_back[0][0].history == expected[0].history


@pytest.mark.parametrize("kill_at", ["before", "after"])
def test_killed_it_decides_alike(run_ranks, tmp_path, fallen_back, kill_at):
    """Before the bad step, and after the checkpoint of step 6, which remembers the decision."""
    config = dataclasses.replace(GUARDED, steps=9)
    whole, half = tmp_path / "whole", tmp_path / "half"
    expected = run_ranks(
        lambda: tower.train(whole, config, poison_in_fp8=POISON), ranks=2
    )[0]  # fmt: skip

    def crash():
        return tower.train(
            half, config, poison_in_fp8=POISON, kill=(1, 4 if kill_at == "before" else 8)
        )

    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(crash, ranks=2)
    resumed = run_ranks(lambda: tower.train(half, config, poison_in_fp8=POISON), ranks=2)[0]
    tower.assert_same(resumed, expected)
    assert resumed[0].left_fp8_at == expected[0].left_fp8_at == 4
    if kill_at == "after":
        assert resumed[0].resumed_from >= 6
        assert json.loads(
            (half / "checkpoints/step-00000009/train.json").read_text("utf-8")
        )["account"]["left_fp8_at"] == 4  # fmt: skip


def test_bad_without_fp8_too_it_is_rolled_back(run_ranks, tmp_path):
    """The batch is at fault: once it is computed in higher precision, then passed over."""
    poison = {(0, 5): math.inf}
    result, _, _, batches = run_ranks(
        lambda: tower.train(tmp_path, GUARDED, poison=poison), ranks=2
    )[0]  # fmt: skip
    assert [bad["action"] for bad in result.bad_steps] == ["higher_precision", "rollback"]
    assert batches == [0, *range(6), 4, 5, 6, 7, 8]
    assert result.left_fp8_at == 4
    assert result.steps == 7


def test_logged_steps_tell_what_was_lost(whole):
    _, work = whole
    rows = [json.loads(line) for line in (work / "steps.jsonl").read_text("utf-8").splitlines()]
    told = {row["step"]: row for row in rows if "fp8_amax" in row}
    assert sorted(told) == [2, 5, 6]
    for row in told.values():
        assert row["fp8_amax"] > 0
        assert 0 <= row["fp8_lost"] <= 1
        assert row["fp8_lost_at"].startswith("decoder.layers.")


def test_sinks_get_its_numbers(run_ranks, tmp_path):
    config = dataclasses.replace(CONFIG, steps=3, fp8=TENSORWISE)

    def run():
        return tower.train(tmp_path, config, layout=Layout(), sinks=("dvclive",))

    run_ranks(run, ranks=1)
    told = tmp_path / "dvclive/plots/metrics"
    assert len((told / "fp8_lost.tsv").read_text("utf-8").splitlines()) == 2
    assert not (told / "fp8_lost_at.tsv").exists()
