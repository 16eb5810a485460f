"""Checkpoints: complete or invisible, verified to the last bit, and the right ones kept."""

import json
import os
import shutil
import signal
import time

import pytest

from tests.support import tiny_tower as tower
from tests.support.small_disk import fill, small_disk
from vlfoundry.infra.core.errors import KilledError
from vlfoundry.infra.core.space import NoSpaceError
from vlfoundry.infra.launch.launcher import RankError
from vlfoundry.infra.train.checkpoint import best_checkpoint, newest
from vlfoundry.infra.train.config import TrainConfig

pytestmark = pytest.mark.slow

CONFIG = TrainConfig(
    steps=6, batch_samples=tower.BATCH, lr=1e-2, warmup_steps=2, save_every_steps=2
)


@pytest.fixture(scope="module")
def saved(run_ranks, tmp_path_factory):
    """The checkpoints of a whole run: after steps 4 and 6."""
    work = tmp_path_factory.mktemp("saved")
    run_ranks(lambda: tower.train(work, CONFIG), ranks=2)
    return work / "checkpoints"


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip, lambda path: path.unlink()],
                         ids=["truncated", "flipped", "deleted"])  # fmt: skip
def test_every_damaged_file_is_named_and_the_one_before_is_used(saved, tmp_path, damage):
    names = sorted(path.name for path in (saved / "step-00000006").iterdir())
    assert {".metadata", "metadata.json", "train.json"} < set(names)
    assert len(names) >= 5
    for name in names:
        folder = shutil.copytree(saved, tmp_path / name)
        damage(folder / "step-00000006" / name)
        lines = []
        found = newest(folder, "key", lines.append)
        assert found is not None
        assert found.folder.name == "step-00000004", name
        assert lines == [f"checkpoint step-00000006 is damaged ({name}); trying the one before"]


def test_every_bit_of_the_manifest_counts(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / "step-00000006" / "train.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        found = newest(folder, "key", lambda _: None)
        assert found is not None
        assert found.account.step == 4, f"byte {place}: {whole[place - 9 : place + 9]!r}"


def test_with_all_damaged_the_run_starts_anew(run_ranks, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    for folder in (tmp_path / "checkpoints").iterdir():
        _truncate(folder / "train.json")
    result, _, lines, _ = run_ranks(lambda: tower.train(tmp_path, CONFIG), ranks=2)[0]
    assert result.resumed_from == 0
    assert len([line for line in lines if "is damaged (train.json)" in line]) == 2


def test_what_is_not_finished_is_not_seen(run_ranks, tmp_path):
    """The writers hang; training goes on; after a kill there is no checkpoint."""

    def hang():
        import time

        from vlfoundry.infra.train import checkpoint

        checkpoint.fingerprint = lambda path: time.sleep(60)
        return tower.train(tmp_path, CONFIG, kill=(0, 3))

    with pytest.raises(RankError, match="rank 0 was killed"):
        run_ranks(hang, ranks=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".step-00000002.part"]
    result = run_ranks(lambda: tower.train(tmp_path, CONFIG), ranks=2)[0][0]
    assert result.resumed_from == 0
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000004", "step-00000006"]


def test_a_writer_that_fails_ends_the_run(run_ranks, tmp_path):
    def fail():
        from vlfoundry.infra.train import checkpoint

        def no_space(path):
            raise OSError("no space left on device")

        checkpoint.fingerprint = no_space
        return tower.train(tmp_path, CONFIG)

    with pytest.raises(RankError, match="the writer ended with exit code 1"):
        run_ranks(fail, ranks=2)
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_writer_that_is_killed_ends_the_run(run_ranks, tmp_path):
    def killed():
        from vlfoundry.infra.backend.world import this_rank
        from vlfoundry.infra.train import checkpoint

        def die(path):
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

        if this_rank().index == 1:
            checkpoint.fingerprint = die
        return tower.train(tmp_path, CONFIG)

    with pytest.raises(KilledError, match="writes a checkpoint was killed by SIGKILL"):
        run_ranks(killed, ranks=2)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_full_disk_is_said(run_ranks, tmp_path):
    with small_disk(tmp_path / "work", 3 << 20) as place:
        filler = fill(place, 20 << 10)  # less than a checkpoint takes
        with pytest.raises(NoSpaceError, match=rf"no space left on {place}.* \(0 MB free\); make"):
            run_ranks(lambda: tower.train(place, CONFIG), ranks=2)
        assert not list(place.rglob("*.part"))
        filler.unlink()
        resumed = run_ranks(lambda: tower.train(place, CONFIG), ranks=2)
    whole = run_ranks(lambda: tower.train(tmp_path / "whole", CONFIG), ranks=2)
    tower.assert_same(resumed[0], whole[0])


def test_the_newest_and_the_best_are_kept(run_ranks, tmp_path):
    """The learning rate is tiny and one batch far off, so the best checkpoint is known."""
    config = TrainConfig(
        steps=8, batch_samples=tower.BATCH, lr=1e-9, save_every_steps=2,
        keep_checkpoints=1, keep_best="-loss",
    )  # fmt: skip

    def run():
        return tower.train(tmp_path, config, poison={(0, 3): 9.0})

    assert run_ranks(run, ranks=2)[0][0].best_step == 4
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000008"]
    best = best_checkpoint(folder, "key", config)
    assert best is not None
    assert best.name == "step-00000004"
    assert json.loads((best / "train.json").read_text("utf-8"))["run_key"] == "key"
