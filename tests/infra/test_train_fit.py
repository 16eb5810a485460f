"""The loop: killed, stopped or damaged, a run goes on and ends with the same bits."""

import json
import math
import signal
import time

import numpy as np
import pytest

from tests.support import tiny_tower as tower
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.core.errors import ConfigError, UserError
from vlfoundry.infra.launch.launcher import RankError
from vlfoundry.infra.train.config import TrainConfig

pytestmark = pytest.mark.slow

CONFIG = TrainConfig(
    steps=6, batch_samples=tower.BATCH, lr=1e-2, warmup_steps=2, save_every_steps=2, eps=1e-8,
    lr_scale={"decoder.layers.0": 0.5},
)  # fmt: skip


def _train(work, config=CONFIG, **options):
    return tower.train(work, config, **options)


@pytest.fixture(scope="module")
def uninterrupted(run_ranks, tmp_path_factory):
    return run_ranks(_train, tmp_path_factory.mktemp("clean"), ranks=2)[0]


def test_history_and_files(uninterrupted):
    result, _, lines, _ = uninterrupted
    assert [row["step"] for row in result.history] == list(range(6))
    assert set(result.history[0]) == {"step", "loss", "size", "lr", "grad_norm"}
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.steps == 6
    assert not result.interrupted
    assert lines[-1].startswith("step 6/6  loss")


@pytest.mark.parametrize("step", [1, 4])
def test_killed_run_goes_on_bit_identical(run_ranks, tmp_path, uninterrupted, step):
    def crash():
        return _train(tmp_path, kill=(1, step))

    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL"):
        run_ranks(crash, ranks=2)
    resumed = run_ranks(_train, tmp_path, ranks=2)[0]
    # The last one may still have been written; the one before was committed when it was begun.
    assert resumed[0].resumed_from in (max(0, step // 2 * 2 - 2), step // 2 * 2)
    tower.assert_same(resumed, uninterrupted)


def test_stopped_run_saves_and_goes_on_bit_identical(run_ranks, tmp_path, uninterrupted):
    def stopped():
        return _train(tmp_path, stop=(0, 2))

    first, second = run_ranks(stopped, ranks=2)
    assert (first[0].interrupted, first[0].steps) == (second[0].interrupted, second[0].steps)
    assert first[0].interrupted
    assert "run the same command again to go on" in first[2][-1]
    resumed = run_ranks(_train, tmp_path, ranks=2)[0]
    assert resumed[0].resumed_from == first[0].steps
    tower.assert_same(resumed, uninterrupted)


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGINT])
def test_every_signal_to_stop_saves(run_ranks, tmp_path, signum):
    """SIGTERM is the one above."""

    def stopped():
        return _train(tmp_path, stop=(1, 2), stop_signal=signum)

    assert [r[0].interrupted for r in run_ranks(stopped, ranks=2)] == [True, True]
    assert run_ranks(_train, tmp_path, ranks=2)[0][0].resumed_from == 3


def test_a_wall_clock_limit_saves(run_ranks, tmp_path, uninterrupted):
    def limited():
        return _train(tmp_path, deadline=time.monotonic())

    assert [r[0].steps for r in run_ranks(limited, ranks=2)] == [1, 1]
    resumed = run_ranks(_train, tmp_path, ranks=2)[0]
    assert resumed[0].resumed_from == 1
    tower.assert_same(resumed, uninterrupted)


def test_another_run_key_starts_clean(run_ranks, tmp_path):
    run_ranks(_train, tmp_path, ranks=2)

    def other():
        return _train(tmp_path, run_key="other")

    assert run_ranks(other, ranks=2)[0][0].resumed_from == 0


def test_damaged_checkpoint_falls_back_to_the_one_before(run_ranks, tmp_path, uninterrupted):
    run_ranks(_train, tmp_path, ranks=2)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000004", "step-00000006"]
    victim = max(folders[-1].iterdir(), key=lambda file: file.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    resumed = run_ranks(_train, tmp_path, ranks=2)[0]
    assert resumed[0].resumed_from == 4
    assert "step-00000006 is damaged" in resumed[2][0]
    tower.assert_same(resumed, uninterrupted)


def test_finished_run_does_nothing(run_ranks, tmp_path, uninterrupted):
    run_ranks(_train, tmp_path, ranks=2)
    again = run_ranks(_train, tmp_path, ranks=2)[0]
    assert again[0].resumed_from == 6
    tower.assert_same(again, uninterrupted)


def test_goes_on_with_another_number_of_ranks(run_ranks, tmp_path, uninterrupted):
    def stopped():
        return _train(tmp_path, stop=(0, 3))

    run_ranks(stopped, ranks=2)

    def alone():
        return _train(tmp_path, layout=Layout())

    result, _, lines, _ = run_ranks(alone, ranks=1)[0]
    assert result.resumed_from == 4
    assert any("2 ranks wrote this checkpoint" in line for line in lines)
    # Dropout differs now, hence only close.
    np.testing.assert_allclose(
        result.history[-1]["loss"], uninterrupted[0].history[-1]["loss"], rtol=0.3
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Layout(tensor=2), Layout()),
        (Layout(), Layout(data=2)),
        (Layout(data=2), Layout(tensor=2, data=2)),
    ],
)
def test_goes_on_in_another_layout(run_ranks, tmp_path, first, second):
    """Without dropout every layout gives the same losses; five heads are padded under tensor 2."""

    def run(work, layout, stop=None):
        return _train(work, layout=layout, stop=stop, drop_path=0.0)

    run_ranks(run, tmp_path / "split", first, (0, 2), ranks=first.ranks)
    split = run_ranks(run, tmp_path / "split", second, ranks=second.ranks)[0]
    whole = run_ranks(run, tmp_path / "whole", Layout(), ranks=1)[0]
    assert split[0].resumed_from == 3
    for got, expected in zip(split[0].history, whole[0].history, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
    for name, weight in whole[1].items():
        np.testing.assert_allclose(split[1][name], weight, rtol=1e-2, atol=1e-4, err_msg=name)


def test_frozen_parameters_stay(run_ranks, tmp_path, uninterrupted):
    def frozen():
        before = _train(tmp_path / "none", TrainConfig(steps=1, batch_samples=8, lr=1e-30))[1]
        after = _train(tmp_path / "some", frozen="decoder.layers.0")[1]
        return before, after

    before, after = run_ranks(frozen, ranks=2)[0]
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("decoder.layers.0")}


def test_times_stay_out_of_the_history(run_ranks, tmp_path):
    run_ranks(_train, tmp_path, ranks=2)
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert {"step", "data_s", "wall_s", "cpu_s", "samples_per_s"} <= set(rows[0])


def test_loss_that_is_not_finite_is_an_error(run_ranks, tmp_path):
    def diverge():
        from vlfoundry.infra.backend.parallel import parallel
        from vlfoundry.infra.train.loop import fit

        def objective(model, batch):
            loss, terms = tower.objective(model, batch)
            return loss * math.nan, terms

        with parallel(Layout()):
            fit(
                tower.build(), objective, tower.batch_at, CONFIG,
                work=tmp_path, run_key="key", layout=Layout(),
            )  # fmt: skip

    with pytest.raises(UserError, match=r"the loss is nan at step 0 \(batch 0\); lower train.lr"):
        run_ranks(diverge, ranks=1)


def test_unknown_lr_scale_is_an_error(run_ranks, tmp_path):
    def wrong():
        return _train(
            tmp_path, TrainConfig(steps=1, batch_samples=8, lr=1e-3, lr_scale={"vison.": 0.1})
        )

    with pytest.raises(ConfigError, match=r"no parameter begins with 'vison.'; the model has"):
        run_ranks(wrong, ranks=2)


def test_parameter_groups(run_ranks):
    def groups():
        from vlfoundry.infra.backend import device_literals
        from vlfoundry.infra.backend.parallel import parallel
        from vlfoundry.infra.train.optim import build_optimizer, set_step
        from vlfoundry.infra.train.trainer import wrap

        with parallel(Layout()), device_literals():
            optimizer = build_optimizer([wrap(tower.build())], CONFIG)
            set_step(optimizer, 1, CONFIG)
            return sorted(
                (group["lr"], group["weight_decay"], sum(p.numel() for p in group["params"]))
                for group in optimizer.param_groups
            )

    (found,) = run_ranks(groups, ranks=1)
    assert [(lr, decay) for lr, decay, _ in found] == [
        (5e-3, 0.0), (5e-3, 0.1), (1e-2, 0.0), (1e-2, 0.1)
    ]  # fmt: skip
    # One layer's matrices: qkv, projection, two of the MLP.
    assert found[1][2] == 40 * 40 * 4 + 2 * 40 * 80


def test_batch_must_divide():
    config = TrainConfig(steps=1, batch_samples=10, lr=1.0)
    assert config.samples_per_rank(5) == 2
    with pytest.raises(ConfigError, match="batch_samples 10 does not divide by 4"):
        config.samples_per_rank(4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("lr", 0.0),
        ("beta2", 1.0),
        ("warmup_steps", 99),
        ("ema_decay", 1.0),
        ("spike_factor", 0.5),
        ("layer_decay", {"vision": 1.1}),
    ],
)
def test_nonsense_is_refused(field, value):
    with pytest.raises(ConfigError, match=rf"train.{field}"):
        TrainConfig(**({"steps": 6, "batch_samples": 8, "lr": 1.0} | {field: value}))
