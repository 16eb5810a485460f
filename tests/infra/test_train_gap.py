"""A run in FP8 beside its twin without."""

import pytest

from tests.support import tiny_tower as tower
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.gap import measure_gap, smoothed

pytestmark = pytest.mark.slow

CONFIG = TrainConfig(
    steps=10, batch_samples=tower.BATCH, lr=1e-3, save_every_steps=10,
    fp8=Fp8Config(first_layers=0, last_layers=0), on_bad_step="higher_precision",
)  # fmt: skip


def test_both_see_the_same_batches(run_ranks, tmp_path):
    layout = Layout(tensor=2)

    def run():
        return measure_gap(
            lambda: (tower.build(), tower.objective, tower.data_batch_at),
            CONFIG, layout=layout, work=tmp_path,
        )  # fmt: skip

    gap, *others = run_ranks(run, ranks=layout.ranks)
    assert len(gap.losses) == len(gap.twin_losses) == 10
    assert gap.losses[0] != gap.twin_losses[0]
    assert gap.losses == pytest.approx(gap.twin_losses, rel=0.05)
    assert gap.relative == pytest.approx(gap.losses[-1] / gap.twin_losses[-1] - 1)
    layers = {f"decoder.layers.{index}" for index in range(2)}
    assert layers < set(gap.cosines)
    assert all(0.9 < cosine < 1 for cosine in gap.cosines.values())
    assert all(other.losses == gap.losses and not other.cosines for other in others)


def test_the_smoothed_loss_is_the_mean_of_the_last_tenth():
    assert smoothed([float(i) for i in range(20)]) == 18.5
    assert smoothed([3.0]) == 3.0
