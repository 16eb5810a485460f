"""Ranks that torchrun starts: as forked ones in what they return, raise and compute."""

import os
import signal
import threading
import time

import pytest

from tests.support.tiny_project import (
    artifacts,
    make_project,
    run_stage,
    start_fork,
    start_process,
)
from vlfoundry.infra.backend.world import stop_requests, this_rank
from vlfoundry.infra.core.errors import ConfigError, DataError, KilledError
from vlfoundry.infra.launch.launcher import Launcher
from vlfoundry.infra.launch.launchers import launcher, launcher_names
from vlfoundry.infra.launch.launchers.torchrun import run_ranks
from vlfoundry.infra.launch.profile import load_profile

pytestmark = pytest.mark.slow

LIMIT_S = 120.0


@pytest.mark.parametrize("name", launcher_names())
def test_a_launcher_is_named_as_its_module(name):
    assert isinstance(launcher(name), Launcher)
    assert launcher(name).name == name


def test_an_unknown_launcher_is_named_with_its_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("ranks: 3\nlauncher: slurmy\n")
    with pytest.raises(ConfigError, match=r"launcher mine.yaml: unknown launcher 'slurmy'; choose"):
        load_profile(str(tmp_path / "mine.yaml"))


def test_ranks_meet_and_return_by_rank():
    offset = 10

    def work(base):
        import torch

        from vlfoundry.infra.backend import Layout
        from vlfoundry.infra.backend.parallel import parallel

        sums = []
        for layout in (Layout(data=2), Layout(tensor=2)):
            with parallel(layout):
                total = torch.tensor([float(this_rank().index + 1)])
                torch.distributed.all_reduce(total)
                sums.append(total.item())
        return base + offset + this_rank().index, sums, torch.get_num_threads()

    found = run_ranks(work, 100, ranks=2, threads=1, timeout_s=LIMIT_S)
    assert found == [(110, [3.0, 3.0], 1), (111, [3.0, 3.0], 1)]


def test_what_a_rank_raises_is_raised_here():
    def work():
        if this_rank().index == 1:
            raise DataError("row 3 has no caption")
        time.sleep(LIMIT_S)

    with pytest.raises(DataError, match="row 3 has no caption"):
        run_ranks(work, ranks=2, timeout_s=LIMIT_S)


def test_a_rank_that_is_killed_is_named():
    def work():
        if this_rank().index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(LIMIT_S)

    with pytest.raises(KilledError, match="rank 1 was killed"):
        run_ranks(work, ranks=2, timeout_s=LIMIT_S)


def test_a_request_to_stop_is_heeded_where_there_is_something_to_save(tmp_path):
    def work():
        with stop_requests() as stop:
            (tmp_path / f"{this_rank().index}").touch()
            while not stop.asked:
                time.sleep(0.05)
        return "saved"

    def ask():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    assert run_ranks(work, ranks=2, timeout_s=LIMIT_S) == ["saved"] * 2


def test_a_stage_gives_the_weights_of_forked_ranks(tmp_path, monkeypatch):
    """What a kill does is in `make accept SUBJECT=engine`."""
    made = []
    for name, start in (("fork", start_fork), ("torchrun", start_process)):
        root = make_project(tmp_path / name)
        run_stage(root, "pretrain_text")
        use(name, tmp_path, monkeypatch)
        run_stage(root, "contrastive", start=start)
        made.append(files_of_stage_1(root))
    assert made[0]["model/weights.safetensors"]
    assert made[0] == made[1]


def use(name, folder, monkeypatch):
    """Two ranks by this launcher, for what is started from now on."""
    profile = folder / f"{name}.yaml"
    profile.write_text(f"ranks: 2\nlauncher: {name}\n")
    monkeypatch.setenv("VLFOUNDRY_LAUNCHER", str(profile))


def files_of_stage_1(root):
    """What stage 1 has made, without its lineage."""
    return {n: f for n, f in artifacts(root, "contrastive").items() if "lineage" not in n}
